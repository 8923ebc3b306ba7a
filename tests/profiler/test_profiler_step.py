"""The step profiler: phases that add up, and a step that it does not change."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from heart_models import QUIET, NoLength, Plain, batches, fitted, shuffled
from new_process import NewProcess
from ranks import run_ranks

import lit_fast
from lit_fast.callbacks import ModelCheckpoint
from lit_fast.errors import ProfileError
from lit_fast.loggers import TensorBoardLogger
from lit_fast.models.gpt import GPT
from lit_fast.ops import SlowStepTime
from lit_fast.profiler import files, header
from lit_fast.profiler.causes import Usual, causes_of
from lit_fast.profiler.profiler import PassThroughProfiler
from lit_fast.profiler.record import PHASES, Distribution, Part, Profile
from lit_fast.profiler.step import StepProfiler
from lit_fast.step import inline


def test_phases_sum_to_the_wall_time() -> None:
    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    made = fitted(Validates(), batches(20), [batches(2)], max_epochs=2, profiler="step", gradient_clip_val=1.0)
    phases = made.profiler.phases()
    assert list(phases) == list(PHASES)
    assert abs(sum(phases.values()) - made.profiler.wall) <= 1e-9  # sums of doubles of a few seconds
    assert all(seconds >= 0.0 for seconds in phases.values())
    assert all(phases[name] > 0.0 for name in ("data", "forward", "backward", "optimizer", "hooks", "validation"))
    costs = made.profiler.step_costs()
    assert costs["forward"] * 40 / 1e6 == pytest.approx(phases["forward"], rel=1e-12)


def test_nested_phases_count_once() -> None:
    profiler = StepProfiler()
    profiler.start()
    began = perf_counter()
    with profiler.phase("hooks"):
        sleep(0.01)
        with profiler.phase("checkpoint"):
            sleep(0.02)
    profiler.stop()
    took = perf_counter() - began
    phases = profiler.phases()
    assert phases["checkpoint"] >= 0.02 and phases["hooks"] >= 0.01
    assert phases["hooks"] + phases["checkpoint"] <= took


def test_an_error_leaves_the_stack_right() -> None:
    profiler = StepProfiler()
    profiler.start()

    def broken() -> None:
        raise KeyError

    for _ in range(2):
        with suppress(KeyError):
            profiler.wrap("forward", broken)()
    sleep(0.002)
    profiler.stop()
    assert profiler.phases()["forward"] < 0.002 <= profiler.phases()["unexplained"]


def test_losses_are_the_same_with_and_without() -> None:
    losses = []
    for profiler in (None, "step", StepProfiler()):
        for data in (lambda: shuffled(50), lambda: NoLength(batches(13))):
            torch.manual_seed(1)
            model = Plain(lambda p: torch.optim.AdamW(p, lr=0.01))
            fitted(model, data(), max_epochs=3, profiler=profiler, accumulate_grad_batches=3, gradient_clip_val=0.5)
            losses.append(model.losses)
    assert losses[0] == losses[2] == losses[4] and losses[1] == losses[3] == losses[5]


def test_switched_off_nothing_is_wrapped() -> None:
    model = Plain()
    made = fitted(model, batches(2), max_epochs=1)
    assert type(made.profiler) is PassThroughProfiler
    plans = made.fit_loop.plans
    assert plans is not None and plans.whole.training_step == model.training_step
    plan = plans.kind(True, True, 1)
    assert plan.run is inline
    bound = [plan.training_step, plan.backward, *plan.zero_grad, *plan.update, *plan.receive, *plan.schedulers]
    assert not [function for function in bound if hasattr(function, "__wrapped__")]
    assert "wrap" not in type(made.fit_loop._batches(0)).__name__.lower()
    timed = fitted(Plain(), batches(2), max_epochs=1, profiler="step").fit_loop.plans
    assert timed is not None and timed.kind(True, True, 1).run.__wrapped__ is inline


def test_saving_is_a_phase(tmp_path: Path) -> None:
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    made = lit_fast.Trainer(**options, max_epochs=1, profiler="step")
    made.fit(Plain(), batches(2))
    assert made.profiler.phases()["checkpoint"] > 0.0


# -- what is recorded


def recorded(model: Any, data: Any, *args: Any, **options: Any) -> Profile:
    profiler = StepProfiler(show=False)
    fitted(model, data, *args, profiler=profiler, **options)
    profile = profiler.profile()
    assert sum(row.seconds for row in profile.phases) == pytest.approx(profile.wall, rel=1e-12)
    return profile


def part(profile: Profile, name: str) -> Part:
    [found] = [part for part in profile.parts if part.name.endswith(name)]
    return found


def line(function: Any) -> str:
    return f"{__file__}:{function.__code__.co_firstlineno}"


class Waits(lit_fast.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        sleep(0.03 if batch_idx == 5 else 0.001)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        sleep(0.002)


class Validates(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sleep(0.002)

    def on_train_epoch_end(self) -> None:
        sleep(0.003)


def test_hooks_have_names_and_lines_in_a_step_and_outside() -> None:
    options = {"max_epochs": 1, "callbacks": [Waits()], "num_sanity_val_steps": 0}
    profile = recorded(Validates(), batches(10), batches(3), **options)
    start = part(profile, "Waits.on_train_batch_start")
    assert start.phase == "hooks" and start.calls == 10 and start.seconds >= 0.038
    assert start.where == line(Waits.on_train_batch_start) and 0.03 <= start.longest < start.seconds
    assert part(profile, "Waits.on_validation_end").where == line(Waits.on_validation_end)
    assert part(profile, "Validates.on_train_epoch_end").seconds >= 0.003
    step = part(profile, "validation_step")
    assert (step.phase, step.calls, step.where) == ("validation", 3, line(Validates.validation_step))
    assert profile.steps.count == 10 and profile.steps.buckets
    [hooks] = [row for row in profile.phases if row.name == "hooks"]
    assert hooks.per_step.count == 10 and 0.001 <= hooks.per_step.quantile(0.5) < 0.03
    slowest = profile.slowest[0]
    assert slowest.step in (5, 9)  # 9: with the validation
    [waited] = [slow for slow in profile.slowest if slow.step == 5]
    assert waited.causes[0].startswith("[Callback]Waits.on_train_batch_start 3")
    assert any(cause.startswith("validation ") for slow in profile.slowest if slow.step == 9 for cause in slow.causes)


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index**2))


def test_where_the_data_comes_from() -> None:
    """The line of the program's own that a loader runs, and not torch's."""
    part = torch.utils.data.Subset(Squares(), [1, 2])
    said, where, workers = header.source_of(torch.utils.data.DataLoader(part, num_workers=1))
    line = inspect.getsourcelines(Squares.__getitem__)[1]
    assert (said, where, workers) == ("a DataLoader with 1 worker of Squares", f"{__file__}:{line}", 1)
    tensors = torch.utils.data.TensorDataset(torch.ones(3))
    assert header.source_of(torch.utils.data.DataLoader(tensors)) == ("a DataLoader of TensorDataset", None, 0)
    own = torch.utils.data.DataLoader(tensors, collate_fn=lambda rows: rows)
    assert str(header.source_of(own)[1]).startswith(__file__)
    assert header.source_of([1, 2]) == ("list", None, None)


def test_the_header_says_what_ran() -> None:
    profile = recorded(Plain(torch.optim.AdamW), shuffled(10), max_epochs=1)
    found = profile.header
    assert found.module == "Plain" and found.parameters == sum(p.numel() for p in Plain().parameters())
    assert found.optimizer.startswith("AdamW: ") and found.batch == "float32[4, 8]"
    assert found.samples_per_step == 4.0 and found.precision == "32-true" and found.device == "cpu"
    assert found.pid == os.getpid() and found.versions["torch"] == torch.__version__ and found.processor
    assert found.commit is None or len(found.commit) == 10
    assert profile.finished and profile.own_cost is not None and 0.0 < profile.own_cost < 1e-3
    assert profile.clock_check == pytest.approx(profile.wall, abs=0.05) and not profile.warnings


def test_the_commit_is_read_from_the_repository(tmp_path: Path) -> None:
    assert header.commit_of(tmp_path) is None
    git, tree = tmp_path / "repository" / ".git", tmp_path / "tree"
    (git / "worktrees" / "tree").mkdir(parents=True)
    tree.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert header.commit_of(git.parent) is None  # nothing is committed
    (git / "packed-refs").write_text(f"# pack-refs\n{'a1' * 20} refs/heads/main\n{'b2' * 20} refs/heads/other\n")
    assert header.commit_of(git.parent) == "a1" * 5
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("c3" * 20 + "\n")
    assert header.commit_of(git.parent / "below") == "c3" * 5
    (tree / ".git").write_text(f"gitdir: {git / 'worktrees' / 'tree'}\n")
    (git / "worktrees" / "tree" / "HEAD").write_text("ref: refs/heads/other\n")
    (git / "worktrees" / "tree" / "commondir").write_text("../..\n")
    assert header.commit_of(tree) == "b2" * 5
    (git / "HEAD").write_text("d4" * 20)
    assert header.commit_of(git.parent) == "d4" * 5


def test_causes_of_slow_steps() -> None:
    class Slow(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 7:
                self.rubbish = [[n] for n in range(400_000)]
                gc.collect()
            return super().training_step(batch, batch_idx)

    def data() -> Iterator[Any]:
        for index, batch in enumerate(batches(12)):
            if index == 9:
                sleep(0.05)
            yield batch

    profile = recorded(Slow(), data(), max_epochs=1)
    causes = {slow.step: " ".join(slow.causes) for slow in profile.slowest}
    assert causes[7].startswith("garbage collection")
    waited = re.match(r"waited for data ([\d.]+) ms", causes[8])  # data without a length are fetched a step ahead
    assert waited and float(waited[1]) >= 50.0
    assert profile.slowest[0].at > 0.0


def test_a_clock_that_jumps_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = StepProfiler(show=False)
    profiler.start()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600.0)
    profiler.stop()
    [warning] = profiler.profile().warnings
    assert "clock jumped: 3600" in warning


def test_an_unknown_phase() -> None:
    with pytest.raises(ProfileError, match="no phase 'lunch'"):
        StepProfiler().phase("lunch")


def test_nothing_is_unexplained(tmp_path: Path) -> None:
    class Logs(Validates):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    data = shuffled(4 * 300)
    options: dict[str, Any] = {
        "max_epochs": 2,
        "val_check_interval": 100,
        "log_every_n_steps": 10,
        "logger": TensorBoardLogger(tmp_path),
        "callbacks": [ModelCheckpoint(tmp_path, every_n_train_steps=50)],
        "enable_checkpointing": True,
    }
    profile = recorded(Logs(), data, batches(2), **options)
    assert profile.unexplained <= 0.02
    assert all(profile.phase(name) > 0.0 for name in ("validation", "checkpoint", "logging"))
    assert profile.phase("loop") > 0.0


def test_nothing_of_a_gpt_is_unexplained() -> None:
    torch.manual_seed(1)
    model = GPT(64, 32, num_layers=2, num_heads=2, embedding_dim=64, total_steps=40)
    data = [torch.randint(64, (4, 33)) for _ in range(40)]
    assert recorded(model, data, max_epochs=1, gradient_clip_val=1.0).unexplained <= 0.02


def test_a_step_that_fetches_its_batches_itself() -> None:
    class Fetches(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    def data() -> Iterator[Any]:
        for batch in batches(6):
            sleep(0.002)
            yield batch

    profile = recorded(Fetches(), data(), max_epochs=1)
    assert profile.steps.count >= 6 and profile.phase("data") >= 0.012 > profile.phase("forward")


# -- files


def test_files_are_written_at_the_end(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "new" / "folder", show=False)
    made = fitted(Validates(), batches(5), batches(2), max_epochs=1, profiler=profiler)
    path = tmp_path / "new" / "folder" / "rank-00000.json"
    read, kept = files.read(path), profiler.profile()
    assert isinstance(read, Profile) and read.finished and read == files.read(path)
    assert (read.steps, read.parts, read.slowest, read.header) == (kept.steps, kept.parts, kept.slowest, kept.header)
    assert read.timeline == kept.timeline and len(read.timeline) > 5
    made.validate(Validates(), batches(2), verbose=False)
    assert files.read(path) == read  # the fit's stays
    other = files.read(tmp_path / "new" / "folder" / "validate" / "rank-00000.json")
    assert isinstance(other, Profile) and other.finished and other.phase("validation") > 0.0
    assert sorted(p.name for p in path.parent.iterdir()) == ["rank-00000.json", "validate"]


def test_an_exception_ends_the_file(tmp_path: Path) -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    watched = len(gc.callbacks)
    with pytest.raises(ZeroDivisionError):
        fitted(Breaks(), batches(5), max_epochs=1, profiler=StepProfiler(tmp_path))
    read = files.read(tmp_path / "rank-00000.json")
    assert isinstance(read, Profile) and not read.finished and read.ended_by == "ZeroDivisionError"
    assert read.steps.count == 4 and len(gc.callbacks) == watched


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        made = fitted(Plain(), batches(2), max_epochs=1, profiler=StepProfiler(tmp_path / "file", show=False))
    assert made.profiler.profile().finished


KILLED = """
    import sys
    import torch
    sys.path.insert(0, sys.argv[2])
    from heart_models import Plain, batches, fitted
    from lit_fast.profiler import StepProfiler
    fitted(Plain(), batches(1000), max_epochs=-1, profiler=StepProfiler(sys.argv[1], write_every=0.1))
"""


def test_what_was_recorded_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.json"
    running = NewProcess(KILLED, tmp_path, Path(__file__).parents[1])
    end = time.monotonic() + 60.0
    while time.monotonic() < end and not (path.exists() and files.read(path).steps.count):  # type: ignore[union-attr]
        sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    read = files.read(path)
    assert isinstance(read, Profile) and not read.finished and read.ended_by is None
    assert read.steps.count > 0 and read.header.batch == "float32[4, 8]" and read.slowest
    assert sum(row.seconds for row in read.phases) == pytest.approx(read.wall, rel=1e-12)


def test_a_file_is_of_one_size_whatever_the_number_of_steps(tmp_path: Path) -> None:
    sizes = []
    for steps in (2_000, 100_000):
        profiler = StepProfiler()
        profiler.start()
        work = profiler.wrap("forward", lambda batch: None)
        hook = profiler.wrap("hooks", lambda batch: None, "a hook")
        for number in profiler.wrap_batches(iter(range(steps))):
            work(number)
            hook(number)
            if number % 100 == 0:
                with profiler.phase("checkpoint", f"step {number}.ckpt"):
                    pass
        profiler.stop()
        files.write(profiler.profile(), tmp_path / "file.json")
        sizes.append((tmp_path / "file.json").stat().st_size)
        assert profiler.profile().steps.count == steps
    assert max(sizes) < 300_000


def two(folder: str) -> float:
    profiler = StepProfiler(folder, show=False)
    fitted(Plain(), shuffled(4 * 2 * 20), max_epochs=1, profiler=profiler, strategy="ddp", devices=2)
    return profiler.profile().phase("communication")


@pytest.mark.dist
def test_each_rank_writes_its_file(tmp_path: Path) -> None:
    waited = run_ranks(two, 2, str(tmp_path))
    assert min(waited) > 0.0
    for rank in range(2):
        read = files.read(tmp_path / f"rank-{rank:05d}.json")
        assert isinstance(read, Profile) and read.finished and read.steps.count == 20
        assert (read.header.rank, read.header.world_size, read.header.strategy) == (rank, 2, "DDPStrategy")
        assert read.phase("communication") == pytest.approx(waited[rank])


def test_copies_record_runs_of_their_own(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, write_every=2.0)
    fitted(Plain(), batches(2), max_epochs=1, profiler=profiler)
    for other in (copy.deepcopy(profiler), pickle.loads(pickle.dumps(profiler))):
        assert (other.dirpath, other.write_every, other.wall) == (tmp_path, 2.0, 0.0)


def test_the_table_is_shown_at_the_end_of_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    made = fitted(Validates(), batches(3), batches(1), max_epochs=1, profiler="step")
    said = capsys.readouterr().out
    assert all(word in said for word in ("forward", "backward", "unexplained", "wall"))
    made.profiler.show = False
    made.fit(Validates(), batches(3), batches(1))
    assert capsys.readouterr().out == ""


def test_causes_need_a_slow_step() -> None:
    steps, rare = Distribution(), Distribution()
    steps.add(1e-3, 100)
    rare.add(2e-3, 10)
    usual = Usual.of(steps, {"forward": steps, "validation": rare})
    assert usual.phases == {"forward": pytest.approx(1e-3)} and usual.step == pytest.approx(1e-3)
    ordinary = SlowStepTime(3, 1_000_000, 0, {"forward": 1_000_000}, {}, None, 0)
    assert causes_of(ordinary, usual) == []
    slow = SlowStepTime(3, 9_000_000, 0, {"forward": 9_000_000}, {"compilation": 7_500_000}, None, 0)
    assert causes_of(slow, usual) == ["compilation 7.5 ms", "forward +8 ms"]

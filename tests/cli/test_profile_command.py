"""`lit-fast profile`: unedited programs, exit codes, and what is there after a program that fails.

Each test trains twice in a process of its own, in seconds: those that others nearly cover are slow ones.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import new_process
import pytest
from new_process import NewProcess

from lit_fast.cli.profile import parsed
from lit_fast.profiler.files import read
from lit_fast.profiler.lightning_side import phase_of
from lit_fast.profiler.record import Comparison, Profile, Report

PROGRAM = """
import os, signal, sys, time
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

plant = sys.argv[1] if len(sys.argv) > 1 else ""

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        if plant == "crash" and self.global_step == 30:
            raise RuntimeError("planted")
        if plant == "kill" and self.global_step == 30:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.net(batch[0]).square().mean()
        if plant == "differ":
            loss = loss * (1 if hasattr(self.trainer, "fit_loop") else 1.5)
        if plant == "reads":
            self.trainer.fit_loop
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

class Slow(L.Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.01)

if plant == "never":
    sys.exit()
L.seed_everything(1)
loader = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=8, shuffle=True)
trainer = L.Trainer(
    max_epochs=2 if plant == "short" else 100, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Slow()] if plant == "slow" else [],
)
trainer.fit(Model(), loader)
print("after", trainer.global_step, sys.argv[1:])
if plant == "later":
    raise KeyError("planted")
if plant == "exit":
    trainer.fit_loop.max_epochs = 101
    trainer.fit(Model(), loader)
    sys.exit(3)
"""


def profile(folder: Path, *arguments: str, program: str = PROGRAM) -> NewProcess:
    (folder / "program.py").write_text(program)
    command = ("profile", *arguments, "--out", str(folder / "out"), str(folder / "program.py"))
    run = "import sys; from lit_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    options, _, rest = " ".join(command).partition(" -- ")
    after = ["--", *rest.split()] if rest else []
    return new_process.run(run, *options.split(), *after)


def planted(folder: Path, plant: str, *options: str) -> NewProcess:
    """As a user writes it: the program's argument behind it."""
    (folder / "program.py").write_text(PROGRAM)
    run = "import sys; from lit_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    program = str(folder / "program.py")
    return new_process.run(run, "profile", program, plant, "--out", str(folder / "out"), *options)


def report(folder: Path) -> Report:
    found = read(folder / "out" / "report.json")
    assert isinstance(found, Report)
    return found


def comparison(folder: Path) -> Comparison:
    found = report(folder).comparison
    assert found is not None
    return found


def test_against_eager(tmp_path: Path) -> None:
    ended = planted(tmp_path, "--plain", "--steps", "40", "--fail-if-slower", "100000%")
    assert ended.returncode == 0, ended.stderr
    assert "after 43 ['--plain']" in ended.stdout  # 21 windows of 2 and the step in which it ends, not 800
    assert (
        "Against eager: medians of 20 windows of 2 steps in turns" in ended.stdout
        and "not shown to be slower" in ended.stdout
    )
    found = report(tmp_path)
    assert found.profiles[0].header.script.endswith("program.py --plain") and found.profiles[0].finished
    assert found.comparison is not None and found.comparison.against == "eager"
    assert found.comparison.largest_loss_difference is not None
    assert found.comparison.largest_loss_difference <= 1e-5
    assert "step()" in (tmp_path / "out" / "eager.py").read_text()
    assert ended.stdout.count("Against eager") == ended.stdout.count("Where the time went") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "program.py"]


def test_a_slow_hook_fails_the_check(tmp_path: Path) -> None:
    ended = planted(tmp_path, "slow", "--steps", "30", "--fail-if-slower", "2%")
    assert ended.returncode == 1, ended.stderr
    assert "slower by more than 2%" in ended.stdout
    step = next(row for row in comparison(tmp_path).rows if row.name == "step")
    assert step.low > 1.02


def test_losses_that_differ_are_the_first_finding_and_an_error(tmp_path: Path) -> None:
    ended = planted(tmp_path, "differ", "--steps", "30")
    assert ended.returncode == 1
    assert report(tmp_path).findings[0].title == "The losses of both sides differ"
    assert "Losses differ by 0.33 of a loss at most (allowed: 1e-05)." in ended.stdout


def test_a_program_that_never_fits(tmp_path: Path) -> None:
    ended = planted(tmp_path, "never")
    assert ended.returncode == 1 and "ended without calling Trainer.fit" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "out").exists()


def test_a_program_that_crashes_in_its_fit(tmp_path: Path) -> None:
    ended = planted(tmp_path, "crash")
    assert ended.returncode == 1
    assert 'raise RuntimeError("planted")' in ended.stderr
    found = report(tmp_path)
    assert found.profiles[0].ended_by == "RuntimeError" and not found.profiles[0].finished
    assert found.profiles[0].steps.count >= 30 and found.comparison is None


def test_a_fit_of_no_steps_is_not_compared(tmp_path: Path) -> None:
    ended = profile(tmp_path, program=PROGRAM.replace("randn(64, 8)), batch_size=8, shuffle=True", "randn(0, 8))"))
    assert ended.returncode == 1 and "The fit took 0 steps, too few to compare: 7 are needed" in ended.stderr
    assert "Too few steps to find anything in: 0" in ended.stdout and "--steps" not in ended.stderr


@pytest.mark.slow
def test_several_processes_are_one_report(tmp_path: Path) -> None:
    """Started by the program itself: every process is this command again, and the first one has the report."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace('accelerator="cpu"', 'accelerator="cpu", devices=2, strategy="ddp"'))
    command = [sys.executable, "-m", "lit_fast.cli.main", "profile", program, "--against", "none", "--steps", "21"]
    ended = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = report(tmp_path)
    assert [rank.rank for rank in found.ranks] == [0, 1] and all(rank.finished for rank in found.ranks)
    assert not found.missing and not found.problems
    assert "Where the time went: rank 0 of 2" in ended.stdout and "fitted" not in ended.stdout


@pytest.mark.parametrize("plant, code", [("exit", 3), ("later", 1)])
def test_what_a_program_does_after_its_fit(tmp_path: Path, plant: str, code: int) -> None:
    ended = planted(tmp_path, plant, "--steps", "21")
    assert ended.returncode == code
    assert comparison(tmp_path).windows == 20
    assert ("KeyError" in ended.stderr) is (plant == "later")
    assert ("The program fitted 2 times; the first one is shown." in ended.stdout) is (plant == "exit")


def test_a_program_that_is_killed_leaves_its_last_file(tmp_path: Path) -> None:
    ended = planted(tmp_path, "kill")
    assert ended.returncode == -signal.SIGKILL
    found = read(tmp_path / "out" / "rank-00000.json")
    assert isinstance(found, Profile) and found.steps.count >= 25 and not found.finished


@pytest.mark.slow
def test_what_no_loop_by_hand_can_do_is_said_before_training(tmp_path: Path) -> None:
    ended = planted(tmp_path, "reads", "--steps", "30")
    assert ended.returncode == 1 and "trainer.fit_loop" in ended.stderr and "Traceback" not in ended.stderr
    assert report(tmp_path).profiles[0].finished  # what was recorded is there
    program = PROGRAM.replace("max_epochs=2 if", "nonfinite='skip', max_epochs=2 if")
    ended = profile(tmp_path, program=program)
    assert ended.returncode == 1 and "nonfinite='skip'" in ended.stderr and "after" not in ended.stdout


@pytest.mark.slow
def test_a_fit_that_is_too_short(tmp_path: Path) -> None:
    ended = planted(tmp_path, "short", "--against", str(tmp_path / "program.py"))
    assert ended.returncode == 1 and "is not JSON" in ended.stderr and "after" not in ended.stdout
    ended = planted(tmp_path, "short")
    assert ended.returncode == 0, ended.stderr  # 16 steps: windows of 1
    assert comparison(tmp_path).windows == 14


@pytest.mark.slow
def test_against_an_earlier_run(tmp_path: Path) -> None:
    first = planted(tmp_path, "slow", "--steps", "30", "--against", "none")
    assert first.returncode == 0 and report(tmp_path).comparison is None
    earlier = tmp_path / "earlier.json"
    (tmp_path / "out" / "report.json").rename(earlier)
    ended = planted(tmp_path, "", "--steps", "30", "--against", str(earlier), "--fail-if-slower", "2%")
    assert ended.returncode == 0, ended.stderr
    found = comparison(tmp_path)
    step = next(row for row in found.rows if row.name == "step")
    assert step.high < 1.0 and found.against == str(earlier) and found.largest_loss_difference is None
    assert any("not side by side" in note for note in found.notes)
    assert any(note.startswith("script: ") and "slow then" in note for note in found.notes)


LIGHTNING = {
    "__init__.py": "__version__ = '0'\nfrom lightning.pytorch import *\n",
    "pytorch/__init__.py": """
from contextlib import contextmanager
class LightningModule: ...
class Strategy:
    class root_device: type = "cpu"
class Trainer:
    strategy = Strategy()
    def fit(self, model, loader):
        import time
        for batch in loader:
            with self.profiler.profile("[_TrainingEpochLoop].train_dataloader_next"): time.sleep(0.001)
            with self.profiler.profile("run_training_batch"):
                with self.profiler.profile("[LightningModule]M.optimizer_step"):
                    with self.profiler.profile("[Strategy]S.training_step"): time.sleep(0.002)
                    with self.profiler.profile("[Callback]C.on_before_optimizer_step"): time.sleep(0.001)
""",
    "pytorch/profilers.py": """
from contextlib import contextmanager
class Profiler:
    @contextmanager
    def profile(self, name):
        self.start(name)
        yield
        self.stop(name)
""",
}


@pytest.mark.slow
def test_against_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Lightning that takes a known time; lit_fast's own name leads to it, too."""
    for name in ("callbacks", "loggers", "strategies", "utilities"):
        LIGHTNING[f"pytorch/{name}.py"] = ""
    for name, text in LIGHTNING.items():
        (tmp_path / "packages" / "lightning" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / "lightning" / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=":")
    program = tmp_path / "both.py"
    program.write_text(
        "import sys, lit_fast as L, torch\n"
        "class M(L.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.net = torch.nn.Linear(2, 1)\n"
        "    def training_step(self, batch, batch_idx): return self.net(batch).mean()\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)\n"
        "ours = hasattr(L, 'lazy')\n"
        "made = L.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,\n"
        "    enable_progress_bar=False, enable_model_summary=False) if ours else L.Trainer()\n"
        "made.fit(M() if ours else None, [torch.ones(1, 2)] * 100)\n"
    )
    run = "import sys; from lit_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    out = ("--out", str(tmp_path / "out"))
    ended = new_process.run(run, "profile", "--against", "lightning", "--steps", "42", *out, str(program))
    assert ended.returncode == 0, ended.stderr
    found = comparison(tmp_path)
    rows = {row.name: row.baseline for row in found.rows}
    assert rows["data"] >= 0.001 and rows["forward"] >= 0.002 and rows["hooks"] >= 0.001
    assert found.steps == 2 and found.windows == 20
    assert rows["step"] == pytest.approx(sum(rows.values()) - rows["step"], rel=0.2)  # medians need not add up


@pytest.mark.slow
def test_an_interpreter_without_lightning(tmp_path: Path) -> None:
    ended = planted(tmp_path, "", "--steps", "21", "--against", "lightning", "--lightning-python", "/bin/false")
    assert ended.returncode == 1 and "--lightning-python PATH" in ended.stderr
    assert report(tmp_path).profiles[0].finished


@pytest.mark.parametrize(
    "action, phase",
    [
        ("[_TrainingEpochLoop].train_dataloader_next", "data"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "transfer"),
        ("[LightningModule]M.transfer_batch_to_device", "transfer"),
        ("[Strategy]SingleDeviceStrategy.training_step", "forward"),
        ("[Strategy]SingleDeviceStrategy.backward", "backward"),
        ("[LightningModule]M.optimizer_step", "optimizer"),
        ("[LightningModule]M.optimizer_zero_grad", "optimizer"),
        ("[LightningModule]M.on_before_optimizer_step", "hooks"),
        ("[Callback]C.on_train_batch_end", "hooks"),
        ("[LightningModule]M.lr_scheduler_step", "schedulers"),
        ("[Strategy]SingleDeviceStrategy.validation_step", "validation"),
        ("run_training_batch", None),
    ],
)
def test_lightnings_actions_by_phase(action: str, phase: str | None) -> None:
    assert phase_of(action) == phase


def test_options_may_stand_before_and_after_the_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.touch()
    options = parsed(["--steps", "5", str(program), "data", "--epochs", "3", "--against", "none", "--", "--steps", "7"])
    assert (options.steps, options.against, options.program) == (5, "none", str(program))
    assert options.arguments == ["data", "--epochs", "3", "--steps", "7"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing.py"], "no file 'nothing.py'"),
        (["{}", "--against", "nothing.json"], "--against nothing.json: allowed are eager"),
        (["{}", "--steps", "0"], "at least 1 step"),
        (["{}", "--out", "{}/out"], "program.py is a file; name a folder"),
        (["{}", "--fail-if-slower", "2"], "such as 2%"),
        (["{}", "--fail-if-slower", "x%"], "such as 2%"),
        (["{}", "--fail-if-slower=-2%"], "0% and more"),
        (["{}", "--fail-if-slower", "2%", "--against", "none"], "needs a baseline"),
        ([], "program"),
    ],
)
def test_wrong_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    program = tmp_path / "program.py"
    program.touch()
    with pytest.raises(SystemExit) as stop:
        parsed([argument.format(program) for argument in arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err

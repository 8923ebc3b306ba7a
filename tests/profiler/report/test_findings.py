"""Findings: each rule speaks from its threshold on, names the place, and the weightiest comes first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from profiles import deep, profile

from lit_fast.profiler.merge import of_profiles
from lit_fast.profiler.record import Distribution, Finding, Part, Phase, Profile, SlowStep, Sync
from lit_fast.profiler.report.findings import FEW_STEPS, find


def first(*profiles: Profile) -> Finding:
    return find(of_profiles(profiles))[0]


def ranks(number: int, **of_rank_two: float) -> list[Profile]:
    """Processes that wait for rank 2: what it does longer, the others wait in communication."""
    longer = sum(of_rank_two.values())
    made = [profile(rank=rank, world_size=number, communication=0.2e-3 + longer) for rank in range(number)]
    usual = {row.name: row.seconds / 200 for row in made[2].phases}
    more = {name: usual[name] + seconds for name, seconds in of_rank_two.items()}
    made[2] = profile(rank=2, world_size=number, **{**more, "communication": 0.2e-3})
    return made


@pytest.mark.parametrize("remarkable", [profile(), deep(), profile(steps=FEW_STEPS - 1, data=1.0), Profile()])
def test_nothing_stands_out(remarkable: Profile) -> None:
    assert find(of_profiles([remarkable])) == []


def test_nothing_stands_out_of_several_processes() -> None:
    assert find(of_profiles([profile(rank=rank, world_size=4) for rank in range(4)])) == []


def with_hook(seconds: float) -> Profile:
    made = profile(hooks=0.08e-3 + seconds)
    made.parts.append(Part("hooks", "[Callback]Plots.on_train_batch_end", 200 * seconds, 200, "plots.py:7", 0.1))
    return made


def with_sync(seconds: float | None, calls: int = 10) -> Profile:
    made = deep()
    made.syncs = [Sync("train.py:42", "  total += loss.item()\n", calls, None if seconds is None else 10 * seconds)]
    return made


def with_collections(milliseconds: float) -> Profile:
    made = profile()
    for slow in made.slowest:
        slow.causes = [f"garbage collection {milliseconds:.0f} ms"]
    return made


def by_torch(seconds: float) -> Profile:
    made = profile(optimizer=seconds)
    made.header.optimizer = "AdamW: its own step, because it is complex"
    return made


def throttled(seconds: float) -> Profile:
    made = deep()
    made.devices[0].throttled = {"SW thermal slowdown": seconds}
    return made


def with_idle(seconds: float) -> Profile:
    """Of a GPU, beside what it waits for data, which is another finding's."""
    made = profile()
    data = next(row for row in made.phases if row.name == "data")
    waits = seconds + data.per_step.mean
    made.device_steps = made.steps
    made.phases.append(Phase("idle", 0.0, 0, on_device=Distribution(200, 200 * waits, waits, waits)))
    return made


# What is planted, the largest of it that is no finding, the smallest that is one; the rest of a step is about 10 ms.
RULES: list[tuple[str, Callable[[float], Profile], float, float, str, str]] = [
    ("data", lambda s: profile(data=s), 0.50e-3, 0.56e-3, "keeps the step waiting", "train_dataloader"),
    ("hook", with_hook, 0.19e-3, 0.22e-3, "[Callback]Plots.on_train_batch_end is slow", "plots.py:7"),
    ("sync", lambda s: with_sync(s, 1), 0.19e-3, 0.22e-3, "waits for the device", "train.py:42"),
    ("checkpoint", lambda s: profile(checkpoint=s), 0.19e-3, 0.22e-3, "Saving checkpoints", "model_checkpoint.py:200"),
    ("logging", lambda s: profile(logging=s), 0.19e-3, 0.22e-3, "Logging takes", "log_every_n_steps"),
    ("communication", lambda s: profile(communication=s), 0.50e-3, 0.56e-3, "not hidden", "strategy"),
    ("idle", with_idle, 0.46e-3, 0.56e-3, "waits for its host", "training_step"),
    ("garbage", with_collections, 3.0, 5.0, "garbage collector", "gc"),
    ("optimizer", by_torch, 0.44e-3, 0.52e-3, "not compiled", "configure_optimizers"),
    ("throttle", throttled, 0.09, 0.11, "below its clock", "NVIDIA H200 on node-0"),
    ("unexplained", lambda s: profile(unexplained=s), 0.19e-3, 0.22e-3, "belongs to no phase", "unexplained"),
]


@pytest.mark.parametrize(
    ("name", "advice"), [("gradients", "in 16 bits"), ("buffers", "broadcast_buffers=False"), ("reduce", "sync_dist")]
)
def test_communication_says_what_most_of_it_is_for(name: str, advice: str) -> None:
    made = profile(communication=1e-3)
    made.parts += [Part("communication", "barrier", 0.01, 1), Part("communication", name, 0.19, 200)]
    found = next(finding for finding in find(of_profiles([made])) if finding.where == "strategy")
    assert f"Most of it is for {name}." in found.detail and advice in found.advice


@pytest.mark.parametrize(
    ("planted", "below", "above", "title", "where"), [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_a_rule_speaks_from_its_threshold_on(
    planted: Callable[[float], Profile], below: float, above: float, title: str, where: str
) -> None:
    assert find(of_profiles([planted(below)])) == []
    (found,) = find(of_profiles([planted(above)]))
    assert title in found.title and found.where == where
    assert found.detail and found.advice and not found.rank


def test_what_a_run_does_once_is_no_finding_and_hides_none() -> None:
    made = with_hook(1e-3)
    made.parts.append(Part("hooks", "[LightningModule]GPT.configure_optimizers", 60.0, 1, "train.py:9", 60.0))
    made.phases[6].seconds += 60.0
    made.wall += 60.0
    (found,) = find(of_profiles([made]))
    assert found.where == "plots.py:7"


def test_what_is_lost_is_told_a_step() -> None:
    assert first(profile(data=3e-3)).seconds_per_step == pytest.approx(3e-3)
    assert first(with_hook(2e-3)).seconds_per_step == pytest.approx(2e-3)
    assert first(with_sync(1e-3)).seconds_per_step == pytest.approx(1e-3), "of the steps of the window"
    assert "`total += loss.item()`: 1.00 times a step" in first(with_sync(1e-3)).detail


def test_on_a_cpu_a_read_is_told_for_what_it_is() -> None:
    made = profile()
    made.window_steps, made.syncs = 1, [Sync("train.py:42", "if loss.item() > 9:", 1, 1e-6)]
    (found,) = find(of_profiles([made]))
    assert found.title == "A tensor's value is read in every step" and found.where == "train.py:42"


def test_a_read_in_every_step_is_told_even_where_nobody_knows_what_it_costs() -> None:
    assert find(of_profiles([with_sync(None, calls=4)])) == []
    assert first(with_sync(None, calls=5)).where == "train.py:42"


def test_workers_that_start_slowly_are_not_a_loader_that_is_slow() -> None:
    made = profile(data=3e-3)
    row = next(row for row in made.phases if row.name == "data")
    row.per_step = Distribution()
    row.per_step.add(1e-4, 199)
    row.per_step.add(0.58)
    found = first(made)
    assert found.title == "The data loader takes long to begin" and "persistent_workers" in found.advice
    assert "580 ms" in found.detail


@pytest.mark.parametrize(
    ("seconds", "workers", "said"),
    [
        (8e-4, 0, "A worker's process would take as long"),
        (3e-3, 0, "num_workers=2 or more"),
        (3e-3, 4, "Its 4 workers cannot keep up"),
        (8e-4, 1, "Its 1 worker cannot keep up"),
    ],
)
def test_what_helps_depends_on_the_loader_there_is(seconds: float, workers: int, said: str) -> None:
    made = profile(data=seconds)
    made.header.workers, made.header.data_where = workers, "train.py:12"
    found = first(made)
    assert said in found.advice and found.where == "train.py:12"


def test_a_compiled_first_step_hides_nothing() -> None:
    made = with_hook(1e-3)
    made.steps.total += 100.0
    made.wall += 100.0
    made.slowest.insert(0, SlowStep(0, 100.01, {"forward": 100.0}, ["the first step", "compilation 100 s"]))
    (found,) = find(of_profiles([made]))
    assert found.where == "plots.py:7" and "(9." in found.detail


def test_a_save_that_came_once_or_twice_is_told_where_it_took_long() -> None:
    """At Ctrl-C, at the end of an epoch: 20 ms say nothing about a longer run."""
    for saves, each, told in ((1, 0.09, False), (2, 0.09, False), (2, 0.11, True), (3, 0.09, True)):
        made = profile(checkpoint=saves * each / 200)
        made.parts = [Part("checkpoint", "last.ckpt", saves * each, saves)]
        assert bool(find(of_profiles([made]))) is told


def test_the_memory_that_is_nearly_full() -> None:
    made = deep()
    made.memory.allocator_retries = 3
    assert "3 times" in first(made).detail and first(made).where == "activations"


def test_bytes_of_a_checkpoint_give_the_speed_of_the_disk() -> None:
    made = profile(checkpoint=1e-3)
    part = next(part for part in made.parts if part.phase == "checkpoint")
    part.bytes = 2 * 50 * 2**20
    found = first(made)
    assert "4 saves of 50.0 ms" in found.detail and "100 MiB at 500 MiB/s" in found.detail
    assert found.where == "model_checkpoint.py:200"


def test_saves_to_several_files_are_counted_together() -> None:
    made = profile(checkpoint=1e-3)
    made.parts = [Part("checkpoint", f"epoch={n}.ckpt", 0.05, 1, bytes=50 * 2**20) for n in range(4)]
    assert "4 saves of 50.0 ms" in first(made).detail and "200 MiB at 1000 MiB/s" in first(made).detail


def test_one_save_of_a_short_run_is_told_where_it_took_long() -> None:
    for milliseconds, told in ((0.4, False), (0.7, True)):
        made = profile(checkpoint=milliseconds * 1e-3)
        made.parts = [Part("checkpoint", "last.ckpt", milliseconds * 0.2, 1)]
        assert bool(find(of_profiles([made]))) is told


def test_the_weightiest_comes_first_and_unknown_losses_last() -> None:
    made = with_hook(1e-3)
    made.header.optimizer = "SGD: its own step, because it is sparse"
    made.phases[0].seconds += 200 * 2e-3
    made.wall += 200 * 2e-3
    titles = [finding.title for finding in find(of_profiles([made]))]
    assert [title.split()[-1] for title in titles] == ["waiting", "slow", "compiled"]


@pytest.mark.parametrize("phase", ["data", "forward", "hooks", "optimizer"])
def test_a_slow_rank_is_the_first_finding_and_the_only_one(phase: str) -> None:
    made = ranks(4, **{phase: 2e-3})
    (found,) = find(of_profiles(made))
    assert found.rank == 2 and found.title == "Rank 2 on node-0 is slower than the others"
    assert found.seconds_per_step == pytest.approx(2e-3) and f"{phase} takes 2.00 ms" in found.detail


def test_a_rank_a_little_slower_is_none() -> None:
    assert find(of_profiles(ranks(4, forward=0.45e-3))) == []
    assert first(*ranks(4, forward=0.60e-3)).rank == 2


def test_where_collectives_are_not_timed_waiting_in_backward_is_no_work() -> None:
    made = [profile(rank=rank, world_size=4, backward=8e-3, communication=0.0) for rank in range(4)]
    made[1] = profile(rank=1, world_size=4, backward=5e-3, data=3.1e-3, communication=0.0)
    assert first(*made).rank == 1


def test_a_slow_rank_is_told_with_its_hook_and_its_clocks() -> None:
    made = ranks(4, hooks=2e-3)
    made[2].parts.append(Part("hooks", "[Callback]Dump.on_train_batch_end", 0.4, 200, "dump.py:3"))
    (found,) = find(of_profiles(made))
    assert found.where == "dump.py:3" and "[Callback]Dump" in found.detail
    slow = ranks(8, forward=2e-3)
    deep(slow[2]).devices[0].throttled = {"HW thermal slowdown": 0.05}
    found = first(*slow)
    assert "sm clock 1905 MHz" in found.detail and "throttled 50.0 ms (HW thermal slowdown)" in found.detail
    assert "cooling" in found.advice


def test_what_only_the_first_process_does_is_told_as_such() -> None:
    made = [profile(rank=rank, world_size=4, checkpoint=1e-3 if rank == 0 else 0.0) for rank in range(4)]
    found = first(*made)
    assert found.title == "Saving checkpoints holds the run up" and found.rank == 0

"""What a profiler is told of collectives: hidden and waited for add up, and nothing is left of it afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from heart_models import Plain, fitted, trainer
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

import lit_fast.rank_zero
from lit_fast.distributed import flights as flights_module
from lit_fast.distributed.flights import FIRST, Flights
from lit_fast.profiler.merge import of_profiles
from lit_fast.profiler.record import Profile, Span
from lit_fast.profiler.report.findings import find
from lit_fast.profiler.step import StepProfiler
from lit_fast.strategies import DDPStrategy, ZeRO1Strategy

# -- on paper


class Clock:
    """Times as a test writes them."""

    now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(flights_module, "time", made)
    return made


class Work:
    """A collective that the test ends; waiting for it takes until it is over."""

    def __init__(self, clock: Clock, ends: int) -> None:
        self.clock, self.ends, self.future = clock, ends, torch.futures.Future[None]()

    def get_future(self) -> Any:
        return self.future

    def end(self) -> None:
        self.clock.now = self.ends
        self.future.set_result(None)

    def wait(self) -> bool:
        if not self.future.done():
            self.end()
        return True


class Sender:
    work: Any = None

    def send(self, work: Any) -> None:
        self.work = work


def told(counts: bool = True) -> Flights:
    return Flights(lambda phase, function, part: function, lambda phase, part: nullcontext(), lambda: counts)


def sent(flights: Flights, clock: Clock, begin: int, ends: int) -> Sender:
    made = Sender()
    flights.watch(made, "send", "work", "all_reduce", "gradients", 100)
    clock.now = begin
    made.send(Work(clock, ends))
    return made


@pytest.mark.parametrize(
    ("journeys", "waits", "hidden"),
    [
        ([(0, 10)], [4], 4),  # waited for while under way
        ([(0, 10)], [20], 10),  # over long before
        ([(0, 10), (1, 12)], [5, 10], 5),  # two at a time are one time
        ([(0, 3), (1, 10)], [5, 5], 5),
        ([(0, 3), (6, 8)], [20, 20], 5),  # nothing was under way from 3 to 6
        ([(0, 10), (1, 8)], [5, 10], 5),  # the second was over before the first
        ([(5, 9)], [5], 0),  # waited for at once
        ([(0, 6), (1, 20)], [4, 15], 4 + 15 - 6),
    ],
)
def test_hidden_is_what_was_under_way_less_the_waits(
    clock: Clock, journeys: list[tuple[int, int]], waits: list[int], hidden: int
) -> None:
    flights = told()
    senders = [sent(flights, clock, begin, ends) for begin, ends in journeys]
    works = [sender.work._work for sender in senders]
    for sender, asked in zip(senders, waits, strict=True):
        for work in sorted(works, key=lambda work: work.ends):
            if work.ends <= asked and not work.future.done():
                work.end()
        clock.now = max(asked, clock.now)
        sender.work.wait()
        sender.work.wait()  # once more tells nothing
    assert flights.hidden == hidden
    assert sorted((f.begin, f.end) for f in flights.landed()) == sorted(journeys)
    assert flights.bytes == {"gradients": 100 * len(journeys)}


def test_whoever_is_woken_late_has_waited(clock: Clock) -> None:
    def late(work: Work) -> None:
        work.wait()
        clock.now = max(clock.now, 9)

    flights = Flights(lambda phase, function, part: late, lambda phase, part: nullcontext(), lambda: True)
    first, second = sent(flights, clock, 0, 6), sent(flights, clock, 1, 20)
    clock.now = 4
    first.work.wait()
    clock.now = 15
    second.work.wait()
    assert flights.hidden == 4 + (15 - 9)


def test_without_futures_nobody_knows(clock: Clock) -> None:
    class Silent(Work):
        def get_future(self) -> Any:
            raise NotImplementedError

    flights, made = told(), Sender()
    flights.watch(made, "send", "work", "all_reduce", "gradients", 100)
    made.send(Silent(clock, 5))
    made.work.wait()
    assert clock.now == 5 and flights.hidden is None and not flights.landed()
    assert flights.bytes == {"gradients": 100.0}


def test_backwards_are_drawn_and_stand_for_all(clock: Clock) -> None:
    flights, seen = told(), []
    for number in range(64):
        clock.now = 100 * number
        flights.backward_begins()
        made = sent(flights, clock, 100 * number, 100 * number + 10)
        before = len(flights.landed())
        clock.now += 4
        made.work.wait()
        seen += [number] * (len(flights.landed()) - before)
    assert seen == [*range(7, 23), 23, 39, 55]  # none of the first, in which buckets are measured
    assert flights.hidden == 64 * 4 and flights.bytes == {"gradients": 64 * 100.0}


def test_a_watched_bucket_is_let_go_of_at_once(clock: Clock) -> None:
    made = sent(told(), clock, 0, 5)
    made.work.wait()
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_watched_while_the_clock_stands(clock: Clock) -> None:
    made = sent(told(counts=False), clock, 0, 5)
    assert type(made.work) is Work


def test_collectives_that_return_when_they_are_over(clock: Clock) -> None:
    def gather(into: torch.Tensor, own: torch.Tensor, async_op: bool = False) -> Any:
        clock.now += 7
        return Work(clock, clock.now + 10) if async_op else None

    flights = told()
    watched = flights.sending(gather, "all_gather", "parameters")
    assert watched(torch.zeros(4), own=torch.zeros(2)) is None
    [flight] = flights.landed()
    assert (flight.name, flight.nbytes, flight.end - flight.begin) == ("all_gather parameters", 16, 7)
    assert flights.hidden == 0
    work = watched(torch.zeros(4), torch.zeros(2), async_op=True)
    clock.now += 4
    work.wait()
    assert flights.hidden == 7 + 4 and flights.bytes == {"parameters": 32.0}


# -- in processes


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        sleep(0.04)
        return grad


class Late(Plain):
    """A large layer whose gradients come first, and a small one whose come 40 ms later."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.net = nn.ModuleList([nn.Linear(8, 1000), nn.Linear(1000, 1000)])  # type: ignore[assignment]

    def loss(self, batch: Any) -> torch.Tensor:
        small, large = self.net
        return large(SlowBackward.apply(small(batch).tanh())).square().mean()


def data(steps: int) -> list[torch.Tensor]:
    return [torch.randn(4, 8) for _ in range(steps)]


def profiled(model: Any, strategy: Any, steps: int, **options: Any) -> tuple[Profile, Any]:
    profiler = StepProfiler(show=False)
    torch.manual_seed(0)
    options = {"max_epochs": 1, "profiler": profiler, "use_distributed_sampler": False, **options}
    made = fitted(model, data(steps), strategy=strategy, devices=2, **options)
    profile = profiler.profile()
    assert sum(row.seconds for row in profile.phases) == pytest.approx(profile.wall, rel=1e-12)
    assert profile.unexplained <= 0.02
    return profile, made


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The intervals in which any of them was."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted((span.begin, span.begin + span.seconds) for span in spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def shared(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """s that lie in both."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def overlapping(strategy: str) -> dict[str, Any]:
    made: Any = (DDPStrategy if strategy == "ddp" else ZeRO1Strategy)(first_bucket_mb=1, bucket_cap_mb=1)
    profile, run = profiled(Late(), made, steps=FIRST + 5)
    part = {part.name: part for part in profile.parts if part.phase == "communication"}
    spans = [span for span in profile.timeline if span.track == "collectives"]
    flights = [span for span in spans if span.bytes is not None]
    waits = [span for span in spans if span.name in ("waiting: gradients", "waiting: parameters")]
    under_way = union(flights)
    sent = [span for span in flights if "gradients" in span.name]
    large = [span for span in sent if span.bytes > 1e6]
    plain = fitted(Late(), data(1), strategy=strategy, devices=2, max_epochs=1)
    homes = [home for sharded in getattr(made, "_sharded", {}).values() for home in [sharded, *sharded.buckets]]
    return {
        "steps": {span.step for span in sent},
        "large": [span.seconds for span in large],
        "overlapped": profile.overlapped,
        "drawn": (FIRST + 5) / 5,
        "hidden": shared(under_way, under_way) - shared(under_way, union(waits)),
        "bytes": part["gradients"].bytes,
        "sent": sum(span.bytes or 0.0 for span in sent),
        "backward": profile.phase("backward"),
        "left": [*(name for home in homes for name in ("_send", "_sum_partials", "_of_ranks") if name in vars(home)),
                 *(name for name in type(made).phases if name in vars(run.strategy))],
        "plain": [name for name in (*type(made).phases, "flights") if name in vars(plain.strategy)],
    }  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_bucket_behind_a_slow_backward_is_hidden(strategy: str) -> None:
    for rank in run_ranks(overlapping, 2, strategy):
        assert rank["steps"] == set(range(FIRST, FIRST + 5)) and len(rank["large"]) == 5
        assert rank["bytes"] == pytest.approx(rank["sent"] * rank["drawn"]) and rank["sent"] >= 5 * 4e6
        hidden = rank["overlapped"] / rank["drawn"]  # of the backwards that were drawn
        assert hidden >= sum(sorted(rank["large"])[:3]) > 0.0, "4 MB travel within 40 ms"
        assert rank["backward"] >= (FIRST + 5) * 0.04
        assert hidden == pytest.approx(rank["hidden"], rel=0.05, abs=0.002)
        assert rank["left"] == [] and rank["plain"] == []


LATE = 0.15  # s a step: far above what other work on the machine costs a process


class SlowRank(Plain):
    slept = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        began = perf_counter()
        if self.global_rank == 1:
            sleep(LATE)
        self.slept += perf_counter() - began
        return super().training_step(batch, batch_idx)


def with_slow_rank(strategy: str) -> tuple[Profile, float, bool, list[str]]:
    model, plain = SlowRank(), Plain()
    profile, made = profiled(model, strategy, steps=8)
    torch.manual_seed(0)
    fitted(plain, data(8), strategy=strategy, devices=2, max_epochs=1, use_distributed_sampler=False)
    gathered = [{name: whole(p) for name, p in each.named_parameters()} for each in (model, plain)]
    same = all(torch.equal(p, gathered[1][name]) for name, p in gathered[0].items())
    groups = [g for module in model.modules() if isinstance(module, FSDPModule)
              for g in module._get_fsdp_state()._fsdp_param_groups]  # fmt: skip
    timed = [comm for group in groups for comm in (group._all_gather_comm, group._reduce_scatter_comm)]
    left = [type(comm).__qualname__ for comm in timed if type(comm) not in (DefaultAllGather, DefaultReduceScatter)]
    assert made.strategy.flights is None and bool(groups) == (strategy == "fsdp2")
    return profile, model.slept, same, left


def whole(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


@pytest.mark.dist
@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "fsdp2", "ddp_torch"))]
)
def test_who_waits_for_a_slow_rank_is_in_communication(strategy: str) -> None:
    (quick, *_), (slow, slept, *_) = ranks = run_ranks(with_slow_rank, 2, strategy)
    assert slow.phase("forward") >= slept >= 8 * LATE  # its own time is no communication
    waited = [row.per_step.total for each in (quick, slow) for row in each.phases if row.name == "communication"]
    assert waited[0] - waited[1] >= 0.5 * slept
    assert find(of_profiles([quick, slow]))[0].rank == 1
    assert all(same for _, _, same, _ in ranks), "the same bits without a profiler"
    assert [left for *_, left in ranks] == [[], []]


class SlowData:
    """Without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in data(8):
            sleep(0.06 if lit_fast.rank_zero.rank_zero_only.rank == 1 else 0.0)
            yield batch


def with_slow_data() -> tuple[float, float, set[str]]:
    profiler = StepProfiler(show=False)
    fitted(Plain(), SlowData(), strategy="ddp", devices=2, max_epochs=1, profiler=profiler)
    profile = profiler.profile()
    return profile.phase("data"), profile.phase("communication"), {part.name for part in profile.parts}


@pytest.mark.dist
@pytest.mark.slow
def test_who_waits_for_another_ones_data_is_in_communication() -> None:
    quick, slow = run_ranks(with_slow_data, 2)
    assert slow[0] >= 8 * 0.06 and quick[1] - slow[1] >= 0.5 * 8 * 0.06 > quick[0]
    assert {"agreement", "bucket sizes"} <= quick[2]


class Says(Plain):
    """Everything that processes say to each other without gradients."""

    def __init__(self) -> None:
        from torchmetrics import MeanMetric

        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        self.all_gather(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)
        self.mean(self.loss(batch))
        self.log("mean", self.mean)
        self.trainer.strategy.barrier()

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            sleep(0.1)
        self.trainer.save_checkpoint("epoch.ckpt")


def saying(clip: float) -> tuple[dict[str, tuple[int, float]], float]:
    profiler = StepProfiler(show=False)
    made = trainer(max_epochs=1, strategy="zero1", devices=2, profiler=profiler, gradient_clip_val=clip,
                   log_every_n_steps=2, use_distributed_sampler=False, num_sanity_val_steps=0)  # fmt: skip
    made.fit(Says(), data(4), data(1))
    profile = profiler.profile()
    found = {part.name: (part.calls, part.seconds) for part in profile.parts if part.phase == "communication"}
    return found, profile.phase("communication")


@pytest.mark.dist
def test_what_else_processes_say_is_in_communication(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    waited = []
    for parts, total in run_ranks(saying, 2, 1e-6):
        assert {"gradients", "norm", "agreement", "barrier", "broadcast", "all_gather", "metrics"} <= set(parts)
        assert parts["norm"][0] == 4 and parts["all_gather"][0] >= 4 + 2
        assert sum(seconds for _, seconds in parts.values()) == pytest.approx(total)
        waited.append(parts["broadcast"][1] + parts["optimizer state"][1])
    assert waited[1] - waited[0] >= 0.04  # the first process slept before it wrote


@pytest.mark.dist
def test_one_process_has_nothing_to_say() -> None:
    profiler = StepProfiler(show=False)
    fitted(Plain(), data(1), max_epochs=1, profiler=profiler)
    profile = profiler.profile()
    assert profile.overlapped is None and profile.phase("communication") == 0.0
    assert lit_fast.Trainer(strategy="auto", accelerator="cpu").strategy.flights is None

"""What in a run is worth acting on, weightiest first: rules over its profiles, one function each.

A rule speaks where at least a share of the wall time is at stake:

- `AVOIDABLE` for what a run can do without altogether (a hook, a log row, a stall). It is also what the profiler itself
  promises to explain, so that a finding is never smaller than what is unknown.
- `USUAL` for what every run has some of (data, communication). Removing all of it gains at most 1 / 0.95.

What is lost is that of a step on average. Of several processes, what all have in common is told once, by the median;
what one has more than the median is told as that rank's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low

from lit_fast.profiler import merge
from lit_fast.profiler.record import Finding, Part, Profile, RankSummary, Report
from lit_fast.profiler.report import facts
from lit_fast.profiler.report.units import count, digits, seconds, share, size

AVOIDABLE = 0.02
USUAL = 0.05
FEW_STEPS = 5  # of fewer nothing is said: the first steps of every run allocate, compile and fill caches
# Waiting for a device in one step of ten is a log row's; in every second one it is the program's own.
SYNCS_A_STEP = 0.5
# s of a save: below, nobody waits for one that comes once in a run or in an epoch of a short one.
FEW_SAVES, SHORT_SAVE = 2, 0.1
# s of a batch: sending one from a worker's process takes about as long (measured: 0.1 to 0.5 ms for 8 to 800 KB).
QUICK_BATCH = 1e-3
# What only the first process does: no reason to call it slow, since each has a rule of its own.
DUTIES = ("checkpoint", "logging")
WAITS = ("communication", "idle", "unexplained", "setup", "profiling")


@dataclass(frozen=True)
class Run:
    """A report as the rules look at it."""

    report: Report

    @cached_property
    def profile(self) -> Profile:
        """That of rank 0, or of the lowest rank there is."""
        return self.report.profiles[0]

    @cached_property
    def ranks(self) -> list[RankSummary]:
        return self.report.ranks or [merge.summarize(profile) for profile in self.report.profiles]

    @cached_property
    def steps(self) -> int:
        return self.profile.steps.count

    @cached_property
    def step(self) -> float:
        """s of wall time a step, whatever it was spent on, without what a run does once, however long it is."""
        once = sum(part.seconds for part in self.profile.parts if part.phase == "hooks" and part.calls == 1)
        compiling = self.steps * (self.profile.steps.mean - facts.step_seconds(self.profile))
        beside = self.profile.phase("setup") + self.profile.phase("profiling") + once + compiling
        return (self.profile.wall - beside) / self.steps

    def each(self, phase: str) -> list[float]:
        """s a step of that phase, of every rank that took a step."""
        return [rank.phases.get(phase, 0.0) / rank.steps for rank in self.ranks if rank.steps]

    def common(self, phase: str) -> float:
        """s a step that every second rank spends there at least; the first rank's duties are its own."""
        spent = self.each(phase)
        if phase == "communication":
            return min(spent)  # the slowest rank waits for nobody: what it waits is what sending takes
        return max(spent) if phase in DUTIES else median_low(spent)

    def parts(self, phase: str) -> list[Part]:
        return sorted((part for part in self.profile.parts if part.phase == phase), key=lambda part: -part.seconds)

    @cached_property
    def straggler(self) -> Straggler | None:
        return find_straggler(self)


@dataclass(frozen=True)
class Straggler:
    """The rank that does most beyond what the others do."""

    summary: RankSummary
    excess: dict[str, float]  # s a step above the median by phase, the largest first
    part: Part | None  # what of it is called by a name

    @property
    def seconds(self) -> float:
        return sum(self.excess.values())


Rule = Callable[[Run], Iterator[Finding]]


def find(report: Report) -> list[Finding]:
    """The findings of a report, by seconds that a step loses; those whose loss nobody can tell come last.

    Example::

        for finding in find(merge("lit_fast_profile")):
            print(finding.title, finding.where)
    """
    run = Run(report)
    if not report.profiles or run.steps < FEW_STEPS or run.step <= 0.0:
        return []
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: -(finding.seconds_per_step or 0.0))


def nothing(report: Report) -> str:
    """What is said where nothing was found.

    Example:
        >>> nothing(Report(profiles=[Profile()]))
        'Too few steps to find anything in: 0, and it takes 5.'
    """
    steps = report.profiles[0].steps.count
    if steps < FEW_STEPS:
        return f"Too few steps to find anything in: {steps}, and it takes {FEW_STEPS}."
    return "Nothing stands out."


# -- several processes


def find_straggler(run: Run) -> Straggler | None:
    ranks = [rank for rank in run.ranks if rank.steps]
    if len(ranks) < 2:
        return None
    names = {name for rank in ranks for name in rank.phases} - {*DUTIES, *WAITS}
    if not any(rank.phases.get("communication") for rank in ranks):
        # Collectives run where nobody times them: the fast ranks wait for the slow one in these phases.
        names -= {"backward", "optimizer"}
    usual = {name: median_low([rank.phases.get(name, 0.0) / rank.steps for rank in ranks]) for name in names}

    def excess(rank: RankSummary) -> dict[str, float]:
        more = {name: rank.phases.get(name, 0.0) / rank.steps - usual[name] for name in names}
        return {name: s for name, s in sorted(more.items(), key=lambda item: -item[1]) if s > 0.0}

    slowest = max(ranks, key=lambda rank: sum(excess(rank).values()))
    most = excess(slowest)
    if not most:
        return None
    return Straggler(slowest, most, _named_cause(run, slowest.rank, next(iter(most))))


def _named_cause(run: Run, rank: int, phase: str) -> Part | None:
    """The part of a rank's phase that takes longest beyond the same part of the other profiles that are there."""
    own = next((profile for profile in run.report.profiles if profile.header.rank == rank), None)
    others = [profile for profile in run.report.profiles if profile.header.rank != rank and profile.steps.count]
    if own is None or not others:
        return None

    def beyond(part: Part) -> float:
        usual = median_low([_part_seconds(other, part.name) for other in others])
        return part.seconds / own.steps.count - usual

    found = max((part for part in own.parts if part.phase == phase), key=beyond, default=None)
    return found if found is not None and beyond(found) >= AVOIDABLE * run.step else None


def _part_seconds(profile: Profile, name: str) -> float:
    return sum(part.seconds for part in profile.parts if part.name == name) / profile.steps.count


def slow_rank(run: Run) -> Iterator[Finding]:
    slow = run.straggler
    if slow is None or slow.seconds < USUAL * run.step:
        return
    rank, (phase, most) = slow.summary, next(iter(slow.excess.items()))
    what = f"{phase} takes {seconds(most)} a step more than on the median rank"
    if slow.part is not None:
        what += f", in {slow.part.name}"
    clocks = [
        f"{r.name} {digits(r.mean)} {r.unit}" for r in rank.readings if "clock" in r.name or r.name == "temperature"
    ]
    throttled = [f"throttled {seconds(s)} ({reason})" for reason, s in rank.throttled.items() if s]
    errors = [f"{n} {name}" for name, n in rank.errors.items() if n]
    advice = "All other ranks wait for it in every step. "
    if throttled or errors:
        advice += "Its device says why: look at cooling and power, or take the machine out of the job."
    elif slow.part is not None:
        advice += f"Do less in {slow.part.name} on this rank, or the same on all."
    elif phase == "data":
        advice += "Compare its share of the data, its disk and the number of its loader workers with the others'."
    else:
        advice += "Compare its input sizes, its clocks and what else runs on its host with the others'."
    yield Finding(
        title=f"Rank {rank.rank} on {rank.host or 'an unnamed host'} is slower than the others",
        detail="; ".join([what, *clocks, *throttled, *errors]) + ".",
        advice=advice,
        where=(slow.part.where or slow.part.name) if slow.part is not None else f"rank {rank.rank}",
        seconds_per_step=slow.seconds,
        rank=rank.rank,
    )


def exposed_communication(run: Run) -> Iterator[Finding]:
    lost = run.common("communication")
    if lost < USUAL * run.step:
        return
    hidden = f" {seconds(run.profile.overlapped / run.steps)} more are hidden." if run.profile.overlapped else ""
    parts = run.parts("communication")
    most = f" Most of it is for {parts[0].name}." if parts else ""
    advice = "Accumulate more micro-batches a step, choose larger or tuned buckets (DDPStrategy), or send gradients "
    advice += "in 16 bits."
    if parts and parts[0].name == "buffers":
        advice = "Where buffers need not be the same in all processes while they train: broadcast_buffers=False."
    elif parts and parts[0].name in ("all_gather", "reduce"):
        advice = "Log with sync_dist=True, or call all_gather, at fewer steps: each waits for all processes."
    yield Finding(
        title="Communication is not hidden behind backward",
        detail=f"Even the rank that waits least waits {seconds(lost)} a step ({share(lost / run.step)}).{most}{hidden}",
        advice=advice,
        where="strategy",
        seconds_per_step=lost,
    )


# -- one process


def data_loader(run: Run) -> Iterator[Finding]:
    lost = run.common("data")
    if lost < USUAL * run.step:
        return
    row = next((row for row in run.profile.phases if row.name == "data"), None)
    ordinary = row.per_step.quantile(0.5) if row is not None and row.per_step.count else lost
    longest = row.per_step.maximum if row is not None else 0.0
    named, head = run.parts("data"), run.profile.header
    where = head.data_where or ((named[0].where or named[0].name) if named else "train_dataloader")
    detail = f"A step waits {seconds(lost)} for its batch ({share(lost / run.step)}), {seconds(ordinary)} in the median"
    title = "The data loader keeps the step waiting"
    if ordinary < lost / 2 and longest > 10.0 * lost and longest > lost * run.steps / 4:
        # A few long waits: most fetches are quick, and starting the workers is what takes time.
        title = "The data loader takes long to begin"
        advice = "Open the data faster."
        if head.workers != 0:
            advice = "Keep its workers from epoch to epoch: DataLoader(persistent_workers=True); open the data faster."
        detail += f"; the longest wait was {seconds(longest)}"
    elif head.workers:
        advice = (
            f"Its {count(head.workers, 'worker')} cannot keep up: give it more (num_workers, prefetch_factor=4), or do "
            f"less for each sample (decode once, store arrays)."
        )
    elif max(ordinary, lost / 2) < QUICK_BATCH:
        advice = (
            "A worker's process would take as long to send so small a batch. Make whole batches at once, not sample by "
            "sample: DataLoader(..., batch_size=None, sampler=BatchSampler(RandomSampler(data), 32, False)) indexes "
            "tensors by a batch of numbers; an IterableDataset may yield batches."
        )
    else:
        advice = (
            "Load in other processes: DataLoader(num_workers=2 or more, prefetch_factor=4, persistent_workers=True); "
            "or do less for each sample (decode once, store arrays)."
        )
    yield Finding(title, f"{detail}.", advice, where, lost, _rank_of(run))


def slow_hooks(run: Run) -> Iterator[Finding]:
    for part in run.parts("hooks"):
        lost = part.seconds / run.steps
        told = run.straggler is not None and run.straggler.part is part and run.straggler.seconds >= USUAL * run.step
        if lost < AVOIDABLE * run.step or told or part.calls == 1:
            continue
        calls = f"{count(part.calls, 'call')} of {seconds(part.seconds / max(1, part.calls))}"
        longest = f", the longest {seconds(part.longest)}" if part.longest else ""
        yield Finding(
            title=f"{part.name} is slow",
            detail=f"{calls}{longest}: {seconds(lost)} a step ({share(lost / run.step)}).",
            advice="Do it every n-th step, or less in it; leave work on the device and read numbers seldom.",
            where=part.where or part.name,
            seconds_per_step=lost,
            rank=_rank_of(run),
        )


def host_syncs(run: Run) -> Iterator[Finding]:
    looked_at, on_cpu = run.profile.window_steps or run.steps, run.profile.header.device == "cpu"
    for sync in run.profile.syncs:
        lost = None if sync.seconds is None else sync.seconds / looked_at
        often = sync.calls / looked_at >= SYNCS_A_STEP
        if not often and (lost or 0.0) < AVOIDABLE * run.step:
            continue
        waits = "" if lost is None else f", {seconds(lost)} a step ({share(lost / run.step)})"
        here = " A CPU has computed it by then; a GPU would have to be waited for." if on_cpu else ""
        yield Finding(
            title="A tensor's value is read in every step"
            if on_cpu
            else "The host waits for the device to read a value",
            detail=f"`{sync.line.strip()}`: {digits(sync.calls / looked_at)} times a step{waits}.{here}",
            advice="Keep the value a tensor (self.log takes tensors), or read it every n-th step: until it is read, no "
            "further work is queued on the device.",
            where=sync.where,
            seconds_per_step=lost,
            rank=_rank_of(run),
        )


def checkpoint_stall(run: Run) -> Iterator[Finding]:
    lost = run.common("checkpoint")
    writer = max(run.ranks, key=lambda rank: rank.phases.get("checkpoint", 0.0))
    own = next((p for p in run.report.profiles if p.header.rank == writer.rank), run.profile)
    parts = sorted((part for part in own.parts if part.phase == "checkpoint"), key=lambda part: -part.seconds)
    row = next((row for row in own.phases if row.name == "checkpoint"), None)
    calls = sum(part.calls for part in parts) or (row.calls if row is not None else 0)
    total = writer.phases.get("checkpoint", 0.0)
    # One or two saves, at the end of an epoch or of a short run, say little about a longer one.
    few = calls <= FEW_SAVES
    if lost < (USUAL if few else AVOIDABLE) * run.step or (few and total < SHORT_SAVE * calls):
        return
    detail = (
        f"{count(calls, 'save')} of {seconds(total / max(1, calls))}: {seconds(lost)} a step ({share(lost / run.step)})"
    )
    written = sum(part.bytes or 0.0 for part in parts)
    if written:
        detail += f"; {size(written)} at {size(written / total)}/s"
    yield Finding(
        title="Saving checkpoints holds the run up",
        detail=f"{detail}.",
        advice="Save less often (every_n_train_steps), to a faster disk (dirpath), or without the optimizer's state "
        "(save_weights_only=True).",
        where=(parts[0].where or parts[0].name) if parts else "checkpoint",
        seconds_per_step=lost,
        rank=writer.rank if len(run.ranks) > 1 else None,
    )


def logging_too_often(run: Run) -> Iterator[Finding]:
    lost = run.common("logging")
    if lost < AVOIDABLE * run.step:
        return
    named = run.parts("logging")
    yield Finding(
        title="Logging takes a noticeable share of the step",
        detail=f"{seconds(lost)} a step ({share(lost / run.step)})"
        + (f", most of it in {named[0].name}." if named else "."),
        advice="Trainer(log_every_n_steps=...) larger; self.log(..., on_step=False) where the epoch's mean is enough.",
        where=(named[0].where or named[0].name) if named else "log_every_n_steps",
        seconds_per_step=lost,
        rank=_rank_of(run),
    )


def optimizer_not_compiled(run: Run) -> Iterator[Finding]:
    took = run.common("optimizer")
    if "its own step" not in run.profile.header.optimizer or took < USUAL * run.step:
        return
    yield Finding(
        title="The optimizer's step is not compiled",
        detail=f"{run.profile.header.optimizer}: {seconds(took)} a step, some of it avoidable.",
        advice="trainer.explain() says why; lit_fast.optim has compiled steps of SGD, Adam, AdamW, Lion, Lamb, Muon, "
        "Adagrad and RMSprop.",
        where="configure_optimizers",
    )


def garbage_collection(run: Run) -> Iterator[Finding]:
    lost = sum(_collected(step.causes) for step in run.profile.slowest) / run.steps
    if lost < AVOIDABLE * run.step:
        return
    yield Finding(
        title="Python's garbage collector stops steps",
        detail=f"In the slowest steps alone {seconds(lost)} a step ({share(lost / run.step)}).",
        advice="gc.freeze() after the model is made, and gc.disable() with gc.collect() every n-th step; keep fewer "
        "objects (lists of samples as arrays).",
        where="gc",
        seconds_per_step=lost,
        rank=_rank_of(run),
    )


def _collected(causes: list[str]) -> float:
    """
    >>> _collected(["garbage collection 12 ms", "checkpoint"])
    0.012
    """
    found = [re.search(r"garbage collection ([\d.]+) (ms|s)\b", cause) for cause in causes]
    return sum(float(hit[1]) * (1e-3 if hit[2] == "ms" else 1.0) for hit in found if hit)


def idle_device(run: Run) -> Iterator[Finding]:
    """By its own clock; what it waits for the data loader is that finding's."""
    profile = run.profile
    found = {row.name: row for row in profile.phases}
    if "idle" not in found or not profile.device_steps.count:
        return
    waiting = facts.in_step(found["data"], profile) if "data" in found else 0.0
    lost = found["idle"].on_device.total / profile.device_steps.count - waiting
    if lost < USUAL * run.step:
        return
    yield Finding(
        title="The device waits for its host",
        detail=f"{seconds(lost)} a step ({share(lost / run.step)}) in which it has nothing to do, between two phases.",
        advice="Larger batches, torch.compile(model), fewer small operations and hooks; profiler='deep' counts them.",
        where="training_step",
        seconds_per_step=lost,
        rank=_rank_of(run),
    )


def allocator_retries(run: Run) -> Iterator[Finding]:
    retries = run.profile.memory.allocator_retries
    if not retries:
        return
    yield Finding(
        title="The device's memory is nearly full",
        detail=f"The allocator gave its cache back and tried again {count(retries, 'time')}; each time the host waits.",
        advice="Smaller micro-batches with accumulate_grad_batches, activation checkpointing, or "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
        where=run.profile.memory.peak_owner,
        rank=_rank_of(run),
    )


def throttled_devices(run: Run) -> Iterator[Finding]:
    for rank in run.ranks:
        spent = sum(rank.throttled.values())
        if spent < USUAL * rank.wall:
            continue
        reasons = ", ".join(f"{reason} {seconds(s)}" for reason, s in rank.throttled.items() if s)
        yield Finding(
            title=f"The device of rank {rank.rank} ran below its clock",
            detail=f"{share(spent / rank.wall)} of the time: {reasons}.",
            advice="Look at its cooling and its power limit (nvidia-smi -q -d PERFORMANCE).",
            where=f"{rank.device} on {rank.host}",
            rank=rank.rank,
        )


def unexplained_time(run: Run) -> Iterator[Finding]:
    lost, each = run.common("unexplained"), run.profile.wall / run.steps
    if lost <= AVOIDABLE * each:  # of the whole run, which is what the profiler promises to explain
        return
    yield Finding(
        title="Some time belongs to no phase",
        detail=f"{seconds(lost)} a step ({share(lost / each)}): code between phases, or a host that is shared.",
        advice="Trainer(profiler='deep') shows a window of steps call by call; a quiet machine gives steadier figures.",
        where="unexplained",
        seconds_per_step=lost,
        rank=_rank_of(run),
    )


def _rank_of(run: Run) -> int | None:
    return run.profile.header.rank if len(run.ranks) > 1 else None


# The order counts where two lose the same: the rank is told before what it does.
RULES: tuple[Rule, ...] = (
    slow_rank,
    data_loader,
    slow_hooks,
    host_syncs,
    checkpoint_stall,
    logging_too_often,
    exposed_communication,
    idle_device,
    garbage_collection,
    optimizer_not_compiled,
    throttled_devices,
    allocator_retries,
    unexplained_time,
)

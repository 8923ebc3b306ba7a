"""What a report says about a run in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from statistics import fmean

from lit_fast.profiler import merge
from lit_fast.profiler.record import PHASES, Compared, Comparison, Phase, Profile, RankSummary, Report, SlowStep
from lit_fast.profiler.report.units import count, digits, rate, scale, seconds, share, size


def ranks(report: Report) -> list[RankSummary]:
    return report.ranks or [merge.summarize(profile) for profile in report.profiles]


def world_size(report: Report) -> int:
    return max([len(ranks(report)) + len(report.missing), *(p.header.world_size for p in report.profiles)])


def whose(report: Report) -> str:
    """Whose figures the sections for one process show.

    >>> whose(Report(profiles=[Profile()]))
    'one process'
    """
    of = world_size(report)
    return "one process" if of == 1 else f"rank {report.profiles[0].header.rank} of {of:,}"


def header(report: Report) -> list[tuple[str, str]]:
    """(name, text) of what ran, where, with what, how fast. What nobody knows is left out."""
    profile = report.profiles[0]
    head = profile.header
    model = [head.module, count(head.parameters, "parameter") if head.parameters else "", head.precision, head.strategy]
    hosts = {rank.host for rank in ranks(report) if rank.host}
    where = f"{head.host}" if len(hosts) <= 1 else f"{len(hosts):,} hosts"
    machine = [
        head.device,
        head.processor if head.device == "cpu" else "",
        count(head.cores, "core") if head.cores else "",
    ]
    versions = [f"{name} {version}" for name, version in head.versions.items()]
    accumulated = head.accumulate_grad_batches
    every = f"a step of it in {accumulated} steps of the report, each a micro-batch" if accumulated > 1 else ""
    rows = [
        (
            "run",
            _joined([head.script, head.commit and f"commit {head.commit}", head.started.replace("+00:00", " UTC")]),
        ),
        ("model", _joined(model)),
        ("optimizer", _joined([head.optimizer, every])),
        ("batch", _joined([head.batch, head.data and f"of {head.data}"])),
        ("device", _joined([*machine, where, head.driver and f"driver {head.driver}"])),
        ("versions", _joined(versions)),
        ("steps", _joined(speeds(report))),
        ("utilization", _joined(utilization(profile))),
        ("GPU, a step", _joined(device_window(profile))),
    ]
    return [(name, text) for name, text in rows if text]


def speeds(report: Report) -> list[str]:
    """How many steps in which time; what one takes, and what that comes to a second.

    What a run does outside of its steps is in the first figure and not in the others.
    """
    profile = report.profiles[0]
    steps = profile.steps.count
    said = [f"{count(steps, 'step')}, a run of {seconds(profile.wall)}"]
    if not steps or not profile.steps.total:
        return said
    a_step, processes = step_seconds(profile), world_size(report)
    compiled = _compiling(profile)
    which = f" but for {count(len(compiled), 'step')} that compiled" if compiled else ""
    said.append(f"{seconds(a_step)} each{which}")
    said.append(rate(1.0 / a_step, "steps/s"))
    for amount, unit in ((profile.header.samples_per_step, "samples/s"), (profile.header.tokens_per_step, "tokens/s")):
        if amount:
            said.append(rate(amount * processes / a_step, unit))
    return said


def _compiling(profile: Profile) -> list[SlowStep]:
    """The steps in which torch.compile was at work: what they took says nothing about the others."""
    return [step for step in profile.slowest if any(cause.startswith("compilation") for cause in step.causes)]


def step_seconds(profile: Profile) -> float:
    """s of a step, the mean of all but those in which something was compiled."""
    compiled = _compiling(profile)
    rest = profile.steps.count - len(compiled)
    return (profile.steps.total - sum(step.seconds for step in compiled)) / rest if rest > 0 else profile.steps.mean


def utilization(profile: Profile) -> list[str]:
    """MFU: the model's FLOPs (a formula, nothing recomputed) a second of its steps, over the device's peak.

    HFU counts what activation checkpointing computes again, too.
    """
    head = profile.header
    if not head.flops_per_step or not profile.steps.total:
        return []
    reached = head.flops_per_step / step_seconds(profile)
    said = [f"{rate(reached, 'FLOP/s')} of the model's own"]
    if head.peak_flops:
        of = f" ({head.peak_source})" if head.peak_source else ""
        said.append(f"MFU {share(reached / head.peak_flops)} of {rate(head.peak_flops, 'FLOP/s')}{of}")
        if head.hardware_flops_per_step:
            said.append(f"HFU {share(head.hardware_flops_per_step / step_seconds(profile) / head.peak_flops)}")
    return said


def device_window(profile: Profile) -> list[str]:
    """What a GPU's time went into in the steps of a deep profile, of each of them."""
    found = profile.device_window
    if found is None:
        return []
    each = {name: seconds(getattr(found, name) / found.steps) for name in vars(found) if name != "steps"}
    said = [each["seconds"], f"kernels {each['compute']}", f"copies from the host {each['to_device']}"]
    if found.communication:
        said.append(f"exposed communication {each['exposed']}, {each['overlapped']} more is hidden")
    return [*said, f"idle {each['idle']}"]


def phase_rows(profile: Profile) -> list[Phase]:
    """Those that took time, in the order of a step; names that the schema does not know before "unexplained"."""
    place = {name: number for number, name in enumerate(PHASES)}
    rows = [row for row in profile.phases if row.seconds or row.on_device.count]
    return sorted(rows, key=lambda row: place.get(row.name, place["unexplained"] - 0.5))


def in_step(row: Phase, profile: Profile) -> float:
    """s a step that a phase takes within steps; what it does before the first and between epochs is left out, and so
    are steps in which something was compiled."""
    compiled = _compiling(profile)
    rest = profile.steps.count - len(compiled)
    if rest <= 0:
        return row.per_step.total / profile.steps.count if profile.steps.count else 0.0
    if row.name == "sum":
        return step_seconds(profile)
    return max(0.0, row.per_step.total - sum(step.phases.get(row.name, 0.0) for step in compiled)) / rest


def outside_of_steps(profile: Profile) -> list[str]:
    """What the rows without a step's figures are, with what took most of them."""
    rows = [
        row
        for row in phase_rows(profile)
        if row.seconds and not row.per_step.count and row.name not in ("setup", "profiling")
    ]
    if not rows or not profile.steps.count:
        return []
    said = []
    for row in rows:
        parts = sorted((part for part in profile.parts if part.phase == row.name), key=lambda part: -part.seconds)
        if parts and row.seconds > 0.05 * profile.wall:
            said.append(f"{row.name} mostly {parts[0].name}, {seconds(parts[0].seconds)}")
    names = f" ({'; '.join(said)})" if said else ""
    return [f"-: in no step, but before the first, between epochs, or after the last{names}."]


def unit(report: Report) -> tuple[float, str]:
    """In what the times of a step are told, all in the same: by what to multiply s, and its name."""
    steps = report.profiles[0].steps
    longest = max([row.baseline for row in report.comparison.rows] if report.comparison is not None else [], default=0)
    return scale(max(longest, steps.quantile(0.5) if steps.count else 0.0))


def in_steps(row: Phase, profile: Profile, factor: float) -> list[str]:
    """A step's mean, the median and the slowest hundredth of those steps that had that phase, in s times `factor`.

    "-" where it was in no step: it ran before the first, between epochs, or after the last.
    """
    if not row.per_step.count:
        return ["-", "-", "-"]
    values = (in_step(row, profile), row.per_step.quantile(0.5), row.per_step.quantile(0.99))
    return [digits(factor * value) for value in values]


def compared_rows(comparison: Comparison) -> dict[str, Compared]:
    """By phase; what neither side does in most of its windows is left out."""
    return {row.name: row for row in comparison.rows if row.ours or row.baseline}


def against(comparison: Comparison) -> str:
    """What the baseline is called at the head of a column."""
    return comparison.against if comparison.against in ("eager", "lightning") else "earlier"


def compared(row: Compared, factor: float) -> list[str]:
    """Baseline, ours and their difference in s times `factor`, the ratio, and its interval."""
    known = math.isfinite(row.ratio)
    more = row.ours - row.baseline
    ratio = [f"{row.ratio:.2f}", f"{row.low:.2f} to {row.high:.2f}"] if known else ["-", "-"]
    sign = "+" if more > 0.0 else "-" if more < 0.0 else ""
    return [digits(factor * row.baseline), digits(factor * row.ours), f"{sign}{digits(factor * abs(more))}", *ratio]


def how_compared(comparison: Comparison) -> list[str]:
    """What has to be known to believe the figures."""
    how = "in turns" if comparison.against == "eager" else "on each side"
    said = [
        f"Against {comparison.against}: medians of {count(comparison.windows, 'window')} of "
        f"{count(comparison.steps, 'step')} {how}; the ratio's interval holds 95 % of a bootstrap."
    ]
    if comparison.largest_loss_difference is not None:
        allowed = "" if comparison.loss_bound is None else f" (allowed: {comparison.loss_bound:g})"
        said.append(f"Losses differ by {comparison.largest_loss_difference:.2g} of a loss at most{allowed}.")
    return [*said, *(f"{note[0].upper()}{note[1:]}." for note in comparison.notes if note)]


def on_device(row: Phase, profile: Profile, factor: float) -> list[str]:
    """A step's mean of a GPU's own time, in s times `factor`; no column where that was not measured."""
    steps = profile.device_steps.count
    if not steps:
        return []
    return [digits(factor * row.on_device.total / steps) if row.on_device.count else "-"]


def hidden(profile: Profile) -> str:
    """Communication that is in no row; "" where it was not measured.

    >>> hidden(Profile(steps=Distribution(count=10), overlapped=0.02))
    'Hidden behind other work, and in no row: 2.00 ms of communication a step.'
    """
    if profile.overlapped is None or not profile.steps.count:
        return ""
    each = seconds(profile.overlapped / profile.steps.count)
    return f"Hidden behind other work, and in no row: {each} of communication a step."


def cause(slow: SlowStep, profile: Profile) -> str:
    """What a slow step was slow by: what was seen, else the phase that took most beyond its own median."""
    if slow.causes:
        return ", ".join(slow.causes)
    usual = {row.name: row.per_step.quantile(0.5) if row.per_step.count else 0.0 for row in profile.phases}
    beyond = {name: took - usual.get(name, 0.0) for name, took in slow.phases.items()}
    most = max(beyond, key=lambda name: beyond[name], default=None)
    return f"{most} +{seconds(beyond[most])}" if most is not None and beyond[most] > 0.0 else ""


def energy(report: Report) -> list[tuple[str, str]]:
    """Of all devices that have a counter of energy, over the window that the counter was read for."""
    profile = report.profiles[0]
    measured = [(d.energy, d.energy_seconds) for d in profile.devices if d.energy and d.energy_seconds]
    if not measured or not profile.steps.total:
        return []
    watts = sum(joules / window for joules, window in measured)
    a_step = watts * profile.steps.mean
    said = [
        ("energy", f"{sum(joules for joules, _ in measured):,.0f} J in {seconds(fmean(w for _, w in measured))}"),
        ("mean power", rate(watts, "W")),
        ("a step", rate(a_step, "J")),
    ]
    if profile.header.tokens_per_step:
        said.append(("a token", f"{1e3 * a_step / profile.header.tokens_per_step:.3g} mJ"))
    elif profile.header.samples_per_step:
        said.append(("a sample", f"{1e3 * a_step / profile.header.samples_per_step:.3g} mJ"))
    return said


def own_cost(profile: Profile) -> str:
    if profile.own_cost is None:
        return "What recording itself cost was not measured."
    return f"Recording took {seconds(profile.own_cost)} a step ({share(profile.own_cost / profile.steps.mean)})."


def memory(profile: Profile) -> list[tuple[str, str]]:
    found = profile.memory
    rows = [
        (
            "peak",
            size(found.peak) + (f", most of it {found.peak_owner}" if found.peak_owner else "") if found.peak else "",
        ),
        ("reserved", size(found.reserved) if found.reserved else ""),
        ("allocator's retries", "" if found.allocator_retries is None else str(found.allocator_retries)),
        ("host", size(found.host_resident) if found.host_resident else ""),
    ]
    return [(name, text) for name, text in rows if text]


def absences(report: Report, shown: int = 12) -> list[str]:
    """What is missing of a run of several processes."""
    if not report.missing:
        return []
    names = ", ".join(map(str, report.missing[:shown])) + (", ..." if len(report.missing) > shown else "")
    return [f"{count(len(report.missing), 'rank')} of {world_size(report):,} left no file: {names}."]


def _joined(parts: list[str | None] | list[str]) -> str:
    return ", ".join(part for part in parts if part)

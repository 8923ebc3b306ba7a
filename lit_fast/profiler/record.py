"""What a profile holds: the schema of the file that every process writes, and of `report.json`.

A `Profile` is what one process recorded. Its size does not grow with the number of steps: durations are kept as
histograms (`Distribution`), single steps only where they are among the slowest. `Report` is what is shown of one run:
the profiles of all its processes, what they are compared with, and what was found.

Fields that nobody measured are None or empty, never 0. Times are seconds, sizes bytes, rates a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SUBBUCKETS = 16  # of a power of two: durations are kept to 1/16 of themselves

# Rows that add up to the wall time, in the order in which a step runs them. "idle" is a GPU that waits for its host
# (device_clock.py): time of the device's, none of the host's. "unexplained" is wall time that no phase claims.
PHASES = (
    "setup",  # what a run does before its first step and after its last, but for what has a row of its own
    "data",  # waiting for the loader
    "transfer",  # host to device
    "forward",
    "backward",
    "communication",  # exposed: nothing else is done meanwhile
    "optimizer",
    "schedulers",
    "hooks",
    "logging",
    "checkpoint",
    "validation",
    "loop",  # the code of lit_fast that calls the others in a step
    "profiling",  # the steps in which a deep profile looks closer: they are in no other figure
    "idle",
    "unexplained",
)


@dataclass
class Distribution:
    """Durations as counts on a fixed logarithmic grid, so that those of many steps, or processes, can be added.

    `buckets` maps an index to a count (`bucket_of`). A duration of n ns has the index n below 2 * SUBBUCKETS; above,
    SUBBUCKETS * e + (n >> e), with e such that n >> e has as many bits as SUBBUCKETS.
    """

    count: int = 0
    total: float = 0.0
    minimum: float = math.inf
    maximum: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.total += seconds * count
        self.minimum, self.maximum = min(self.minimum, seconds), max(self.maximum, seconds)
        index = bucket_of(round(seconds * 1e9))
        self.buckets[index] = self.buckets.get(index, 0) + count

    def merge(self, other: Distribution) -> None:
        self.count += other.count
        self.total += other.total
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count

    def quantile(self, q: float) -> float:
        """The duration that a share `q` of all do not exceed, to 1/16 of itself; NaN where there are none.

        Those in one bucket are taken to be spread evenly over it, so that it is not off to one side.


        Example:
            >>> steps = Distribution()
            >>> for milliseconds in range(1, 101):
            ...     steps.add(milliseconds * 1e-3)
            >>> abs(steps.quantile(0.5) - 0.050) <= 0.050 / 16
            True
        """
        if not self.count:
            return math.nan
        wanted, seen = max(1, math.ceil(q * self.count)), 0
        for index in sorted(self.buckets):
            inside = self.buckets[index]
            if seen + inside >= wanted:
                begin = bucket_end(index - 1) if index else 0
                found = begin + (bucket_end(index) - begin) * (wanted - seen - 0.5) / inside
                return min(max(found * 1e-9, self.minimum), self.maximum)
            seen += inside
        return self.maximum

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


def bucket_of(nanoseconds: int) -> int:
    """The histogram's index of a duration.

    Example:
        >>> [bucket_of(n) for n in (0, 15, 16, 31, 32, 34, 1000)]
        [0, 15, 16, 31, 32, 33, 111]
    """
    exponent = max(nanoseconds.bit_length() - SUBBUCKETS.bit_length(), 0)
    return SUBBUCKETS * exponent + (nanoseconds >> exponent)


def bucket_end(index: int) -> int:
    """The ns at which the next index begins."""
    exponent = max(index // SUBBUCKETS - 1, 0)
    return (index - SUBBUCKETS * exponent + 1) << exponent


@dataclass
class Header:
    """What ran, where, and with what."""

    started: str = ""  # ISO 8601, UTC
    script: str = ""
    commit: str | None = None
    host: str = ""
    pid: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    run: str | None = None  # of several processes, what they have in common (one_run.py)
    device: str = ""  # "cpu" or a GPU's name
    driver: str | None = None
    processor: str = ""
    cores: int = 0
    versions: dict[str, str] = field(default_factory=dict)  # python, torch, lit_fast, cuda, triton
    module: str = ""
    parameters: int = 0
    precision: str = ""
    strategy: str = ""
    optimizer: str = ""  # and who steps it
    accumulate_grad_batches: int = 1  # steps of which the optimizer takes one: a step is a batch
    data: str = ""  # what the training loader is, and what it reads
    data_where: str | None = None  # file:line of what the program itself does for a sample or a batch
    workers: int | None = None  # of the training loader
    batch: str = ""  # shapes and dtypes of the first one
    samples_per_step: float | None = None  # of this process
    tokens_per_step: float | None = None
    flops_per_step: float | None = None  # of the model's formulas, without recomputation
    hardware_flops_per_step: float | None = None  # as run, with what activation checkpointing computes again
    peak_flops: float | None = None  # FLOP/s that the utilization is taken of
    peak_source: str | None = None
    mode: str = "step"  # "step" or "deep"
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why


@dataclass
class Phase:
    """One row of `PHASES`: all its time, and how it is spread over steps."""

    name: str
    seconds: float
    calls: int
    per_step: Distribution = field(default_factory=Distribution)
    on_device: Distribution = field(default_factory=Distribution)  # a GPU's own time of it, of `device_steps`


@dataclass
class Part:
    """Something named inside a phase: a hook, a logger, a bucket."""

    phase: str
    name: str  # "[Callback]EarlyStopping.on_train_batch_end"
    seconds: float
    calls: int
    where: str | None = None  # file:line
    longest: float = 0.0
    bytes: float | None = None  # written or sent, where that is counted


@dataclass
class SlowStep:
    step: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)  # "garbage collection 12 ms", "checkpoint", "recompiled"
    at: float = 0.0  # s since the run began


@dataclass
class Sync:
    """A place at which the host waited for a device, or read a tensor's value."""

    where: str  # file:line
    line: str  # the source there
    calls: int
    seconds: float | None = None


@dataclass
class Span:
    """One interval of the timeline: of the last steps that were recorded."""

    track: str  # "phases", "hooks", "collectives", "kernels"
    name: str
    begin: float  # s since the run began
    seconds: float
    step: int | None = None
    bytes: float | None = None  # that a collective moves


@dataclass
class MemorySample:
    at: float  # s since the step began
    point: str  # where in the step: "forward", "backward", "optimizer", ...
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0


@dataclass
class Memory:
    over_step: list[MemorySample] = field(default_factory=list)
    peak: int | None = None
    peak_owner: str | None = None
    reserved: int | None = None
    allocator_retries: int | None = None
    host_resident: int | None = None


@dataclass
class Reading:
    """A sensor over the run: its mean, extremes, and how often it was read."""

    name: str  # "power", "sm clock", "gpu utilization", "temperature", "cpu utilization"
    unit: str
    mean: float
    minimum: float
    maximum: float
    count: int


@dataclass
class Device:
    name: str = ""
    readings: list[Reading] = field(default_factory=list)
    energy: float | None = None  # J, from a counter
    energy_seconds: float | None = None  # the window that this energy was spent in
    throttled: dict[str, float] = field(default_factory=dict)  # s by reason
    errors: dict[str, int] = field(default_factory=dict)  # ECC, NVLink, remapped rows


@dataclass
class Kernel:
    """Calls, seconds, bytes and FLOPs are sums over `steps` steps."""

    name: str
    calls: int  # in the window
    seconds: float
    bytes: float | None = None
    flops: float | None = None
    headroom: float | None = None  # s a step above what the device's ceilings allow
    bound: str | None = None  # "memory" or "compute": which ceiling
    steps: int = 1


@dataclass
class DeviceWindow:
    """What a GPU did in the window of a deep profile, by the intervals of its kernels and copies: sums over `steps`.

    Kernels that run side by side count once. `seconds` are from where the host begins the first step to where both
    are done with the last; `idle` of them are in no interval at all.
    """

    steps: int
    seconds: float
    idle: float
    compute: float  # kernels that are no communication
    communication: float  # NCCL's kernels
    exposed: float  # of communication: no other kernel runs meanwhile
    overlapped: float  # of communication: another one does
    to_device: float  # copies from the host, hidden or not
    to_host: float


@dataclass
class Ceilings:
    """What this very device reached in a measurement of its own."""

    copy: float | None = None  # bytes/s, read and written
    matmul: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype
    how: str = ""


@dataclass
class Profile:
    """What one process recorded."""

    header: Header = field(default_factory=Header)
    wall: float = 0.0
    clock_check: float | None = None  # the same interval by the system's clock: they differ where that jumped
    finished: bool = False  # False: written while the run went on, or it was killed
    ended_by: str | None = None  # an exception's name
    steps: Distribution = field(default_factory=Distribution)
    device_steps: Distribution = field(default_factory=Distribution)  # those that a GPU's own time was measured of
    phases: list[Phase] = field(default_factory=list)
    overlapped: float | None = None  # s of communication behind other work; part of no row
    parts: list[Part] = field(default_factory=list)
    slowest: list[SlowStep] = field(default_factory=list)
    windows: list[dict[str, float]] = field(default_factory=list)  # s a step by phase, of stretches of as many steps
    window_steps: int | None = None  # steps that `syncs` are of; `kernels` say it themselves
    syncs: list[Sync] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    devices: list[Device] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    device_window: DeviceWindow | None = None  # what `kernels` come to on a GPU
    ceilings: Ceilings = field(default_factory=Ceilings)
    timeline: list[Span] = field(default_factory=list)
    own_cost: float | None = None  # s a step that recording itself takes
    warnings: list[str] = field(default_factory=list)

    def phase(self, name: str) -> float:
        """s of that row; 0 where it never ran."""
        return sum(row.seconds for row in self.phases if row.name == name)

    @property
    def unexplained(self) -> float:
        """The share of wall time that no phase claims."""
        return self.phase("unexplained") / self.wall if self.wall else math.nan


@dataclass
class Compared:
    """One row of a comparison: ours against a baseline, with a bootstrap's 95 % interval of the ratio.

    `ratio`, `low` and `high` are NaN where the baseline does nothing of the kind.
    """

    name: str  # a phase, or "step"
    baseline: float  # s a step
    ours: float
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    baseline_windows: list[float] = field(default_factory=list)  # s a step, of each window
    ours_windows: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    against: str  # "eager", "lightning", or a file
    rows: list[Compared] = field(default_factory=list)
    windows: int = 0  # alternations
    steps: int = 0  # a window
    largest_loss_difference: float | None = None  # relative
    loss_bound: float | None = None
    notes: list[str] = field(default_factory=list)  # what was left out on either side, what differs


@dataclass
class Finding:
    """Something worth acting on, the weightiest first."""

    title: str  # "The data loader keeps the step waiting"
    detail: str  # figures
    advice: str
    where: str | None = None  # a line, a rank, a hook
    seconds_per_step: float | None = None
    rank: int | None = None


@dataclass
class RankSummary:
    """What a report keeps of each process, however many there are; some hundred bytes."""

    rank: int
    host: str = ""
    device: str = ""
    steps: int = 0
    wall: float = 0.0
    p50: float = math.nan  # s, of a step
    p99: float = math.nan
    longest: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # s by name
    readings: list[Reading] = field(default_factory=list)  # of its own device, the first
    throttled: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    energy: float | None = None
    peak: int | None = None
    finished: bool = False
    ended_by: str | None = None


@dataclass
class Report:
    """What is shown of a run.

    Of a few processes every profile is here. Of more than `merge.WHOLE` there are those of rank 0, of the slowest and
    of the fastest ranks; `ranks` always has all of them.
    """

    profiles: list[Profile] = field(default_factory=list)  # by rank
    comparison: Comparison | None = None
    findings: list[Finding] = field(default_factory=list)
    ranks: list[RankSummary] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # ranks without a file
    problems: list[str] = field(default_factory=list)  # files that could not be read, and other doubts

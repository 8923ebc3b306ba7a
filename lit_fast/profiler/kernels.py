"""From what torch.profiler recorded of a few steps: which kernels took the time, how far from the ceilings.

On a GPU a row is a kernel, on the CPU an operator by its self time. What an operation moves and computes (costs.py) is
known by call: the k-th call of that name in a step is taken for the k-th in the step that was counted, and its bytes
and FLOPs are credited to the kernel that takes most of the time in most of these calls. Where a step has other calls
than the counted one, bytes and FLOPs of that name stay unknown. torch does not see the core's steps: their passes are
counted from the tensors that they take (lit_fast/optim/traffic.py), and shared out among the launches of their kernels.

A call cannot be faster than its bytes at the measured bandwidth, nor than its FLOPs at the measured matrix rate. The
headroom of a row is its time above the larger of both, a step; "bound" says which of them is larger.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_fast.optim.clip import NORM_RANGE
from lit_fast.optim.traffic import Pass
from lit_fast.profiler.costs import Cost
from lit_fast.profiler.intervals import Intervals, length, shared, union
from lit_fast.profiler.record import Ceilings, DeviceWindow, Kernel, Span

STEP = "lit_fast step"  # the name of the range around each step of the window
OPTIMIZER = "Optimizer.step#"  # how torch's optimizers, and our compiled steps, mark theirs
OURS = "lit_fast"  # how rows begin that are kernels of this package, or its compiled steps
ROWS, SPANS = 40, 2000  # kept, the longest
_LAUNCH = re.compile(r"(cuda|cu|hip)[A-Z]")  # the runtime's and the driver's calls that launch kernels
_COMMUNICATION = re.compile("nccl|rccl", re.IGNORECASE)
_COPY = re.compile(r"Mem(cpy|set)\b")  # "Memcpy HtoD (Pinned -> Device)"


@dataclass(eq=False)
class Event:
    """One interval that was recorded, in ns; on a device `launch` is the number of the call that began it."""

    name: str
    begin: int
    end: int
    thread: int = 0
    on_device: bool = False
    launch: int = 0
    annotation: bool = False  # a range that somebody marked, not an operation
    inside: list[Event] = field(default_factory=list)  # what it called, on the same thread
    kernels: list[Event] = field(default_factory=list)  # what it launched itself

    @property
    def own(self) -> int:
        """ns in no other event of its thread."""
        return self.end - self.begin - sum(child.end - child.begin for child in self.inside)

    def everything(self) -> Iterator[Event]:
        """Itself, and all that ran inside."""
        waiting = [self]
        while waiting:
            event = waiting.pop()
            yield event
            waiting.extend(event.inside)


def events_of(profiler: Any) -> list[Event]:
    """What a torch.profiler that has ended recorded. Its own `events()` takes 0.2 ms for each of them."""
    found = []
    for event in profiler.profiler.kineto_results.events():
        annotated = getattr(event, "is_user_annotation", None)  # since torch 2.8
        found.append(
            Event(
                event.name(),
                event.start_ns(),
                event.end_ns(),
                event.start_thread_id(),
                event.device_type().name != "CPU",
                event.correlation_id(),
                bool(annotated is not None and annotated()),
            )
        )
    return found


class Window:
    """A few steps as torch.profiler recorded them.

    Args:
        events: all of them, in any order; those around the steps are left out (a validation between two steps).
        calls: what each call costs, by operation, of one step: `Costs.calls`.
        batches: of a step, which may accumulate gradients; a row's `steps` are batches, as everywhere in a profile.
        compiled: by the class of an optimizer, the passes of each such optimizer that the core steps, once a step.
    """

    def __init__(
        self,
        events: Iterable[Event],
        calls: Mapping[str, Sequence[Cost]],
        batches: int = 1,
        compiled: Mapping[str, Sequence[Sequence[Pass]]] | None = None,
    ) -> None:
        events, self.batches = list(events), batches
        self.all_on_device = [e for e in events if e.on_device and not e.annotation]
        self.steps = sorted((e for e in events if e.name == STEP and not e.on_device), key=lambda e: e.begin)
        host = [e for e in events if not e.on_device]
        roots = nest(host)
        self.top = [e for e in roots if any(step.begin <= e.begin < step.end for step in self.steps)]
        self.device = self._launched(host, self.all_on_device)
        self.compiled = compiled or {}
        self.costs = self._credited(calls) | self._credited_passes()

    def _launched(self, host: list[Event], device: list[Event]) -> list[Event]:
        """The kernels of these steps; each is entered where it was launched."""
        launches = {e.launch: e for e in host if e.launch and not e.annotation and _LAUNCH.match(e.name)}
        kept = []
        for kernel in device:
            launch = launches.get(kernel.launch)
            if launch is None or any(step.begin <= launch.begin < step.end for step in self.steps):
                kept.append(kernel)
            if launch is not None:
                launch.kernels.append(kernel)
        return kept

    def _credited(self, calls: Mapping[str, Sequence[Cost]]) -> dict[int, Cost]:
        """Costs by the id() of the event that they are credited to."""
        claims: dict[str, list[list[Event]]] = {name: [[] for _ in self.steps] for name in calls}
        waiting = list(self.top)
        while waiting:
            event = waiting.pop()
            if event.name not in calls:
                waiting.extend(event.inside)
                continue
            for index, step in enumerate(self.steps):
                if step.begin <= event.begin < step.end:
                    claims[event.name][index].append(event)
        credited = {}
        for name, by_step in claims.items():
            usual = _usually_longest(event for made in by_step for event in made)
            for made in by_step:
                if len(made) == len(calls[name]):
                    for event, cost in zip(sorted(made, key=lambda e: e.begin), calls[name], strict=True):
                        within = [(own, e) for e, own in _parts(event) if e.name == usual]
                        credited[id(max(within, key=lambda pair: pair[0])[1] if within else event)] = cost
        return credited

    def _credited_passes(self) -> dict[int, Cost]:
        """The same, of compiled steps."""
        marked = [e for root in self.top for e in root.everything() if e.annotation]
        passes: list[Pass] = []
        credited: dict[int, Cost] = {}
        for name, optimizers in self.compiled.items():
            ranges = [e for e in marked if e.name == f"{OPTIMIZER}{name}.step"]
            if len(ranges) != len(optimizers) * len(self.steps):  # one of them does not step once a step
                continue
            passes += [each for made in optimizers for each in made]
            within = [each for made in optimizers for each in made if each.within]
            if not self.device:
                _share(within, len(self.steps), ranges, credited)
        if not self.device:
            norms = [each for each in passes if each.name == "norm" and not each.within]
            _share(norms, len(self.steps), [e for e in marked if e.name == NORM_RANGE], credited)
        for each in passes:
            kernels = [e for e in self.device if is_ours(e.name) and re.search(each.kernels, e.name, re.IGNORECASE)]
            _share([each], len(self.steps), kernels, credited)
        return credited

    def kernels(self, ceilings: Ceilings) -> list[Kernel]:
        """The longest, longest first. Calls, seconds, bytes and FLOPs are sums over the window's `steps`."""
        rows: dict[str, _Row] = {}
        steps = len(self.steps) * self.batches
        for event, nanoseconds in self._timed():
            row = rows.setdefault(self._shown(event.name), _Row())
            row.add(nanoseconds * 1e-9, self.costs.get(id(event)), ceilings)
        made = [row.kernel(name, steps) for name, row in rows.items()]
        return sorted(made, key=lambda kernel: -kernel.seconds)[:ROWS]

    def on_device(self) -> DeviceWindow | None:
        """What the device did meanwhile, with what ran between the steps; None without one."""
        if not self.steps or not self.device:
            return None
        begin = self.steps[0].begin
        end = max(self.steps[-1].end, *(e.end for e in self.device))
        within = [(begin, end)]

        def of(wanted: Callable[[str], object]) -> Intervals:
            return shared(union((e.begin, e.end) for e in self.all_on_device if wanted(e.name)), within)

        communication = of(_COMMUNICATION.search)
        compute = of(lambda name: not _COMMUNICATION.search(name) and not _COPY.match(name))
        hidden = length(shared(communication, compute))
        seconds = {
            "seconds": end - begin,
            "idle": end - begin - length(of(lambda name: True)),
            "compute": length(compute),
            "communication": length(communication),
            "exposed": length(communication) - hidden,
            "overlapped": hidden,
            "to_device": length(of(lambda name: name.startswith("Memcpy HtoD"))),
            "to_host": length(of(lambda name: name.startswith("Memcpy DtoH"))),
        }
        steps = len(self.steps) * self.batches
        return DeviceWindow(steps, **{name: nanoseconds * 1e-9 for name, nanoseconds in seconds.items()})

    def _timed(self) -> Iterator[tuple[Event, int]]:
        """What counts as a kernel, with its ns."""
        if self.device:
            yield from ((event, event.end - event.begin) for event in self.device)
            return
        for root in self.top:
            for event in root.everything():
                if event.name.startswith((OPTIMIZER, NORM_RANGE)) or not (event.annotation or event.name == STEP):
                    yield event, event.own

    def ranges(self, prefix: str, since: Callable[[int], float]) -> list[Span]:
        """The ranges of these steps whose names begin so, for a timeline; `since` as in `spans`."""
        marked = [e for root in self.top for e in root.everything() if e.name.startswith(prefix) and e.name != STEP]
        kept = sorted(marked, key=lambda e: e.begin)[-SPANS:]
        return [Span("phases", e.name.removeprefix(prefix), since(e.begin), (e.end - e.begin) * 1e-9) for e in kept]

    def _shown(self, name: str) -> str:
        """As people know it: an optimizer's step without the words that torch marks it by, ours with our name."""
        if name.startswith(OPTIMIZER):
            kind = name.removeprefix(OPTIMIZER).removesuffix(".step")
            return f"{OURS} {kind} step" if kind in self.compiled else f"{kind} step"
        name = _short(name) if is_ours(name) else name
        return name if len(name) <= 200 else f"{name[:199]}…"  # kernels of templates

    def spans(self, since: Callable[[int], float]) -> list[Span]:
        """The kernels of the last step for a timeline: the longest, in order.

        Args:
            since: what a time of the events' clock (ns) is on the run's (s since it began).
        """
        if not self.steps:
            return []
        last = self.steps[-1]
        if self.device:
            events = [e for e in self.device if e.begin >= last.begin]
        else:
            events = [e for root in self.top for e in _operations(root) if last.begin <= e.begin < last.end]
        kept = sorted(sorted(events, key=lambda e: e.begin - e.end)[:SPANS], key=lambda e: e.begin)
        return [Span("kernels", self._shown(e.name), since(e.begin), (e.end - e.begin) * 1e-9) for e in kept]


def nest(events: Iterable[Event]) -> list[Event]:
    """Enter each event in the one around it on its thread; returns those that no other is around."""
    by_thread: dict[int, list[Event]] = {}
    for event in events:
        event.inside = []
        by_thread.setdefault(event.thread, []).append(event)
    roots: list[Event] = []
    for thread in by_thread.values():
        open_ones: list[Event] = []
        for event in sorted(thread, key=lambda e: (e.begin, -e.end)):
            while open_ones and open_ones[-1].end <= event.begin:
                open_ones.pop()
            (open_ones[-1].inside if open_ones else roots).append(event)
            open_ones.append(event)
    return roots


def _parts(event: Event) -> list[tuple[Event, int]]:
    """What an operation's time went into, with ns: kernels that it launched, or on a CPU its calls by themselves."""
    inside = list(event.everything())
    launched = [kernel for call in inside for kernel in call.kernels]
    return [(e, e.end - e.begin) for e in launched] if launched else [(e, e.own) for e in inside]


def _usually_longest(events: Iterable[Event]) -> str:
    """The name that takes most of the time in most of them: a single call may have been interrupted anywhere."""
    longest = Counter(max(_parts(event), key=lambda pair: pair[1])[0].name for event in events)
    return longest.most_common(1)[0][0] if longest else ""


def _operations(root: Event) -> Iterator[Event]:
    """The outermost operations in it."""
    waiting = [root]
    while waiting:
        event = waiting.pop()
        if event.name.startswith("aten::") or (event.annotation and event.name.startswith(OPTIMIZER)):
            yield event
        else:
            waiting.extend(event.inside)


def is_ours(name: str) -> bool:
    """Whether a GPU's kernel is of this package: in its namespace in C++, by its prefix in Triton."""
    return OURS in name


def _short(name: str) -> str:
    """A kernel of ours without what they have in common, and without its parameters.

    >>> _short("void lit_fast::cuda::direct_kernel<lit_fast::Sgd, 256u, float, float, false>(StepTable)")
    'lit_fast direct_kernel<Sgd, 256u, float, float, false>'
    >>> _short("lit_fast_step_kernel")
    'lit_fast step_kernel'
    """
    name = name[: name.rindex(">(") + 1] if ">(" in name else name.partition("(")[0]
    return f"{OURS} {re.sub(r'^void |lit_fast::(cuda::)?|^lit_fast_', '', name)}"


def _share(passes: Sequence[Pass], steps: int, events: Sequence[Event], credited: dict[int, Cost]) -> None:
    """Credit to each of these events, of all `steps`, its part of what the passes cost in each step."""
    for event in events if passes else ():
        known = credited.get(id(event), Cost(0.0))
        moved = sum(each.bytes for each in passes) * steps / len(events)
        flops = sum(each.flops for each in passes) * steps / len(events)
        credited[id(event)] = Cost(known.bytes + moved, (known.flops or 0.0) + flops)


class _Row:
    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.bytes = self.flops = self.least = self.by_bytes = self.by_flops = self.known = 0.0

    def add(self, seconds: float, cost: Cost | None, ceilings: Ceilings) -> None:
        self.calls += 1
        self.seconds += seconds
        if cost is None:
            return
        self.known += seconds
        self.bytes += cost.bytes
        self.flops += cost.flops or 0.0
        rate = ceilings.matmul.get(cost.dtype) or (ceilings.matmul.get("tf32") if cost.dtype == "float32" else None)
        by_bytes = cost.bytes / ceilings.copy if ceilings.copy else 0.0
        by_flops = cost.flops / rate if cost.flops and rate else 0.0
        self.least += max(by_bytes, by_flops)
        self.by_bytes, self.by_flops = self.by_bytes + by_bytes, self.by_flops + by_flops

    def kernel(self, name: str, steps: int) -> Kernel:
        kernel = Kernel(name, self.calls, self.seconds, steps=steps)
        if self.known >= 0.99 * self.seconds and self.known > 0:  # what is known of a part would be a wrong rate
            kernel.bytes, kernel.flops = self.bytes, self.flops or None
            if self.least:
                kernel.headroom = max(0.0, self.seconds - self.least) / steps
                kernel.bound = "compute" if self.by_flops > self.by_bytes else "memory"
        return kernel

"""The timeline of a report as a trace: for https://ui.perfetto.dev as TrackEvent protobuf, or as Chrome's JSON.

A process is a group of tracks: its steps, phases, hooks, collectives, kernels. Spans of one track that overlap without
one lying in the other (kernels of two streams) are spread over several, since a track is a stack. Every process counts
from the beginning of its own run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_fast.profiler.collectives import bus_bandwidth
from lit_fast.profiler.record import Profile, Report, Span

ORDER = ("steps", "phases", "hooks", "collectives", "kernels")
CLEARED = 1  # TracePacket.SEQ_INCREMENTAL_STATE_CLEARED: the sequence begins here
BEGIN, END = 1, 2  # TrackEvent.TYPE_SLICE_BEGIN, TYPE_SLICE_END


@dataclass(frozen=True)
class Slice:
    """A span in whole nanoseconds, as traces have them."""

    begin: int
    end: int
    span: Span


def write_perfetto(report: Report, path: str | os.PathLike[str]) -> None:
    """Write TrackEvents, one packet after another: memory does not grow with the trace.

    Raises:
        ModuleNotFoundError: the package perfetto is not installed.

    Example::

        write_perfetto(merge("lit_fast_profile"), "trace.pftrace")
    """
    try:
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder
    except ImportError as error:
        raise ModuleNotFoundError("Traces for Perfetto are written by it: pip install 'lit-fast[profile]'.") from error

    with Path(path).open("wb") as file:
        builder = StreamingTraceProtoBuilder(file)
        packet = builder.create_packet()
        packet.trusted_packet_sequence_id, packet.sequence_flags = 1, CLEARED
        builder.write_packet(packet)
        number = 0
        for profile in report.profiles:
            number += 1
            process = number
            packet = builder.create_packet()
            packet.trusted_packet_sequence_id = 1
            packet.track_descriptor.uuid = process
            packet.track_descriptor.process.pid = profile.header.rank + 1  # 0 is the idle process's
            packet.track_descriptor.process.process_name = _process_name(profile)
            builder.write_packet(packet)
            for place, (track, slices) in enumerate(tracks(profile)):
                number += 1
                packet = builder.create_packet()
                packet.trusted_packet_sequence_id = 1
                described = packet.track_descriptor
                described.uuid, described.parent_uuid, described.name = number, process, track
                described.sibling_order_rank = place
                builder.write_packet(packet)
                for at, begins, span in events(slices):
                    packet = builder.create_packet()
                    packet.trusted_packet_sequence_id, packet.timestamp = 1, at
                    packet.track_event.type, packet.track_event.track_uuid = BEGIN if begins else END, number
                    if begins:
                        packet.track_event.name = span.name
                        packet.track_event.categories.append(span.track)
                        for name, value in _notes(span, profile).items():
                            note = packet.track_event.debug_annotations.add()
                            note.name = name
                            if isinstance(value, int):
                                note.int_value = value
                            else:
                                note.double_value = value
                    builder.write_packet(packet)


def write_chrome(report: Report, path: str | os.PathLike[str]) -> None:
    """Write complete events ("ph": "X") in us, as chrome://tracing and most viewers read them."""
    found: list[dict[str, Any]] = []
    for profile in report.profiles:
        rank = profile.header.rank
        found.append(_named("process_name", rank, 0, _process_name(profile)))
        for thread, (name, slices) in enumerate(tracks(profile), 1):
            found.append(_named("thread_name", rank, thread, name))
            for one in slices:
                event: dict[str, Any] = {
                    "ph": "X", "pid": rank, "tid": thread, "name": one.span.name, "cat": one.span.track,
                    "ts": one.begin / 1e3, "dur": (one.end - one.begin) / 1e3,
                }  # fmt: skip
                notes = _notes(one.span, profile)
                found.append({**event, "args": notes} if notes else event)
    Path(path).write_text(json.dumps({"traceEvents": found, "displayTimeUnit": "ms"}), encoding="utf-8")


def tracks(profile: Profile) -> Iterator[tuple[str, list[Slice]]]:
    """(name, slices) in which no two slices overlap but where one lies within the other; outer ones come first."""
    spans = [*_steps(profile.timeline), *profile.timeline]
    names = [*ORDER, *sorted({span.track for span in spans} - set(ORDER))]
    for name in names:
        own = [span for span in spans if span.track == name]
        for number, lane in enumerate(_lanes(own), 1):
            yield (name if number == 1 else f"{name} {number}"), lane


def events(slices: Sequence[Slice]) -> Iterator[tuple[int, bool, Span]]:
    """(ns, whether it begins, span) in the order of time; at the same moment an end comes before a beginning."""
    within: list[Slice] = []
    for one in slices:
        while within and within[-1].end <= one.begin:
            yield within[-1].end, False, within.pop().span
        yield one.begin, True, one.span
        within.append(one)
    while within:
        yield within[-1].end, False, within.pop().span


def _lanes(spans: Sequence[Span]) -> list[list[Slice]]:
    made = (Slice(round(s.begin * 1e9), round((s.begin + s.seconds) * 1e9), s) for s in spans)
    lanes: list[tuple[list[Slice], list[int]]] = []  # slices, and the ends of those that are open, the innermost last
    for one in sorted(made, key=lambda one: (one.begin, -one.end)):
        for _, ends in lanes:
            while ends and ends[-1] <= one.begin:
                ends.pop()
        free = next((lane for lane in lanes if not lane[1] or one.end <= lane[1][-1]), None)
        if free is None:
            free = [], []
            lanes.append(free)
        free[0].append(one)
        free[1].append(one.end)
    return [slices for slices, _ in lanes]


def _steps(spans: Sequence[Span]) -> list[Span]:
    """One span for each step, around its phases."""
    around: dict[int, tuple[float, float]] = {}
    for span in spans:
        if span.track == "phases" and span.step is not None:
            begin, end = around.get(span.step, (span.begin, span.begin))
            around[span.step] = min(begin, span.begin), max(end, span.begin + span.seconds)
    return [Span("steps", f"step {step}", begin, end - begin, step) for step, (begin, end) in around.items()]


def _notes(span: Span, profile: Profile) -> dict[str, int | float]:
    """What a viewer shows of a span beside its name."""
    notes: dict[str, int | float] = {} if span.step is None else {"step": span.step}
    if span.bytes is not None:
        notes["bytes"] = int(span.bytes)
    bandwidth = bus_bandwidth(span, profile.header.world_size)
    return notes if bandwidth is None else {**notes, "bus GB/s": bandwidth * 1e-9}


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _process_name(profile: Profile) -> str:
    head = profile.header
    return f"rank {head.rank}" + (f" on {head.host}" if head.host else "")

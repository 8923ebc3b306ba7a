"""Traces, read back: everything is there, and begins and ends nest as Perfetto asks for."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import deep, profile

from lit_fast.profiler.merge import of_profiles
from lit_fast.profiler.record import Profile, Report, Span
from lit_fast.profiler.report.trace import BEGIN, CLEARED, END, events, tracks, write_chrome, write_perfetto


def two_streams() -> Report:
    made = [deep(profile(rank=rank, world_size=2)) for rank in range(2)]
    at = made[1].timeline[0].begin
    made[1].timeline += [Span("kernels", f"gemm {n}", at + n * 1e-4, 1.5e-4, 192) for n in range(6)]
    made[1].timeline.append(Span("phases", "checkpoint", made[1].timeline[2].begin + 1e-4, 1e-3, 192))
    return of_profiles(made)


def spans(report: Report) -> list[tuple[int, str, str, int, int]]:
    """(rank, track, name, begin, end in ns) of what was recorded."""
    return sorted(
        (made.header.rank, span.track, span.name, round(span.begin * 1e9), round((span.begin + span.seconds) * 1e9))
        for made in report.profiles
        for span in made.timeline
    )


def test_perfetto_reads_back_what_was_recorded(tmp_path: Path) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

    report = two_streams()
    write_perfetto(report, tmp_path / "trace.pftrace")
    trace = Trace()
    trace.ParseFromString((tmp_path / "trace.pftrace").read_bytes())
    assert trace.packet[0].sequence_flags == CLEARED
    assert {packet.trusted_packet_sequence_id for packet in trace.packet} == {1}
    described = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    names = {uuid: d.process.process_name or d.name for uuid, d in described.items()}
    parents = {uuid: names[d.parent_uuid] for uuid, d in described.items() if d.parent_uuid}
    stacks: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
    last: dict[int, int] = defaultdict(int)
    found, steps = [], 0
    for packet in trace.packet:
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        assert packet.timestamp >= last[event.track_uuid], "a track goes forward in time"
        last[event.track_uuid] = packet.timestamp
        if event.type == BEGIN:
            stacks[event.track_uuid].append((event.categories[0], event.name, packet.timestamp))
            continue
        assert event.type == END
        track, name, begin = stacks[event.track_uuid].pop()
        assert names[event.track_uuid].split()[0] == track
        steps += track == "steps"
        if track != "steps":
            rank = int(parents[event.track_uuid].split()[1])
            found.append((rank, track, name, begin, packet.timestamp))
    assert not any(stacks.values()), "whatever begins ends"
    assert sorted(found) == spans(report) and steps == 16
    assert set(parents.values()) == {"rank 0 on node-0", "rank 1 on node-0"}
    assert "kernels 2" in names.values(), "kernels that overlap lie on two tracks"


def test_chrome_reads_back_what_was_recorded(tmp_path: Path) -> None:
    report = two_streams()
    write_chrome(report, tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shown = [e for e in found if e["ph"] == "X" and e["cat"] != "steps"]
    read = [(e["pid"], e["cat"], e["name"], round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3)) for e in shown]
    assert sorted(read) == spans(report)
    assert all(e["args"]["step"] in range(192, 200) for e in found if e["ph"] == "X")
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert named[1, 1] == "steps" and all((e["pid"], e["tid"]) in named for e in shown)


def test_collectives_show_their_bytes_and_the_bandwidth_of_each_link(tmp_path: Path) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

    made = profile(world_size=4)
    made.timeline = [Span("collectives", "all_reduce gradients 0", 1.0, 1e-3, 7, 1e6)]
    write_chrome(of_profiles([made]), tmp_path / "t.json")
    [event] = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert event["args"] == {"step": 7, "bytes": 1_000_000, "bus GB/s": pytest.approx(1.5)}  # 2 * 3/4 * 1 MB in 1 ms
    write_perfetto(of_profiles([made]), tmp_path / "t.pftrace")
    trace = Trace()
    trace.ParseFromString((tmp_path / "t.pftrace").read_bytes())
    [notes] = [p.track_event.debug_annotations for p in trace.packet if p.track_event.debug_annotations]
    assert {note.name: note.int_value or note.double_value for note in notes} == event["args"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=30))
def test_any_spans_nest(pairs: list[tuple[int, int]]) -> None:
    made = Profile(timeline=[Span("kernels", str(n), b * 1e-6, s * 1e-6) for n, (b, s) in enumerate(pairs)])
    seen = []
    for _, lane in tracks(made):
        stack, at = [], 0
        for time, begins, span in events(lane):
            assert time >= at
            at = time
            if begins:
                stack.append(span.name)
                seen.append(span.name)
            else:
                assert stack.pop() == span.name
        assert not stack
    assert sorted(seen) == sorted(str(n) for n in range(len(pairs)))


def test_a_run_without_a_timeline_has_an_empty_trace(tmp_path: Path) -> None:
    write_perfetto(of_profiles([Profile()]), tmp_path / "t.pftrace")
    write_chrome(of_profiles([Profile()]), tmp_path / "t.json")
    assert [e["ph"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"]] == ["M"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "perfetto.trace_builder.proto_builder", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        write_perfetto(of_profiles([profile()]), tmp_path / "t.pftrace")

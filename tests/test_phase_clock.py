"""The compiled clock: whose time it is, to the nanosecond, whatever a call does."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from time import perf_counter_ns, sleep
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast import ops
from lit_fast.errors import ProfileError
from lit_fast.phase_clock import MOST_PARTS, OTHERS
from lit_fast.profiler import record


def clock(**options: Any) -> ops.PhaseClock:
    made = ops.PhaseClock(["outer", "inner", "rest"], ["pause"], **options)
    made.start("rest")
    return made


def times(read: ops.Reading) -> dict[str, int]:
    assert sum(ns for ns, _ in read.phases.values()) == read.wall
    return {name: ns for name, (ns, _) in read.phases.items()}


def spin(ns: int) -> int:
    began = perf_counter_ns()
    while (passed := perf_counter_ns() - began) < ns:
        pass
    return passed


@given(st.integers(0, (1 << 63) - 1))
def test_the_grid_is_that_of_the_schema(nanoseconds: int) -> None:
    assert ops.bucket_of(nanoseconds) == record.bucket_of(nanoseconds)


@pytest.mark.parametrize("power", range(63))
def test_the_grid_at_its_edges(power: int) -> None:
    for near in (-1, 0, 1):
        nanoseconds = max(0, (1 << power) + near)
        assert ops.bucket_of(nanoseconds) == record.bucket_of(nanoseconds)


@pytest.mark.parametrize("wrong", [-1, 1 << 63])
def test_what_is_no_duration(wrong: int) -> None:
    with pytest.raises(ProfileError, match="no duration"):
        ops.bucket_of(wrong)


def test_time_belongs_to_the_innermost() -> None:
    made = clock()
    inner = made.wrap("inner", lambda: spin(3_000_000))

    def work() -> None:
        spin(2_000_000)
        inner()
        spin(1_000_000)

    began = perf_counter_ns()
    made.wrap("outer", work)()
    took = perf_counter_ns() - began
    made.stop()
    found = times(made.read())
    assert found["outer"] >= 3_000_000 and found["inner"] >= 3_000_000
    assert found["outer"] + found["inner"] <= took


def test_arguments_results_and_attributes_come_through() -> None:
    made = clock()

    def function(a: int, /, b: int, *more: int, c: int = 3, **named: int) -> tuple[Any, ...]:
        """Says what it was given."""
        return a, b, more, c, named

    timed: Any = made.wrap("outer", function)
    assert timed(1, 2) == function(1, 2)
    assert timed(1, 2, 5, 6, c=7, d=8) == function(1, 2, 5, 6, c=7, d=8)
    assert timed(*(1,), **{"b": 4}) == function(1, b=4)
    assert timed.__wrapped__ is function and timed.__qualname__ == function.__qualname__
    assert inspect.signature(timed) == inspect.signature(function)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = timed.nothing_of_this_name
    with pytest.raises(TypeError):
        timed()


def test_exceptions_pass_and_end_the_phase() -> None:
    made = clock()

    def broken() -> None:
        raise KeyError("kept")

    for _ in range(3):
        with pytest.raises(KeyError, match="kept"):
            made.wrap("outer", broken)()
        with pytest.raises(KeyError, match="kept"), made.block("inner"):
            broken()
    spin(1_000_000)
    made.stop()
    read = made.read()
    assert times(read)["rest"] >= 1_000_000
    assert read.phases["outer"][1] == read.phases["inner"][1] == 3


def test_recursion() -> None:
    made = clock()

    def down(levels: int) -> None:
        spin(100_000)
        if levels:
            timed(levels - 1)

    timed = made.wrap("outer", down, "down")
    timed(5)
    made.stop()
    read = made.read()
    [part] = read.parts
    assert part.calls == 6 and 600_000 <= part.total == times(read)["outer"]
    assert part.longest == part.total  # the outermost call holds the others
    deep = clock()
    over: Any = deep.wrap("outer", lambda: [over()])
    with pytest.raises(RecursionError):
        over()
    deep.stop()
    times(deep.read())


def test_other_threads_pass_through() -> None:
    made = clock()
    timed = made.wrap("outer", threading.get_ident)
    seen: list[int] = []

    def work() -> None:
        seen.append(timed())
        with made.block("inner"):
            sleep(0.002)
        seen.extend(made.steps("outer", iter([7])))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [thread.ident, 7]
    timed()
    made.stop()
    read = made.read()
    assert read.phases["outer"][1] == 1 and times(read)["inner"] == 0 and read.steps_begun == 0


def test_a_new_start_forgets_and_calls_of_the_run_before_end_quietly() -> None:
    made = clock()
    made.wrap("inner", lambda: spin(1_000_000))()
    made.wrap("outer", lambda: made.start("rest"))()  # as a fit inside a hook of another would
    spin(100_000)
    made.stop()
    read = made.read()
    assert times(read)["inner"] == times(read)["outer"] == 0 and read.phases["outer"][1] == 0
    before = made.read()
    made.wrap("outer", lambda: spin(1000))()  # after the end nothing is timed
    assert made.read() == before


def test_steps() -> None:
    made = clock(slowest_kept=2)
    work = made.wrap("inner", spin, "spin")
    shown: list[int] = []
    for ns in made.steps("outer", iter([100_000, 60_000_000, 200_000, 40_000_000]), shown.append):
        work(ns)
        if ns == 40_000_000:
            made.interrupted("pause", 1234)
    made.stop()
    read = made.read()
    assert shown == [100_000]  # the first one
    assert read.steps_begun == read.steps.count == 4  # the look that found no fifth batch is no step
    assert [slow.step for slow in read.slowest] == [1, 3]
    assert read.slowest[0].duration >= 60_000_000 and read.slowest[0].longest_part == ("inner", "spin")
    assert read.slowest[1].interruptions == {"pause": 1234} == read.interruptions
    assert all(sum(slow.phases.values()) == slow.duration for slow in read.slowest)
    assert sum(spread.total for spread in read.per_step.values()) == read.steps.total
    assert sum(read.steps.buckets.values()) == 4 and record.bucket_of(read.steps.maximum) in read.steps.buckets
    spans = [(span.phase, span.part, span.step) for span in made.spans()]
    assert spans[:3] == [
        ("outer", None, 0),
        ("inner", "spin", 0),
        ("outer", None, 1),
    ]
    assert [s.step for s in made.spans(1)] == [3, 3]


def test_a_step_ends_where_it_is_told_to() -> None:
    made = clock()
    for _ in made.steps("outer", iter([0])):
        pass
    batches = made.steps("outer", iter([1, 2]))
    next(batches)
    made.end_step()
    made.end_step()
    spin(2_000_000)
    next(batches)
    made.stop()
    read = made.read()
    assert read.steps.count == 3 and read.steps.maximum < 2_000_000


def test_items_are_timed_without_steps() -> None:
    made = clock()

    def items() -> Iterator[int]:
        for n in range(3):
            spin(500_000)
            yield n

    assert list(made.items("inner", items())) == [0, 1, 2]
    made.stop()
    assert times(made.read())["inner"] >= 1_500_000 and made.read().steps_begun == 0


def test_memory_does_not_grow_with_steps() -> None:
    made = clock(spans_kept=100)
    work = made.wrap("inner", lambda: None, "work")
    for _ in made.steps("outer", iter(range(100_000))):
        work()
    made.stop()
    read = made.read()
    assert read.steps.count == 100_000 and len(read.slowest) == 10
    assert len(made.spans(10**9)) == 99  # and the look that found the end, which is of no step
    assert len(read.steps.buckets) <= 960


def test_names_do_not_grow_without_end() -> None:
    made = clock()
    for n in range(MOST_PARTS + 50):
        made.wrap("inner", lambda: None, f"part {n}")()
    made.stop()
    parts = {part.name: part.calls for part in made.read().parts}
    assert len(parts) == MOST_PARTS + 1 and parts[OTHERS] == 50


def test_what_is_wrapped_is_let_go_of() -> None:
    made = clock()

    class Holder:
        def method(self) -> None: ...

    holder: Any = Holder()
    holder.timed = made.wrap("outer", holder.method)  # a cycle
    gone = weakref.ref(holder)
    timed_items = made.steps("outer", iter([holder]), print)
    del holder, timed_items
    gc.collect()
    assert gone() is None


def test_any_number_of_calls_in_one_step() -> None:
    made = clock()
    work = made.wrap("inner", lambda: None, "work")
    block = made.block("outer")
    for _ in made.steps("outer", iter([0])):
        for _ in range(20_000):
            work()
            with block:
                pass
    made.stop()
    read = made.read()
    times(read)
    assert [part.calls for part in read.parts] == [20_000] and read.phases["outer"][1] == 20_000 + 2
    assert read.steps.count == 1 and sum(spread.total for spread in read.per_step.values()) == read.steps.total


def test_wall_time_is_that_of_an_independent_clock() -> None:
    made = ops.PhaseClock(["all"])
    outside = perf_counter_ns()
    made.start("all")
    inside = perf_counter_ns()
    sleep(0.2)
    inside = perf_counter_ns() - inside
    made.stop()
    outside = perf_counter_ns() - outside
    assert inside * (1 - 1e-4) <= made.read().wall <= outside * (1 + 1e-4)


def test_blocks_that_do_not_nest() -> None:
    made = clock()
    first, second = made.block("outer"), made.block("inner")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    spin(1_000_000)
    made.stop()
    assert times(made.read())["rest"] >= 1_000_000


def test_it_can_be_read_from_another_thread_while_it_runs() -> None:
    made = clock()
    work = made.wrap("inner", lambda: None, "work")
    ended, walls = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            read = made.read()
            times(read)
            assert sum(spread.total for spread in read.per_step.values()) == read.steps.total
            assert all(span.duration >= 0 for span in made.spans())
            walls.append(read.wall)
        walls.append(made.read().wall)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in made.steps("outer", iter(range(20_000))):
        work()
    made.stop()
    ended.set()
    thread.join()
    assert walls == sorted(walls) and walls[-1] == made.read().wall
    assert made.read().steps.count == made.read().parts[0].calls == 20_000


def test_wrong_names() -> None:
    made = clock()
    with pytest.raises(ProfileError, match=r"no phase 'lunch'.*outer, inner, rest"):
        made.wrap("lunch", print)
    with pytest.raises(ProfileError, match="no interruption 'lunch'"):
        made.interrupted("lunch", 1)


def test_while_it_is_paused_nothing_is_timed() -> None:
    made = clock()
    batches = made.steps("outer", iter(range(4)))
    work = made.wrap("inner", spin, "part")
    next(batches)
    work(1_000_000)
    made.pause("outer")
    before = made.read()
    assert before.steps.count == 1  # ended where the pause began
    next(batches)
    work(5_000_000)
    made.interrupted("pause", 7)
    made.resume()
    made.resume()  # no pause: nothing
    next(batches)
    work(1_000_000)
    made.stop()
    made.resume()
    read = made.read()
    spent = times(read)
    assert spent["outer"] >= 5_000_000 and read.phases["inner"][1] == 2 and spent["inner"] < 5_000_000
    assert read.steps.count == 2 and read.steps.maximum < 5_000_000
    assert read.interruptions == {"pause": 0} and len(read.parts) == 1


def test_a_run_that_ends_while_paused_adds_up() -> None:
    made = clock()
    with made.block("inner"):
        made.pause("outer")
        spin(100_000)
    made.stop()
    assert times(made.read())["outer"] >= 100_000
    made.start("rest")
    made.wrap("inner", spin)(100_000)
    made.stop()
    assert times(made.read())["inner"] >= 100_000  # a new run is not paused


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_is_not_timed_and_waits_for_no_thread_of_the_other() -> None:
    made = clock()
    work = made.wrap("inner", lambda: 5, "work")
    ended = threading.Event()

    def look() -> None:  # holds the clock's lock for most of the time
        while not ended.is_set():
            made.read()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in made.steps("outer", iter(range(4))):
            work()
            fine, child = False, os.fork()
            if child == 0:
                try:
                    signal.alarm(20)  # ends it where it waits
                    fine = [work() for _ in range(1500)] == [5] * 1500 and not made.counts
                    for _ in range(2000):
                        made.interrupted("pause", 1)
                    before = made.read()
                    with made.block("rest", "of the child"):
                        work()
                    fine = fine and made.read() == before and before.interruptions == {"pause": 0}
                    made.start("rest")  # a run of its own
                    work()
                    made.stop()
                    fine = fine and made.read().phases["inner"][1] == 1
                finally:
                    os._exit(0 if fine else 1)
            assert os.waitpid(child, 0)[1] == 0
            work()
    finally:
        ended.set()
        thread.join()
    made.stop()
    read = made.read()
    assert sum(ns for ns, _ in read.phases.values()) == read.wall
    assert read.steps.count == 4 and read.phases["inner"][1] == 8

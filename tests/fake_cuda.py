"""A device that is none: streams and events as CUDA's documentation describes them, on a clock that tests move.

Work on a stream runs in order, each piece when the one before has ended and the host has launched it. An event takes
its time when the stream comes to it; `query` is False until then; `elapsed_time` is in ms, and an error where either
event was not recorded or has not come (torch's own checks). An event that is recorded anew forgets its time before.
"""

from __future__ import annotations

from typing import Any

import torch


class Stream:
    def __init__(self) -> None:
        self.ends = 0  # ns at which all that was launched has run


class FakeCuda:
    """Stands for `torch.cuda`. Times are ns; `host` is the host's own work, `launch` a kernel's."""

    def __init__(self) -> None:
        self.now = 0
        self.stream = Stream()
        self.made = self.recorded = self.waited = 0
        self.error: str | None = None  # that every call raises from now on, as after a kernel's assertion

    def host(self, nanoseconds: int) -> None:
        self.now += nanoseconds

    def launch(self, nanoseconds: int) -> None:
        self.stream.ends = max(self.now, self.stream.ends) + nanoseconds

    def current_stream(self, device: torch.device) -> Stream:
        assert device.type == "cuda"
        return self.stream

    def Event(self, enable_timing: bool = False) -> Event:
        assert enable_timing
        self.made += 1
        return Event(self)

    def check(self) -> None:
        if self.error is not None:
            raise RuntimeError(self.error)


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, -1

    def record(self, stream: Any) -> None:
        self.cuda.check()
        assert isinstance(stream, Stream)
        self.cuda.recorded += 1
        self.at = stream.ends = max(self.cuda.now, stream.ends)

    def query(self) -> bool:
        self.cuda.check()
        return self.at <= self.cuda.now  # also where it was never recorded

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.waited += 1
        self.cuda.now = max(self.cuda.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        self.cuda.check()
        if self.at < 0 or end.at < 0:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end.at - self.at) * 1e-6

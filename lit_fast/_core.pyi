from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeAlias, TypedDict, TypeVar

from torch import Tensor

T = TypeVar("T")

Groups: TypeAlias = list[dict[str, Any]]
State: TypeAlias = dict[Tensor, Any]

# (device index, stream handle, 0-dim float32 norm tensor or None, workspace(n) -> n float64 on the device,
# 0-dim float32 tensor that multiplies the gradients or None, 0-dim int64 tensor that counts skipped steps or None,
# whether every step is skipped after the first, whether a CUDA graph is being captured)
CudaContext: TypeAlias = tuple[
    int, int, Tensor | None, Callable[[int], Tensor], Tensor | None, Tensor | None, bool, bool, bool
]

# (table, words of a row, words of a set of options, rows, chunks, aligned), see csrc/stepper.h
Launch: TypeAlias = Callable[[bytearray, int, int, int, int, bool], None]

def configure(
    torch: ModuleType,
    use_exchange_api: bool,
    increment_version: Callable[[list[Tensor]], None],
    num_threads: Callable[[], int],
    vector_width: int,
    /,
) -> None: ...
def find_openmp(preferred_prefix: str, /) -> None: ...
def choose_cpu_target(name: str, reason: str, /) -> None: ...
def build_info() -> dict[str, Any]: ...

# (count, total, minimum, maximum, {index: count})
Histogram: TypeAlias = tuple[int, int, int, int, dict[int, int]]

class ClockReading(TypedDict):  # ns
    wall: int
    steps_begun: int
    slots: list[tuple[int, int, int, int]]  # (phase, total, calls, longest call)
    steps: Histogram
    per_step: list[Histogram]  # by phase
    # (step, duration, begin, by phase, by kind of interruption, slot of the longest call or -1, its duration)
    slowest: list[tuple[int, int, int, list[int], list[int], int, int]]
    interruptions: list[int]  # by kind

class PhaseClock:
    def __init__(self, phases: int, interruptions: int, slowest_kept: int, spans_kept: int, /) -> None: ...
    def add_part(self, phase: int, /) -> int: ...
    def start(self, slot: int, /) -> None: ...
    def stop(self) -> None: ...
    def begin_child(self) -> None: ...
    def end_step(self) -> None: ...
    def pause(self, slot: int, /) -> None: ...
    def resume(self) -> None: ...
    def interrupted(self, kind: int, duration: int, /) -> None: ...
    def wrap(self, slot: int, function: Callable[..., T], /) -> Callable[..., T]: ...
    def items(
        self, slot: int, iterator: Iterator[T], steps: bool, first: Callable[[T], None] | None, /
    ) -> Iterator[T]: ...
    def block(self, slot: int, /) -> AbstractContextManager[None]: ...
    def read(self) -> ClockReading: ...
    def spans(self, steps: int, /) -> list[tuple[int, int, int, int]]: ...  # (slot, step, begin, duration)

def bucket_of(nanoseconds: int, /) -> int: ...
def formulas() -> dict[str, dict[str, Any]]: ...
def keep_freed_memory(keep: bool, /) -> tuple[bool, str]: ...

square_chunk: int
code_block: int

def lay_out_buckets(
    numels: list[int], first_capacity: int, capacity: int, segments: int, flags: int, last_flags: int, /
) -> list[tuple[int, int, list[tuple[int, int]], list[tuple[int, int, int, int]]]]: ...
def gradient_norm(
    param_groups: Groups,
    grad_scale: float,
    max_norm: float,
    clip_value: float,
    rewrite: bool,
    cuda: CudaContext | None,
    /,
) -> float | str | None: ...
def hand_over_gradients(
    param_groups: Groups, rewrite: bool, cuda_device: int, chunk: int, launch: Launch, /
) -> str | None: ...
def release_gradients(param_groups: Groups, /) -> None: ...

class Stepper:
    def __init__(
        self,
        formula: str,
        option_keys: tuple[str, ...],
        refused_keys: tuple[str, ...],
        state_keys: tuple[str, ...],
        code_keys: tuple[str, ...],
        scale_keys: tuple[str, ...],
        step_key: str | None,
        init_state: Callable[[State, dict[str, Any], Tensor], None],
        /,
    ) -> None: ...
    def step(
        self, param_groups: Groups, state: State, grad_scale: float, max_norm: float, clip_value: float, /
    ) -> float | str | None: ...
    def step_if_finite(
        self, param_groups: Groups, state: State, grad_scale: float, max_norm: float, clip_value: float, /
    ) -> float | str: ...
    def step_on_cuda(
        self,
        param_groups: Groups,
        state: State,
        grad_scale: float,
        max_norm: float,
        clip_value: float,
        cuda: CudaContext,
        /,
    ) -> str | None: ...
    def hand_over(
        self, param_groups: Groups, state: State, cuda_device: int, chunk: int, skips: bool, launch: Launch, /
    ) -> str | None: ...
    def check_step(
        self, param_groups: Groups, state: State, by_table: bool, cuda_device: int, capturing: bool, /
    ) -> str: ...
    def check_parameters(self, param_groups: Groups, by_table: bool, on_cuda: bool, device_index: int, /) -> str: ...

# (device index, stream handle), torch's current ones; None for the CPU
Stream: TypeAlias = tuple[int, int] | None

class Packer:
    def __init__(
        self,
        params: tuple[Tensor, ...],
        pieces: Sequence[tuple[int, int, int, int]],
        used_flags: Sequence[Sequence[int]],
        size: int,
        names: Sequence[str],
        /,
    ) -> None: ...
    def ready(self, params: tuple[Tensor, ...], /) -> bool: ...
    def pack(
        self,
        params: tuple[Tensor, ...],
        stream: Stream,
        out: Tensor,
        scale: float,
        aside: Sequence[Tensor | None] | None,
        release: bool,
        /,
    ) -> list[int]: ...
    def assign(self, params: tuple[Tensor, ...], views: Sequence[Tensor], without: Sequence[int], /) -> None: ...

def unpack(flat_in: Tensor, flat_out: Tensor, scale: float, stream: Stream, /) -> None: ...
def sum_pieces(pieces: Tensor, out: Tensor, scale: float, stream: Stream, /) -> None: ...
def squares(values: Sequence[Tensor], places: Sequence[int], partials: Tensor, stream: Stream, /) -> None: ...
def norm_of(partials: Tensor, scale: float, stream: Stream, norm: Tensor | None, factor: Tensor | None, /) -> float: ...

"""Flat memory for gradients: where they lie in buckets, and the kernels that move them. Import it from `lit_fast.ops`.

A bucket has two layouts of the same parameters. Dense, as a flat buffer of parameters has it, and on the wire: cut into
equal segments, one for each rank that keeps a part, each with its flags behind it, so that one collective carries both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lit_fast import _core, flat_by_torch

Piece: TypeAlias = tuple[int, int, int, int]


class BucketLayout(NamedTuple):
    """Where the parameters of one bucket lie. All numbers are elements.

    Attributes:
        segment: dense elements of each of the equal parts.
        stride: wire elements from one segment to the next: its elements, its flags, up to a multiple of 16.
        slots: (index, offset) of each parameter: its place in the order of arrival, and where it begins in the dense
            layout.
        pieces: (slot, param_begin, wire_begin, count) of each run on the wire: a place in `slots`, the run's first
            element in the parameter, and where it begins in the wire layout. In the order of `wire_begin`.
        segments: how many parts there are.
        flags: flags of each parameter in each segment.
    """

    segment: int
    stride: int
    slots: list[tuple[int, int]]
    pieces: list[Piece]
    segments: int
    flags: int

    @property
    def size(self) -> int:
        """Elements on the wire. Without flags the wire layout is the dense one."""
        return self.segments * self.stride

    @property
    def dense_size(self) -> int:
        return self.segments * self.segment

    @property
    def flag_offset(self) -> int:
        """Of a segment's first flag, from where the segment begins on the wire: those of slot 0, then slot 1, ..."""
        return self.segment

    @property
    def last_flag_offset(self) -> int:
        """Of the first of `last_flags`, which the last bucket alone has."""
        return self.segment + self.flags * len(self.slots)

    @property
    def used_flags(self) -> list[list[int]]:
        """Wire places of each slot's flags, in all segments."""
        return [
            [
                rank * self.stride + self.flag_offset + slot * self.flags + k
                for rank in range(self.segments)
                for k in range(self.flags)
            ]
            for slot in range(len(self.slots))
        ]


def lay_out_buckets(
    numels: Sequence[int],
    *,
    first_capacity: int,
    capacity: int,
    segments: int = 1,
    flags: int = 0,
    last_flags: int = 0,
) -> list[BucketLayout]:
    """Distribute parameters over buckets in their order.

    A bucket takes parameters until the next one would end beyond its capacity; one that is larger than that has a
    bucket of its own. No parameter is split over buckets, and each begins at a multiple of 16 elements.

    With several segments each is a multiple of `square_chunk()`, and where a parameter lies over a segment's end it is
    cut at a multiple of that from its own first element: no chunk of the gradients' norm has a part in two segments.
    That costs less than one chunk of padding before each parameter that is cut, and the last segment's rest.

    Args:
        numels: elements of each parameter, in the order in which gradients arrive.
        first_capacity: elements of the first bucket.
        capacity: of each other one.
        segments: equal parts of each bucket, one for each rank that keeps one.
        flags: for each parameter of a bucket, behind each of its segments.
        last_flags: behind each segment of the last bucket, after those.

    Raises:
        KernelError: a capacity or `segments` below 1, or a negative number.

    Example:
        >>> [bucket.slots for bucket in lay_out_buckets([10, 20, 5], first_capacity=16, capacity=64)]
        [[(0, 0)], [(1, 0), (2, 32)]]
    """
    return [
        BucketLayout(*layout, segments, flags)
        for layout in _core.lay_out_buckets(list(numels), first_capacity, capacity, segments, flags, last_flags)
    ]


class Packer:
    """Moves the gradients of one bucket into its flat memory, in one call and, on a GPU, one launch.

    On a GPU that the core was not built for, torch does it with a few launches for each parameter.

    Args:
        params: the bucket's parameters, in the order of `BucketLayout.slots`; their shapes and strides stay.
        pieces: `BucketLayout.pieces`.
        used_flags: `BucketLayout.used_flags`: of each parameter, wire places that tell whether it was used.
        size: `BucketLayout.size`.
        names: of the parameters, for messages.

    Attributes:
        ready: `ready()`: whether every `p.grad` is there.

    Raises:
        KernelError: a parameter is not dense in memory; pieces and flags overlap or leave a parameter's element out.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> [layout] = lay_out_buckets([3], first_capacity=16, capacity=16)
        >>> packer = Packer([weight], layout.pieces, layout.used_flags, layout.size)
        >>> weight.grad = torch.tensor([1.0, 2.0, 3.0])
        >>> flat = torch.empty(layout.size)
        >>> packer.pack(flat, 0.5)
        []
        >>> flat[:4]
        tensor([0.5000, 1.0000, 1.5000, 0.0000])
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        pieces: Sequence[Piece],
        used_flags: Sequence[Sequence[int]],
        size: int,
        names: Sequence[str] = (),
    ) -> None:
        # The core holds numbers alone: what refers to a parameter, Python's garbage collector sees.
        core = _core.Packer(tuple(params), pieces, used_flags, size, names)
        self._params = tuple(params)
        self._pack = partial(core.pack, self._params)
        self._by_torch = partial(flat_by_torch.pack, self._params, pieces, used_flags, names)
        self.ready: Callable[[], bool] = partial(core.ready, self._params)
        self._assign = partial(core.assign, self._params)

    def pack(
        self,
        out: Tensor,
        scale: float,
        aside: Sequence[Tensor | None] | None = None,
        release: bool = True,
    ) -> list[int]:
        """out <- scale * (aside + gradient), rounded to nearest even; everything else in `out` is zeroed.

        The sum is rounded as the gradient is stored, the product is float32, then rounded once as `out` is stored:
        the bits of `p.grad += ...` and of torch's DDP. A parameter with neither has zeros, and its flags are 0;
        all other flags are 1. Whatever else `out` is to carry is written after this call, which leaves no element
        as it was.

        A gradient that lies in `out` at its own place already is scaled there.

        Args:
            out: flat, `size` elements of float32, bfloat16 or float16, on the parameters' device.
            scale: 1, or what gradients are divided by.
            aside: a tensor for each parameter, of its gradient's dtype, shape and strides; or None.
            release: every `p.grad` becomes None.

        Returns:
            The places of parameters that had neither a gradient nor anything set aside.

        Raises:
            KernelError: a gradient is sparse, of another dtype or device, or lies in memory otherwise than its
                parameter. Nothing was written.
        """
        if _lacks_kernels(out):
            return self._by_torch(out, scale, aside, release)
        return self._pack(_stream(out), out, scale, aside, release)

    def assign(self, views: Sequence[Tensor], without: Sequence[int] = ()) -> None:
        """`p.grad = views[i]`, and None for the places in `without`."""
        self._assign(views, without)


def unpack(flat_in: Tensor, flat_out: Tensor, scale: float = 1.0) -> None:
    """flat_out <- scale * flat_in, the product in float32, rounded once to nearest even.

    Args:
        flat_in: contiguous float32, bfloat16 or float16.
        flat_out: the same number of elements, contiguous, any of these dtypes; may be `flat_in` itself.

    Raises:
        KernelError: another size, dtype, layout or device; memory that both share in part.

    Example:
        >>> out = torch.empty(2)
        >>> unpack(torch.tensor([1.0, 3.0], dtype=torch.bfloat16), out, 0.5)
        >>> out
        tensor([0.5000, 1.5000])
    """
    if _lacks_kernels(flat_out):
        return flat_by_torch.unpack(flat_in, flat_out, scale)
    _core.unpack(flat_in, flat_out, scale, _stream(flat_out))


def sum_pieces(pieces: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """out <- scale * (pieces[0] + pieces[1] + ...), summed in float32 in this order, rounded once to nearest even.

    Args:
        pieces: (W, S) float32, bfloat16 or float16: what W ranks sent; each row contiguous.
        out: (S,) contiguous, any of these dtypes.

    Raises:
        KernelError: another shape, dtype or device; shared memory.

    Example:
        >>> out = torch.empty(2)
        >>> sum_pieces(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16), out, 0.5)
        >>> out
        tensor([2., 3.])
    """
    if _lacks_kernels(out):
        return flat_by_torch.sum_pieces(pieces, out, scale)
    _core.sum_pieces(pieces, out, scale, _stream(out))


def squares(values: Sequence[Tensor], places: Sequence[int], partials: Tensor) -> None:
    """partials[places[i] + k] <- the sum of squares of the k-th `square_chunk()` elements of values[i].

    Summed as `gradient_norm` sums: the bits depend on the chunk's elements alone. A part of a parameter that begins at
    a multiple of `square_chunk()` elements therefore gives the partial sums of the whole from there on.

    Args:
        values: float32, bfloat16 or float16, dense in memory.
        places: of the first partial sum of each.
        partials: contiguous float64, beside `values`; everything else in it stays.

    Raises:
        KernelError: another dtype, layout or device; a place outside `partials`. Nothing was written.
    """
    if _lacks_kernels(partials):
        return flat_by_torch.squares(values, places, partials, square_chunk())
    _core.squares(values, places, partials, _stream(partials))


def norm_of(partials: Tensor, grad_scale: float | Tensor = 1.0) -> Tensor:
    """The L2 norm of all gradients times `grad_scale`, from the partial sums of all of them in their order.

    Returns:
        0-dim float32 tensor beside `partials`, with the bits that `gradient_norm` has for the same gradients. Nothing
        waits for a GPU.

    Raises:
        KernelError: `partials` is not contiguous float64.

    Example:
        >>> partials = torch.empty(1, dtype=torch.float64)
        >>> squares([torch.tensor([3.0, 4.0])], [0], partials)
        >>> norm_of(partials)
        tensor(5.)
    """
    if _lacks_kernels(partials):
        return flat_by_torch.norm_of(partials, grad_scale)
    stream = _stream(partials)
    if stream is None:
        norm = _core.norm_of(partials, float(grad_scale), None, None, None)
        return torch.scalar_tensor(norm, dtype=torch.float32)
    on_device = torch.empty((), dtype=torch.float32, device=partials.device)
    factor = grad_scale.to(partials.device, torch.float32) if isinstance(grad_scale, Tensor) else None
    _core.norm_of(partials, 1.0 if isinstance(grad_scale, Tensor) else grad_scale, stream, on_device, factor)
    return on_device


def first_indices(numels: Sequence[int]) -> list[int]:
    """`param_group["first_indices"]` for the parameters of an optimizer, all groups in a row.

    What stochastic rounding draws depends on an element's index among all of the optimizer's elements. A group whose
    `params` are parts of parameters has this list beside them: the whole parameter's first index, and where in it the
    part begins, a multiple of `square_chunk()`. Without it the indices of `params` as they are.

    Example:
        >>> first_indices([100, 300, 1])
        [0, 256, 768]
    """
    firsts, index = [], 0
    for numel in numels:
        firsts.append(index)
        index += -(-numel // _core.code_block) * _core.code_block
    return firsts


def square_chunk() -> int:
    """Elements that one partial sum of the gradients' norm is of (csrc/formulas/norm.h)."""
    return _core.square_chunk


@cache
def _built_for_cuda() -> bool:
    return bool(_core.build_info()["cuda"])


def _lacks_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and not _built_for_cuda()


def _stream(tensor: Tensor) -> tuple[int, int] | None:
    """Torch's current stream there, as the core takes it; None for the CPU."""
    if not tensor.is_cuda:
        return None
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream

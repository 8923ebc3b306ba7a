"""Packing gradients into buckets, and what becomes of them there: the bits of torch's expressions."""

from __future__ import annotations

import gc
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from flat_targets import each_target  # noqa: F401  (the fixture `target`)
from torch import Tensor
from torch.nn import Parameter

from lit_fast import flat, ops
from lit_fast.errors import KernelError

CHUNK = ops.square_chunk()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_only_ops_imports_the_flat_kernels():
    package = Path(ops.__file__).parent
    importers = {path.name for path in package.rglob("*.py") if "from lit_fast.flat" in path.read_text()}
    assert importers == {"ops.py"}


# ---- packing ----


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Ordinary numbers, now and then zeros, denormals, huge and infinite ones and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, 1e-41, -1e-30, 3e38, -6e4, 6e-8, torch.inf, -torch.inf, torch.nan])
    kinds = torch.randint(0, 80, shape, generator=generator)
    return torch.where(kinds < 10, special[kinds.clamp(max=9)], x).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Of every layout in memory that is dense."""
    shapes = [(3, 5), (), (0,), (1,), (7, 1, 3), (33,), (260,), (2, 3, 4, 5), (6, 50)]
    params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    params[-2] = params[-2].to(memory_format=torch.channels_last)
    params[-1] = torch.zeros(50, 6, dtype=dtype).t()
    return [Parameter(p) for p in params]


def like(param: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.empty_like(param, dtype=dtype).copy_(values(*param.shape, seed=seed))


def in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))


def same(a: Tensor, b: Tensor) -> bool:
    """Bits, where they are numbers; a NaN is a NaN."""
    number = ~b.isnan()
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[number].view(integer), b[number].view(integer))


def packer_of(params: list[Parameter], **options: int) -> tuple[ops.Packer, ops.BucketLayout]:
    sizes = {"first_capacity": 1 << 30, "capacity": 1 << 30, "flags": 1}
    [layout] = ops.lay_out_buckets([p.numel() for p in params], **(sizes | options))
    return ops.Packer(params, layout.pieces, layout.used_flags, layout.size), layout


def expected_pack(
    layout: ops.BucketLayout, sums: list[Tensor | None], scale: float, dtype: torch.dtype, last: int = 0
) -> Tensor:
    out = torch.zeros(layout.size, dtype=dtype)
    factor = torch.tensor(scale, dtype=torch.float32)
    for slot, begin, wire, count in layout.pieces:
        if (found := sums[slot]) is not None:
            out[wire : wire + count] = (in_memory_order(found)[begin : begin + count].float() * factor).to(dtype)
    for found, places in zip(sums, layout.used_flags, strict=True):
        out[places] = float(found is not None)
    return out


def poisoned(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), torch.nan, dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3])
@pytest.mark.parametrize("with_aside", [False, True])
def test_pack_has_the_bits_of_torch_for_every_pair_of_dtypes(target, scale, with_aside):
    for given_dtype, wire_dtype in product(DTYPES, DTYPES):
        params = parameters(given_dtype)
        packer, layout = packer_of(params)
        grads = [like(p, given_dtype, seed) for seed, p in enumerate(params)]
        aside = [like(p, given_dtype, 100 + seed) for seed, p in enumerate(params)] if with_aside else None
        sums = grads if aside is None else [a + g for a, g in zip(aside, grads, strict=True)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        assert packer.ready()
        out = poisoned(layout.size, wire_dtype)
        assert packer.pack(out, scale, aside) == []
        assert same(out, expected_pack(layout, sums, scale, wire_dtype))
        assert all(p.grad is None for p in params) and not packer.ready()


def test_pack_is_what_torchs_ddp_does():
    """torch.mul(gradient, 1 / world, out=view of the bucket), where both have one dtype."""
    for dtype in DTYPES:
        param = Parameter(torch.zeros(1000, dtype=dtype))
        packer, layout = packer_of([param], flags=0)
        param.grad = values(1000, dtype=dtype)
        expected = torch.empty(1000, dtype=dtype)
        torch.mul(param.grad, 1 / 3, out=expected)
        out = poisoned(layout.size, dtype)
        packer.pack(out, 1 / 3)
        assert same(out[:1000], expected) and not out[1000:].any()


def test_segments_cut_parameters_and_flags_lie_behind_each(target):
    params = [Parameter(torch.zeros(n)) for n in (CHUNK + 5, 3 * CHUNK + 1, 17, 2 * CHUNK, 0)]
    packer, layout = packer_of(params, segments=3, flags=2, last_flags=4)
    assert len(layout.pieces) > 4
    for seed, p in enumerate(params):
        p.grad = None if seed == 2 else values(p.numel(), seed=seed)
    grads = [p.grad for p in params]
    out = poisoned(layout.size, torch.bfloat16)
    assert not packer.ready()
    assert packer.pack(out, 0.5) == [2]
    assert same(out, expected_pack(layout, grads, 0.5, torch.bfloat16))
    flags = out.view(3, layout.stride)[:, layout.flag_offset : layout.last_flag_offset]
    assert flags.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]] * 3


def test_what_was_set_aside_counts_without_a_gradient_too(target):
    params = [Parameter(torch.zeros(20)) for _ in range(3)]
    packer, layout = packer_of(params)
    aside = [values(20, seed=1), None, values(20, seed=2)]
    params[0].grad = values(20, seed=3)
    sums = [aside[0] + params[0].grad, None, aside[2]]
    out = poisoned(layout.size, torch.float32)
    assert packer.pack(out, 0.5, aside) == [1]
    assert same(out, expected_pack(layout, sums, 0.5, torch.float32))


def test_gradients_may_differ_in_dtype_from_each_other_and_from_their_parameters():
    params = [Parameter(torch.zeros(100, dtype=torch.bfloat16)) for _ in range(3)]
    packer, layout = packer_of(params)
    grads = [values(100, dtype=dtype, seed=i) for i, dtype in enumerate(DTYPES)]
    for p, grad in zip(params, grads, strict=True):
        p.grad_dtype = grad.dtype
        p.grad = grad
    out = poisoned(layout.size, torch.float32)
    packer.pack(out, 1.0)
    assert same(out, expected_pack(layout, grads, 1.0, torch.float32))


def test_gradients_that_lie_in_the_bucket_are_scaled_there(target):
    params = parameters()
    packer, layout = packer_of(params)
    out = torch.zeros(layout.size)
    views = [out[offset:].as_strided(p.shape, p.stride()) for (_, offset), p in zip(layout.slots, params, strict=True)]
    for seed, view in enumerate(views):
        view.copy_(values(*view.shape, seed=seed))
    packer.assign(views)
    before = [view.clone() for view in views]
    assert packer.pack(out, 1 / 3, release=False) == []
    assert same(out, expected_pack(layout, before, 1 / 3, torch.float32))
    assert all(p.grad is not None and p.grad.data_ptr() == v.data_ptr() for p, v in zip(params, views, strict=True))
    fresh = [like(p, torch.float32, 50 + seed) for seed, p in enumerate(params)]  # what was reduced is set aside
    sums = [view + grad for view, grad in zip(views, fresh, strict=True)]
    for p, grad in zip(params, fresh, strict=True):
        p.grad = grad
    packer.pack(out, 1.0, views)
    assert same(out, expected_pack(layout, sums, 1.0, torch.float32))


def test_parameters_of_any_class_have_plain_gradients(target):
    class Named(Parameter):
        pass

    param = Named(torch.zeros(5))
    packer, layout = packer_of([param])
    (param * torch.arange(5.0)).sum().backward()
    out = poisoned(layout.size, torch.float32)
    assert packer.ready() and packer.pack(out, 2.0) == []
    assert out[:5].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_assign_gives_views_and_takes_gradients_away():
    params = [Parameter(torch.zeros(4)) for _ in range(3)]
    packer, layout = packer_of(params)
    memory = torch.arange(layout.size, dtype=torch.float32)
    views = [memory[offset : offset + 4] for _, offset in layout.slots]
    packer.assign(views, [1])
    assert params[1].grad is None
    for i in (0, 2):
        assert params[i].grad.data_ptr() == views[i].data_ptr()
    with pytest.raises(KernelError, match="views"):
        packer.assign(views[:2])


def test_two_threads_and_one_write_the_same_bits(target):
    params = [Parameter(torch.zeros(n)) for n in (3, 100_001, 70_000, 5, 1 << 17)]
    packer, layout = packer_of(params, segments=2)
    grads = [values(p.numel(), seed=seed) for seed, p in enumerate(params)]
    outs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            outs.append(poisoned(layout.size, torch.bfloat16))
            packer.pack(outs[-1], 1 / 3)
    finally:
        torch.set_num_threads(before)
    assert same(*outs) and same(outs[0], expected_pack(layout, grads, 1 / 3, torch.bfloat16))


def test_a_hook_of_the_last_parameter_packs_in_backward():
    first, second = Parameter(torch.ones(40)), Parameter(torch.ones(40))
    packer, layout = packer_of([second, first])
    out, seen = poisoned(layout.size, torch.float32), []

    def hook(_: Tensor) -> None:
        seen.append(packer.ready())
        if seen[-1]:
            packer.pack(out, 0.5)

    for p in (first, second):
        p.register_post_accumulate_grad_hook(hook)
    ((first * 2.0).sum() + (second * 4.0).sum()).backward()
    assert seen == [False, True] and first.grad is None and second.grad is None
    assert out[:40].tolist() == [2.0] * 40 and out[48:88].tolist() == [1.0] * 40


def test_out_counts_as_written():
    param = Parameter(torch.ones(3))
    packer, layout = packer_of([param])
    out = torch.zeros(layout.size)
    version = out._version
    packer.pack(out, 1.0)
    assert out._version > version


def test_a_packer_that_its_parameters_refer_to_is_freed():
    param = Parameter(torch.ones(3))
    packer, _ = packer_of([param])
    param.packer = packer
    gone = weakref.ref(packer)
    del param, packer
    gc.collect()
    assert gone() is None


# ---- what is refused ----


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("grad", "said"),
    [
        (lambda: torch.eye(6, 4).to_sparse(), r"layout is torch.sparse_coo.*sparse=False"),
        (lambda: torch.zeros(4, 6).t(), r"strides \(1, 6\).*parameter does \(shape \(6, 4\), strides \(4, 1\)"),
        (lambda: torch.zeros(6, 8)[:, ::2], r"strides \(8, 2\)"),
        (lambda: torch.zeros(6, 4).as_subclass(Subclass), r"is a .*Subclass, not a plain tensor"),
        (lambda: torch.zeros(6, 4, dtype=torch.complex64).conj().imag, r"negated lazily|strides"),
        (lambda: torch.zeros(6, 4, device="meta"), r"tensors on meta|is not on the CPU"),
    ],
)
def test_gradients_that_no_bucket_takes_are_named(grad, said):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(6, 4))]
    [layout] = ops.lay_out_buckets([3, 24], first_capacity=64, capacity=64)
    packer = ops.Packer(params, layout.pieces, [[], []], layout.size, ["bias", "layer.weight"])
    params[0].grad = torch.ones(3)
    out = torch.full((layout.size,), 7.0)
    wrong = grad()
    with pytest.raises(KernelError, match=r"Parameter 1 of the bucket \(layer.weight\): its .*set aside.*" + said):
        packer.pack(out, 1.0, [None, wrong])
    try:
        params[1].grad = wrong
    except RuntimeError:
        return  # torch itself takes no such gradient
    with pytest.raises(KernelError, match=r"Parameter 1 of the bucket \(layer.weight\): its gradient.*" + said):
        packer.pack(out, 1.0)
    assert (out == 7.0).all() and params[0].grad is not None


def test_what_stands_in_for_kernels_refuses_the_same_gradients(monkeypatch):
    monkeypatch.setattr(flat, "_lacks_kernels", lambda _: True)
    param = Parameter(torch.ones(6, 4))
    [layout] = ops.lay_out_buckets([24], first_capacity=64, capacity=64)
    packer = ops.Packer([param], layout.pieces, layout.used_flags, layout.size, ["weight"])
    for wrong in (torch.eye(6, 4).to_sparse(), torch.zeros(4, 6).t(), torch.zeros(6, 4, device="meta")):
        with pytest.raises(KernelError, match=r"Parameter 0 of the bucket \(weight\)"):
            packer.pack(torch.zeros(layout.size), 1.0, [wrong])


def test_a_gradient_elsewhere_in_the_bucket_is_refused():
    params = [Parameter(torch.ones(16)), Parameter(torch.ones(16))]
    packer, layout = packer_of(params, flags=0)
    out = torch.zeros(layout.size)
    params[0].grad = out[8:24]
    with pytest.raises(KernelError, match="not in its own place"):
        packer.pack(out, 1.0)
    params[0].grad = None
    with pytest.raises(KernelError, match="not in its own place"):
        packer.pack(out, 1.0, [out[:16].view(torch.bfloat16)[:16], None])


def test_float64_and_what_is_not_dense_is_refused():
    param = Parameter(torch.ones(3, dtype=torch.float64))
    packer, layout = packer_of([param])
    param.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(KernelError, match="can be packed"):
        packer.pack(torch.zeros(layout.size), 1.0)
    with pytest.raises(KernelError, match="not dense in memory"):
        packer_of([Parameter(torch.ones(3, 4)[:, ::2])])


def test_memory_of_another_size_dtype_or_kind_is_refused():
    packer, layout = packer_of([Parameter(torch.ones(3))])
    for out in (
        torch.zeros(layout.size + 1),
        torch.zeros(layout.size, dtype=torch.float64),
        torch.zeros(2 * layout.size)[::2],
        torch.zeros(layout.size, device="meta"),
    ):
        with pytest.raises(KernelError, match=r"^out "):
            packer.pack(out, 1.0)


def test_pieces_that_do_not_hold_a_parameter_once_are_refused():
    param = Parameter(torch.ones(4))
    for pieces, flags, size in [
        ([(0, 0, 0, 3)], [[]], 16),
        ([(0, 0, 0, 2), (0, 2, 1, 2)], [[]], 16),
        ([(0, 0, 0, 4)], [[3]], 16),
        ([(0, 0, 0, 4)], [[]], 3),
        ([(0, 2, 0, 2), (0, 0, 2, 2)], [[]], 16),
        ([(1, 0, 0, 4)], [[]], 16),
        ([(0, 0, -4, 4)], [[]], 16),
        ([(0, 0, 0, 4)], [], 16),
    ]:
        with pytest.raises(KernelError):
            ops.Packer([param], pieces, flags, size)


# ---- whole flat ranges ----

LENGTHS = [0, 1, 7, 33, 255, 257, 1000]


@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 3])
def test_unpack_casts_and_scales_with_one_rounding(target, scale):
    for from_dtype, to_dtype, numel in product(DTYPES, DTYPES, LENGTHS):
        flat_in, flat_out = values(numel, dtype=from_dtype), poisoned(numel + 2, to_dtype)
        ops.unpack(flat_in, flat_out[1:-1], scale)
        assert same(flat_out[1:-1], (flat_in.float() * torch.tensor(scale)).to(to_dtype))
        assert flat_out[0].isnan() and flat_out[-1].isnan()


def test_unpack_scales_in_place_and_nowhere_near():
    memory, before = values(100), values(100)
    ops.unpack(memory, memory, 0.5)
    assert same(memory, before * 0.5)
    for wrong in (memory[1:], memory.view(torch.bfloat16)[:99]):
        with pytest.raises(KernelError, match="share memory"):
            ops.unpack(memory[:99], wrong)
    with pytest.raises(KernelError, match="100 elements, and flat_out 3"):
        ops.unpack(memory, torch.zeros(3))
    with pytest.raises(KernelError, match=r"flat_in .*strides"):
        ops.unpack(memory[::2], torch.zeros(50))


def test_threads_share_flat_ranges_without_a_trace(target):
    pieces, seen = values(3, 140_001), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            total, cast = poisoned(140_001, torch.float32), poisoned(140_001, torch.bfloat16)
            ops.sum_pieces(pieces, total, 1 / 3)
            ops.unpack(total, cast)
            seen.append(cast)
    finally:
        torch.set_num_threads(before)
    expected = ((pieces[0] + pieces[1] + pieces[2]) * torch.tensor(1 / 3)).bfloat16()
    assert same(seen[0], expected) and same(seen[1], expected)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_pieces_are_summed_in_the_order_of_ranks_and_rounded_once(target, world):
    for from_dtype, to_dtype, numel in product(DTYPES, DTYPES, LENGTHS):
        pieces = torch.stack([values(numel, dtype=from_dtype, seed=rank) for rank in range(world)])
        total = pieces[0].float()
        for piece in pieces[1:]:
            total = total + piece.float()
        out = poisoned(numel + 2, to_dtype)
        ops.sum_pieces(pieces, out[1:-1], 0.5)
        assert same(out[1:-1], (total * 0.5).to(to_dtype))
        assert out[0].isnan() and out[-1].isnan()


def test_pieces_may_lie_apart_and_not_in_what_they_are_summed_into():
    memory = values(3, 50)
    out = poisoned(20, torch.float32)
    ops.sum_pieces(memory[:, 10:30], out)
    assert same(out, memory[0, 10:30] + memory[1, 10:30] + memory[2, 10:30])
    for pieces in (memory[:, 10:50:2], memory[:, :19], memory[0, :20], memory[:0, :20], memory[:, :20].double()):
        with pytest.raises(KernelError, match="pieces"):
            ops.sum_pieces(pieces, out)
    with pytest.raises(KernelError, match="share memory"):
        ops.sum_pieces(memory[:, :20], memory[1, :20])

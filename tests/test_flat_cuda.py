"""Flat memory on a GPU: the CPU's bits. Without one tests/csrc/test_targets_elsewhere.py runs the same kernels."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lit_fast import flat, ops
from lit_fast.errors import KernelError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CHUNK = ops.square_chunk()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(3, 5), (), (0,), (CHUNK + 5,), (2, 3, 4, 5), (3 * CHUNK + 1,), (33,)]


@pytest.fixture(autouse=True, params=["core", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(flat, "_lacks_kernels", lambda _: True)
    elif not ops.build_info()["cuda"]:
        pytest.skip(f"this build has no CUDA kernels: {ops.build_info()['cuda_reason']}")
    return str(request.param)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(
    device: str, given: torch.dtype, wire: torch.dtype, with_aside: bool, segments: int
) -> tuple[list[int], Tensor]:
    params = [Parameter(torch.zeros(shape, dtype=given, device=device)) for shape in SIZES]
    [layout] = ops.lay_out_buckets(
        [p.numel() for p in params], first_capacity=1 << 40, capacity=1 << 40, segments=segments, flags=1, last_flags=3
    )
    packer = ops.Packer(params, layout.pieces, layout.used_flags, layout.size)
    for seed, p in enumerate(params):
        p.grad = None if seed == 4 else values(*p.shape, seed=seed, dtype=given).to(device)
    aside = [
        None if seed == 6 else values(*p.shape, seed=50 + seed, dtype=given).to(device) for seed, p in enumerate(params)
    ]
    out = torch.full((layout.size,), torch.nan, dtype=wire, device=device)
    missing = packer.pack(out, 1 / 3, aside if with_aside else None)
    assert all(p.grad is None for p in params)
    return missing, out.cpu()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("with_aside", [False, True])
def test_pack_gives_the_cpus_bits(kernels, monkeypatch, with_aside, segments):
    for given, wire in product(DTYPES, DTYPES):
        on_gpu = packed("cuda", given, wire, with_aside, segments)
        with monkeypatch.context() as patch:
            patch.setattr(flat, "_lacks_kernels", lambda _: False)
            on_cpu = packed("cpu", given, wire, with_aside, segments)
        assert on_gpu[0] == on_cpu[0] == ([] if with_aside else [4])
        assert torch.equal(on_gpu[1], on_cpu[1])


def test_unpack_and_sums_give_the_bits_of_torch():
    for given, wire, numel in product(DTYPES, DTYPES, (1, 7, 2048, 70_001)):
        pieces = values(3, numel, seed=numel, dtype=given)
        out = torch.full((numel,), torch.nan, dtype=wire, device="cuda")
        ops.sum_pieces(pieces.cuda(), out, 0.5)
        total = pieces[0].float() + pieces[1].float() + pieces[2].float()
        assert torch.equal(out.cpu(), (total * 0.5).to(wire))
        ops.unpack(pieces[1].cuda(), out, 1 / 3)
        assert torch.equal(out.cpu(), (pieces[1].float() * torch.tensor(1 / 3)).to(wire))


def test_the_norm_of_parts_is_the_norm_of_the_whole(kernels):
    grads = [values(n, seed=n).cuda() for n in (5, 3 * CHUNK + 7, CHUNK, 2 * CHUNK - 1)]
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    parts, places, place = [], [], 0
    for grad in grads:
        for begin in range(0, grad.numel(), 2 * CHUNK):
            parts.append(grad[begin : begin + 2 * CHUNK])
            places.append(place + begin // CHUNK)
        place += -(-grad.numel() // CHUNK)
    partials = torch.full((place,), torch.nan, dtype=torch.float64, device="cuda")
    ops.squares(parts[::-1], places[::-1], partials)
    exact = torch.cat(grads).double().norm()
    for scale in (0.3, torch.tensor(0.3, device="cuda")):
        norm = ops.norm_of(partials, scale)
        assert norm.is_cuda and norm.dtype == torch.float32 and abs(norm.item() / (0.3 * exact.item()) - 1.0) < 2e-7
    if kernels == "core":
        assert torch.equal(ops.norm_of(partials, 0.3), ops.gradient_norm([{"params": params}], 0.3))


def test_one_call_is_one_launch_and_no_wait(kernels):
    if kernels != "core":
        pytest.skip("torch takes several")
    params = [Parameter(torch.zeros(1000, device="cuda")) for _ in range(150)]
    [layout] = ops.lay_out_buckets([1000] * 150, first_capacity=1 << 40, capacity=1 << 40, flags=1)
    packer = ops.Packer(params, layout.pieces, layout.used_flags, layout.size)
    out = torch.zeros(layout.size, device="cuda")
    partials = torch.zeros(150, dtype=torch.float64, device="cuda")
    calls = [
        lambda: packer.pack(out, 0.5, release=False),
        lambda: ops.unpack(out, out, 2.0),
        lambda: ops.sum_pieces(out.view(16, -1), torch.empty(layout.size // 16, device="cuda")),
        lambda: ops.squares([p.grad for p in params], list(range(150)), partials),
        lambda: ops.norm_of(partials),
    ]
    for p in params:
        p.grad = torch.ones(1000, device="cuda")
    for call in calls:
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        kernels_seen = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels_seen) <= 1


def test_a_gradient_on_another_device_is_refused():
    params = [Parameter(torch.zeros(3, device="cuda"))]
    [layout] = ops.lay_out_buckets([3], first_capacity=16, capacity=16)
    packer = ops.Packer(params, layout.pieces, layout.used_flags, layout.size)
    with pytest.raises(KernelError, match="Parameter 0 of the bucket"):
        packer.pack(torch.zeros(layout.size, device="cuda"), 1.0, [torch.zeros(3)])

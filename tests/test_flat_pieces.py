"""What is computed of parameters in pieces: the norm, and steps under stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from flat_targets import each_target  # noqa: F401  (the fixture `target`)
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim import AdamW

CHUNK = ops.square_chunk()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chunks(numel: int) -> int:
    return -(-numel // CHUNK)


def finite(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
@pytest.mark.parametrize("capacity", [10, 3 * CHUNK, 1 << 30])
def test_the_norm_has_the_same_bits_for_any_buckets_and_any_world(target, segments, capacity):
    numels = [5, 3 * CHUNK + 7, 0, CHUNK, 100, 2 * CHUNK - 1]
    params = [Parameter(torch.zeros(n)) for n in numels]
    for seed, p in enumerate(params):
        p.grad = finite(p.numel(), seed=seed)
    first, total = [], 0
    for numel in numels:
        first.append(total)
        total += chunks(numel)
    partials = torch.full((total,), torch.nan, dtype=torch.float64)
    buckets = ops.lay_out_buckets(numels, first_capacity=7, capacity=capacity, segments=segments, flags=1)
    for bucket in buckets:
        members = [params[index] for index, _ in bucket.slots]
        wire = torch.empty(bucket.size)
        ops.Packer(members, bucket.pieces, bucket.used_flags, bucket.size).pack(wire, 1.0, release=False)
        for rank in reversed(range(segments)):  # each sums what it keeps
            mine = [piece for piece in bucket.pieces if piece[2] // bucket.stride == rank]
            places = [first[bucket.slots[slot][0]] + begin // CHUNK for slot, begin, _, _ in mine]
            ops.squares([wire[at : at + count] for _, _, at, count in mine], places, partials)
    norm = ops.norm_of(partials, 0.3)
    assert norm.isfinite()
    assert torch.equal(norm, ops.gradient_norm([{"params": params}], 0.3)) or target == "torch"
    every = [chunk.double().square().sum() for p in params if p.numel() for chunk in p.grad.split(CHUNK)]
    assert torch.equal(partials, torch.stack(every)) or target != "torch"


def test_squares_of_every_dtype_are_those_of_the_norm():
    for dtype in DTYPES:
        param = Parameter(torch.zeros(50, 2000, dtype=dtype).t())
        param.grad = finite(2000, 50, seed=1).to(dtype).t().contiguous().t()
        partials = torch.full((chunks(100_000) + 2,), -1.0, dtype=torch.float64)
        ops.squares([param.grad], [1], partials)
        assert partials[0] == -1.0 and partials[-1] == -1.0
        assert torch.equal(ops.norm_of(partials[1:-1]), ops.gradient_norm([{"params": [param]}]))


def test_a_norm_that_is_not_finite_shows():
    for bad in (torch.nan, torch.inf):
        partials = torch.zeros(1, dtype=torch.float64)
        ops.squares([torch.tensor([1.0, bad])], [0], partials)
        assert not ops.norm_of(partials).isfinite()
    assert ops.norm_of(torch.empty(0, dtype=torch.float64)).item() == 0.0


def test_partial_sums_without_a_place_are_refused():
    partials = torch.zeros(2, dtype=torch.float64)
    for values_, places, into in [
        ([torch.ones(CHUNK + 1)], [1], partials),
        ([torch.ones(3)], [-1], partials),
        ([torch.ones(3)], [0, 1], partials),
        ([torch.ones(3)], [0], partials.float()),
        ([torch.ones(3)], [0], torch.zeros(4, dtype=torch.float64)[::2]),
        ([torch.ones(3).double()], [0], partials),
        ([torch.ones(6)[::2]], [0], partials),
    ]:
        with pytest.raises(KernelError):
            ops.squares(values_, places, into)
    assert not partials.any()
    with pytest.raises(KernelError, match="float64"):
        ops.norm_of(partials.float())


# ---- parts of parameters under stochastic rounding ----


@pytest.mark.parametrize(
    "storage",
    [
        {"rounding": "stochastic"},
        {"rounding": "stochastic", "state_dtype": "8bit"},
        {"state_dtype": "8bit", "master": "remainder"},
        {"master": "float32", "state_dtype": "bfloat16", "rounding": "stochastic"},
    ],
)
def test_two_parts_with_their_first_indices_are_stepped_like_the_whole(storage):
    """As two ranks do, each with an optimizer of its own: only the second one's indices are not those of its list."""
    numels, cut = [300, 3 * CHUNK + 5], 2 * CHUNK
    whole = [Parameter(finite(n, seed=n).bfloat16()) for n in numels]
    parts = [whole[0].detach().clone(), *(part.clone() for part in whole[1].detach().split([cut, numels[1] - cut]))]
    parts = [Parameter(part) for part in parts]
    firsts = ops.first_indices(numels)
    of_whole, of_first, of_second, without = (
        AdamW(params, lr=0.1, seed=7, **storage)
        for params in (whole, parts[:2], parts[2:], [Parameter(parts[2].detach().clone())])
    )
    of_first.param_groups[0]["first_indices"] = firsts
    of_second.param_groups[0]["first_indices"] = [firsts[1] + cut]
    for step in range(3):
        grads = [finite(n, seed=50 * step + i).bfloat16() for i, n in enumerate(numels)]
        of_parts = [grads[0], *grads[1].split([cut, numels[1] - cut])]
        for p, grad in zip(
            [*whole, *parts, *without.param_groups[0]["params"]], [*grads, *of_parts, of_parts[2]], strict=True
        ):
            p.grad = grad
        for optimizer in (of_whole, of_first, of_second, without):
            optimizer.step()
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], torch.cat(parts[1:]))
    if storage.get("master") is None:  # otherwise what is drawn changes the moments alone
        assert not torch.equal(without.param_groups[0]["params"][0], parts[2])


@pytest.mark.parametrize("wrong", [[], (0,), [1], [-256], ["0"]])
def test_first_indices_that_no_parameter_has_are_refused(wrong):
    param = Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1)
    optimizer.param_groups[0]["first_indices"] = wrong
    param.grad = torch.ones(3)
    with pytest.raises((KernelError, OverflowError, TypeError)):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))

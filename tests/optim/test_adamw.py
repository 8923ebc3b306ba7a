from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import SHAPES, assert_same_bits, parameters, set_gradients, train_both
from oracle import adamw_step, assert_within

from lit_fast import ops
from lit_fast.optim import adopt

OPTIONS = {
    "default": {},
    "no decay": {"weight_decay": 0.0},
    "large beta weight": {"betas": (0.3, 0.7)},  # torch's lerp starts from the other end
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "zero lr": {"lr": 0.0},
    "large eps": {"eps": 1.0, "lr": 1e-2},
}
same_capability = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"torch's own bits are known for AVX2 and AVX-512, not {torch.backends.cpu.get_cpu_capability()}",
)


@same_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_bits_equal_torch_fused_over_100_steps(kind, options, dtype):
    reference, adopted = train_both(lambda p: kind(p, **{"lr": 1e-3, **options}, fused=True), dtype=dtype, skip=3)
    assert_same_bits(reference, adopted)


@same_capability
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(300, 401), (70001,), (3,)]
        make = lambda p: torch.optim.AdamW(p, fused=True)  # noqa: E731
        assert_same_bits(*train_both(make, steps=3, shapes=shapes))
    finally:
        torch.set_num_threads(before)


@same_capability
def test_groups_with_their_own_options_equal_torch():
    def make(params):
        return torch.optim.AdamW(
            [{"params": params[:4], "weight_decay": 0.0}, {"params": params[4:], "lr": 0.1, "betas": (0.5, 0.9)}],
            fused=True,
        )

    assert_same_bits(*train_both(make, steps=20))


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_scale", [1.0, 1.0 / 3.0])
def test_one_step_is_within_the_derived_bound(dtype, decoupled, fused, grad_scale):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    [param] = parameters([(1003,)], dtype)
    before = param.detach().clone()
    set_gradients([param], seed=5)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([param], **options, fused=fused)
    exp_avg, exp_avg_sq = torch.randn(1003).to(dtype), torch.rand(1003).to(dtype)
    state = {"step": torch.tensor(6.0), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[param] = state
    adopt(optimizer).step(grad_scale)
    expected = adamw_step(
        before, param.grad, exp_avg, exp_avg_sq, 7, **options, decoupled=decoupled, grad_scale=grad_scale
    )
    assert state["step"].item() == 7.0
    assert_within(param, expected["param"])
    assert_within(state["exp_avg"], expected["exp_avg"])
    assert_within(state["exp_avg_sq"], expected["exp_avg_sq"])


def test_float32_with_bfloat16_moments_is_within_the_bound_of_bfloat16():
    [param] = parameters([(77,)], torch.float32)
    set_gradients([param], seed=5)
    before, optimizer = param.detach().clone(), torch.optim.AdamW([param])
    moments = {"exp_avg": torch.randn(77).bfloat16(), "exp_avg_sq": torch.rand(77).bfloat16()}
    optimizer.state[param] = {"step": torch.tensor(0.0), **{k: v.clone() for k, v in moments.items()}}
    adopted = adopt(optimizer)
    adopted.step()
    assert adopted.compiled
    expected = adamw_step(
        before, param.grad, *moments.values(), 1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
        decoupled=True,
    )  # fmt: skip
    assert_within(param, expected["param"])
    for key in moments:
        assert optimizer.state[param][key].dtype == torch.bfloat16
        assert_within(optimizer.state[param][key], expected[key].stored(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_target_gives_the_same_bits(dtype):
    chosen, results = ops.build_info()["cpu_target"], {}
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38, 1e-30]
    try:
        for target in ops.build_info()["cpu_targets_supported"]:
            ops.use_cpu_target(target)
            params = parameters([(n,) for n in range(71)], dtype)
            for p in params:
                p.data.view(-1)[: len(special)] = torch.tensor(special[: p.numel()]).to(dtype)
            optimizer = torch.optim.Adam(params, lr=0.1, weight_decay=0.1)
            adopted = adopt(optimizer, clip_value=0.7)
            for step in range(3):
                set_gradients(params, seed=step)
                params[-1].grad[:9] = torch.tensor(special).to(dtype)
                adopted.step()
            assert adopted.compiled and target in adopted.reason
            results[target] = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
    finally:
        ops.use_cpu_target(chosen)
    reference = results.pop("scalar")
    assert results, "only the scalar target is supported here"
    for name, tensors in results.items():
        for ours, expected in zip(tensors, reference, strict=True):
            assert torch.equal(ours.isnan(), expected.isnan()), name
            integers = torch.int32 if ours.dtype == torch.float32 else torch.int16
            assert torch.equal(ours.nan_to_num(0.0).view(integers), expected.nan_to_num(0.0).view(integers)), name


@same_capability
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_dense_layout_equals_torch(data):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4), label="shape")
    order = data.draw(st.permutations(range(len(shape))), label="order of dimensions in memory")
    storage = torch.randn([shape[d] for d in order] or ())
    inverse = [order.index(d) for d in range(len(shape))]
    ours = torch.nn.Parameter(storage.clone().permute(inverse))
    theirs = torch.nn.Parameter(storage.clone().permute(inverse).contiguous())
    reference = torch.optim.AdamW([theirs], lr=0.1, fused=True)
    adopted = adopt(torch.optim.AdamW([ours], lr=0.1, fused=True))
    for _ in range(3):
        grad = torch.randn(shape)
        theirs.grad, ours.grad = grad, torch.empty_like(ours).copy_(grad)
        reference.step()
        adopted.step()
    assert adopted.compiled, adopted.reason
    # Only elements of torch's remainder may round differently: they lie elsewhere in the other order.
    assert torch.allclose(ours, theirs, rtol=0, atol=2 * 2.0**-24 * 4)
    assert adopted.optimizer.state[ours]["exp_avg"].stride() == ours.stride()


def test_shapes_cover_what_they_claim():
    assert {0, 1, 2, 7, 8, 9} <= {math.prod(s) for s in SHAPES}

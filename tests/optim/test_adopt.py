from __future__ import annotations

import functools
import gc
import os
import sys
import warnings

import pytest
import torch
from optimizer_cases import assert_same_bits, parameters, set_gradients, train_both
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lit_fast import ops
from lit_fast.errors import MisconfigurationException
from lit_fast.optim import adopt

SHAPES = ((5, 3), (7,))


def make_params(seed: int = 0) -> list[Parameter]:
    params = parameters(SHAPES, torch.float32, seed)
    set_gradients(params, seed=seed + 100)
    return params


# ---- who steps, and why ----


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_known_classes_are_compiled(kind):
    adopted = adopt(kind(make_params(), lr=0.1))
    assert adopted.compiled
    assert adopted.reason.startswith(f"{kind.__name__}: compiled step (")
    assert repr(adopted) == f"AdoptedOptimizer({kind.__name__}: {adopted.reason})"


class Renamed(torch.optim.AdamW):
    pass


class OwnStep(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class OwnGroup(torch.optim.SGD):
    def _init_group(self, *args):
        return super()._init_group(*args)


def test_a_subclass_that_changes_nothing_is_compiled():
    assert adopt(Renamed(make_params())).compiled


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (torch.optim.Adamax, "Adamax has no compiled kernel"),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "option differentiable has no compiled kernel"),
        (OwnStep, "its step is not torch.optim.AdamW's"),
        (lambda p: OwnGroup(p, lr=0.1), "its _init_group is not torch.optim.SGD's"),
        (
            lambda p: torch.optim.SGD([Parameter(x.detach().double()) for x in p], lr=0.1),
            "neither float32, bfloat16 nor float16",
        ),
        (lambda p: torch.optim.SGD([Parameter(torch.zeros(2, device="meta"))], lr=0.1), "device meta"),
    ],
)
def test_whatever_has_no_kernel_runs_its_own_step_and_says_why(make, why):
    adopted = adopt(make(make_params()))
    assert not adopted.compiled
    assert ": its own step, because " in adopted.reason and why in adopted.reason


@pytest.mark.parametrize("clipping", [{}, {"max_norm": 0.5}, {"clip_value": 0.1}])
def test_its_own_step_clips_and_steps_as_by_hand(clipping):
    ours, theirs = make_params(), make_params()
    reference, adopted = torch.optim.Adamax(theirs), adopt(torch.optim.Adamax(ours), **clipping)
    norm = adopted.step()
    expected = None
    if "max_norm" in clipping:
        expected = clip_grad_norm_(theirs, 0.5)
    if "clip_value" in clipping:
        clip_grad_value_(theirs, 0.1)
    reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert norm == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, None), "max_norm=0.0"),
        ((float("nan"), None), "max_norm=nan"),
        ((None, -1.0), "clip_value=-1.0"),
        (("1.0", None), "max_norm='1.0'"),
        ((None, [1.0]), r"clip_value=\[1.0\]"),
        ((1.0, 1.0), "by norm or by value"),
    ],
)
def test_wrong_limits_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        adopt(torch.optim.SGD(make_params(), lr=0.1), *arguments)


def test_an_optimizer_that_needs_a_closure_says_so():
    params = make_params()
    adopted = adopt(torch.optim.LBFGS(params))
    with pytest.raises(MisconfigurationException, match=r"call optimizer\.step\(closure\) itself"):
        adopted.step()


def test_only_optimizers_are_adopted():
    with pytest.raises(MisconfigurationException, match="adopt got a list"):
        adopt([])


def test_a_step_replaced_on_the_instance_is_called():
    optimizer = torch.optim.SGD(make_params(), lr=0.1)
    adopted, calls = adopt(optimizer), []
    adopted.step()
    own = optimizer.step

    @functools.wraps(own)
    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    optimizer.step = counting
    adopted.step()
    assert calls == [1]
    assert not adopted.compiled and "its step is not torch.optim.SGD's" in adopted.reason
    del optimizer.step
    adopted.step()
    assert calls == [1] and adopted.compiled


# ---- clipping and scaling ----


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_norm_agrees_with_torch(max_norm):
    ours, theirs = make_params(), make_params()
    reference, adopted = torch.optim.SGD(theirs, lr=1.0), adopt(torch.optim.SGD(ours, lr=1.0), max_norm=max_norm)
    before = [p.grad.clone() for p in ours]
    norm, expected = adopted.step(), clip_grad_norm_(theirs, max_norm)
    reference.step()
    assert norm.shape == () and norm.dtype == torch.float32
    exact = torch.cat([g.double().flatten() for g in before]).norm()
    assert abs(norm.item() / exact.item() - 1.0) <= 1e-7
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 2.0**-24 * abs(a).max().item() + 1e-7 * expected.item())
    assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True)), "gradients were rewritten"


def test_clipping_by_value_gives_torchs_bits_and_keeps_nan():
    ours, theirs = make_params(), make_params()
    for params in (ours, theirs):
        params[0].grad[0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    clip_grad_value_(theirs, 0.2)
    torch.optim.SGD(theirs, lr=0.1).step()
    adopt(torch.optim.SGD(ours, lr=0.1), clip_value=0.2).step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_norm_poisons_the_step_as_in_torch(bad):
    ours, theirs = make_params(), make_params()
    for params in (ours, theirs):
        params[1].grad[2] = bad
    clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1).step()
    norm = adopt(torch.optim.SGD(ours, lr=0.1), max_norm=1.0).step()
    assert not bool(norm.isfinite())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_grad_scale_comes_before_the_norm():
    params = make_params()
    exact = torch.cat([p.grad.double().flatten() for p in params]).norm()
    norm = adopt(torch.optim.SGD(params, lr=0.1), max_norm=1e-3).step(grad_scale=0.25)
    assert abs(norm.item() / (0.25 * exact.item()) - 1.0) <= 1e-7


def test_clip_gradients_rewrites_them_once():
    params = make_params()
    adopted = adopt(torch.optim.SGD(params, lr=1.0), max_norm=0.5)
    before = [p.detach().clone() for p in params]
    norm = adopted.clip_gradients()
    assert norm.item() > 0.5
    assert abs(ops.gradient_norm(adopted.optimizer.param_groups).item() - 0.5) < 1e-5
    assert adopted.step(clip=False) is None
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b - p.grad)


# ---- hooks, schedulers, closures ----


def test_hooks_fire_in_torchs_order_and_see_clipped_gradients():
    log = []

    def record(name):
        return lambda optimizer, args, kwargs: log.append(
            (name, type(optimizer), len(args), dict(kwargs), ops.gradient_norm(optimizer.param_groups).item())
        )

    def run(with_adopt):
        log.clear()
        params = make_params()
        optimizer = torch.optim.SGD(params, lr=0.1)
        handles = [
            register_optimizer_step_pre_hook(record("global pre")),
            register_optimizer_step_post_hook(record("global post")),
        ]
        optimizer.register_step_pre_hook(record("pre"))
        optimizer.register_step_post_hook(record("post"))
        try:
            if with_adopt:
                adopted = adopt(optimizer, max_norm=0.5)
                adopted.step()
                assert adopted.compiled
            else:
                clip_grad_norm_(params, 0.5)
                optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        return list(log)

    expected, actual = run(False), run(True)
    assert [e[:4] for e in actual] == [e[:4] for e in expected]
    assert [e[0] for e in actual] == ["global pre", "pre", "post", "global post"]
    for entry in actual:
        assert abs(entry[4] - 0.5) < 1e-5


def test_a_pre_hook_may_pass_a_closure():
    params = make_params()
    optimizer, calls = torch.optim.SGD(params, lr=0.1), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: calls.append(1)}))
    adopt(optimizer).step()
    assert calls == [1]


def test_a_pre_hook_that_returns_nonsense_is_an_error():
    optimizer = torch.optim.SGD(make_params(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="returned 3"):
        adopt(optimizer).step()


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_see_the_step_and_their_lr_is_used(before):
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=1.0)
    if before:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        adopted = adopt(optimizer)
    else:
        adopted = adopt(optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            start = [p.detach().clone() for p in params]
            adopted.step()
            scheduler.step()
            for p, s in zip(params, start, strict=True):
                torch.testing.assert_close(p.detach(), s - 0.5**step * p.grad, rtol=1e-6, atol=1e-7)
    assert adopted.compiled, adopted.reason


def test_torch_profiler_shows_the_step():
    adopted = adopt(torch.optim.SGD(make_params(), lr=0.1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        adopted.step()
    assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())


# ---- options and tensors are read anew at every step ----


def test_options_tensors_groups_and_parameters_are_read_anew():
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    adopted = adopt(optimizer)
    adopted.step()

    def moves(p, lr):
        before = p.detach().clone()
        adopted.step()
        torch.testing.assert_close(p.detach(), before - lr * p.grad, rtol=1e-6, atol=1e-7)

    optimizer.param_groups[0]["lr"] = 0.5
    moves(params[0], 0.5)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    moves(params[0], 0.25)
    params[0].data = torch.randn(9, 9)
    params[0].grad = torch.randn(9, 9)
    moves(params[0], 0.25)
    extra = make_params(7)
    optimizer.add_param_group({"params": extra, "lr": 2.0})
    moves(extra[1], 2.0)
    replacement = make_params(8)[0]
    optimizer.param_groups[1]["params"][0] = replacement
    moves(replacement, 2.0)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    before = params[1].detach().clone()
    adopted.step()
    torch.testing.assert_close(params[1].detach(), before - 0.25 * (params[1].grad + 0.5 * before))
    assert adopted.compiled


def test_missing_gradients_are_skipped():
    params = make_params()
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer = torch.optim.AdamW(params)
    adopted = adopt(optimizer, max_norm=1.0)
    norm = adopted.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    assert abs(norm.item() / params[1].grad.norm().item() - 1) < 1e-6
    params[1].grad = None
    assert adopted.step().item() == 0.0 and optimizer.state[params[1]]["step"].item() == 1.0


def test_state_dict_is_torchs_own_and_loads_both_ways():
    make = lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)  # noqa: E731
    reference, adopted = train_both(make, steps=5)
    saved, expected = adopted.optimizer.state_dict(), reference.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    swapped = train_both(make, steps=1)
    swapped[0].load_state_dict(saved)
    swapped[1].optimizer.load_state_dict(expected)
    for optimizer, step in ((swapped[0], swapped[0].step), (swapped[1].optimizer, swapped[1].step)):
        set_gradients([p for g in optimizer.param_groups for p in g["params"]], seed=3)
        step()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert_same_bits(*swapped)
    assert swapped[1].compiled


def test_zero_grad_releases_every_gradient():
    params = make_params()
    adopted = adopt(torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]))
    adopted.zero_grad()
    assert all(p.grad is None for p in params)

    class OwnZero(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            self.called = set_to_none

    optimizer = OwnZero(make_params(), lr=0.1)
    adopt(optimizer).zero_grad()
    assert optimizer.called is True


# ---- what the core refuses: torch's own step runs, nothing is half done ----


def refused(make, prepare, why):
    ours, theirs = make_params(), make_params()
    reference, adopted = make(theirs), adopt(make(ours))
    assert adopted.compiled
    prepare(theirs, reference)
    prepare(ours, adopted.optimizer)
    with pytest.warns(UserWarning, match=why):
        adopted.step()
    reference.step()
    assert not adopted.compiled and why in adopted.reason
    assert_same_bits(reference, adopted)


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)


def test_shared_memory_is_refused_and_a_first_step_stays_one():
    def share(params, optimizer):
        params[1].data = params[0].data.view(-1)[:7]

    refused(momentum, share, "share memory")


def test_a_gradient_of_another_layout_is_refused():
    def transpose(params, optimizer):
        params[0].grad = params[0].grad.t().contiguous().t()

    refused(momentum, transpose, "differ in shape or strides")


def test_a_sparse_gradient_is_refused():
    def sparse(params, optimizer):
        params[1].grad = params[1].grad.to_sparse()

    refused(lambda p: torch.optim.SGD(p, lr=0.1), sparse, "a gradient cannot be read: its layout is torch.sparse_coo")


def test_an_option_without_kernel_that_is_set_later_is_refused():
    def differentiable(params, optimizer):
        optimizer.param_groups[0]["differentiable"] = True

    with torch.no_grad():
        refused(torch.optim.AdamW, differentiable, "option differentiable")


def test_refused_gradients_are_clipped_by_torch_before_hooks_see_them():
    ours, theirs, seen = make_params(), make_params(), []
    for params in (ours, theirs):
        params[0].grad = params[0].grad.as_subclass(Subclass)
    optimizer = torch.optim.SGD(ours, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in ours]).norm().item()))
    adopted = adopt(optimizer, max_norm=0.5)
    with pytest.warns(UserWarning, match="clip_gradients_"):
        norm = adopted.step()
    assert norm == clip_grad_norm_(theirs, 0.5)
    torch.optim.SGD(theirs, lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(seen) == 1 and abs(seen[0] - 0.5) < 1e-5


def test_an_empty_first_group_is_no_obstacle():
    optimizer = torch.optim.SGD([{"params": []}, {"params": make_params()}], lr=0.1)
    adopted = adopt(optimizer, max_norm=1.0)
    assert adopted.step().item() > 0 and adopted.compiled


def test_a_lazily_negated_gradient_is_refused():
    def negate(params, optimizer):
        params[0].grad = torch._neg_view(params[0].grad)

    refused(lambda p: torch.optim.SGD(p, lr=0.1), negate, "negated lazily")


class Subclass(torch.Tensor):
    pass


def test_a_tensor_subclass_is_refused():
    def subclass(params, optimizer):
        params[0].grad = params[0].grad.as_subclass(Subclass)

    refused(lambda p: torch.optim.SGD(p, lr=0.1), subclass, "not a plain tensor")


def test_a_parameter_twice_in_a_group_is_refused():
    params = make_params()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([*params, params[0]], lr=0.1)
    with pytest.warns(UserWarning, match="share memory"):
        adopt(optimizer).step()


# ---- safety ----


def test_autograd_catches_a_backward_through_stepped_parameters():
    weight = Parameter(torch.randn(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    adopted = adopt(torch.optim.AdamW([weight]))
    versions = weight._version
    adopted.step()
    assert weight._version > versions
    moment = adopted.optimizer.state[weight]["exp_avg"]
    versions = moment._version
    adopted.step()
    assert moment._version > versions and adopted.optimizer.state[weight]["step"]._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_leaks():
    params = make_params()
    adopted = adopt(torch.optim.AdamW(params), max_norm=1.0)
    adopted.step()
    optimizer = adopted.optimizer
    watched = [*params, *[p.grad for p in params], optimizer.state, optimizer.param_groups]
    watched += [v for p in params for v in optimizer.state[p].values()]
    counts = [sys.getrefcount(o) for o in watched]
    nones = sys.getrefcount(None)
    for _ in range(10_000):
        adopted.step()
    gc.collect()
    assert sys.getrefcount(None) - nones < 5_000
    for before, after in zip(counts, [sys.getrefcount(o) for o in watched], strict=True):
        assert after == before
    with pytest.warns(UserWarning), torch.no_grad():  # refusals release what they held too
        optimizer.param_groups[0]["differentiable"] = True
        adopted.step()
    assert [sys.getrefcount(p) for p in params] == counts[: len(params)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_steps_on_one_thread():
    """OpenMP's threads do not survive a fork: a parallel region in the child would wait for them for ever."""
    params = parameters([(300_000,)], torch.float32)
    set_gradients(params, seed=0)
    adopted = adopt(torch.optim.AdamW(params), max_norm=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        adopted.step()
        child = os.fork()
        if child == 0:
            adopted.step()
            os._exit(0 if "forked" in ops.build_info()["threads"] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


def test_reading_tensors_through_python_attributes_gives_the_same_bits():
    """The path for torch versions without DLPack's C exchange."""
    make = lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)  # noqa: E731
    ops.connect(use_exchange_api=False)
    try:
        assert ops.build_info()["tensor_access"] == "Python attributes"
        reference, adopted = train_both(make, steps=10, max_norm=1e9)
        transposed = Parameter(torch.randn(4, 3).t())
        transposed.grad = torch.randn(3, 4)
        mismatched = adopt(torch.optim.SGD([transposed], lr=0.1))
        with pytest.warns(UserWarning, match="strides"):
            mismatched.step()
    finally:
        ops.connect()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert_same_bits(reference, adopted)

"""States go from `lit_fast.optim` to `torch.optim` and back, and training goes on with the same bits."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import parameters, set_gradients, tensors_of
from oracle import adagrad_step, assert_within, rmsprop_step, sgd_step
from test_adamw import same_capability
from torch.nn import Parameter

from lit_fast.optim import SGD, Adagrad, Adam, AdamW, RMSprop, adopt

SHAPES = ((5, 3), (257,), (32, 8))
PAIRS = {
    "AdamW": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW amsgrad": (AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    "Adam": (Adam, torch.optim.Adam, {"weight_decay": 0.1}),
    "SGD": (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adagrad": (Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.01}),
}


def copies(params):
    return [Parameter(p.detach().clone()) for p in params]


def train(optimizer, begin, end):
    params = optimizer.param_groups[0]["params"]
    for step in range(begin, end):
        set_gradients(params, seed=step)
        optimizer.step()


def assert_equal(ours, theirs):
    first, second = tensors_of(ours), tensors_of(theirs)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


# torch's SGD rounds bfloat16 after each operation.
IN_BFLOAT16 = [name for name in PAIRS if name.startswith("Adam")]


@same_capability
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in PAIRS), *((name, torch.bfloat16) for name in IN_BFLOAT16)],
)
def test_a_state_goes_to_torch_and_back_with_the_same_bits(name, dtype):
    ours, theirs, options = PAIRS[name]
    fused = {"fused": True}
    optimizer = ours(parameters(SHAPES, dtype), lr=1e-2, **options)
    train(optimizer, 0, 3)
    params = copies(optimizer.param_groups[0]["params"])
    reference = theirs(params, lr=1e-2, **options, **({} if ours is SGD else fused))
    reference.load_state_dict(optimizer.state_dict())
    if ours is not SGD:
        reference.param_groups[0].update(fused)  # loading put ours there, which has none
    for entry in reference.state.values():
        if "step" in entry:
            entry["step"] = entry["step"].clone()  # torch takes the very tensor that it is given
        for name in entry.keys() - {"step"}:
            entry[name] = entry[name].clone()
    train(reference, 3, 6)
    train(optimizer, 3, 6)
    assert_equal(optimizer, reference)
    again = ours(copies(reference.param_groups[0]["params"]), lr=0.5)
    again.load_state_dict(reference.state_dict())
    assert again.param_groups[0]["lr"] == 1e-2
    train(again, 6, 8)
    train(optimizer, 6, 8)
    assert_equal(again, optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_goes_to_torch_where_the_next_step_is_within_the_same_bound(centered, momentum):
    """torch takes another root (see docs/differences.md), so bits differ; the bound is that of any float32 step."""
    options = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-8, "momentum": momentum}
    optimizer = RMSprop(parameters(((257,),), torch.float32), centered=centered, **options)
    train(optimizer, 0, 3)
    [param] = optimizer.param_groups[0]["params"]
    before, [copied] = param.detach().clone(), copies([param])
    reference = torch.optim.RMSprop([copied], centered=centered, **options)
    reference.load_state_dict(optimizer.state_dict())
    moments = {k: v.clone() for k, v in optimizer.state[param].items() if k != "step"}
    reference.state[copied] = {k: v.clone() for k, v in reference.state[copied].items()}
    assert reference.state[copied].keys() == optimizer.state[param].keys()
    train(optimizer, 3, 4)
    train(reference, 3, 4)
    expected = rmsprop_step(before, param.grad, **moments, **options)
    for each, stepped in ((param, optimizer), (copied, reference)):
        assert_within(each, expected["param"])
        for name in moments:
            assert_within(stepped.state[each][name], expected[name])


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_adopted_steps_round_once_whatever_torchs_own_do(dtype, fused):
    """The examples of docs/optimizers.md: torch 2.13's fused steps on the CPU take other ones."""
    begin = torch.zeros(17, dtype=dtype)
    weight = Parameter(begin.clone())
    weight.grad = torch.arange(1, 18).to(dtype)
    sgd = adopt(torch.optim.SGD([weight], lr=1.0, momentum=0.5, fused=fused))
    sgd.step()
    assert sgd.compiled and torch.equal(weight, -weight.grad)
    sgd.step()
    assert torch.equal(weight, -2.5 * weight.grad)
    assert torch.equal(sgd.optimizer.state[weight]["momentum_buffer"], 1.5 * weight.grad)

    weight = Parameter(torch.full((17,), 0.1, dtype=dtype))
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    adagrad = adopt(torch.optim.Adagrad([weight], lr=0.1, fused=fused))
    adagrad.step()
    assert adagrad.compiled and bool((weight == (before.double() - 0.1).to(dtype)).all())


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_adopted_sgd_and_adagrad_are_within_the_derived_bound(dtype, fused):
    [weight] = parameters(((1003,),), dtype)
    before, buffer, total = weight.detach().clone(), torch.randn(1003).to(dtype), torch.rand(1003).to(dtype)
    set_gradients([weight], seed=5)
    options = {"lr": 0.1, "weight_decay": 0.1}
    sgd = torch.optim.SGD([weight], momentum=0.9, nesterov=True, fused=fused, **options)
    sgd.state[weight]["momentum_buffer"] = buffer.clone()
    adopt(sgd).step()
    expected = sgd_step(before, weight.grad, buffer, momentum=0.9, nesterov=True, **options)
    assert_within(weight, expected["param"])
    assert_within(sgd.state[weight]["momentum_buffer"], expected["momentum_buffer"])

    weight.data.copy_(before)
    adagrad = torch.optim.Adagrad([weight], fused=fused, **options)
    adagrad.state[weight]["sum"] = total.clone()
    adopt(adagrad).step()
    expected = adagrad_step(before, weight.grad, total, 1, eps=1e-10, **options)
    assert_within(weight, expected["param"])
    assert_within(adagrad.state[weight]["sum"], expected["sum"])

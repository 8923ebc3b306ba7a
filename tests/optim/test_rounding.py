"""Stochastic rounding: unbiased, and a function of (seed, step, element) whatever runs it, when and where."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random

import pytest
import torch
from optimizer_cases import parameters, set_gradients, tensors_of
from storage_cases import KINDS, storages
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim import SGD, AdamW
from lit_fast.optim.codes import decode

DRAWS = 1_000_000
BF16 = torch.bfloat16


def assert_unbiased(stored: Tensor, value: float, low: float, high: float, bias: float = 0.0) -> None:
    """Draws of the two neighbours `low` and `high` of a value: their mean is it, within 4 standard deviations."""
    stored = stored.double()
    assert bool(((stored == low) | (stored == high)).all())
    share = (value - low) / (high - low)
    deviation = (high - low) * math.sqrt(share * (1.0 - share) / stored.numel())
    assert abs(stored.mean().item() - value) <= 4.0 * deviation + bias * (high - low)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parameters_are_rounded_without_bias(share, sign):
    param = Parameter(torch.full((DRAWS,), sign, dtype=BF16))
    step = torch.tensor(share * 2.0**-7).to(BF16).item()
    param.grad = torch.full((DRAWS,), -sign * step, dtype=BF16)
    SGD([param], lr=1.0, rounding="stochastic", seed=5).step()
    assert_unbiased(sign * param.detach(), 1.0 + step, 1.0, 1.0 + 2.0**-7)


def moments_of_one_step(**storage) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All moments of AdamW after a step on 1e6 equal gradients, and their value in float32; each block's first
    element is larger: it sets the scale of codes."""
    grad = torch.full((DRAWS,), 0.337)
    grad[::256] = 1.0
    results = []
    for options in (storage, {}):
        param = Parameter(torch.zeros(DRAWS))
        param.grad = grad
        optimizer = AdamW([param], amsgrad=True, seed=3, **options)
        optimizer.step()
        results.append(optimizer.state[param])
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    keep = torch.arange(DRAWS) % 256 != 0
    ours, exact = results
    if "exp_avg_codes" in ours:
        ours = {name: decode(ours[f"{name}_codes"], ours[f"{name}_scale"], name == "exp_avg") for name in names}
    return {name: ours[name][keep] for name in names}, {name: exact[name][1].item() for name in names}


def test_moments_in_bfloat16_are_rounded_without_bias():
    stored, values = moments_of_one_step(state_dtype="bfloat16", rounding="stochastic")
    for name, value in values.items():
        unit = 2.0 ** (math.floor(math.log2(value)) - 7)
        low = math.floor(value / unit) * unit
        assert_unbiased(stored[name], value, low, low + unit)


def test_codes_are_rounded_with_a_bias_of_2_to_the_minus_16_of_a_code_at_most():
    stored, values = moments_of_one_step(state_dtype="8bit")
    for name, value in values.items():
        low, high = stored[name].min().item(), stored[name].max().item()
        assert low < value < high and high - low <= value / 8 * 1.001
        assert_unbiased(stored[name], value, low, high, bias=2.0**-16)


def test_the_bits_of_a_parameter_and_its_moments_are_uncorrelated():
    param = Parameter(torch.ones(DRAWS, dtype=BF16))
    param.grad = torch.full((DRAWS,), 0.337, dtype=BF16)
    optimizer = AdamW([param], lr=2.0**-9, weight_decay=0.0, amsgrad=True, rounding="stochastic")
    optimizer.step()
    entry = optimizer.state[param]
    drawn = torch.stack([t.detach().double() for t in (param, entry["exp_avg"], entry["exp_avg_sq"])])
    assert all(len(row.unique()) == 2 for row in drawn)
    correlation = torch.corrcoef(drawn)[torch.triu_indices(3, 3, 1).unbind()]
    assert bool((correlation.abs() <= 4.0 / math.sqrt(DRAWS)).all())


# ---- the same bits ----

SHAPES = ((300, 401), (70001,), (3,))


def trained(kind, storage, *, steps=2, shapes=SHAPES, dtype=BF16, seed=9, skip=None):
    params = parameters(shapes, dtype)
    optimizer = kind(params, lr=1e-2, seed=seed, **storage, **({"momentum": 0.9} if kind is SGD else {}))
    go_on(optimizer, 0, steps, skip)
    return optimizer


def go_on(optimizer, begin, end, skip=None):
    params = optimizer.param_groups[0]["params"]
    for step in range(begin, end):
        set_gradients(params, seed=step)
        if skip is not None and step == 0:
            params[skip].grad = None
        optimizer.step()


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    first, second = ({k: v for k, v in named.items() if isinstance(v, Tensor)} for named in (first, second))
    assert first.keys() == second.keys()
    return all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize(
    "storage",
    [
        {"rounding": "stochastic"},
        {"state_dtype": "8bit", "rounding": "stochastic"},
        {"state_dtype": "8bit", "master": "remainder"},
        {"state_dtype": "float32", "master": "float32"},
    ],
)
def test_any_number_of_threads_gives_the_same_bits(kind, storage):
    torch.set_num_threads(1)
    reference = trained(kind, storage)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(trained(kind, storage), reference)


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save({"model": optimizer.param_groups[0]["params"], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    made = type(optimizer)([Parameter(p.detach().clone()) for p in loaded["model"]])
    made.load_state_dict(loaded["optimizer"])
    return made


@pytest.mark.parametrize("again", [saved_and_loaded, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_or_copied_goes_on_with_the_same_bits(kind, again):
    for dtype in (torch.float32, BF16, torch.float16):
        for storage in storages(kind, dtype):
            optimizer = trained(kind, storage, shapes=((5, 3), (300,)), dtype=dtype)
            other = again(optimizer)
            assert same(optimizer, other)
            go_on(optimizer, 2, 4)
            go_on(other, 2, 4)
            assert same(optimizer, other), storage
            assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("storage", [{"rounding": "stochastic"}, {"state_dtype": "8bit"}])
def test_another_seed_gives_other_bits(storage):
    assert same(trained(AdamW, storage), trained(AdamW, storage))
    assert not same(trained(AdamW, storage), trained(AdamW, storage, seed=10))


@pytest.mark.parametrize("storage", [{"rounding": "stochastic"}, {"state_dtype": "8bit"}])
def test_a_parameter_without_a_gradient_shifts_nobodys_bits(storage):
    with_all, without = trained(AdamW, storage, steps=1), trained(AdamW, storage, steps=1, skip=0)
    first, second = tensors_of(with_all), tensors_of(without)
    assert not torch.equal(first["0"], second["0"])
    for name in (name for name in second if not name.startswith("0")):
        assert isinstance(second[name], str) or torch.equal(first[name], second[name]), name


def test_parameters_have_bits_of_their_own():
    """The same numbers in two parameters round differently: the index counts all elements of the optimizer."""
    params = [Parameter(torch.ones(4096, dtype=BF16)) for _ in range(2)]
    for param in params:
        param.grad = torch.full((4096,), 2.0**-9, dtype=BF16)  # halfway to the next number
    draw = random.Random(0)
    SGD(params, lr=1.0, rounding="stochastic", seed=draw.randrange(2**63)).step()
    assert not torch.equal(*params)

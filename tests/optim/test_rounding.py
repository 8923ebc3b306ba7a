"""Stochastic rounding: unbiased, and a function of (seed, step, element) whatever runs it, when and where."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from typing import Any

import pytest
import torch
from optimizer_cases import parameters, set_gradients, tensors_of
from storage_cases import CODED, KINDS, storages
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim import SGD, Adam, AdamW, RMSprop, adopt
from lit_fast.optim.codes import UNSIGNED, decode

DRAWS = 1_000_000
BF16 = torch.bfloat16


def assert_unbiased(stored: Tensor, value: float, low: float, high: float) -> None:
    """Draws of the two neighbours `low` and `high` of a value: their mean is it, within 4 standard deviations."""
    stored = stored.double()
    assert bool(((stored == low) | (stored == high)).all())
    share = (value - low) / (high - low)
    deviation = (high - low) * math.sqrt(share * (1.0 - share) / stored.numel())
    assert abs(stored.mean().item() - value) <= 4.0 * deviation


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parameters_are_rounded_without_bias(share, sign):
    param = Parameter(torch.full((DRAWS,), sign, dtype=BF16))
    step = torch.tensor(share * 2.0**-7).to(BF16).item()
    param.grad = torch.full((DRAWS,), -sign * step, dtype=BF16)
    SGD([param], lr=1.0, rounding="stochastic", seed=5).step()
    assert_unbiased(sign * param.detach(), 1.0 + step, 1.0, 1.0 + 2.0**-7)


def with_all_moments(kind: type) -> dict[str, Any]:
    """Options with which a parameter has every moment that may be rounded."""
    if kind in (AdamW, Adam):
        return {"amsgrad": True}
    return {"momentum": 0.9, "weight_decay": 0.01} if kind in (SGD, RMSprop) else {}


def one_step(kind: type, sign: float, **storage: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameter and moments after a step of 1e6 elements alike, and their value in float32.

    Each block's first element is larger and left out: it sets the scale of codes.
    """
    grad = torch.full((DRAWS,), sign * 0.337).to(BF16)
    grad[::256] = sign
    results = []
    for dtype, options in ((BF16, storage), (torch.float32, {})):
        param = Parameter(torch.ones(DRAWS, dtype=dtype))
        param.grad = grad.to(dtype)
        optimizer = kind([param], lr=0.011, seed=3, **with_all_moments(kind), **options)
        optimizer.step()
        results.append({"param": param.detach(), **optimizer.state[param]})
    names = ["param", *(name for name in kind.mapping.state_keys if name in results[1])]
    keep = torch.arange(DRAWS) % 256 != 0
    ours, exact = results
    for name in names:
        if f"{name}_codes" in ours:
            ours[name] = decode(ours[f"{name}_codes"], ours[f"{name}_scale"], name not in UNSIGNED)
    return {name: ours[name][keep] for name in names}, {name: exact[name][1].item() for name in names}


def neighbours(value: float) -> tuple[float, float]:
    """The numbers of bfloat16 around a positive one, which is none."""
    unit = 2.0 ** (math.floor(math.log2(value)) - 7)
    low = math.floor(value / unit) * unit
    assert low < value
    return low, low + unit


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_moments_in_bfloat16_are_rounded_without_bias(kind, sign):
    stored, values = one_step(kind, sign, state_dtype="bfloat16", rounding="stochastic")
    assert len(values) == 1 + len(kind.mapping.state_keys) - (kind is RMSprop)  # centered there is none in bfloat16
    for name, value in values.items():
        assert_unbiased(math.copysign(1.0, value) * stored[name], abs(value), *neighbours(abs(value)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", CODED)
def test_codes_are_rounded_without_bias(kind, sign):
    stored, values = one_step(kind, sign, state_dtype="8bit", rounding="stochastic")
    assert_unbiased(stored.pop("param"), value := values.pop("param"), *neighbours(value))
    assert len(values) == len(kind.mapping.state_keys)
    for name, value in values.items():
        drawn = math.copysign(1.0, value) * stored[name]
        low, high = drawn.min().item(), drawn.max().item()
        assert low < abs(value) < high and high - low <= abs(value) / 8 * 1.001
        assert_unbiased(drawn, abs(value), low, high)


@pytest.mark.parametrize("over", ["steps", "seeds"])
def test_1000_draws_of_1000_elements_are_unbiased_and_uncorrelated(over):
    """From one step, or seed, to the next, and from one element to the next."""
    param = Parameter(torch.ones(1000, dtype=BF16))
    param.grad = torch.full((1000,), -0.3 * 2.0**-7).to(BF16)
    optimizer = SGD([param], lr=1.0, rounding="stochastic", seed=5)
    drawn = torch.empty(1000, 1000)
    for row in drawn:
        param.data.fill_(1.0)
        optimizer.step()
        row.copy_(param.detach())
        if over == "seeds":
            optimizer.param_groups[0]["seed"] += 1
            optimizer.state[param]["step"].zero_()
    assert_unbiased(drawn, 1.0 - param.grad[0].item(), 1.0, 1.0 + 2.0**-7)
    for first, second in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        correlation = torch.corrcoef(torch.stack([first.reshape(-1), second.reshape(-1)]).double())[0, 1]
        assert abs(correlation.item()) <= 4.0 / math.sqrt(first.numel())


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

SHAPES = ((41_001,), (130, 201), (3,))  # five chunks and more, and as many elements as several threads are called for


def trained(kind, storage, *, steps=2, shapes=SHAPES, dtype=BF16, seed=9, skip=None, threads=1):
    params = parameters(shapes, dtype)
    optimizer = kind(params, lr=1e-2, seed=seed, **storage, **with_all_moments(kind))
    go_on(optimizer, 0, steps, skip, threads)
    return optimizer


def go_on(optimizer, begin, end, skip=None, threads=1):
    """Steps on so many threads, everything else on one."""
    params = optimizer.param_groups[0]["params"]
    for step in range(begin, end):
        set_gradients(params, seed=step)
        if skip is not None and step == 0:
            params[skip].grad = None
        torch.set_num_threads(threads)
        optimizer.step()
        torch.set_num_threads(1)


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    first, second = ({k: v for k, v in named.items() if isinstance(v, Tensor)} for named in (first, second))
    assert first.keys() == second.keys()
    return all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save({"model": optimizer.param_groups[0]["params"], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    made = type(optimizer)([Parameter(p.detach().clone()) for p in loaded["model"]])
    made.load_state_dict(loaded["optimizer"])
    return made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Adam])  # whose formula is AdamW's
def test_any_number_of_threads_and_a_resume_between_give_the_same_bits(kind):
    for storage in storages(kind, BF16):
        reference = trained(kind, storage)
        for threads in (1, 2, 3):
            resumed = saved_and_loaded(trained(kind, storage, steps=1, threads=threads))
            go_on(resumed, 1, 2, threads=4 - threads)
            assert same(resumed, reference), storage


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


# ---- counters of steps are float32, which counts to 2^24 ----


@pytest.mark.parametrize("storage", [{"rounding": "stochastic"}, {"state_dtype": "8bit"}], ids=str)
def test_behind_what_a_counter_counts_random_bits_still_differ(storage):
    """2^24 is followed by 2^23 + 1, as if that many steps had been taken."""
    param = Parameter(torch.ones(4096, dtype=BF16))
    optimizer = AdamW([param], lr=1e-3, **storage)
    param.grad = torch.linspace(-1, 1, 4096).to(BF16)
    optimizer.step()
    entry = optimizer.state[param]
    found = []
    for counts in (2**24 - 1, 2**24, 2**23):
        before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
        start = param.detach().clone()
        entry["step"].fill_(counts)
        optimizer.step()
        found.append((entry["step"].item(), param.detach().clone(), bytes_of(entry)))
        with torch.no_grad():
            param.copy_(start)
        for name, value in before.items():
            if isinstance(value, Tensor):
                entry[name].copy_(value)
    assert [step for step, *_ in found] == [2.0**24, 2.0**23 + 1, 2.0**23 + 1]
    last, after, again = ([*tensors] for _, *tensors in found)
    assert not all(map(torch.equal, last, after)) and all(map(torch.equal, after, again))


def bytes_of(entry: dict[str, Any]) -> Tensor:
    """All that a step has drawn bits for, of one parameter's state."""
    tensors = [value for name, value in sorted(entry.items()) if isinstance(value, Tensor) and name != "step"]
    return torch.cat([value.view(torch.uint8).flatten() for value in tensors])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_without_random_bits_a_counter_stays_where_torchs_does(kind):
    params = [Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    optimizers = [kind([p], lr=0.1) for p in params]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["step"].fill_(2**24)
    adopted = adopt(optimizers[0])
    adopted.step()
    optimizers[1].step()
    assert adopted.compiled
    assert optimizers[0].state[params[0]]["step"].item() == optimizers[1].state[params[1]]["step"].item() == 2**24
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=0.0)

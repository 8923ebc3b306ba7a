"""Every optimizer of `lit_fast.optim` in every storage, against the float64 oracle and against itself in float32."""

from __future__ import annotations

import random

import pytest
import torch
from oracle import Bounded
from storage_cases import (
    DTYPES,
    KINDS,
    current_moments,
    current_value,
    expected,
    make_case,
    optimizer_of,
    param_chance,
    random_bits,
    state_chance,
    stochastic_bf16,
    storages,
)

from lit_fast.optim.codes import encode, split

CASES = 200
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def within(actual: torch.Tensor, bound: Bounded) -> None:
    difference = (actual.double() - bound.value).abs()
    assert bool((difference <= bound.error).all()), (difference - bound.error).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_any_case_is_within_the_derived_bound(kind, dtype):
    draw = random.Random(f"{kind.__name__} {dtype}")
    ways = storages(kind, dtype)
    cases = [make_case(kind, dtype, ways[i % len(ways)], draw) for i in range(CASES)]
    optimizer = optimizer_of(kind, cases)
    optimizer.step()
    for case in cases:
        entry, stochastic = optimizer.state[case.param], case.group["rounding"] == "stochastic"
        bounds = expected(kind, case)
        value = bounds.pop("param")
        if case.group["master"] is None:
            value = value.stored(dtype, stochastic)
        within(current_value(case, entry), value)
        if case.group["master"] == "float32":
            assert torch.equal(case.param, entry["master"].to(dtype))
        elif case.group["master"] == "remainder":
            upper, remainder = split(current_value(case, entry))
            assert torch.equal(upper, case.param) and torch.equal(remainder, entry["remainder"])
        for name, bound in bounds.items():
            stored = current_moments(entry, [name])[name]
            if f"{name}_codes" in entry:
                blocks = torch.arange(len(stored)) // 256
                largest = torch.zeros(len(entry[f"{name}_scale"]), dtype=torch.float64)
                largest.scatter_reduce_(0, blocks, bound.value.abs() + bound.error, "amax")
                within(stored, bound.coded(name not in SQUARES, largest[blocks]))
            else:
                within(stored, bound.stored(entry[name].dtype, stochastic))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_the_float32_step_rounded_as_asked(kind, dtype):
    """Bit for bit: codes, both roundings, random bits, masters. 32 divides numel: torch's tail is another formula."""
    draw = random.Random(f"bits {kind.__name__} {dtype}")
    cases = [make_case(kind, dtype, way, draw, numel=608) for way in storages(kind, dtype)]
    twins = []
    for case in cases:
        twin = make_case(kind, torch.float32, storages(kind, torch.float32)[0], draw, numel=608)
        twin.made, twin.step = case.made, case.step
        twin.param.data.copy_(case.before)
        twin.param.grad = case.grad.float()
        twin.group = {"params": [twin.param], **case.made}
        twin.entry = {name: value.clone() for name, value in case.moments.items()}
        if case.entry:
            twin.entry["step"] = torch.tensor(float(case.step))
        if "momentum_buffer" not in case.moments and kind.__name__ == "SGD":
            twin.entry = {}
        twins.append(twin)
    optimizer, plain = optimizer_of(kind, cases), optimizer_of(kind, twins)
    optimizer.step()
    plain.step()
    for number, (case, twin) in enumerate(zip(cases, twins, strict=True)):
        entry, stochastic = optimizer.state[case.param], case.group["rounding"] == "stochastic"
        result = twin.param.detach()
        bits = random_bits(case.group["seed"], case.step + 1, torch.arange(608) + number * 768)
        if case.group["master"]:
            assert torch.equal(current_value(case, entry), result), case.group
        elif stochastic and dtype == torch.bfloat16:
            assert torch.equal(case.param, stochastic_bf16(result, param_chance(bits))), case.group
        else:
            assert torch.equal(case.param, result.to(dtype)), case.group
        names = kind.mapping.state_keys
        for name in (name for name in names if name in plain.state.get(twin.param, {})):
            value, k = plain.state[twin.param][name], names.index(name)
            if f"{name}_codes" in entry:
                codes, scale = encode(value, name not in SQUARES, state_chance(bits, k))
                assert torch.equal(entry[f"{name}_codes"], codes) and torch.equal(entry[f"{name}_scale"], scale)
            elif stochastic and entry[name].dtype == torch.bfloat16:
                assert torch.equal(entry[name], stochastic_bf16(value, state_chance(bits, k)))
            else:
                assert torch.equal(entry[name], value.to(entry[name].dtype))

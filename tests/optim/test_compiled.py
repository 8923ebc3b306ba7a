"""Every optimizer of `lit_fast.optim` in every storage, against the float64 oracle and against itself in float32."""

from __future__ import annotations

import os
import random

import pytest
import torch
from many_cases import check, many, optimizer_over, ways
from storage_cases import (
    DTYPES,
    KINDS,
    current_value,
    make_case,
    optimizer_of,
    param_chance,
    random_bits,
    state_chance,
    stochastic_bf16,
    storages,
)

from lit_fast import ops
from lit_fast.optim.codes import encode

CASES = 50  # of each optimizer in each storage; 200 fresh ones in the slow test
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def check_many(kind: type, dtype: torch.dtype, count: int, seed: object) -> None:
    """Every element that a step stores, of `count` cases of every way to keep them, on every target of this machine,
    lies within the oracle's bound, and nothing else is written.

    The bound is that of float32 arithmetic (tests/oracle.py: each operation's error from those of its operands and one
    rounding) and of the rounding to what is stored: 2^-24, 2^-8 or 2^-11 of the value, twice that where bfloat16 is
    rounded stochastically, 1/8 of it in 8-bit codes, and what the smallest numbers of a format leave out. It is no
    wider than four times the largest error that is seen.
    """
    chosen = ops.build_info()["cpu_target"]
    targets = ops.build_info()["cpu_targets_supported"]
    assert "scalar" in targets
    for way in ways(kind):
        if way[1] != dtype:
            continue
        parts = many(way, count, seed)
        bounds = [part.bounds() for part in parts]
        optimizer = optimizer_over(parts)
        used: dict[str, float] = {}
        for target in targets:
            for part in parts:
                part.enter(optimizer)
            ops.use_cpu_target(target)
            try:
                optimizer.step()
            finally:
                ops.use_cpu_target(chosen)
            assert not optimizer._refusal, "torch's own step ran"
            for part, expected in zip(parts, bounds, strict=True):
                check(part, part.leave(optimizer), expected, used, f"{way}, {target}, seed {seed!r}")
        assert all(share > 0.25 for share in used.values()), (used, way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_within_the_derived_bound(kind, dtype):
    check_many(kind, dtype, CASES, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_200_fresh_cases_are_within_the_derived_bound(kind):
    seed = int(os.environ.get("LIT_FAST_CASES_SEED") or random.SystemRandom().randrange(2**32))  # named in a failure
    for dtype in DTYPES:
        check_many(kind, dtype, 200, seed)


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
                assert torch.equal(entry[name], stochastic_bf16(value, state_chance(bits, k) >> 4))
            else:
                assert torch.equal(entry[name], value.to(entry[name].dtype))

"""Random cases of every optimizer of `lit_fast.optim` in every storage, and what the kernels' random bits are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim import SGD, Adagrad, Adam, AdamW, Lamb, Lion, RMSprop
from lit_fast.optim.codes import decode, rebuilt, split
from lit_fast.optim.storage import convert

KINDS = (AdamW, Adam, SGD, Lion, Adagrad, RMSprop, Lamb)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODED = (AdamW, Adam, SGD, Lion, Lamb)  # those that may have 8-bit states


def storages(kind: type, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every combination of options that means something for parameters of a dtype."""
    state_dtypes = [None, "float32", "bfloat16", *(["8bit"] if kind in CODED else [])]
    masters = {torch.float32: [None], torch.bfloat16: [None, "float32", "remainder"], torch.float16: [None, "float32"]}
    return [
        {"state_dtype": state_dtype, "master": master, "rounding": rounding}
        for state_dtype in state_dtypes
        for master in masters[dtype]
        for rounding in ("nearest", "stochastic")
    ]


def options(kind: type, draw: random.Random) -> dict[str, Any]:
    """Options of the algorithm, at random."""
    made: dict[str, Any] = {"lr": 10 ** draw.uniform(-4, -1), "maximize": draw.random() < 0.3}
    made["weight_decay"] = draw.choice([0.0, 0.01, 0.3])
    if kind in (AdamW, Adam, Lion, Lamb):
        made["betas"] = (draw.choice([0.0, 0.3, 0.9, 0.95]), draw.choice([0.5, 0.9, 0.99, 0.999]))
    if kind in (AdamW, Adam):
        made |= {"eps": 10 ** draw.uniform(-8, -3), "amsgrad": draw.random() < 0.5}
    if kind is Lamb:
        made |= {"eps": 10 ** draw.uniform(-8, -3)}
        made |= {"trust_clip": draw.random() < 0.3, "always_adapt": draw.random() < 0.5}
    if kind is SGD:
        made["momentum"] = draw.choice([0.0, 0.5, 0.9])
        made["dampening"] = draw.choice([0.0, 0.3])
        if made["momentum"] and draw.random() < 0.5:
            made |= {"dampening": 0.0, "nesterov": True}
    if kind is Adagrad:
        made |= {"eps": 1e-8, "lr_decay": draw.choice([0.0, 0.1])}
    if kind is RMSprop:
        made |= {"alpha": draw.choice([0.9, 0.99]), "eps": 1e-6}
        made |= {"momentum": draw.choice([0.0, 0.9]), "centered": draw.random() < 0.5}
    return made


def moments(kind: type, made: dict[str, Any]) -> tuple[str, ...]:
    """What is kept of a parameter under these options."""
    if kind in (AdamW, Adam):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if made["amsgrad"] else ("exp_avg", "exp_avg_sq")
    if kind is SGD:
        return ("momentum_buffer",) if made["momentum"] else ()
    if kind is RMSprop:
        return ("square_avg", *["grad_avg"] * made["centered"], *["momentum_buffer"] * bool(made["momentum"]))
    if kind is Lamb:
        return ("exp_avg", "exp_avg_sq")
    return ("sum",) if kind is Adagrad else ("exp_avg",)


def random_moments(names: tuple[str, ...], numel: int, scale: float | Tensor) -> dict[str, Tensor]:
    """Moments that gradients of that scale may have left behind; square_avg leaves a variance around grad_avg.

    With a = grad_avg <= scale the variance is 0.01 scale^2 at least, and bfloat16 takes 2^-9 (square_avg + 2 a^2) of it
    at most, which is 0.006 scale^2: it stays positive.
    """
    values = {name: scale * torch.randn(numel) for name in names}
    for name in values.keys() & {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg"}:
        values[name] = values[name].square() + 0.01 * scale**2
    if "grad_avg" in values:
        values["grad_avg"] = (0.3 * values["grad_avg"]).clamp(-scale, scale)
        values["square_avg"] += values["grad_avg"].square()
    return values


@dataclass
class Case:
    """One parameter in a group of its own, with options and storage, and its state before the step."""

    made: dict[str, Any]
    group: dict[str, Any]
    param: Parameter
    grad: Tensor
    before: Tensor  # the float32 value that the step starts from
    moments: dict[str, Tensor]  # float32, what the stored ones stand for
    entry: dict[str, Any]
    step: int
    tensor_of: Tensor | None = None  # with many parameters in one, which each element belongs to


def make_case(kind: type, dtype: torch.dtype, storage: dict[str, Any], draw: random.Random, numel: int = 0) -> Case:
    numel = numel or draw.choice([1, 31, 64, 255, 256, 257, 600])
    made = options(kind, draw)
    scale = 10 ** draw.uniform(-2, 0.5)
    master = torch.randn(numel)
    param = Parameter(master.to(dtype))
    group = {"params": [param], **made, **storage, "seed": draw.randrange(2**40)}
    step = draw.choice([0, 3, 1000])
    values = random_moments(moments(kind, made), numel, scale)
    if kind is SGD and step == 0:
        values = {}  # the first step takes the gradient for the buffer
    if not values:
        step = 0
    entry: dict[str, Any] = {"step": torch.tensor(float(step)), **values}
    if storage["master"] == "remainder":
        upper, entry["remainder"] = split(master)
        param.data.copy_(upper)
    elif storage["master"]:
        entry["master"] = master.clone()
    convert(entry, group, param)
    if not values:
        entry = {k: v for k, v in entry.items() if k in ("master", "remainder")}
    param.grad = (scale * torch.randn(numel)).to(dtype)
    before = master if storage["master"] else param.detach().float()
    return Case(made, group, param, param.grad, before.clone(), current_moments(entry, values), entry, step)


def current_moments(entry: dict[str, Any], names: Any) -> dict[str, Tensor]:
    """The values that stored moments stand for, in float32."""
    squares = {"exp_avg_sq", "max_exp_avg_sq"}
    return {
        name: decode(entry[f"{name}_codes"], entry[f"{name}_scale"], name not in squares)
        if f"{name}_codes" in entry
        else entry[name].float().clone()
        for name in names
    }


def optimizer_of(kind: Callable[..., torch.optim.Optimizer], cases: list[Case]) -> torch.optim.Optimizer:
    """One optimizer over all cases, each in its own group, with the states that they begin with."""
    optimizer = kind([case.group for case in cases])
    for case in cases:
        if case.entry:
            optimizer.state[case.param] = case.entry
    return optimizer


def current_value(case: Case, entry: dict[str, Any]) -> Tensor:
    """The parameter's value in float32, as exactly as it is known."""
    if "master" in entry:
        return entry["master"]
    return rebuilt(case.param.detach(), entry["remainder"]) if "remainder" in entry else case.param.detach().float()


def expected(kind: type, case: Case) -> dict[str, oracle.Bounded]:
    """What the oracle says of a case, in float32 arithmetic, before anything is stored."""
    made, state = dict(case.made), case.moments
    p, g = case.before, case.grad.float()
    made.pop("centered", None)
    if kind in (AdamW, Adam):
        made.pop("amsgrad")
        return oracle.adamw_step(p, g, **state, step=case.step + 1, decoupled=kind is AdamW, **made)
    if kind is Lamb:
        return oracle.lamb_step(p, g, **state, step=case.step + 1, tensor_of=case.tensor_of, **made)
    if kind is SGD:
        return oracle.sgd_step(p, g, state.get("momentum_buffer"), **made)
    if kind is Adagrad:
        return oracle.adagrad_step(p, g, **state, step=case.step + 1, **made)
    return (oracle.lion_step if kind is Lion else oracle.rmsprop_step)(p, g, **state, **made)


# ---- random bits, as csrc/formulas/storage.h has them ----

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def random_bits(seed: int, step: int, index: Tensor) -> Tensor:
    """32 random bits for elements whose global indices (int64) lie below 2^32."""
    x = seed & MASK64
    for word in (step, 0):
        x = (x + word * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
        x ^= x >> 31
    first, second = x & MASK32, x >> 32
    bits = (multiplied(index >> 1, 0x705B0767) + first) & MASK32
    bits = (multiplied(bits ^ (bits >> 13), 0xD2C6C9A1) + second) & MASK32
    bits = bits ^ (bits >> 15)
    return torch.where(index % 2 == 1, multiplied(bits, 0x521A3BAD), bits)


def multiplied(a: Tensor, b: int) -> Tensor:
    """a * b mod 2^32 without leaving int64."""
    return ((a * (b & 0xFFFF)) + (((a * (b >> 16)) & MASK32) << 16)) & MASK32


def param_chance(bits: Tensor) -> Tensor:
    return bits & 0xFFFF


def state_chance(bits: Tensor, k: int) -> Tensor:
    """20 bits, of which a bfloat16 state takes the upper 16."""
    return (bits >> (4, 12, 8)[k]) & 0xFFFFF


def stochastic_bf16(x: Tensor, chance: Tensor) -> Tensor:
    bits = (x.view(torch.int32).long() & MASK32) + chance
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)

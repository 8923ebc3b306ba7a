"""What the tests of Triton's kernels in its interpreter share; pytest's plugin of their process (test_triton.py).

Chunks are shorter here than on a GPU, but for one test: the interpreter takes 20 ms a block.
"""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lit_fast import ops
from lit_fast.optim import adamw, lion, sgd
from lit_fast.optim.adamw import AdamW
from lit_fast.optim.lion import Lion
from lit_fast.triton import launch

CPU = torch.device("cpu")
CHUNK = 2048
ROW_WORDS = 10
MAPPINGS = {
    AdamW: adamw.MAPPING,
    torch.optim.AdamW: adamw.MAPPING,
    torch.optim.Adam: adamw.MAPPING,
    torch.optim.SGD: sgd.MAPPING,
    Lion: lion.MAPPING,
}
SIZES = (0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 1)
FAMILY = [
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "betas": (0.3, 0.9), "maximize": True}),
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Lion, {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.1, "maximize": True}),
]
LAYOUTS = {  # parameter and gradient, state
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 state": (torch.float32, torch.bfloat16),
}
CLIPPING = [{}, {"max_norm": 0.5}, {"max_norm": 1e6}, {"clip_value": 0.4}]


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float32 with one rounding. A float64 holds the product; the sum is rounded to odd before the last
    rounding, which then is the only one that counts (Boldo & Melquiond 2008, "Emulation of FMA"). In float64 the
    kernels multiply what float32 held, exactly, but for one scalar that they round to float32 next."""
    if x.dtype != np.float32:
        return x * y + z
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (rest != 0.0) & (bits % 2 == 0)
    odd = np.where(inexact, np.where((rest > 0.0) == (total > 0.0), bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


@pytest.fixture(autouse=True)
def fma_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on every GPU. The interpreter of Triton 3.7 rounds the product too."""

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "kernels_for", lambda device: ("Triton", "a test says so"))
    monkeypatch.setattr(launch, "Work", functools.partial(launch.Work, chunk=CHUNK))


def numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimizer_of(kind, sizes, layout="float32", seed=0, **options) -> torch.optim.Optimizer:
    """With states as after a few steps where the layout's differ from the parameter's, and none otherwise."""
    dtype, state_dtype = LAYOUTS[layout]
    params = [Parameter(numbers(n, dtype, seed + i)) for i, n in enumerate(sizes)]
    optimizer = kind(params, **options)
    if state_dtype != dtype:
        for i, p in enumerate(params):
            state = {key: numbers(p.numel(), state_dtype, i + 7).abs() for key in MAPPINGS[kind].state_keys}
            optimizer.state[p] = state if kind is torch.optim.SGD else {**state, "step": torch.tensor(3.0)}
    return optimizer


def set_gradients(optimizer: torch.optim.Optimizer, seed: int, missing: int | None = None) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = None if i == missing else numbers(p.numel(), p.dtype, 100 * seed + i)


def assert_same_bits(ours: torch.optim.Optimizer, cores: torch.optim.Optimizer, width: int) -> None:
    """But for the elements behind torch's last full vector, which its CPU kernel, and so the core's, rounds otherwise.

    Those are one rounding of `exp_avg_sq` apart; that they are right, the tests against float64 say.
    """
    for a, b in zip(ours.param_groups[0]["params"], cores.param_groups[0]["params"], strict=True):
        body = slice(0, a.numel() - a.numel() % width)
        assert torch.equal(a.detach()[body], b.detach()[body])
        assert ours.state.get(a, {}).keys() == cores.state.get(b, {}).keys()
        for key, value in ours.state.get(a, {}).items():
            expected = cores.state[b][key]
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected) if key == "step" else torch.equal(value[body], expected[body])


def table_of(tensors: list[dict[str, Tensor]], options: list[float], states: tuple[str, ...], step=0.0):
    """As csrc/hand_over.cpp writes it, for tensors of one layout and one set of options."""
    rows, chunks = [], 0
    for t in tensors:
        param, counter = t["param"], t.get("counter")
        half = int(param.dtype == torch.bfloat16)
        row = [param.data_ptr(), t["grad"].data_ptr(), 0 if counter is None else counter.data_ptr(), param.numel()]
        row += [chunks, half, 0, 0, *(t[name].data_ptr() for name in states)]
        rows += row + [0] * (ROW_WORDS - len(row))
        chunks += -(-param.numel() // CHUNK)
    floats = [step, 0.0, *options]
    words = bytearray(struct.pack(f"{len(rows)}q{len(floats)}d", *rows, *floats))
    return words, ROW_WORDS, len(floats), len(tensors), chunks, False

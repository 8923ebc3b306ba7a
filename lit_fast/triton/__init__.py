"""The optimizer step, the gradient norm, scale and clip as Triton kernels: for GPUs that the core was not built for.

The core finds and checks what there is to do and writes it into one table (csrc/stepper.h); the kernels here read the
table where it lies, on the device. One file a formula says what csrc/formulas/ says, in the same order of operations,
each rounding to nearest even and no product fused that is not written as `fma`: the bits are those of the CUDA kernels.

Triton is imported with the first kernel, not with this package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

# What torch 2.8, the oldest torch that lit_fast takes, brings with it.
OLDEST_TRITON = (3, 4)


@functools.cache
def why_missing() -> str:
    """Why no kernel of this package can run here, or "" where Triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version: str = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return ""


def formula_named(name: str, option_names: Sequence[str]) -> tuple[ModuleType | None, str]:
    """The file of this package that has a formula of the core, or None and why it cannot be used."""
    if importlib.util.find_spec(f"lit_fast.triton.{name}") is None:
        return None, f"there is no Triton kernel for {name}"
    formula = importlib.import_module(f"lit_fast.triton.{name}")
    if tuple(option_names) != formula.OPTION_NAMES:
        return None, f"the Triton kernel for {name} does not know all of the core's options"
    return formula, ""

"""The typed face of the compiled core, and its only importer.

The core reads tensors where they lie and writes them in place; it holds nothing between two calls. What it cannot do
it refuses with a sentence, before anything is written: callers then do the work with torch and say so.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_fast import _core
from lit_fast.errors import KernelError

ParamGroups: TypeAlias = list[dict[str, Any]]
State: TypeAlias = dict[Tensor, Any]

NO_CLIPPING = -1.0

# float32 lanes of torch's own CPU kernels, which decide where its vector loop ends (csrc/formulas/math.h).
_VECTOR_WIDTHS = {"AVX512": 16, "AVX2": 8}


@dataclass(frozen=True)
class Mapping:
    """How one family of `torch.optim` classes maps to a formula of the core.

    Attributes:
        formula: the formula's name, as in `formulas()`; the mapping's file bears it too.
        classes: the `torch.optim` classes.
        option_keys: keys of a param group whose numbers (tuples flattened) are the formula's options, in its order.
        refused_keys: keys of a param group that must be absent or false.
        state_keys: keys of `optimizer.state[p]`, one for each state of the formula.
        step_key: key of the float32 step counter in `optimizer.state[p]`, or None.
        init_state: `init_state(state, group, param)` fills `state[param]` as the torch class would.
    """

    formula: str
    classes: tuple[type[torch.optim.Optimizer], ...]
    option_keys: tuple[str, ...]
    refused_keys: tuple[str, ...]
    state_keys: tuple[str, ...]
    step_key: str | None
    init_state: Callable[[State, dict[str, Any], Tensor], None]


class Stepper:
    """One optimizer class's compiled step. Keeps no tensor.

    Example:
        >>> from lit_fast.optim.sgd import MAPPING
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> sgd = torch.optim.SGD([weight], lr=0.5)
        >>> Stepper(MAPPING).step(sgd.param_groups, sgd.state, 1.0, NO_CLIPPING, NO_CLIPPING)
        >>> weight.detach()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, mapping: Mapping) -> None:
        self._core = _core.Stepper(
            mapping.formula,
            mapping.option_keys,
            mapping.refused_keys,
            mapping.state_keys,
            mapping.step_key,
            mapping.init_state,
        )
        # step(param_groups, state, grad_scale, max_norm, clip_value): None when stepped, the norm of the scaled
        # gradients (float) when stepped with a max_norm, or the reason (str) why nothing was done. Negative max_norm
        # or clip_value: no such clipping.
        self.step = self._core.step

    def refusal(self, param_groups: ParamGroups) -> str:
        """Why these parameters and options cannot be stepped, or "" if they can."""
        return self._core.check_parameters(param_groups)


def formulas() -> dict[str, dict[str, Any]]:
    """Every formula of the core: name -> {"options", "states", "counts_steps"}."""
    return _core.formulas()


def gradient_norm(param_groups: ParamGroups, grad_scale: float = 1.0) -> Tensor:
    """L2 norm of all gradients of `param_groups` times `grad_scale`, from one read.

    Sums squares in float64, in an order that depends on the gradients alone: the same bits for any number of threads
    and any CPU target. Finite exactly when every gradient is (and the norm itself fits a float32).

    Returns:
        0-dim float32 tensor; relative error against float64 below 1e-7.

    Raises:
        KernelError: a gradient's device, dtype or layout has no kernel.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm([{"params": [weight]}])
        tensor(5.)
    """
    result = _core.gradient_norm(param_groups, grad_scale, NO_CLIPPING, NO_CLIPPING, False)
    if isinstance(result, str):
        raise KernelError(f"gradient_norm: {result}.")
    return torch.scalar_tensor(result, dtype=torch.float32)


def clip_gradients_(
    param_groups: ParamGroups, grad_scale: float = 1.0, max_norm: float = NO_CLIPPING, clip_value: float = NO_CLIPPING
) -> Tensor | None:
    """Rewrite all gradients in place: times `grad_scale`, then clipped as torch's `clip_grad_norm_`/`_value_` do.

    Returns:
        The norm after scaling and before clipping (0-dim float32), or None without `max_norm`.

    Raises:
        KernelError: a gradient's device, dtype or layout has no kernel; no gradient was changed.
    """
    result = _core.gradient_norm(param_groups, grad_scale, max_norm, clip_value, True)
    if isinstance(result, str):
        raise KernelError(f"clip_gradients_: {result}.")
    return None if result is None else torch.scalar_tensor(result, dtype=torch.float32)


release_gradients = _core.release_gradients  # (param_groups): every p.grad becomes None


@dataclass(frozen=True)
class AllocatorReport:
    """What `keep_freed_memory` did.

    Attributes:
        applied: whether the allocator was changed.
        what: the settings, or why there are none.
    """

    applied: bool
    what: str

    def __str__(self) -> str:
        return self.what


def keep_freed_memory(keep: bool = True) -> AllocatorReport:
    """Tell the C allocator to keep freed memory for reuse (True) or to follow its defaults (False).

    Gradients that are freed after every step otherwise go back to the kernel and come back as page faults, which cost
    more than any kernel here. Process-wide, glibc only; elsewhere nothing is done and the report says why.
    """
    return AllocatorReport(*_core.keep_freed_memory(keep))


def build_info() -> dict[str, Any]:
    """What was built, what was chosen, and why: the facts behind `lit-fast info`.

    Keys: cpu_targets_built, cpu_targets_supported, cpu_target, cpu_target_reason, cuda, cuda_reason, threads,
    tensor_access, compiler, architecture, pybind11, python, torch, torch_cpu_capability, vector_width.
    """
    info = _core.build_info()
    info["python"] = platform.python_version()
    info["torch"] = torch.__version__
    info["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    info["vector_width"] = _vector_width()
    return info


def _vector_width() -> int:
    return _VECTOR_WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 4 if platform.machine() == "aarch64" else 8)


def _connect(use_exchange_api: bool = True) -> None:
    """Show the core torch: how to read its tensors, its threads, its OpenMP runtime."""
    _core.configure(
        torch, use_exchange_api, torch._C._increment_version, torch.get_num_threads, _vector_width()
    )
    _core.find_openmp(os.path.dirname(torch.__file__))


_connect()

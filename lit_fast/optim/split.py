"""The compiled step for parameters of which a process holds a part: DTensors, of FSDP2 or tensor parallelism.

The core steps the parts, plain tensors, in place. Param groups stay as they are but for the length of a step, and the
state stays torch's: a DTensor for what is laid out as the parameter, so that checkpoints know it as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_fast import ops
from lit_fast.optim.storage import asks_for_storage

# Formulas that take each element by itself. LAMB's needs the norm of a whole tensor, Muon's a whole matrix.
ELEMENTWISE = ("adagrad", "adamw", "lion", "rmsprop", "sgd")


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "_local_tensor")


def has_split(param_groups: ops.ParamGroups) -> bool:
    return any(is_split(p) for group in param_groups for p in group["params"])


def why_not_split(optimizer: Optimizer, formula: str) -> str:
    """Why the core cannot step parts of this optimizer's parameters, or ""."""
    if formula not in ELEMENTWISE:
        return f"{formula} needs whole tensors, and this process holds parts of them"
    if any(map(asks_for_storage, optimizer.param_groups)):
        return "states in other dtypes cannot be split"
    return ""


class SplitStep:
    """`step(param_groups, state, grad_scale, max_norm, clip_value)` of the core, on the parts.

    Args:
        step: the core's, which sees plain tensors.
    """

    def __init__(self, step: ops.Step) -> None:
        self._step = step
        self._slots: dict[Tensor, Any] = {}  # of the optimizer's state, as last seen
        self._state: dict[Tensor, dict[str, Any]] = {}  # of the parts, over the same memory

    def __call__(
        self, param_groups: ops.ParamGroups, state: ops.State, grad_scale: Any, max_norm: float, clip_value: float
    ) -> Tensor | float | str | None:
        norm: Tensor | None = None
        if max_norm >= 0.0:
            gradients = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
            norm = total_norm(gradients) * abs(grad_scale)
            coefficient = ops.clip_coefficient(norm, max_norm)
            grad_scale = grad_scale * (coefficient.item() if norm.is_cpu else coefficient)
        params = [p for group in param_groups for p in group["params"]]
        for p in params:
            self._follow(p, state)
        with on_parts(param_groups):
            refusal = self._step(param_groups, self._state, grad_scale, ops.NO_CLIPPING, clip_value)
        for p in params:
            self._take(p, state)
        return norm if refusal is None else refusal

    def _follow(self, p: Tensor, state: ops.State) -> None:
        """The part's state is the parameter's, which may have been loaded since."""
        slots = state.get(p)
        if slots is not self._slots.get(p):
            self._slots[p] = slots
            self._state[part(p)] = {key: part(value) for key, value in (slots or {}).items()}

    def _take(self, p: Tensor, state: ops.State) -> None:
        """What the core has made in its first step becomes the parameter's."""
        made = self._state.get(part(p))
        if not made or self._slots.get(p):
            return
        local = part(p)
        slots = {
            key: _laid_out_as(p, value) if isinstance(value, Tensor) and value.dim() and value.shape == local.shape
            else value
            for key, value in made.items()
        }  # fmt: skip
        state[p] = self._slots[p] = slots


def part(value: Any) -> Any:
    """What this process holds of it; the thing itself where it is not split."""
    return getattr(value, "_local_tensor", value)


@contextmanager
def on_parts(param_groups: ops.ParamGroups) -> Iterator[None]:
    """Inside, param groups list the parts, and their gradients'."""
    whole = [group["params"] for group in param_groups]
    try:
        for group, params in zip(param_groups, whole, strict=True):
            group["params"] = [part(p) for p in params]
            group["grads"] = [part(p.grad) for p in params]
        yield
    finally:
        for group, params in zip(param_groups, whole, strict=True):
            group["params"] = params
            group.pop("grads", None)


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients, over all processes: torch's on each mesh, since it knows no gradients of two.

    Returns:
        0-dim, a plain tensor, the same in every process.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = []
    for mesh, held in by_mesh.items():
        of_mesh: Any = get_total_norm(held, norm_type)
        norms.append(of_mesh if mesh is None else of_mesh.full_tensor())
    norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def _laid_out_as(p: Any, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return made

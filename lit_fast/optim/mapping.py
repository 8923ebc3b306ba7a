"""Which of the core's formulas steps an optimizer: by its class, and only where its step is that class's own."""

from __future__ import annotations

import functools
import importlib
from types import CodeType, FunctionType
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_lr_scheduler
from torch.optim import optimizer as torch_optimizer

from lit_fast import ops

PRE_HOOKS = torch_optimizer._global_optimizer_pre_hooks
POST_HOOKS = torch_optimizer._global_optimizer_post_hooks
# Files whose wrappers around `step` (hooks, grad mode, scheduler bookkeeping) `AdoptedOptimizer.step` replaces.
_KNOWN_WRAPPERS = (torch_optimizer.__file__, torch_lr_scheduler.__file__)


@functools.cache
def _mappings() -> dict[type[Optimizer], ops.Mapping]:
    """torch class -> mapping. The core's list of formulas names the files of this folder."""
    found: dict[type[Optimizer], ops.Mapping] = {}
    for formula in ops.formulas():
        mapping: ops.Mapping = importlib.import_module(f"lit_fast.optim.{formula}").MAPPING
        found.update(dict.fromkeys(mapping.classes, mapping))
    return found


def mapping_of(optimizer: Optimizer) -> tuple[ops.Mapping | None, str]:
    """The mapping of the optimizer's class, or None and why there is none."""
    kind = type(optimizer)
    known = next((base for base in kind.__mro__ if base in _mappings()), None)
    if known is None:
        return None, f"{kind.__name__} has no compiled kernel"
    if innermost(optimizer.step) is not innermost(known.step):
        return None, f"its step is not torch.optim.{known.__name__}'s"
    if getattr(kind, "_init_group", None) is not getattr(known, "_init_group", None):
        return None, f"its _init_group is not torch.optim.{known.__name__}'s"
    return _mappings()[known], ""


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether torch runs hooks around its steps, its own or those of all optimizers."""
    of_its_own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(of_its_own or PRE_HOOKS or POST_HOOKS)


def function_of(callable_: Any) -> Any:
    """A bound method's function."""
    return getattr(callable_, "__func__", callable_)


def innermost(step: Any) -> Any:
    """The function below torch's own wrappers. A wrapper of anybody else's is where the search ends."""
    function = function_of(step)
    while isinstance(function, FunctionType):
        code: CodeType = function.__code__
        inner = getattr(function, "__wrapped__", None)
        if inner is None or code.co_filename not in _KNOWN_WRAPPERS:
            break
        function = cast(Any, inner)
    return function

"""A `torch.optim` object, stepped by the compiled core where it can be and by itself where it cannot.

The torch object stays the optimizer: its `param_groups`, `state` and `state_dict` are what is read and written, anew
at every step, so schedulers, checkpoints, added groups and replaced parameters work as ever.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_lr_scheduler
from torch.optim import optimizer as torch_optimizer

from lit_fast import ops
from lit_fast.errors import MisconfigurationException

_PRE_HOOKS = torch_optimizer._global_optimizer_pre_hooks
_POST_HOOKS = torch_optimizer._global_optimizer_post_hooks
# Files whose wrappers around `step` (hooks, grad mode, scheduler bookkeeping) `AdoptedOptimizer.step` stands in for.
_KNOWN_WRAPPERS = (torch_optimizer.__file__, torch_lr_scheduler.__file__)


def adopt(
    optimizer: Optimizer, max_norm: float | None = None, clip_value: float | None = None
) -> AdoptedOptimizer:
    """Give a loop the compiled step for its `torch.optim` object.

    Args:
        optimizer: any `torch.optim.Optimizer`. One without a kernel is stepped by its own `step`; see `reason`.
        max_norm: clip the L2 norm of all gradients to this, as `clip_grad_norm_` does, within the step.
        clip_value: clip every gradient to [-clip_value, clip_value], as `clip_grad_value_` does, within the step.

    Raises:
        MisconfigurationException: not an optimizer, both clippings at once, or a limit that is not positive.

    Example:
        >>> model = torch.nn.Linear(32, 2)
        >>> adopted = adopt(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        >>> model(torch.ones(4, 32)).sum().backward()
        >>> norm = adopted.step()
        >>> adopted.zero_grad()
        >>> adopted.compiled
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise MisconfigurationException(
            f"adopt got a {type(optimizer).__name__}; it takes a torch.optim.Optimizer. Pass the optimizer itself."
        )
    return AdoptedOptimizer(optimizer, max_norm, clip_value)


class AdoptedOptimizer:
    """What `adopt` returns.

    Attributes:
        optimizer: the user's `torch.optim` object, the only owner of options and state.
        compiled: whether the core takes the steps. It turns False when a step meets what no kernel can do.
        reason: one sentence: which kernel, or why none.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float | None, clip_value: float | None) -> None:
        self.optimizer = optimizer
        self.set_clipping(max_norm, clip_value)
        self._bind()

    def set_clipping(self, max_norm: float | None = None, clip_value: float | None = None) -> None:
        """Replace both clipping limits; None switches one off. Raises as `adopt` does."""
        for name, limit in (("max_norm", max_norm), ("clip_value", clip_value)):
            if limit is not None and not limit > 0.0:
                raise MisconfigurationException(
                    f"{name}={limit}: it must be a positive number, or None for no such clipping."
                )
        if max_norm is not None and clip_value is not None:
            raise MisconfigurationException(
                f"max_norm={max_norm} and clip_value={clip_value}: gradients are clipped by norm or by value. "
                "Leave one of them None."
            )
        self._max_norm = ops.NO_CLIPPING if max_norm is None else float(max_norm)
        self._clip_value = ops.NO_CLIPPING if clip_value is None else float(clip_value)

    def step(self, grad_scale: float = 1.0) -> Tensor | None:
        """One optimizer step, clipping included. Gradients are read, not rewritten, unless a step hook could see it.

        Args:
            grad_scale: multiplies every gradient first: the inverse of a loss scale.

        Returns:
            With `max_norm`: the norm of the scaled gradients before clipping, a 0-dim float32 tensor on their device.
            Otherwise None.
        """
        optimizer = self.optimizer
        if (
            optimizer.__dict__.get("step") is not self._instance_step
            or type(optimizer).step is not self._class_step
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _PRE_HOOKS
            or _POST_HOOKS
            or not self.compiled
            or torch.autograd._profiler_enabled()
        ):
            return self._step_in_full(grad_scale)
        norm = self._core_step(optimizer.param_groups, optimizer.state, grad_scale, self._max_norm, self._clip_value)
        if norm is None:
            optimizer._opt_called = True
            return None
        if type(norm) is str:
            self._give_up(norm)
            return self._own_step(grad_scale)
        optimizer._opt_called = True
        return torch.tensor(norm, dtype=torch.float32)

    def zero_grad(self) -> None:
        """Release all gradients: every `p.grad` becomes None."""
        if self._own_zero_grad:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            ops.release_gradients(self.optimizer.param_groups)

    def clip_gradients(self, grad_scale: float = 1.0) -> Tensor | None:
        """Scale and clip the gradients in place, for whoever reads them before the step, which must then not clip."""
        return self._rewrite_gradients(grad_scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.optimizer).__name__}: {self.reason})"

    # ---- binding ----

    def _bind(self) -> None:
        """Decide who steps. Again whenever `optimizer.step` turns out to be another function than before."""
        optimizer = self.optimizer
        self._instance_step = optimizer.__dict__.get("step")
        self._class_step = type(optimizer).step
        self._own_zero_grad = _function(optimizer.zero_grad) is not Optimizer.zero_grad
        self._core_step: Callable[..., float | str | None] = _refuse
        name = type(optimizer).__name__
        mapping, why_not = _mapping_of(optimizer)
        if mapping is not None:
            stepper = ops.Stepper(mapping)
            why_not = stepper.refusal(optimizer.param_groups)
            self._core_step = stepper.step
        self.compiled = not why_not
        if self.compiled and mapping is not None:
            self.reason = f"{name}: compiled step ({mapping.formula} on {ops.build_info()['cpu_target']})"
        else:
            self.reason = f"{name}: its own step, because {why_not}"

    def _give_up(self, why_not: str) -> None:
        self.compiled = False
        self.reason = f"{type(self.optimizer).__name__}: its own step, because {why_not}"
        warnings.warn(f"The compiled optimizer step is off from here on. {self.reason}.", stacklevel=3)

    # ---- the step with everything that can hang on it ----

    def _step_in_full(self, grad_scale: float) -> Tensor | None:
        optimizer = self.optimizer
        if (
            optimizer.__dict__.get("step") is not self._instance_step
            or type(optimizer).step is not self._class_step
        ):
            self._bind()
        if not self.compiled:
            return self._own_step(grad_scale)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
            return self._step_with_hooks(grad_scale)

    def _step_with_hooks(self, grad_scale: float) -> Tensor | None:
        """In torch's order: hooks see clipped gradients, as they do behind a `clip_grad_norm_`."""
        optimizer = self.optimizer
        pre_hooks = [*_PRE_HOOKS.values(), *optimizer._optimizer_step_pre_hooks.values()]
        post_hooks = [*optimizer._optimizer_step_post_hooks.values(), *_POST_HOOKS.values()]
        norm: Tensor | None = None
        max_norm, clip_value = self._max_norm, self._clip_value
        rewritten = bool(pre_hooks or post_hooks)
        if rewritten:
            norm = self._rewrite_gradients(grad_scale)
            grad_scale, max_norm, clip_value = 1.0, ops.NO_CLIPPING, ops.NO_CLIPPING
        args: tuple[Any, ...] = (optimizer,)
        kwargs: dict[str, Any] = {}
        for hook in pre_hooks:
            changed = hook(optimizer, args, kwargs)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(f"a step pre-hook returned {changed!r}; it must return None or (args, kwargs).")
            args, kwargs = changed
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                closure()
        result = self._core_step(optimizer.param_groups, optimizer.state, grad_scale, max_norm, clip_value)
        if isinstance(result, str):
            self._give_up(result)
            with torch.no_grad():
                if not rewritten:
                    norm = self._clip_with_torch(grad_scale)
                inner = _innermost(optimizer.step)
                inner(optimizer)  # without the wrappers: the hooks ran above
        elif result is not None:
            norm = torch.tensor(result, dtype=torch.float32)
        optimizer._opt_called = True  # type: ignore[attr-defined]
        for post_hook in post_hooks:
            post_hook(optimizer, args, kwargs)
        return norm

    def _own_step(self, grad_scale: float) -> Tensor | None:
        norm = self._clip_with_torch(grad_scale)
        self.optimizer.step()
        return norm

    def _rewrite_gradients(self, grad_scale: float) -> Tensor | None:
        if grad_scale == 1.0 and self._max_norm < 0.0 and self._clip_value < 0.0:
            return None
        if self.compiled:
            return ops.clip_gradients_(self.optimizer.param_groups, grad_scale, self._max_norm, self._clip_value)
        return self._clip_with_torch(grad_scale)

    @torch.no_grad()
    def _clip_with_torch(self, grad_scale: float) -> Tensor | None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if grad_scale != 1.0:
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(grad_scale)
        if self._clip_value >= 0.0:
            clip_grad_value_(params, self._clip_value)
        if self._max_norm >= 0.0:
            return clip_grad_norm_(params, self._max_norm)
        return None


def _refuse(*_: Any) -> str:
    raise AssertionError("an optimizer without a kernel was stepped by the core")


@functools.cache
def _mappings() -> dict[type[Optimizer], ops.Mapping]:
    """torch class -> mapping. The core's list of formulas names the files of this folder."""
    found: dict[type[Optimizer], ops.Mapping] = {}
    for formula in ops.formulas():
        mapping: ops.Mapping = importlib.import_module(f"lit_fast.optim.{formula}").MAPPING
        found.update(dict.fromkeys(mapping.classes, mapping))
    return found


def _mapping_of(optimizer: Optimizer) -> tuple[ops.Mapping | None, str]:
    """The mapping of the optimizer's class, or None and why there is none."""
    kind = type(optimizer)
    known = next((base for base in kind.__mro__ if base in _mappings()), None)
    if known is None:
        return None, f"{kind.__name__} has no compiled kernel"
    if _innermost(optimizer.step) is not _innermost(known.step):
        return None, f"its step is not torch.optim.{known.__name__}'s"
    if kind._init_group is not known._init_group:  # type: ignore[attr-defined]
        return None, f"its _init_group is not torch.optim.{known.__name__}'s"
    return _mappings()[known], ""


def _function(callable_: Any) -> Any:
    return getattr(callable_, "__func__", callable_)


def _innermost(step: Any) -> Any:
    """The function below torch's own wrappers. A wrapper of anybody else's is where the search ends."""
    function = _function(step)
    while isinstance(function, FunctionType):
        code: CodeType = function.__code__
        inner = getattr(function, "__wrapped__", None)
        if inner is None or code.co_filename not in _KNOWN_WRAPPERS:
            break
        function = cast(Any, inner)
    return function


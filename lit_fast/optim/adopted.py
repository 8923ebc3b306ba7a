"""An optimizer stepped by the compiled core: what it asks the core for, and when torch's own step runs instead."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import Optimizer

from lit_fast import ops
from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim.mapping import POST_HOOKS, PRE_HOOKS, function_of, has_step_hooks, innermost, mapping_of
from lit_fast.optim.nonfinite import Guard, all_finite, check_nonfinite, guarded
from lit_fast.optim.split import SplitStep, has_split, on_parts, why_not_split
from lit_fast.optim.storage import asks_for_storage, given_options, keep_dtypes_on_load

_profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_NO_CLIPPING = (ops.NO_CLIPPING, ops.NO_CLIPPING)


class AdoptedOptimizer:
    """What `adopt` returns.

    Attributes:
        optimizer: the user's `torch.optim` object, the only owner of options and state.
        compiled: whether the core takes the steps. It turns False when a step meets what no kernel can do.
        reason: one sentence: which kernel, or why none.
        guard: what keeps steps with a NaN or an infinite gradient from being taken; None with nonfinite="propagate".
        around_own_step: entered whenever torch's own step runs, and left after it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: float | None,
        clip_value: float | None,
        norm_type: float = 2.0,
        per_group: bool = False,
        nonfinite: str = "propagate",
    ) -> None:
        self.optimizer = optimizer
        if any(map(asks_for_storage, optimizer.param_groups)):
            keep_dtypes_on_load(optimizer)  # a copy of an optimizer has lost it
        self.guard: Guard | None = None
        self.around_own_step: AbstractContextManager[None] = nullcontext()
        self._bound_clipping: tuple[float, bool] | None = None
        self.set_clipping(max_norm, clip_value, norm_type, per_group)
        check_nonfinite(nonfinite, self.device)
        self.set_guard(None if nonfinite == "propagate" else Guard(nonfinite))

    @property
    def skipped_steps(self) -> int:
        """Steps that nonfinite="skip" has left out. Waits for a GPU."""
        return 0 if self.guard is None else self.guard.skipped_steps

    def set_guard(self, guard: Guard | None) -> None:
        """Have `guard` asked before every step from now on; None: none is left out. Raises as `adopt` does."""
        if guard is not None:
            check_nonfinite(guard.nonfinite, self.device)
        self.guard = guard
        self._bind()

    def set_clipping(
        self,
        max_norm: float | None = None,
        clip_value: float | None = None,
        norm_type: float = 2.0,
        per_group: bool = False,
    ) -> None:
        """Replace everything about clipping; a limit of None switches one off. Raises as `adopt` does."""
        for name, limit in (("max_norm", max_norm), ("clip_value", clip_value)):
            if limit is not None and not _is_positive(limit):
                raise MisconfigurationException(
                    f"{name}={limit!r}: it must be a positive number, or None for no such clipping."
                )
        if max_norm is not None and clip_value is not None:
            raise MisconfigurationException(
                f"max_norm={max_norm}, clip_value={clip_value}: gradients are clipped by norm or by value. "
                "Leave one of them None."
            )
        if not _is_positive(norm_type):
            raise MisconfigurationException(f"norm_type={norm_type!r}: it must be a positive number, or infinity.")
        if per_group and max_norm is None:
            raise MisconfigurationException("per_group=True clips each group to max_norm, which is None: give it.")
        self._norm_type, self._per_group = float(norm_type), per_group
        if self._bound_clipping not in (None, (self._norm_type, per_group)):
            self._bind()
        self._max_norm = ops.NO_CLIPPING if max_norm is None else float(max_norm)
        self._clip_value = ops.NO_CLIPPING if clip_value is None else float(clip_value)

    def step(self, grad_scale: float | Tensor = 1.0, clip: bool = True) -> Tensor | None:
        """One optimizer step, clipping included. Gradients are rewritten only if a step hook could see them.

        Args:
            grad_scale: multiplies every gradient first: the inverse of a loss scale. On a GPU it may be a 0-dim tensor
                there, which nobody waits for.
            clip: False where `clip_gradients` has clipped already.

        Returns:
            With `max_norm`: the norm of the scaled gradients before clipping, a 0-dim float32 tensor on their
            device; with `per_group` a tensor of one for each group. Otherwise None.
        """
        optimizer = self.optimizer
        if (
            optimizer.__dict__.get("step") is not self._instance_step
            or type(optimizer).step is not self._class_step
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or PRE_HOOKS
            or POST_HOOKS
            or not self.compiled
            or self._asks_first
            or _profiler_enabled()
        ):
            return self._step_in_full(grad_scale, clip)
        max_norm, clip_value = (self._max_norm, self._clip_value) if clip else _NO_CLIPPING
        norm = self._core_step(optimizer.param_groups, optimizer.state, grad_scale, max_norm, clip_value)
        if isinstance(norm, str):
            return self._step_after_refusal(grad_scale, clip)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
        return ops.scalar(norm) if isinstance(norm, float) else norm

    def must_be_compiled(self) -> None:
        """Raise a KernelError where torch's own step would run on state that it would misread, or leave as it is."""
        if self.compiled:
            return
        asking = next(filter(asks_for_storage, self.optimizer.param_groups), None)
        if asking is not None:
            raise KernelError(
                f"{type(self.optimizer).__name__} with storage options ({given_options(asking)}) cannot step: "
                f"{self._why_not}. torch's own step knows none of them: leave them at their defaults for it. A state "
                f"saved with them is for lit_fast.optim, or for an optimizer that is adopted before it is loaded."
            )

    def zero_grad(self) -> None:
        """Release all gradients: every `p.grad` becomes None."""
        if self._own_zero_grad:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            ops.release_gradients(self.optimizer.param_groups)

    def clip_gradients(self, grad_scale: float = 1.0) -> Tensor | None:
        """Scale and clip the gradients in place, for whoever reads them before the step.

        The step that follows must not do it again: `step(clip=False)`.
        """
        return self._rewrite_gradients(grad_scale, *self._limits(True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.optimizer).__name__}: {self.reason})"

    # ---- binding ----

    def _bind(self) -> None:
        """Decide who steps. Again whenever `optimizer.step` turns out to be another function than before."""
        optimizer = self.optimizer
        self._instance_step = optimizer.__dict__.get("step")
        self._class_step = type(optimizer).step
        self._own_zero_grad = function_of(optimizer.zero_grad) is not Optimizer.zero_grad
        self._core_step: ops.Step = _refuse
        self._skips_on_device = False
        self._split = has_split(optimizer.param_groups)
        self._asks_first = self._split and self.guard is not None  # all processes take the same steps
        self._bound_clipping = self._norm_type, self._per_group
        name = type(optimizer).__name__
        mapping, why_not = mapping_of(optimizer)
        if mapping is not None:
            stepper = mapping.stepper(self.device)
            self._core_step = stepper.step
            if self._split:
                why_not = why_not_split(optimizer, mapping.formula)
                if not why_not:
                    with on_parts(optimizer.param_groups):
                        why_not = stepper.refusal(optimizer.param_groups)
                    self._core_step = SplitStep(stepper.step)
            else:
                why_not = stepper.refusal(optimizer.param_groups)
                self._skips_on_device = stepper.skips_on_device
            if self.guard is not None and not self._split:
                check_nonfinite(self.guard.nonfinite, stepper.device)
                self._core_step = guarded(stepper, self.guard)
            if self._per_group or self._norm_type != 2.0:
                self._core_step = _clipped_outside(self._core_step, self._norm_type, self._per_group)
        self.compiled, self._why_not = not why_not, why_not
        if self.compiled and mapping is not None:
            ways = dict.fromkeys(given_options(group) for group in optimizer.param_groups)
            stored = "".join(f"; {way}" for way in ways if way)
            parts = "; on this process's parts" if self._split else ""
            self.reason = f"{name}: compiled step ({mapping.formula} on {stepper.where}{stored}{parts})"
        else:
            self.reason = f"{name}: its own step, because {why_not}"

    @property
    def skips_on_device(self) -> bool:
        """Whether a guard has the next step left out by a GPU itself, and the host need not know."""
        return self._skips_on_device and self.compiled and not has_step_hooks(self.optimizer)

    @property
    def reads_gradients_first(self) -> bool:
        """Whether a step begins with a pass over all gradients: for their norm, or to see whether they are finite."""
        by_norm = self._max_norm >= 0.0 and self._norm_type == 2.0 and not self._per_group
        return by_norm or (self.guard is not None and not self.guard.told)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        first = next((p for group in self.optimizer.param_groups for p in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

    def _norm_of_torch(self, grad_scale: float | Tensor) -> Tensor:
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.numel()]
        gradients = [p.grad for p in params if p.grad is not None]
        return (get_total_norm(gradients, self._norm_type) * grad_scale).abs()

    def _limits(self, clip: bool) -> tuple[float, float]:
        return (self._max_norm, self._clip_value) if clip else _NO_CLIPPING

    def _try_core(self, grad_scale: float | Tensor, max_norm: float, clip_value: float) -> Tensor | str | None:
        """The core's step, its norm as a tensor; or why it refused, for good."""
        optimizer = self.optimizer
        result = self._core_step(optimizer.param_groups, optimizer.state, grad_scale, max_norm, clip_value)
        if isinstance(result, str):  # the parameters may have moved to another device since they were looked at
            self._bind()
            if not self.compiled:
                return self._why_not
            result = self._core_step(optimizer.param_groups, optimizer.state, grad_scale, max_norm, clip_value)
        return ops.scalar(result) if isinstance(result, float) else result

    def _step_after_refusal(self, grad_scale: float | Tensor, clip: bool) -> Tensor | None:
        norm = self._try_core(grad_scale, *self._limits(clip))
        if isinstance(norm, str):
            self._give_up(norm)
            return self._step_in_full(grad_scale, clip)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return norm

    def _give_up(self, why_not: str) -> None:
        self.compiled, self._why_not = False, why_not
        self.reason = f"{type(self.optimizer).__name__}: its own step, because {why_not}"
        warnings.warn(f"The compiled optimizer step is off from here on. {self.reason}.", stacklevel=3)

    # ---- the step with everything that can hang on it ----

    def _step_in_full(self, grad_scale: float | Tensor, clip: bool) -> Tensor | None:
        optimizer = self.optimizer
        if optimizer.__dict__.get("step") is not self._instance_step or type(optimizer).step is not self._class_step:
            self._bind()
        # Hooks and torch's own steps do not run for a step that is left out, so the host must know, whatever it costs;
        # before a clipping can hide it.
        in_memory = not self.compiled or self._split or has_step_hooks(self.optimizer)
        if in_memory and isinstance(grad_scale, Tensor):
            ops.scale_gradients_(optimizer.param_groups, grad_scale)
            grad_scale = 1.0
        if in_memory and self._leaves_out():
            return self._norm_of_torch(grad_scale) if clip and self._max_norm >= 0.0 else None
        if not self.compiled:
            return self._own_step(grad_scale, clip)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
            return self._step_with_hooks(grad_scale, clip)

    def _leaves_out(self) -> bool:
        if self.guard is None or all_finite(self.optimizer.param_groups):
            return False
        self.guard.refuse(self.optimizer.param_groups)
        return True

    def _step_with_hooks(self, grad_scale: float | Tensor, clip: bool) -> Tensor | None:
        """In torch's order: hooks see clipped gradients, as they do behind a `clip_grad_norm_`."""
        optimizer = self.optimizer
        pre_hooks = [*PRE_HOOKS.values(), *optimizer._optimizer_step_pre_hooks.values()]
        post_hooks = [*optimizer._optimizer_step_post_hooks.values(), *POST_HOOKS.values()]
        max_norm, clip_value = self._limits(clip)
        norm: Tensor | None = None
        if pre_hooks or post_hooks:
            norm = self._rewrite_gradients(grad_scale, max_norm, clip_value)
            grad_scale, (max_norm, clip_value) = 1.0, _NO_CLIPPING
        args: tuple[Any, ...] = (optimizer,)
        kwargs: dict[str, Any] = {}
        for hook in pre_hooks:
            changed = hook(optimizer, args, kwargs)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(f"a step pre-hook returned {changed!r}; it may return None or (args, kwargs).")
            args, kwargs = changed
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                closure()
        result = self._try_core(grad_scale, max_norm, clip_value) if self.compiled else self._why_not
        if isinstance(result, str):
            if self.compiled:
                self._give_up(result)
            self.must_be_compiled()
            if self._leaves_out():
                return norm
            clipped = self._rewrite_gradients(grad_scale, max_norm, clip_value)
            with torch.no_grad(), self.around_own_step:
                innermost(optimizer.step)(optimizer)  # below torch's wrappers, which would run the hooks again
        else:
            clipped = result
        norm = clipped if norm is None else norm
        optimizer._opt_called = True  # type: ignore[attr-defined]
        for post_hook in post_hooks:
            post_hook(optimizer, args, kwargs)
        return norm

    def _own_step(self, grad_scale: float | Tensor, clip: bool) -> Tensor | None:
        self.must_be_compiled()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times a step: call optimizer.step(closure) itself, without adopt."
            )
        norm = self._rewrite_gradients(grad_scale, *self._limits(clip))
        with self.around_own_step:
            self.optimizer.step()
        return norm

    @torch.no_grad()
    def _rewrite_gradients(self, grad_scale: float | Tensor, max_norm: float, clip_value: float) -> Tensor | None:
        if grad_scale == 1.0 and max_norm < 0.0 and clip_value < 0.0:
            return None
        if self._per_group and max_norm >= 0.0:
            groups = self.optimizer.param_groups
            return torch.stack([self._rewrite([g], grad_scale, max_norm, clip_value) for g in groups])  # type: ignore[misc]
        return self._rewrite(self.optimizer.param_groups, grad_scale, max_norm, clip_value)

    def _rewrite(
        self, param_groups: ops.ParamGroups, grad_scale: float | Tensor, max_norm: float, clip_value: float
    ) -> Tensor | None:
        if self.compiled and not self._split:
            try:
                return ops.clip_gradients_(param_groups, grad_scale, max_norm, clip_value, self._norm_type)
            except KernelError as error:  # nothing was changed
                self._give_up(str(error))
        params = [p for group in param_groups for p in group["params"] if p.numel()]  # torch: no inf norm of nothing
        if clip_value >= 0.0 or max_norm >= 0.0:
            ops.refuse_sparse_gradients(params)
        if grad_scale != 1.0:
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(grad_scale)
        if clip_value >= 0.0:
            clip_grad_value_(params, clip_value)
        return clip_grad_norm_(params, max_norm, self._norm_type) if max_norm >= 0.0 else None


def _clipped_outside(core_step: ops.Step, norm_type: float, per_group: bool) -> ops.Step:
    """The core's step, clipped by a norm that is not its own: in registers where the host may know one coefficient."""

    def step(
        param_groups: ops.ParamGroups, state: ops.State, grad_scale: Any, max_norm: float, clip_value: float
    ) -> Tensor | float | str | None:
        if max_norm < 0.0:
            return core_step(param_groups, state, grad_scale, max_norm, clip_value)
        parts = [[group] for group in param_groups] if per_group else [param_groups]
        try:
            norms = [ops.gradient_p_norm(part, norm_type, grad_scale) for part in parts]
        except KernelError as error:
            return str(error)
        scale = grad_scale
        for part, norm in zip(parts, norms, strict=True):
            coefficient = ops.clip_coefficient(norm, max_norm)
            if norm.is_cpu and not per_group:
                scale = grad_scale * coefficient.item()
            elif not norm.is_cpu or coefficient.item() != 1.0:
                ops.scale_gradients_(part, coefficient)
        refusal = core_step(param_groups, state, scale, *_NO_CLIPPING)
        if refusal is not None:
            return refusal
        return torch.stack(norms) if per_group else norms[0]

    return step


def _is_positive(limit: Any) -> bool:
    return isinstance(limit, (numbers.Real, Tensor)) and bool(limit > 0.0)  # type: ignore[operator]


def _refuse(*_: Any) -> str:
    raise AssertionError("an optimizer without a kernel was stepped by the core")

"""How each optimizer of a run is stepped: clipping, steps left out, the loss scale, and who may look meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import GRADIENT_OBSERVERS, is_overridden
from lit_fast.module import LightningModule
from lit_fast.optim.adopt import adopt
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.clip import step_by_shared_norm, step_clipped_by_norm
from lit_fast.optim.closure import calls_closure_itself, plain_step
from lit_fast.optim.grad_dtype import InParameterDtype
from lit_fast.optim.nonfinite import Guard
from lit_fast.optim.scaling import LossScale, is_torchs_own
from lit_fast.precision.amp import scaled_step

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class Stepping:
    """What one run's optimizers do within their steps, decided from the options and from who looks at gradients.

    Attributes:
        adopted: one for each of the Trainer's optimizers.
        scaler: the precision's gradient scaler, or None.
        by_plugin: whether the precision plugin takes the steps.
        in_place_clipping: whether the Trainer's clipping rewrites the gradients.
        unscales_in_registers: whether the step itself takes the loss scale off the gradients.
        guard: of `Trainer(nonfinite=...)`; None with "propagate".

    Args:
        before: what this one replaces: an optimizer that both have stays adopted.
        note: `note(point, who, what)` for `explain()`.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, before: Stepping | None, note: Callable[[str, str, str], None]
    ) -> None:
        self._trainer, self._module, self._note = trainer, module, note
        self._automatic, self._precision = module.automatic_optimization, trainer.precision_plugin
        self.scaler = getattr(self._precision, "scaler", None)
        self.by_plugin = self._precision.asks_for("optimizer_step")
        kept = {id(adopted.optimizer): adopted for adopted in before.adopted} if before is not None else {}
        self.adopted: list[AdoptedOptimizer] = [kept.get(id(each)) or adopt(each) for each in trainer.optimizers]
        self._loss_scales: list[LossScale] = []  # one an optimizer, where the core steps it under a scaler
        shared = trainer.strategy.shards_gradients
        if self.scaler is not None and is_torchs_own(self.scaler):
            self._loss_scales = [LossScale(self.scaler, adopted, shared) for adopted in self.adopted]
        watched = self.gradients_are_watched()
        self.in_place_clipping = bool(trainer.gradient_clip_val) and watched
        self.unscales_in_registers = self.scaler is not None and (self._automatic or shared) and not watched
        self.guard = self._bind_guard(before)
        self._guards = [self._guard_of(index) for index in range(len(self.adopted))]
        for adopted, guard in zip(self.adopted, self._guards, strict=True):
            self._set_options(adopted, guard)

    def step_of(self, index: int, after_backward: Callable[[], None]) -> Callable[..., Any]:
        """`step(closure=None, **kwargs)` of one optimizer, `after_backward` (hooks, clipping) within it."""
        adopted, update = self.adopted[index], self.update_of(index)
        if self.scaler is None:
            return plain_step(adopted, update, after_backward)
        compiled = partial(self._loss_scales[index].step, update) if self._loss_scales else None
        return scaled_step(
            self.scaler, adopted.optimizer, self._automatic, after_backward, compiled, self.unscales_in_registers
        )

    def gradients_are_watched(self) -> bool:
        """May something look at `p.grad` around the step? Then what the step would do in registers is written back."""
        if self._trainer.strategy.shards_gradients:
            return False
        if self._precision.asks_for("clip_gradients", "clip_grad_by_value", "clip_grad_by_norm", "main_params"):
            return True
        if self.by_plugin or any(map(calls_closure_itself, self._trainer.optimizers)):
            return True  # the optimizer's own step reads them
        observers = GRADIENT_OBSERVERS
        if self.scaler is not None:
            if not self._loss_scales or not all(scale.in_registers for scale in self._loss_scales):
                return True  # the scaler's own step does
            observers |= {"on_before_optimizer_step"}  # it sees them unscaled
        for callback in self._trainer.callbacks:
            if callback.reads_gradients and observers & callback.live_hooks(self._trainer):
                return True
        if any(is_overridden(name, self._module, LightningModule) for name in observers):
            return True
        return any(
            getattr(optimizer, registry, None)
            for optimizer in self._trainer.optimizers
            for registry in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        )

    def _set_options(self, adopted: AdoptedOptimizer, guard: Guard | None) -> None:
        trainer = self._trainer
        limit = trainer.gradient_clip_val if self._clips_in_registers else None
        by_value = trainer.gradient_clip_algorithm == "value"
        outside = self._clips_by_torch or trainer.strategy.shared_norm(adopted.optimizer) is not None  # see update_of
        adopted.set_clipping(max_norm=None if by_value or outside else limit, clip_value=limit if by_value else None)
        if guard is not adopted.guard:
            adopted.set_guard(None if outside else guard)
        if trainer.config.grad_dtype is not None:
            adopted.around_own_step = InParameterDtype(adopted.optimizer)

    def _guard_of(self, index: int) -> Guard | None:
        """Whoever is told of the steps of one optimizer that have a NaN or an infinite gradient."""
        if not self._loss_scales:
            return self.guard
        loss_scale = self._loss_scales[index]
        loss_scale.told = not self.unscales_in_registers
        return None if loss_scale.told and not self.adopted[index].skips_on_device else loss_scale

    def _bind_guard(self, before: Stepping | None) -> Guard | None:
        trainer = self._trainer
        nonfinite = trainer.config.nonfinite
        if nonfinite == "propagate":
            return None
        if self.by_plugin or any(map(calls_closure_itself, trainer.optimizers)):
            who = "the precision plugin" if self.by_plugin else "an optimizer that evaluates the loss itself"
            raise MisconfigurationException(
                f"Trainer(nonfinite={nonfinite!r}): {who} decides when a step is taken, so no step can be left out. "
                f"Use nonfinite='propagate', or an optimizer of torch's other than LBFGS."
            )
        self._note("update", "Trainer", f"nonfinite={nonfinite!r}: first, whether every gradient is finite")
        return before.guard if before is not None else Guard(nonfinite, trainer.strategy.named_parameters)

    def check_gradients(self) -> None:
        """At an epoch's end: wait for a device that may have left out steps, which are an error.

        Raises:
            NonFiniteGradientError: see `Guard.check`.
        """
        if self.guard is not None:
            self.guard.check([group for optimizer in self._trainer.optimizers for group in optimizer.param_groups])

    @property
    def _clips_by_torch(self) -> bool:
        """On the CPU a norm is clipped with torch's bits; on a GPU nobody waits for the norm."""
        trainer = self._trainer
        by_norm = self._clips_in_registers and trainer.gradient_clip_algorithm != "value"
        return by_norm and trainer.config.device.type == "cpu"

    @property
    def _clips_in_registers(self) -> bool:
        return self._automatic and bool(self._trainer.gradient_clip_val) and not self.in_place_clipping

    def update_of(self, index: int) -> Callable[..., Any]:
        """`update(grad_scale=1.0)`: one optimizer's step, clipped where that is done within."""
        adopted, strategy, guard = self.adopted[index], self._trainer.strategy, self._guards[index]
        limit = self._trainer.gradient_clip_val if self._clips_in_registers else None
        by_norm = None if self._trainer.gradient_clip_algorithm == "value" else limit or None
        norm = strategy.shared_norm(adopted.optimizer)
        update: Callable[..., Any] = adopted.step
        if norm is not None and (by_norm is not None or guard is not None):
            update = step_by_shared_norm(adopted, norm, by_norm, guard)
        elif norm is None and self._clips_by_torch:
            update = step_clipped_by_norm(adopted, self._trainer.gradient_clip_val, guard)
        return strategy.bind_update(adopted.optimizer, update)

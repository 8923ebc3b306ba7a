"""Binding: from what a module, its callbacks and the options ask for, to the tuples of callables that a step runs.

Everything that can be decided before a step is decided here, once. A `Binding` holds what was decided, as one
`StepPlan` for a whole window, and makes from it the plan of each place in a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_fast import step
from lit_fast.backward import Losses, detached, manual_outputs, no_backward, no_losses, outputs_of
from lit_fast.calls import (
    Bound,
    Called,
    at_epoch_end,
    every,
    in_table,
    name_of,
    no_closure,
    not_none,
    positional_arguments,
    run_all,
    unless_none,
    without_index,
)
from lit_fast.data.loader_iterator import hook_of, step_of, takes_iterator
from lit_fast.hooks import is_overridden
from lit_fast.metrics import MetricLog, Table
from lit_fast.module import LightningModule
from lit_fast.optim.closure import calls_closure_itself
from lit_fast.optim.grad_dtype import InParameterDtype
from lit_fast.optim.lightning_optimizer import LightningOptimizer
from lit_fast.optim.nonfinite import unless_nonfinite
from lit_fast.profiler.actions import recorded
from lit_fast.stepping import Stepping
from lit_fast.window import Place, WindowWeights, before_the_step, bind_backward, bind_mean, zero_for_none

if TYPE_CHECKING:
    from lit_fast.progress import Progress
    from lit_fast.trainer import Trainer


class SkipEpoch(Exception):
    """`on_train_batch_start` returned -1: the rest of the epoch is left out."""


@dataclass(slots=True)
class StepPlan:
    """What one micro-batch runs, by point of the step, in execution order (see step.py)."""

    run: Callable[[StepPlan, Any, int], None]
    log: MetricLog
    progress: Progress
    table: Table
    receive: Bound
    on_train_batch_start: Bound
    training_step: Callable[[Any, int], Any]
    zero_grad: Bound
    losses: Losses
    on_before_backward: Bound
    backward: Callable[[Tensor], None]
    on_after_backward: Bound
    on_before_optimizer_step: Bound
    clip: Bound
    update: Bound
    steps: int
    schedulers: Bound
    on_train_batch_end: Bound
    optimizer_step: Callable[[int, Callable[[], Any]], None]
    returned_loss: Callable[[Any], Tensor | None]


class Binding:
    """What one run's steps do, decided from the module, the callbacks, the optimizers and the options as they stand.

    Args:
        before: the binding that this one replaces: an optimizer that both have stays adopted, its
            `LightningOptimizer` stays the same object, and losses that came with weights go on doing so.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, before: Binding | None = None) -> None:
        self.trainer, self.module = trainer, module
        self.log, self.progress = trainer._metric_log, trainer._progress
        self.wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]] = (
            trainer._profiler.wrap if trainer._profiler is not None else lambda phase, function: function
        )
        self.rows: list[tuple[str, str, str]] = []  # (point, who asked, what it does), for explain()
        self.window: int = trainer.accumulate_grad_batches
        self.several = trainer.strategy.world_size > 1
        self.weights: WindowWeights | None = before.weights if before is not None else None  # until there is one
        self.placed: dict[Place, StepPlan] = {}
        self.automatic = module.automatic_optimization
        self.precision = trainer.precision_plugin
        self.trains = not trainer.fit_loop._skip_backward
        wrapped = before.lightning_optimizers if before is not None else []
        stepped = before.stepping if before is not None else None
        self.stepping: Stepping = Stepping(trainer, module, stepped, self._note)
        if not self.automatic:
            for adopted in self.stepping.adopted:
                self._note("update", type(adopted.optimizer).__name__, f"where it is called: {adopted.reason}")
        arguments = {"on_before_backward": 1, "on_after_backward": 0, "on_before_optimizer_step": 1}
        self.step_hooks = {name: self._hooks(name, count) for name, count in arguments.items()}
        self.plugin_backward = self.precision.asks_for("pre_backward", "backward", "post_backward")
        # Hooks that `backward` itself has to call: what they see is not what `losses` gives, or a plugin calls them.
        self._hooks_in_backward = self.plugin_backward or self.stepping.scaler is not None
        self.lightning_optimizers: list[LightningOptimizer] = self._wrap_optimizers(wrapped)
        needs_closure = self._steps_inline and (
            self.overrides("optimizer_step")
            or self.stepping.by_plugin
            or self.stepping.scaler is not None
            or calls_closure_itself(trainer.optimizers[0])
        )
        self.whole = StepPlan(
            run=step.closure if needs_closure else step.inline,
            log=self.log,
            progress=self.progress,
            table=self.log.table("training_step", "train"),
            receive=self._bind_receive(),
            on_train_batch_start=self._bind_batch_start(),
            training_step=self._bind_training_step(reduces=True),
            zero_grad=self._bind_zero_grad(),
            losses=no_losses,
            on_before_backward=() if self._hooks_in_backward else self.automatic_hooks("on_before_backward"),
            backward=no_backward,
            on_after_backward=() if self.plugin_backward else self.automatic_hooks("on_after_backward"),
            on_before_optimizer_step=self._before_step(0) if self._steps_inline else (),
            clip=self._bind_clip() if self._steps_inline else (),
            update=self._bind_update() if self._steps_inline else (),
            steps=1 if self.automatic and trainer.optimizers else 0,
            schedulers=self._bind_schedulers(),
            on_train_batch_end=(),
            optimizer_step=self._bind_optimizer_step(),
            returned_loss=detached(no_losses),
        )
        self._bind_batch_end(no_losses, note=True)
        self.rows.extend(trainer.strategy.note_rows())

    def place(self, place: Place) -> StepPlan:
        """The plan of a micro-batch at that place of its window."""
        if place not in self.placed:
            self.placed[place] = self._bind_place(place)
        return self.placed[place]

    def _bind_place(self, place: Place) -> StepPlan:
        losses, backward, shown = bind_backward(self, place)
        by_strategy = self.trainer.strategy.bind_backward(backward, place.last) if self.automatic else backward
        plan = replace(
            self.whole,
            training_step=self.whole.training_step if place.last else self._bind_training_step(reduces=False),
            losses=losses,
            backward=self.wrap("backward", self._by_strategy("backward", by_strategy)),
            returned_loss=detached(shown),
            on_train_batch_end=self._bind_batch_end(shown),
        )
        if not place.first:
            plan.zero_grad = ()
        if place.last and self._steps_inline:
            bind_mean(self, plan, place)
            for take_part in self.trainer.strategy.before_step():
                before_the_step(plan, plan.run is step.inline, take_part)
                plan.returned_loss = zero_for_none(plan.returned_loss)
        if not place.last and self.automatic:
            plan.run = step.inline
            plan.on_before_optimizer_step = plan.clip = plan.update = plan.schedulers = ()
            plan.steps = 0
        if not self.trains:  # an epoch that only runs forward
            plan.run, plan.losses, plan.steps = step.inline, no_losses, 0
            plan.zero_grad = plan.on_before_optimizer_step = plan.clip = plan.update = plan.schedulers = ()
        if not_none in plan.receive:
            plan.run = unless_none(plan.run)
        plan.run = self.wrap("loop", recorded(self.trainer._actions, "run_training_batch", plan.run))
        if self.trainer._profiler is not None:
            plan.run = self.trainer._profiler.bind_run(plan.run, place.last)
        return plan

    def weigh(self) -> WindowWeights:
        """From here on every loss comes with a weight: bind the plans anew, those too that are in somebody's hands."""
        weights = self.weights = WindowWeights(self.trainer.strategy)
        for place, plan in self.placed.items():
            bound = self._bind_place(place)
            for field in fields(StepPlan):
                setattr(plan, field.name, getattr(bound, field.name))
        return weights

    def _by_strategy(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """What Lightning's strategies do, as that action where a profiler records those."""
        return recorded(self.trainer._actions, self.trainer._strategy_action(name), function)

    def parameters(self) -> Iterator[nn.Parameter]:
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def multiply_gradients(self, factor: float | Tensor) -> None:
        self.trainer.strategy.multiply_gradients(self.parameters(), factor)

    @property
    def _steps_inline(self) -> bool:
        return self.automatic and bool(self.trainer.optimizers)

    def automatic_hooks(self, name: str) -> Bound:
        return self.step_hooks[name] if self.automatic else ()

    def _before_step(self, index: int) -> Bound:
        """`on_before_optimizer_step` for one optimizer, as calls without arguments."""
        optimizer = self.trainer.optimizers[index]
        return tuple(partial(hook, optimizer) for hook in self.step_hooks["on_before_optimizer_step"])

    def overrides(self, name: str) -> bool:
        return is_overridden(name, self.module, LightningModule)

    def _note(self, point: str, who: str, what: str) -> None:
        self.rows.append((point, who, what))

    def _wrap_optimizers(self, before: list[LightningOptimizer]) -> list[LightningOptimizer]:
        """What user code holds as `self.optimizers()`; it may keep it, so the object stays while its optimizer does."""
        known = {id(wrapped.optimizer): wrapped for wrapped in before}
        wrappers = []
        for index, optimizer in enumerate(self.trainer.optimizers):
            wrapper = known.get(id(optimizer)) or LightningOptimizer(optimizer)
            release = self.wrap("optimizer", self.stepping.adopted[index].zero_grad)
            wrapper.bind(self._user_step(index), release, self.trainer.optimizers)
            wrappers.append(wrapper)
        return wrappers

    def _hooks(self, name: str, arguments: int) -> Bound:
        """Every live hook of that name, callbacks first, ready to be called with that many arguments of the hook's."""
        table = self.log.table(name, "train")
        bound = [
            self.trainer._timed(owner, name, in_table(hook, self.log, table, arguments))
            for owner, hook in self._live_hooks(name)
        ]
        if name in ("on_train_batch_start", "on_train_batch_end") and takes_iterator(self.module.training_step):
            return tuple(map(hook_of, bound))
        return tuple(bound)

    def _live_hooks(self, name: str) -> Iterator[tuple[Any, Callable[..., Any]]]:
        """Every live hook of that name and its owner, callbacks first, given what comes before its own arguments."""
        for callback in self.trainer.callbacks:
            if name in callback.live_hooks(self.trainer):
                self._note(name, type(callback).__name__, "callback")
                yield callback, partial(self.trainer._method(callback, name), self.trainer, self.module)
        if self.overrides(name):
            self._note(name, type(self.module).__name__, "module")
            yield self.module, self.trainer._method(self.module, name)

    def _bind_receive(self) -> Bound:
        """How a batch gets to the device; nothing at all on the CPU in full precision."""
        receivers = self.trainer._batch_receivers(self.log, "train")
        if takes_iterator(self.module.training_step):
            receivers = ()  # the step moves what it fetches
        for function in receivers:
            self._note("receive", "data", name_of(function))
        bound = tuple(self.wrap("transfer", function) for function in receivers)
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        return (*bound, not_none) if bound and any(map(self.trainer._data_hook, hooks)) else bound

    def _bind_batch_start(self) -> Bound:
        hooks = self._hooks("on_train_batch_start", 2)
        if not self.overrides("on_train_batch_start"):
            return hooks
        module_hook = hooks[-1]

        def checked(batch: Any, batch_idx: int) -> None:
            if module_hook(batch, batch_idx) == -1:
                raise SkipEpoch

        return (*hooks[:-1], checked)

    def _bind_training_step(self, reduces: bool) -> Callable[[Any, int], Any]:
        function = self.module.training_step
        who = f"{type(self.module).__name__}.training_step"
        if takes_iterator(function):
            function = step_of(function)
        try:
            positional = positional_arguments(function)
        except (TypeError, ValueError):  # compiled or built-in: no signature to read
            positional = 2
        if positional < 2:
            one_argument = function

            def function(batch: Any, batch_idx: int) -> Any:
                return one_argument(batch)

        self._note("training_step", who, f"forward in {self.precision.precision}")
        forward = self.trainer.strategy.bind_step(self.precision.bind(function), reduces)
        return self.wrap("forward", self._by_strategy("training_step", forward))

    def _bind_zero_grad(self) -> Bound:
        if not self._steps_inline:
            return ()
        optimizer = self.trainer.optimizers[0]
        before = self.log.table("on_before_zero_grad", "train")
        hooks = [
            self.trainer._timed(owner, "on_before_zero_grad", without_index(partial(hook, optimizer), self.log, before))
            for owner, hook in self._live_hooks("on_before_zero_grad")
        ]
        if self.overrides("optimizer_zero_grad"):
            table = self.log.table("optimizer_zero_grad", "train")
            hook = in_table(self.trainer._hook(self.module, "optimizer_zero_grad"), self.log, table, 3)
            progress = self.progress
            self._note("zero_grad", type(self.module).__name__, "optimizer_zero_grad, overridden")
            return (*hooks, lambda batch_idx: hook(progress.epoch, batch_idx, optimizer))
        release = self.stepping.adopted[0].zero_grad
        self._note("zero_grad", "lit_fast", "gradients released (set to None): backward writes them anew")
        return (
            *hooks,
            self.wrap("optimizer", self.trainer._recorded("optimizer_zero_grad", lambda batch_idx: release())),
        )

    def _bind_clip(self) -> Bound:
        trainer, module, optimizer = self.trainer, self.module, self.trainer.optimizers[0]
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        how = getattr(algorithm, "value", algorithm) or "norm"
        if self.overrides("configure_gradient_clipping") or self.overrides("clip_gradients"):
            table = self.log.table("configure_gradient_clipping", "train")
            clip = partial(
                self.trainer._hook(module, "configure_gradient_clipping"),
                optimizer,
                gradient_clip_val=value,
                gradient_clip_algorithm=algorithm,
            )
            self._note("clip", type(module).__name__, "its own gradient clipping")
            return (self.wrap("optimizer", in_table(clip, self.log, table, 0)),)
        if not value:
            return ()
        if self.stepping.in_place_clipping:
            self._note("clip", "Trainer", f"by {how} {value}, in place: a hook can see the gradients afterwards")
            rewrite: Callable[..., None] = self.precision.clip_gradients
            # By norm a NaN or an infinity leaves NaN, which a GPU finds in the step, so nobody need wait for it here.
            if self.stepping.guard is not None and (how == "value" or trainer.config.device.type == "cpu"):
                rewrite = unless_nonfinite(rewrite)
            in_place = self.trainer._recorded(
                "configure_gradient_clipping", lambda: rewrite(optimizer, value, algorithm)
            )
            return (self.wrap("optimizer", in_place),)
        if not self.trainer.strategy.has_engine:
            self._note("clip", "Trainer", f"by {how} {value}, in registers during the optimizer's step")
        return ()

    def _bind_update(self) -> Bound:
        stepping, adopted = self.stepping, self.stepping.adopted[0]
        if not self.trainer.strategy.has_engine:
            self._note("update", type(adopted.optimizer).__name__, adopted.reason)
        if stepping.scaler is not None:
            how = "in registers, by the step" if stepping.unscales_in_registers else "in memory: something can see them"
            self._note("update", type(stepping.scaler).__name__, f"gradients unscaled {how}")
        if self.trainer.config.grad_dtype is not None:
            read = "as they are" if adopted.compiled else "cast to their parameters' dtype"
            self._note("update", "Trainer", f"float32 gradients of 16-bit parameters are read {read}")
        return (self.wrap("optimizer", self.trainer._recorded("optimizer_step", stepping.update_of(0))),)

    def _bind_schedulers(self) -> Bound:
        if not self.automatic:
            return ()
        bound: list[Callable[[int], None]] = []
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:
                continue
            advance = self.trainer._scheduler_step(config)
            if config.interval == "step":
                bound.append(every(config.frequency, advance))
            else:
                bound.append(at_epoch_end(config.frequency, advance, self.progress))
            self._note("schedulers", type(config.scheduler).__name__, f"every {config.frequency} {config.interval}(s)")
        return tuple(self.wrap("schedulers", function) for function in bound)

    def _bind_batch_end(self, losses: Callable[[Any], tuple[Tensor, ...]], note: bool = False) -> Bound:
        before = len(self.rows)
        hooks = self._hooks("on_train_batch_end", 3)
        if not note:
            del self.rows[before:]
        if not hooks:
            return ()

        def on_train_batch_end(output: Any, batch: Any, batch_idx: int) -> None:
            if batch is None:  # it was skipped
                outputs = None
            else:
                outputs = outputs_of(output, losses) if self.automatic else manual_outputs(output)
            for hook in hooks:
                hook(outputs, batch, batch_idx)

        return (on_train_batch_end,)

    def _bind_optimizer_step(self) -> Callable[[int, Callable[[], Any]], None]:
        """What the closure shape calls: the user's `optimizer_step`, or the optimizer with its closure."""
        if not self._steps_inline:
            return lambda batch_idx, closure: None
        module, progress, log = self.module, self.progress, self.log
        optimizer, table = self.lightning_optimizers[0], self.log.table("optimizer_step", "train")
        if self.overrides("optimizer_step"):
            self._note("update", type(module).__name__, "optimizer_step, overridden: it decides when the closure runs")

            def checked(batch_idx: int, closure: Callable[[], Any]) -> None:
                log.current, called = table, Called(closure)
                module.optimizer_step(progress.epoch, batch_idx, optimizer, called)
                called.check(module)

            return self.wrap("optimizer", self.trainer._recorded("optimizer_step", checked))

        def optimizer_step(batch_idx: int, closure: Callable[[], Any]) -> None:
            log.current = table
            module.optimizer_step(progress.epoch, batch_idx, optimizer, closure)

        return self.wrap("optimizer", self.trainer._recorded("optimizer_step", optimizer_step))

    def _user_step(self, index: int) -> Callable[..., Any]:
        """What `LightningOptimizer.step(closure)` does: closure, hooks, clipping, then the compiled or own step."""
        stepping, optimizer, progress = self.stepping, self.trainer.optimizers[index], self.progress
        after = (*self._before_step(index), *(self._bind_clip() if self.automatic else ()))
        wide = self.trainer.config.grad_dtype is not None
        casts = InParameterDtype(optimizer) if wide and calls_closure_itself(optimizer) else None
        if casts is not None:
            after = (*after, casts.cast)
        if stepping.by_plugin:
            step_by_plugin, module = self.precision.optimizer_step, self.module
            run_step: Callable[..., Any] = lambda closure, **kwargs: step_by_plugin(  # noqa: E731
                optimizer, model=module, closure=closure or no_closure, **kwargs
            )
        else:
            run_step = stepping.step_of(index, lambda: run_all(after))
        if casts is not None:
            run_step = casts.around(run_step)
        if self.automatic:
            return run_step

        def counted(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            result = run_step(closure, **kwargs)
            progress.global_step += 1
            return result

        step_of_user = self.wrap("optimizer", recorded(self.trainer._actions, "optimizer_step", counted))
        if self.trainer._profiler is None:
            return step_of_user

        def with_timed_closure(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            return step_of_user(None if closure is None else self.wrap("forward", closure), **kwargs)

        return with_timed_closure

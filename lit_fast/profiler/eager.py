"""The loop that a careful user writes by hand for a module: plain PyTorch, as source that can be read, and run.

It is what `lit-fast profile --against eager` measures us against: torch's own optimizer, autocast, scaler and clipping,
no callbacks, no logging. The source holds only the lines that this module and these options need. What the module
itself defines (its hooks, its transfer of a batch) is called in its place, for by hand it would be written there.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_fast.backward import loss_of, outputs_of, read_losses, weight_of
from lit_fast.config import batch_limit
from lit_fast.data.combined import CombinedLoader, is_collection
from lit_fast.data.datamodule import LightningDataModule
from lit_fast.data.loader_iterator import takes_iterator
from lit_fast.data.position import tell_epoch
from lit_fast.data.randomness import length_of
from lit_fast.data.transfer import move
from lit_fast.errors import NotByHandError, ProfileError
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule
from lit_fast.optim.closure import calls_closure_itself
from lit_fast.optim.configure import parse_optimizers
from lit_fast.optim.lightning_optimizer import LightningOptimizer
from lit_fast.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lit_fast.precision.precision import default_dtype
from lit_fast.profiler.manual import time_manual
from lit_fast.seed import seed_workers

if TYPE_CHECKING:
    from lit_fast.profiler.step import StepProfiler
    from lit_fast.trainer import Trainer

_FILE = "<the loop by hand>"


class EagerLoop:
    """Trains a module by the loop that `source` shows; each `next` of `steps` is one micro-batch.

    Args:
        module: trained in place: hand over a copy.
        trainer: whose options hold (precision, accumulation, clipping, limits, device); it is only read.
        data: what would be passed to `fit`; None where a datamodule or the module has the loader.
        datamodule: set up already.
        clock: times the phases, as it does ours.

    Raises:
        ProfileError: the module, its optimizer or an option has no counterpart in a loop by hand.

    Example::

        loop = EagerLoop(copy.deepcopy(module), trainer, loader, None, clock)
        print(loop.source)
        for _ in islice(loop.steps, 100):
            pass
    """

    def __init__(
        self, module: LightningModule, trainer: Trainer, data: Any, datamodule: Any, clock: StepProfiler
    ) -> None:
        refuse(module, trainer)
        self.module, self.clock, self.config = module, clock, trainer.config
        self._owner = datamodule
        self._names: dict[str, Any] = {"count": count, "islice": islice, "set_epoch": tell_epoch}
        self._says: list[str] = []
        self._place = "cpu" if self.config.device.type == "cpu" else str(self.config.device)
        self.run = self._names["run"] = ByHand(trainer, datamodule)
        self._set_up()
        self.loader = self._loader(data)
        self.source = "\n".join([*self._prologue(), *self._lines()]) + "\n"
        linecache.cache[_FILE] = (len(self.source), None, self.source.splitlines(keepends=True), _FILE)
        exec(compile(self.source, _FILE, "exec"), self._names)
        self.steps: Iterator[None] = clock.wrap_items("loop", self._names["steps"]())

    # -- before the first step

    def _set_up(self) -> None:
        """Module, optimizers and schedulers, in the order in which `fit` makes them."""
        module, plugin = self.module, self.config.precision
        module.trainer = self.run  # type: ignore[assignment]
        module.__dict__.update(log=_nothing, log_dict=_nothing)  # a user who wants speed prints nothing either
        module.setup("fit")
        module.configure_sharded_model()
        module.configure_model()
        if isinstance(plugin, HalfPrecision | DoublePrecision):
            module.to(plugin.dtype)
        module.to(self.config.device)
        found = parse_optimizers(module.configure_optimizers(), module.automatic_optimization)
        self.run.optimizers, self.run.lr_scheduler_configs = found
        if not self.run.optimizers:
            raise ProfileError(
                f"{type(module).__name__}.configure_optimizers returned no optimizer: nothing is trained."
            )
        for optimizer in self.run.optimizers:
            if calls_closure_itself(optimizer):
                raise ProfileError(
                    f"{type(optimizer).__name__} decides itself when the loss is evaluated (by a closure), so there is "
                    f"no one loop by hand to compare with; torch's optimizers other than LBFGS have one."
                )
        for config in self.run.lr_scheduler_configs:
            if config.reduce_on_plateau and module.automatic_optimization:
                raise ProfileError(
                    f"{type(config.scheduler).__name__} watches a logged value, and the loop by hand logs nothing; "
                    f"compare without it."
                )
        self.run.strategy.wrap(self.run, self.clock)
        if not module.automatic_optimization:
            time_manual(self.clock, module, [config.scheduler for config in self.run.lr_scheduler_configs])
        if is_overridden("on_fit_start", module, LightningModule):
            module.on_fit_start()

    def _loader(self, data: Any) -> Any:
        if data is None:
            theirs = self._owner is not None and is_overridden("train_dataloader", self._owner, LightningDataModule)
            data = (self._owner if theirs else self.module).train_dataloader()
        seed_workers(data, 0)
        limit = self.config.limit_train_batches
        if is_collection(data):
            data = CombinedLoader(data, "max_size_cycle")
        if isinstance(data, CombinedLoader):
            length = data.length
            limits = [batch_limit("limit_train_batches", limit, length_of(each)) for each in data.flattened]
            data.limits = [float("inf") if batches is None else batches for batches in limits]
            batches = data.length
        else:
            length = length_of(data)
            batches = batch_limit("limit_train_batches", limit, length)
        self.total = batches if length is not None else None
        self._limit = batches if batches != length else None
        if length is None and self.config.accumulate_grad_batches > 1:
            raise ProfileError(
                f"The training data ({type(data).__name__}) has no length, so a loop by hand cannot know which window "
                f"of accumulate_grad_batches={self.config.accumulate_grad_batches} is the last and shorter. Give it a "
                f"__len__, or compare with accumulate_grad_batches=1."
            )
        self.run.num_training_batches = float("inf") if self.total is None else self.total
        return data

    # -- the source

    def _bind(self, name: str, function: Any, says: str, phase: str | None = None) -> str:
        """A name that the source uses, timed as `phase`, and the line that says what it is."""
        self._names[name] = function if phase is None else self.clock.wrap(phase, function)
        self._says.append(f"# {name}: {says}")
        return name

    def _hook(self, name: str) -> bool:
        """Whether the module defines that hook; it is bound then."""
        if not is_overridden(name, self.module, LightningModule):
            return False
        self._bind(name, getattr(self.module, name), f"{type(self.module).__name__}.{name}", "hooks")
        return True

    def _prologue(self) -> list[str]:
        self._body = self._step()  # binds the names that stand in the prologue
        return [f"# {type(self.module).__name__} by hand", *self._says, ""]

    def _lines(self) -> list[str]:
        batches = "batches" if self._limit is None else f"islice(batches, {self._limit})"
        several = isinstance(self.loader, CombinedLoader)
        start, epoch_start, end = map(self._hook, ("on_train_start", "on_train_epoch_start", "on_train_epoch_end"))
        return [
            "def steps():",
            *(["    on_train_start()"] if start else []),
            "    for epoch in count():",
            "        run.current_epoch = epoch",
            "        set_epoch(loader, epoch)",
            *(["        on_train_epoch_start()"] if epoch_start else []),
            f"        batches = fetch({'(batch for batch, _, _ in loader)' if several else 'iter(loader)'})",
            f"        for batch_idx, batch in enumerate({batches}):",
            *(f"            {line}" for line in self._body),
            *(f"        {line}" for line in self._epoch_end()),
            *(["        on_train_epoch_end()"] if end else []),
        ]

    def _step(self) -> list[str]:
        """The lines of one micro-batch, the step of its window included."""
        module, window = self.module, self.config.accumulate_grad_batches
        self._bind("loader", self.loader, f"{type(self.loader).__name__}, {self.total or 'unknown'} batches an epoch")
        self._bind("fetch", self.clock.wrap_batches, "the same batches, the wait for each one timed")
        lines = self._receive()
        if self._hook("on_train_batch_start"):
            lines.append("on_train_batch_start(batch, batch_idx)")
        ends = self._hook("on_train_batch_end")
        self._bind_forward()
        if not module.automatic_optimization:
            lines.append("forward(batch, batch_idx)  # backward and the optimizers' steps run in it, timed apart")
            ended = ["on_train_batch_end({}, batch, batch_idx)"] if ends else []
            return [*lines, *ended, "yield"]
        lines.append("output = forward(batch, batch_idx)")
        self._bind("read", _loss, "the loss in what training_step returned")
        lines.append("loss = read(output)")
        step = self._optimizer_lines()
        if window == 1:
            lines += [*self._zero_grad(), *self._backward(None), *step]
        else:
            assert self.total is not None
            lines += [f"if batch_idx % {window} == 0:", *_inside(self._zero_grad())]
            whole, rest = self.total - self.total % window, self.total % window
            divisor = f"({window} if batch_idx < {whole} else {rest})" if rest else str(window)
            lines += self._backward(divisor)
            last = f" or batch_idx == {self.total - 1}" if rest else ""
            lines += [f"if (batch_idx + 1) % {window} == 0{last}:", *_inside(step)]
        if ends:
            self._names["outputs_of"] = partial(outputs_of, losses=read_losses)
            lines.append("on_train_batch_end(outputs_of(output), batch, batch_idx)")
        return [*lines, "yield"]

    def _receive(self) -> list[str]:
        lines, device = [], self.config.device
        if self.config.precision.converts_input:
            cast = self.config.precision.convert_input
            self._bind("cast", cast, f"floating-point tensors to {self.config.precision.precision}", "transfer")
            lines.append("batch = cast(batch)")
        for name, arguments in (
            ("on_before_batch_transfer", "batch, 0"),
            ("transfer_batch_to_device", "batch, run.device, 0"),
            ("on_after_batch_transfer", "batch, 0"),
        ):
            owner: Any = self.module
            if self._owner is not None and is_overridden(name, self._owner, LightningDataModule):
                owner = self._owner
            elif not is_overridden(name, self.module, LightningModule):
                owner = None
            if owner is not None:
                self._bind(name, getattr(owner, name), f"{type(owner).__name__}.{name}", "transfer")
                lines.append(f"batch = {name}({arguments})")
            elif name == "transfer_batch_to_device" and device.type != "cpu":
                to_device = partial(move, device=device, non_blocking=True)
                self._bind("to_device", to_device, f"every tensor .to({device}, non_blocking=True)", "transfer")
                lines.append("batch = to_device(batch)")
        return lines

    def _bind_forward(self) -> None:
        step, plugin = self.module.training_step, self.config.precision
        name = f"{type(self.module).__name__}.training_step"
        parameters = inspect.signature(step).parameters.values()
        one = len(parameters) == 1 and not any(each.kind is each.VAR_POSITIONAL for each in parameters)
        context: Any = nullcontext()
        says = name
        if isinstance(plugin, MixedPrecision):
            context = torch.autocast(self.config.device.type, plugin.dtype)
            says = f"{name} under torch.autocast({self.config.device.type!r}, {plugin.dtype})"
        elif isinstance(plugin, HalfPrecision | DoublePrecision):
            context = default_dtype(plugin.dtype)
            says = f"{name}, new tensors in {plugin.dtype}"

        def forward(batch: Any, batch_idx: int) -> Any:
            with context:
                return step(batch) if one else step(batch, batch_idx)

        def plain(batch: Any, batch_idx: int) -> Any:
            return step(batch)

        bare = isinstance(context, nullcontext)
        self._bind("forward", (plain if one else step) if bare else forward, says, "forward")

    def _zero_grad(self) -> list[str]:
        lines = ["on_before_zero_grad(optimizer)"] if self._hook("on_before_zero_grad") else []
        if is_overridden("optimizer_zero_grad", self.module, LightningModule):
            self._hook("optimizer_zero_grad")
            return [*lines, "optimizer_zero_grad(epoch, batch_idx, optimizer)"]
        self._bind("zero_grad", self.run.optimizers[0].zero_grad, "optimizer.zero_grad", "optimizer")
        return [*lines, "zero_grad()"]

    def _backward(self, divisor: str | None) -> list[str]:
        lines = ["on_before_backward(loss)"] if self._hook("on_before_backward") else []
        if divisor is not None:
            lines = [f"loss = loss / {divisor}", *lines]
        own = is_overridden("backward", self.module, LightningModule)
        backward, says = (self.module.backward, "the module's own") if own else (Tensor.backward, "loss.backward()")
        self._bind("backward", backward, says, "backward")
        lines.append("backward(loss)" if self.run.scaler is None else "backward(scale(loss))")
        return [*lines, *(["on_after_backward()"] if self._hook("on_after_backward") else [])]

    def _optimizer_lines(self) -> list[str]:
        """What follows the last backward of a window."""
        optimizer, scaler, module = self.run.optimizers[0], self.run.scaler, self.module
        self._bind("optimizer", optimizer, f"torch.optim.{type(optimizer).__name__}, its own step")
        lines = []
        hook = self._hook("on_before_optimizer_step")
        clip = self._bind_clip()
        if scaler is not None:
            self._bind("scale", scaler.scale, "GradScaler.scale", "backward")
            if hook or clip:
                self._bind("unscale_", scaler.unscale_, "GradScaler.unscale_", "optimizer")
                lines.append("unscale_(optimizer)")
        lines += ["on_before_optimizer_step(optimizer)"] if hook else []
        lines += ["clip()"] if clip else []
        if scaler is None:
            self._bind("step", optimizer.step, "optimizer.step", "optimizer")
            lines.append("step()")
        else:
            self._bind("step", scaler.step, "GradScaler.step", "optimizer")
            self._bind("update", scaler.update, "GradScaler.update", "optimizer")
            lines += ["step(optimizer)", "update()"]
        lines.append("run.global_step += 1")
        for index, config in enumerate(self.run.lr_scheduler_configs):
            if config.interval == "step":
                name = self._bind_schedule(index, config, module)
                if config.frequency > 1:
                    lines += [f"if (batch_idx + 1) % {config.frequency} == 0:", f"    {name}()"]
                else:
                    lines.append(f"{name}()")
        return lines

    def _bind_clip(self) -> bool:
        module, optimizer, config = self.module, self.run.optimizers[0], self.config
        value, algorithm = config.gradient_clip_val, config.gradient_clip_algorithm
        if any(is_overridden(name, module, LightningModule) for name in _OWN_CLIPPING):
            clip = partial(module.configure_gradient_clipping, optimizer, value, algorithm)
            self._bind("clip", clip, f"{type(module).__name__}.configure_gradient_clipping", "optimizer")
            return True
        if not value:
            return False
        name = "clip_grad_value_" if algorithm == "value" else "clip_grad_norm_"
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip = partial(getattr(nn.utils, name), parameters, value)
        self._bind("clip", clip, f"torch.nn.utils.{name}(parameters, {value})", "optimizer")
        return True

    def _bind_schedule(self, index: int, config: Any, module: LightningModule) -> str:
        step = config.scheduler.step
        if is_overridden("lr_scheduler_step", module, LightningModule):
            step = partial(module.lr_scheduler_step, config.scheduler, None)
        return self._bind(f"schedule_{index}", step, f"{type(config.scheduler).__name__}.step", "schedulers")

    def _epoch_end(self) -> list[str]:
        if not self.module.automatic_optimization:
            return []
        lines = []
        for index, config in enumerate(self.run.lr_scheduler_configs):
            if config.interval == "epoch":
                name = self._bind_schedule(index, config, self.module)
                condition = f"if (epoch + 1) % {config.frequency} == 0:"
                lines += [condition, f"    {name}()"] if config.frequency > 1 else [f"{name}()"]
        return lines


_OWN_CLIPPING = ("configure_gradient_clipping", "clip_gradients")


def refuse(module: LightningModule, trainer: Trainer) -> None:
    """What a loop by hand cannot do as the Trainer does it.

    Raises:
        ProfileError: which, and what to change.
    """
    config, kind = trainer.config, type(trainer.config.precision)
    wrong: list[str] = []
    if trainer.strategy.world_size > 1 or trainer.strategy.launcher is not None:
        wrong.append(f"strategy {type(trainer.strategy).__name__} (compare with devices=1)")
    if kind not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
        wrong.append(f"the precision plugin {kind.__name__}")
    if not module.automatic_optimization and getattr(config.precision, "scaler", None) is not None:
        wrong.append("precision='16-mixed' with manual optimization, where the Trainer scales behind the module's back")
    if is_overridden("optimizer_step", module, LightningModule):
        wrong.append(f"{type(module).__name__}.optimizer_step, which decides when the Trainer's closure runs")
    if takes_iterator(module.training_step):
        wrong.append("a training_step that takes the iterator")
    for name, usual in (
        ("grad_dtype", None),
        ("nonfinite", "propagate"),
        ("overfit_batches", 0),
        ("reload_dataloaders_every_n_epochs", 0),
        ("detect_anomaly", False),
    ):
        if getattr(config, name) != usual:
            wrong.append(f"Trainer({name}={getattr(config, name)!r})")
    if wrong:
        raise ProfileError(
            f"No loop by hand can stand for this run, because of: {'; '.join(wrong)}. Leave that out for the "
            f"comparison, or profile without one (--against none)."
        )


class ByHand:
    """What stands for `module.trainer` in a loop by hand: the counters that such a loop has, and options to read.

    Raises:
        NotByHandError: the module reads anything else.
    """

    _metric_log = None

    def __init__(self, trainer: Trainer, datamodule: Any) -> None:
        self.global_step = self.current_epoch = 0
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        self.num_training_batches: float = float("inf")
        self.datamodule = datamodule
        self.device = self.root_device = trainer.config.device
        self.max_epochs, self.max_steps = trainer.max_epochs, trainer.max_steps
        self.accumulate_grad_batches = trainer.accumulate_grad_batches
        self.gradient_clip_val = trainer.gradient_clip_val
        self.gradient_clip_algorithm = trainer.gradient_clip_algorithm
        self.precision = trainer.precision
        self.world_size = self.num_devices = self.num_nodes = 1
        self.global_rank = self.local_rank = self.node_rank = 0
        self.is_global_zero = self.training = True
        self.sanity_checking = self.validating = self.testing = self.predicting = self.fast_dev_run = False
        self.barebones = False
        self.logger, self.loggers, self.callbacks, self.log_dir = None, [], [], None  # type: ignore[var-annotated]
        self.callback_metrics: dict[str, Any] = {}
        self.default_root_dir = trainer.default_root_dir
        self.strategy = _StrategyByHand(self.device)
        self._trainer = trainer
        plugin = trainer.config.precision
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        self.scaler = None if scaler is None else _same_scaler(scaler, self.device.type)

    @property
    def estimated_stepping_batches(self) -> float:
        """As the Trainer knows it."""
        return self._trainer.estimated_stepping_batches

    def print(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise NotByHandError(
            f"The module reads trainer.{name}, which a loop written by hand does not have: this run cannot be compared "
            f"with one. Profile it without a comparison: --against none."
        )


class _StrategyByHand:
    """The little that `manual_backward`, `optimizers` and `clip_gradients` of a module ask for."""

    def __init__(self, device: torch.device) -> None:
        self.root_device, self.world_size = device, 1
        self._lightning_optimizers: list[LightningOptimizer] = []

    def wrap(self, run: ByHand, clock: StepProfiler) -> None:
        """torch's optimizers under the methods that manual optimization may call, timed as ours are."""

        def counted(step: Callable[..., Any]) -> Callable[..., Any]:
            def step_and_count(closure: Any = None, **kwargs: Any) -> Any:
                result = step(None if closure is None else clock.wrap("forward", closure), **kwargs)
                run.global_step += 1
                return result

            return clock.wrap("optimizer", step_and_count)

        for optimizer in run.optimizers:
            wrapped = LightningOptimizer(optimizer)
            zero_grad = clock.wrap("optimizer", optimizer.zero_grad)
            wrapped.bind(counted(optimizer.step), zero_grad, run.optimizers)
            self._lightning_optimizers.append(wrapped)
        self.backward = clock.wrap("backward", _backward)
        self.clip_gradients = clock.wrap("optimizer", _clip)


def _backward(loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
    loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]


def _clip(optimizer: Any, clip_val: float, algorithm: Any) -> None:
    if clip_val > 0:
        Precision().clip_gradients(optimizer, clip_val, algorithm)


def _same_scaler(scaler: Any, device: str) -> torch.amp.GradScaler:
    """A fresh scaler with the options of the run's."""
    return torch.amp.GradScaler(
        device,
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )


def _loss(output: Any) -> Tensor:
    if type(output) is Tensor and not output.dim():
        return output
    loss = loss_of(output)
    if loss is None or weight_of(output) is not None:
        what = "None, which leaves the batch out" if loss is None else "a weight beside the loss"
        raise ProfileError(f"training_step returned {what}: the loop by hand has no counterpart. Use --against none.")
    return loss


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _inside(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]

"""Runs of a trainer inside its own run that leave no trace: what the tuner's searches are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_fast.checkpoint import rng
from lit_fast.data.combined import CombinedLoader
from lit_fast.errors import MisconfigurationException
from lit_fast.plan import Plans
from lit_fast.states import TrainerFn
from lit_fast.strategies.control import Wish

if TYPE_CHECKING:
    from lit_fast.callbacks.callback import Callback
    from lit_fast.trainer import Trainer


class Trial:
    """What `trying` gives to its block.

    A run has loops, counters, logged values and a plan of its own, which are put on the trainer in the place of the
    outer run's. Module, optimizers and data module are the outer run's, and go on from one run to the next.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.outer = trainer.fit_loop
        self.reloads_data = False  # the outer run asks for its loaders anew afterwards
        self._loaders: list[Any] | None = None

    def run(self, steps: int) -> None:
        """A few steps of the method that runs, whichever it is, with loaders that may be made anew for each."""
        self.reloads_data = True
        fn = self.trainer.state.fn
        if fn == TrainerFn.FITTING:
            self.fit(max_steps=steps, limit_train_batches=1.0, limit_val_batches=steps)
            return
        self._prepare((), {f"limit_{self.trainer._evaluation.names.data}_batches": steps})
        loop = self.trainer._evaluation
        loop.run()
        self._loaders = None if loop.combined is None else loop.combined.flattened

    def run_alone(self, steps: int) -> None:
        """`run`, in which the processes say nothing to each other, since any of them may fail by itself."""
        strategy = self.trainer.strategy
        if strategy.shards_gradients:
            raise MisconfigurationException(
                f"Strategy {strategy.strategy_name!r} shares every step out over the processes, so they cannot search "
                f"for a batch size apart from each other. Search with strategy='ddp', or set the batch size."
            )
        control, strategy.control = strategy.control, None
        try:
            with strategy.block_backward_sync():
                self.run(steps)
        finally:
            strategy.control = control

    def fit(self, callbacks: Sequence[Callback] = (), epoch: int = 0, **options: Any) -> None:
        """Run the fit loop.

        Args:
            callbacks: the only ones that are called.
            epoch: number of the first epoch.
            options: of the Trainer, in the place of those that it was given, such as `max_steps=3`.
        """
        trainer, outer = self.trainer, self.outer
        self._prepare(callbacks, options)
        trainer._stage = "train"
        trainer._progress.epoch = epoch
        loop = trainer.fit_loop
        loop.max_epochs, loop.min_epochs = outer.max_epochs, outer.min_epochs
        loop.plans = Plans(trainer, trainer.lightning_module)
        try:
            loop.setup_data()
            self._loaders = _flat(loop.loader)
            loop.run()
        finally:
            if loop.position is not None:
                loop.position.close()
            trainer._metric_log.rest()

    def rows(self) -> int | None:
        """Rows of the largest data set; None where none has a length."""
        if self._loaders is None:
            trainer = self.trainer
            fitting = trainer.state.fn == TrainerFn.FITTING
            name = "train" if fitting else trainer._evaluation.names.data
            self._loaders = _flat(trainer._request_loader(f"{name}_dataloader"))
        lengths = []
        for loader in self._loaders:
            try:
                lengths.append(len(loader.dataset))
            except (AttributeError, TypeError, NotImplementedError):
                continue
        return max(lengths, default=None)

    def _prepare(self, callbacks: Sequence[Callback], options: dict[str, Any]) -> None:
        """Put everything that one run has of its own on the trainer."""
        trainer = self.trainer
        trainer.config = replace(trainer.config, **options)
        trainer.callbacks = list(callbacks)
        if trainer.loggers:  # whoever logs through `self.logger.experiment` finds something there
            from lit_fast.loggers import DummyLogger

            trainer.loggers = [DummyLogger()]
        trainer._profiler = trainer._actions = None
        trainer._should_stop = False
        trainer._make_loops()
        assert trainer.state.fn is not None
        trainer._evaluation = trainer._loop_of(trainer.state.fn)
        trainer.predict_loop.return_predictions = False
        trainer.lightning_module.trainer = trainer  # it keeps the log at hand


def _flat(loaders: Any) -> list[Any]:
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    return combined.flattened


@contextmanager
def trying(trainer: Trainer) -> Iterator[Trial]:
    """A block of runs, after which trainer, module, optimizers, schedulers and random generators are as before.

    What is not put back: samplers and generators of the user's own that a run draws from, and whatever the module
    keeps outside its parameters, buffers and metrics.

    Raises:
        MisconfigurationException: the strategy has an engine, whose weights nobody can put back.
    """
    if trainer.strategy.has_engine:
        raise MisconfigurationException(
            f"Strategy {trainer.strategy.strategy_name!r} cannot try something out and be as before: its engine keeps "
            f"weights and states to itself. Search with strategy='ddp', and set what was found."
        )
    put_back = [_trainer(trainer), _module(trainer.lightning_module), *_optimizers(trainer)]
    random = rng.capture()
    trial = Trial(trainer)
    try:
        yield trial
    finally:
        for restore in put_back:
            restore()
        rng.restore(random)
        if trainer.strategy.control is not None:
            trainer.strategy.control.fulfilled(Wish.STOP)  # the run's inside
    if trial.reloads_data and trainer.fit_loop.loader is not None:
        trainer.fit_loop.loader = None
        trainer.fit_loop.setup_data()
    if trial.reloads_data and trainer._evaluation.combined is not None:
        trainer._evaluation.combined = None
        trainer._evaluation.setup_data()


def _trainer(trainer: Trainer) -> Callable[[], None]:
    attributes, state = dict(trainer.__dict__), copy.copy(trainer.state)
    strategy = dict(vars(trainer.strategy))

    def restore() -> None:
        interrupt = trainer._interrupt  # a signal that came meanwhile still counts
        for name in trainer.__dict__.keys() - attributes.keys():
            del trainer.__dict__[name]
        trainer.__dict__.update(attributes)
        vars(trainer.state).update(vars(state))
        vars(trainer.strategy).update(strategy)
        trainer._interrupt = interrupt
        trainer.lightning_module.trainer = trainer

    return restore


def _module(module: torch.nn.Module) -> Callable[[], None]:
    tensors = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(child, dict(child._buffers)) for child in module.modules()]
    modes = [(child, child.training) for child in module.modules()]

    def restore() -> None:
        with torch.no_grad():
            for child, own in buffers:
                child._buffers.update(own)
            for tensor, value in tensors:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for child, training in modes:
            child.training = training
            if any(base.__module__.startswith("torchmetrics.") for base in type(child).__mro__):
                child.reset()  # type: ignore[operator]

    return restore


def _optimizers(trainer: Trainer) -> Iterator[Callable[[], None]]:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for thing in (*trainer.optimizers, *schedulers):
        state = copy.deepcopy(thing.state_dict())
        own_step = thing.__dict__.get("step")

        def restore(thing: Any = thing, state: Any = state, own_step: Any = own_step) -> None:
            thing.load_state_dict(state)
            if own_step is None:  # a scheduler that came and went has wrapped it
                thing.__dict__.pop("step", None)
            else:
                thing.step = own_step

        yield restore

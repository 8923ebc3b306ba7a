"""How a module and a trainer come together for one run, and part again, also where the run fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationTypeError, TunerExit
from lit_fast.module import LightningModule
from lit_fast.states import TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


@contextmanager
def attach_model(trainer: Trainer, model: Any, fn: TrainerFn) -> Iterator[LightningModule]:
    """The module, attached to the trainer for one run; on an exception, hooks and loggers hear of it.

    A `torch.compile`d module is unwrapped, and its steps are replaced by their compiled versions meanwhile.
    """
    module = unwrapped(model, fn.value)
    restore = _compile_steps(model, module) if model is not module else {}
    trainer._module = module
    trainer.strategy.connect(module)
    module.trainer = trainer
    at_run_end = trainer._at_run_end = ExitStack()
    trainer.strategy.setup_environment()
    trainer._begin(fn)
    try:
        with trainer._signals():
            yield module
        trainer.state.status = TrainerStatus.FINISHED
    except TunerExit:
        trainer._tear_down(module)
        trainer.state.status = TrainerStatus.FINISHED
    except KeyboardInterrupt as interrupt:
        trainer.strategy.explain_failure(interrupt, f"in trainer.{fn.value}")
        trainer._failed(interrupt)
        if hasattr(sys, "ps1"):  # an interactive session goes on
            raise
        raise SystemExit(1) from interrupt
    except BaseException as error:
        named = trainer.strategy.explain_failure(error, f"in trainer.{fn.value}")
        trainer._failed(named)
        if named is error:
            raise
        raise named from error
    finally:
        trainer.state.stage = None
        if trainer.fit_loop.position is not None:
            trainer.fit_loop.position.close()  # stops the loader's workers
        trainer.strategy.teardown()
        trainer._metric_log.rest()
        at_run_end.close()
        for name, original in restore.items():
            if original is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = original


@contextmanager
def borrow_model(trainer: Trainer, model: Any) -> Iterator[LightningModule]:
    """The module, attached for a look at its plan; afterwards trainer and module are as before."""
    module = unwrapped(model, "explain")
    strategy = trainer.strategy
    before, held, attached_to = trainer._module, dict(vars(strategy)), module._trainer
    trainer._module = module
    strategy.connect(module)
    module.trainer = trainer
    try:
        yield module
    finally:
        trainer._module = before
        vars(strategy).update(held)
        module.trainer = attached_to


def unwrapped(model: Any, method: str) -> LightningModule:
    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, LightningModule):
        raise MisconfigurationTypeError(
            f"trainer.{method}() was given {type(model).__name__}; it needs a lit_fast.LightningModule (or "
            f"torch.compile of one). A module written for another package's LightningModule runs under "
            f"`lit-fast run`."
        )
    return module


def _compile_steps(compiled: Any, module: LightningModule) -> dict[str, Any]:
    """Put compiled versions of forward and the steps on the module; returns what stood there."""
    import torch

    names = ("forward", "training_step", "validation_step", "test_step", "predict_step")
    before = {name: module.__dict__.get(name) for name in (*names, "log")}
    for name in names:
        module.__dict__[name] = compiled.dynamo_ctx(getattr(module, name))
    module.__dict__["log"] = torch.compiler.disable(module.log)  # type: ignore[no-untyped-call]  # it reads a number: not part of the graph
    return before

"""Counters and attributes that callbacks read, at every hook: the numbers themselves are the record.

A line is the hook and what a callback saw there, as ready/started/processed/completed:

    on_train_batch_end epoch=1/1/0/0 batch=2/2/2/1 of 5/5/5/4 ...
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_recorder import (
    CALLBACK_HOOKS,
    Framework,
    Recorder,
    loader,
    make_trainer,
)
from lightning_scenarios import scenario

NAMES = ("ready", "started", "processed", "completed")
LEFT_OUT = ("state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint", "setup", "teardown")


def numbers(tracker: Any, names: tuple[str, ...] = NAMES) -> str:
    return "/".join(str(getattr(tracker, name)) for name in names)


def counters(trainer: Any) -> str:
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    step = epoch.automatic_optimization.optim_progress.optimizer.step
    zero = epoch.automatic_optimization.optim_progress.optimizer.zero_grad
    manual = epoch.manual_optimization.optim_step_progress
    begun = ("ready", "completed")
    return " ".join(
        [
            f"epoch={numbers(fit.epoch_progress.current)} of {numbers(fit.epoch_progress.total)}",
            f"batch={numbers(epoch.batch_progress.current)} of {numbers(epoch.batch_progress.total)}",
            f"last={epoch.batch_progress.is_last_batch}",
            f"idx={epoch.batch_idx},{epoch.total_batch_idx},{fit.batch_idx},{fit.total_batch_idx}",
            f"step={numbers(step.current, begun)} of {numbers(step.total, begun)}",
            f"zero={numbers(zero.current, (*begun, 'started'))} of {numbers(zero.total, (*begun, 'started'))}",
            f"manual={numbers(manual.current, begun)} of {numbers(manual.total, begun)}",
            f"scheduler={numbers(epoch.scheduler_progress.current, begun)} "
            f"of {numbers(epoch.scheduler_progress.total, begun)}",
            f"stepped={epoch._batches_that_stepped}",
            f"global={trainer.global_step},{epoch.global_step}",
            f"accumulates={epoch._should_accumulate()}",
        ]
    )


def attributes(trainer: Any) -> str:
    state = trainer.state
    return " ".join(
        [
            f"state={getattr(state.fn, 'value', None)},{getattr(state.stage, 'value', None)},{state.status.value}",
            f"flags={[n for n in ('training', 'validating', 'sanity_checking', 'evaluating') if getattr(trainer, n)]}",
            f"limits={trainer.max_epochs},{trainer.min_epochs},{trainer.max_steps},{trainer.min_steps}",
            f"batches={trainer.num_training_batches},{trainer.num_val_batches},{trainer.val_check_batch}",
            f"validates={trainer.enable_validation}",
        ]
    )


def loops(trainer: Any) -> str:
    """The loops that evaluate and predict, and what says whether a fit goes on from a checkpoint."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    seen = []
    for name, loop in (("val", epoch.val_loop), ("validate", trainer.validate_loop), ("test", trainer.test_loop)):
        progress = loop.batch_progress
        seen.append(f"{name}={numbers(progress.current)} of {numbers(progress.total)} last={progress.is_last_batch}")
    predicted = trainer.predict_loop.batch_progress
    seen.append(f"predict={numbers(predicted.current)} of {numbers(predicted.total)}")
    asked = ("restarting", "restarted_mid_epoch", "resumed_on_epoch_end", "restarted_on_epoch_start", "is_resuming")
    seen += [f"fit={[n for n in (*asked, 'done', 'skip') if getattr(fit, n)]}"]
    seen += [f"epoch={[n for n in ('restarting', 'restarted_on_train_batch_end', 'is_resuming') if getattr(epoch, n)]}"]
    return " ".join(seen)


def run(
    fw: Framework, root: str, what: Any, module: Any = None, data: Any = None, then: tuple[str, ...] = (),
    ckpt_path: str | None = None, **options: Any,
) -> Recorder:  # fmt: skip
    """A fit, and other stages after it, with one callback, which writes at each hook what `what(trainer)` reads."""
    record = Recorder(fw)

    def at(name: str) -> Any:
        return lambda self, trainer, *_: record.events.append(f"{name} {what(trainer)}")

    hooks = [name for name in CALLBACK_HOOKS if name not in LEFT_OUT]
    watcher = type("Watcher", (fw.Callback,), {name: at(name) for name in hooks})()
    trainer = make_trainer(record, root, callbacks=[watcher], **options)
    torch.manual_seed(0)
    train, val = data or (loader(5), None)
    model = (module or plain)(fw)
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    record.events.append(f"after {what(trainer)}")
    for stage in then:
        getattr(trainer, stage)(model, loader(2))
    return record


def plain(fw: Framework, extra: dict[str, Any] | None = None) -> Any:
    class Plain(fw.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.layer(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return type("Model", (Plain,), extra or {})()


def scheduled(fw: Framework) -> Any:
    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedulers = [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": interval}
            for interval in ("step", "epoch")
        ]
        return [optimizer], schedulers

    return plain(fw, {"configure_optimizers": configure_optimizers})


def manual(fw: Framework) -> Any:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = self.layer(batch).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    model = plain(fw, {"training_step": training_step, "configure_optimizers": configure_optimizers})
    model.automatic_optimization = False
    return model


@scenario
def views_of_a_fit(fw: Framework, root: str) -> Recorder:
    return run(fw, root, counters, scheduled)


@scenario
def views_with_accumulation_and_validation(fw: Framework, root: str) -> Recorder:
    data = (loader(5), loader(2, seed=1))
    return run(fw, root, counters, scheduled, data, accumulate_grad_batches=2, val_check_interval=2)


@scenario
def views_in_manual_optimization(fw: Framework, root: str) -> Recorder:
    return run(fw, root, counters, manual, (loader(3), None))


@scenario
def views_where_max_steps_ends_an_epoch(fw: Framework, root: str) -> Recorder:
    return run(fw, root, counters, plain, (loader(4), None), max_steps=6)


@scenario
def attributes_of_a_fit(fw: Framework, root: str) -> Recorder:
    return run(fw, root, attributes, plain, (loader(4), loader(2, seed=1)), val_check_interval=0.5, min_steps=1)


@scenario
def attributes_by_max_steps(fw: Framework, root: str) -> Recorder:
    return run(fw, root, attributes, plain, (loader(4), loader(2, seed=1)), max_steps=6, num_sanity_val_steps=0)


@scenario
def views_of_every_loop(fw: Framework, root: str) -> Recorder:
    data = (loader(4), loader(3, seed=1))
    return run(fw, root, loops, data=data, then=("validate", "validate", "test", "predict"), val_check_interval=2)


@scenario
def views_of_a_fit_that_goes_on_inside_an_epoch(fw: Framework, root: str) -> Recorder:
    class Save(fw.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 0):
                trainer.save_checkpoint(f"{root}/inside.ckpt")

    data = (loader(4), loader(2, seed=1))
    make_trainer(Recorder(fw), root, callbacks=[Save()], val_check_interval=2).fit(plain(fw), *data)
    return run(fw, root, loops, data=data, ckpt_path=f"{root}/inside.ckpt", max_epochs=3, val_check_interval=2)


@scenario
def views_of_a_fit_that_goes_on_after_an_epoch(fw: Framework, root: str) -> Recorder:
    class Save(fw.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(f"{root}/end.ckpt")

    make_trainer(Recorder(fw), root, callbacks=[Save()], max_epochs=1).fit(plain(fw), loader(2))
    return run(fw, root, loops, data=(loader(2), None), ckpt_path=f"{root}/end.ckpt", max_epochs=3)

"""More programs for lightning_recorder.py: what users override, and what callbacks of the box do to a run."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning_recorder import (
    Framework,
    Recorder,
    loader,
    make_callback,
    make_data,
    make_logger,
    make_module,
    make_trainer,
    recording,
)
from lightning_scenarios import fit, plateau, scenario, sgd_with, show_lr, step_lr


@scenario
def override_optimizer_step_every_second(fw: Framework, root: str) -> Recorder:
    """A module that steps its optimizer in every second batch and only runs the closure in the others."""

    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    return fit(fw, root, module={"optimizer_step": optimizer_step}, train=loader(4))


@scenario
def override_gradient_clipping(fw: Framework, root: str) -> Recorder:
    """configure_gradient_clipping with a limit of the module's own; the trainer has none."""

    def configure_gradient_clipping(
        self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")

    body = {"configure_gradient_clipping": configure_gradient_clipping}
    return fit(fw, root, module=body, train=loader(3), grad_norms=True)


@scenario
def override_backward(fw: Framework, root: str) -> Recorder:
    """backward of half the loss; on_after_backward halves the gradients once more."""

    def backward(self: Any, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (loss / 2).backward()

    def on_after_backward(self: Any) -> None:
        for p in self.parameters():
            p.grad.mul_(0.5)

    body = {"backward": backward, "on_after_backward": on_after_backward}
    return fit(fw, root, module=body, train=loader(4), grad_norms=True, accumulate_grad_batches=2)


@scenario
def override_zero_grad(fw: Framework, root: str) -> Recorder:
    """optimizer_zero_grad that fills with zeros instead of releasing."""

    def optimizer_zero_grad(self: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    return fit(fw, root, module={"optimizer_zero_grad": optimizer_zero_grad}, train=loader(3), grad_norms=True)


@scenario
def override_transfer(fw: Framework, root: str) -> Recorder:
    """The data module moves batches, and training sees what its hooks made of them."""
    record = Recorder(fw)

    class Data(fw.LightningDataModule):  # type: ignore[name-defined,misc]
        def train_dataloader(self) -> Any:
            return loader(2)

        def val_dataloader(self) -> Any:
            return loader(1, 1)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 1

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 2

    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    data = type("RecordingData", (Data,), recording(Data, "dm", names, record))()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        record.losses.append(float(batch.sum()))
        return self(batch).square().mean()

    trainer = make_trainer(record, root, callbacks=[make_callback(record, "a")], max_epochs=1)
    trainer.fit(make_module(record, {"training_step": training_step}), datamodule=data)
    return record


@scenario
def compiled_module(fw: Framework, root: str) -> Recorder:
    """trainer.fit(torch.compile(module)): the hooks are those of the module."""

    def run(record: Recorder, model: Any, data: Any) -> None:
        record.trainer.fit(torch.compile(model, backend="eager"), datamodule=data)

    return fit(fw, root, train=loader(2), val=loader(1, 1), max_epochs=1, run=run, callbacks=({"setup": nothing},))


def nothing(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
    """A hook that does nothing."""


@scenario
def bf16_mixed(fw: Framework, root: str) -> Recorder:
    """Which dtypes a step sees: inputs, outputs of a layer, loss, parameters, gradients."""
    record = Recorder(fw)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        out = self(batch)
        loss = out.square().mean()
        record.facts["train"] = [str(t.dtype) for t in (batch, out, loss, self.layer.weight)]
        return loss

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        record.facts["validate"] = [str(t.dtype) for t in (batch, self(batch), self.layer.weight)]

    def on_after_backward(self: Any) -> None:
        record.facts["gradient"] = str(self.layer.weight.grad.dtype)

    body = {
        "training_step": training_step,
        "validation_step": validation_step,
        "on_after_backward": on_after_backward,
    }
    return fit(fw, root, module=body, train=loader(2), val=loader(1, 1), precision="bf16-mixed", record=record)


@scenario
def bf16_true(fw: Framework, root: str) -> Recorder:
    """The same with all parameters in bfloat16."""
    record = Recorder(fw)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        out = self(batch)
        new = torch.ones(1)
        record.facts["train"] = [str(t.dtype) for t in (batch, out, self.layer.weight, new)]
        return out.square().mean()

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        record.facts["validate"] = [str(t.dtype) for t in (batch, self(batch), self.layer.weight)]

    body = {"training_step": training_step, "validation_step": validation_step}
    return fit(fw, root, module=body, train=loader(2), val=loader(1, 1), precision="bf16-true", record=record)


@scenario
def plateau_by_step(fw: Framework, root: str) -> Recorder:
    """ReduceLROnPlateau every 2 steps on a training metric."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", 1.0)
        return self(batch).square().mean()

    configured = sgd_with(plateau(interval="step", frequency=2, monitor="train_loss"))
    body = {**configured, "training_step": training_step}
    return fit(fw, root, module=body, closure=True, callbacks=(show_lr(),))


@scenario
def scheduler_every_2_epochs(fw: Framework, root: str) -> Recorder:
    body = sgd_with(step_lr(interval="epoch", frequency=2))
    return fit(fw, root, train=loader(2), module=body, callbacks=(show_lr(),), max_epochs=4)


@scenario
def callbacks_of_the_module(fw: Framework, root: str) -> Recorder:
    """configure_callbacks adds one; ModelCheckpoint goes last whatever the order given."""
    record = Recorder(fw)
    checkpoint = fw.get("callbacks", "ModelCheckpoint")(dirpath=os.path.join(root, "made"))
    added = make_callback(record, "of_module")
    body = {"configure_callbacks": lambda self: [added]}
    trainer = make_trainer(
        record,
        root,
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[checkpoint, make_callback(record, "a")],
    )
    trainer.fit(make_module(record, body), datamodule=make_data(record, loader(1)))
    record.facts["order"] = [getattr(c, "state_key", "").split("{")[0] for c in trainer.callbacks]
    return record


@scenario
def early_stopping(fw: Framework, root: str) -> Recorder:
    """The value stops falling in epoch 2; patience 2."""
    record = Recorder(fw)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", [3.0, 1.0, 2.0, 2.0, 2.0, 2.0][self.current_epoch])

    stopper = fw.get("callbacks", "EarlyStopping")(monitor="val_loss", patience=2)
    fit(
        fw,
        root,
        train=loader(2),
        val=loader(1, 1),
        module={"validation_step": validation_step},
        record=record,
        extra_callbacks=lambda record: [stopper],
        max_epochs=6,
    )
    record.facts["stopped_epoch"] = stopper.stopped_epoch
    record.facts["wait_count"] = stopper.wait_count
    numbers = {k: v for k, v in stopper.state_dict().items() if not isinstance(v, str)}
    record.facts["state"] = {k: float(v) for k, v in sorted(numbers.items())}
    return record


@scenario
def learning_rate_monitor(fw: Framework, root: str) -> Recorder:
    """Names and steps of what LearningRateMonitor logs."""
    record = Recorder(fw)
    monitor = fw.get("callbacks", "LearningRateMonitor")()
    trainer = make_trainer(record, root, callbacks=[monitor], logger=make_logger(record), log_every_n_steps=2)
    body = sgd_with(step_lr(interval="step"), step_lr(interval="epoch", name="slow"))
    trainer.fit(make_module(record, body), datamodule=make_data(record, loader(4)))
    record.events = []
    # Its rows carry no epoch, and their step numbers are the callback's own choice.
    record.facts["names"] = sorted({name for row in record.logged for name in row["metrics"]})
    record.facts["values"] = [row["metrics"] for row in record.logged]
    record.logged = []
    return record


@scenario
def default_folders(fw: Framework, root: str) -> Recorder:
    """Where files of two runs stand below default_root_dir, with a CSV logger and default checkpointing."""
    record = Recorder(fw)
    for _ in range(2):
        trainer = make_trainer(
            record,
            root,
            max_epochs=1,
            enable_checkpointing=True,
            logger=fw.get("loggers", "CSVLogger")(root),
        )

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return self(batch).square().mean()

        trainer.fit(make_module(record, {"training_step": training_step}), datamodule=make_data(record, loader(2)))
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    record.facts["files"] = sorted(os.path.relpath(path, root) for path in found)
    with open(os.path.join(root, "lightning_logs", "version_0", "metrics.csv")) as file:
        record.facts["header"] = file.readline().strip().split(",")
    record.events = []
    return record


@scenario
def validate_a_checkpoint(fw: Framework, root: str) -> Recorder:
    """validate(ckpt_path=...): when the weights are loaded."""
    path = os.path.join(root, "any.ckpt")
    first = Recorder(fw)
    trainer = make_trainer(first, root, max_epochs=1)
    trainer.fit(make_module(first), datamodule=make_data(first, loader(2), loader(1, 1)))
    trainer.save_checkpoint(path)

    def run(record: Recorder, model: Any, data: Any) -> None:
        record.trainer.validate(model, datamodule=data, ckpt_path=path, verbose=False)

    return fit(fw, root, val=loader(1, 1), run=run)


@scenario
def resume_a_finished_run(fw: Framework, root: str) -> Recorder:
    """fit(ckpt_path=...) of a run that had reached max_epochs; and once more with a higher max_epochs."""
    path = os.path.join(root, "any.ckpt")
    record = Recorder(fw)
    for epochs, ckpt in ((1, None), (1, path), (2, path)):
        record.events.append(f"--- max_epochs={epochs} resumed={ckpt is not None}")
        trainer = make_trainer(record, root, max_epochs=epochs, callbacks=[make_callback(record, "a")])
        module = make_module(record, sgd_with(step_lr(interval="step")))
        trainer.fit(module, datamodule=make_data(record, loader(2)), ckpt_path=ckpt)
        if ckpt is None:
            trainer.save_checkpoint(path)
    return record

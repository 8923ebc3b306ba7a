"""More programs for lightning_recorder.py: what self.log keeps, the files of ModelCheckpoint, losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning_recorder import (
    CALLBACK_HOOKS,
    MODULE_HOOKS,
    Framework,
    Recorder,
    Rows,
    loader,
    make_callback,
    make_data,
    make_logger,
    make_module,
    make_trainer,
    same_arguments,
)
from lightning_scenarios import SCENARIOS, Scenario, scenario, step_lr
from torch.utils.data import DataLoader

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_2": {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{step}-{val_loss:.2f}"},
    "top_all_last": {"save_top_k": -1, "save_last": True},
    "last_link": {"save_top_k": 1, "save_last": "link"},
    "every_2_steps": {"every_n_train_steps": 2, "save_top_k": -1},
    "every_2_epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "train_epoch_end": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "weights_only": {"save_weights_only": True},
    "max_mode": {"monitor": "val_loss", "mode": "max", "save_top_k": 1},
    "no_metric_name": {"filename": "{epoch}_{val_loss:.1f}", "auto_insert_metric_name": False},
}


@scenario
def model_checkpoint_files(fw: Framework, root: str) -> Recorder:
    """For each set of options: the files after fit, the scores, and where among the hooks it saves."""
    results: dict[str, Any] = {}
    for name, options in CHECKPOINTS.items():
        record = Recorder(fw)
        folder = os.path.join(root, name)
        checkpoint = fw.get("callbacks", "ModelCheckpoint")(dirpath=folder, **options)

        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", [3.0, 1.0, 2.0, 4.0][self.current_epoch])

        callbacks = [checkpoint, make_callback(record, "a")]
        logger = make_logger(record, events=True)
        trainer = make_trainer(
            record, root, callbacks=callbacks, enable_checkpointing=True, max_epochs=4, logger=logger,
            num_sanity_val_steps=0,
        )  # fmt: skip
        module = make_module(record, {"validation_step": validation_step})
        trainer.fit(module, datamodule=make_data(record, loader(3), loader(1, 1)))
        best = checkpoint.best_model_score
        results[name] = {
            "files": sorted(os.listdir(folder)),
            "best": os.path.basename(checkpoint.best_model_path),
            "last": os.path.basename(checkpoint.last_model_path),
            "best_score": None if best is None else float(best),
            "top_k": {os.path.basename(k): float(v) for k, v in sorted(checkpoint.best_k_models.items())},
            "saves": around_saves(record.events),
            "state_keys": sorted(checkpoint.state_dict()),
            "state_key": checkpoint.state_key,
        }
    summary = Recorder(fw)
    summary.facts = results
    return summary


def around_saves(events: list[str]) -> list[str]:
    """Each save with the event before it, so that its place among the hooks is seen."""
    kept: list[str] = []
    for index, line in enumerate(events):
        if line.startswith("lm.on_save_checkpoint"):
            before = next(e for e in reversed(events[:index]) if "save_checkpoint" not in e and "state_dict" not in e)
            kept += [before, line]
    return kept


SEEN = tuple(
    """
    cb_a.on_train_batch_start cb_a.on_train_batch_end cb_a.on_train_epoch_end lm.on_train_epoch_end
    cb_a.on_validation_epoch_end cb_a.on_validation_end cb_a.on_train_end cb_a.on_train_epoch_start
    cb_a.on_validation_start cb_a.on_sanity_check_end cb_a.on_fit_end
    """.split()
)


def logging_fit(fw: Framework, root: str, module: dict[str, Any], **options: Any) -> Recorder:
    """A fit whose logged metrics, and what callbacks see of them at each hook, are kept; no hook events."""
    record = Recorder(fw, seen_metrics=SEEN)
    val = options.pop("val", None)
    train = options.pop("train", None)
    extra = options.pop("callback", {})
    trainer = make_trainer(
        record, root, logger=make_logger(record), callbacks=[make_callback(record, "a", extra)], **options
    )
    model = make_module(record, module)
    trainer.fit(model, datamodule=make_data(record, train or loader(5), val))
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        record.facts[name] = {k: float(v) for k, v in sorted(getattr(trainer, name).items())}
    record.events = []
    return record


def log_everything(self: Any, batch: Any, batch_idx: int) -> Any:
    value = float(batch_idx + 1 + 100 * self.current_epoch)
    loss = self(batch).square().mean()
    self.log("default", value)
    self.log("both", value, on_step=True, on_epoch=True)
    self.log("epoch_mean", value, on_step=False, on_epoch=True)
    self.log("epoch_sized", value, on_step=False, on_epoch=True, batch_size=batch_idx + 1)
    self.log("epoch_max", value, on_step=False, on_epoch=True, reduce_fx="max")
    self.log("epoch_min", value, on_step=False, on_epoch=True, reduce_fx="min")
    self.log("both_sum", value, on_step=True, on_epoch=True, reduce_fx="sum")
    self.log("fn_max", value, on_step=False, on_epoch=True, reduce_fx=torch.max)
    self.log("bar", value, prog_bar=True)
    self.log("bar_both", value, prog_bar=True, on_step=True, on_epoch=True)
    self.log("hidden", value, logger=False)
    self.log("hidden_bar_epoch", value, logger=False, prog_bar=True, on_step=False, on_epoch=True)
    self.log("integer", batch_idx)
    self.log("tensor", torch.tensor(value))
    self.log("double", torch.tensor(1 / 3, dtype=torch.float64))
    self.log("half", torch.tensor(1.5, dtype=torch.float16), on_step=False, on_epoch=True)
    changed = torch.tensor(value)
    self.log("changed", changed)
    changed.fill_(-1.0)
    self.log_dict({"dict_a": value, "dict_b": -value}, on_step=True, on_epoch=True)
    if batch_idx == 0:
        self.log("only_first", value)
        self.log("only_first_epoch", value, on_step=False, on_epoch=True)
    return loss


@scenario
def log_training(fw: Framework, root: str) -> Recorder:
    return logging_fit(fw, root, {"training_step": log_everything})


@scenario
def log_training_every_3(fw: Framework, root: str) -> Recorder:
    return logging_fit(fw, root, {"training_step": log_everything}, log_every_n_steps=3)


@scenario
def log_training_accumulate(fw: Framework, root: str) -> Recorder:
    return logging_fit(fw, root, {"training_step": log_everything}, accumulate_grad_batches=2)


@scenario
def log_validation(fw: Framework, root: str) -> Recorder:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        value = float(batch_idx + 1 + 10 * self.current_epoch)
        self.log("val", value)
        self.log("val_sized", value, batch_size=batch_idx + 1)
        self.log("val_both", value, on_step=True, on_epoch=True)
        self.log("val_step", value, on_step=True, on_epoch=False)
        self.log("val_max", value, reduce_fx="max")
        self.log("val_bar", value, prog_bar=True)
        self.log("val_hidden", value, logger=False)

    def on_validation_epoch_end(self: Any) -> None:
        self.log("val_end", 2.0)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("train", float(batch_idx))
        return self(batch).square().mean()

    body = {
        "training_step": training_step,
        "validation_step": validation_step,
        "on_validation_epoch_end": on_validation_epoch_end,
    }
    return logging_fit(fw, root, body, val=loader(3, 1))


@scenario
def log_validation_uneven(fw: Framework, root: str) -> Recorder:
    """The batch size comes from the batch: 2, 2, 1 rows; and validation twice an epoch."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val", float(batch_idx))

    val = DataLoader(Rows(5, 1), batch_size=2)
    return logging_fit(fw, root, {"validation_step": validation_step}, val=val, val_check_interval=2)


@scenario
def log_two_val_loaders(fw: Framework, root: str) -> Recorder:
    def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", float(batch_idx + 10 * dataloader_idx))
        self.log("val_forked", float(batch_idx + 10 * dataloader_idx), on_step=True, on_epoch=True)
        self.log(f"plain_{dataloader_idx}", 1.0, add_dataloader_idx=False)

    body = {"validation_step": validation_step}
    return logging_fit(fw, root, body, val=[loader(2, 1), loader(3, 2)], max_epochs=1)


@scenario
def log_step_key(fw: Framework, root: str) -> Recorder:
    """A metric named "step" replaces the logger's step number; one named "epoch" replaces the epoch."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("step", float(1000 + batch_idx))
        self.log("value", 1.0, on_step=True, on_epoch=True)
        return self(batch).square().mean()

    return logging_fit(fw, root, {"training_step": training_step})


@scenario
def log_in_hooks(fw: Framework, root: str) -> Recorder:
    """One value logged in each hook of the step that may log, by the module and by a callback."""

    def module_hook(name: str) -> Any:
        def hook(self: Any, *args: Any) -> Any:
            self.log(f"lm_{name}", float(self.trainer.global_step))

        return hook

    def callback_hook(name: str) -> Any:
        def hook(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.log(f"cb_{name}", float(trainer.global_step))

        return hook

    names = (
        "on_train_start on_train_epoch_start on_train_batch_start on_before_zero_grad on_before_backward "
        "on_after_backward on_before_optimizer_step on_train_batch_end on_train_epoch_end"
    ).split()
    record_names = {name: same_arguments(fw.LightningModule, name, module_hook(name)) for name in names}
    callback = {name: same_arguments(fw.Callback, name, callback_hook(name)) for name in names}
    return logging_fit(fw, root, record_names, callback=callback, train=loader(3))


@scenario
def log_torchmetrics(fw: Framework, root: str) -> Recorder:
    """torchmetrics objects: reset between epochs, computed by the metric itself, state on the module."""
    import torchmetrics

    def setup(self: Any, stage: str) -> None:
        self.mean = torchmetrics.MeanMetric()
        self.val_max = torchmetrics.MaxMetric()
        self.top = torchmetrics.MeanMetric()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.mean.update(float(batch_idx), weight=batch_idx + 1)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.top(float(batch_idx))
        self.log("top", self.top, on_step=True, on_epoch=True)
        return self(batch).square().mean()

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.val_max.update(float(batch_idx + self.current_epoch))
        self.log("val_max", self.val_max)

    body = {"setup": setup, "training_step": training_step, "validation_step": validation_step}
    return logging_fit(fw, root, body, val=loader(3, 1))


NOWHERE = {"on_step": False, "on_epoch": False}


@scenario
def log_allowed(fw: Framework, root: str) -> Recorder:
    """For every hook of module and callback: what self.log accepts there. `ok` or the exception's kind."""
    record = Recorder(fw)
    answers: dict[str, str] = {}
    forms: dict[str, dict[str, bool]] = {
        "default": {},
        "step": {"on_step": True},
        "epoch": {"on_epoch": True},
        "none": NOWHERE,
    }

    def attempt(owner: Any, where: str) -> None:
        said = []
        for form, options in forms.items():
            try:
                owner.log(f"{where}_{form}", 1.0, **options)
                said.append(f"{form}:ok")
            except Exception as error:
                said.append(f"{form}:{type(error).__name__}")
        answers.setdefault(where, " ".join(said))

    def wrap(base: type, name: str, prefix: str) -> Any:
        original = getattr(base, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            attempt(self, f"{prefix}.{name}")
            return original(self, *args, **kwargs)

        return same_arguments(base, name, method)

    points = (
        "optimizer_step",
        "optimizer_zero_grad",
        "backward",
        "configure_gradient_clipping",
        "lr_scheduler_step",
    )
    skipped = ("configure_optimizers",)
    body = {n: wrap(fw.LightningModule, n, "lm") for n in (*MODULE_HOOKS, *points) if n not in skipped}

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        attempt(self, "lm.training_step")
        return self(batch).square().mean()

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        attempt(self, "lm.validation_step")

    def configure_optimizers(self: Any) -> Any:
        attempt(self, "lm.configure_optimizers")
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [step_lr(interval="step")(optimizer)]

    body.update(
        training_step=training_step,
        validation_step=validation_step,
        configure_optimizers=configure_optimizers,
    )
    hooks = {n: wrap(fw.Callback, n, "cb") for n in CALLBACK_HOOKS if n not in ("state_dict", "load_state_dict")}
    trainer = make_trainer(record, root, max_epochs=1, callbacks=[type("Logs", (fw.Callback,), hooks)()])
    trainer.fit(make_module(record, body), loader(2), loader(1, 1))
    trainer.save_checkpoint(os.path.join(root, "any.ckpt"))
    record.events = []
    record.facts["log_allowed"] = dict(sorted(answers.items()))
    return record


def losses(optimizer: Callable[[Any], Any], batches: int = 10, max_steps: int = 50, **options: Any) -> Scenario:
    """A small network trained from a seed; every loss is kept."""

    def run(fw: Framework, root: str) -> Recorder:
        record = Recorder(fw)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = (torch.tanh(self(batch)) - batch[:, :2]).square().mean()
            record.losses.append(loss.item())
            return loss

        body = {
            "training_step": training_step,
            "configure_optimizers": lambda self: optimizer(self.parameters()),
        }
        trainer = make_trainer(record, root, max_steps=max_steps, **options)
        trainer.fit(make_module(record, body), loader(batches, seed=3))
        record.events = []
        return record

    return run


SCENARIOS["losses_sgd"] = losses(lambda p: torch.optim.SGD(p, lr=0.1))
SCENARIOS["losses_sgd_momentum"] = losses(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True))
SCENARIOS["losses_adamw_fused"] = losses(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
SCENARIOS["losses_adamw"] = losses(lambda p: torch.optim.AdamW(p, lr=0.01))
SCENARIOS["losses_adam_clip_norm"] = losses(lambda p: torch.optim.Adam(p, lr=0.01), gradient_clip_val=0.1)
SCENARIOS["losses_sgd_accumulate"] = losses(lambda p: torch.optim.SGD(p, lr=0.1), accumulate_grad_batches=2)
# Here the two are meant to differ: 7 batches in windows of 2 leave a last window of 1, and ours divides by 1.
SCENARIOS["losses_sgd_accumulate_uneven"] = losses(
    lambda p: torch.optim.SGD(p, lr=0.1), batches=7, max_steps=12, accumulate_grad_batches=2
)
SCENARIOS["losses_bf16_mixed"] = losses(lambda p: torch.optim.SGD(p, lr=0.1), precision="bf16-mixed")
SCENARIOS["losses_bf16_true"] = losses(lambda p: torch.optim.SGD(p, lr=0.1), precision="bf16-true")

"""What a checkpoint holds, under Lightning's keys plus one of ours, and how a run goes on from it.

Our key, "lit_fast", adds what Lightning leaves out: every random generator, the position in the data, and how far
the loop had got. A file written by Lightning resumes too, at the start of the epoch that it was in.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_fast.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from lit_fast.checkpoint import finding, rng
from lit_fast.checkpoint.build import OURS, PICKLED, check_weights
from lit_fast.data.distributed import for_rank
from lit_fast.data.position import count_only
from lit_fast.errors import CheckpointError, MisconfigurationException
from lit_fast.hparams import as_data, pickled

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

FORMAT = 1
LIGHTNING_FORMAT = "2.6.6"  # the version of Lightning whose layout the file has; Lightning migrates by it


# -- writing


def save(trainer: Trainer, path: str | Path, weights_only: bool, storage_options: Any = None) -> None:
    """Write the whole state of `trainer` to `path`, through the plugin for checkpoints."""
    trainer.strategy.save_checkpoint(dump(trainer, weights_only), path, storage_options=storage_options)
    finding.note_written(path)


def dump(trainer: Trainer, weights_only: bool = False) -> dict[str, Any]:
    """The state of a run as a dictionary that loads with `weights_only=True`; hooks may add to it."""
    module, progress = trainer.lightning_module, trainer._progress
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "pytorch-lightning_version": LIGHTNING_FORMAT,
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "loops": trainer.fit_loop.epoch_loop.state_of_loops(),
    }
    if not weights_only:
        states = {}
        for callback in trainer.callbacks:
            state = callback.state_dict()
            if state:
                states[callback.state_key] = state
        checkpoint["callbacks"] = states
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(each) for each in trainer.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        precision = trainer.precision_plugin.state_dict()
        if precision:
            checkpoint[type(trainer.precision_plugin).__qualname__] = precision
        trainer.precision_plugin.on_save_checkpoint(checkpoint)
        checkpoint[OURS] = _ours(trainer)
    for owner in (module, trainer.datamodule):
        if owner is not None and owner.__dict__.get("_hparams"):
            if hasattr(owner, "_hparams_name"):  # not where hparams was written to without save_hyperparameters
                checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            kept, apart = _loadable(owner.hparams)
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = kept
            if apart:
                ours = checkpoint.setdefault(OURS, {})
                ours.setdefault(PICKLED, {})[owner.CHECKPOINT_HYPER_PARAMS_KEY] = apart
    if trainer.datamodule is not None:
        data_state = trainer.datamodule.state_dict()
        if data_state:
            checkpoint[type(trainer.datamodule).__qualname__] = data_state
    if not weights_only:
        for callback in trainer.callbacks:
            trainer._hook(callback, "on_save_checkpoint")(trainer, module, checkpoint)
    trainer._hook(module, "on_save_checkpoint")(checkpoint)
    return checkpoint


def _ours(trainer: Trainer) -> dict[str, Any]:
    progress, loop = trainer._progress, trainer.fit_loop
    epoch, stage, batches = progress.epoch, progress.stage, progress.batch_idx + 1
    ended = stage == "start" and batches > 0  # the epoch's end is behind us, `epoch` counts it already
    whole = progress.is_last_batch
    if stage == "broken":  # the batch that an exception cut short comes again
        stage, batches = "scheduled", batches - 1
    if not whole and (stage == "epoch_end" or ended):  # a limit stopped the epoch inside; more steps go on from there
        epoch, stage = epoch - ended, "scheduled"
    starts_epoch = stage in ("start", "epoch_end")
    steps = loop.windows_completed()
    return {
        "format": FORMAT,
        "epoch": epoch,
        "stage": stage,
        "batch_idx": -1 if starts_epoch else batches - 1,
        "is_last_batch": not starts_epoch and whole,
        "stepped_before": steps if starts_epoch else progress.stepped_before,
        "total_before": progress.total_before + (batches if starts_epoch else 0),
        "scheduled": progress.scheduled,
        **_open_window(trainer),
        **_of_every_process(
            trainer,
            {
                "data": loop.data_state(None if starts_epoch else batches),
                "rng": trainer.fit_loop.epoch_loop.val_loop.rng_before
                if trainer.validating and stage == "stepped"
                else rng.capture(),
                "metrics": trainer._metric_log.state_dict(trainer.lightning_module),
            },
        ),
    }


def _of_every_process(trainer: Trainer, own: dict[str, Any]) -> dict[str, Any]:
    """What is different in each process: its own, and with several of them everybody's by rank, under "processes"."""
    if trainer.world_size == 1:
        return own
    return {**own, "processes": trainer.strategy.gather_objects(own)}


def _of_this_process(trainer: Trainer, ours: dict[str, Any]) -> dict[str, Any]:
    """The same, for a process that goes on: its own, or what it takes over where there were more or fewer of them."""
    saved: list[dict[str, Any]] = ours.get("processes") or [{name: ours[name] for name in ("data", "rng", "metrics")}]
    rank, world_size = trainer.global_rank, trainer.world_size
    if len(saved) == world_size:
        return saved[rank]
    if saved[0]["metrics"]["slots"]:
        warnings.warn(
            f"{trainer.ckpt_path} was written by {len(saved)} processes inside an epoch, and {world_size} go on: what "
            f"was logged in that epoch before is not part of its means.",
            stacklevel=3,
        )
    metrics = {**saved[0]["metrics"], "slots": [], "metrics": {}}
    data = None if saved[0]["data"] is None else for_rank([each["data"] for each in saved], rank, world_size)
    return {"data": data, "rng": saved[rank % len(saved)]["rng"], "metrics": metrics}


def _open_window(trainer: Trainer) -> dict[str, Any]:
    """What the open accumulation window has gathered so far; empty between two windows, where nobody needs it."""
    plans, progress = trainer.fit_loop.plans, trainer._progress
    if plans is None or progress.batch_idx < 0:
        return {"gradients": {}}
    if not (progress.batch_idx % plans.window if progress.stage == "broken" else trainer.fit_loop._window_is_open()):
        return {"gradients": {}}
    gathered = {name: p.grad for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    if trainer.world_size > 1:  # a mean over processes is what all of them gather, whoever goes on with it
        own = {name: torch.zeros_like(p) for name, p in trainer.lightning_module.named_parameters() if name in gathered}
        gathered = {name: trainer.strategy.reduce(own[name] if g is None else g) for name, g in gathered.items()}
    gradients = {name: gradient for name, gradient in gathered.items() if gradient is not None}
    weights = plans.binding.weights
    return {"gradients": gradients} if weights is None else {"gradients": gradients, "weights": weights.state_dict()}


def _loadable(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The hyperparameters that load without executing code; and the others, pickled, for who trusts the file."""
    kept, left_out = as_data(hparams)
    apart, lost = pickled(hparams, left_out)
    if apart:
        warnings.warn(
            f"Saved apart from the other hyperparameters, because loading them would execute pickled code: "
            f"{', '.join(apart)}. load_from_checkpoint(path, weights_only=False) takes them too; or leave them out "
            f"with save_hyperparameters(ignore={list(apart)}).",
            stacklevel=2,
        )
    if lost:
        warnings.warn(
            f"Not saved with the checkpoint, because they cannot be pickled: {', '.join(lost)}. Leave them out with "
            f"save_hyperparameters(ignore={lost}).",
            stacklevel=2,
        )
    return kept, apart


def restore_model(trainer: Trainer, checkpoint: dict[str, Any], path: str) -> None:
    """Weights, data module and callbacks, with their hooks, in Lightning's order.

    Raises:
        CheckpointError: it is no training checkpoint, or its weights do not fit this model.
    """
    module = trainer.lightning_module
    if "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} holds no model: it has the keys {', '.join(map(str, list(checkpoint)[:8]))}, and 'state_dict' is "
            f"missing. Pass a checkpoint written by a Trainer."
        )
    trainer._hook(module, "on_load_checkpoint")(checkpoint)
    check_weights(module, checkpoint["state_dict"], path, module.strict_loading)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    datamodule = trainer.datamodule
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    if checkpoint.get("callbacks") is not None:  # there is none in a file of weights
        _restore_callbacks(trainer, checkpoint)


# Lightning up to 1.8 wrote one more option into the key of a ModelCheckpoint's state.
_OLD_OPTION = re.compile(r", 'save_on_train_epoch_end': (None|True|False)")


def _restore_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    states = {_OLD_OPTION.sub("", key): state for key, state in checkpoint["callbacks"].items()}
    left_over = sorted(states.keys() - {callback.state_key for callback in trainer.callbacks})
    if left_over:
        warnings.warn(
            f"{trainer.ckpt_path} holds the state of callbacks that are not in this Trainer: {', '.join(left_over)}. "
            f"They were made with other options, or are missing in Trainer(callbacks=...); that state is not used.",
            stacklevel=3,
        )
    for callback in trainer.callbacks:
        trainer._hook(callback, "on_load_checkpoint")(trainer, trainer.lightning_module, checkpoint)
    for callback in trainer.callbacks:
        state = states.get(callback.state_key)
        if state:
            callback.load_state_dict(copy.deepcopy(state))  # theirs to keep, while hooks may still look at the file's


def restore_training(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Optimizers, schedulers, loop counters, position in the data and random generators.

    Raises:
        CheckpointError: the file holds weights alone, or other optimizers than this run has.
    """
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise CheckpointError(
            f"{trainer.ckpt_path} holds weights only, so a fit cannot go on from it; load the weights into the model "
            f"and fit without ckpt_path."
        )
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    load_optimizer = trainer.strategy.load_optimizer_state
    for kind, states, objects, load in (
        ("optimizers", checkpoint["optimizer_states"], trainer.optimizers, load_optimizer),
        (
            "schedulers",
            checkpoint["lr_schedulers"],
            schedulers,
            lambda scheduler, state: scheduler.load_state_dict(state),
        ),
    ):
        if len(states) != len(objects):
            raise CheckpointError(
                f"{trainer.ckpt_path} holds {len(states)} {kind} and this run has {len(objects)}; configure_optimizers "
                f"must return the same ones to resume."
            )
        for state, target in zip(states, objects, strict=True):
            try:
                load(target, state)
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{trainer.ckpt_path}: the state of {type(target).__name__} does not fit this run's: {error}"
                ) from error
    precision = trainer.precision_plugin
    precision.on_load_checkpoint(checkpoint)
    if type(precision).__qualname__ in checkpoint:
        precision.load_state_dict(checkpoint[type(precision).__qualname__])
    progress = trainer._progress
    progress.global_step = int(checkpoint["global_step"])
    ours = checkpoint.get(OURS)
    epoch = int(checkpoint.get("epoch", 0)) if ours is None else ours["epoch"]
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < epoch:
        raise MisconfigurationException(
            f"{trainer.ckpt_path} was written in epoch {epoch}, and Trainer(max_epochs={trainer.max_epochs}) ends "
            f"before it; set max_epochs to the number of all epochs, those before the checkpoint included."
        )
    held = _fit_loop_of(checkpoint).get("epoch_loop.val_loop.batch_progress")
    if held is not None:
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.load_state_dict(held)
    if ours is None:
        _restore_lightning_loops(trainer, checkpoint)
        progress.resumed = (_place(checkpoint), progress.batch_idx)
        return
    progress.epoch, progress.stage = ours["epoch"], ours["stage"]
    progress.batch_idx, progress.is_last_batch = ours["batch_idx"], ours["is_last_batch"]
    progress.stepped_before, progress.total_before = ours["stepped_before"], ours["total_before"]
    progress.scheduled = ours["scheduled"]
    progress.resumed = (_place(checkpoint), progress.batch_idx)
    own = _of_this_process(trainer, ours)
    trainer.fit_loop.pending_data = own["data"]
    trainer._pending_metrics = own["metrics"]
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in ours["gradients"]:
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # not the file's, where an option changed
            parameter.grad = ours["gradients"][name].to(parameter.device, dtype)
    if "weights" in ours:  # of what those gradients gathered
        assert trainer.fit_loop.plans is not None
        trainer.fit_loop.plans.binding.weigh().load_state_dict(ours["weights"])
    trainer._pending_rng = own["rng"]


def _fit_loop_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    loop: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    return loop


def _place(checkpoint: dict[str, Any]) -> str:
    """Where in an epoch it was written, as `Progress.resumed` has it, by the counters of either framework."""
    loop = _fit_loop_of(checkpoint)
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {}).get("current", {})
    if not epochs or not batches:
        return "between"
    if epochs["started"] < epochs["ready"]:
        return "epoch_start"
    if epochs["processed"] < epochs["started"]:
        return "batch_end" if batches["completed"] < batches["processed"] else "batches"
    return "epoch_end" if epochs["completed"] < epochs["processed"] else "between"


def _window(trainer: Trainer, epoch: int) -> int:
    """Batches in a step of the optimizer in `epoch`, which a GradientAccumulationScheduler sets only once it runs."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.config.accumulate_grad_batches


def _restore_lightning_loops(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """A file of Lightning's says how many batches of an epoch were seen, not which; as many are left out."""
    progress = trainer._progress
    loop = _fit_loop_of(checkpoint)
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {})
    progress.epoch = epochs.get("processed", checkpoint.get("epoch", 0))
    progress.total_before = batches.get("total", {}).get("processed", 0)
    progress.stepped_before = loop.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", progress.global_step)
    progress.scheduled = loop.get("epoch_loop.scheduler_progress", {}).get("total", {}).get("completed", 0)
    if epochs.get("started", progress.epoch) == progress.epoch:
        return
    if batches.get("is_last_batch", True):  # what was due at the end of that epoch needs metrics, which are not saved
        progress.epoch += 1
        progress.stepped_before += 1  # counted only after the hooks in which files are written
        return
    seen = batches["current"]["processed"]
    window = _window(trainer, progress.epoch)
    progress.stage, progress.batch_idx = "scheduled", seen - 1
    progress.total_before -= seen
    progress.stepped_before -= (seen - 1) // window
    loaders = loop.get("state_dict", {}).get("combined_loader")
    trainer.fit_loop.pending_data = count_only(seen, loaders)
    if not loaders:
        warnings.warn(
            f"{trainer.ckpt_path} was written {seen} batches into epoch {progress.epoch} by a program that does not "
            f"save its position in the data. The run goes on behind the first {seen} batches: the ones that were seen "
            f"where the order is always the same, others where the loader shuffles.",
            stacklevel=3,
        )

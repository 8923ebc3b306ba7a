"""Save checkpoints while training: when, and which ones to keep. Names and places are in checkpoint_files.py."""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_fast.callbacks.checkpoint_files import CheckpointFiles, local_path
from lit_fast.errors import MisconfigurationException
from lit_fast.rank_zero import rank
from lit_fast.strategies.control import Wish

log = logging.getLogger(__name__)


class ModelCheckpoint(CheckpointFiles):
    """Save the newest, the best k, or all checkpoints, every so many epochs, steps or seconds.

    By default one checkpoint, the newest, is kept: written at the end of every epoch, the previous one
    removed once the new one is safely on disk. Files are written by `trainer.save_checkpoint` alone.

    Args:
        dirpath: directory for the files; left out, `<save_dir>/<name>/version_<N>/checkpoints` of the first
            logger, or `<default_root_dir>/checkpoints` without one.
        filename: template without extension. `{name}` and `{name:format}` stand for metrics, `{epoch}` and
            `{step}`; "{epoch}-{step}" when left out. A metric that is not logged becomes 0.
        monitor: name of the logged metric that decides which checkpoints are best; None keeps the newest.
        verbose: log a line for every decision.
        save_last: also keep a copy of the newest checkpoint as `last.ckpt`; "link" makes it a symbolic link.
        save_top_k: how many to keep: k best, -1 all, 0 none. Without `monitor` only -1, 0 and 1 make sense.
        save_on_exception: save when the run ends by an exception (KeyboardInterrupt too).
        save_weights_only: leave out optimizer, schedulers, callbacks and loops.
        mode: "min" where a smaller metric is better, "max" where a larger is.
        auto_insert_metric_name: write "name=" before each value in the file name.
        every_n_train_steps: save whenever this many optimizer steps were made.
        train_time_interval: save when this much time has passed, at the end of the next batch.
        every_n_epochs: save at the end of every so many epochs; 1 when none of the three is given.
        save_on_train_epoch_end: save at the end of the training epoch (True) or of validation (False); left
            out, decided by how often validation runs.
        enable_version_counter: append "-v1", "-v2" ... instead of overwriting a file that is not this
            callback's.

    Raises:
        MisconfigurationException: options that contradict each other; a monitored metric that
            nobody has logged by the end of a validation (the message lists what is logged).

    Example::

        best = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.2f}", save_top_k=3)
        Trainer(callbacks=[best]).fit(model)
        print(best.best_model_path, best.best_model_score)
    """

    reads_gradients = False

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self._every_n_train_steps = every_n_train_steps or 0
        self._every_n_epochs = every_n_epochs or 0
        self._train_time_interval = train_time_interval
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._check_options()
        self.dirpath = None if dirpath is None else local_path(dirpath)
        self.filename = filename

        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self.best_model_score: Tensor | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0  # before the first step there is nothing to save
        self._last_time_checked: float | None = None
        self._defer_save_until_validation = False
        self._validated = False
        self._told_missing = False
        self._obsolete: list[str] = []

    def _check_options(self) -> None:
        def refuse(what: str, allowed: str) -> None:
            raise MisconfigurationException(f"ModelCheckpoint({what}): {allowed}")

        if self.mode not in ("min", "max"):
            refuse(f"mode={self.mode!r}", "allowed are 'min' and 'max'.")
        if self.save_last not in (None, True, False, "link"):
            refuse(f"save_last={self.save_last!r}", "allowed are None, True, False and 'link'.")
        if self.save_top_k < -1:
            refuse(f"save_top_k={self.save_top_k}", "allowed are -1 (all), 0 (none) and positive numbers.")
        if self.monitor is None and self.save_top_k not in (-1, 0, 1):
            refuse(
                f"save_top_k={self.save_top_k}, monitor=None",
                "to keep the k best, name the metric in `monitor`.",
            )
        for name in ("every_n_train_steps", "every_n_epochs"):
            if getattr(self, "_" + name) < 0:
                refuse(f"{name}={getattr(self, '_' + name)}", "allowed are numbers from 0 (never) upwards.")
        triggers = (
            self._every_n_train_steps >= 1,
            self._every_n_epochs >= 1,
            self._train_time_interval is not None,
        )
        if sum(triggers) > 1:
            refuse(
                f"every_n_train_steps={self._every_n_train_steps}, every_n_epochs={self._every_n_epochs}, "
                f"train_time_interval={self._train_time_interval}",
                "give only one of them, or use several ModelCheckpoint callbacks.",
            )

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    @property
    def every_n_epochs(self) -> int:
        """Epochs between two saves; 0 when steps or time decide."""
        return self._every_n_epochs

    def live_hooks(self, trainer: Any = None) -> set[str]:
        unused = []
        if self._train_time_interval is None:
            unused.append("on_train_start")
            if self._every_n_train_steps < 1:
                unused.append("on_train_batch_end")
        if not self.save_last:
            unused.append("on_train_end")
        if not self.save_on_exception:
            unused.append("on_exception")
        return self._without(super().live_hooks(trainer), ModelCheckpoint, *unused)

    # Programs written for Lightning call it by the name that two leading underscores get there.
    def __resolve_ckpt_dir(self, trainer: Any) -> str:
        return self._resolve_ckpt_dir(trainer)

    # -- when to save

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.__resolve_ckpt_dir(trainer))
        if stage == "fit" and trainer.is_global_zero and self.save_top_k != 0 and os.path.isdir(self.dirpath):
            resumed = getattr(trainer, "ckpt_path", None)
            inside = resumed is not None and Path(self.dirpath).absolute() in Path(resumed).absolute().parents
            if not inside and os.listdir(self.dirpath):
                warnings.warn(f"Checkpoint directory {self.dirpath} exists and is not empty.", stacklevel=2)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_time_checked = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0
        if self._train_time_interval is not None:
            due = self._time_is_up(trainer, self._train_time_interval.total_seconds())
        if not due or self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._agreed_candidates(trainer)
        if self.monitor is not None and (self.monitor not in metrics or self._validation_is_next(trainer)):
            self._defer_save_until_validation = True  # so that the score belongs to these weights
            return
        self._save_all(trainer, metrics)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._should_save_on_train_epoch_end(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_at_epoch_end(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._validated = self._validated or not trainer.sanity_checking
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self._defer_save_until_validation:
            # also where epochs save at their own end: Lightning 2.6 drops a deferred save there, and a run
            # of one epoch with a validation metric and `every_n_train_steps` ends without a checkpoint
            self._defer_save_until_validation = False
            self._save_all(trainer, self._agreed_candidates(trainer))
        elif not self._should_save_on_train_epoch_end(trainer):
            self._save_at_epoch_end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not self.save_on_exception or self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        filepath = self.format_checkpoint_name(metrics)
        self._save_checkpoint(trainer, filepath)
        self._save_last_checkpoint(trainer, metrics)
        self._remove_obsolete(trainer)
        log.info("%s: saved a checkpoint to %s", type(exception).__name__, filepath)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.save_last and not self._last_checkpoint_saved and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._agreed_candidates(trainer))
            self._remove_obsolete(trainer)

    def _time_is_up(self, trainer: Any, interval: float) -> bool:
        """By the clock of the first process; the others hear of it with the gradients of the next step."""
        now = time.monotonic()
        is_up = now - (now if self._last_time_checked is None else self._last_time_checked) >= interval
        control = trainer.strategy.control
        if control is not None:
            if is_up and trainer.is_global_zero:
                control.wish(Wish.SAVE)
            is_up = control.knows(Wish.SAVE) and trainer.strategy.broadcast(is_up)
            if is_up:
                control.fulfilled(Wish.SAVE)
        if is_up:
            self._last_time_checked = now
        return is_up

    def _should_skip_saving_checkpoint(self, trainer: Any) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or bool(trainer.sanity_checking)
            or self._last_global_step_saved == trainer.global_step
        )

    def _should_save_on_train_epoch_end(self, trainer: Any) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        if getattr(trainer, "_val_check_time_interval", None) is not None or trainer.check_val_every_n_epoch != 1:
            return False
        # with several validations per epoch, a checkpoint belongs to the validation that scored it
        return _total(trainer.num_val_batches) == 0 or trainer.val_check_interval == 1.0

    def _validation_is_next(self, trainer: Any) -> bool:
        """Whether the validation after this epoch's last batch will run, and saving waits for it."""
        if self._should_save_on_train_epoch_end(trainer) or not trainer.is_last_batch:
            return False
        if not getattr(trainer, "enable_validation", True) or _total(trainer.num_val_batches) == 0:
            return False
        every = trainer.check_val_every_n_epoch
        return every is None or (trainer.current_epoch + 1) % every == 0

    # -- what to save

    def _save_all(self, trainer: Any, metrics: dict[str, Tensor]) -> None:
        self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)
        self._remove_obsolete(trainer)

    def _save_at_epoch_end(self, trainer: Any) -> None:
        metrics = self._agreed_candidates(trainer)
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_topk_checkpoint(trainer, metrics)
        saved_now = self._last_global_step_saved == trainer.global_step
        if saved_now or (self.save_last == "link" and self._last_checkpoint_saved):
            self._save_last_checkpoint(trainer, metrics)
        self._remove_obsolete(trainer)

    def _monitor_candidates(self, trainer: Any) -> dict[str, Tensor]:
        metrics = {name: _snapshot(value) for name, value in trainer.callback_metrics.items()}
        for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[name] = metrics[name].int() if name in metrics else torch.tensor(value)
        return metrics

    def _agreed_candidates(self, trainer: Any) -> dict[str, Tensor]:
        """Of several processes those of the first one, so that all decide alike and use the same names."""
        if trainer.strategy.world_size == 1:
            return self._monitor_candidates(trainer)
        trainer._metric_log.share_step()
        here = self._monitor_candidates(trainer)
        metrics: dict[str, Tensor] = trainer.strategy.broadcast({name: value.cpu() for name, value in here.items()})
        return metrics

    def check_monitor_top_k(self, trainer: Any, current: Tensor | None = None) -> bool:
        """Whether a checkpoint with score `current` would be kept among the best `save_top_k`."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        if self.save_top_k == 0:
            return False
        better = torch.lt if self.mode == "min" else torch.gt
        return bool(better(current, self.best_k_models[self.kth_best_model_path].to(current.device)))

    def _save_topk_checkpoint(self, trainer: Any, metrics: dict[str, Tensor]) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            self._save_none_monitor_checkpoint(trainer, metrics)
        else:
            if self.monitor not in metrics:
                self._tell_missing_metric(metrics)
            self._save_monitor_checkpoint(trainer, metrics)

    def _save_none_monitor_checkpoint(self, trainer: Any, metrics: dict[str, Tensor]) -> None:
        previous = self.best_model_path
        # set before it is saved, because it is part of what is saved
        self.best_model_path = self._get_metric_interpolated_filepath_name(metrics, trainer, previous)
        self._save_checkpoint(trainer, self.best_model_path)
        if self.save_top_k == 1 and previous:
            self._retire(trainer, previous, self.best_model_path)

    def _save_monitor_checkpoint(self, trainer: Any, metrics: dict[str, Tensor]) -> None:
        current = metrics.get(str(self.monitor))
        if self.check_monitor_top_k(trainer, current):
            assert current is not None
            self._update_best_and_save(current, trainer, metrics)
        elif self.verbose:
            log.info("%s: %s was not in the top %d", _when(metrics), self.monitor, self.save_top_k)

    def _tell_missing_metric(self, metrics: Mapping[str, Tensor]) -> None:
        message = (
            f"ModelCheckpoint(monitor={self.monitor!r}) found no such metric; logged are: "
            f"{', '.join(map(repr, metrics))}. Log it with self.log({self.monitor!r}, value) in the module, "
            f"or monitor one of the logged ones."
        )
        if self._validated:
            raise MisconfigurationException(message)
        if not self._told_missing:  # once: it may come with a validation, or never
            self._told_missing = True
            warnings.warn(message + " Until then nothing is saved.", stacklevel=2)

    def _update_best_and_save(self, current: Tensor, trainer: Any, metrics: dict[str, Tensor]) -> None:
        k = len(self.best_k_models) + 1 if self.save_top_k == -1 else self.save_top_k
        worst, best = (max, min) if self.mode == "min" else (min, max)
        replaced = ""
        if len(self.best_k_models) == k:
            replaced = self.kth_best_model_path
            self.best_k_models.pop(replaced)
        if torch.isnan(current):  # never the best
            current = torch.full_like(current, torch.inf if self.mode == "min" else -torch.inf)

        filepath = self._get_metric_interpolated_filepath_name(metrics, trainer, replaced)
        self.current_score = current
        self.best_k_models[filepath] = current
        if len(self.best_k_models) == k:
            self.kth_best_model_path = worst(self.best_k_models, key=lambda path: float(self.best_k_models[path]))
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        self.best_model_path = best(self.best_k_models, key=lambda path: float(self.best_k_models[path]))
        self.best_model_score = self.best_k_models[self.best_model_path]
        if self.verbose:
            log.info(
                "%s: %s reached %.5f (best %.5f), saving to %s",
                _when(metrics), self.monitor, current, self.best_model_score, filepath,
            )  # fmt: skip
        self._save_checkpoint(trainer, filepath)
        if replaced:
            self._retire(trainer, replaced, filepath)

    def _save_last_checkpoint(self, trainer: Any, metrics: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        previous = self.last_model_path
        self.last_model_path = filepath = self._versioned_name(metrics, trainer, previous, self.CHECKPOINT_NAME_LAST)
        if self.save_last == "link" and self._last_checkpoint_saved and self.save_top_k != 0:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, filepath)
        else:
            self._save_checkpoint(trainer, filepath)
        if previous:
            self._retire(trainer, previous, filepath)
        self._remove_obsolete(trainer)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    def _retire(self, trainer: Any, previous: str, current: str) -> None:
        """Remove `previous` if it may go; a link must point to the new file before the old one goes."""
        if self._should_remove_checkpoint(trainer, previous, current):
            self._obsolete.append(previous)
        if self.save_last != "link":
            self._remove_obsolete(trainer)

    def _remove_obsolete(self, trainer: Any) -> None:
        while self._obsolete:
            self._remove_checkpoint(trainer, self._obsolete.pop(0))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write `best_k_models` (path: score) as YAML, to `<dirpath>/best_k_models.yaml` when left out."""
        if filepath is None:
            if self.dirpath is None:
                raise MisconfigurationException("ModelCheckpoint.to_yaml() has no directory yet; pass `filepath`.")
            filepath = os.path.join(self.dirpath, "best_k_models.yaml")
        if rank() != 0:
            return
        from lit_fast.loggers.utilities import write_yaml

        write_yaml(filepath, {path: score.item() for path, score in self.best_k_models.items()})

    # -- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": self.best_k_models,
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        previous = state_dict.get("dirpath", self.dirpath)
        if previous == self.dirpath:
            self.best_model_score = state_dict["best_model_score"]
            self.current_score = state_dict.get("current_score", self.current_score)
            self.kth_best_model_path = state_dict.get("kth_best_model_path", self.kth_best_model_path)
            self.kth_value = state_dict.get("kth_value", self.kth_value)
            self.best_k_models = dict(state_dict.get("best_k_models", self.best_k_models))
            self.last_model_path = state_dict.get("last_model_path", self.last_model_path)
        else:
            warnings.warn(
                f"ModelCheckpoint wrote to {previous!r} before and now writes to {self.dirpath!r}: of its "
                f"state only best_model_path is taken over, and the files there are left alone.",
                stacklevel=2,
            )
        self.best_model_path = state_dict["best_model_path"]


def _total(batches: Any) -> float:
    return sum(batches) if isinstance(batches, list | tuple) else batches


def _snapshot(value: Any) -> Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)


def _when(metrics: Mapping[str, Tensor]) -> str:
    return f"Epoch {int(metrics['epoch'])}, global step {int(metrics['step'])}"

"""`Tuner`: the searches by themselves, before a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lit_fast.callbacks.batch_size_finder import BatchSizeFinder
from lit_fast.callbacks.callback import Callback
from lit_fast.callbacks.lr_finder import LearningRateFinder
from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    from lit_fast.module import LightningModule
    from lit_fast.trainer import Trainer
    from lit_fast.tuner.lr_finder import _LRFinder

METHODS = ("fit", "validate", "test", "predict")
Method = Literal["fit", "validate", "test", "predict"]


class Tuner:
    """Searches for a batch size or a learning rate with a Trainer, and leaves model and Trainer as they were, but for
    what was found.

    Example::

        tuner = Tuner(trainer)
        tuner.scale_batch_size(model, mode="binsearch")  # sets model.batch_size
        tuner.lr_find(model).plot(suggest=True)  # sets model.lr
        trainer.fit(model)
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: Method = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that fits into memory, and set it.

        Args:
            model: its `train_dataloader` (or the data module's) must build the loader from the attribute
                `batch_arg_name`.
            train_dataloaders, val_dataloaders: a data module may stand in place of the first; loaders that are built
                already cannot be changed, and are refused.
            dataloaders: the same for `method` "validate", "test" and "predict".
            datamodule: a LightningDataModule.
            method: what to run at each size.
            mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val: as `BatchSizeFinder`.

        Returns:
            The size; None under `fast_dev_run`.

        Raises:
            ValueError: an unknown method or mode; a Trainer that has a BatchSizeFinder already.
            MisconfigurationException: contradictory arguments; see `BatchSizeFinder`.
        """
        _check_data(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse_second(BatchSizeFinder)
        finder = BatchSizeFinder(
            mode=mode,
            steps_per_trial=steps_per_trial,
            init_val=init_val,
            max_trials=max_trials,
            batch_arg_name=batch_arg_name,
            margin=margin,
            max_val=max_val,
        )
        self._run(finder, model, method, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_batch_size

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: Method = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
        weights_only: bool | None = None,
    ) -> _LRFinder | None:
        """Find a learning rate by a range test, and set it.

        Args:
            model, train_dataloaders, val_dataloaders, datamodule: as `Trainer.fit`.
            dataloaders, method: only None and "fit" are allowed.
            num_training: steps of the test.
            min_lr, max_lr, mode, early_stop_threshold, update_attr, attr_name, weights_only: as `LearningRateFinder`.

        Returns:
            An object with `results`, `suggestion()` and `plot()`; None under `fast_dev_run`.

        Raises:
            ValueError: an unknown mode; a Trainer that has a LearningRateFinder already.
            MisconfigurationException: another method, or not exactly one optimizer.
            AttributeError: the attribute to set is nowhere.
        """
        if method != "fit":
            raise MisconfigurationException(f"Tuner.lr_find(method={method!r}): only 'fit' has a learning rate.")
        _check_data(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse_second(LearningRateFinder)
        finder = LearningRateFinder(
            min_lr=min_lr,
            max_lr=max_lr,
            num_training_steps=num_training,
            mode=mode,
            early_stop_threshold=early_stop_threshold,
            update_attr=update_attr,
            attr_name=attr_name,
            weights_only=weights_only,
        )
        self._run(finder, model, method, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_lr

    def _run(
        self,
        finder: BatchSizeFinder | LearningRateFinder,
        model: LightningModule,
        method: str,
        train_dataloaders: Any,
        val_dataloaders: Any,
        dataloaders: Any,
        datamodule: Any,
    ) -> None:
        """Begin `method` with the search as a callback, which ends it."""
        trainer = self._trainer
        finder._early_exit = True
        trainer.callbacks = [finder, *trainer.callbacks]
        try:
            if method == "fit":
                trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            else:
                getattr(trainer, method)(model, dataloaders, datamodule=datamodule)
        finally:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not finder]

    def _refuse_second(self, kind: type[Callback]) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise ValueError(f"The Trainer has a {kind.__name__} among its callbacks; drop it to use the Tuner.")


def _check_data(method: str, train_dataloaders: Any, val_dataloaders: Any, dataloaders: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: allowed are {', '.join(METHODS)}.")
    if method == "fit" and dataloaders is not None:
        raise MisconfigurationException(
            "method='fit' takes train_dataloaders and val_dataloaders; leave dataloaders out."
        )
    if method != "fit" and (train_dataloaders is not None or val_dataloaders is not None):
        raise MisconfigurationException(
            f"method={method!r} takes dataloaders; leave train_dataloaders and val_dataloaders out."
        )

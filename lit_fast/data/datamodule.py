"""`LightningDataModule`: data sets, their loaders, and how they are prepared, in one class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_fast.core_hooks import DataHooks
from lit_fast.data.randomness import length_of
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.hparams import HyperparametersMixin, class_only

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

_DataModule = TypeVar("_DataModule", bound="LightningDataModule")


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Data for a Trainer: define the `*_dataloader` methods that the run needs, and `setup` to make the data
    sets.

    The Trainer calls `prepare_data` once on each machine (download, tokenize: write files, keep no state),
    then `setup(stage)` in every process, then the loaders of the stage, and `teardown(stage)` at the end.
    What `state_dict` returns is kept in every checkpoint and comes back through `load_state_dict`.

    Example:
        >>> import torch
        >>> class Numbers(LightningDataModule):
        ...     def __init__(self, size: int = 8):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        ...
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(range(self.hparams.size), batch_size=4)
        >>> [batch.tolist() for batch in Numbers(6).train_dataloader()]
        [[0, 1, 2, 3], [4, 5]]
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    name: str | None = None
    # Class attributes too, so that a subclass that forgets super().__init__() works
    trainer: Trainer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes and ignores any arguments, so that a subclass may pass all of its own on."""
        super().__init__()

    def __str__(self) -> str:
        """How many samples each of the loaders that can be made now has."""
        sizes = {
            title: self._sizes(f"{name}_dataloader")
            for title, name in (("Train", "train"), ("Validation", "val"), ("Test", "test"), ("Predict", "predict"))
        }
        return "\n".join(f"{{{title} dataloader: {size}}}" for title, size in sizes.items())

    def _sizes(self, hook: str) -> str:
        if not is_overridden(hook, self, LightningDataModule):
            return "None"
        try:
            loaders = _items(getattr(self, hook)())
        except Exception:  # before `setup` there is no data, and a description must not fail
            return "None"
        sizes = [length_of(getattr(loader, "dataset", loader)) for loader in loaders]
        sizes_told = ["NA" if size is None else f"size={size}" for size in sizes]
        return sizes_told[0] if len(sizes) == 1 else " ; ".join(f"{n}. {size}" for n, size in enumerate(sizes_told, 1))

    @classmethod
    def from_datasets(
        cls: type[_DataModule],
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> _DataModule:
        """A data module around data sets: the training data is shuffled (unless iterable), the rest is not.

        Args:
            train_dataset, val_dataset, test_dataset, predict_dataset: A data set, or a list or dict of data
                sets for a list or dict of loaders. None leaves that loader undefined.
            batch_size: Samples in a batch.
            num_workers: Worker processes of each loader.
            datamodule_kwargs: For the class's `__init__`, which is also given `batch_size` and `num_workers`
                if it takes them.

        Raises:
            MisconfigurationException: A data set is neither a `Dataset` nor a sequence or mapping of them.
        """
        given = {"batch_size": batch_size, "num_workers": num_workers}
        parameters = inspect.signature(cls.__init__).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        accepted = {name: value for name, value in given.items() if takes_any or name in parameters}
        datamodule = cls(**{**accepted, **datamodule_kwargs})
        for stage, data in (
            ("train", train_dataset),
            ("val", val_dataset),
            ("test", test_dataset),
            ("predict", predict_dataset),
        ):
            if data is not None:
                loaders = _Loaders(data, batch_size, num_workers, stage)
                setattr(datamodule, f"{stage}_dataloader", loaders)
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """What to keep in checkpoints: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned when the checkpoint was written."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when a run stops with an exception, Ctrl-C included."""

    @class_only
    def load_from_checkpoint(
        cls: type[_DataModule],
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> _DataModule:
        """A data module made from the hyperparameters and the state in a checkpoint.

        Args:
            checkpoint_path: The file.
            map_location: As for `torch.load`; None means the CPU.
            hparams_file: A .yaml or .csv file of hyperparameters, instead of those in the checkpoint.
            weights_only: None and True refuse pickled code; False only for a file whose maker one trusts.
            kwargs: Arguments for `__init__`, before those of the checkpoint.

        Raises:
            CheckpointError: The file cannot be read, or its hyperparameters do not fit `__init__`.
        """
        from lit_fast.checkpoint import build, io

        checkpoint = io.load(checkpoint_path, map_location or build.where_it_was, weights_only is not False)
        datamodule = build.build(cls, checkpoint, checkpoint_path, hparams_file, kwargs, trusted=weights_only is False)
        if cls.__qualname__ in checkpoint:
            datamodule.load_state_dict(checkpoint[cls.__qualname__])
        return datamodule


class _Loaders:
    """A `*_dataloader` method for given data sets; an object and not a closure, so that it can be pickled."""

    def __init__(self, data: Any, batch_size: int, num_workers: int, stage: str) -> None:
        self._data, self._batch_size, self._num_workers, self._stage = data, batch_size, num_workers, stage
        for item in _items(data):
            # anything with samples by number serves: torch takes a list of tensors for one data set as well
            if not isinstance(item, Dataset) and not hasattr(item, "__getitem__"):
                raise MisconfigurationException(
                    f"{stage}_dataset is a {type(data).__name__} holding a {type(item).__name__}; give a "
                    "torch.utils.data.Dataset, or a list or dict of them"
                )

    def __call__(self) -> Any:
        data = self._data
        if isinstance(data, Mapping):
            return {name: self._loader(item) for name, item in data.items()}
        if _is_several(data):
            return [self._loader(item) for item in data]
        return self._loader(data)

    def _loader(self, data: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self._batch_size,
            shuffle=self._stage == "train" and not isinstance(data, IterableDataset),
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _is_several(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, Dataset | str)


def _items(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        return list(data.values())
    return list(data) if _is_several(data) else [data]

"""The prediction loop: `Trainer.predict`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lit_fast.data.loader_iterator import EndOfData
from lit_fast.data.loaders import with_batch_sampler
from lit_fast.data.transfer import move
from lit_fast.errors import MisconfigurationException
from lit_fast.evaluation import BoundPass, StageLoop, StageNames

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

PREDICTION = StageNames("predict", "predict", "predict")


class PredictionLoop(StageLoop):
    """Runs `predict_step` over every loader, without gradients, in evaluation mode, and keeps what it returns.

    Attributes:
        return_predictions: whether `Trainer.predict` gives the predictions back.
        epoch_batch_indices: loader by loader and batch by batch, the indices of the samples in the data set; kept only
            for a prediction writer that writes at the end, until it has written.
        current_batch_indices: the indices of the running batch, for a prediction writer that writes each batch; empty
            where they are not known.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, PREDICTION)
        self.return_predictions = True
        self.epoch_batch_indices: list[list[list[int]]] = []
        self.current_batch_indices: list[int] = []
        self._predictions: list[list[Any]] = []
        self._said_none = False

    @property
    def predictions(self) -> list[Any]:
        """What the steps returned so far, on the CPU: a list, or with several loaders a list of lists."""
        return self._predictions[0] if len(self._predictions) == 1 else self._predictions

    def prepared(self, loader: Any) -> Any:
        """The loader with its last, smaller batch, where `drop_last` asked to leave it out: every sample is predicted.

        Where a prediction writer asks which samples a batch holds, its batch sampler also takes notes.
        """
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            return loader
        sampler: Any = loader.batch_sampler
        if getattr(sampler, "drop_last", False):
            sampler = copy.copy(sampler)
            sampler.drop_last = False
        if self._writers() and not isinstance(loader.dataset, IterableDataset):
            sampler = _Notes(sampler)
        return loader if sampler is loader.batch_sampler else with_batch_sampler(loader, sampler, drop_last=False)

    def _writers(self) -> list[Any]:
        """The callbacks that write predictions, by the name of their base: nobody else needs it imported."""
        kinds = ((callback, type(callback).__mro__) for callback in self.trainer.callbacks)
        return [callback for callback, kind in kinds if any(base.__name__ == "BasePredictionWriter" for base in kind)]

    def run(self) -> list[Any] | None:
        """All loaders once; returns the predictions where they are wanted."""
        trainer = self.trainer
        trainer._metric_log.stage = self.names.stage
        with self.no_grad(), trainer._in_phase("validation"):
            self.setup_data()
            return None if self.skip else self._run()

    def _run(self) -> list[Any] | None:
        trainer, combined = self.trainer, self.combined
        assert combined is not None
        if combined.mode != "sequential":
            raise MisconfigurationException(
                f"trainer.predict() was given a CombinedLoader(mode={combined.mode!r}); it needs mode='sequential', or "
                f"the loaders in a list."
            )
        self.check_arguments()
        writers = self._writers()
        on_batch, on_epoch = (any(getattr(w.interval, name) for w in writers) for name in ("on_batch", "on_epoch"))
        self._predictions = [[] for _ in combined.flattened]
        self.epoch_batch_indices = [[] for _ in combined.flattened]
        passes = self.begun_passes()
        self.model_eval()
        self.counters.begin_run()
        trainer._call("on_predict_start")
        trainer._call("on_predict_epoch_start")
        for index, batches in passes:
            note = self._note(index, on_batch, on_epoch)
            keep = self._predictions[index].append if self.return_predictions or on_epoch else None
            with suppress(EndOfData):
                self._run_loader(self.bind(index, batches), note, keep)
        self.counters.running = False
        trainer._call("on_predict_epoch_end")
        predictions = self.predictions if self.return_predictions else None
        if predictions is None:
            self._predictions = []
        self.epoch_batch_indices = []
        trainer._call("on_predict_end")
        self.model_train()
        trainer._metric_log.batch = None
        return predictions

    def _note(self, index: int, on_batch: bool, on_epoch: bool) -> tuple[Callable[[int], None], ...]:
        """What is noted about each batch for prediction writers: nothing where there is none."""
        if not on_batch and not on_epoch:
            return ()
        assert self.combined is not None
        self.current_batch_indices = []
        loader = self.combined.flattened[index]
        notes = getattr(loader, "batch_sampler", None)
        if not isinstance(notes, _Notes):
            warnings.warn(
                f"Which samples a batch holds is not known of a {type(loader).__name__} without a sampler: "
                f"prediction writers get no batch indices. Pass a DataLoader over a map-style dataset.",
                stacklevel=2,
            )
            return ()

        def note(batch_idx: int) -> None:
            indices = notes.seen[batch_idx]
            if on_epoch:
                self.epoch_batch_indices[index].append(indices)
            if on_batch:
                self.current_batch_indices = indices

        return (note,)

    def _run_loader(
        self, bound: BoundPass, notes: tuple[Callable[[int], None], ...], keep: Callable[[Any], None] | None
    ) -> None:
        trainer, log = self.trainer, self.trainer._metric_log
        _, where, batches, receive, starts, step, table, ends = bound
        cpu = torch.device("cpu")
        for batch_idx, given in enumerate(batches):
            self.batch_idx, batch = batch_idx, given
            for function in receive:
                batch = function(batch)
            for note in notes:
                note(batch_idx)
            for hook in starts:
                hook(batch, batch_idx, *where)
            log.current = table
            output = step(batch, batch_idx, *where)
            if output is None and not self._said_none:
                self._say_none()
            for hook in ends:
                hook(output, batch, batch_idx, *where)
            if keep is not None:
                keep(move(output, cpu))
            if trainer._interrupt is not None:
                trainer._raise_interrupt()

    def _say_none(self) -> None:
        self._said_none = True
        warnings.warn(
            "predict_step returned None, so there is nothing to keep of that batch; return the prediction. Where it "
            "is meant so, ignore this.",
            stacklevel=4,
        )

    def model_train(self) -> None:
        """Every submodule as it was; there is no hook for it."""
        for child, training in self._training_modes.items():
            child.training = training
        self._training_modes = {}


class _Notes:
    """A batch sampler that remembers which indices it gave in the pass that runs."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler: Any = sampler
        self.seen: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        self.seen = seen = []
        for indices in self.sampler:
            seen.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # asked for before it is set, while a copy is made
            raise AttributeError(name)
        return getattr(self.sampler, name)

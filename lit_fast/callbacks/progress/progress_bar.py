"""The base of every progress bar: what to call things, how many batches there are, which metrics to show."""

from __future__ import annotations

import math
from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException


class ProgressBar(Callback):
    """Base class for progress bars; the Trainer knows a bar by it and uses at most one.

    A subclass defines `disable` and `enable`, and draws in the hooks it overrides. `get_metrics` decides
    what stands beside the bar.
    """

    reads_gradients = False

    def __init__(self) -> None:
        self._trainer: Any = None
        self._current_eval_dataloader_idx: int | None = None

    @property
    def trainer(self) -> Any:
        """The Trainer that this bar belongs to, from `setup` on."""
        if self._trainer is None:
            raise MisconfigurationException(f"{type(self).__name__}.trainer is known once a run has begun.")
        return self._trainer

    @property
    def sanity_check_description(self) -> str:
        """Label of the batches before training."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """Label of training."""
        return "Training"

    @property
    def validation_description(self) -> str:
        """Label of validation."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """Label of testing."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """Label of prediction."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Training batches of this epoch; `inf` where the loader has no length."""
        trainer = self.trainer
        batches: int | float = trainer.num_training_batches
        if trainer.max_epochs == -1 and trainer.max_steps is not None and trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps - trainer.global_step)
        return batches

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation loader that runs; fewer during the sanity check."""
        trainer = self.trainer
        return self._of_current(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that runs."""
        return self._of_current(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the prediction loader that runs."""
        return self._of_current(self.trainer.num_predict_batches)

    @property
    def total_val_batches(self) -> int | float:
        """Batches of all validation loaders; 0 in an epoch that does not validate."""
        trainer = self.trainer
        every = trainer.check_val_every_n_epoch
        if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
            return 0
        batches = trainer.num_val_batches
        return sum(batches) if isinstance(batches, list) else batches

    def _of_current(self, batches: Any) -> int | float:
        if not isinstance(batches, list):
            return float(batches) if batches == math.inf else int(batches)
        index = self._current_eval_dataloader_idx or 0
        return int(batches[index]) if index < len(batches) and batches[index] != math.inf else math.inf

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether another evaluation loader runs than at the last call."""
        before, self._current_eval_dataloader_idx = self._current_eval_dataloader_idx, dataloader_idx
        return before != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget which evaluation loader ran."""
        self._current_eval_dataloader_idx = None

    def disable(self) -> None:
        """Show nothing from now on."""
        raise NotImplementedError(f"{type(self).__name__} must define disable()")

    def enable(self) -> None:
        """Show the bar again."""
        raise NotImplementedError(f"{type(self).__name__} must define enable()")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the bar."""
        print(*args, **kwargs)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What stands beside the bar: the run's version, then everything logged with `prog_bar=True`.

        Override it to show more or less. A bar that draws in its own thread calls it there.
        """
        return {**get_standard_metrics(trainer), **trainer.progress_bar_metrics}


def get_standard_metrics(trainer: Any) -> dict[str, Any]:
    """`v_num`: the version of the first logger (of a long string its last four letters)."""
    version = trainer.loggers[0].version if trainer.loggers else None
    if version in (None, ""):
        return {}
    return {"v_num": version[-4:] if isinstance(version, str) else version}

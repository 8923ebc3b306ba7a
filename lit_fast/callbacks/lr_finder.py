"""Find a learning rate when a fit starts."""

from __future__ import annotations

from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import TunerExit
from lit_fast.tuner.lr_finder import SUPPORTED_MODES, _lr_find, _LRFinder


class LearningRateFinder(Callback):
    """Runs a learning rate range test before the first step, and trains with the rate that it suggests.

    The test trains for `num_training_steps` steps at growing rates; afterwards weights, optimizer, random generators
    and counters are as before. Call `lr_find` from other hooks to search at other times.

    Args:
        min_lr, max_lr: rates of the first step and (nearly) of the last.
        num_training_steps: steps between them.
        mode: the rate grows by a factor ("exponential") or by an amount ("linear").
        early_stop_threshold: stop once the smoothed loss is more than this times the best one; None: never.
        update_attr: set the model's attribute, and the rate of the running optimizer, to the suggestion.
        attr_name: that attribute's name; "lr" or "learning_rate" is found by itself, in the module or its hparams.
        weights_only: accepted for Lightning's sake: no file is written.

    Attributes:
        optimal_lr: the result: `results`, `suggestion()`, `plot()`.

    Raises:
        ValueError: another mode.
        MisconfigurationException: when it runs: not exactly one optimizer.
        AttributeError: when it runs: the attribute is nowhere.

    Example::

        class FindAgain(LearningRateFinder):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 5:
                    self.lr_find(trainer, pl_module)
    """

    SUPPORTED_MODES = SUPPORTED_MODES
    reads_gradients = False

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
        weights_only: bool | None = None,
    ) -> None:
        mode = mode.lower()
        if mode not in self.SUPPORTED_MODES:
            raise ValueError(f"LearningRateFinder(mode={mode!r}): allowed are {', '.join(self.SUPPORTED_MODES)}.")
        self._options: dict[str, Any] = {
            "min_lr": min_lr,
            "max_lr": max_lr,
            "num_training": num_training_steps,
            "mode": mode,
            "early_stop_threshold": early_stop_threshold,
            "update_attr": update_attr,
            "attr_name": attr_name,
        }
        self._early_exit = False  # the Tuner wants the search alone
        self.optimal_lr: _LRFinder | None = None

    def lr_find(self, trainer: Any, pl_module: Any) -> None:
        """Search now; the result is `optimal_lr`."""
        self.optimal_lr = _lr_find(trainer, pl_module, **self._options)
        if self._early_exit:
            raise TunerExit

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)

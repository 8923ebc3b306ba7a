"""Find the largest batch size that fits into memory when a run starts."""

from __future__ import annotations

import warnings
from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException, TunerExit
from lit_fast.tuner.attributes import lightning_hasattr
from lit_fast.tuner.batch_size_scaling import _scale_batch_size


class BatchSizeFinder(Callback):
    """Tries growing batch sizes before a run, until memory runs out, and runs with the last one that fits.

    The module (or data module) must build its loaders from the attribute that holds the batch size. After the search
    weights, optimizer, random generators and counters are as before. Call `scale_batch_size` from other hooks to
    search at other times, such as after unfreezing a backbone.

    Args:
        mode: "power" doubles the size until it does not fit, "binsearch" then halves the gap.
        steps_per_trial: steps run at each size.
        init_val: the first size.
        max_trials: sizes tried at most; with "binsearch", sizes that fit.
        batch_arg_name: the attribute, in the module, the data module, or the hparams of either.
        margin: with "binsearch", the share by which the size is reduced in the end.
        max_val: no size beyond this is tried.

    Attributes:
        optimal_batch_size: the result.

    Raises:
        ValueError: another mode, or a margin outside [0, 1).
        MisconfigurationException: in a run: loaders that are built already, several evaluation loaders, no such
            attribute, or not even one row fits.

    Example::

        Trainer(callbacks=[BatchSizeFinder(mode="binsearch", init_val=16)])
    """

    SUPPORTED_MODES = ("power", "binsearch")
    reads_gradients = False

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mode = mode.lower()
        if mode not in self.SUPPORTED_MODES:
            raise ValueError(f"BatchSizeFinder(mode={mode!r}): allowed are {', '.join(self.SUPPORTED_MODES)}.")
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"BatchSizeFinder(margin={margin}): a share in [0, 1) is allowed.")
        self._options: dict[str, Any] = {
            "mode": mode,
            "steps_per_trial": steps_per_trial,
            "init_val": init_val,
            "max_trials": max_trials,
            "batch_arg_name": batch_arg_name,
            "margin": margin,
            "max_val": max_val,
        }
        self._batch_arg_name = batch_arg_name
        self._early_exit = False  # the Tuner wants the search alone
        self.optimal_batch_size: int | None = init_val

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        name = self._batch_arg_name
        given = [key for key, source in trainer._sources.items() if source is not None]
        if "train_dataloader" in given or (stage != "fit" and given):
            raise MisconfigurationException(
                f"BatchSizeFinder cannot change loaders that are built already; define them in the module or a data "
                f"module, with batch_size=self.{name}."
            )
        if not lightning_hasattr(pl_module, name):
            raise MisconfigurationException(
                f"BatchSizeFinder(batch_arg_name={name!r}): there is no such attribute in {type(pl_module).__name__}, "
                f"its data module, or their hparams."
            )
        if hasattr(pl_module, name) and name in getattr(pl_module, "hparams", ()):
            warnings.warn(
                f"There is both module.{name} and module.hparams.{name}; BatchSizeFinder sets both. Keep the one that "
                f"your loaders read.",
                stacklevel=2,
            )

    def scale_batch_size(self, trainer: Any, pl_module: Any) -> None:
        """Search now; the result is `optimal_batch_size`."""
        self.optimal_batch_size = _scale_batch_size(trainer, **self._options)
        if self._early_exit:
            raise TunerExit

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.scale_batch_size(trainer, pl_module)

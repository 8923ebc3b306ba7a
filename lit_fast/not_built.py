"""Classes of Lightning's that are not built yet.

Programs import them at the top and use them only somewhere (`isinstance(trainer.logger, WandbLogger)`, a strategy for
more devices than there are): importing them and asking for them works, making one says what there is instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from lit_fast.errors import MisconfigurationException


class NotBuilt:
    """Base of each of them."""

    instead = ""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        kind = next(base for base in type(self).__mro__ if base.__module__ == __name__)
        raise MisconfigurationException(f"{kind.__name__} is not built yet; {self.instead}")


class _Logger(NotBuilt):
    instead = "allowed are CSVLogger, TensorBoardLogger, and loggers of your own that derive from Logger."


class CometLogger(_Logger): ...


class LitLogger(_Logger): ...


class MLFlowLogger(_Logger): ...


class WandbLogger(_Logger): ...


class ParallelStrategy(NotBuilt):
    instead = "the Trainer runs on one device so far: leave strategy out, or set it to 'auto'."


class DDPStrategy(ParallelStrategy): ...


class DeepSpeedStrategy(DDPStrategy): ...


class FSDPStrategy(ParallelStrategy): ...


class ModelParallelStrategy(ParallelStrategy): ...


class Fabric(NotBuilt):
    instead = "allowed is the Trainer with a LightningModule (automatic_optimization = False for a loop of your own)."

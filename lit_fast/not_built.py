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


class NeptuneLogger(_Logger): ...


class WandbLogger(_Logger): ...


class _Strategy(NotBuilt):
    instead = "allowed are the strategies of docs/distributed.md; with 'ddp' every process has the whole model."


class DataParallelStrategy(_Strategy): ...


class SingleDeviceXLAStrategy(_Strategy): ...


class XLAFSDPStrategy(_Strategy): ...


class XLAStrategy(_Strategy): ...


class XLAAccelerator(NotBuilt):
    instead = "allowed are accelerator='cpu', 'gpu' and 'auto'."

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def auto_device_count() -> int:
        return 0


class _Precision(NotBuilt):
    instead = "allowed are the names that Trainer(precision=...) takes, and classes that derive from Precision."


class BitsandbytesPrecision(_Precision): ...


class FSDPPrecision(_Precision): ...


class TransformerEnginePrecision(_Precision): ...


class XLAPrecision(_Precision): ...


class XLACheckpointIO(NotBuilt):
    instead = "allowed are TorchCheckpointIO, AsyncCheckpointIO, and classes of your own that derive from CheckpointIO."


class XLAProfiler(NotBuilt):
    instead = "allowed are SimpleProfiler, AdvancedProfiler, PyTorchProfiler, and classes that derive from Profiler."


class XLAEnvironment(NotBuilt):
    instead = "allowed are the other environments, and classes of your own that derive from ClusterEnvironment."

    @staticmethod
    def detect() -> bool:
        """False: nothing that such a cluster starts would be joined."""
        return False


class _Collective(NotBuilt):
    instead = "the Trainer runs in one process so far; torch.distributed is there for a program's own processes."


class SingleDeviceCollective(_Collective): ...


class TorchCollective(_Collective): ...


class _CommandLine(NotBuilt):
    instead = "make the Trainer, the module and the data module in the program, with arguments from argparse."


class LightningArgumentParser(_CommandLine): ...


class LightningCLI(_CommandLine): ...


class SaveConfigCallback(_CommandLine): ...


class DeepSpeedSummary(NotBuilt):
    instead = "allowed is ModelSummary."


class MNISTDataModule(NotBuilt):
    instead = "allowed is a LightningDataModule of your own around torchvision.datasets.MNIST."


class Fabric(NotBuilt):
    instead = "allowed is the Trainer with a LightningModule (automatic_optimization = False for a loop of your own)."


class ThroughputMonitor(Fabric):
    """Fabric's; the Trainer's is a callback."""

    instead = "allowed is the callback of that name with a Trainer, or Throughput by itself."

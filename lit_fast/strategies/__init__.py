"""How one model spreads over devices and processes. So far: one device."""

from lit_fast.not_built import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lit_fast.strategies.single_device import SingleDeviceStrategy
from lit_fast.strategies.strategy import Strategy

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "XLAStrategy",
]

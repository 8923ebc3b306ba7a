"""How one model spreads over devices and processes. Each strategy is imported when it is first used."""

from __future__ import annotations

from typing import Any

from lit_fast import lazy, not_built

_HOME = {
    "DDPStrategy": "ddp",
    "DeepSpeedStrategy": "deepspeed",
    "FSDP2Strategy": "fsdp2",
    "FSDPStrategy": "fsdp2",
    "ModelParallelStrategy": "model_parallel",
    "ParallelStrategy": "parallel",
    "SingleDeviceStrategy": "single_device",
    "Strategy": "strategy",
    "TorchDDPStrategy": "ddp_torch",
    "ZeRO1Strategy": "zero1",
}
_LATER = (
    "SingleDeviceXLAStrategy", "XLAStrategy",
)  # fmt: skip

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDP2Strategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "TorchDDPStrategy",
    "XLAStrategy",
    "ZeRO1Strategy",
]


def __getattr__(name: str) -> Any:
    return getattr(not_built, name) if name in _LATER else lazy.find(__name__, _HOME, name)

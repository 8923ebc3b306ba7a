"""One process, one device: every collective is the identity."""

from __future__ import annotations

from typing import Any

import torch

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.strategies.strategy import Strategy


class SingleDeviceStrategy(Strategy):
    """The strategy of a Trainer on one device.

    Args:
        device: where the model and its batches live.
        accelerator, checkpoint_io, precision_plugin: as of `Strategy`.

    Example:
        >>> strategy = SingleDeviceStrategy("cpu")
        >>> strategy.root_device, strategy.broadcast("a"), strategy.is_global_zero
        (device(type='cpu'), 'a', True)
    """

    strategy_name = "single_device"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        accelerator: Any = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self.root_device = torch.device(device)

"""Throughput over a rolling window, the FLOPs of a model, and the peaks of devices that they are compared with."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException


class Throughput:
    """Batches, samples, items and FLOPs per second over the last `window_size` updates.

    Args:
        available_flops: peak FLOP/s of one device, for the utilization (MFU).
        world_size: devices; with more than one, totals over all of them are computed too.
        window_size: updates that a rate is computed over, at least 2: rates appear when there are that many.
        separator: between "device" and the name of a rate of one device.

    Raises:
        MisconfigurationException: a `world_size` below 1 or a `window_size` below 2.

    Example:
        >>> throughput = Throughput(window_size=2)
        >>> throughput.update(time=1.0, batches=1, samples=8)
        >>> throughput.update(time=3.0, batches=2, samples=16)
        >>> throughput.compute()["device/samples_per_sec"]
        4.0
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        if world_size < 1:
            raise MisconfigurationException(f"Throughput(world_size={world_size}): at least 1.")
        if window_size < 2:
            raise MisconfigurationException(
                f"Throughput(window_size={window_size}): at least 2, since a rate is taken between two updates."
            )
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._time: deque[float] = deque(maxlen=window_size)
        self._batches: deque[int] = deque(maxlen=window_size)
        self._samples: deque[int] = deque(maxlen=window_size)
        self._lengths: deque[int] = deque(maxlen=window_size)
        self._flops: deque[float] = deque(maxlen=window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Add one measurement. All but `flops` count from the beginning, per device, and grow with every call.

        Args:
            time: seconds.
            batches, samples, lengths: batches, samples, and items in the samples (such as tokens) so far.
            flops: FLOPs since the last update, per device.

        Raises:
            ValueError: a count does not grow; fewer samples than batches or items than samples; `lengths` were given
                in some updates only.
        """
        if samples < batches:
            raise ValueError(f"samples={samples} is less than batches={batches}; a batch holds at least one sample.")
        if lengths is not None and lengths < samples:
            raise ValueError(f"lengths={lengths} is less than samples={samples}; a sample holds at least one item.")
        if (lengths is None) != (len(self._lengths) == 0) and self._time:
            raise ValueError("`lengths` was given in some updates and not in others; give it always or never.")
        _append(self._time, time, "time")
        _append(self._batches, batches, "batches")
        _append(self._samples, samples, "samples")
        if lengths is not None:
            _append(self._lengths, lengths, "lengths")
        if flops is not None:
            self._flops.append(flops * self.world_size)

    def compute(self) -> dict[str, float]:
        """The newest counts, and the rates once the window is full.

        Names: time, batches, samples, lengths; device/{batches,samples,items,flops}_per_sec, device/mfu; without
        "device/" the same over all devices, where there are several.
        """
        counts = {"batches": self._batches, "samples": self._samples, "lengths": self._lengths}
        metrics: dict[str, float] = {"time": self._time[-1]}
        metrics.update({name: values[-1] for name, values in counts.items() if values})
        if len(self._time) < (self._time.maxlen or 0):
            return metrics
        seconds = self._time[-1] - self._time[0]
        rates = {
            ("items" if name == "lengths" else name): (values[-1] - values[0]) / seconds
            for name, values in counts.items()
            if len(values) == values.maxlen
        }
        if len(self._flops) == self._flops.maxlen:  # those of the first update were spent before `seconds` began
            rates["flops"] = (sum(self._flops) - self._flops[0]) / seconds / self.world_size
        for name, rate in rates.items():
            metrics[f"device{self.separator}{name}_per_sec"] = rate
            if self.world_size > 1:
                metrics[f"{name}_per_sec"] = rate * self.world_size
        if "flops" in rates and self.available_flops:
            metrics[f"device{self.separator}mfu"] = rates["flops"] / self.available_flops
        return metrics

    def reset(self) -> None:
        """Begin anew."""
        for values in (self._time, self._batches, self._samples, self._lengths, self._flops):
            values.clear()


def _append(values: deque[Any], value: float, name: str) -> None:
    if values and value <= values[-1]:
        raise ValueError(f"{name}={value} does not grow: the last update had {values[-1]}.")
    values.append(value)


def measure_flops(
    model: torch.nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """FLOPs of one forward pass, and with `loss_fn` of the backward pass too, as torch counts them.

    Args:
        model: the model that `forward_fn` runs; on the meta device nothing is computed, only counted.
        forward_fn: runs the model and returns its output.
        loss_fn: makes a scalar of that output, to run backward from.

    Example:
        >>> with torch.device("meta"):
        ...     model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
        >>> measure_flops(model, lambda: model(x))
        128
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            torch.autograd.backward(loss_fn(output))
    return int(counter.get_total_flops())


class Peak(NamedTuple):
    """Peak TFLOP/s of one kind of device: dense, that is without the doubling for sparse matrices."""

    name: str  # as a word of torch.cuda.get_device_name
    half: float  # 16-bit, accumulated in fp32
    single: float  # fp32 proper, without TF32
    double: float
    tensor_float: bool = True  # Ampere or newer: bf16, and TF32 at half the 16-bit rate


# Source: NVIDIA's data sheets and architecture papers. The first row that fits counts.
PEAKS = (
    Peak("B200", 2250.0, 75.0, 37.0),
    Peak("H200 NVL", 835.0, 60.0, 30.0),
    Peak("H200", 989.4, 66.9, 33.5),
    Peak("H100 PCIe", 756.0, 51.2, 25.6),
    Peak("H100 NVL", 835.0, 60.0, 30.0),
    Peak("H100", 989.4, 66.9, 33.5),
    Peak("A100", 312.0, 19.5, 9.7),
    Peak("A10G", 70.0, 35.0, 0.5),
    Peak("A10", 125.0, 31.2, 0.5),
    Peak("A40", 149.7, 37.4, 0.6),
    Peak("A6000", 154.8, 38.7, 0.6),
    Peak("L40S", 362.0, 91.6, 1.4),
    Peak("L40", 181.0, 90.5, 1.4),
    Peak("L4", 121.0, 30.3, 0.5),
    Peak("RTX 4090", 165.2, 82.6, 1.3),
    Peak("RTX 3090", 71.0, 35.6, 0.6),
    Peak("T4", 65.0, 8.1, 0.3, tensor_float=False),
    Peak("V100-SXM2", 125.0, 15.7, 7.8, tensor_float=False),
    Peak("V100-SXM3", 125.0, 15.7, 7.8, tensor_float=False),
    Peak("V100-PCIE", 112.0, 14.0, 7.0, tensor_float=False),
)


def get_available_flops(device: torch.device, dtype: torch.dtype) -> int | None:
    """Peak FLOP/s of `device` for matrix products in `dtype`; None on a CPU, and with a warning where it is not known.

    float32 counts as TF32 where `torch.get_float32_matmul_precision()` allows it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for peak in PEAKS if re.search(rf"\b{peak.name}\b", name)), None)
    tensor_float = peak is not None and peak.tensor_float and torch.get_float32_matmul_precision() != "highest"
    rate = None if peak is None else _rate(peak, dtype, tensor_float)
    if rate is None:
        warnings.warn(f"The peak FLOP/s of {name!r} in {dtype} is not known: no utilization.", stacklevel=2)
        return None
    return int(rate * 1e12)


def _rate(peak: Peak, dtype: torch.dtype, tensor_float: bool) -> float | None:
    if dtype == torch.float16 or (dtype == torch.bfloat16 and peak.tensor_float):
        return peak.half
    if dtype == torch.float32:
        return peak.half / 2 if tensor_float else peak.single
    return peak.double if dtype == torch.float64 else None


def compute_dtype(precision: str) -> torch.dtype:
    """What matrix products are computed in at a Trainer `precision` ("bf16-mixed", "64-true", ...)."""
    kinds = {"64": torch.float64, "16": torch.float16, "bf16": torch.bfloat16}
    return kinds.get(precision.split("-")[0], torch.float32)

"""Which devices a Trainer runs on: what `accelerator` and `devices` mean."""

from __future__ import annotations

from typing import Any

import torch

from lit_fast.errors import MisconfigurationException


class Accelerator:
    """A kind of device. Lightning's names for what a program asks of one."""

    device_type = ""

    @classmethod
    def name(cls) -> str:
        return cls.device_type

    @staticmethod
    def is_available() -> bool:
        """Whether this torch can use such a device, here and now."""
        raise NotImplementedError

    @staticmethod
    def auto_device_count() -> int:
        """How many there are."""
        raise NotImplementedError

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Numbers about the device, by name; what they are depends on its kind."""
        raise NotImplementedError


class CPUAccelerator(Accelerator):
    """The processor."""

    device_type = "cpu"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def auto_device_count() -> int:
        return 1

    def get_device_stats(self, device: Any) -> dict[str, float]:
        """Shares of processor, memory and swap in use, in percent.

        Raises:
            ModuleNotFoundError: psutil is not installed.
        """
        import psutil

        return {
            "cpu_vm_percent": psutil.virtual_memory().percent,
            "cpu_percent": psutil.cpu_percent(),
            "cpu_swap_percent": psutil.swap_memory().percent,
        }


class CUDAAccelerator(Accelerator):
    """NVIDIA GPUs (and AMD's, through a ROCm build of torch)."""

    device_type = "cuda"

    @staticmethod
    def is_available() -> bool:
        return torch.cuda.is_available()

    @staticmethod
    def auto_device_count() -> int:
        return torch.cuda.device_count()

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """torch's memory statistics of the device, in bytes and counts."""
        return dict(torch.cuda.memory_stats(device))


class MPSAccelerator(Accelerator):
    """Apple's GPU. Known by name: lit_fast has no kernels for it, and refuses it."""

    device_type = "mps"

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def auto_device_count() -> int:
        return 1


def is_cuda_available() -> bool:
    """Whether this torch sees a CUDA device."""
    return num_cuda_devices() > 0


def num_cuda_devices() -> int:
    """How many CUDA devices this torch sees."""
    return torch.cuda.device_count()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Indices of CUDA devices that a tensor can be put on now: not those that another process has to itself.

    Args:
        num_devices: how many are wanted; -1 for all.

    Raises:
        MisconfigurationException: there are not that many.
    """
    if num_devices == 0:
        return []
    there = num_cuda_devices()
    usable: list[int] = []
    for index in range(there):
        if len(usable) == num_devices:
            break
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:  # in exclusive mode, and taken
            continue
        usable.append(index)
    if not there or len(usable) < num_devices:
        raise MisconfigurationException(
            f"find_usable_cuda_devices({num_devices}): of {there} CUDA devices that this torch ({torch.__version__}) "
            f"sees, {len(usable)} are free; ask for at most that many, or run on accelerator='cpu'."
        )
    return usable


ACCELERATORS: dict[str, type[Accelerator]] = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "gpu": CUDAAccelerator}


def resolve_accelerator(accelerator: Any, devices: Any, strategy: Any) -> tuple[Accelerator, list[torch.device]]:
    """The kind of device, and this machine's devices, one for each process.

    Raises:
        MisconfigurationException: a name that is unknown, or a device that is not there.
    """
    from lit_fast.strategies import SingleDeviceStrategy

    own_device = strategy.root_device if isinstance(strategy, SingleDeviceStrategy) else None
    if own_device is not None and accelerator == "auto":
        accelerator = own_device.type
    chosen = _accelerator(accelerator)
    own_devices = getattr(strategy, "parallel_devices", None) or ([own_device] if own_device is not None else None)
    return chosen, own_devices or _devices(chosen, accelerator, devices)


def _accelerator(given: Any) -> Accelerator:
    if isinstance(given, Accelerator):
        chosen = given
    else:
        name = given.lower() if isinstance(given, str) else given
        if name == "auto":
            return CUDAAccelerator() if CUDAAccelerator.is_available() else CPUAccelerator()
        if name == "mps":
            chosen = MPSAccelerator()
        elif isinstance(name, str) and name in ACCELERATORS:
            chosen = ACCELERATORS[name]()
        else:
            raise MisconfigurationException(
                f"Trainer(accelerator={given!r}): allowed are 'auto', 'cpu', 'gpu', 'cuda'."
            )
    if isinstance(chosen, MPSAccelerator):
        raise MisconfigurationException(
            f"Trainer(accelerator={given!r}): lit_fast has no kernels for Apple's GPUs; use accelerator='cpu'."
        )
    if not chosen.is_available():
        raise MisconfigurationException(
            f"Trainer(accelerator={given!r}): this torch ({torch.__version__}) sees no CUDA device; "
            f"use accelerator='cpu' or 'auto', or a CUDA build of torch."
        )
    return chosen


def _devices(accelerator: Accelerator, name: Any, devices: Any) -> list[torch.device]:
    """The devices that `devices` means: a number of them, -1 for all, or a list of indices (in a text: "0,")."""
    indices = _indices(devices)
    there = accelerator.auto_device_count()
    if indices is None:
        indices = list(range(there))
    if not indices:
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}, accelerator={name!r}) asks for no device; allowed are 1, [index], 'auto'."
        )
    if accelerator.device_type == "cpu":
        return [torch.device("cpu")] * len(indices)  # processes
    if not all(0 <= index < there for index in indices) or len(set(indices)) < len(indices):
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}): there are {there} CUDA devices, counted from 0, each for one process."
        )
    return [torch.device(accelerator.device_type, index) for index in indices]


def _indices(devices: Any) -> list[int] | None:
    """The indices that were asked for; None for all there are."""
    given = devices.strip() if isinstance(devices, str) else devices
    try:
        if given in ("auto", "-1", -1) and not isinstance(given, bool):
            return None
        if isinstance(given, str):
            given = [int(part) for part in given.split(",") if part.strip()] if "," in given else int(given)
        if isinstance(given, list | tuple) and all(type(index) is int for index in given):
            return list(given)
        if type(given) is int and given >= 0:
            return list(range(given))
    except ValueError:
        pass
    raise MisconfigurationException(
        f"Trainer(devices={devices!r}): allowed are a number of devices (1), a list of indices ([0], '0,'), -1 for "
        f"all, and 'auto'."
    )

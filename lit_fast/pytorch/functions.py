"""Small functions that programs import from Lightning's utilities, where lit_fast itself has no use for them."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lit_fast import hooks
from lit_fast.accelerators import CPUAccelerator
from lit_fast.data.transfer import walk
from lit_fast.errors import MisconfigurationException, PossibleUserWarning

if TYPE_CHECKING:
    from pathlib import Path


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """Norms of the gradients of each parameter, and of all of them, under the names that Lightning logs them by.

    Args:
        module: its parameters without a gradient are left out.
        norm_type: the p of the p-norm, above 0; "inf" for the largest absolute value.
        group_separator: stands between "grad_<p>_norm" and the parameter's name.

    Returns:
        "grad_2.0_norm/weight", ..., and "grad_2.0_norm_total", the norm of those norms; empty without gradients.

    Raises:
        MisconfigurationException: `norm_type` is not above 0.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> {name: round(norm.item(), 3) for name, norm in grad_norm(layer, norm_type=2).items()}
        {'grad_2.0_norm/weight': 1.414, 'grad_2.0_norm_total': 1.414}
    """
    power = float(norm_type)
    if not power > 0:
        raise MisconfigurationException(f"norm_type={norm_type!r}: a number above 0, or 'inf', is allowed.")
    norms = {
        f"grad_{power}_norm{group_separator}{name}": parameter.grad.detach().norm(power)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        norms[f"grad_{power}_norm_total"] = torch.stack(list(norms.values())).norm(power)
    return norms


def is_overridden(method_name: str, instance: object = None, parent: type | None = None) -> bool:
    """Whether the class of `instance` defines `method_name` itself instead of inheriting it from `parent`.

    Args:
        parent: LightningModule, LightningDataModule or Callback, whichever `instance` is, where not given.

    Raises:
        MisconfigurationException: `instance` is none of these, or `parent` has no such method.
    """
    import lit_fast

    if instance is None:
        return False
    bases: tuple[type, ...] = (lit_fast.LightningModule, lit_fast.LightningDataModule, lit_fast.Callback)
    base = parent or next((base for base in bases if isinstance(instance, base)), None)
    if base is None or not hasattr(base, method_name):
        raise MisconfigurationException(
            f"is_overridden({method_name!r}, a {type(instance).__name__}): pass as `parent` the class whose "
            f"{method_name} is meant."
        )
    return hooks.is_overridden(method_name, instance, base)


def suggested_max_num_workers(local_world_size: int) -> int:
    """Loader workers for each of `local_world_size` processes, so that one CPU core of its share stays free.

    Raises:
        MisconfigurationException: fewer than one process.
    """
    if local_world_size < 1:
        raise MisconfigurationException(f"local_world_size={local_world_size}: at least 1 is allowed.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """The names of parameters that are one tensor, a list for each such tensor.

    Example:
        >>> tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tied[1].weight = tied[0].weight
        >>> find_shared_parameters(tied)
        [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def set_shared_parameters(module: nn.Module, shared_params: Iterable[list[str]]) -> nn.Module:
    """Make each group of names that `find_shared_parameters` gave one tensor again: the first one's."""
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
    return module


def load_hparams_from_yaml(config_yaml: str | Path, use_omegaconf: bool = True) -> dict[str, Any]:
    """The hyperparameters of a `hparams.yaml`; an empty dict where there is no such file.

    Plain data only. `use_omegaconf` is accepted and makes no difference.
    """
    import yaml

    if not os.path.isfile(config_yaml):
        return {}
    with open(config_yaml, encoding="utf-8") as file:
        return dict(yaml.safe_load(file) or {})


def save_hparams_to_yaml(
    config_yaml: str | Path, hparams: Mapping[str, Any] | argparse.Namespace, use_omegaconf: bool = True
) -> None:
    """Write hyperparameters as plain data; what YAML cannot hold as such is written as its `str`."""
    from lit_fast.loggers.utilities import params_dict, write_yaml

    write_yaml(config_yaml, params_dict(hparams))


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """The same collection with its tensors detached, and moved to the CPU where `to_cpu`."""

    def detach(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return item.detach().cpu() if to_cpu else item.detach()

    return walk(in_dict, detach)


def has_iterable_dataset(dataloader: object) -> bool:
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def sized_len(dataloader: object) -> int | None:
    """`len(dataloader)` where it has one."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(dataloader: object) -> bool:
    return sized_len(dataloader) is not None


def has_len_all_ranks(
    dataloader: object, strategy: Any = None, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> bool:
    """The same for all processes, of which there is one."""
    return has_len(dataloader)


def is_shared_filesystem(strategy: Any, path: str | Path | None = None, timeout: int = 3) -> bool:
    """Whether all processes see the same files under `path`: there is one."""
    return True


def is_wrapped(obj: object) -> bool:
    """Whether `Fabric.setup` made `obj`: it is not built, and made none."""
    return False


def get_cpu_stats() -> dict[str, float]:
    """Shares of processor, memory and swap in use, in percent."""
    return CPUAccelerator().get_device_stats("cpu")


def is_picklable(obj: object) -> bool:
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def get_filesystem(path: str | Path, **kwargs: Any) -> Any:
    """The fsspec file system that `path` is on.

    Raises:
        ModuleNotFoundError: fsspec is not installed.
    """
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, _ = url_to_fs(str(path), **kwargs)
    return filesystem


def disable_possible_user_warnings(module: str = "") -> None:
    """Ignore every `PossibleUserWarning` (of modules whose name begins with `module`)."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)

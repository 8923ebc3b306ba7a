"""Which strategy `Trainer(strategy=..., devices=..., num_nodes=...)` means: Lightning's names, and ours."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.launchers import is_interactive
from lit_fast.strategies.parallel import ParallelStrategy
from lit_fast.strategies.single_device import SingleDeviceStrategy
from lit_fast.strategies.strategy import Strategy

# name: (class, in the file of lit_fast/strategies/, its arguments)
STRATEGIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("DDPStrategy", "ddp", {}),
    "ddp_spawn": ("DDPStrategy", "ddp", {"start_method": "spawn"}),
    "ddp_fork": ("DDPStrategy", "ddp", {"start_method": "fork"}),
    "ddp_notebook": ("DDPStrategy", "ddp", {"start_method": "fork"}),
    "ddp_torch": ("TorchDDPStrategy", "ddp_torch", {}),
}
for _name, (_kind, _file, _options) in list(STRATEGIES.items()):
    for _unused in (False, True):
        STRATEGIES[f"{_name}_find_unused_parameters_{str(_unused).lower()}"] = (
            _kind,
            _file,
            {**_options, "find_unused_parameters": _unused},
        )
STRATEGIES |= {
    "zero1": ("ZeRO1Strategy", "zero1", {}),
    "fsdp2": ("FSDP2Strategy", "fsdp2", {}),
    "fsdp2_cpu_offload": ("FSDP2Strategy", "fsdp2", {"cpu_offload": True}),
    "fsdp": ("FSDPStrategy", "fsdp2", {}),
    "fsdp_cpu_offload": ("FSDPStrategy", "fsdp2", {"cpu_offload": True}),
    "model_parallel": ("ModelParallelStrategy", "model_parallel", {}),
    "deepspeed": ("DeepSpeedStrategy", "deepspeed", {}),
    "deepspeed_stage_1": ("DeepSpeedStrategy", "deepspeed", {"stage": 1}),
    "deepspeed_stage_2": ("DeepSpeedStrategy", "deepspeed", {"stage": 2}),
    "deepspeed_stage_2_offload": ("DeepSpeedStrategy", "deepspeed", {"stage": 2, "offload_optimizer": True}),
    "deepspeed_stage_3": ("DeepSpeedStrategy", "deepspeed", {"stage": 3}),
    "deepspeed_stage_3_offload": (
        "DeepSpeedStrategy",
        "deepspeed",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}


def choose_strategy(
    given: Any, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment | None
) -> Strategy:
    """The strategy, which knows its devices.

    Args:
        given: a name, or a strategy's object.
        devices: of this machine, one a process.
        environment: a cluster that was asked for; None: what is found.

    Raises:
        MisconfigurationException: a name that there is not, or a strategy that cannot take so many devices.
    """
    if isinstance(given, str):
        name = given.lower()
        several = len(devices) > 1 or num_nodes > 1
        if name == "auto":
            name = ("ddp_notebook" if is_interactive() else "ddp") if several else "single_device"
        if name == "single_device":
            if several:
                raise MisconfigurationException(
                    f"Trainer(strategy={given!r}) runs on one device, and devices={len(devices)}, "
                    f"num_nodes={num_nodes} were asked for: use strategy='ddp' or another parallel one, or devices=1."
                )
            strategy: Strategy = SingleDeviceStrategy(devices[0])
        else:
            strategy = _named(given, name)
    elif isinstance(given, Strategy):
        strategy = given
    else:
        raise MisconfigurationException(
            f"Trainer(strategy={given!r}): allowed are a name ({_names()}) or a Strategy's object."
        )
    if environment is not None:
        strategy.cluster_environment = environment
    if isinstance(strategy, ParallelStrategy):
        strategy.place(devices, num_nodes)
    elif len(devices) > 1 or num_nodes > 1:
        raise MisconfigurationException(
            f"Trainer(strategy={type(strategy).__name__}(...), devices={len(devices)}, num_nodes={num_nodes}): that "
            f"strategy runs on one device; use 'ddp' or another parallel one, or devices=1."
        )
    return strategy


def _named(given: str, name: str) -> Strategy:
    if name not in STRATEGIES:
        close = difflib.get_close_matches(name, STRATEGIES, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; allowed are {_names()}."
        raise MisconfigurationException(f"Trainer(strategy={given!r}) is unknown{hint}")
    kind, file, options = STRATEGIES[name]
    made: Strategy = getattr(importlib.import_module(f"lit_fast.strategies.{file}"), kind)(**options)
    return made


def _names() -> str:
    return ", ".join(repr(name) for name in ("auto", "single_device", *STRATEGIES) if "find_unused" not in name)

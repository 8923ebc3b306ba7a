"""Weights and optimizer states that DeepSpeed's processes hold parts of, as one process with all of them has them.

DeepSpeed lays the parameters of a param group out one after the other, in float32, and gives each process a part. The
optimizer steps that part, and its states are of the same length. `deepspeed.utils` gathers and scatters by parameter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_fast.errors import CheckpointError


def whole_parameters(module: nn.Module, state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """`state` with every parameter whole: its float32 master where it has one, else itself. All processes must call it.

    Args:
        keep: False throws away what was gathered, in processes that only take part.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[Parameter, Tensor] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if name not in state:
            continue
        if p not in found:
            value = safe_get_full_fp32_param(p) if p.requires_grad else None
            if value is None and hasattr(p, "ds_id"):  # frozen, and in parts
                with zero.GatheredParameters([p]):
                    value = p.detach().clone()
            if value is None or (not hasattr(p, "ds_id") and not torch.equal(value.to(p.dtype), p)):
                value = p.detach()  # no master, or somebody has changed the weights since the last step
            found[p] = value.cpu() if keep else torch.empty(0)
        state[name] = found[p]
    return state


def masters_of(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint's weights those that the module's are, rounded to its dtype: nobody has changed them since."""
    own = dict(module.named_parameters())
    return {name: state[name] for name, p in own.items() if name in state and torch.equal(state[name].to(p), p)}


def fill_masters(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put weights into the float32 masters of an engine, which has rounded them, or has not seen them."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, p in module.named_parameters():
        value = state.get(name)
        if p.requires_grad and isinstance(value, Tensor):
            safe_set_full_fp32_param(p, value.to(p.device, torch.float32))


class OptimizerParts:
    """The states of an optimizer whose parameters an engine has replaced by flat parts, under the original ones.

    Args:
        optimizer: before `deepspeed.initialize`.
        stage: of ZeRO.
    """

    def __init__(self, optimizer: Optimizer, stage: int) -> None:
        self.optimizer, self.stage = optimizer, stage
        self._groups = [(group, list(group["params"])) for group in optimizer.param_groups]
        self._zero: Any = None

    def take(self, zero: Any) -> None:
        """`zero`: DeepSpeed's optimizer around this one."""
        self._zero = zero

    def _flat(self) -> Iterator[tuple[list[Parameter], list[Tensor]]]:
        """Of each param group its trained parameters, and what this process steps of them."""
        held = {id(group): number for number, group in enumerate(self.optimizer.param_groups)}
        for group, params in self._groups:
            trained = [p for p in params if p.requires_grad]
            if not trained:
                yield [], []
            elif self.stage < 3:
                yield trained, group["params"]
            else:
                of = self._zero.sub_group_to_group_id
                flats = self._zero.fp32_partitioned_groups_flat
                yield trained, [flat for i, flat in enumerate(flats) if of[i] == held[id(group)]]

    def state_dict(self, keep: bool) -> dict[str, Any]:
        """What `optimizer.state_dict()` would be with whole parameters. All processes must call it.

        Args:
            keep: False leaves the states of parameters out, in processes that only take part.

        Raises:
            CheckpointError: a state that is no number for each element, and no number for all.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = self.optimizer
        whole: defaultdict[Tensor, Any] = defaultdict(dict)
        for params, flats in self._flat():
            entry = optimizer.state.get(flats[0]) if flats else None
            if entry:
                self._link(params, flats)
            for p in params if entry else ():
                for key, value in (entry or {}).items():
                    if _is_per_element(value) and value.shape != flats[0].shape:
                        raise CheckpointError(
                            f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for a part of "
                            f"{flats[0].numel()} elements: that belongs to no single parameter, and cannot be saved."
                        )
                    of_p = safe_get_full_optimizer_state(p, key) if _is_per_element(value) else copy.deepcopy(value)
                    if keep:  # copied, since a step that parameters share would be counted once for each of them
                        whole[p][key] = of_p.detach().cpu() if isinstance(of_p, Tensor) else of_p
        state, groups, parts = optimizer.state, optimizer.param_groups, [group["params"] for group, _ in self._groups]
        try:
            optimizer.state, optimizer.param_groups = whole, [group for group, _ in self._groups]
            for group, params in self._groups:
                group["params"] = params
            saved: dict[str, Any] = optimizer.state_dict()
        finally:
            optimizer.state, optimizer.param_groups = state, groups
            for (group, _), part in zip(self._groups, parts, strict=True):
                group["params"] = part
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take this process's parts of what a process with whole parameters has saved.

        Raises:
            ValueError: it is of other param groups or shapes, or parameters have taken different numbers of steps.
        """
        groups = saved["param_groups"]
        counts = [len(group["params"]) for group in groups]
        own = [len(params) for _, params in self._groups]
        if counts != own:
            raise ValueError(f"its param groups hold {counts} parameters, and this run's {own}")
        for (group, params), flat, held in zip(self._groups, self._flat(), groups, strict=True):
            group.update({key: copy.deepcopy(value) for key, value in held.items() if key != "params"})
            of = dict(zip(params, held["params"], strict=True))
            self._fill(*flat, {p: saved["state"][of[p]] for p in flat[0] if saved["state"].get(of[p])})

    def _fill(self, params: list[Parameter], flats: list[Tensor], entries: dict[Parameter, Mapping[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        state = self.optimizer.state
        for flat in flats:
            state.pop(flat, None)
        if not entries:
            return
        first = next(iter(entries.values()))
        for flat in flats:
            state[flat] = {
                key: torch.zeros_like(flat, requires_grad=False) if _is_per_element(value) else copy.deepcopy(value)
                for key, value in first.items()
            }
        self._link(params, flats)
        for p, entry in entries.items():
            for key, value in entry.items():
                if not _is_per_element(value):
                    if value != first.get(key):
                        raise ValueError(
                            f"{key} is {value} for one parameter and {first.get(key)} for another of its param group; "
                            f"DeepSpeed keeps one for all"
                        )
                    continue
                if value.numel() != getattr(p, "ds_numel", p.numel()):
                    raise ValueError(f"{key} has the shape {tuple(value.shape)}, and its parameter {tuple(p.shape)}")
                safe_set_full_optimizer_state(p, value.to(flats[0].device, torch.float32), key)

    def _link(self, params: list[Parameter], flats: list[Tensor]) -> None:
        """Let parameters know their pieces of the states. DeepSpeed does so after the first step of the first param
        group, when the others have no states yet (seen in 0.19.8)."""
        for p in params if self.stage < 3 else ():
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # it has a piece here
                mapping.set_optim_state_fragment(flats[0], self.optimizer.state[flats[0]])


def _is_per_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0

"""Adagrad: `torch.optim.Adagrad` on the formula of csrc/formulas/adagrad.h.

    g <- g + weight_decay * p
    s <- s + g^2
    p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

p: parameter, g: gradient, s: `sum`, t: `step` from 1. Arithmetic is float32 whatever the tensors hold.

Not here: sparse gradients, `differentiable`; torch's own step runs then.

Reference: Duchi, Hazan & Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fast.ops import Mapping, State
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.storage import fill


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """torch fills the state when the optimizer is made; this adds what the storage options ask for."""
    entry = state.setdefault(param, {})
    entry.setdefault("step", torch.zeros((), dtype=torch.float32))
    new = entry.get("sum") is None
    fill(entry, group, param, MAPPING.state_keys)
    if new and "sum" in entry and group["initial_accumulator_value"]:
        entry["sum"].fill_(group["initial_accumulator_value"])


def flops(group: dict[str, Any]) -> int:
    return 7 + (2 if group["weight_decay"] else 0)


class Adagrad(Compiled, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, compiled, with the storage options of lit_fast/optim/storage.py.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch.
        state_dtype: as in `lit_fast.optim.AdamW`, without "8bit".
        master, rounding, seed: as in `lit_fast.optim.AdamW`.

    Raises:
        MisconfigurationException: an option that is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_options({"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps})
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)
        for entry in self.state.values():
            entry["step"] = entry["step"].float()  # float64 where that is torch's default dtype
        for group in self.param_groups:
            if group["state_dtype"] is not None:  # torch has made the sums in the parameters' dtype
                for param in group["params"]:
                    del self.state[param]["sum"]


MAPPING = Mapping(
    formula="adagrad",
    classes=(torch.optim.Adagrad, Adagrad),
    option_keys=("lr", "lr_decay", "eps", "weight_decay", "maximize"),
    refused_keys=("differentiable",),
    state_keys=("sum",),
    step_key="step",
    init_state=init_state,
    flops=flops,
)
Adagrad.mapping = MAPPING

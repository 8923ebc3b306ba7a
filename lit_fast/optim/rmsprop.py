"""RMSprop: `torch.optim.RMSprop` on the formula of csrc/formulas/rmsprop.h.

    g <- g + weight_decay * p
    s <- alpha s + (1 - alpha) g^2
    d <- sqrt(s) + eps;   centered: a <- a + (1 - alpha) (g - a),  d <- sqrt(s - a^2) + eps
    p <- p - lr * g / d;  with momentum: b <- momentum * b + g / d,  p <- p - lr * b

p: parameter, g: gradient, s: `square_avg`, a: `grad_avg`, b: `momentum_buffer`. Arithmetic is float32 whatever the
tensors hold.

Not here: `differentiable`, a learning rate in a tensor on a device; torch's own step runs then.

References: Tieleman & Hinton 2012, "Lecture 6.5: rmsprop"; Graves 2013, arXiv:1308.0850 (centered).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException
from lit_fast.ops import Mapping, State
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.storage import fill


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    entry = state.setdefault(param, {})
    if "step" not in entry:
        entry["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
    names = ["square_avg"]
    if group["centered"]:
        _check_variance(group, param)
        names.append("grad_avg")
    if group["momentum"]:
        names.append("momentum_buffer")
    fill(entry, group, param, names)


def _check_variance(group: dict[str, Any], param: Tensor) -> None:
    """Both averages rounded to 8 bits, one may become less than the square of the other: its root is no number."""
    asked, rounding = group.get("state_dtype"), group.get("rounding")
    drawn = asked is None and rounding == "stochastic" and param.dtype == torch.bfloat16
    if asked == "bfloat16" or drawn:
        raise MisconfigurationException(
            f"RMSprop with centered=True, state_dtype={asked!r}, rounding={rounding!r}: the difference of two averages "
            f"in bfloat16 turns negative (parameter of shape {tuple(param.shape)}). Take state_dtype='float32'."
        )


def flops(group: dict[str, Any]) -> int:
    moments = 4 + (6 if group["centered"] else 0)
    return moments + 2 + (5 if group["momentum"] else 3) + (2 if group["weight_decay"] else 0)


class RMSprop(Compiled, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, compiled, with the storage options of lit_fast/optim/storage.py.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr, alpha, eps, weight_decay, momentum, centered, maximize: as in torch.
        state_dtype: as in `lit_fast.optim.AdamW`, without "8bit"; centered, without "bfloat16" too.
        master, rounding, seed: as in `lit_fast.optim.AdamW`.

    Raises:
        MisconfigurationException: an option that is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_options({"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum})
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, maximize=maximize)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


MAPPING = Mapping(
    formula="rmsprop",
    classes=(torch.optim.RMSprop, RMSprop),
    option_keys=("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    refused_keys=("differentiable",),
    state_keys=("square_avg", "grad_avg", "momentum_buffer"),
    step_key="step",
    init_state=init_state,
    flops=flops,
)
RMSprop.mapping = MAPPING

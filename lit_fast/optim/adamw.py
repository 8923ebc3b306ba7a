"""AdamW and Adam: `torch.optim.AdamW` and `torch.optim.Adam` on the formula of csrc/formulas/adamw.h.

    decoupled decay (AdamW): p <- p (1 - lr * weight_decay)      L2 decay (Adam): g <- g + weight_decay * p
    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

p: parameter, g: gradient, m: `exp_avg`, v: `exp_avg_sq`, t: `step` from 1. Arithmetic is float32 for float32 and
for bfloat16 tensors; the scalars in front are computed in float64.

Bits: equal to torch 2.13's `fused=True` on x86-64 with AVX2 or AVX-512 (float32 and all-bfloat16), also in the
remainder behind torch's last full vector, where its compiler fused the other product of beta2 v + (1 - beta2) g^2.
`fused=False` differs by rounding: on the CPU torch takes MKL's square root there, which is not correctly rounded.
With `amsgrad` the root is taken of the largest v so far (Reddi et al. 2018, arXiv:1904.09237).

Not here: `differentiable`, a learning rate in a tensor on a device; torch's own step runs then.

References: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.

Example:
    >>> import torch
    >>> from lit_fast.optim import adopt
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> adopted = adopt(torch.optim.AdamW([weight], lr=0.1), max_norm=1.0)
    >>> weight.grad = torch.tensor([3.0, 0.0, 4.0])
    >>> adopted.step()
    tensor(5.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fast.ops import Mapping, State
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.storage import fill


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """What torch creates at a parameter's first step: a counter and two or three moments like the parameter."""
    entry = state.setdefault(param, {})
    if "step" not in entry:
        on_device = group["capturable"] or group["fused"]
        entry["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
    fill(entry, group, param, MAPPING.state_keys if group["amsgrad"] else MAPPING.state_keys[:2])


def flops(group: dict[str, Any]) -> int:
    decays_gradient = group["weight_decay"] and not group.get("decoupled_weight_decay", True)
    return 14 + (1 if group["amsgrad"] else 0) + (2 if decays_gradient else 0)


class AdamW(Compiled, torch.optim.AdamW):
    """`torch.optim.AdamW`, compiled, with the storage options of lit_fast/optim/storage.py.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".
        master: None, "float32" or "remainder": keep the float32 value of 16-bit parameters.
        rounding: "nearest" or "stochastic", of bfloat16 parameters and moments.
        seed: of stochastic rounding and of 8-bit moments.

    Raises:
        MisconfigurationException: an option that is not allowed.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=1e-3, state_dtype="float32", master="remainder")
        >>> weight.grad = torch.ones(3, dtype=torch.bfloat16)
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg', 'exp_avg_sq', 'remainder', 'step']
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


class Adam(Compiled, torch.optim.Adam):
    """`torch.optim.Adam`, compiled: as `AdamW`, but `weight_decay` is added to the gradient (L2)."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        decoupled = {"decoupled_weight_decay": decoupled_weight_decay}
        check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, **decoupled)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


MAPPING = Mapping(
    formula="adamw",
    classes=(torch.optim.AdamW, torch.optim.Adam, AdamW, Adam),
    option_keys=("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "amsgrad"),
    refused_keys=("differentiable",),
    state_keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    step_key="step",
    init_state=init_state,
    flops=flops,
)
AdamW.mapping = Adam.mapping = MAPPING

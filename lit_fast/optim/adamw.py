"""AdamW and Adam: `torch.optim.AdamW` and `torch.optim.Adam` on the formula of csrc/formulas/adamw.h.

    decoupled decay (AdamW): p <- p (1 - lr * weight_decay)      L2 decay (Adam): g <- g + weight_decay * p
    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

p: parameter, g: gradient, m: `exp_avg`, v: `exp_avg_sq`, t: `step` from 1. Arithmetic is float32 for float32 and
for bfloat16 tensors; the scalars in front are computed in float64.

Bits: equal to torch 2.13's `fused=True` on x86-64 with AVX2 or AVX-512 (float32 and all-bfloat16), also in the
remainder behind torch's last full vector, where its compiler fused the other product of beta2 v + (1 - beta2) g^2.
`fused=False` rounds in another order in torch itself and differs from this by rounding, as torch's two paths do.

Not here: `amsgrad`, `differentiable`, a learning rate in a tensor on a device; torch's own step runs then.

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


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """What torch creates at a parameter's first step: a counter and two moments like the parameter."""
    entry = state.setdefault(param, {})
    if entry:
        return
    on_device = group["capturable"] or group["fused"]
    dtype = torch.float32 if group["fused"] or torch.get_default_dtype() != torch.float64 else torch.float64
    entry["step"] = torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")
    entry["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    entry["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)


MAPPING = Mapping(
    formula="adamw",
    classes=(torch.optim.AdamW, torch.optim.Adam),
    option_keys=("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    refused_keys=("amsgrad", "differentiable"),
    state_keys=("exp_avg", "exp_avg_sq"),
    step_key="step",
    init_state=init_state,
)

"""Lion on the formula of csrc/formulas/lion.h: the sign of an interpolated momentum.

    p <- p (1 - lr * weight_decay) - lr * sign(beta1 m + (1 - beta1) g)
    m <- beta2 m + (1 - beta2) g

p: parameter, g: gradient, m: `exp_avg`. Arithmetic is float32 whatever the tensors hold.

Reference: Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fast.ops import Mapping, State
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.storage import fill


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    entry = state.setdefault(param, {})
    entry.setdefault("step", torch.zeros((), dtype=torch.float32))
    fill(entry, group, param, MAPPING.state_keys)


def flops(group: dict[str, Any]) -> int:
    return 10


class Lion(Compiled):
    """Lion, compiled; torch has no class of it.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr: learning rate; the paper advises 3 to 10 times less than AdamW's.
        betas: of the interpolation, and of the momentum.
        weight_decay: decoupled; the paper advises 3 to 10 times more than AdamW's.
        maximize: go up instead of down.
        state_dtype, master, rounding, seed: as in `lit_fast.optim.AdamW`.

    Raises:
        MisconfigurationException: an option that is not allowed.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Lion([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.1])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.7500, 1.2500])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        check_options(defaults)
        super().__init__(params, defaults)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


MAPPING = Mapping(
    formula="lion",
    classes=(Lion,),
    option_keys=("lr", "betas", "weight_decay", "maximize"),
    refused_keys=(),
    state_keys=("exp_avg",),
    step_key="step",
    init_state=init_state,
    flops=flops,
)
Lion.mapping = MAPPING

"""LAMB on the formula of csrc/formulas/lamb.h: Adam with a trust ratio for each tensor.

    u <- m^ / (sqrt(v^) + eps) + weight_decay * p
    p <- p - lr * |p| / |u| * u

p: parameter; m^, v^: Adam's moments after bias correction; |.|: L2 norm of one tensor, summed in float64 in an order
that depends on the numbers alone. Arithmetic is float32 whatever the tensors hold.

Reference: You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962,
algorithm 2.
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
    if "step" not in entry:
        entry["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group.get("capturable") else "cpu")
    fill(entry, group, param, MAPPING.state_keys)


def flops(group: dict[str, Any]) -> int:
    return 16


class Lamb(Compiled):
    """LAMB, compiled for the CPU and CUDA; torch has no class of it.

    Bias is corrected and decay is part of the update, as in the paper's algorithm 2. The trust ratio is the norm of the
    parameter over the norm of the update, and 1 where either is 0: a tensor of zeros can leave zero. A step reads
    parameters, gradients and moments twice: the norms are known only when all of a tensor has been seen. A GPU keeps
    them to itself: nobody waits.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root.
        weight_decay: times the parameter, added to the update before its norm is taken.
        maximize: go up instead of down.
        trust_clip: let the trust ratio be 1 at most.
        always_adapt: take the trust ratio where weight_decay is 0, too, as the paper does. timm and Apex do not unless
            asked to: their biases and normalization layers, in a group without decay, take Adam's step.
        capturable: count the steps beside the parameters, so that a CUDA graph can replay a step.
        state_dtype, master, rounding, seed: as in `lit_fast.optim.AdamW`.

    Raises:
        MisconfigurationException: an option that is not allowed.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Lamb([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()  # the update has norm 1, the parameter 5
        >>> weight.detach()
        tensor([2.5000, 4.0000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        trust_clip: bool = False,
        always_adapt: bool = True,
        capturable: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "capturable": capturable,
        }
        check_options(defaults)
        super().__init__(params, defaults)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


MAPPING = Mapping(
    formula="lamb",
    classes=(Lamb,),
    option_keys=("lr", "betas", "eps", "weight_decay", "maximize", "trust_clip", "always_adapt"),
    refused_keys=(),
    state_keys=("exp_avg", "exp_avg_sq"),
    step_key="step",
    init_state=init_state,
    flops=flops,
    whole_tensors=True,
    measured=True,
)
Lamb.mapping = MAPPING

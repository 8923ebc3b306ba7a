"""SGD: `torch.optim.SGD` on the formula of csrc/formulas/sgd.h.

    g <- g + weight_decay * p
    b <- momentum * b + (1 - dampening) * g          (at a parameter's first step: b <- g)
    g <- g + momentum * b  with Nesterov,  g <- b  without
    p <- p - lr * g

p: parameter, g: gradient, b: `momentum_buffer`, which exists only where momentum is not 0. Arithmetic is float32
for float32 and for bfloat16 tensors; torch's default rounds bfloat16 after each line, so there the bits differ.

Bits: in float32 equal to torch 2.13's default and `fused=True` on x86-64 with AVX2 or AVX-512.

Not here: `differentiable`, a learning rate in a tensor on a device; torch's own step runs then.

Reference: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".

Example:
    >>> import torch
    >>> from lit_fast.optim import adopt
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> adopted = adopt(torch.optim.SGD([weight], lr=0.5, momentum=0.9))
    >>> weight.grad = torch.ones(2)
    >>> adopted.step()
    >>> weight.detach()
    tensor([0.5000, 0.5000])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fast.ops import Mapping, State
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.storage import fill, needs_steps


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """An empty buffer like the parameter: the kernel's first step fills it."""
    entry = state.setdefault(param, {})
    if needs_steps(group) and "step" not in entry:
        entry["step"] = torch.zeros((), dtype=torch.float32)
    fill(entry, group, param, MAPPING.state_keys if group["momentum"] else ())


def flops(group: dict[str, Any]) -> int:
    momentum = 0 if not group["momentum"] else 5 if group["nesterov"] else 3
    return 2 + momentum + (2 if group["weight_decay"] else 0)


class SGD(Compiled, torch.optim.SGD):
    """`torch.optim.SGD`, compiled, with the storage options of lit_fast/optim/storage.py.

    Args:
        params: parameters or param groups, of float32, bfloat16 or float16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        state_dtype, master, rounding, seed: as in `lit_fast.optim.AdamW`.

    Raises:
        MisconfigurationException: an option that is not allowed.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([weight], lr=0.5, momentum=0.9, state_dtype="8bit")
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_options({"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)


MAPPING = Mapping(
    formula="sgd",
    classes=(torch.optim.SGD, SGD),
    option_keys=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused"),
    refused_keys=("differentiable",),
    state_keys=("momentum_buffer",),
    step_key="step",
    init_state=init_state,
    flops=flops,
)
SGD.mapping = MAPPING

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


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """An empty buffer like the parameter: the kernel's first step fills it."""
    buffer = torch.empty_like(param, memory_format=torch.preserve_format)
    state.setdefault(param, {})["momentum_buffer"] = buffer


MAPPING = Mapping(
    formula="sgd",
    classes=(torch.optim.SGD,),
    option_keys=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused"),
    refused_keys=("differentiable",),
    state_keys=("momentum_buffer",),
    step_key=None,
    init_state=init_state,
)

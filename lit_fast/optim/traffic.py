"""What the passes of a compiled step move through memory, and compute: counted from the tensors that a step takes.

A step reads each gradient, and reads and writes each parameter and state, but for these:

- a float32 master is read in the place of its parameter, which is then only written;
- a formula that needs norms of whole tensors (LAMB's) has a pass before the step, which reads all of it;
- Muon's first pass writes directions, its second reads them; the matrix products between them are torch's;
- where a norm limits gradients, or a step is left out for a gradient that is not finite, one pass reads them all.

Coefficients, step counters and partial sums are left out: some numbers for a tensor, or for 16,384 elements.

FLOPs are those of csrc/formulas: an FMA is two, everything else of that vocabulary one; a division by what all elements
share is one. Each gradient that a formula sees is multiplied by its scale before, which is one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_fast.ops import Mapping
from lit_fast.optim.adamw import MAPPING as ADAMW
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.mapping import mapping_of
from lit_fast.optim.split import part


@dataclass
class Pass:
    """One pass over the tensors of an optimizer.

    Attributes:
        name: "norm", "scale", the formula's, ...
        kernels: a regular expression for names of GPU kernels, in any case, that take it, as a profiler shows them.
        within: whether it is of the compiled step itself; otherwise it is taken before, where it is at all.
    """

    name: str
    kernels: str
    within: bool = True
    bytes: float = 0.0
    flops: float = 0.0


def passes_of(adopted: AdoptedOptimizer, clips_by_norm: bool = False) -> list[Pass]:
    """The passes of its steps on the gradients that there are; none where the core does not take them.

    Args:
        adopted: has stepped, so that its state is there.
        clips_by_norm: somebody takes the norm of the gradients before the step.

    Example:
        >>> import torch
        >>> from lit_fast.optim import adopt
        >>> weight = torch.nn.Parameter(torch.ones(100))
        >>> adopted = adopt(torch.optim.AdamW([weight]), max_norm=1.0)
        >>> weight.grad = torch.ones(100)
        >>> norm = adopted.step()
        >>> [(found.name, found.bytes) for found in passes_of(adopted) if found.within]
        [('norm', 400.0), ('adamw', 2800.0)]
    """
    mapping, _ = mapping_of(adopted.optimizer)
    if mapping is None or not adopted.compiled:
        return []
    found: dict[str, Pass] = {}

    def add(name: str, kernels: str, moved: float, flops: float, within: bool = True) -> None:
        made = found.setdefault(name, Pass(name, kernels, within))
        made.bytes, made.flops = made.bytes + moved, made.flops + flops

    first = adopted.reads_gradients_first
    for group in adopted.optimizer.param_groups:
        is_muons = mapping.formula == "muon" and group.get("use_muon", True)
        formula = ADAMW if mapping.formula == "muon" and not is_muons else mapping
        for param, gradient, entry in _tensors(adopted.optimizer, group):
            numel, read, state = gradient.numel(), _size(gradient), _states(formula, entry)
            weight_read, weight = _weight(param, entry)
            if clips_by_norm or first:
                add("norm", "square_kernel", read, 2 * numel, first)
            add("scale", "scale_kernel", 2 * read, numel, False)
            if is_muons:
                before, after = ({**group, "second_pass": second} for second in (False, True))
                flops = numel * (formula.flops(before) + 1)
                add("first pass", _step_kernels("muon, 257u"), read + 2 * state + _size(param), flops)
                flops = numel * (formula.flops(after) + 1)
                add("second pass", _step_kernels("muon, 256u"), weight + _size(param), flops)
                continue
            flops = numel * (formula.flops(group) + 1)
            if formula.measured:  # all but its last FMA, and squares of what it finds and of the weights
                kernels = rf"measure_kernel<(\w+::)*{formula.formula}\b"
                add("measure", kernels, weight_read + read + state, flops + 2 * numel)
            add(formula.formula, _step_kernels(formula.formula), weight + read + 2 * state, flops)
    return list(found.values())


def _step_kernels(formula: str) -> str:
    return rf"(direct|staged)_kernel<(\w+::)*{formula}\b|^lit_fast_step_kernel"  # CUDA's, Triton's


def _tensors(optimizer: Any, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Parameter, gradient and state of those that have a gradient: what this process holds of them."""
    for param in group["params"]:
        if param.grad is not None:
            entry = {name: part(value) for name, value in optimizer.state.get(param, {}).items()}
            yield part(param), part(param.grad), entry


def _size(tensor: Any) -> float:
    return float(tensor.numel() * tensor.element_size()) if isinstance(tensor, Tensor) else 0.0


def _weight(param: Tensor, entry: dict[str, Any]) -> tuple[float, float]:
    """Bytes that are read of what keeps a parameter's value, and those that are read or written."""
    if "master" in entry:
        return _size(entry["master"]), 2 * _size(entry["master"]) + _size(param)
    kept = _size(param) + _size(entry.get("remainder"))
    return kept, 2 * kept


def _states(mapping: Mapping, entry: dict[str, Any]) -> float:
    """Bytes of the moments: as they are, or codes and their scales."""
    names = (f"{key}{end}" for key in mapping.state_keys for end in ("", "_codes", "_scale"))
    return sum(_size(entry.get(name)) for name in names)

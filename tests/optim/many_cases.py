"""Many random cases of one optimizer in one storage, stepped at once, with the oracle's bounds on all they store.

Cases that keep the same moments lie in flat tensors, one behind the other. Blocks of 8-bit codes begin where cases do,
and what lies between two cases shows whether a step stays in its own.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Bounded
from storage_cases import DTYPES, Case, expected, moments, options, random_moments, storages
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim.codes import CODE_BLOCK, UNSIGNED, decode, rebuilt, split
from lit_fast.optim.storage import convert

# Around the widths of every target and of a block, mostly short.
LENGTHS = [*3 * (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64), 255, 256, 257, 600]
Way = tuple[type, torch.dtype, torch.dtype, dict[str, Any]]  # optimizer, dtypes of parameter and gradient, storage


def ways(kind: type) -> list[Way]:
    """Everything that an optimizer of that kind may be asked to keep."""
    found = []
    for dtype in DTYPES:
        grads = [dtype, torch.float32] if dtype != torch.float32 and hasattr(Tensor, "grad_dtype") else [dtype]
        found += [(kind, dtype, grad, storage) for grad in grads for storage in storages(kind, dtype)]
    return found


@dataclass
class Cases:
    """Cases of one way with the same moments."""

    way: Way
    names: tuple[str, ...]
    made: list[dict[str, Any]]
    draw: random.Random
    new: bool = False  # the moments are not there yet

    ranges: list[range] = field(init=False)
    index: Tensor = field(init=False)  # of each element of all cases, (elements,)
    case_of: Tensor = field(init=False)  # which case it belongs to, (elements,)
    flat: dict[str, Tensor] = field(init=False)  # param, grad, step (one a case) and the state's
    begin: dict[str, Tensor] = field(init=False)  # of `flat`, before the step
    params: list[Parameter] = field(init=False)

    def __post_init__(self) -> None:
        _, dtype, grad_dtype, storage = self.way
        lengths = [self.draw.choice(LENGTHS) for _ in self.made]
        between = CODE_BLOCK if storage["state_dtype"] == "8bit" else 32
        starts = itertools.accumulate(((n // between + 1) * between for n in lengths), initial=0)
        self.ranges = [range(start, start + n) for start, n in zip(starts, lengths, strict=False)]
        self.index = torch.cat([torch.arange(r.start, r.stop) for r in self.ranges])
        self.case_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        total = (self.ranges[-1].stop // between + 1) * between
        scale = torch.ones(total)
        scale[self.index] = self.per_element([10 ** self.draw.uniform(-2, 0.5) for _ in lengths]).float()
        values = {} if self.new else random_moments(self.names, total, scale)
        param = torch.randn(total)
        state: dict[str, Any] = {"step": torch.zeros(()), **values}
        if storage["master"]:
            state["master"] = param.clone()
        flat_param = param.to(dtype)
        convert(state, storage, flat_param)  # takes a master apart where a remainder is asked for
        state["step"] = torch.tensor([float(self.draw.choice([0, 3, 1000]) if self.begun else 0) for _ in lengths])
        self.flat = {"param": flat_param, "grad": (scale * torch.randn(total)).to(grad_dtype), **state}
        self.params = [Parameter(flat_param[r.start : r.stop]) for r in self.ranges]
        for p, r in zip(self.params, self.ranges, strict=True):
            if grad_dtype != dtype:
                p.grad_dtype = grad_dtype
            p.grad = self.flat["grad"][r.start : r.stop]
        self.begin = {name: tensor.clone() for name, tensor in self.flat.items() if isinstance(tensor, Tensor)}

    @property
    def begun(self) -> bool:
        return bool(self.names) and not self.new

    def per_element(self, numbers: list[Any]) -> Tensor:
        """One number a case as one an element."""
        dtype = torch.bool if isinstance(numbers[0], bool) else torch.float64
        return torch.tensor(numbers, dtype=dtype)[self.case_of]

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Put parameters and states as they are before the step."""
        for name, tensor in self.begin.items():
            self.flat[name].copy_(tensor)
        kept = self.flat.keys() - {"param", "grad"} if self.begun else self.flat.keys() & {"master", "remainder"}
        for case, (p, r) in enumerate(zip(self.params, self.ranges, strict=True)):
            optimizer.state.pop(p, None)
            if kept:
                optimizer.state[p] = {name: part(self.flat[name], name, r) for name in sorted(kept)}
            if self.begun:
                optimizer.state[p]["step"] = self.flat["step"][case]

    def leave(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What is stored now, by name and flat; what the step itself has made is put together."""
        found = dict(self.flat)
        for name in optimizer.state.get(self.params[0], {}):
            if name in found and name != "step":
                continue
            pieces = [optimizer.state[p][name] for p in self.params]
            if name == "step":
                found[name] = torch.stack(pieces)
            elif isinstance(pieces[0], Tensor):
                per = CODE_BLOCK if name.endswith("_scale") else 1
                found[name] = pieces[0].new_zeros(len(self.begin["param"]) // per)
                for piece, r in zip(pieces, self.ranges, strict=True):
                    found[name][r.start // per : r.start // per + len(piece)] = piece
        return found

    def value(self, stored: dict[str, Tensor]) -> Tensor:
        """The parameters in float32, as exactly as they are known, (elements,)."""
        if "remainder" in stored:
            return rebuilt(stored["param"], stored["remainder"])[self.index]
        return stored.get("master", stored["param"]).float()[self.index]

    def moment(self, stored: dict[str, Tensor], name: str) -> Tensor:
        """What a stored moment stands for in float32, (elements,)."""
        if f"{name}_codes" in stored:
            return decode(stored[f"{name}_codes"], stored[f"{name}_scale"], name not in UNSIGNED)[self.index]
        return stored[name].float()[self.index]

    def bounds(self) -> dict[str, Bounded]:
        """What the oracle says of everything that is stored, its rounding included. Keys: param and the moments."""
        kind, dtype, _, storage = self.way
        made: dict[str, Any] = {}
        for name in set().union(*self.made):
            column = [each.get(name, False) for each in self.made]
            pairs = zip(*column, strict=True) if isinstance(column[0], tuple) else None
            made[name] = tuple(map(self.per_element, map(list, pairs))) if pairs else self.per_element(column)
        before = {name: self.moment(self.begin, name) for name in self.names if self.begun}
        step = self.begin["step"].double()[self.case_of]
        grad = self.begin["grad"][self.index]
        case = Case(made, {}, self.params[0], grad, self.value(self.begin), before, {}, step, self.case_of)
        found = expected(kind, case)
        stochastic = storage["rounding"] == "stochastic"
        kept = {None: dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}
        for name, bound in found.items():
            if name == "param":
                found[name] = bound if storage["master"] else bound.stored(dtype, stochastic)
            elif storage["state_dtype"] == "8bit":
                blocks = self.index // CODE_BLOCK
                largest = torch.zeros(len(self.begin["param"]) // CODE_BLOCK, dtype=torch.float64)
                largest.scatter_reduce_(0, blocks, bound.value.abs() + bound.error, "amax")
                found[name] = bound.coded(name not in UNSIGNED, largest[blocks])
            else:
                found[name] = bound.stored(kept[storage["state_dtype"]], stochastic)
        return found

    def untouched(self, stored: dict[str, Tensor]) -> bool:
        """Whether what lies between the cases is as it was."""
        total = len(self.begin["param"])
        between = torch.ones(total, dtype=torch.bool)
        between[self.index] = False
        between = between.nonzero().squeeze(1)
        return all(
            torch.equal(stored[name][between], old[between]) for name, old in self.begin.items() if len(old) == total
        )


def optimizer_over(parts: list[Cases]) -> torch.optim.Optimizer:
    """One optimizer with a group for each case."""
    kind, _, _, storage = parts[0].way
    groups = [
        {"params": [p], **made, **storage, "seed": cases.draw.randrange(2**40)}
        for cases in parts
        for p, made in zip(cases.params, cases.made, strict=True)
    ]
    optimizer: torch.optim.Optimizer = kind(groups[:1])
    for group in groups[1:]:  # add_param_group looks at all parameters again
        optimizer.param_groups.append({**optimizer.defaults, **group})
    return optimizer


def part(value: Any, name: str, r: range) -> Any:
    """Of a flat tensor of the state, what belongs to one case; marks stay marks."""
    if not isinstance(value, Tensor) or name == "step":
        return value
    per = CODE_BLOCK if name.endswith("_scale") else 1
    return value[r.start // per : -(-r.stop // per)]


def many(way: Way, count: int, seed: object) -> list[Cases]:
    """`count` random cases of one way, those with the same moments together."""
    kind = way[0]
    draw = random.Random(f"{kind.__name__} {way[1:]} {seed}")
    torch.manual_seed(draw.randrange(2**32))
    sorted_by: dict[tuple[tuple[str, ...], bool], list[dict[str, Any]]] = {}
    for _ in range(count):
        made = options(kind, draw)
        names = moments(kind, made)
        new = bool(names) and kind.__name__ == "SGD" and draw.random() < 0.3  # its first momentum is the gradient
        sorted_by.setdefault((names, new), []).append(made)
    return [Cases(way, names, made, draw, new) for (names, new), made in sorted_by.items()]


def check(
    part: Cases, stored: dict[str, Tensor], bounds: dict[str, Bounded], used: dict[str, float], where: str
) -> None:
    """Everything stored lies within its bound, and nothing else is written.

    used: the largest share of its bound that an error takes, by name.
    """
    assert part.untouched(stored), where
    for name, bound in bounds.items():
        actual = part.value(stored) if name == "param" else part.moment(stored, name)
        error = (actual.double() - bound.value).abs()
        assert bool((error <= bound.error).all()), f"{name} by {(error - bound.error).max()}: {where}"
        used[name] = max(used.get(name, 0.0), (error / bound.error).nan_to_num(0.0).max().item())
    if "master" in stored:
        assert torch.equal(stored["param"][part.index], part.value(stored).to(stored["param"].dtype)), where
    if "remainder" in stored:
        upper, remainder = split(part.value(stored))
        assert torch.equal(upper, stored["param"][part.index]), where
        assert torch.equal(remainder, stored["remainder"][part.index]), where

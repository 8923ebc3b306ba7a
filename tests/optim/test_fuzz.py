"""Anything that may happen to an optimizer between two steps: the step is taken, or refused whole and by name."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from optimizer_cases import SHAPES, parameters, set_gradients
from storage_cases import CODED, KINDS
from torch import Tensor

from lit_fast.errors import LitFastError
from lit_fast.optim import adopt

EXAMPLES = int(os.environ.get("LIT_FAST_FUZZ_EXAMPLES", "40"))
DTYPES = [*2 * (torch.float32, torch.bfloat16), torch.float16, torch.float64]
NUMBERS: list[Any] = [0.0, -1.0, 1.0, 1e-30, 1e30, math.nan, math.inf, 2**70, 10**400, True, None, "0.1", 1j, [0.1]]
TENSORS: list[Callable[[Tensor], Any]] = [
    lambda p: None,
    lambda p: "text",
    lambda p: p,
    lambda p: p.grad,
    lambda p: torch.zeros(()),
    lambda p: torch.zeros(3),
    lambda p: torch.full_like(p.detach(), math.nan),
    lambda p: torch.zeros_like(p, dtype=torch.float64),
    lambda p: torch.zeros_like(p, dtype=torch.bfloat16),
    lambda p: torch.zeros_like(p, dtype=torch.uint8),
    lambda p: torch.zeros_like(p, device="meta"),
    lambda p: torch.zeros_like(p).to_sparse(),
    lambda p: torch.zeros((), dtype=p.dtype).expand(p.shape),
    lambda p: torch.zeros(*p.shape, 2, dtype=p.dtype)[..., 0],
]
Draw = Callable[[st.SearchStrategy[Any]], Any]


def storage(draw: Draw, kind: type) -> dict[str, Any]:
    return {
        "state_dtype": draw(st.sampled_from([None, "float32", "bfloat16", *["8bit"] * (kind in CODED)])),
        "master": draw(st.sampled_from([None, "float32", "remainder"])),
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
        "seed": draw(st.integers(-(2**70), 2**70)),
    }


def new_group(draw: Draw, kind: type) -> dict[str, Any]:
    shapes = draw(st.lists(st.sampled_from([*SHAPES, (300,)]), max_size=3))
    return {"params": parameters(shapes, draw(st.sampled_from(DTYPES))), **storage(draw, kind)}


def meddle(draw: Draw, optimizer: Any) -> None:
    """One thing that somebody may do between two steps."""
    group = draw(st.sampled_from(optimizer.param_groups))
    what = draw(
        st.sampled_from(["option", "storage", "gradient", "memory", "entry", "value", "group", "load", "clear"])
    )
    if what == "option":
        options = [name for name in group if name != "params" and name not in storage(lambda s: None, object)]
        group[draw(st.sampled_from(sorted(options)))] = draw(st.sampled_from(NUMBERS))
    elif what == "storage":
        group.update(storage(draw, type(optimizer)))
    elif what == "group":
        optimizer.add_param_group(new_group(draw, type(optimizer)))
        set_gradients(optimizer.param_groups[-1]["params"], seed=3)
    elif what == "load":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == "clear":
        optimizer.state.clear()
    elif group["params"]:
        param = draw(st.sampled_from(group["params"]))
        entry = optimizer.state.get(param)
        if what == "gradient":
            value = draw(st.sampled_from(TENSORS))(param)
            if isinstance(value, Tensor) and value.shape == param.shape and value.dtype == param.dtype:
                if value.device == param.device and value is not param:
                    param.grad = value
            elif param.grad is not None and param.numel():
                param.grad.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        elif what == "memory":
            everything = [p for each in optimizer.param_groups for p in each["params"] if p.dtype == param.dtype]
            other = draw(st.sampled_from(everything))
            grad, param.grad = param.grad, None
            param.data = other.data
            param.grad = torch.ones_like(param) if grad is None or grad.shape != param.shape else grad
        elif what == "entry":
            optimizer.state[param] = draw(st.sampled_from([{}, {"step": torch.tensor(2.0)}, {"mine": 1}, [], None]))
        elif isinstance(entry, dict) and entry:
            entry[draw(st.sampled_from(sorted(entry)))] = draw(st.sampled_from(TENSORS))(param)


def taken(thing: Any) -> Any:
    """A copy of tensors, dicts and lists to compare with later; anything else by itself."""
    if isinstance(thing, Tensor):
        dense = thing.detach().to_dense() if thing.layout != torch.strided else thing.detach()
        return None if dense.is_meta else (dense.dtype, dense.shape, dense.clone().nan_to_num(-7.0).tolist())
    if isinstance(thing, dict):
        return {key: taken(value) for key, value in thing.items()}
    return repr(thing)


def shares(p: Tensor, other: Tensor) -> bool:
    return p is not other and p.numel() > 0 and p.data_ptr() == other.data_ptr()


def everything_of(optimizer: Any) -> Any:
    return [taken(p) for group in optimizer.param_groups for p in group["params"]], taken(dict(optimizer.state))


@settings(max_examples=EXAMPLES, deadline=None, derandomize="LIT_FAST_FUZZ_EXAMPLES" not in os.environ)
@given(data=st.data())
def test_a_step_is_taken_or_refused_whatever_has_happened(data):
    """Our own errors name a parameter, a group, a state or an option, and leave everything as it was. Others come from
    torch's own step only, or from its `load_state_dict` and `add_param_group`."""
    draw: Draw = data.draw
    kind = draw(st.sampled_from(KINDS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = kind([new_group(draw, kind) for _ in range(draw(st.integers(1, 2)))], lr=0.01)
        stepper = adopt(optimizer, max_norm=1.0) if draw(st.booleans()) else optimizer
        for step in range(3):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p in params:
                p.grad = None
            set_gradients([p for p in params if draw(st.booleans())], seed=step)
            try:
                for _ in range(draw(st.integers(0, 2)) if step else 0):
                    meddle(draw, optimizer)
            except Exception as error:
                event(f"refused before the step: {type(error).__name__}")
                return
            params = [p for group in optimizer.param_groups for p in group["params"]]
            before = everything_of(optimizer)
            caught.clear()
            try:
                stepper.step()
            except LitFastError as error:
                assert any(word in str(error) for word in ("parameter", "param group", "state", "storage")), error
                assert everything_of(optimizer) == before
                event("refused")
                return
            except Exception as error:
                assert any("own step" in str(warning.message) for warning in caught), error
                event("refused by torch's own step")
                return
            alone = [p for p in params if p.grad is None and not any(shares(p, q) for q in params)]
            assert all(taken(p) == old for p, old in zip(params, before[0], strict=True) if any(p is q for q in alone))
    event("taken")

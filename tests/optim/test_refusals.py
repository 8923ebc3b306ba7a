"""What an optimizer cannot mean: refused by the name of the option, state or parameter, and nothing is changed."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import parameters, set_gradients
from storage_cases import KINDS
from torch.nn import Parameter

from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim import SGD, Adagrad, AdamW, Lion, Muon, RMSprop, adopt

OF_TORCH = [kind for kind in KINDS if hasattr(torch.optim, kind.__name__)]


def made(kind: Callable[..., Any], **options: Any) -> Any:
    """Stepped once; the parameters of the next step have gradients."""
    params = parameters(((5,), (300,)), torch.float32)
    optimizer = kind(params, lr=0.1, **options)
    set_gradients(params, seed=0)
    optimizer.step()
    set_gradients(params, seed=1)
    return optimizer


def refused(optimizer: Any, message: str, error: type[Exception] = KernelError) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params if p.untyped_storage().size()]
    with pytest.raises(error, match=message):
        optimizer.step()
    after = [p for p in params if p.untyped_storage().size()]
    assert all(torch.equal(old, p) for old, p in zip(before, after, strict=True))


# ---- options ----

NO_NUMBERS = {
    "text": "0.1",
    "none": None,
    "list": [0.1],
    "huge": 10**400,
    "complex": 1j,
    "two": torch.tensor([0.1, 0.2]),
}


@pytest.mark.parametrize("lr", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_learning_rate_that_is_no_number_is_refused_by_name(lr):
    optimizer = made(Lion)
    optimizer.add_param_group({"params": parameters(((3,),), torch.float32)})
    optimizer.param_groups[1]["lr"] = lr
    set_gradients(optimizer.param_groups[1]["params"], seed=2)
    refused(optimizer, r"its option lr is not a number that is known on the host \(param group 1\)")


@pytest.mark.parametrize("lr", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("kind", OF_TORCH)
def test_torchs_step_refuses_such_a_learning_rate_where_there_is_one(kind, lr):
    """Whatever torch does with it then: an error of its own."""
    optimizer = made(kind)
    optimizer.param_groups[0]["lr"] = lr
    with (
        pytest.warns(UserWarning, match=r"torch's own step runs, because its option lr .*\(param group 0\)"),
        pytest.raises((TypeError, RuntimeError, OverflowError)),
    ):
        optimizer.step()


NEVER = {
    "lr": [*NO_NUMBERS.values(), -1.0, math.nan, math.inf],
    "betas": [0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), ("a", "b"), (-0.1, 0.9), (math.nan, 0.9), None],
    **{name: ["0", None, -1.0, math.nan] for name in ("weight_decay", "eps", "momentum", "alpha", "lr_decay")},
}


@pytest.mark.parametrize("kind", [*KINDS, Muon])
def test_options_of_no_meaning_are_refused_by_name_wherever_they_are_given(kind):
    known = inspect.signature(kind).parameters
    for name, value in [(each, value) for each in NEVER if each in known for value in NEVER[each]]:
        matrix = parameters(((3, 3),), torch.float32)
        with pytest.raises(MisconfigurationException, match="^" + re.escape(f"{name}={value!r}: ")):
            kind(matrix, **{name: value})
        optimizer = kind(matrix)
        if name not in optimizer.param_groups[0]:
            continue
        late = {"params": parameters(((2, 2),), torch.float32), name: value}
        with pytest.raises(MisconfigurationException, match=re.escape(f"{name}={value!r}: ")):
            optimizer.add_param_group(late)
        assert len(optimizer.param_groups) == 1
    with pytest.raises(MisconfigurationException, match=r"param group 1.*master="):
        optimizer.add_param_group({"params": parameters(((2, 2),), torch.float32), "master": "bits"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("lr", [0.125, True, torch.tensor(0.125), torch.tensor([0.125]), torch.tensor(0.125).double()])
def test_numbers_of_any_kind_are_taken(lr):
    optimizer = made(Lion)
    [param, _] = optimizer.param_groups[0]["params"]
    before, optimizer.param_groups[0]["lr"] = param.detach().clone(), lr
    optimizer.step()
    assert torch.allclose((param - before).abs(), torch.full((5,), float(lr)), rtol=1e-6)
    Lion([param], lr=lr)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.9, 0.9), ("a", "b"), None])
def test_betas_that_are_none_are_refused_when_they_are_set_later(betas):
    """Numbers beyond 0 and 1 are taken, as torch takes them."""
    optimizer = made(Lion)
    optimizer.param_groups[0]["betas"] = betas
    refused(optimizer, r"\(param group 0\)")


@pytest.mark.parametrize("options", [{"state_dtype": []}, {"master": {}}, {"rounding": ["nearest"]}, {"seed": None}])
def test_storage_options_of_any_type_are_refused_by_name(options):
    [name] = options
    with pytest.raises(MisconfigurationException, match=f"{name}="):
        AdamW(parameters(((3,),), torch.float32), **options)


# ---- memory ----


def test_parameters_that_share_memory_are_named():
    whole = torch.randn(8, 8)
    params = [Parameter(torch.randn(3)), Parameter(whole), Parameter(torch.randn(3)), Parameter(whole[2:])]
    set_gradients([params[0], params[1], params[3]], seed=0)
    optimizer = Lion(params)
    refused(optimizer, "parameters 1 and 3 of the optimizer, gradients or states share memory")
    params[3].grad = None
    params[0].grad = params[0].data
    refused(optimizer, "parameter 0 of the optimizer, gradients or states share memory")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["parameter", "gradient", "state", "counter"])
def test_released_memory_is_an_error_and_no_crash(what, kind):
    optimizer = made(kind, **({"momentum": 0.9, "rounding": "stochastic"} if kind is SGD else {}))
    param = optimizer.param_groups[0]["params"][1]
    entry = optimizer.state[param]
    name = next(name for name in kind.mapping.state_keys if name in entry)
    tensor = {"parameter": param, "gradient": param.grad, "state": entry[name], "counter": entry["step"]}[what]
    tensor.untyped_storage().resize_(0)
    if what != "counter":
        refused(optimizer, "parameter 1 of the optimizer, its gradient or its state has no memory")
    elif kind is SGD or kind not in OF_TORCH:  # torch's own step cannot, or there is none
        refused(optimizer, r"the state step is not one float32 number .*parameter 1 of the optimizer")


# ---- states ----


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 1e30, -1.0, -7.0])
def test_a_counter_that_counts_nothing_is_refused(step):
    """Random bits are a function of the step's number."""
    for kind, options in ((Lion, {}), (AdamW, {"state_dtype": "8bit"}), (SGD, {"rounding": "stochastic"})):
        optimizer = made(kind, **options)
        optimizer.state[optimizer.param_groups[0]["params"][1]]["step"].fill_(step)
        refused(optimizer, r"the state step is .*, which counts no steps \(parameter 1 of the optimizer\)")


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(AdamW, "exp_avg"), (AdamW, "exp_avg_sq"), (Lion, "exp_avg"), (Adagrad, "sum"), (RMSprop, "square_avg")],
)
def test_a_state_that_has_lost_a_moment_is_refused(kind, name, storage):
    optimizer = made(kind, **storage)
    state = optimizer.state_dict()
    del state["state"][1][name]
    optimizer.load_state_dict(state)
    refused(optimizer, rf"parameter of shape \(300,\) has step=1 and no {name}: it is not this optimizer's")
    optimizer.state.pop(optimizer.param_groups[0]["params"][1])
    optimizer.step()


def test_an_entry_of_a_state_that_is_no_dict_is_refused():
    optimizer = made(Lion)
    state = optimizer.state_dict()
    state["state"][1] = [1, 2]
    with pytest.raises(KernelError, match=r"state_dict\['state'\]\[1\] is a list; it must be a dict"):
        optimizer.load_state_dict(state)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = (1, 2)
    refused(optimizer, r"state of a parameter is a tuple, not a dict \(parameter 0 of the optimizer\)")


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("exp_avg_scale"),
        lambda entry: entry.update(exp_avg_scale=torch.zeros(5)),
        lambda entry: entry.update(exp_avg_scale="x"),
        lambda entry: entry.update(exp_avg_codes=torch.zeros(5)),
    ],
)
def test_codes_that_cannot_be_decoded_are_refused(change):
    state = copy.deepcopy(made(AdamW, state_dtype="8bit").state_dict())
    state["param_groups"][0]["state_dtype"] = "float32"
    change(state["state"][0])
    with pytest.raises(KernelError, match="codes are uint8 with one float32 for each 256"):
        made(AdamW, state_dtype="float32").load_state_dict(state)
    state["param_groups"][0]["state_dtype"] = "8bit"
    optimizer = made(AdamW, state_dtype="8bit")
    optimizer.load_state_dict(state)
    refused(optimizer, r"the state exp_avg_(codes|scale) does not hold .*\(parameter 0 of the optimizer\)")


def test_the_state_of_another_optimizer_is_refused():
    state = made(SGD, momentum=0.9).state_dict()
    with pytest.raises(KeyError):
        made(AdamW).load_state_dict(state)  # torch's own error
    optimizer = made(Lion)
    optimizer.load_state_dict(state)
    refused(optimizer, r"its option betas .*param group 0")
    adopted = adopt(torch.optim.AdamW(parameters(((5,), (300,)), torch.float32)), master="float32")
    with pytest.raises(KeyError):
        adopted.optimizer.load_state_dict(state)

"""Storage options: what is allowed, what they put into the state, and states that change their form."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections import defaultdict

import pytest
import torch
from optimizer_cases import parameters, set_gradients
from storage_cases import random_bits, state_chance
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim import SGD, Adagrad, AdamW, Lion, RMSprop, adopt, to_torch_state_dict
from lit_fast.optim.codes import decode, encode, rebuilt, split
from lit_fast.optim.storage import IN_CODES

WRONG = [
    ({"state_dtype": "int3"}, r"state_dtype='int3': allowed are None, 'float32', 'bfloat16', '8bit'"),
    ({"state_dtype": torch.float16}, "state_dtype=torch.float16"),
    ({"master": "float64"}, "master='float64'"),
    ({"rounding": "up"}, "rounding='up'"),
    ({"seed": 1.5}, "seed=1.5: it must be an integer"),
]


def weights(dtype: torch.dtype = torch.bfloat16) -> list[Parameter]:
    params = parameters(((5, 3), (300,)), dtype)
    set_gradients(params, seed=7)
    return params


# ---- what is allowed ----


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused_wherever_they_are_given(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        AdamW(weights(), **options)
    with pytest.raises(MisconfigurationException, match=message):
        adopt(torch.optim.AdamW(weights()), **options)
    first, second = weights()
    with pytest.raises(
        MisconfigurationException, match="param group 1, parameters 1 to 1 of the optimizer: " + message
    ):
        AdamW([{"params": [first]}, {"params": [second], **options}])
    optimizer = AdamW([first])
    with pytest.raises(
        MisconfigurationException, match="param group 1, parameters 1 to 1 of the optimizer: " + message
    ):
        optimizer.add_param_group({"params": [second], **options})


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_set_later_are_refused_at_the_step(options, message):
    optimizer = AdamW(weights())
    optimizer.step()
    optimizer.param_groups[0].update(options)
    with pytest.raises(MisconfigurationException, match="parameters 0 to 1 of the optimizer: " + message):
        optimizer.step()


@pytest.mark.parametrize("kind", [RMSprop, Adagrad])
def test_codes_are_refused_where_they_cannot_keep_the_moment(kind):
    with pytest.raises(MisconfigurationException, match="state_dtype='8bit' with a moment"):
        kind(weights(), state_dtype="8bit")
    with pytest.raises(MisconfigurationException, match="state_dtype='8bit' with a moment"):
        adopt(getattr(torch.optim, kind.__name__)(weights()), state_dtype="8bit")
    optimizer = kind(weights())
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    with pytest.raises(MisconfigurationException, match="state_dtype='8bit' with a moment"):
        optimizer.step()


@pytest.mark.parametrize("storage", [{"state_dtype": "bfloat16"}, {"rounding": "stochastic"}])
def test_a_centered_variance_in_bfloat16_is_refused(storage):
    params = weights()
    optimizer = RMSprop(params, centered=True, **storage)
    with pytest.raises(MisconfigurationException, match=r"turns negative \(parameter of shape \(5, 3\)\)"):
        optimizer.step()
    optimizer = RMSprop(params, centered=True, **{**storage, "state_dtype": "float32"})
    optimizer.step()
    assert optimizer.state[params[0]]["grad_avg"].dtype == torch.float32


def test_a_remainder_is_for_bfloat16():
    optimizer = AdamW(weights(torch.float16), master="remainder")
    with pytest.raises(KernelError, match=r"only bfloat16 .*parameter 0 of the optimizer"):
        optimizer.step()
    with pytest.raises(KernelError, match="only bfloat16"):
        adopt(torch.optim.AdamW(weights(torch.float16)), master="remainder")


def test_storage_that_no_kernel_has_is_an_error_and_never_torchs_step():
    with pytest.raises(KernelError, match="Adamax has no compiled kernel"):
        adopt(torch.optim.Adamax(weights()), state_dtype="8bit")
    adopted = adopt(torch.optim.AdamW(weights()), master="float32")
    adopted.step()
    before = copy.deepcopy(adopted.optimizer.state_dict()["state"])
    param = adopted.optimizer.param_groups[0]["params"][1]
    param.grad = torch.eye(300, 1, dtype=torch.bfloat16).view(-1).to_sparse()
    with (
        pytest.raises(KernelError, match=r"master='float32'.*parameter 1 of the optimizer"),
        pytest.warns(UserWarning, match="off from here on"),
    ):
        adopted.step()
    after = adopted.optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


# ---- what they put into the state ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}),
        ({"state_dtype": torch.float32}, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}),
        (
            {"state_dtype": "float32", "master": "remainder"},
            {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "remainder": torch.int16},
        ),
        (
            {"state_dtype": "8bit", "master": "float32"},
            {
                "exp_avg_codes": torch.uint8,
                "exp_avg_sq_codes": torch.uint8,
                "exp_avg_scale": torch.float32,
                "exp_avg_sq_scale": torch.float32,
                "master": torch.float32,
            },
        ),
    ],
)
@pytest.mark.parametrize("adopted", [True, False])
def test_the_state_says_by_its_keys_how_it_is_kept(options, expected, adopted):
    params = weights()
    if adopted:
        optimizer = torch.optim.AdamW(params)
        adopt(optimizer, **options).step()
    else:
        optimizer = AdamW(params, **options)
        optimizer.step()
    for param in params:
        entry = dict(optimizer.state[param])
        assert entry.pop("step") == 1.0
        assert {k: v.dtype for k, v in entry.items() if isinstance(v, torch.Tensor)} == expected
        assert {k for k, v in entry.items() if v == IN_CODES} == (
            {"exp_avg", "exp_avg_sq"} if options.get("state_dtype") == "8bit" else set()
        )
        if "exp_avg_scale" in entry:
            assert entry["exp_avg_scale"].numel() == -(-param.numel() // 256)


def test_an_adopted_torch_optimizer_keeps_its_storage_in_copies_checkpoints_and_late_groups():
    params = weights()
    adopted = adopt(torch.optim.AdamW(params[:1]), state_dtype="8bit", master="remainder")
    adopted.optimizer.add_param_group({"params": params[1:]})
    adopted.step()
    adopt(adopted.optimizer).step()  # no options: those of the groups stay
    other = adopt(copy.deepcopy(adopted.optimizer))
    other.optimizer.load_state_dict(copy.deepcopy(adopted.optimizer.state_dict()))
    copied = [p for group in other.optimizer.param_groups for p in group["params"]]
    for each in (params, copied):
        set_gradients(each, seed=8)
    adopted.step()
    other.step()
    for ours, theirs in zip(params, copied, strict=True):
        first, second = adopted.optimizer.state[ours], other.optimizer.state[theirs]
        assert torch.equal(ours, theirs) and first.keys() == second.keys() and first["step"] == 3.0
        assert torch.equal(first["remainder"], second["remainder"]) and second["remainder"].dtype == torch.int16
        assert torch.equal(first["exp_avg_codes"], second["exp_avg_codes"])


# ---- another form ----


def values_of(optimizer: torch.optim.Optimizer, param: Parameter) -> dict[str, torch.Tensor]:
    entry = to_torch_state_dict(optimizer)["state"][0]
    return {name: entry[name].float() for name in entry if name != "step"}


@pytest.mark.parametrize("master", [None, "float32", "remainder"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_a_state_of_torch_is_converted_when_it_is_loaded(state_dtype, master):
    theirs = parameters(((300,),), torch.bfloat16)
    reference = torch.optim.AdamW(theirs)
    set_gradients(theirs, seed=3)
    reference.step()
    [param] = parameters(((300,),), torch.bfloat16)
    optimizer = AdamW([param], lr=0.5, state_dtype=state_dtype, master=master, rounding="stochastic", seed=11)
    optimizer.load_state_dict(reference.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["state_dtype"], group["master"]) == (1e-3, state_dtype, master)
    assert (group["rounding"], group["seed"]) == ("stochastic", 11)
    entry, saved = optimizer.state[param], reference.state[theirs[0]]
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if state_dtype == "8bit":
            codes, scale = encode(saved[name], signed)
            assert torch.equal(entry[f"{name}_codes"], codes) and torch.equal(entry[f"{name}_scale"], scale)
        else:
            assert entry[name].dtype == getattr(torch, state_dtype) and torch.equal(entry[name], saved[name].float())
    set_gradients([param], seed=4)
    optimizer.step()
    assert entry["step"] == 2.0
    key = {"float32": "master", "remainder": "remainder"}.get(master)
    assert ({"master", "remainder"} & entry.keys()) == ({key} if key else set())


@pytest.mark.parametrize("kind", [AdamW, SGD, Lion])
def test_an_option_changed_later_is_refused_until_the_state_is_converted(kind):
    params = weights()
    optimizer = kind(params, lr=1e-3, **({"momentum": 0.9} if kind is SGD else {}))
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    with pytest.raises(KernelError, match=r"not kept as its option state_dtype asks.*parameter 0"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    name = "momentum_buffer" if kind is SGD else "exp_avg"
    assert optimizer.state[params[1]][f"{name}_codes"].dtype == torch.uint8


@pytest.mark.parametrize(("before", "after"), [("float32", "remainder"), ("remainder", "float32")])
def test_another_master_is_refused_until_the_state_is_converted(before, after):
    params = weights()
    optimizer = AdamW(params, lr=1e-3, master=before)
    optimizer.step()
    values = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["master"] = after
    with pytest.raises(KernelError, match=f"otherwise than its option master='{after}' asks"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values, params, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert (before if before == "remainder" else "master") not in optimizer.state[params[0]]


STORED = [{"state_dtype": "8bit"}, {"state_dtype": "float32"}, {"master": "float32"}, {"master": "remainder"}]


@pytest.mark.parametrize("options", STORED, ids=str)
def test_a_state_loaded_before_adopt_is_refused_and_after_it_goes_on(options):
    params = weights()
    adopted = adopt(torch.optim.AdamW(params), **options)
    adopted.step()
    state = copy.deepcopy(adopted.optimizer.state_dict())
    again = [Parameter(p.detach().clone()) for p in params]
    optimizer = torch.optim.AdamW(again)
    optimizer.load_state_dict(copy.deepcopy(state))
    for same in ({}, options):
        with pytest.raises(KernelError, match="adopt the optimizer first, with"):
            adopt(optimizer, **same)
    optimizer = torch.optim.AdamW(again)
    resumed = adopt(optimizer, **options)
    optimizer.load_state_dict(state)
    for each in (params, again):
        set_gradients(each, seed=8)
    adopted.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_masters_become_remainders_and_back_without_loss():
    params = weights()
    adopted = adopt(torch.optim.AdamW(params), master="float32")
    adopted.step()
    masters = [adopted.optimizer.state[p]["master"].clone() for p in params]
    masters[1][0] = adopted.optimizer.state[params[1]]["master"][0] = 1.0 + 2.0**-8  # a tie of bfloat16
    adopted = adopt(adopted.optimizer, master="remainder")
    for param, master in zip(params, masters, strict=True):
        entry = adopted.optimizer.state[param]
        assert "master" not in entry and torch.equal(rebuilt(param.detach(), entry["remainder"]), master)
    adopt(adopted.optimizer, master="float32")
    for param, master in zip(params, masters, strict=True):
        assert torch.equal(adopted.optimizer.state[param]["master"], master)
        assert "remainder" not in adopted.optimizer.state[param]


@pytest.mark.parametrize("signed", [True, False])
def test_decoding_all_codes_and_encoding_them_gives_them_back(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, torch.tensor([0.5]), signed)
    assert len(values.unique()) == (255 if signed else 256)  # there are two zeros with a sign
    again, scale = encode(values, signed)
    assert scale.item() == 0.5
    assert torch.equal(decode(again, scale, signed), values)


@pytest.mark.parametrize("signed", [True, False])
def test_the_core_makes_the_same_codes_of_every_kind_of_number(signed):
    """The first momentum of SGD is the gradient, the first sum of squares (1 - beta2) times its square."""
    tiny = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-37]
    blocks = [
        [1.0, -1.0, *tiny, 1e-6, -1e-5, 3e-5, 0.5 + 2.0**-20],
        [math.inf, -math.inf, 1.0, -1.0, *tiny],
        [math.nan, -1.0, math.inf, *tiny],
        [3.4e38, -3.4e38, -1e33, 1e34, *tiny],
        tiny,  # below 2^-120 all of a block is zero
        [1e-36, *tiny],
    ]
    grad = torch.cat([torch.tensor(block + [0.25 * block[0]] * (256 - len(block))) for block in blocks])
    kind, name = (SGD, "momentum_buffer") if signed else (AdamW, "exp_avg_sq")
    more = {"momentum": 0.9} if signed else {"betas": (0.9, 0.5)}
    entries = []
    for state_dtype in ("8bit", "float32"):
        param = Parameter(torch.zeros(len(grad)))
        param.grad = grad.clone()
        optimizer = kind([param], lr=0.0, state_dtype=state_dtype, seed=6, **more)
        optimizer.step()
        entries.append(optimizer.state[param])
    chance = state_chance(random_bits(6, 1, torch.arange(len(grad))), 0 if signed else 1)
    codes, scale = encode(entries[1][name], signed, chance)
    assert torch.equal(entries[0][f"{name}_codes"], codes)
    assert torch.equal(entries[0][f"{name}_scale"].nan_to_num(-1.0), scale.nan_to_num(-1.0))


def test_moments_of_another_shape_are_refused_by_number():
    first, second = weights()
    optimizer = AdamW([first, second], master="remainder")
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["exp_avg"] = torch.zeros(7)
    optimizer.load_state_dict(saved)
    with pytest.raises(KernelError, match=r"exp_avg differs from its parameter in .*shape.*parameter 1 of the"):
        optimizer.step()


def test_splitting_and_rebuilding_gives_every_kind_of_float32_back():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, 1.0 + 2**-8])])
    values = values[~values.isnan()]
    assert torch.equal(rebuilt(*split(values)), values)
    assert split(torch.tensor([torch.nan]))[0].isnan().all()


# ---- torch's classes ----


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}])
def test_torch_refuses_codes_and_takes_what_they_are_exported_as(kind, implementation):
    extra = {"momentum": 0.9} if kind is SGD else {}
    theirs = getattr(torch.optim, kind.__name__)
    params = weights(torch.float32)
    optimizer = kind(params, lr=1e-3, state_dtype="8bit", **extra)
    optimizer.step()
    reference = theirs(params, lr=1e-3, **implementation, **extra)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    reference.load_state_dict(saved)
    for group in reference.param_groups:
        group.update(implementation)
    with pytest.raises((KeyError, TypeError, AttributeError, RuntimeError)):
        reference.step()
    reference = theirs(params, lr=1e-3, **extra)
    reference.load_state_dict(to_torch_state_dict(optimizer))
    assert "state_dtype" not in reference.param_groups[0]
    name = "momentum_buffer" if kind is SGD else "exp_avg"
    entry = optimizer.state[params[1]]
    assert torch.equal(
        reference.state[params[1]][name], decode(entry[f"{name}_codes"], entry[f"{name}_scale"], signed=True)
    )
    reference.step()


# ---- steps that are not taken ----

HAD: dict[str, dict | None] = {
    "nothing": None,
    "an empty entry": {},
    "a counter": {"step": torch.tensor(0.0)},
    "one moment": {"step": torch.tensor(0.0), "exp_avg": None, "momentum_buffer": None, "mine": "kept"},
}


@pytest.mark.parametrize("why", ["refused", "not finite", "an error"])
@pytest.mark.parametrize("had", HAD)
@pytest.mark.parametrize(
    "storage",
    [{}, {"state_dtype": "8bit"}, {"master": "float32"}, {"state_dtype": "8bit", "master": "remainder"}],
    ids=["plain", "codes", "master", "codes and remainder"],
)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_the_state_is_as_it_was_after_a_step_that_was_not_taken(kind, storage, had, why):
    """What it made for the first parameter is gone: moments, codes and their scales, masters, remainders, counters."""
    params = weights()
    optimizer = kind(params, lr=0.1, **({"momentum": 0.9} if kind is SGD else {}))
    optimizer.step()
    optimizer.param_groups[0].update(storage)
    if HAD[had] is None:
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict, {p: copy.deepcopy(HAD[had]) for p in params})
    entries = dict(optimizer.state)
    before = {p: dict(entry) for p, entry in entries.items()}

    def fails(state, group, param):
        if param is params[1]:
            state.get(param, {}).clear()
            raise MemoryError("no more")
        kind.mapping.init_state(state, group, param)

    mapping = dataclasses.replace(kind.mapping, init_state=fails) if why == "an error" else kind.mapping
    stepper = ops.Stepper(mapping, torch.device("cpu"))
    arguments = optimizer.param_groups, optimizer.state, 1.0, ops.NO_CLIPPING, ops.NO_CLIPPING
    if why == "refused":
        params[1].grad = params[1].grad.to_sparse()
        assert "cannot be read" in stepper.step(*arguments)
    elif why == "not finite":
        params[1].grad[7] = float("inf")
        assert stepper.step_if_finite(*arguments) == float("inf")
    else:
        with pytest.raises(MemoryError, match="no more"):
            stepper.step(*arguments)
    assert dict(optimizer.state) == before and all(optimizer.state[p] is entry for p, entry in entries.items())
    params[1].grad = torch.ones_like(params[1])
    assert ops.Stepper(kind.mapping, torch.device("cpu")).step(*arguments) is None

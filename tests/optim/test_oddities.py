"""What optimizers meet in the wild: late parameters, changed groups, odd gradients, dtypes, layouts, a Trainer."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import SHAPES, parameters, set_gradients, tensors_of
from storage_cases import CODED, KINDS, storages
from test_adamw import same_capability
from torch import Tensor
from torch.nn import Parameter

import lit_fast as L
from lit_fast.errors import KernelError
from lit_fast.optim import SGD, Adagrad, Adam, AdamW, Lamb, Lion, Muon, RMSprop, adopt
from lit_fast.optim.storage import DEFAULTS

EIGHT_BIT = {"state_dtype": "8bit", "rounding": "stochastic", "master": "remainder"}
OF_TORCH = [kind for kind in KINDS if hasattr(torch.optim, kind.__name__)]


def torch_class(kind):
    return getattr(torch.optim, kind.__name__)


def stepped(optimizer, steps=2, begin=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(begin, begin + steps):
        set_gradients(params, seed=step)
        optimizer.step()
    return optimizer


def same_numbers(first, second):
    ours, theirs = tensors_of(first), tensors_of(second)
    shared = {name for name in ours if isinstance(ours[name], Tensor)} & theirs.keys()
    assert shared
    return all(torch.equal(ours[name].float(), theirs[name].float()) for name in shared)


# ---- groups ----


@same_capability
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_parameters_and_options_may_come_later_as_in_torch(kind):
    results = []
    for make in (kind, torch_class(kind)):
        first, second = parameters(((5, 3), (64,)), torch.float32)
        optimizer = make([first], lr=0.1, **({} if kind is SGD or make is kind else {"fused": True}))
        stepped(optimizer)
        optimizer.add_param_group({"params": [second], "weight_decay": 0.5})
        if kind is SGD:
            optimizer.param_groups[0]["momentum"] = 0.9
        optimizer.param_groups[0]["lr"] = 0.01
        results.append(stepped(optimizer, begin=2))
    assert same_numbers(*results)


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "bfloat16"}, {"master": "remainder"}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_late_group_takes_its_own_storage(kind, storage):
    first, second = parameters(((5, 3), (300,)), torch.bfloat16)
    optimizer = stepped(kind([first], lr=0.1, **({"momentum": 0.9} if kind is SGD else {})))
    optimizer.add_param_group({"params": [second], **storage})
    stepped(optimizer, begin=2)
    group, entry = optimizer.param_groups[1], optimizer.state[second]
    assert {name: group[name] for name in DEFAULTS} == {**DEFAULTS, **storage}
    assert ("remainder" in entry) == ("master" in storage)
    assert bool(second.isfinite().all()) and bool(first.isfinite().all())


@pytest.mark.parametrize("storage", [{}, EIGHT_BIT])
def test_amsgrad_may_be_switched_on_later(storage):
    params = parameters(((300,),), torch.bfloat16)
    optimizer = stepped(AdamW(params, **storage))
    optimizer.param_groups[0]["amsgrad"] = True
    stepped(optimizer, begin=2)
    entry = optimizer.state[params[0]]
    assert entry["step"] == 4.0
    assert entry["max_exp_avg_sq_codes" if storage else "max_exp_avg_sq"].count_nonzero() == 300


def test_momentum_and_stochastic_rounding_may_be_switched_on_later():
    params = parameters(((300,),), torch.bfloat16)
    optimizer = stepped(SGD(params, lr=0.1))
    assert not optimizer.state
    optimizer.param_groups[0].update(momentum=0.9)
    stepped(optimizer, begin=2)
    optimizer.param_groups[0].update(rounding="stochastic")
    stepped(optimizer, begin=4)
    assert optimizer.state[params[0]]["step"] == 2.0
    optimizer = stepped(RMSprop(params, lr=0.1))
    optimizer.param_groups[0].update(momentum=0.9, centered=True)
    stepped(optimizer, begin=2)
    assert {"momentum_buffer", "grad_avg"} <= optimizer.state[params[0]].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameters_no_elements_and_no_dimensions(kind):
    for dtype in (torch.float32, torch.bfloat16):
        for storage in storages(kind, dtype):
            params = parameters(SHAPES, dtype)
            before = [p.detach().clone() for p in params]
            optimizer = kind([{"params": []}, {"params": params}, {"params": []}], lr=0.1, **storage)
            stepped(optimizer, steps=1)
            for param, old in zip(params, before, strict=True):
                assert param.shape == old.shape and bool(param.isfinite().all())
                assert not param.numel() or not torch.equal(param, old)
    optimizer = kind([{"params": []}])
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_rate_in_a_tensor_is_the_number_in_it(kind):
    ours, theirs = parameters(((70,),), torch.float32), parameters(((70,),), torch.float32)
    first, second = kind(ours, lr=0.125), kind(theirs, lr=0.5)
    second.param_groups[0]["lr"] = torch.tensor(0.125)
    assert same_numbers(stepped(first), stepped(second))


# ---- gradients ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", OF_TORCH)
def test_gradients_that_are_no_numbers_make_none_where_torch_does(kind, value):
    for dtype in (torch.float32, torch.bfloat16):
        [theirs] = parameters(((520,),), dtype)
        set_gradients([theirs], seed=1)
        theirs.grad[300] = value
        torch_class(kind)([theirs], lr=0.1).step()
        for storage in storages(kind, dtype):
            [param] = parameters(((520,),), dtype)
            param.grad = theirs.grad.clone()
            optimizer = kind([param], lr=0.1, **storage)
            optimizer.step()
            assert torch.equal(param.isnan(), theirs.isnan()), storage
            assert torch.equal(param.isinf(), theirs.isinf()), storage
            param.grad = torch.ones_like(param)
            optimizer.step()
            lost = param.isnan()
            if storage["state_dtype"] == "8bit" and kind is not SGD:
                assert bool(lost[256:512].all()) and int(lost.sum()) == 256  # a block of codes shares its scale
            else:
                assert int(lost.sum()) <= 1


def test_a_sparse_gradient_takes_torchs_step_where_there_is_one():
    ours, theirs = parameters(((6, 2),), torch.float32), parameters(((6, 2),), torch.float32)
    first, second = Adagrad(ours, lr=0.1), torch.optim.Adagrad(theirs, lr=0.1)
    gradient = torch.eye(6, 2).to_sparse()
    for optimizer in (first, second):
        optimizer.param_groups[0]["params"][0].grad = gradient.clone()
    with pytest.warns(UserWarning, match=r"lit_fast\.optim\.Adagrad: torch's own step runs, because .*parameter 0"):
        first.step()
    second.step()
    assert same_numbers(first, second)
    [param] = parameters(((6, 2),), torch.float32)
    param.grad = gradient
    with pytest.raises(KernelError, match=r"lit_fast\.optim\.Lion cannot step"):
        Lion([param]).step()
    with pytest.raises(KernelError, match="cannot step"):
        SGD([param], rounding="stochastic").step()


# ---- dtypes, layouts, memory ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_take_torchs_step_or_are_refused_by_number(kind, dtype):
    def params():
        torch.manual_seed(4)
        made = [Parameter(torch.randn(3)), Parameter(torch.randn(5).to(dtype))]
        for p in made:
            p.grad = torch.randn(p.shape).to(p.dtype)
        return made

    ours = params()
    storage = {"rounding": "stochastic"} if kind in OF_TORCH else {}
    with pytest.raises(KernelError, match=r"neither float32, bfloat16 nor float16 \(parameter 1 of the optimizer\)"):
        kind(ours, lr=0.1, **storage).step()
    assert torch.equal(ours[0], params()[0]), "a refused step changed a parameter"
    if kind not in OF_TORCH:
        return
    first, second = kind(ours, lr=0.1), torch_class(kind)(params(), lr=0.1)
    with pytest.warns(UserWarning, match="torch's own step runs"):
        first.step()
    second.step()
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_layouts_give_the_numbers_of_contiguous_ones(kind):
    for storage in storages(kind, torch.bfloat16):
        if storage["rounding"] == "stochastic" or storage["state_dtype"] == "8bit":
            continue  # random bits and blocks follow the order of memory
        [contiguous] = parameters(((32, 48),), torch.bfloat16)
        turned = Parameter(contiguous.detach().t().contiguous().t())
        first, second = stepped(kind([contiguous], lr=0.1, **storage)), kind([turned], lr=0.1, **storage)
        for step in range(2):
            set_gradients([contiguous], seed=step)
            turned.grad = torch.empty_like(turned).copy_(contiguous.grad)
            second.step()
        assert same_numbers(first, second), storage


def test_codes_of_another_layout_are_converted_when_loaded():
    [param] = parameters(((32, 48),), torch.float32)
    optimizer = stepped(AdamW([param], state_dtype="8bit"))
    turned = Parameter(param.detach().t().contiguous().t())
    other = AdamW([turned], state_dtype="8bit")
    other.load_state_dict(optimizer.state_dict())
    entry = other.state[turned]
    assert entry["exp_avg_codes"].stride() == turned.stride()
    turned.grad = torch.empty_like(turned).copy_(param.grad)
    other.step()
    optimizer.step()
    assert bool((turned - param).abs().max() <= 0.5 * 1e-3)  # codes err by 1/16; a step is 1e-3 at most


@pytest.mark.parametrize("storage", [{"master": "float32"}, {"master": "remainder", "state_dtype": "bfloat16"}, {}])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Lamb])  # its norms are summed in another order
def test_a_model_that_is_laid_out_anew_goes_on_once_its_state_is_loaded(kind, storage):
    def made():
        model = torch.nn.Conv2d(3, 8, 3).bfloat16()
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.zeros_(model.bias)
        return model, stepped(kind(model.parameters(), lr=0.1, **storage))

    (model, optimizer), (_, reference) = made(), made()
    model.to(memory_format=torch.channels_last)
    set_gradients(list(model.parameters()), seed=7)
    model.weight.grad = model.weight.grad.to(memory_format=torch.channels_last)
    if storage or kind not in OF_TORCH:
        with pytest.raises(KernelError, match=r"load_state_dict\(state_dict\(\)\) moves it"):
            optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    stepped(reference, steps=1, begin=7)
    assert same_numbers(optimizer, reference)


def test_what_is_not_dense_or_shares_memory_is_torchs_or_an_error():
    whole = torch.randn(8, 8)
    for make in (lambda: [Parameter(whole.clone()[:, ::2])], lambda: [Parameter(whole), Parameter(whole[2:])]):
        params = make()
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.warns(UserWarning, match="torch's own step runs"):
            AdamW(params).step()
        with pytest.raises(KernelError, match="torch's own step knows neither"):
            SGD(params, rounding="stochastic").step()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, Muon])
def test_torchs_default_dtype_changes_nothing(kind, default):
    """Precision "bf16-true" sets it while a `training_step` runs, and with it a step by hand."""
    for state_dtype in ("8bit" if kind in (*CODED, Muon) else "bfloat16", "float32", None):
        results = []
        for dtype in (torch.float32, default):
            torch.set_default_dtype(torch.float32)
            params = parameters(((32, 3), (300,)), torch.bfloat16)
            set_gradients(params, seed=1)
            torch.set_default_dtype(dtype)  # which a fixture puts back
            optimizer = kind(params, lr=0.1, state_dtype=state_dtype, rounding="stochastic", master="remainder")
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            norm = adopt(optimizer, max_norm=0.5).step()
            results.append({"norm": norm, **tensors_of(optimizer)})
        ours, theirs = ({k: v for k, v in each.items() if isinstance(v, Tensor)} for each in results)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- under the Trainer ----


class Model(L.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = torch.nn.Linear(32, 16), make

    def training_step(self, batch, batch_idx):
        return self.layer(batch.to(self.layer.weight.dtype)).float().square().mean()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def fit(make, path, epochs, checkpoint=None):
    torch.manual_seed(1)
    model, batches = Model(make), list(torch.randn(4, 8, 32))
    trainer = L.Trainer(
        max_epochs=epochs, precision="bf16-true", gradient_clip_val=0.05, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, batches, ckpt_path=checkpoint)
    return trainer, model


@pytest.mark.parametrize("storage", [EIGHT_BIT, {"master": "float32", "state_dtype": "float32"}])
@pytest.mark.parametrize("kind", CODED)
def test_the_trainer_adopts_names_saves_and_resumes_them(kind, storage, tmp_path):
    make = lambda params: kind(params, lr=0.05, **storage, **({"momentum": 0.9} if kind is SGD else {}))  # noqa: E731
    trainer, model = fit(make, tmp_path, 4)
    for name, value in storage.items():
        assert f"{name}={value!r}" in trainer.explain()
    half, _ = fit(make, tmp_path, 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other = fit(make, tmp_path, 4, tmp_path / "half.ckpt")
    assert resumed.global_step == trainer.global_step == 16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert same_numbers(trainer.optimizers[0], resumed.optimizers[0])
    assert trainer.optimizers[0].param_groups[0]["lr"] == resumed.optimizers[0].param_groups[0]["lr"] < 0.05


def test_a_step_by_hand_in_a_training_step_of_16_bits():
    class ByHand(Model):
        def __init__(self, make):
            super().__init__(make)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    trainer = L.Trainer(
        max_epochs=1, precision="bf16-true", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    model = ByHand(lambda params: AdamW(params, lr=0.05, **EIGHT_BIT))
    trainer.fit(model, list(torch.randn(3, 8, 32)))
    assert trainer.optimizers[0].state[model.layer.weight]["exp_avg_scale"].dtype == torch.float32
    assert "compiled step" in trainer.explain()


# ---- any combination ----


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination_steps_or_says_why_not(data):
    kind = data.draw(st.sampled_from(KINDS))
    groups, seed = [], data.draw(st.integers(-(2**70), 2**70))
    for _ in range(data.draw(st.integers(1, 3))):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        shapes = data.draw(st.lists(st.sampled_from(SHAPES), max_size=3))
        storage = {
            "state_dtype": data.draw(st.sampled_from([None, "float32", "bfloat16", *["8bit"] * (kind in CODED)])),
            "master": data.draw(st.sampled_from([None, "float32", "remainder"])),
            "rounding": data.draw(st.sampled_from(["nearest", "stochastic"])),
        }
        groups.append({"params": parameters(shapes, dtype), **storage, "seed": seed})
    optimizer = kind(groups, lr=0.01)
    adopted = adopt(optimizer, max_norm=1.0) if data.draw(st.booleans()) else optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        set_gradients(params, seed=step)
        for p in params:
            if data.draw(st.booleans()):
                p.grad = None
        before = [p.detach().clone() for p in params]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adopted.step()
        except KernelError as error:
            assert "parameter" in str(error) or "storage" in str(error)
            assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
            return
        assert all(bool(p.isfinite().all()) for p in params)
        assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True) if p.grad is None)
    state = copy.deepcopy(optimizer.state_dict())  # torch takes the very tensors that it is given
    again = kind([{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in groups], lr=0.5)
    again.load_state_dict(state)
    refused = [g for g in groups if g["master"] == "remainder" and any(p.dtype == torch.float16 for p in g["params"])]
    if all(p.dtype != torch.float64 for p in params) and not refused:
        assert not params or stepped_alike(optimizer, again)


def stepped_alike(first, second):
    for optimizer in (first, second):
        stepped(optimizer, steps=1, begin=9)
    ours, theirs = tensors_of(first), tensors_of(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], Tensor)
    )


def test_adam_is_adamw_with_the_other_decay():
    ours, theirs = parameters(((70,),), torch.float32), parameters(((70,),), torch.float32)
    first, second = AdamW(ours, weight_decay=0.1), Adam(theirs, weight_decay=0.1, decoupled_weight_decay=True)
    assert same_numbers(stepped(first), stepped(second))

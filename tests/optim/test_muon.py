"""Muon against `torch.optim.Muon`, its formula in float64, and torch's AdamW for what is no matrix."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import oracle
import pytest
import torch
from storage_cases import current_moments, param_chance, random_bits, state_chance, stochastic_bf16
from torch import Tensor
from torch.nn import Parameter

import lit_fast as L
from lit_fast import ops
from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim import Muon, adopt, to_torch_state_dict
from lit_fast.optim.codes import encode, rebuilt, split
from lit_fast.optim.storage import convert

SHAPES = ((8, 8), (12, 5), (5, 12), (1, 7), (7, 1), (40, 24))
THEIRS: Any = getattr(torch.optim, "Muon", None)
needs_torch_muon = pytest.mark.skipif(THEIRS is None, reason="this torch has no Muon")


def matrices(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(ps: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(50 + step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: Any, steps: int, begin: int = 0) -> Any:
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    for step in range(begin, begin + steps):
        set_gradients([p for group in groups for p in group["params"]], step)
        optimizer.step()
    return optimizer


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    pairs = [
        [p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs)
    ]  # fmt: skip
    for p, q in zip(*pairs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


# ---- torch's ----

OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "momentum": 0.8},
    {"momentum": 0.3, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
    {"ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]


@needs_torch_muon
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_of_torch(options: dict[str, Any]) -> None:
    reference = train(THEIRS(matrices(), lr=0.02, **options), 4)
    assert_same(train(Muon(matrices(), lr=0.02, ns_dtype="bfloat16", **options), 4), reference)
    adopted = train(adopt(THEIRS(matrices(), lr=0.02, **options)), 4)
    assert adopted.compiled and "matrix products by torch" in adopted.reason
    assert_same(adopted.optimizer, reference)
    assert reference.state_dict()["state"].keys() == adopted.optimizer.state_dict()["state"].keys()


@needs_torch_muon
def test_bfloat16_matrices_go_on_with_the_exact_momentum() -> None:
    """torch with the rounded one, and it rounds the weight twice. Only directions of small singular values, which the
    iteration stretches most, show it: one step of both goes nearly the same way."""
    [start], [ours], [theirs] = (matrices(((32, 32),), torch.bfloat16) for _ in range(3))
    first, second = train(Muon([ours], lr=1.0, ns_dtype="bfloat16"), 1), train(THEIRS([theirs], lr=1.0), 1)
    ways = [(p.detach() - start.detach()).float().flatten() for p in (ours, theirs)]
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) > 0.999
    assert torch.equal(first.state[ours]["momentum_buffer"], second.state[theirs]["momentum_buffer"])
    assert "in place" in adopt(THEIRS([theirs], lr=0.02, nesterov=False)).reason


@needs_torch_muon
def test_states_go_to_torch_and_back() -> None:
    ours = Muon(matrices(), lr=0.02, momentum=0.8, ns_dtype="bfloat16")
    theirs = THEIRS(matrices(), lr=0.1)
    train(ours, 2)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        q.data.copy_(p.data)
    theirs.load_state_dict(copy.deepcopy(to_torch_state_dict(ours)))
    assert theirs.param_groups[0]["momentum"] == 0.8
    assert_same(train(ours, 2, begin=2), train(theirs, 2, begin=2))
    again = Muon(matrices(), lr=0.5, ns_dtype=torch.bfloat16)
    for p, q in zip(again.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert again.param_groups[0]["use_muon"] and again.param_groups[0]["lr"] == 0.02
    assert_same(train(again, 2, begin=4), train(theirs, 2, begin=4))
    coded = train(Muon(matrices(), lr=0.02, state_dtype="8bit"), 1)
    theirs.load_state_dict(to_torch_state_dict(coded))
    [p, *_], [q, *_] = coded.param_groups[0]["params"], theirs.param_groups[0]["params"]
    decoded = current_moments(coded.state[p], ["momentum_buffer"])["momentum_buffer"]
    assert torch.equal(theirs.state[q]["momentum_buffer"], decoded)
    assert train(theirs, 1)


# ---- float64, and every storage ----

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASTERS = {torch.float32: [None], torch.bfloat16: [None, "float32", "remainder"], torch.float16: [None, "float32"]}


def ways(dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        {"state_dtype": state_dtype, "master": master, "rounding": rounding}
        for state_dtype in (None, "float32", "bfloat16", "8bit")
        for master in MASTERS[dtype]
        for rounding in ("nearest", "stochastic")
    ]


def value_of(p: Parameter, entry: dict[str, Any]) -> Tensor:
    if "master" in entry:
        return entry["master"]
    return rebuilt(p.detach(), entry["remainder"]) if "remainder" in entry else p.detach().float()


def make_case(dtype: torch.dtype, storage: dict[str, Any], made: dict[str, Any], shape: tuple[int, int]) -> Any:
    """A param group of one matrix and its state in that storage, which some steps may have left behind."""
    master, buffer = torch.randn(shape), 0.3 * torch.randn(shape)
    p = Parameter(master.to(dtype))
    group = {"params": [p], "use_muon": True, **made, **storage, "seed": 5}
    entry: dict[str, Any] = {"momentum_buffer": buffer, "step": torch.tensor(3.0)}
    if storage["master"] == "remainder":
        upper, entry["remainder"] = split(master)
        p.data.copy_(upper)
    elif storage["master"]:
        entry["master"] = master.clone()
    convert(entry, group, p)
    p.grad = torch.randn(shape).to(dtype)
    return p, group, entry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_any_case_is_within_the_derived_bound(dtype: torch.dtype) -> None:
    """With products in float32. A direction in 16 bits leaves a bound that says something after one iteration only."""
    draw = random.Random(str(dtype))
    torch.manual_seed(1)
    for i in range(200):
        storage = ways(dtype)[i % len(ways(dtype))]
        made: dict[str, Any] = {
            "lr": 10 ** draw.uniform(-4, -1),
            "weight_decay": draw.choice([0.0, 0.1, 0.5]),
            "momentum": draw.choice([0.0, 0.3, 0.6, 0.95]),
            "nesterov": draw.random() < 0.5,
            "ns_steps": draw.randrange(6 if dtype == torch.float32 else 2),
            "ns_coefficients": draw.choice([(3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)]),
            "eps": draw.choice([1e-7, 1e-3]),
            "adjust_lr_fn": draw.choice([None, "original", "match_rms_adamw"]),
        }
        p, group, entry = make_case(dtype, storage, made, (draw.randrange(1, 30), draw.randrange(1, 30)))
        optimizer = Muon([group])
        optimizer.state[p] = entry
        buffer = current_moments(entry, ["momentum_buffer"])["momentum_buffer"]
        stochastic = storage["rounding"] == "stochastic"
        bounds = oracle.muon_step(
            value_of(p, entry).clone(), p.grad, buffer, dtype=dtype, stochastic=stochastic, **made
        )
        optimizer.step()
        value = bounds["param"] if storage["master"] else bounds["param"].stored(dtype, stochastic)
        oracle.assert_within(value_of(p, entry), value)
        found, bound = current_moments(entry, ["momentum_buffer"])["momentum_buffer"], bounds["momentum_buffer"]
        if storage["state_dtype"] == "8bit":
            blocks = torch.arange(p.numel()) // 256
            largest = torch.zeros(len(entry["momentum_buffer_scale"]), dtype=torch.float64)
            largest.scatter_reduce_(0, blocks, (bound.value.abs() + bound.error).flatten(), "amax")
            bound = bound.coded(True, largest[blocks].view(p.shape))
        else:
            bound = bound.stored(entry["momentum_buffer"].dtype, stochastic)
        assert bool(((found.double() - bound.value).abs() <= bound.error).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_the_float32_step_rounded_as_asked(dtype: torch.dtype) -> None:
    """Bit for bit. Without momentum a direction is the gradient, which 16 bits hold however they are rounded."""
    torch.manual_seed(2)
    made = {"lr": 0.02, "momentum": 0.0, "nesterov": True, "ns_dtype": "bfloat16"}
    cases = [make_case(dtype, way, made, (20, 30)) for way in ways(dtype)]
    optimizer = Muon([group for _, group, _ in cases])
    plain = Muon([{**group, "params": [Parameter(value_of(p, e).clone())], "master": None, "state_dtype": None,
                   "rounding": "nearest"} for p, group, e in cases])  # fmt: skip
    for (p, _, entry), twin in zip(cases, plain.param_groups, strict=True):
        optimizer.state[p] = entry
        [q] = twin["params"]
        q.grad = p.grad.float()
        plain.state[q]["momentum_buffer"] = current_moments(entry, ["momentum_buffer"])["momentum_buffer"]
    optimizer.step()
    plain.step()
    for number, ((p, group, entry), twin) in enumerate(zip(cases, plain.param_groups, strict=True)):
        [q] = twin["params"]
        result, buffer = q.detach(), plain.state[q]["momentum_buffer"]
        index = torch.arange(600) + number * 768
        stochastic = group["rounding"] == "stochastic"
        chance = param_chance(random_bits(5, 4, index)).view(20, 30)
        if group["master"]:
            assert torch.equal(value_of(p, entry), result), group
        elif stochastic and dtype == torch.bfloat16:
            assert torch.equal(p, stochastic_bf16(result, chance)), group
        else:
            assert torch.equal(p, result.to(dtype)), group
        of_state = state_chance(random_bits(5 ^ (1 << 63), 4, index), 0).view(20, 30)
        if group["state_dtype"] == "8bit":
            codes, scale = encode(buffer, True, of_state.flatten())
            assert torch.equal(entry["momentum_buffer_codes"], codes)
            assert torch.equal(entry["momentum_buffer_scale"], scale)
        elif stochastic and entry["momentum_buffer"].dtype == torch.bfloat16:
            assert torch.equal(entry["momentum_buffer"], stochastic_bf16(buffer, of_state >> 4))
        else:
            assert torch.equal(entry["momentum_buffer"], buffer.to(entry["momentum_buffer"].dtype))
        if group["rounding"] == "stochastic" or group["state_dtype"] == "8bit":
            assert entry["step"] == 4


@pytest.mark.parametrize("name", ops.build_info()["cpu_targets_supported"])
def test_every_target_has_the_same_bits(name: str) -> None:
    expected, target = train(Muon(matrices(), lr=0.02), 2), ops.build_info()["cpu_target"]
    try:
        ops.use_cpu_target(name)
        assert_same(train(Muon(matrices(), lr=0.02), 2), expected)
    finally:
        ops.use_cpu_target(target)


# ---- AdamW's share, groups, copies ----


def test_what_is_no_matrix_takes_adamw() -> None:
    shapes = ((4, 4), (4,), (), (2, 3, 4), (6, 4))
    ours, theirs = matrices(shapes), matrices(shapes)
    head = {"params": [ours[4]], "use_muon": False, "lr": 0.01}
    mine = Muon([{"params": ours[:4]}, head], lr=0.02, adamw_lr=0.1, adamw_weight_decay=0.2)
    assert [(g["use_muon"], len(g["params"])) for g in mine.param_groups] == [(True, 1), (False, 3), (False, 1)]
    groups = [{"params": theirs[1:4], "lr": 0.1}, {"params": [theirs[4]], "lr": 0.01}]
    reference = torch.optim.AdamW(groups, weight_decay=0.2, fused=True)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        reference.step()
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("stored", [{}, {"state_dtype": "8bit"}, {"rounding": "stochastic"}, {"master": "remainder"}])
def test_state_dict_and_copies_go_on_alike(stored: dict[str, Any]) -> None:
    def made() -> tuple[list[Parameter], Muon]:
        ps = matrices(((20, 30), (300,), (9, 40)), torch.bfloat16)
        return ps, Muon(ps, lr=0.02, momentum=0.9, **stored)

    ps, optimizer = made()
    train(optimizer, 1)
    others, other = made()
    for p, q in zip(others, ps, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, other, pickled, copied):
        train(each, 2, begin=1)
        each.add_param_group({"params": [Parameter(torch.ones(2, 2))]})
        assert each.param_groups[-1]["momentum"] == 0.9
    for each in (other, pickled, copied):
        for ours, theirs in zip(optimizer.param_groups, each.param_groups, strict=True):
            assert all(map(torch.equal, ours["params"], theirs["params"]))


def test_a_place_among_all_elements_decides_the_random_bits() -> None:
    """Equal matrices are rounded otherwise, and a matrix alike whether the one before it has a gradient or not."""

    def stepped(skip: bool) -> list[Tensor]:
        ps = [Parameter(torch.full((16, 16), 1.001, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = Muon(ps, lr=0.02, momentum=0.0, rounding="stochastic")
        for p in ps:
            p.grad = torch.eye(16, dtype=torch.bfloat16)
        ps[0].grad = None if skip else ps[0].grad
        optimizer.step()
        return [p.detach() for p in ps]

    first, second = stepped(False)
    assert not torch.equal(first, second)
    assert torch.equal(second, stepped(True)[1])


# ---- adopt, hooks, odd input ----


def test_clipped_and_skipped_by_adopt() -> None:
    ps, others = matrices(((4, 4), (4,))), matrices(((4, 4), (4,)))
    adopted = adopt(Muon(ps, lr=0.02), max_norm=0.5, nonfinite="skip")
    set_gradients(ps, 0)
    norm = adopted.step()
    assert torch.equal(ps[0].grad, (set_gradients(others, 0), others[0].grad)[1]), "clipped in registers"
    assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(others, 0.5))
    Muon(others, lr=0.02).step()
    for p, q in zip(ps, others, strict=True):
        torch.testing.assert_close(p, q)
    before = [p.detach().clone() for p in ps]
    ps[1].grad[2] = float("nan")
    adopted.step()
    assert adopted.skipped_steps == 1 and all(map(torch.equal, before, ps))


def test_by_value_and_by_a_scale() -> None:
    ps, others = matrices(((4, 4), (4,))), matrices(((4, 4), (4,)))
    adopted = adopt(Muon(ps, lr=0.02), clip_value=0.1)
    set_gradients(ps, 0)
    adopted.step(grad_scale=0.5)
    set_gradients(others, 0)
    for p in others:
        p.grad.mul_(0.5).clamp_(-0.1, 0.1)
    Muon(others, lr=0.02).step()
    assert all(map(torch.equal, ps, others))


def test_zeros_names_closures_and_missing_gradients() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = Muon(layer.named_parameters(), lr=0.02, weight_decay=0.0)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    before = layer.weight.detach().clone()

    def closure() -> float:
        layer.weight.grad = torch.zeros(2, 3)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert torch.equal(layer.weight, before) and not optimizer.state.get(layer.bias)
    empty = Muon([Parameter(torch.ones(0, 3)), Parameter(torch.ones(3, 0))])
    train(empty, 1)


def test_a_learning_rate_in_a_tensor_is_the_number_in_it() -> None:
    first, second = Muon(matrices(), lr=0.125), Muon(matrices(), lr=0.5)
    second.param_groups[0]["lr"] = torch.tensor(0.125)
    assert_same(train(first, 1), train(second, 1))


def test_dense_layouts_give_the_numbers_of_contiguous_ones() -> None:
    [p] = matrices(((12, 5),))
    turned = Parameter(p.detach().t().contiguous().t())
    set_gradients([p], 0)
    turned.grad = torch.empty_like(turned).copy_(p.grad)
    Muon([p], lr=0.02).step()
    Muon([turned], lr=0.02).step()
    torch.testing.assert_close(p, turned)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"ns_steps": 100},
        {"ns_coefficients": (1.0, 2.0)},
        {"adjust_lr_fn": "none"},
        {"ns_dtype": torch.int8},
        {"adamw_betas": (0.9, 1.0)},
        {"state_dtype": "4bit"},
        {"master": "bfloat16"},
        {"rounding": "up"},
    ],
)
def test_options_that_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(bad)).removeprefix("adamw_")):
        Muon(matrices(), **bad)


def test_what_muon_cannot_step_is_refused_before_anything_is_written() -> None:
    with pytest.raises(MisconfigurationException, match=r"shape \(3,\)"):
        Muon([{"params": [Parameter(torch.ones(3))], "use_muon": True}])
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = Muon(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(KernelError, match=r"lit_fast\.optim\.Muon cannot step: a gradient"):
        optimizer.step()
    assert not optimizer.state
    shared = torch.ones(8, 4)
    for ps, why in (
        ([Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2, dtype=torch.float64))], "parameter 1"),
        ([Parameter(torch.ones(2, 2)), Parameter(torch.ones(3, dtype=torch.float64))], "parameter 1"),
        ([Parameter(shared[:5]), Parameter(shared[4:])], "share memory"),
    ):
        optimizer = Muon(ps, lr=0.1)
        with pytest.raises(KernelError, match=why):
            train(optimizer, 1)
        assert not any(optimizer.state.values()) and all(bool((p == 1).all()) for p in ps)
    half = Muon([Parameter(torch.ones(2, 2, dtype=torch.float16))], master="remainder")
    with pytest.raises(KernelError, match="only bfloat16 is the upper half"):
        train(half, 1)


@needs_torch_muon
def test_what_the_kernels_refuse_of_torchs_takes_its_own_step() -> None:
    ours, theirs = ([Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double())] for _ in "ab")
    adopted = adopt(THEIRS(ours, lr=0.1))
    assert not adopted.compiled and "its own step" in adopted.reason
    assert_same(train(adopted, 2).optimizer, train(THEIRS(theirs, lr=0.1), 2))
    with pytest.raises(KernelError, match="cannot step"):
        adopt(THEIRS(ours, lr=0.1), state_dtype="8bit")


@needs_torch_muon
def test_adopt_stores_torchs_momentum_otherwise() -> None:
    ps = matrices(dtype=torch.bfloat16)
    adopted = adopt(train(THEIRS(ps, lr=0.02), 1), state_dtype="8bit", master="remainder")
    assert "state_dtype='8bit', master='remainder'" in adopted.reason
    train(adopted, 2, begin=1)
    assert all(adopted.optimizer.state[p]["momentum_buffer_codes"].dtype == torch.uint8 for p in ps)
    assert all(adopted.optimizer.state[p]["remainder"].dtype == torch.int16 for p in ps)


# ---- under the Trainer ----


class Model(L.LightningModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = torch.nn.Linear(32, 16, bias=make is not THEIRS), make

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=0.05)


@needs_torch_muon
@pytest.mark.parametrize("make", [Muon, THEIRS])
def test_the_trainer_steps_it_and_says_so(make: Any, tmp_path: Any) -> None:
    def fit(epochs: int, **options: Any) -> tuple[L.Trainer, Model]:
        torch.manual_seed(1)
        model, batches = Model(make), list(torch.randn(4, 8, 32))
        trainer = L.Trainer(
            max_epochs=epochs, gradient_clip_val=0.05, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, batches, **options)
        return trainer, model

    trainer, model = fit(2)
    assert "Muon: compiled step (muon on " in trainer.explain()
    half, _ = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other = fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert resumed.global_step == trainer.global_step == 8
    torch.manual_seed(1)
    by_hand, batches = Model(make), list(torch.randn(4, 8, 32))
    optimizer = by_hand.configure_optimizers()
    for step in range(8):
        by_hand.training_step(batches[step % 4], 0).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q)

"""Bytes and FLOPs of compiled steps: against what a step is seen to read and to write, and the formulas' own count."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import Parameter

import lit_fast
from lit_fast import ops
from lit_fast.optim import SGD, Adagrad, AdamW, Lamb, Lion, Muon, RMSprop, adopt
from lit_fast.optim.mapping import mapping_of
from lit_fast.optim.traffic import Pass, passes_of

SHAPE = (64, 40)  # ten blocks of codes
BF16 = torch.bfloat16

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {"lr": 0.01}),
    "amsgrad": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "adam with decay": (lit_fast.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (SGD, {"lr": 0.01}),
    "momentum": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "lion": (Lion, {"lr": 0.01}),
    "lamb": (Lamb, {"lr": 0.01}),
    "adagrad": (Adagrad, {"lr": 0.01}),
    "adagrad with decay": (Adagrad, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
    "rmsprop with all": (RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
}
STORAGE: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "8bit"}),
    (BF16, {}),
    (BF16, {"state_dtype": "float32", "master": "float32"}),
    (BF16, {"state_dtype": "float32", "master": "remainder"}),
    (BF16, {"state_dtype": "8bit", "rounding": "stochastic"}),
    (torch.float16, {"master": "float32", "state_dtype": "float32"}),
]


def made(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """An optimizer that has stepped, its parameter's gradient there for the next step."""
    generator = torch.Generator().manual_seed(5)
    param = Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    optimizer = kind([param], **options)
    for _ in range(3):
        param.grad = torch.randn(SHAPE, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def tensors(optimizer: Any) -> dict[str, Tensor]:
    (param,) = optimizer.param_groups[0]["params"]
    state = {k: v for k, v in optimizer.state[param].items() if isinstance(v, Tensor) and v.dim()}
    return {"param": param.data, "grad": param.grad, **state}


def seen_to_move(optimizer: Any) -> tuple[float, float]:
    """Bytes that a step reads and writes: of tensors that change the outcome when changed, and that it changes."""

    def after(changed: str = "") -> dict[str, Tensor]:
        other = copy.deepcopy(optimizer)
        param, before = other.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0]
        param.grad = before.grad.clone()
        if changed:
            tensor = tensors(other)[changed]
            tensor.copy_(1.25 * tensor if tensor.is_floating_point() else tensor.flip(0))
        other.step()
        return tensors(other)

    usual, before = after(), tensors(optimizer)
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in before.items()}
    read = [name for name in before if any(not torch.equal(t, usual[k]) for k, t in after(name).items() if k != name)]
    read += [name for name in before if name not in read and not torch.equal(after(name)[name], usual[name])
             and name != "grad"]  # fmt: skip
    written = [name for name in before if not torch.equal(before[name], usual[name])]
    return sum(size[name] for name in read), sum(size[name] for name in written)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_that_a_step_is_seen_to_move(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    for dtype, storage in STORAGE:
        if storage.get("state_dtype") == "8bit" and kind in (RMSprop, Adagrad):
            continue  # they have none
        if options.get("centered") and storage.get("state_dtype", dtype) in (BF16, "bfloat16"):
            continue  # it refuses them
        optimizer = made(kind, {**options, **storage}, dtype)
        read, written = seen_to_move(optimizer)
        (step, *measured) = reversed([each for each in passes_of(adopt(optimizer)) if each.within])
        assert step.bytes == read + written, (dtype, storage)
        assert [each.bytes for each in measured] == ([read] if kind is Lamb else []), (dtype, storage)


def test_bytes_an_element_as_everybody_knows_them() -> None:
    known = {
        ("adamw", torch.float32, ""): 28,
        ("adamw", BF16, ""): 14,
        ("adamw", torch.float32, "8bit"): 16 + 2 * 2 * 4 / 256,
        ("sgd", torch.float32, ""): 12,
        ("momentum", torch.float32, ""): 20,
        ("lion", torch.float32, ""): 20,
    }
    for (name, dtype, state), expected in known.items():
        kind, options = OPTIMIZERS[name]
        (step,) = (
            p for p in passes_of(adopt(made(kind, {**options, "state_dtype": state or None}, dtype))) if p.within
        )
        assert step.bytes / (SHAPE[0] * SHAPE[1]) == expected


def test_masters_are_read_in_their_parameters_place() -> None:
    optimizer = made(AdamW, {"lr": 0.1, "state_dtype": "float32", "master": "float32"}, BF16)
    (step,) = (each for each in passes_of(adopt(optimizer)) if each.within)
    assert step.bytes / 2560 == 4 + 4 + 2 + 2 + 2 * 8  # master in and out, the parameter out, the gradient, two moments


def test_gradients_are_read_once_more_where_somebody_looks_first() -> None:
    for options in ({"max_norm": 1.0}, {"nonfinite": "skip"}):
        passes = {each.name: each for each in passes_of(adopt(made(AdamW, {}, torch.float32), **options))}
        assert (passes["norm"].bytes, passes["norm"].flops, passes["norm"].within) == (4 * 2560, 2 * 2560, True)
        assert passes["adamw"].bytes == 28 * 2560
    assert "norm" not in {each.name for each in passes_of(adopt(made(AdamW, {}, torch.float32), clip_value=1.0))}
    optimizer, scaler = made(AdamW, {}, torch.float32), torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    scaled = adopt(optimizer, scaler=scaler)
    scaled.step()
    assert {each.name: each.bytes for each in passes_of(scaled) if each.within} == {
        "norm": 4 * 2560,
        "adamw": 28 * 2560,
    }
    outside = passes_of(adopt(made(AdamW, {}, torch.float32)), clips_by_norm=True)
    assert [(each.name, each.within) for each in outside] == [("norm", False), ("scale", False), ("adamw", True)]


def test_muon_has_two_passes_and_adamw_for_the_rest() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, bias = Parameter(torch.randn(SHAPE, generator=generator)), Parameter(torch.randn(100))
    optimizer = Muon([matrix, bias])
    for p in (matrix, bias):
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    passes = {each.name: each for each in passes_of(adopt(optimizer)) if each.within}
    assert list(passes) == ["first pass", "second pass", "adamw"]
    assert passes["first pass"].bytes == 2560 * (4 + 8 + 4)  # the gradient, momentum in and out, the direction out
    assert passes["second pass"].bytes == 2560 * (8 + 4)  # the parameter in and out, what has become of the direction
    assert passes["adamw"].bytes == 28 * 100 and passes["adamw"].flops == 15 * 100


def test_parameters_without_a_gradient_are_left_out() -> None:
    params = [Parameter(torch.ones(10)), Parameter(torch.ones(6))]
    optimizer = torch.optim.AdamW(params)
    params[0].grad = torch.ones(10)
    optimizer.step()
    assert [each.bytes for each in passes_of(adopt(optimizer)) if each.within] == [280]
    assert passes_of(adopt(torch.optim.NAdam(params))) == []  # torch's own step


def shards(folder: str) -> None:
    model = lit_fast.demos.boring_classes.BoringModel()
    model.layer = torch.nn.Sequential(torch.nn.Linear(32, 1500), torch.nn.Linear(1500, 2))  # three chunks and more
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=2, strategy="zero1", max_steps=2, logger=False, gradient_clip_val=0.5,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters())  # type: ignore[method-assign]
    seen: list[dict[str, Pass]] = []

    class Looks(lit_fast.Callback):
        reads_gradients = False

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            adopted = trainer.fit_loop.plans.binding.stepping.adopted[0]
            seen.append({each.name: each for each in passes_of(adopted, clips_by_norm=True)})

    trainer.callbacks.append(Looks())
    trainer.fit(model)
    Path(folder, os.environ["RANK"]).write_text(f"{seen[-1]['adamw'].bytes} {seen[-1]['norm'].bytes}")


@pytest.mark.slow
def test_of_sharded_states_each_process_moves_its_own(tmp_path: Path) -> None:
    run_ranks(shards, 2, str(tmp_path))
    moved = [[float(word) for word in (tmp_path / str(rank)).read_text().split()] for rank in range(2)]
    elements = 33 * 1500 + 1501 * 2
    assert sum(step for step, _ in moved) == 28 * elements and sum(norm for _, norm in moved) == 4 * elements
    assert all(0.3 < step / (28 * elements) < 0.7 for step, _ in moved)


# -- FLOPs


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lines of formulas and options to (update, direction)."""
    compiler, root = shutil.which("g++") or shutil.which("clang++"), Path(__file__).parents[2]
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = str(tmp_path_factory.mktemp("flops") / "count")
    source = str(root / "tests" / "csrc" / "count_flops.cpp")
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{root / 'csrc'}", source, "-o", program], check=True)

    def run(lines: list[str]) -> list[tuple[int, int]]:
        done = subprocess.run([program], input="\n".join(lines) + "\n", check=True, capture_output=True, text=True)
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]  # type: ignore[misc]

    return run


def options_of(mapping: ops.Mapping, group: dict[str, Any]) -> str:
    flat = [v for key in mapping.option_keys for v in (group[key] if isinstance(group[key], tuple) else (group[key],))]
    return " ".join([mapping.formula, *(str(float(v or 0.0)) for v in flat)])


def test_flops_are_those_of_the_formulas(counted: Any) -> None:
    passes, lines, formulas = [], [], set()
    for kind, options in OPTIMIZERS.values():
        optimizer = made(kind, options, torch.float32)
        mapping, _ = mapping_of(optimizer)
        assert mapping is not None
        formulas.add(mapping.formula)
        lines.append(options_of(mapping, optimizer.param_groups[0]))
        passes.append({each.name: each.flops / 2560 for each in passes_of(adopt(optimizer))})
    for found, (update, direction) in zip(passes, counted(lines), strict=True):
        measured = found.pop("measure", None)
        assert found == {"scale": 1, next(name for name in found if name != "scale"): update}
        assert measured == (direction + 2 * 2 if direction else None)  # and two products, added up
    assert formulas | {"muon"} == set(ops.formulas())


def test_flops_of_both_passes_of_muon(counted: Any) -> None:
    for nesterov, second in itertools.product((True, False), (False, True)):
        mapping, _ = mapping_of(Muon([Parameter(torch.ones(SHAPE))]))
        assert mapping is not None
        group = {"lr": 0.1, "adjusted_lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
        group["second_pass"] = second
        assert counted([options_of(mapping, group)]) == [(mapping.flops(group) + 1, 0)]

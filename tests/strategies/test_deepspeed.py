"""`strategy="deepspeed"`: against `ddp` on two Gloo processes where the package is installed, and refused where not."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_ddp import Net, share
from torch import Tensor

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.optim.engine import EngineOptimizer
from lit_fast.precision import DeepSpeedPrecision, DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lit_fast.strategies import DeepSpeedStrategy, deepspeed_config
from lit_fast.strategies.choosing import STRATEGIES, choose_strategy

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")
dist_test = pytest.mark.dist
CPU = torch.device("cpu")
NAMES = [name for name in STRATEGIES if name.startswith("deepspeed")]
# DeepSpeed calls torch's AdamW, which takes roots by another routine than the compiled step that ddp takes: they differ
# in the last place of an update, now and then, and a loss of 1 to 2 after 20 steps in a few units of it (1.2e-7 each).
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Several(Net):
    """Two param groups, one parameter that is frozen, and a schedule that moves the learning rate in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].bias.requires_grad = False
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])


class Weighted(Several):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "weight": 1.0 + batch_idx % 3}


class OfUnknownLength:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def strategy_of(name: Any) -> Any:
    """A name, or a stage of DeepSpeed's, with small buckets."""
    if name == 3:
        # Small parameters stay whole otherwise.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000}
        return DeepSpeedStrategy(config={"zero_optimization": zero, "zero_allow_untested_optimizer": True})
    if not isinstance(name, int):
        return name
    return DeepSpeedStrategy(stage=name, reduce_bucket_size=2000, allgather_bucket_size=2000)


def fit(
    strategy: Any, steps: int, model: Any = None, unsized: bool = False, ckpt_path: Any = None, **options: Any
) -> Any:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = model or Several()
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy=strategy_of(strategy), max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    batches = share(rank, world)[:10]
    trainer.fit(model, OfUnknownLength(batches) if unsized else batches, ckpt_path=ckpt_path)
    return trainer, model


def scenarios(stage: int) -> Any:
    found = {}
    for name, kind, steps, options in (
        ("plain", Several, 20, {}),
        ("accumulated", Several, 12, {"accumulate_grad_batches": 4}),  # of 10 batches: 4, 4 and 2
        ("unsized", Several, 12, {"accumulate_grad_batches": 4, "unsized": True}),
        ("clipped", Several, 12, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
        ("weighted", Weighted, 12, {"accumulate_grad_batches": 4}),
        ("weighted and clipped", Weighted, 12, {"gradient_clip_val": 0.05}),
    ):
        runs = []
        for strategy in (stage, "ddp"):
            trainer, model = fit(strategy, steps, kind(), **options)
            runs.append((model.losses, model.rates, trainer.strategy.lightning_module_state_dict()))
        found[name] = runs
    return found


@needs_deepspeed
@dist_test
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_weights_are_those_of_ddp(stage: int) -> None:
    for rank, found in enumerate(run_ranks(scenarios, 2, stage, timeout=120.0)):
        for name, ((losses, rates, weights), (expected_losses, expected_rates, expected)) in found.items():
            assert rates == expected_rates and len(set(rates)) > 5, name
            torch.testing.assert_close(losses, expected_losses, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
            if rank == 0 or stage < 3:  # what was in parts is whole in the first process alone
                torch.testing.assert_close(weights, expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def under_every_name(folder: str) -> Any:
    found = {}
    for name in ("ddp", *NAMES):
        trainer, model = fit(name, 6, accumulate_grad_batches=2, gradient_clip_val=0.5)
        found[name] = model.losses, saved(trainer, Path(folder, f"{name}.ckpt"))
    return found


@needs_deepspeed
@dist_test
def test_every_name_with_its_defaults(tmp_path: Path) -> None:
    found = run_ranks(under_every_name, 2, str(tmp_path), timeout=120.0)[0]
    expected, checkpoint = found.pop("ddp")
    assert len(found) == 6
    for losses, own in found.values():
        torch.testing.assert_close(losses, expected, **CLOSE)
        same_but_for(own, checkpoint, CLOSE)


# -- checkpoints


def saved(trainer: Any, path: Path) -> dict[str, Any]:
    """The file that all processes have written together."""
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def checkpoints(stage: Any, other: Any, folder: str, **options: Any) -> dict[str, Any]:
    """Twelve steps at once, and six and six by way of a file, from each strategy into each."""
    found: dict[str, Any] = {}
    for strategy in (stage, other):
        trainer, whole = fit(strategy, 12, **options)
        found[f"{strategy}"] = saved(trainer, Path(folder, f"{strategy}-12.ckpt")), whole.losses[6:]
        trainer, _ = fit(strategy, 6, **options)
        half = Path(folder, f"{strategy}-6.ckpt")
        saved(trainer, half)
        for then in (stage, other):
            trainer, resumed = fit(then, 12, ckpt_path=half, **options)
            found[f"{strategy} {then}"] = saved(trainer, Path(folder, f"{strategy}-{then}.ckpt")), resumed.losses
    return found


def same_but_for(a: Any, b: Any, close: dict[str, float]) -> None:
    """Weights, optimizer and schedule of two checkpoints."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(a[key], b[key], **close, msg=lambda m, key=key: f"{key}: {m}")


EXACT = {"rtol": 0.0, "atol": 0.0}


@needs_deepspeed
@dist_test
@pytest.mark.parametrize("stage,other", [(1, "ddp"), (2, "zero1"), (3, "ddp")])
def test_checkpoints_of_every_strategy_load_in_every_other(stage: int, other: str, tmp_path: Path) -> None:
    for found in run_ranks(checkpoints, 2, stage, other, str(tmp_path), timeout=120.0):
        expected, losses = found[other]
        for name, (checkpoint, resumed) in found.items():
            same_but_for(checkpoint, expected, CLOSE)
            torch.testing.assert_close(resumed, losses, **CLOSE)
            if name == f"{stage} {stage}":
                same_but_for(checkpoint, found[f"{stage}"][0], EXACT)
                assert resumed == found[f"{stage}"][1]


class Looks(lit_fast.Callback):
    """At what has been restored."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.state = trainer.strategy.optimizer_state(trainer.optimizers[0])
        self.weights = trainer.strategy.lightning_module_state_dict()


def written_by_two(stage: int, path: str, precision: str) -> Any:
    trainer, _ = fit(stage, 4, precision=precision)
    return saved(trainer, Path(path))


def read_by_one(stage: int, path: str, precision: str) -> Any:
    looks = Looks()
    _, model = fit(stage, 5, ckpt_path=path, callbacks=[looks], precision=precision)
    return looks.state, looks.weights, model.losses, model.head.weight.dtype


@needs_deepspeed
@dist_test
@pytest.mark.parametrize("stage,precision", [(2, "bf16-mixed"), (1, "bf16-true"), (3, "bf16-true")])
def test_another_number_of_processes_has_all_of_the_state(stage: int, precision: str, tmp_path: Path) -> None:
    path = str(tmp_path / "two.ckpt")
    checkpoint, _ = run_ranks(written_by_two, 2, stage, path, precision, timeout=60.0)
    state, weights, losses, dtype = run_ranks(read_by_one, 1, stage, path, precision, timeout=60.0)[0]
    trained = {name: w for name, w in checkpoint["state_dict"].items() if name != "layers.0.bias"}
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert any(not torch.equal(weight.bfloat16().float(), weight) for weight in trained.values())
    torch.testing.assert_close(weights, checkpoint["state_dict"], **EXACT)
    torch.testing.assert_close(state, checkpoint["optimizer_states"][0], **EXACT)
    assert len(losses) == 1 and dtype == torch.bfloat16


def in_16_bits(folder: str) -> Any:
    """A processor that DeepSpeed says has no float16 computes in it all the same, slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    losses = {dtype: fit(2, 20, precision=dtype)[1].losses for dtype in ("32-true", "bf16-mixed", "bf16-true")}
    losses["16-true"] = fit(DeepSpeedStrategy(loss_scale=1024.0), 20, precision="16-true")[1].losses
    found = []
    path = Path(folder, "half.ckpt")
    for steps, ckpt_path in ((24, None), (8, None), (24, path)):
        strategy = DeepSpeedStrategy(initial_scale_power=30, loss_scale_window=2, hysteresis=1)
        trainer, model = fit(strategy, steps, precision="16-true", ckpt_path=ckpt_path)
        engine = trainer.strategy.deepspeed_engine
        found.append((model.losses, engine.skipped_steps, engine.optimizer.loss_scale, trainer.global_step))
        if steps == 8:
            checkpoint = saved(trainer, path)
    return losses, found, checkpoint["DeepSpeedPrecision"]


@needs_deepspeed
@dist_test
def test_16_bits_and_the_scale_of_float16_is_saved(tmp_path: Path) -> None:
    losses, found, state = run_ranks(in_16_bits, 2, str(tmp_path), timeout=120.0)[0]
    for dtype, unit in (("bf16-mixed", 2.0**-7), ("bf16-true", 2.0**-7), ("16-true", 2.0**-10)):
        # Losses between 1 and 2 are rounded to this unit, and weights in each forward to theirs.
        assert 0.0 < max(abs(a - b) for a, b in zip(losses[dtype], losses["32-true"], strict=True)) < 4 * unit
    (whole, skipped, scale, steps), (first, skipped_first, scale_then, _), (then, _, scale_resumed, _) = found
    assert steps == 24 and skipped >= skipped_first > 5  # 2^30 is far too much
    assert state["cur_scale"] == scale_then and scale == scale_resumed < 2.0**30
    assert whole == first + then


# -- what hooks see, and runs after each other


class Hooked(Several):
    """Overrides what runs around a step, and looks at weights in parts where it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.validated: list[Tensor] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        assert isinstance(optimizer, EngineOptimizer)
        optimizer.step(closure=optimizer_closure)
        self.steps.append(batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self(batch[0]).sum())


def hooked(stage: int) -> Any:
    found = []
    for strategy in (stage, "ddp"):
        rank = int(os.environ["RANK"])
        model = Hooked() if strategy != "ddp" else HookedPlain()
        trainer = lit_fast.Trainer(
            accelerator="cpu", devices=2, strategy=strategy_of(strategy), max_steps=10, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=4, gradient_clip_val=0.1,
        )  # fmt: skip
        batches = share(rank, 2)[:10]
        trainer.fit(model, batches, batches[:2])
        found.append((list(model.losses), torch.stack(model.validated), list(model.steps), trainer.explain()))
    after: Any = None
    if stage < 3:
        trainer.strategy.barrier()
        again = lit_fast.Trainer(
            accelerator="cpu", devices=2, strategy=strategy_of(stage), max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        again.fit(model, batches)
        again.fit_loop.max_steps = 4
        again.fit(model, batches)
        after = again.global_step, model(batches[0][0]).sum().backward(), model.head.weight.grad is not None
    return found, after


class HookedPlain(Hooked):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)
        self.steps.append(batch_idx)


@needs_deepspeed
@dist_test
@pytest.mark.parametrize("stage", [2, 3])
def test_hooks_validation_and_a_fit_after_a_fit(stage: int) -> None:
    for (ours, ddps), after in run_ranks(hooked, 2, stage, timeout=90.0):
        torch.testing.assert_close(ours[0], ddps[0], **CLOSE)
        torch.testing.assert_close(ours[1], ddps[1], rtol=1e-5, atol=1e-5)  # a sum of 16 numbers
        assert ours[2] == ddps[2] == [3, 7, 9] * 3 + [3]
        assert f"through DeepSpeed's engine, ZeRO stage {stage}" in ours[3] and "compiled step" not in ours[3]
        assert after == (None if stage == 3 else (4, None, True))


class Other(lit_fast.Callback):
    """Changes a weight behind the engine's back, between two steps."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.head.bias.fill_(0.5)


def one_after_the_other(stage: int, folder: str) -> Any:
    """fit, validate and save; then, by another Trainer, validate from that file and fit from the weights of a third."""
    path, batches = Path(folder, "first.ckpt"), share(0, 1)[:4]
    options = {"precision": "bf16-mixed", "callbacks": [Other()]}
    trainer, model = fit(stage, 4, Hooked(), **options)
    first = saved(trainer, Path(folder, "before.ckpt"))
    trainer.validate(model, batches, verbose=False)
    second = saved(trainer, path)
    if stage == 3:
        with pytest.raises(MisconfigurationException, match="Make it anew, with a Trainer"):
            trainer.validate(model, batches, ckpt_path=path, verbose=False)
        return first, second, None
    model = Hooked()
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=1, strategy=strategy_of(stage), max_steps=1, logger=False, precision="bf16-mixed",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = trainer.explain(model)
    trainer.validate(model, batches, ckpt_path=path, verbose=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    trainer.fit(model, batches)
    return first, second, (before, trainer.strategy.lightning_module_state_dict())


@needs_deepspeed
@dist_test
@pytest.mark.parametrize("stage", [2, 3])
def test_runs_after_each_other_keep_or_forget_what_they_should(stage: int, tmp_path: Path) -> None:
    first, second, then = run_ranks(one_after_the_other, 1, stage, str(tmp_path), timeout=90.0)[0]
    same_but_for(first, second, EXACT)
    assert len(first["optimizer_states"][0]["state"]) == 12  # of 13 parameters one is frozen
    if then is not None:
        assert torch.equal(first["state_dict"]["head.bias"].float(), torch.full((4,), 0.5))  # not the engine's master
        before, weights = then
        assert "engine.step" in before and "compiled step" not in before and "autograd engine" not in before
        assert all((weight - 0.25).abs().max() < 0.02 for weight in weights.values())  # a step's 0.01 away


class Silent(Several):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class ByValue(Several):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


class Manual(Several):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Optimizers(Several):
    def __init__(self, *kinds: Any) -> None:
        super().__init__()
        self.kinds = kinds

    def configure_optimizers(self) -> Any:
        return [kind(self.parameters(), lr=1e-2) for kind in self.kinds]


class Thaws(Several):
    def on_train_epoch_start(self) -> None:
        self.layers[0].bias.requires_grad = True


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Silent, {}, "training_step returned no loss in the last micro-batch"),
    (ByValue, {}, "ByValue overrides configure_gradient_clipping"),
    (Manual, {}, "Manual optimizes manually"),
    (Several, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clips by norm alone"),
    (Several, {"nonfinite": "skip"}, "nonfinite='skip' is not asked by the engine"),
    (Optimizers, {}, "returned 0 optimizers; DeepSpeed takes one"),
    (lambda: Optimizers(torch.optim.LBFGS), {}, "cannot step LBFGS: it evaluates the loss several times"),
    (lambda: Optimizers(torch.optim.Adagrad), {}, "cannot step Adagrad: DeepSpeed makes another one"),
    (lambda: Optimizers(lit_fast.optim.Lamb), {}, "cannot step Lamb: it looks at whole tensors"),
    (Thaws, {"max_epochs": 2}, "other parameters are trained now"),
    (
        Several,
        {"callbacks": [lit_fast.callbacks.LearningRateFinder(update_attr=False)]},
        "cannot try something out and be as before",
    ),
]


def refused() -> list[str]:
    found = []
    for make, options, _ in REFUSED:
        with pytest.raises(MisconfigurationException) as raised:
            fit(1, 12, make(), **options)
        found.append(str(raised.value))
    fit(3, 2, model := Several())
    with pytest.raises(MisconfigurationException, match="still in the parts that a fit has made of it"):
        fit(3, 2, model)
    with pytest.warns(UserWarning, match="DeepSpeed keeps to itself"):
        fit(2, 2, callbacks=[SavesInWindow()], accumulate_grad_batches=2)
    return found


class SavesInWindow(lit_fast.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            trainer.save_checkpoint(Path("inside.ckpt"))


@needs_deepspeed
@dist_test
def test_what_deepspeed_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for said, (_, _, expected) in zip(run_ranks(refused, 1, timeout=90.0)[0], REFUSED, strict=True):
        assert expected in said


# -- names and options


@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_every_name_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == "deepspeed" else found(asked))
    with pytest.raises(MisconfigurationException, match="not installed here: pip install deepspeed"):
        lit_fast.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)


@pytest.fixture
def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make a strategy the package is only looked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: SimpleNamespace(name=asked))


def test_names(as_if_installed: None) -> None:
    found = {name: choose_strategy(name, [CPU] * 2, 1, None) for name in NAMES}
    assert {name: strategy.stage for name, strategy in found.items()} == {
        "deepspeed": 2, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_2_offload": 2,
        "deepspeed_stage_3": 3, "deepspeed_stage_3_offload": 3,
    }  # fmt: skip
    zero = found["deepspeed_stage_3_offload"].config["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in found["deepspeed_stage_3"].config["zero_optimization"]
    with pytest.raises(MisconfigurationException, match="did you mean 'deepspeed_stage_3'"):
        choose_strategy("deepspeed_stage3", [CPU] * 2, 1, None)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"nvme_path": "/x"}, r"nvme_path=\.\.\.\): there is no such option; DeepSpeed's own are given as config"),
        ({"stage": 4}, "its ZeRO stage is 4; allowed are 1, 2 and 3"),
        ({"zero_optimization": False}, "its ZeRO stage is 0"),
        ({"config": {"train_batch_size": 8}}, "its ZeRO stage is 0"),
        ({"config": {"gradient_accumulation_steps": 2}}, "leave it out, and set Trainer.accumulate_grad_batches"),
        ({"config": {"optimizer": {}}}, "return it from configure_optimizers"),
        ({"config": "no/such.json"}, "allowed are a dictionary and the path of a JSON file"),
        ({"config": 3.0}, "allowed are a dictionary and the path"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, as_if_installed: None) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        DeepSpeedStrategy(**options)


def test_a_configuration_of_its_own(tmp_path: Path, as_if_installed: None) -> None:
    given = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5, "bf16": {"immediate_grad_update": True}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(given))
    strategy = DeepSpeedStrategy(config=path)
    assert strategy.stage == 1 and strategy.config == given == DeepSpeedStrategy(config=given).config
    whole = deepspeed_config.complete(given, "bf16-mixed", None, {})
    assert whole == {
        **given, "bf16": {"immediate_grad_update": True, "enabled": True}, "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
    }  # fmt: skip
    assert given["bf16"] == {"immediate_grad_update": True}  # not changed
    half = deepspeed_config.complete({"fp16": {"loss_scale": 8}}, "16-true", 1.0, {"loss_scale": 0, "hysteresis": 2})
    assert half["fp16"] == {"loss_scale": 8, "hysteresis": 2, "enabled": True} and half["gradient_clipping"] == 1.0
    with pytest.raises(MisconfigurationException, match="leave one of them out"):
        deepspeed_config.complete(given, "32-true", 1.0, {})
    with pytest.raises(MisconfigurationException, match="leave 'enabled' out there"):
        deepspeed_config.complete({"fp16": {"enabled": True}}, "bf16-true", None, {})


def test_precisions(as_if_installed: None) -> None:
    strategy = DeepSpeedStrategy()
    assert type(strategy.precision_for(plain := Precision())) is Precision and strategy.precision_for(plain) is plain
    for given in (MixedPrecision("bf16-mixed", "cpu"), MixedPrecision("16-mixed", "cpu"), HalfPrecision("bf16-true")):
        found = strategy.precision_for(given)
        assert isinstance(found, DeepSpeedPrecision) and found.precision == given.precision
        assert strategy.precision_for(found) is found
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for given in (DoublePrecision(), MixedPrecision("16-mixed", "cpu", scaler)):
        with pytest.raises(MisconfigurationException, match="allowed are the names '32-true'"):
            strategy.precision_for(given)
    trainer = lit_fast.Trainer(accelerator="cpu", devices=1, strategy=strategy, precision="bf16-mixed", logger=False)
    assert isinstance(trainer.precision_plugin, DeepSpeedPrecision) and trainer.precision == "bf16-mixed"

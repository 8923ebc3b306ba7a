"""Steps with gradients that are NaN or infinite: taken as torch takes them, left out, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import lit_fast as L
from lit_fast import optim
from lit_fast.errors import MisconfigurationException, NonFiniteGradientError
from lit_fast.optim import adopt
from lit_fast.optim.adamw import AdamW
from lit_fast.precision import MixedPrecision

BAD = [float("nan"), float("inf"), float("-inf")]
MAKERS: dict[str, Any] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "8bit": lambda ps: AdamW(ps, lr=0.1, state_dtype="8bit"),
    "no_kernel": lambda ps: torch.optim.NAdam(ps, lr=0.1),
}


def two_parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.linspace(-1, 1, 300).to(dtype)), Parameter(torch.ones(4, 5, dtype=dtype))]


def set_gradients(parameters: list[Parameter], bad: float | None = None) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    if bad is not None:
        parameters[1].grad[2, 3] = bad


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    for entry in optimizer.state.values():
        tensors += [value.clone() for value in entry.values() if isinstance(value, Tensor)]
    return tensors


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("limits", [{}, {"max_norm": 1.0}, {"clip_value": 0.25}], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_skipped_step_changes_nothing(kind: str, limits: dict[str, float], bad: float) -> None:
    """The run with a skipped step is the run without it; the first step of all may be skipped too."""
    after = []
    for steps in ([bad, None, bad, None], [None, None]):
        parameters = two_parameters()
        adopted = adopt(MAKERS[kind](parameters), **limits, nonfinite="skip")
        for value in steps:
            set_gradients(parameters, value)
            before = snapshot(adopted.optimizer)
            norm = adopted.step()
            if value is not None:
                assert_equal(before, snapshot(adopted.optimizer))
            if "max_norm" in limits:
                assert isinstance(norm, Tensor) and norm.isfinite().item() is (value is None)
            else:
                assert norm is None
        assert adopted.skipped_steps == steps.count(bad)
        assert adopted.compiled is (kind != "no_kernel")
        after.append(snapshot(adopted.optimizer))
    assert_equal(*after)


def test_finite_gradients_with_an_infinite_float32_norm_are_stepped() -> None:
    parameter = Parameter(torch.zeros(100))
    parameter.grad = torch.full((100,), 3e38)
    adopted = adopt(torch.optim.SGD([parameter], lr=1e-38), max_norm=1.0, nonfinite="skip")
    assert adopted.step() == float("inf") and adopted.skipped_steps == 0
    adopted = adopt(torch.optim.SGD([parameter], lr=1e-38), nonfinite="skip")
    adopted.step()
    torch.testing.assert_close(parameter.detach(), torch.full((100,), -3.0))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_error_names_the_first_parameter(kind: str) -> None:
    parameters = two_parameters()
    adopted = adopt(MAKERS[kind](parameters), nonfinite="raise")
    set_gradients(parameters)
    adopted.step()
    set_gradients(parameters, float("nan"))
    before = snapshot(adopted.optimizer)
    with pytest.raises(NonFiniteGradientError, match=r"parameter 1 of param group 0, of shape \(4, 5\)"):
        adopted.step()
    assert_equal(before, snapshot(adopted.optimizer))


def test_names_that_torch_keeps_are_used() -> None:
    layer = torch.nn.Linear(2, 2)
    adopted = adopt(torch.optim.SGD(layer.named_parameters(), lr=0.1), nonfinite="raise")
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 2), torch.full((2,), float("inf"))
    with pytest.raises(NonFiniteGradientError, match="gradient of bias is not finite"):
        adopted.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    parameters = two_parameters(dtype)
    adopted = adopt(torch.optim.SGD(parameters, lr=0.1), nonfinite="skip")
    set_gradients(parameters, float("inf"))
    adopted.step()
    assert adopted.skipped_steps == 1 and adopted.compiled is (dtype != torch.float64)


def test_a_step_hook_does_not_run_for_a_skipped_step() -> None:
    """As under `GradScaler`, which does not call the optimizer then."""
    parameters = two_parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    seen: list[object] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    adopted = adopt(optimizer, clip_value=0.5, nonfinite="skip")
    for bad in (float("inf"), None):
        set_gradients(parameters, bad)
        adopted.step()
    assert len(seen) == 1 and adopted.skipped_steps == 1


def test_sparse_and_empty_gradients() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    empty = Parameter(torch.zeros(0))
    adopted = adopt(torch.optim.SGD([empty, *embedding.parameters()], lr=0.1), nonfinite="skip")
    empty.grad = torch.zeros(0)
    with pytest.warns(UserWarning, match="compiled optimizer step is off"):
        (embedding(torch.tensor([1, 1])).sum() * float("inf")).backward()
        adopted.step()
    assert adopted.skipped_steps == 1 and embedding.weight.isfinite().all()


def test_propagate_is_torch() -> None:
    parameters = two_parameters()
    adopted = adopt(torch.optim.SGD(parameters, lr=0.1))
    set_gradients(parameters, float("nan"))
    adopted.step()
    assert parameters[1].isnan().sum() == 1 and adopted.guard is None and adopted.skipped_steps == 0


@pytest.mark.parametrize("nonfinite", ["ignore", None, 1])
def test_other_values_are_refused(nonfinite: Any) -> None:
    with pytest.raises(MisconfigurationException, match="allowed are 'propagate', 'skip', 'raise'"):
        adopt(torch.optim.SGD(two_parameters(), lr=0.1), nonfinite=nonfinite)
    with pytest.raises(MisconfigurationException, match="allowed are 'propagate', 'skip', 'raise'"):
        L.Trainer(nonfinite=nonfinite)


def test_a_device_that_would_have_to_be_waited_for_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="on meta"):
        adopt(torch.optim.SGD([Parameter(torch.ones(2, device="meta"))], lr=0.1), nonfinite="skip")
    assert optim.adopt(torch.optim.SGD([Parameter(torch.ones(2, device="meta"))], lr=0.1)).skipped_steps == 0


class Poisoned(L.LightningModule):
    """Batch 2 of 5 has a gradient which is not finite."""

    def __init__(self, poison: float = float("inf"), optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        self.poison, self.optimizer = poison, optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.second(self.first(batch)).square().mean()
        return loss + self.second.bias.sum() * self.poison if batch_idx == 2 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.1)


class Watched(Poisoned):
    def on_before_zero_grad(self, optimizer: object) -> None:
        """Sees gradients, so they are clipped in memory."""


def fitted(module: L.LightningModule, batches: list[Tensor], **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches)
    return trainer


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(5)]


CLIPPINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", [Poisoned, Watched])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_trainer_skips(kind: type[Poisoned], clipping: str, poison: float) -> None:
    torch.manual_seed(3)
    module = kind(poison)
    trainer = fitted(module, batches(), nonfinite="skip", **CLIPPINGS[clipping])
    assert trainer.skipped_steps == 1 and trainer.global_step == 5
    assert "nonfinite='skip'" in trainer.explain()
    assert {int(entry["step"]) for entry in trainer.optimizers[0].state.values()} == {4}
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", [Poisoned, Watched])
def test_the_trainer_names_the_parameter(kind: type[Poisoned], clipping: str) -> None:
    with pytest.raises(NonFiniteGradientError, match=r"gradient of second\.bias is not finite"):
        fitted(kind(), batches(), nonfinite="raise", **CLIPPINGS[clipping])


def test_a_skipped_step_under_the_trainer_is_no_step() -> None:
    """The weights are those of a run that never saw that batch."""
    after = []
    for poisoned in (True, False):
        torch.manual_seed(3)
        module = Poisoned()
        data = batches()
        if not poisoned:
            del data[2]
            module.poison = 0.0
        fitted(module, data, nonfinite="skip" if poisoned else "propagate", gradient_clip_val=1.0)
        after.append(module.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_what_skips_by_itself_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="loss scaler"):
        L.Trainer(nonfinite="skip", plugins=MixedPrecision("16-mixed", "cpu"))
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        fitted(Poisoned(optimizer=torch.optim.LBFGS), batches(), nonfinite="raise")


def test_a_trainer_without_the_option_binds_nothing_for_it() -> None:
    trainer = fitted(Poisoned(0.0), batches())
    assert trainer.skipped_steps == 0 and "nonfinite" not in trainer.explain()
    plan = trainer.fit_loop.plans.whole
    assert plan.update == (trainer.fit_loop.plans.binding.stepping.adopted[0].step,)


def test_an_epoch_ends_with_the_error_that_a_device_has_counted() -> None:
    class Counted(Poisoned):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.is_last_batch:
                self.trainer.fit_loop.plans.binding.stepping.guard.counted_on(torch.device("cpu")).add_(2)

    with pytest.raises(NonFiniteGradientError, match=r"^A gradient was not finite.*the last 2 steps"):
        fitted(Counted(poison=0.0), batches(), nonfinite="raise")
    trainer = fitted(Counted(poison=0.0), batches(), nonfinite="skip")
    assert trainer.skipped_steps == 2

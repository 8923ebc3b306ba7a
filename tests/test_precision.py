"""bf16-mixed and bf16-true: dtypes, learning, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import QUIET, Plain, batches, fitted, network

import lit_fast


class Dtypes(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = batch.dtype, self.net(batch).dtype, torch.empty(0).dtype
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "precision,batch,output,default,weights",
    [
        ("32-true", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_and_falling_loss(precision: str, batch: Any, output: Any, default: Any, weights: Any) -> None:
    model = Dtypes(lambda p: torch.optim.AdamW(p, lr=0.02))
    fitted(model, batches(10), max_epochs=10, precision=precision)
    assert model.seen == (batch, output, default)
    assert {p.dtype for p in model.parameters()} == {weights}
    assert torch.empty(0).dtype == torch.float32, "the default dtype is put back"
    first, last = sum(model.losses[:10]), sum(model.losses[-10:])
    assert last < 0.5 * first


def test_bf16_mixed_equals_autocast_by_hand() -> None:
    data = batches(10)
    optimizer_of = lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)  # noqa: E731
    model = Plain(optimizer_of)
    fitted(model, data, max_steps=50, precision="bf16-mixed")
    net = network()
    optimizer, expected = optimizer_of(net.parameters()), []
    for index in range(50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (net(data[index % 10]).squeeze(-1) - data[index % 10].sum(-1)).square().mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.losses == expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_goes_on_from_a_checkpoint(precision: str, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> list[float]:
        model = Plain(lambda p: torch.optim.AdamW(p, lr=0.02))
        made = lit_fast.Trainer(**{**QUIET, "max_steps": steps, "precision": precision})
        made.fit(model, batches(7), ckpt_path=options.get("ckpt_path"))
        made.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.losses

    straight = run(20)
    assert run(10) + run(20, ckpt_path=tmp_path / "10.ckpt") == straight


def test_batches_are_cast_wherever_they_lie() -> None:
    class Nested(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["x"][0].dtype == torch.bfloat16 and batch["i"].dtype == torch.int64 and batch["t"] == "text"
            return super().training_step(batch["x"][0], batch_idx)

    data = [{"x": [batch], "i": torch.arange(3), "t": "text"} for batch in batches(2)]
    fitted(Nested(), data, max_epochs=1, precision="bf16-true")

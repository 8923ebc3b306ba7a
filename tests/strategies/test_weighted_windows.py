"""Losses that come with weights, in two processes: against float64 gradients of everything that they see together."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import lit_fast

pytestmark = pytest.mark.dist

# Of each process's micro-batches: very different ones, and windows in which one or both weigh nothing.
WEIGHTS = ([3, 700, 0, 0, 5, 0, 9, 4, 0, 0, 0, 2], [4096, 1, 7, 0, 0, 0, 60, 4, 11, 0, 2, 5])
LR = 0.05


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in WEIGHTS[0]]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))


class Weighted(lit_fast.LightningModule):
    def __init__(self, weights: Any, skips: bool = False) -> None:
        super().__init__()
        self.net, self.weights, self.skips = network(), weights, skips

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.net(batch.float()).square().mean()
        if self.weights is None:
            return loss
        weight = self.weights[self.global_rank][batch_idx]
        if self.skips and batch_idx and not weight:
            return None
        return {"loss": loss, "weight": weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def trained(weights: Any, window: int, skips: bool = False, strategy: str = "ddp", **options: Any) -> list[Tensor]:
    model = Weighted(weights, skips)
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, accumulate_grad_batches=window, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(model, batches(int(os.environ["RANK"])))
    return [parameter.detach().clone() for parameter in model.parameters()]


def all_fits() -> dict[str, list[Tensor]]:
    same = [[7] * 12] * 2
    return {
        "1": trained(WEIGHTS, 1),
        "3": trained(WEIGHTS, 3),
        "5": trained(WEIGHTS, 5),  # the last window is shorter
        "clipped": trained(WEIGHTS, 3, gradient_clip_val=0.2),
        "skipping": trained(WEIGHTS, 3, skips=True),
        "zero1": trained(WEIGHTS, 3, strategy="zero1"),
        "zero1 clipped": trained(WEIGHTS, 3, strategy="zero1", gradient_clip_val=0.2),
        "equal": trained(same, 3),
        "unweighted": trained(None, 3),
        "equal1": trained(same, 1),
        "unweighted1": trained(None, 1),
    }


def by_hand(window: int, clip: float | None = None) -> list[Tensor]:
    """One process that sees all: each window's gradient is that of the weighted mean of all its losses."""
    net = network().double()
    data = [batches(0), batches(1)]
    for begin in range(0, len(WEIGHTS[0]), window):
        places = [(rank, i) for rank in (0, 1) for i in range(begin, min(begin + window, len(WEIGHTS[0])))]
        total = sum(WEIGHTS[rank][i] for rank, i in places)
        if not total:
            continue
        net.zero_grad()
        loss = sum(WEIGHTS[rank][i] * net(data[rank][i]).square().mean() for rank, i in places) / total
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(LR * parameter.grad)
    return [parameter.detach() for parameter in net.parameters()]


def test_the_mean_is_weighted_over_all_processes() -> None:
    first, second = run_ranks(all_fits, 2)
    for name, weights in first.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, second[name], strict=True)), name
    plain, clipped = by_hand(3), by_hand(3, 0.2)
    expected = {"1": by_hand(1), "3": plain, "5": by_hand(5), "clipped": clipped, "skipping": plain}
    expected |= {"zero1": plain, "zero1 clipped": clipped}
    for name, weights in expected.items():
        for ours, exact in zip(first[name], weights, strict=True):
            # some 30 roundings of float32 in a step's gradients, at most 12 steps
            assert (ours - exact).abs().max() <= 12 * 30 * 2**-24 * exact.abs().max(), name
    for weighed, same in (("equal", "unweighted"), ("equal1", "unweighted1")):
        assert all(torch.equal(a, b) for a, b in zip(first[weighed], first[same], strict=True)), weighed

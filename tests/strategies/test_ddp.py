"""`strategy="ddp"` in several processes, against torch's DistributedDataParallel in a loop written by hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lit_fast

pytestmark = pytest.mark.dist


class Net(lit_fast.LightningModule):
    """Enough parameters for several small buckets; one of them shared, one never used where `unused`."""

    def __init__(self, unused: bool = False, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(6)])
        self.layers[3].weight = self.layers[1].weight
        self.head = nn.Linear(24, 4)
        self.unused = nn.Linear(3, 3) if unused else None
        self.norm = nn.BatchNorm1d(24) if norm else None
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x if self.norm is None else self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(8 * 40, 24, generator=generator), torch.randint(4, (8 * 40,), generator=generator))


_kept: list[Any] = []


def share(rank: int, world: int, batch_size: int = 4) -> list[Any]:
    """This rank's batches, dealt by hand."""
    data = dataset()
    indices = list(range(len(data)))[rank::world]
    return [data[indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]


def ours(steps: int, options: dict[str, Any], strategy_options: dict[str, Any], net: dict[str, Any]) -> Any:
    from lit_fast.strategies import DDPStrategy

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model = Net(**net)
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy=DDPStrategy(**strategy_options), max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, share(rank, world))
    return model.losses, {name: p.detach().clone() for name, p in model.state_dict().items()}


def torchs(steps: int, accumulate: int, bucket_cap_mb: float, net: dict[str, Any]) -> Any:
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    model = Net(**net)
    unused = bool(net.get("unused"))
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, find_unused_parameters=unused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses, done = [], 0
    batches = share(rank, world)
    while done < steps:
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            optimizer.zero_grad()
            for index, (x, y) in enumerate(window):
                ddp.require_backward_grad_sync = index == len(window) - 1
                loss = nn.functional.cross_entropy(ddp(x), y)
                losses.append(loss.item())
                (loss / len(window)).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    _kept.append(ddp)  # its end waits for a message that a rank which has ended does not send
    dist.barrier()
    return losses, state


def same(a: Any, b: Any) -> None:
    for (losses, weights), (other_losses, other_weights) in zip(a, b, strict=True):
        assert losses == other_losses
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize(
    "options,sizes,net",
    [
        ({}, {}, {}),
        ({}, {"bucket_cap_mb": 0.004, "first_bucket_mb": 0.001}, {"norm": True}),
        ({"accumulate_grad_batches": 3}, {"bucket_cap_mb": 0.004}, {"unused": True}),
    ],
    ids=["plain", "small-buckets-norm", "accumulate-unused"],
)
def test_100_steps_of_two_ranks_have_torchs_bits(options: Any, sizes: Any, net: Any) -> None:
    accumulate = options.get("accumulate_grad_batches", 1)
    steps = 100 if accumulate == 1 else 40
    same(run_ranks(ours, 2, steps, options, sizes, net), run_ranks(torchs, 2, steps, accumulate, 25, net))

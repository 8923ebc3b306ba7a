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


def torchs(steps: int, accumulate: int, bucket_cap_mb: float, net: dict[str, Any], clip: float = 0.0) -> Any:
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
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            done += 1
            if done == steps:
                break
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    _kept.append(ddp)  # its end waits for a message that a rank which has ended does not send
    dist.barrier()
    return losses, state


def changing(steps: int) -> Any:
    """Layers frozen and thawed in the run, a loss that one rank does not have; manual optimization that toggles."""
    from lit_fast.callbacks import LambdaCallback

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])

    class Lazy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if rank == 1 and batch_idx % 5 == 2 else loss

    def freeze(trainer: Any, module: Any) -> None:
        module.head.requires_grad_(trainer.current_epoch % 2 == 0)
        module.layers[5].requires_grad_(trainer.current_epoch % 2 == 1)

    model = Lazy()
    callback = LambdaCallback(on_train_epoch_start=freeze)
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy="ddp", max_epochs=4, limit_train_batches=steps // 4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callback,
    )  # fmt: skip
    trainer.fit(model, share(rank, world))
    text = trainer.explain()

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.AdamW(self.layers.parameters(), 1e-3)]

    manual = Manual()
    lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy="ddp", max_steps=20, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(manual, share(rank, world))  # fmt: skip
    scaled = [Lazy(), Lazy()]  # a scaler wants a closure, and leaves its step out where that returns None
    for each, strategy in zip(scaled, ("ddp", "zero1"), strict=True):
        lit_fast.Trainer(
            accelerator="cpu", devices=world, strategy=strategy, max_steps=8, logger=False, precision="16-mixed",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(each, share(rank, world))  # fmt: skip
    states = [{name: p.detach().clone() for name, p in each.state_dict().items()} for each in (model, manual, *scaled)]
    dist.barrier()
    return text, states


def changing_by_hand(steps: int) -> list[dict[str, Tensor]]:
    """The same in one process: gradients of both ranks' batches, averaged; a rank without a loss has zeros."""
    states = []
    for manual in (False, True):
        model, batches = Net(), [share(rank, 2) for rank in range(2)]
        if manual:
            optimizers = [
                torch.optim.SGD(model.head.parameters(), 0.1),
                torch.optim.AdamW(model.layers.parameters(), 1e-3, fused=True),
            ]
        else:
            optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)]
        epochs = [(0, range(10))] if manual else [(epoch, range(steps // 4)) for epoch in range(4)]
        for epoch, indices in epochs:
            if not manual:
                model.head.requires_grad_(epoch % 2 == 0)
                model.layers[5].requires_grad_(epoch % 2 == 1)
            for index in indices:
                for optimizer in optimizers:
                    own = [p for group in optimizer.param_groups for p in group["params"]]
                    sums: dict[Tensor, Tensor] = {}
                    for rank in range(2):
                        model.zero_grad()
                        if manual or rank == 0 or index % 5 != 2:
                            x, y = batches[rank][index]
                            nn.functional.cross_entropy(model(x), y).backward()
                        for p in own:
                            if p.grad is not None:
                                sums[p] = sums.get(p, torch.zeros_like(p)) + p.grad * 0.5
                    for p in own:
                        p.grad = sums.get(p)
                    optimizer.step()
        states.append({name: p.detach().clone() for name, p in model.state_dict().items()})
    return states


def test_what_changes_in_a_run() -> None:
    expected, ranks = changing_by_hand(40), run_ranks(changing, 2, 40)
    for text, states in ranks:
        assert "averaged over 2 processes, bucket by bucket" in text
        for state, other in zip(states, [*expected, *ranks[0][1][2:]], strict=True):
            assert all(torch.equal(state[name], other[name]) for name in other)
    begun, trained = Net().state_dict(), ranks[0][1][2]
    assert not any(torch.equal(begun[name], trained[name]) for name in begun)


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
        ({"gradient_clip_val": 0.05}, {"bucket_cap_mb": 0.004}, {}),
    ],
    ids=["plain", "small-buckets-norm", "accumulate-unused", "clipped"],
)
def test_100_steps_of_two_ranks_have_torchs_bits(options: Any, sizes: Any, net: Any) -> None:
    accumulate = options.get("accumulate_grad_batches", 1)
    steps = 100 if accumulate == 1 else 40
    clip = options.get("gradient_clip_val", 0.0)
    same(run_ranks(ours, 2, steps, options, sizes, net), run_ranks(torchs, 2, steps, accumulate, 25, net, clip))


def distance(a: Any, b: Any) -> Tensor:
    """Of the first rank's losses and of its weights: root mean squares of the differences."""
    (losses, weights), (other_losses, other_weights) = a[0], b[0]
    steps = torch.tensor(losses, dtype=torch.float64) - torch.tensor(other_losses, dtype=torch.float64)
    moved = torch.cat([(weights[name].double() - other_weights[name].double()).flatten() for name in weights])
    return torch.stack([steps.square().mean().sqrt(), moved.square().mean().sqrt()])


@pytest.mark.slow
def test_100_steps_of_four_ranks_are_as_near_to_torchs_as_those_are_to_themselves() -> None:
    """With four addends a ring's order of summation, and so the last bit, depends on where buckets end."""
    torch_25 = run_ranks(torchs, 4, 100, 1, 25, {}, timeout=120.0)
    itself = distance(torch_25, run_ranks(torchs, 4, 100, 1, 0.004, {}, timeout=120.0))
    assert (itself > 0).all()
    assert (distance(torch_25, run_ranks(ours, 4, 100, {}, {}, {}, timeout=120.0)) <= 2 * itself).all()

"""`strategy="ddp_torch"` in two processes, against DistributedDataParallel in a loop written by hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_ddp import Net, same, share, torchs
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies import TorchDDPStrategy
from lit_fast.strategies.choosing import choose_strategy

dist_test = pytest.mark.dist


def fit(steps: int, options: dict[str, Any], strategy: dict[str, Any], net: dict[str, Any], model: Any = None) -> Any:
    rank = int(os.environ["RANK"])
    model = model or Net(**net)
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=2, strategy=TorchDDPStrategy(**strategy), max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, share(rank, 2))
    return model.losses, {name: p.detach().clone() for name, p in model.state_dict().items()}


@dist_test
@pytest.mark.parametrize(
    "accumulate,strategy,net",
    [
        (1, {"static_graph": True, "bucket_cap_mb": 0.004}, {"norm": True}),
        (3, {"find_unused_parameters": True}, {"unused": True}),
    ],
    ids=["static-graph-norm", "accumulate-unused"],
)
def test_bits_are_those_of_a_loop_by_hand(accumulate: int, strategy: Any, net: Any) -> None:
    ours = run_ranks(fit, 2, 20, {"accumulate_grad_batches": accumulate}, strategy, net)
    same(ours, run_ranks(torchs, 2, 20, accumulate, strategy.get("bucket_cap_mb", 25), net))


def counting_hook(state: list[int], bucket: dist.GradBucket) -> Any:
    state.append(bucket.index())
    return allreduce_hook(None, bucket)


def doubling(hook: Any) -> Any:
    return lambda state, bucket: hook(state, bucket).then(lambda future: 2.0 * future.value())


def with_hook() -> Any:
    calls: list[int] = []
    options = {"ddp_comm_state": calls, "ddp_comm_hook": counting_hook, "ddp_comm_wrapper": doubling}
    _, weights = fit(4, {"accumulate_grad_batches": 2}, options, {}, Stepped())
    _, expected = fit(4, {"accumulate_grad_batches": 2}, {}, {}, Doubled())
    return len(calls), weights, expected


class Stepped(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Doubled(Stepped):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=2e-2)


@dist_test
def test_hook_and_wrapper_are_handed_on_and_run_once_a_window() -> None:
    for calls, weights, expected in run_ranks(with_hook, 2):
        assert calls == 4  # one bucket, four windows of two micro-batches
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-6, atol=1e-7)


class ByHand(Net):
    """Two backwards in one `training_step`, the first gathered without being sent."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        half = len(batch[0]) // 2
        with self.trainer.strategy.block_backward_sync():
            self.manual_backward(nn.functional.cross_entropy(self(batch[0][:half]), batch[1][:half]) / 2)
        loss = nn.functional.cross_entropy(self(batch[0][half:]), batch[1][half:])
        self.manual_backward(loss / 2)
        optimizer.step()
        self.losses.append(loss.item())


def manual() -> Any:
    return fit(10, {}, {}, {}, ByHand()), manual_by_torch()


def manual_by_torch() -> Any:
    model = Net()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for x, y in share(dist.get_rank(), 2)[:10]:
        optimizer.zero_grad()
        with ddp.no_sync():
            (nn.functional.cross_entropy(ddp(x[:2]), y[:2]) / 2).backward()
        loss = nn.functional.cross_entropy(ddp(x[2:]), y[2:])
        (loss / 2).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.state_dict().items()}


@dist_test
def test_manual_optimization_sends_where_it_is_not_blocked() -> None:
    same(*zip(*run_ranks(manual, 2), strict=True))


class StopsInOne(Net):
    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 1 and self.global_step == 3:
            self.trainer.should_stop = True


def stopped() -> int:
    model = StopsInOne()
    fit(20, {"log_every_n_steps": 5}, {}, {}, model)
    return model.global_step


@dist_test
def test_a_wish_to_stop_is_heard_by_all_at_the_next_step_that_logs() -> None:
    assert run_ranks(stopped, 2) == [5, 5]


def test_name_and_options() -> None:
    devices = [torch.device("cpu")] * 2
    strategy = choose_strategy("ddp_torch_find_unused_parameters_true", devices, 1, None)
    assert isinstance(strategy, TorchDDPStrategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    with pytest.raises(MisconfigurationException, match=r"bucket_size=\.\.\..*no such option; it has .*bucket"):
        TorchDDPStrategy(bucket_size=3)

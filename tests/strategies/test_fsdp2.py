"""`strategy="fsdp2"` on Gloo processes: as far from torch's DDP as that is from itself, and what its options do."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_ddp import share
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.precision import MixedPrecision
from lit_fast.strategies import FSDP2Strategy, FSDPStrategy, TorchDDPStrategy
from lit_fast.strategies.choosing import choose_strategy
from lit_fast.strategies.fsdp2 import _blocks

dist_test = pytest.mark.dist


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(torch.tanh(self.up(x)))


class Net(lit_fast.LightningModule):
    def __init__(self, meta: bool = False) -> None:
        super().__init__()
        self.meta = meta
        torch.manual_seed(11)
        if not meta:
            self.make()
        self.losses: list[float] = []

    def make(self) -> None:
        self.scale = nn.Parameter(torch.ones(24)) if not self.meta else None  # of the module itself
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(24, 4)

    def configure_model(self) -> None:
        if self.meta and not hasattr(self, "blocks"):
            with torch.device("meta"):
                self.make()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] * self.scale  # of the module itself, gathered although its forward does not run
        self.log("val", self.head(self.blocks[0](x)).float().square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in module.state_dict().items()
    }


def fit(strategy: Any, steps: int, model: Any = None, validate: bool = False, **options: Any) -> Any:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = model or Net()
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    batches = share(rank, world)
    trainer.fit(model, batches, batches[:2] if validate else None)
    return trainer, model


def three(accumulate: int) -> Any:
    """100 steps of fsdp2, and of torch's DDP at two bucket sizes; an epoch has 10 batches: its last window is short."""
    found = []
    for strategy in (FSDP2Strategy(), TorchDDPStrategy(bucket_cap_mb=25), TorchDDPStrategy(bucket_cap_mb=0.004)):
        _, model = fit(strategy, 100, accumulate_grad_batches=accumulate, limit_train_batches=10)
        found.append((model.losses, whole(model)))
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5


@dist_test
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_further_from_ddp_than_twice_what_ddp_is_from_itself(accumulate: int) -> None:
    for fsdp, large, small in run_ranks(three, 4, accumulate, timeout=300.0):
        of_itself = distance(large[1], small[1])
        assert of_itself > 0.0
        assert distance(fsdp[1], large[1]) <= 2.0 * of_itself
        losses = torch.tensor([fsdp[0], large[0], small[0]], dtype=torch.float64)
        assert (losses[0] - losses[1]).norm() <= 2.0 * (losses[2] - losses[1]).norm()


def two() -> Any:
    options = {"accumulate_grad_batches": 4, "limit_train_batches": 10}
    trainer, split = fit(FSDP2Strategy(), 7, validate=True, **options)
    explained = trainer.explain()
    assert isinstance(split.blocks[0], FSDPModule) and isinstance(split.blocks[0].up.weight, DTensor)
    slots = trainer.optimizers[0].state[split.head.weight]
    assert isinstance(slots["exp_avg"], DTensor) and slots["exp_avg"].to_local().shape == (2, 24)
    _, copied = fit("ddp", 7, validate=True, **options)
    return (split.losses, whole(split)), (copied.losses, whole(copied)), explained


@dist_test
def test_two_processes_follow_ddp_with_a_short_last_window() -> None:
    for (losses, weights), (expected_losses, expected), explained in run_ranks(two, 2):
        assert losses[:10] == expected_losses[:10]  # an epoch
        # Gathered weights lie at other addresses, where matrix products may take another path.
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-7)
        assert "FSDP2 gathers the weights of 4 modules" in explained
        assert "compiled step (adamw on" in explained and "on this process's parts" in explained


def clipped() -> Any:
    found = []
    for strategy in (FSDP2Strategy(), "ddp"):
        _, model = fit(strategy, 3, gradient_clip_val=0.05, nonfinite="skip")
        found.append((model.losses, whole(model)))
    return found


def with_options() -> Any:
    found: dict[str, Any] = {}
    _, plain = fit(FSDP2Strategy(), 3)
    _, other = fit(FSDP2Strategy(activation_checkpointing={Block}, cpu_offload=True, reshard_after_forward=False), 3)
    found["recomputed"] = (plain.losses == other.losses, plain.blocks[0].runs, other.blocks[0].runs)
    _, by_size = fit(FSDP2Strategy(auto_wrap_policy=900), 3)
    found["by_size"] = (
        plain.losses == by_size.losses,
        [name for name, m in by_size.named_modules() if isinstance(m, FSDPModule)],
    )
    _, mixed = fit(FSDP2Strategy(), 3, precision="bf16-mixed")
    state = mixed._get_fsdp_state()
    policy = state._mp_policy
    found["mixed"] = (
        policy,
        mixed.head.weight.dtype,
        max(abs(a - b) for a, b in zip(mixed.losses, plain.losses, strict=True)),
    )
    _, true = fit(FSDP2Strategy(), 3, precision="bf16-true")
    found["true"] = true.head.weight.dtype
    _, waiting = fit(FSDP2Strategy(), 3, model=Net(meta=True))
    found["meta"] = (waiting.losses[0] != waiting.losses[2], [t.shape for t in whole(waiting).values()])
    trainer, copied = fit(FSDP2Strategy(device_mesh=(2, 1)), 3)
    found["copies"] = (copied.losses == plain.losses, trainer.strategy.device_mesh.mesh_dim_names)
    return found


@dist_test
def test_clipping_knows_the_norm_of_all_parts() -> None:
    for (losses, weights), (expected_losses, expected) in run_ranks(clipped, 2):
        # the norm is summed in another order, and everything after it is rounded: a few units in the last place
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-7)


@dist_test
def test_options() -> None:
    found = run_ranks(with_options, 2, timeout=90.0)[0]
    assert found["recomputed"] == (True, 3, 6)
    linears = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert found["by_size"] == (True, ["", *linears])
    assert found["mixed"][:2] == (MixedPrecisionPolicy(torch.bfloat16, torch.float32), torch.float32)
    assert 0.0 < found["mixed"][2] < 0.05
    assert found["true"] == torch.bfloat16
    assert found["meta"] == (True, [(40, 24), (40,), (24, 40), (24,)] * 3 + [(4, 24), (4,)])
    assert found["copies"] == (True, ("replicate", "shard"))


# -- names and options


def test_names() -> None:
    devices = [torch.device("cpu")] * 2
    assert type(choose_strategy("fsdp2", devices, 1, None)) is FSDP2Strategy
    assert type(choose_strategy("fsdp", devices, 1, None)) is FSDPStrategy
    assert choose_strategy("fsdp_cpu_offload", devices, 1, None)._cpu_offload is True
    assert choose_strategy("fsdp2", devices, 1, None).save_distributed_checkpoint
    assert not choose_strategy("fsdp", devices, 1, None).save_distributed_checkpoint  # as Lightning's by default


def test_blocks_are_those_of_module_lists_or_of_a_policy() -> None:
    net = Net()
    assert _blocks(net, None) == list(net.blocks)
    assert _blocks(net, {nn.Linear})[-1] is net.head and len(_blocks(net, {nn.Linear})) == 7
    assert _blocks(net, lambda module, name: name == "head") == [net.head]
    assert _blocks(net, 1500) == list(net.blocks)
    with pytest.raises(MisconfigurationException, match="there is no Conv1d in Net"):
        _blocks(net, {nn.Conv1d})
    with pytest.raises(MisconfigurationException, match="modules are chosen by"):
        _blocks(net, True)


def test_lightnings_options_of_fsdp1_are_mapped_or_refused() -> None:
    from functools import partial

    from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

    strategy = FSDPStrategy(
        cpu_offload=CPUOffload(offload_params=True), auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16), state_dict_type="sharded",
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, activation_checkpointing_policy={Block},
    )  # fmt: skip
    assert strategy._cpu_offload is True and strategy._wrap == {Block} and strategy._recompute == {Block}
    assert strategy._mixed_precision == MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert strategy.reshard_after_forward is False and strategy.save_distributed_checkpoint
    assert FSDPStrategy(auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=7))._wrap == 7
    for options, message in (
        ({"use_orig_params": True}, "keeps the original parameters always"),
        ({"sharding_strategy": "NO_SHARD"}, "strategy='ddp' shards nothing"),
        ({"sharding_strategy": "HYBRID_SHARD"}, "needs device_mesh"),
        ({"state_dict_type": "local"}, "allowed are 'full' and 'sharded'"),
        ({"colour": 3}, "has no such option"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            FSDPStrategy(**options)


def test_float16_with_a_scaler_is_refused() -> None:
    model = Net()
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=1, strategy="fsdp2", plugins=MixedPrecision("16-mixed", "cpu"), max_steps=1,
        logger=False, enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="use precision='bf16-mixed'"):
        trainer.fit(model, [(torch.randn(2, 24), torch.tensor([0, 1]))])

"""`strategy="zero1"` in several processes, against `strategy="ddp"` in as many, to the last bit."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lit_fast
from lit_fast.precision import MixedPrecision

pytestmark = pytest.mark.dist


class Net(lit_fast.LightningModule):
    """Parameters of several chunks of the norm (16,384 elements), which are cut; one is shared, one never used."""

    def __init__(self, width: int = 160, norm: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
        self.layers[3].weight = self.layers[1].weight
        self.first = nn.Linear(24, width)
        self.head = nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.options = options
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        kind = self.options.get("optimizer", "AdamW")
        home = lit_fast.optim if hasattr(lit_fast.optim, kind) else torch.optim
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        return getattr(home, kind)(
            [{"params": rest, "weight_decay": 0.0}, {"params": decay}], lr=1e-2, **self.options.get("given", {})
        )


def share(rank: int, world: int, batches: int, batch_size: int = 4) -> list[Any]:
    """This rank's batches, dealt by hand."""
    generator = torch.Generator().manual_seed(5)
    count = batches * batch_size * world
    data = TensorDataset(torch.randn(count, 24, generator=generator), torch.randint(4, (count,), generator=generator))
    indices = list(range(count))[rank::world]
    return [data[indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]


def places() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def trainer_of(strategy: str, sizes: dict[str, Any], **options: Any) -> lit_fast.Trainer:
    from lit_fast.strategies import DDPStrategy, ZeRO1Strategy

    kind = {"ddp": DDPStrategy, "zero1": ZeRO1Strategy}[strategy]
    return lit_fast.Trainer(
        accelerator="cpu", devices=places()[1], strategy=kind(**sizes), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def fitted(strategy: str, sizes: dict[str, Any], options: dict[str, Any], net: dict[str, Any], data: list[Any]) -> Any:
    model = Net(**net)
    trainer = trainer_of(strategy, sizes, **options)
    trainer.fit(model, data)
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return model.losses, weights(model), state if places()[0] == 0 else None


def both(cases: list[Any]) -> list[bool]:
    """Whether a fit by zero1 has the losses, weights and optimizer's state of one by ddp."""
    return [
        equal(*(fitted(strategy, sizes, options, net, share(*places(), batches)) for strategy in ("zero1", "ddp")))
        for sizes, options, net, batches in cases
    ]


def several(calls: list[Any]) -> list[Any]:
    """Several functions in the same processes, one after the other."""
    return [function(*args) for function, *args in calls]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


BY_VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}


def test_two_ranks_have_the_bits_of_ddp() -> None:
    cases = [
        ({}, {"max_epochs": 2}, {}, 8),
        ({"bucket_cap_mb": 0.1, "first_bucket_mb": 0.01}, {"max_epochs": 2, "accumulate_grad_batches": 4}, {}, 10),
        ({}, {"max_epochs": 1}, {"optimizer": "SGD", "given": {"momentum": 0.9}}, 5),
        ({}, {"max_epochs": 1, **BY_VALUE}, {"optimizer": "Lion"}, 5),
    ]
    assert run_ranks(both, 2, cases) == [[True] * len(cases)] * 2


def kept() -> Any:
    model = Net(width=512)
    trainer = trainer_of("zero1", {}, max_steps=2)
    trainer.fit(model, share(*places(), 2))
    [optimizer] = trainer.optimizers
    own = sum(v.numel() * v.itemsize for entry in optimizer.state.values() for v in entry.values() if v.dim())
    trained = sum(p.numel() * p.itemsize for name, p in model.named_parameters() if not name.startswith("unused"))
    return own, trained, weights(model)


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_keeps_its_part_of_the_state(world: int) -> None:
    results = run_ranks(kept, world)
    sizes = [own for own, _, _ in results]
    assert sum(sizes) == 2 * results[0][1]  # two moments of every parameter that is used, once in all
    # A segment ends at a multiple of a chunk of its parameter, less than one chunk away from an equal part.
    chunk = 2 * 4 * lit_fast.ops.square_chunk()
    assert max(sizes) <= sum(sizes) / world + chunk * 2
    names = [name for name, _ in Net(width=512).named_parameters()]
    assert all(torch.equal(results[0][2][name], other[2][name]) for other in results for name in names)


SAME = {"max_epochs": 1, "gradient_clip_val": 0.05}


def same_batch(sizes: dict[str, Any], options: dict[str, Any], net: dict[str, Any]) -> Any:
    """A fit in which every rank has the gradients of every other, so that their mean is exact for 2 and 4 ranks."""
    return fitted("zero1", sizes, {**SAME, **options}, net, share(0, 1, 5))


def by_the_core(net: dict[str, Any]) -> Any:
    """The same in one process, by hand."""
    model = Net(**net)
    adopted = lit_fast.optim.adopt(model.configure_optimizers(), max_norm=SAME["gradient_clip_val"])
    for x, y in share(0, 1, 5):
        adopted.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        model.losses.append(loss.item())
        loss.backward()
        adopted.step()
    return model.losses, weights(model), adopted.optimizer.state_dict()


def test_clipping_by_norm_has_the_same_bits_in_any_world_and_buckets() -> None:
    net = {"norm": False, "given": {"rounding": "stochastic", "state_dtype": "8bit"}}
    [alone] = run_ranks(by_the_core, 1, net)
    small = {"bucket_cap_mb": 0.1, "first_bucket_mb": 0.01}
    for world, sizes in ((2, [{}, small]), (4, [small])):
        results = run_ranks(several, world, [(same_batch, each, {}, net) for each in sizes])
        assert all(equal(fit, alone) for fit in results[0])
        assert all(equal(weights, alone[1]) for rank in results for _, weights, _ in rank)


def resumed(strategy: str, path: str, save: bool) -> Any:
    """Three steps of five into a file, or the rest from it."""
    options = {**SAME, "max_steps": 3 if save else 5, "max_epochs": None}
    del options["gradient_clip_val"]  # by ddp on a CPU with the bits of torch's own norm
    model, trainer = Net(norm=False), trainer_of(strategy, {}, **options)
    trainer.fit(model, share(0, 1, 5), ckpt_path=None if save else path)
    if save:
        trainer.save_checkpoint(path)
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return weights(model), state if places()[0] == 0 else None


def test_checkpoints_are_those_of_ddp_and_load_at_any_number_of_ranks(tmp_path: Any) -> None:
    ours, theirs = str(tmp_path / "zero1.ckpt"), str(tmp_path / "ddp.ckpt")
    run_ranks(several, 2, [(resumed, "zero1", ours, True), (resumed, "ddp", theirs, True)])
    saved, as_ddp = (torch.load(path, weights_only=True) for path in (ours, theirs))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert equal(saved[name], as_ddp[name])
    assert os.path.getsize(ours) < 1.1 * os.path.getsize(theirs)
    in_two, in_four = (
        [(resumed, "ddp", ours, False), (resumed, "zero1", theirs, False)],
        [(resumed, "zero1", ours, False)],
    )
    [first, second], [third] = run_ranks(several, 2, in_two)[0], run_ranks(several, 4, in_four)[0]
    assert equal(first, second) and equal(first, third)
    [state] = saved["optimizer_states"]
    assert state["state"] and equal(run_ranks(loaded, 3, ours)[0], state)


def loaded(path: str) -> Any:
    model, trainer = Net(norm=False), trainer_of("zero1", {}, max_steps=3)
    trainer.fit(model, share(0, 1, 5), ckpt_path=path)  # there is nothing left to do
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return state if places()[0] == 0 else None


class Infinite(Net):
    """One element of one layer's gradient is infinite in the third batch of the second rank."""

    def on_after_backward(self) -> None:
        for _, shard in self.trainer.strategy.named_parameters():
            if self.global_step == 2 and places()[0] == 1 and shard.grad is not None:
                shard.grad[-1] = torch.inf
                return


def left_out(options: dict[str, Any]) -> Any:
    if options.pop("float16", False):
        options["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    model, trainer = Infinite(norm=False), trainer_of("zero1", {}, max_steps=5, **options)
    before: list[dict[str, Tensor]] = []

    class Watch(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            before.append(weights(model))

    trainer.callbacks.append(Watch())
    trainer.fit(model, share(0, 1, 5))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    skipped = trainer.skipped_steps if scaler is None else scaler.get_scale()
    return [equal(a, b) for a, b in pairwise(before)], skipped, weights(model)


def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one() -> None:
    cases = [{"nonfinite": "skip", "gradient_clip_val": 0.5}, {"float16": True}]
    results = run_ranks(several, 2, [(left_out, options) for options in cases])
    for number, told in enumerate((1, 512.0)):
        for same, skipped, weights in (rank[number] for rank in results):
            assert same == [False, True, False, False] and skipped == told
            assert equal(weights, results[0][number][2])


def raises_everywhere() -> Any:
    try:
        left_out({"nonfinite": "raise"})
    except lit_fast.errors.NonFiniteGradientError as error:
        return str(error)


def test_all_ranks_raise_where_one_has_a_gradient_that_is_not_finite() -> None:
    first, second = run_ranks(raises_everywhere, 2)
    assert "is not finite" in second and "The gradient of " in second and "not finite" in first


class Manual(Net):
    """Two optimizers, and a backward before each one's step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(norm=False, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        first.step()
        second.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        second.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.layers.parameters(), lr=1e-2),
            torch.optim.AdamW([*self.first.parameters(), *self.head.parameters()], lr=1e-2),
        ]


def manual(strategy: str) -> Any:
    model = Manual()
    trainer_of(strategy, {}, max_steps=8).fit(model, share(*places(), 8))
    return model.losses, weights(model)


def test_manual_optimization_steps_what_was_reduced() -> None:
    for ours, theirs in run_ranks(several, 2, [(manual, "zero1"), (manual, "ddp")]):
        assert equal(ours, theirs)


class Unfreezing(Net):
    """The layers are frozen at first, and join the optimizer in the second epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(norm=False, **options)
        self.layers.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.layers.requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.layers.parameters())})
        if self.current_epoch == 2:
            self.head.requires_grad_(False)


def unfreezing(strategy: str) -> Any:
    model = Unfreezing()
    trainer = trainer_of(strategy, {}, max_epochs=3)
    trainer.fit(model, share(*places(), 4))
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return model.losses, weights(model), state if places()[0] == 0 else None


def test_parameters_that_are_frozen_and_added_later_are_stepped_as_by_ddp() -> None:
    for ours, theirs in run_ranks(several, 2, [(unfreezing, "zero1"), (unfreezing, "ddp")]):
        assert equal(ours, theirs)


class Refused(Net):
    def configure_optimizers(self) -> Any:
        kind = self.options["kind"]
        if kind == "Muon":
            return lit_fast.optim.Muon([p for p in self.layers.parameters() if p.dim() == 2])
        if kind == "foreign":
            return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
        home = lit_fast.optim if kind == "Lamb" else torch.optim
        return getattr(home, kind)(self.parameters())


def refusals(kinds: list[str]) -> list[str]:
    said = []
    for kind in kinds:
        trainer = trainer_of("zero1", {}, max_steps=1)
        with pytest.raises(lit_fast.errors.MisconfigurationException) as error:
            trainer.fit(Refused(norm=False, kind=kind), share(0, 1, 2))
        said.append(str(error.value))
    return said


def test_what_needs_whole_tensors_is_refused_by_name() -> None:
    [said, same] = run_ranks(refusals, 2, ["Muon", "Lamb", "LBFGS", "Adafactor", "foreign"])
    assert said == same
    for name, words in zip(["Muon", "Lamb", "LBFGS", "Adafactor"], said, strict=False):
        assert f"cannot shard {name}" in words and "AdamW" in words and "strategy='ddp'" in words
    assert "SGD holds a parameter of shape (3,) that is not in the model" in said[4]

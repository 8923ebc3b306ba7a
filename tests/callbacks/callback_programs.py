"""Small programs with callbacks that change training, run under either package; lightning 2.6.6's results are in
callback_programs.json.

To record anew, where lightning is installed: python tests/callbacks/callback_programs.py
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

GOLDENS = Path(__file__).with_name("callback_programs.json")
PROGRAMS: dict[str, Callable[[Names, str], Any]] = {}


class Names:
    """The names of one package: `names("callbacks", "ModelPruning")`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __call__(self, submodule: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{self.root}.{submodule}".rstrip(".")), name)


def program(function: Callable[[Names, str], Any]) -> Callable[[Names, str], Any]:
    PROGRAMS[function.__name__] = function
    return function


def run(name: str, root: str) -> Any:
    """One program's result, as JSON gives it back."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return json.loads(json.dumps(PROGRAMS[name](Names(root), directory)))


def dataset(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=generator)
    return TensorDataset(x, (x[:, :2].sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=generator)))


def make_module(names: Names, rows: int = 24, **methods: Any) -> Any:
    """A backbone with batch norm and dropout, a head; it keeps every loss, and the rates of each epoch's end."""

    class Model(names("", "LightningModule")):  # type: ignore[misc]
        def __init__(self, lr: float = 0.05, batch_size: int = 4) -> None:
            super().__init__()
            self.lr, self.batch_size = lr, batch_size
            self.backbone = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
            self.head = nn.Linear(6, 1)
            self.losses: list[float] = []
            self.sizes: list[int] = []
            self.rates: list[list[float]] = []
            self.frozen: list[list[str]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = (self.head(self.backbone(x)) - y).square().mean()
            self.losses.append(loss.item())
            self.sizes.append(len(x))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", (self.head(self.backbone(x)) - y).square().mean())

        def on_train_epoch_end(self) -> None:
            self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
            self.frozen.append([name for name, p in self.named_parameters() if not p.requires_grad])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)

        def train_dataloader(self) -> Any:
            return DataLoader(dataset(rows), batch_size=self.batch_size, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(dataset(8), batch_size=self.batch_size)

    for name, method in methods.items():
        setattr(Model, name, method)
    return Model()


def make_trainer(names: Names, root: str, **options: Any) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 4,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": root,
    }  # fmt: skip
    return names("", "Trainer")(**{**quiet, **options})


def history(module: Any) -> dict[str, Any]:
    return {"losses": module.losses, "rates": module.rates, "frozen": module.frozen}


# -- fine-tuning


@program
def finetuning_of_a_subclass(names: Names, root: str) -> Any:
    base = names("callbacks", "BaseFinetuning")

    class Unfreeze(base):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone[1], optimizer, lr=0.01)
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=5.0)

    callback, module = Unfreeze(), make_module(names)
    make_trainer(names, root, callbacks=callback).fit(module)
    return {**history(module), "state": callback.state_dict()}


def _backbone(names: Names, root: str, **options: Any) -> Any:
    callback, module = names("callbacks", "BackboneFinetuning")(**options), make_module(names)
    make_trainer(names, root, callbacks=callback).fit(module)
    return {**history(module), "state": callback.state_dict()}


@program
def backbone_finetuning(names: Names, root: str) -> Any:
    return _backbone(names, root, unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.3)


@program
def backbone_finetuning_unaligned(names: Names, root: str) -> Any:
    return _backbone(
        names, root, unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=lambda epoch: epoch * 1.5,
        should_align=False, train_bn=False, verbose=True,
    )  # fmt: skip


@program
def finetuning_from_a_checkpoint(names: Names, root: str) -> Any:
    """Groups and rates after resuming; not the losses, since Lightning leaves the backbone frozen then."""
    rates = []
    path = f"{root}/at_two.ckpt"
    for options, ckpt_path in (({"max_epochs": 2}, None), ({"max_epochs": 4}, path)):
        callback = names("callbacks", "BackboneFinetuning")(unfreeze_backbone_at_epoch=1)
        module = make_module(names)
        trainer = make_trainer(names, root, callbacks=callback, **options)
        trainer.fit(module, ckpt_path=ckpt_path)
        trainer.save_checkpoint(path)
        rates.append([module.rates, callback.state_dict()])
    return rates


@program
def finetuning_helpers(names: Names, root: str) -> Any:
    base = names("callbacks", "BaseFinetuning")

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros(2))
            self.child = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))

    parent = Parent()
    found = {
        "flat": [type(m).__name__ for m in base.flatten_modules(parent)],
        "flat_of_dict": [
            type(m).__name__ for m in base.flatten_modules(nn.ModuleDict({"a": Parent(), "b": nn.ReLU()}))
        ],
        "flat_of_nested": [type(m).__name__ for m in base.flatten_modules([[parent.child], nn.Linear(1, 1)])],
        "params": [list(p.shape) for p in base.filter_params(parent)],
        "without_bn": [list(p.shape) for p in base.filter_params(parent, train_bn=False)],
    }
    base.freeze(parent)
    found["after_freeze"] = [p.requires_grad for p in parent.parameters()]
    found["frozen"] = [list(p.shape) for p in base.filter_params(parent, requires_grad=False)]
    base.freeze(parent, train_bn=False)
    found["after_full_freeze"] = [p.requires_grad for p in parent.parameters()]
    found["statistics"] = [parent.child[2].track_running_stats]
    base.make_trainable(parent)
    found["after_unfreeze"] = [p.requires_grad for p in parent.parameters()]
    found["statistics"].append(parent.child[2].track_running_stats)
    base.freeze_module(parent)
    found["only_itself"] = [p.requires_grad for p in parent.parameters()]
    return found


# -- pruning


def _pruned(names: Names, root: str, pruning_fn: Any = "l1_unstructured", linear: bool = False, **options: Any) -> Any:
    module = make_module(names)
    if linear:
        options["parameters_to_prune"] = [(module.backbone[0], "weight"), (module.head, "weight")]
    callback = names("callbacks", "ModelPruning")(pruning_fn, **options)
    made = make_trainer(names, root, callbacks=callback)
    in_training: list[Any] = []

    def note() -> None:
        made.save_checkpoint(f"{root}/inside.ckpt")
        saved = torch.load(f"{root}/inside.ckpt", weights_only=False)["state_dict"]
        in_training.append([sorted(module.state_dict()), sorted(saved), zeros(saved)])

    module.on_train_epoch_start = note
    made.fit(module)
    return {"losses": module.losses, "inside": in_training, "zeros": zeros(module.state_dict()),
            "keys": list(module.state_dict()), "sum": sum(float(p.sum()) for p in module.parameters())}  # fmt: skip


def zeros(state: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((tensor == 0).sum()) for name, tensor in sorted(state.items()) if tensor.is_floating_point()}


@program
def pruning_with_a_lottery_ticket(names: Names, root: str) -> Any:
    return _pruned(names, root, amount=0.2)


@program
def pruning_without(names: Names, root: str) -> Any:
    return _pruned(names, root, amount=0.3, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False)


@program
def pruning_by_functions_of_the_epoch(names: Names, root: str) -> Any:
    return _pruned(
        names, root, amount=lambda epoch: [0, 5, 0.1, 0.1][epoch], apply_pruning=lambda epoch: epoch != 2,
        use_lottery_ticket_hypothesis=lambda epoch: epoch == 1, parameter_names=["weight"], verbose=2,
    )  # fmt: skip


@program
def pruning_each_tensor(names: Names, root: str) -> Any:
    return _pruned(
        names, root, "random_unstructured", amount=0.25, use_global_unstructured=False, resample_parameters=True,
        verbose=1,
    )  # fmt: skip


@program
def pruning_channels_after_validation(names: Names, root: str) -> Any:
    return _pruned(
        names, root, "ln_structured", amount=0.3, use_global_unstructured=False, pruning_dim=1, pruning_norm=1,
        linear=True, prune_on_train_epoch_end=False, use_lottery_ticket_hypothesis=False,
    )  # fmt: skip


@program
def pruning_by_a_class(names: Names, root: str) -> Any:
    from torch.nn.utils.prune import L1Unstructured

    return _pruned(names, root, L1Unstructured, amount=7, use_lottery_ticket_hypothesis=False)


@program
def pruning_refuses(names: Names, root: str) -> Any:
    from torch.nn.utils.prune import LnStructured

    made: list[dict[str, Any]] = [
        {"pruning_fn": "l2"}, {"pruning_fn": "l1_unstructured", "parameter_names": ["gain"]}, {"pruning_fn": 3},
        {"pruning_fn": "ln_structured", "use_global_unstructured": False},
        {"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 0},
        {"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1}, {"pruning_fn": LnStructured},
        {"pruning_fn": "l1_unstructured", "amount": "all"}, {"pruning_fn": "l1_unstructured", "verbose": 3},
        {"pruning_fn": LnStructured, "use_global_unstructured": False},
    ]  # fmt: skip
    sanitize = names("callbacks", "ModelPruning").sanitize_parameters_to_prune
    module = make_module(names)
    chosen = [
        [(module.head, "weight")],
        [(nn.Linear(1, 1), "weight")],
        [(module.head, "gain")],
        [(module.head,)],
        "head",
    ]
    return [_error(lambda given=given: names("callbacks", "ModelPruning")(**given)) for given in made] + [
        _error(lambda given=given: sanitize(module, given)) for given in chosen
    ]


def _error(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


# -- the model summary


@program
def model_summaries(names: Names, root: str) -> Any:
    """Columns and totals at several depths, with and without an example input, other parameters, shared and frozen."""

    class Wide(names("", "LightningModule")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Sequential(nn.Linear(400, 7)))
            self.tied = nn.Linear(300, 400)
            self.tied.weight = self.body[0].weight
            self.unused = nn.Conv2d(3, 4, 3)
            self.unused.requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(1_500_000))
            self.body[1].eval()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.body(x), [y, {"z": self.tied(x)}]

    found: list[Any] = []
    for example in (None, (torch.zeros(5, 300), torch.zeros(2)), {"x": torch.zeros(1, 300), "y": torch.zeros(2)}):
        for depth in (0, 1, 2, -1):
            module = Wide()
            module.example_input_array = example
            summary = names("utilities.model_summary", "summarize")(module, max_depth=depth)
            found.append([
                summary._get_summary_data(), summary.total_parameters, summary.trainable_parameters,
                round(summary.model_size, 9), summary.total_training_modes, summary.total_flops,
                summary.total_layer_params, summary.layer_names, summary.in_sizes, summary.param_nums,
                module.body[1].training, module.training,
            ])  # fmt: skip
    count = names("utilities.model_summary", "get_human_readable_count")
    return [found, [count(n) for n in (0, 1, 999, 1000, 12_345, 999_999, 10**9, 5 * 10**15)]]


# -- searches


def _found(finder: Any) -> dict[str, Any]:
    return {"lr": finder.results["lr"], "loss": finder.results["loss"], "suggestion": finder.suggestion(),
            "later": finder.suggestion(skip_begin=3, skip_end=2)}  # fmt: skip


@program
def lr_find(names: Names, root: str) -> Any:
    """The test runs over several epochs, with validation; the fit afterwards is as if it had not been."""
    module = make_module(names, rows=64)
    trainer = make_trainer(names, root, max_epochs=20, num_sanity_val_steps=0)
    finder = names("tuner", "Tuner")(trainer).lr_find(module, max_lr=0.5)
    found = {**_found(finder), "module_lr": module.lr}
    module.losses = []
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    return {**found, "fit": module.losses, "step": trainer.global_step, "epoch": trainer.current_epoch}


@program
def lr_find_linear_by_the_callback(names: Names, root: str) -> Any:
    module = make_module(names, rows=64)
    finder = names("callbacks", "LearningRateFinder")(mode="linear", num_training_steps=30, min_lr=0.001, max_lr=0.2)
    trainer = make_trainer(names, root, callbacks=[finder], max_epochs=3)
    trainer.fit(module)
    # Not the losses of the fit: Lightning leaves its first epoch one random number behind.
    return {**_found(finder.optimal_lr), "rates": module.rates, "lr": module.lr, "step": trainer.global_step}


@program
def lr_find_with_accumulation_and_clipping(names: Names, root: str) -> Any:
    module = make_module(names, rows=60)
    trainer = make_trainer(names, root, max_epochs=50, accumulate_grad_batches=3, gradient_clip_val=0.5)
    finder = names("tuner", "Tuner")(trainer).lr_find(module, num_training=60, update_attr=False)
    return {**_found(finder), "module_lr": module.lr}


@program
def lr_find_that_diverges(names: Names, root: str) -> Any:
    module = make_module(names, rows=64)
    trainer = make_trainer(names, root, max_epochs=50)
    finder = names("tuner", "Tuner")(trainer).lr_find(module, max_lr=1e4, early_stop_threshold=2.0)
    return {**_found(finder), "steps": len(module.losses)}


@program
def lr_find_ends_with_the_epochs(names: Names, root: str) -> Any:
    module = make_module(names, rows=24)
    trainer = make_trainer(names, root, max_epochs=1)
    finder = names("tuner", "Tuner")(trainer).lr_find(module)
    return [finder.results, finder.suggestion(), module.lr]


@program
def lr_find_where_steps_give_no_loss(names: Names, root: str) -> Any:
    module = make_module(names, rows=64)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx % 4 == 1 else step(batch, batch_idx)
    trainer = make_trainer(names, root, max_epochs=50)
    finder = names("tuner", "Tuner")(trainer).lr_find(module, num_training=40)
    return [str(_found(finder)), module.lr]


@program
def lr_find_then_a_scheduler(names: Names, root: str) -> Any:
    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    module = make_module(names, rows=64, configure_optimizers=configure_optimizers)
    finder = names("callbacks", "LearningRateFinder")(max_lr=0.5)
    make_trainer(names, root, callbacks=[finder], max_epochs=8).fit(module)
    return [module.lr, module.rates]


def _scaled(names: Names, root: str, limit: int | None = None, rows: int = 100, **options: Any) -> Any:
    """Memory ends at batches of more than `limit` rows. The module begins with `init_val`: Lightning runs its first
    trial at whatever size the module had."""
    module = make_module(names, rows=rows)
    module.batch_size = options.get("init_val", 2)
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        if limit is not None and len(batch[0]) > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(batch, batch_idx)

    module.training_step = training_step
    trainer = make_trainer(names, root, max_epochs=50)
    size = names("tuner", "Tuner")(trainer).scale_batch_size(module, **options)
    return [size, module.batch_size, module.sizes]


@program
def scale_batch_size_up_to_the_data(names: Names, root: str) -> Any:
    return _scaled(names, root)


@program
def scale_batch_size_until_memory_ends(names: Names, root: str) -> Any:
    return [_scaled(names, root, limit, steps_per_trial=2, init_val=init) for limit, init in
            ((33, 2), (20, 64), (64, 5), (7, 3))]  # fmt: skip


@program
def scale_batch_size_by_bisection(names: Names, root: str) -> Any:
    return [_scaled(names, root, limit, mode="binsearch", margin=margin) for limit, margin in
            ((33, 0.05), (50, 0.0), (None, 0.05), (3, 0.5))]  # fmt: skip


@program
def scale_batch_size_within_limits(names: Names, root: str) -> Any:
    return [
        _scaled(names, root, mode=mode, **options)
        for mode in ("power", "binsearch")
        for options in ({"max_trials": 3}, {"max_val": 16}, {"init_val": 200}, {"max_trials": 1})
    ] + [_scaled(names, root, mode="binsearch", max_val=30)]


@program
def scale_batch_size_by_the_callback(names: Names, root: str) -> Any:
    """The fit afterwards has the new size; its losses are not compared: Lightning leaves other random numbers."""
    module = make_module(names, rows=40)
    module.batch_size = 2
    finder = names("callbacks", "BatchSizeFinder")(max_val=16, steps_per_trial=1)
    trainer = make_trainer(names, root, callbacks=[finder], max_epochs=2)
    trainer.fit(module)
    return [finder.optimal_batch_size, module.sizes, trainer.global_step, module.rates]


@program
def searches_refuse(names: Names, root: str) -> Any:
    finder, sizes = names("callbacks", "LearningRateFinder"), names("callbacks", "BatchSizeFinder")

    def tuner(callbacks: Any = ()) -> Any:
        return names("tuner", "Tuner")(make_trainer(names, root, callbacks=list(callbacks)))

    def bare() -> Any:
        module = make_module(names)
        del module.lr, module.batch_size
        return module

    def two() -> Any:
        def configure_optimizers(self: Any) -> Any:
            return [torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(self.backbone.parameters(), 0.1)]

        module = make_module(names, configure_optimizers=configure_optimizers)
        module.automatic_optimization = False
        return module

    loader = DataLoader(dataset(8))
    calls: list[Callable[[], Any]] = [
        lambda: finder(mode="cubic"), lambda: sizes(mode="cubic"),
        lambda: tuner([finder()]).lr_find(make_module(names)),
        lambda: tuner([sizes()]).scale_batch_size(make_module(names)), lambda: tuner().lr_find(bare()),
        lambda: tuner().scale_batch_size(bare()), lambda: tuner().lr_find(two()),
        lambda: tuner().scale_batch_size(make_module(names), loader),
        lambda: tuner().lr_find(make_module(names), method="validate"),
        lambda: tuner().lr_find(make_module(names), dataloaders=loader),
        lambda: tuner().scale_batch_size(make_module(names), method="tune"),
        lambda: tuner().scale_batch_size(make_module(names), loader, method="validate"),
        lambda: tuner().lr_find(make_module(names), attr_name="rate"),
    ]  # fmt: skip
    return [_error(call) for call in calls]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    rows = {name: run(name, "lightning.pytorch") for name in PROGRAMS}
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")

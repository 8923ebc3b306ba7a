"""Programs with callbacks that change training, and what Lightning 2.6.6 computed in each (averaging.json).

A scenario runs the same under both. Recorded are, with all their bits, the training and validation losses, the
learning rate of every step, and the weights and buffers in the end.

To record anew, where lightning is installed: python tests/callbacks/averaging_scenarios.py
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

GOLDENS = Path(__file__).with_name("averaging.json")


def numbers(tensor: torch.Tensor) -> list[float]:
    return [float(value) for value in tensor.detach().flatten()]


def module_class(base: type) -> Callable[..., Any]:
    class Model(base):  # type: ignore[misc]
        def __init__(self, batch_norm: bool = False, scheduler: str | None = None) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(7)
            middle = nn.BatchNorm1d(4) if batch_norm else nn.Tanh()
            self.net = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 1))
            for parameter in self.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
            self.scheduler = scheduler
            self.seen: dict[str, list[Any]] = {"train": [], "val": [], "lr": [], "step": []}

        def loss(self, batch: Any) -> torch.Tensor:
            return (self.net(batch).squeeze(-1) - batch.sum(-1)).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.seen["train"].append(loss.item())
            self.seen["lr"].append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.seen["step"].append(self.trainer.global_step)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen["val"].append(self.loss(batch).item())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)
            if self.scheduler is None:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": self.scheduler}]

    return Model


def loader(batches: int, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(torch.randn(4 * batches, 3, generator=torch.Generator().manual_seed(seed)), batch_size=4)


# name: (callback, its options, the model's, the trainer's). Averages with equal weights alone: Lightning's EMA rounds
# otherwise, and is compared with a formula in test_weight_averaging.py.
SCENARIOS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "average": ("WeightAveraging", {}, {}, {}),
    "average_batch_norm": ("WeightAveraging", {}, {"batch_norm": True}, {}),
    "average_without_buffers": ("WeightAveraging", {"use_buffers": False}, {"batch_norm": True}, {}),
    "average_accumulating": ("WeightAveraging", {}, {}, {"accumulate_grad_batches": 2}),
    "accumulation": ("GradientAccumulationScheduler", {"scheduling": {0: 2, 1: 3, 3: 1, 4: 6}}, {}, {}),
    "accumulation_scheduler": (
        "GradientAccumulationScheduler",
        {"scheduling": {1: 2, 3: 3}},
        {"scheduler": "step"},
        {"gradient_clip_val": 0.5},
    ),
    "swa": ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 2}, {}, {}),
    "swa_linear": (
        "StochasticWeightAveraging",
        {"swa_lrs": [0.02], "swa_epoch_start": 0.4, "annealing_epochs": 2, "annealing_strategy": "linear"},
        {"scheduler": "epoch"},
        {},
    ),
    "swa_step_scheduler": (
        "StochasticWeightAveraging",
        {"swa_lrs": 0.01, "annealing_epochs": 3},
        {"scheduler": "step"},
        {},
    ),
    "swa_batch_norm": (
        "StochasticWeightAveraging",
        {"swa_lrs": 0.01, "swa_epoch_start": 3, "device": None},
        {"batch_norm": True, "scheduler": "epoch"},
        {"gradient_clip_val": 0.5},
    ),
    "swa_batch_norm_accumulating": (
        "StochasticWeightAveraging",
        {"swa_lrs": 0.01, "swa_epoch_start": 2},
        {"batch_norm": True},
        {"accumulate_grad_batches": 3},
    ),
    "swa_stopped": (
        "StochasticWeightAveraging",
        {"swa_lrs": 0.01, "swa_epoch_start": 2},
        {"batch_norm": True},
        {"max_steps": 20},
    ),
}


def run(framework: str, name: str, callbacks: tuple[Any, ...] = (), **more: Any) -> dict[str, Any]:
    """What the scenario computes; `more` are further options of the Trainer, or `ckpt_path`."""
    pl = importlib.import_module(framework)
    callback, options, model_options, trainer_options = SCENARIOS[name]
    torch.manual_seed(1)
    model = module_class(pl.LightningModule)(**model_options)
    made = getattr(importlib.import_module(f"{framework}.callbacks"), callback)(**options)
    ckpt_path = more.pop("ckpt_path", None)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 5, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": bool(callbacks), "callbacks": [made, *callbacks],
            "default_root_dir": tempfile.gettempdir(), **trainer_options, **more,
        }
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(6), loader(2, seed=2), ckpt_path=ckpt_path)
    weights = {key: numbers(value) for key, value in model.state_dict().items()}
    return {**model.seen, "weights": weights, "epoch": trainer.current_epoch, "global_step": trainer.global_step}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {name: run("lightning.pytorch", name) for name in SCENARIOS}
    with GOLDENS.open("w") as file:
        file.write("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n")

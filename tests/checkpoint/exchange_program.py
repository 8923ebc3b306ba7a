"""One training run of either framework, saved at many points or gone on with from a file: what passes between them.

    python tests/checkpoint/exchange_program.py lightning save FOLDER CASE [CASE ...]
    python tests/checkpoint/exchange_program.py lightning go_on FOLDER FILE [FILE ...]
    python tests/checkpoint/exchange_program.py lightning record

`save` trains each CASE to the end and writes a checkpoint at each of POINTS into FOLDER, as CASE-POINT.ckpt; `go_on`
makes everything anew for each of those files and trains to the same end. Both print, as JSON, every training step
(epoch, batch_idx, global_step, the batch's first number, the loss, the learning rates) and what is there at the end.
`record`, under Lightning 2.6.6, writes the files and figures that the tests use where Lightning is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

BATCHES = 6  # of an epoch
EPOCHS = 4
# name: (hook, epoch, batch_idx or None)
POINTS = {
    "batch": ("on_train_batch_end", 1, 1),
    "validation": ("on_validation_end", 1, None),
    "epoch": ("on_train_epoch_end", 1, None),
    "last_batch": ("on_train_batch_end", 1, BATCHES - 1),
    "epoch_start": ("on_train_epoch_start", 2, None),
    "end": ("on_train_end", None, None),
}

SCHEDULE = {0: 3, 1: 2, 3: 1}  # batches in a window, from an epoch on

# what is stored in goldens/, for machines without Lightning
STORED = (
    "epoch-batch", "step-epoch", "plateau-last_batch", "manual-epoch", "accumulate-batch", "data-epoch",
    "sub_epoch-validation", "across_epochs-end", "schedule-batch",
)  # fmt: skip
GOLDENS = Path(__file__).parents[1] / "goldens"
ELSEWHERE = "/runs"  # the folder that stored files speak of


class Rows(Dataset[torch.Tensor]):
    def __init__(self, count: int, seed: int) -> None:
        self.rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def names(framework: str) -> Any:
    return importlib.import_module({"lightning": "lightning.pytorch", "lit_fast": "lit_fast.pytorch"}[framework])


def callbacks_of(framework: str) -> Any:
    return importlib.import_module(f"{names(framework).__name__}.callbacks")


def optimizers(kind: str, module: Any) -> Any:
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedulers = torch.optim.lr_scheduler
    if kind in ("epoch", "accumulate", "schedule", "data", "sub_epoch"):
        return [sgd], [schedulers.StepLR(sgd, 1, gamma=0.8)]
    if kind in ("step", "across_epochs"):
        adam = torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)
        scheduler = schedulers.CosineAnnealingLR(adam, T_max=30)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    if kind == "plateau":
        plateau = schedulers.ReduceLROnPlateau(sgd, factor=0.5, patience=0, threshold=0.3)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}
    first = torch.optim.SGD([module.layer.weight], lr=0.1, momentum=0.5)
    second = torch.optim.Adam([module.layer.bias], lr=0.02, fused=True)
    return [first, second], [schedulers.StepLR(first, 4, gamma=0.5)]


TRAINER: dict[str, dict[str, Any]] = {
    "epoch": {},
    "step": {},
    "plateau": {},
    "manual": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "schedule": {},  # of windows: SCHEDULE
    "data": {},
    "sub_epoch": {"val_check_interval": 0.5},
    "across_epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
}


def make(framework: str, case: str) -> tuple[Any, Any]:
    """The module and the datamodule of a case."""
    package = names(framework)

    class Model(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, width: int = 2, rate: float = 0.1) -> None:
            super().__init__()
            if case == "data":
                self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, width)
            self.automatic_optimization = case != "manual"
            self.steps: list[Any] = []

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return (torch.tanh(self.layer(batch)) - batch[:, :2]).square().mean()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
            where = [self.current_epoch, batch_idx, self.global_step]
            self.steps.append([*where, batch[0, 0].item(), loss.item(), *rates])
            self.log("train", loss)
            if self.automatic_optimization:
                return loss
            first, second = self.optimizers()
            optimizer = first if batch_idx % 2 == 0 else second
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if batch_idx == 0:
                self.lr_schedulers().step()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return optimizers(case, self)

    class Data(package.LightningDataModule):  # type: ignore[name-defined,misc]
        def __init__(self, size: int = BATCHES * 2) -> None:
            super().__init__()
            if case == "data":
                self.save_hyperparameters()
            self.size = size
            self.epochs_given = 0

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(self.size, 1), batch_size=2)

        def val_dataloader(self) -> Any:
            return DataLoader(Rows(4, 2), batch_size=2)

        def state_dict(self) -> dict[str, Any]:
            return {"rows_given": 17 + self.epochs_given} if case == "data" else {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.epochs_given = state["rows_given"]

    return Model(), Data()


def run(framework: str, case: str, folder: Path, ckpt_path: str | None = None) -> dict[str, Any]:
    package = names(framework)
    library = callbacks_of(framework)
    torch.set_num_threads(1)
    package.seed_everything(7)

    class Save(package.Callback):  # type: ignore[name-defined,misc]
        """Counts batches, which is its state, and writes the file of each point."""

        def __init__(self) -> None:
            self.seen = 0

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

        def save(self, hook: str, trainer: Any, batch_idx: int | None = None) -> None:
            if ckpt_path is not None or trainer.sanity_checking:
                return
            for name, (at, epoch, index) in POINTS.items():
                if at == hook and index == batch_idx and (epoch is None or epoch == trainer.current_epoch):
                    file = folder / f"{case}-{name}.ckpt"
                    if not file.exists():  # of several validations in an epoch, the first
                        trainer.save_checkpoint(file)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.save("on_train_epoch_start", trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen += 1
            self.save("on_train_batch_end", trainer, batch_idx)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.save("on_validation_end", trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.save("on_train_epoch_end", trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.save("on_train_end", trainer)

    stop = library.EarlyStopping("val", patience=50, min_delta=0.01)
    keep = library.ModelCheckpoint(folder / case, monitor="val", save_top_k=2)
    timer = library.Timer(duration="00:01:00:00", verbose=False)
    saver = Save()
    windows = [library.GradientAccumulationScheduler(SCHEDULE)] if case == "schedule" else []
    ends_at = EPOCHS if ckpt_path is None or "-end" not in Path(ckpt_path).name else EPOCHS + 2
    trainer = package.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder), max_epochs=ends_at, num_sanity_val_steps=2,
        callbacks=[saver, stop, timer, keep, *windows], **TRAINER[case],
    )  # fmt: skip
    module, data = make(framework, case)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)

    def plain(path: str) -> str:  # several runs share the folder, so names may have a version
        return Path(path).stem.split("-v")[0]

    top = {plain(path): float(score) for path, score in keep.best_k_models.items()}
    return {
        "steps": module.steps,
        "weights": module.layer.weight.flatten().tolist() + module.layer.bias.tolist(),
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "schedulers": [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs],
        "seen": saver.seen,
        "rows_given": data.epochs_given,
        "wait_count": stop.wait_count,
        "best_score": float(stop.best_score),
        "top_k": top,
        "kth_value": float(keep.kth_value),
        "best": plain(keep.best_model_path),
        "timer_keeps_time": timer.time_elapsed("train") > 0,
        "batches_that_stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "total_batch_idx": trainer.fit_loop.epoch_loop.total_batch_idx,
    }


def quietly(framework: str, case: str, folder: Path, file: str | None = None) -> dict[str, Any]:
    with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        try:
            return run(framework, case, folder, file)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def record(framework: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole = {case: quietly(framework, case, folder) for case in TRAINER}
        resumed = {name: quietly(framework, name.split("-")[0], folder, f"{folder}/{name}.ckpt") for name in STORED}
        for name in STORED:
            held = torch.load(folder / f"{name}.ckpt", weights_only=True)
            torch.save(moved(held, temporary, ELSEWHERE), GOLDENS / f"exchange-{name}.ckpt")
    figures = {"whole": {case: row["steps"] for case, row in whole.items()}, "resumed": resumed}
    (GOLDENS / "exchange.json").write_text(json.dumps(figures) + "\n")


def moved(value: Any, before: str, after: str) -> Any:
    """The same with another folder in every string."""
    if isinstance(value, dict):
        return {moved(key, before, after): moved(item, before, after) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, before, after) for item in value]
    return value.replace(before, after) if isinstance(value, str) else value


def main(framework: str, what: str, folder: str = "", *names: str) -> None:
    logging.disable(logging.WARNING)
    if what == "record":
        record(framework)
    elif what == "save":
        print(json.dumps({case: quietly(framework, case, Path(folder)) for case in names}))
    else:
        files = {Path(file).stem: file for file in names}
        print(json.dumps({name: quietly(framework, name.split("-")[0], Path(folder), files[name]) for name in files}))


if __name__ == "__main__":
    main(*sys.argv[1:])

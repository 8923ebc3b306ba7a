"""A training run with everything random in it, to be killed and started again: python resume_program.py FOLDER JSON.

Each loss is appended to FOLDER/losses.txt as `epoch batch_idx loss-in-hex global_step` before the step goes on, so
that a killed process leaves what it did. A resumed run repeats the steps after its checkpoint: all lines of one step
must agree.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from heart_models import rows
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lit_fast

DEFAULTS: dict[str, Any] = {
    "rows": 44, "workers": 0, "epochs": 3, "steps": -1, "every": 3, "window": 2, "val_every": 1.0, "val_epochs": 1,
    "kind": "map", "sanity": 2, "resume": True, "pause": 0.0, "save_on": "steps", "generator": False,
    "context": None,
}  # fmt: skip


class Noisy(Dataset[Any]):
    """Rows with noise that is drawn when they are read: in the workers, if there are any."""

    def __init__(self, count: int) -> None:
        self.rows = rows(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index][0] + 0.01 * torch.randn(8)


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.rows = rows(count)

    def __iter__(self) -> Any:
        for index in range(len(self.rows)):
            yield self.rows[index][0]


class Model(lit_fast.LightningModule):
    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.folder = folder
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(batch).squeeze(-1) - batch.sum(-1)).square().mean() + 0.001 * random.random()
        with open(self.folder / "losses.txt", "a") as file:
            file.write(f"{self.current_epoch} {batch_idx} {loss.item().hex()} {self.global_step}\n")
        self.log("train", loss, on_step=True, on_epoch=True)
        if self.options["pause"]:
            import time

            time.sleep(self.options["pause"])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = torch.randn(()) * 0.1  # validation draws from the same generator as dropout
        loss = (self.net(batch[0]).squeeze(-1) - batch[0].sum(-1)).square().mean()
        if self.options["pause"]:
            import time

            time.sleep(self.options["pause"])
        self.log("val", loss + noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        epoch_mean = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.3)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"},
            {"scheduler": by_epoch, "interval": "epoch"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "val", "strict": self.options["val_epochs"] == 1},
            {"scheduler": epoch_mean, "interval": "epoch", "monitor": "train_epoch"},
        ]


def make_loader(options: dict[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(5) if options["generator"] else None
    if options["kind"] == "stream":
        return DataLoader(Stream(options["rows"]), batch_size=4, num_workers=options["workers"])
    data: Any = Noisy(options["rows"]) if options["kind"] == "noisy" else Plain(options["rows"])
    return DataLoader(
        data, batch_size=4, shuffle=True, num_workers=options["workers"], generator=generator,
        multiprocessing_context=options["context"],
    )  # fmt: skip


class Plain(Noisy):
    def __getitem__(self, index: int) -> Any:
        return self.rows[index][0]


def run(folder: Path, callbacks: tuple[Any, ...] = (), **given: Any) -> lit_fast.Trainer:
    options = {**DEFAULTS, **given}
    torch.set_num_threads(1)
    lit_fast.seed_everything(3, verbose=False)
    when = {"steps": {"every_n_train_steps": options["every"]}, "epochs": {"every_n_epochs": 1}}[options["save_on"]]
    checkpoints = lit_fast.callbacks.ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=1, **when)
    trainer = lit_fast.Trainer(
        accelerator="cpu",
        max_epochs=options["epochs"],
        max_steps=options["steps"],
        accumulate_grad_batches=options["window"],
        gradient_clip_val=1.0,
        val_check_interval=options["val_every"],
        check_val_every_n_epoch=options["val_epochs"],
        num_sanity_val_steps=options["sanity"],
        callbacks=[*callbacks, checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Model(folder, options)
    val = DataLoader(rows(12, seed=2), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, make_loader(options), val, ckpt_path="last" if options["resume"] else None)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    (folder / "weights.txt").write_text(" ".join(value.hex() for value in weights.tolist()))
    return trainer


def losses(folder: Path) -> dict[tuple[int, int], str]:
    """Loss by (epoch, batch); raises where a repeated step had another loss than before."""
    found: dict[tuple[int, int], str] = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        epoch, batch_idx, loss, _ = line.split()
        key = int(epoch), int(batch_idx)
        assert found.setdefault(key, loss) == loss, f"epoch {key[0]}, batch {key[1]}: {loss} after {found[key]}"
    return found


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    os._exit(0)

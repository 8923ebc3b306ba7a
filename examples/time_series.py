"""Forecast a noisy wave with an LSTM: a warm-up and cosine schedule by the step, clipping, an own callback.

python examples/time_series.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lit_fast as L

WINDOW = 32  # past values that a forecast sees


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Every window of a series, and the value that follows it."""

    def __init__(self, series: Tensor) -> None:
        self.series = series

    def __len__(self) -> int:
        return len(self.series) - WINDOW

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.series[index : index + WINDOW, None], self.series[index + WINDOW]


class Forecaster(L.LightningModule):
    def __init__(self, hidden_size: int = 32, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(1, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, window: Tensor) -> Tensor:
        states, _ = self.lstm(window)
        return self.head(states[:, -1]).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        window, following = batch
        loss = F.mse_loss(self(window), following)
        self.log("train_mse", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        window, following = batch
        self.log("val_mse", F.mse_loss(self(window), following), prog_bar=True)
        self.log("persistence_mse", F.mse_loss(window[:, -1, 0], following))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, object]]]:
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class History(L.Callback):
    """Keeps the validation error of every epoch, in the checkpoint too."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.errors.append(trainer.callback_metrics["val_mse"].item())

    def state_dict(self) -> dict[str, list[float]]:
        return {"errors": self.errors}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        self.errors = state_dict["errors"]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=8)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    time = torch.arange(2000) / 10
    series = time.sin() + 0.5 * (2.7 * time).sin() + 0.05 * torch.randn(len(time))
    train, val = Windows(series[:1600]), Windows(series[1600:])

    history = History()
    trainer = L.Trainer(max_epochs=options.max_epochs, gradient_clip_val=1.0, callbacks=[history])
    trainer.fit(Forecaster(), DataLoader(train, 32, shuffle=True), DataLoader(val, 128))
    last = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {**last, "first_val_mse": history.errors[0]}


if __name__ == "__main__":
    print(main())

"""Predict the progress of diabetes from ten columns, with a plateau scheduler; compare with linear regression.

python examples/tabular_regression.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lit_fast as L
from lit_fast.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lit_fast.loggers import CSVLogger

TRAIN = 340  # rows of 442


class Regressor(L.LightningModule):
    def __init__(self, columns: int, width: int = 32, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(columns, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, target = batch
        loss = F.mse_loss(self(rows), target)
        self.log("train_mse", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rows, target = batch
        self.log("val_mse", F.mse_loss(self(rows), target), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.learning_rate, weight_decay=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_mse"}}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=40)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    table, target = load_diabetes(return_X_y=True)
    table, target = table / table[:TRAIN].std(axis=0), (target - target[:TRAIN].mean()) / target[:TRAIN].std()
    rows = TensorDataset(torch.tensor(table, dtype=torch.float32), torch.tensor(target, dtype=torch.float32))
    train, val = torch.utils.data.Subset(rows, range(TRAIN)), torch.utils.data.Subset(rows, range(TRAIN, len(rows)))

    best = ModelCheckpoint(monitor="val_mse")
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[best, EarlyStopping("val_mse", patience=8), LearningRateMonitor()],
        logger=CSVLogger("logs", name="tabular"),
        log_every_n_steps=10,
    )
    model = Regressor(columns=table.shape[1])
    trainer.fit(model, DataLoader(train, 32, shuffle=True), DataLoader(val, 128))

    kept = Regressor.load_from_checkpoint(best.best_model_path)
    figures = trainer.validate(kept, DataLoader(val, 128), verbose=False)[0]
    linear = LinearRegression().fit(table[:TRAIN], target[:TRAIN]).predict(table[TRAIN:])
    return {**figures, "linear_mse": float(((linear - target[TRAIN:]) ** 2).mean())}


if __name__ == "__main__":
    print(main())

"""Fits that callbacks stop, watch or save, run under either package; lightning 2.6.6's results are in
fit_programs.json.

To record anew, where lightning is installed: python tests/callbacks/fit_programs.py
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from callback_programs import Names
from torch import Tensor, nn
from torch.utils.data import DataLoader

GOLDENS = Path(__file__).with_name("fit_programs.json")
PROGRAMS: dict[str, Callable[[Names, str], Any]] = {}


def program(function: Callable[[Names, str], Any]) -> Callable[[Names, str], Any]:
    PROGRAMS[function.__name__] = function
    return function


def run(name: str, root: str) -> Any:
    """One program's result, as JSON gives it back; NaN becomes "nan", which equals itself."""
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PROGRAMS[name](Names(root), str(Path(directory).resolve()))
        return json.loads(json.dumps(found).replace("NaN", '"nan"').replace(directory, ""))


def scored(names: Names, scores: Any, where: str = "on_validation_epoch_end", **methods: Any) -> Any:
    """A module of one layer that logs the next of `scores` as "score" each time that `where` is called; four batches
    an epoch, two of validation."""

    class Scored(names("", "LightningModule")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.scores = iter(scores)
            self.batches = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.batches += 1
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_batch", float(batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(8, 2), batch_size=2)

        def val_dataloader(self) -> Any:
            return DataLoader(torch.ones(4, 2), batch_size=2)

    def log_next(self: Any) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", float(next(self.scores)))

    setattr(Scored, where, log_next)
    for name, method in methods.items():
        setattr(Scored, name, method)
    return Scored()


def error(call: Callable[[], Any]) -> str | None:
    """What the error that `call` raises can be caught as; ours may be of several kinds."""
    try:
        call()
    except Exception as caught:
        kinds = [kind.__name__ for kind in type(caught).__mro__]
        return next(name for name in (*PYTHONS, "MisconfigurationException", "Exception") if name in kinds)
    return None


PYTHONS = ("TypeError", "RuntimeError", "ZeroDivisionError")


if __name__ == "__main__":
    import fit_programs
    import monitor_programs  # noqa: F401
    import stopping_programs  # noqa: F401

    logging.disable(logging.WARNING)
    rows = {name: fit_programs.run(name, "lightning.pytorch") for name in fit_programs.PROGRAMS}
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")

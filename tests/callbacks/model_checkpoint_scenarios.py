"""Random scenarios for ModelCheckpoint, and what lightning 2.6.6 left behind in each (model_checkpoint.json).

To record anew, where lightning is installed: python tests/callbacks/model_checkpoint_scenarios.py
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from callback_standins import StandInTrainer

GOLDENS = Path(__file__).with_name("model_checkpoint.json")


def scenarios(count: int) -> list[dict[str, Any]]:
    """Options, trainer settings, and the metric of each epoch. Left out is the point where we differ on
    purpose: saves deferred to a validation."""
    rng = random.Random(20)
    result = []
    while len(result) < count:
        options: dict[str, Any] = {}
        if rng.random() < 0.6:
            options["monitor"] = "val_loss"
        for name, chance, values in (
            ("mode", 0.5, ["min", "max"]),
            ("save_top_k", 0.6, [-1, 0, 1, 2, 3]),
            ("save_last", 0.5, [True, "link", False]),
            ("save_on_train_epoch_end", 0.3, [True, False]),
            ("filename", 0.4, ["x", "{epoch}", "{val_loss:.1f}-{missing}", "{step:04d}"]),
            ("auto_insert_metric_name", 0.2, [False]),
            ("enable_version_counter", 0.2, [False]),
        ):
            if rng.random() < chance:
                options[name] = rng.choice(values)
        trigger = rng.random()
        if trigger < 0.3 and "monitor" not in options:
            options["every_n_train_steps"] = rng.choice([0, 1, 2, 3, 5])
        elif trigger < 0.6:
            options["every_n_epochs"] = rng.choice([0, 1, 2])
        trainer: dict[str, Any] = {}
        if rng.random() < 0.3:
            trainer["num_val_batches"] = [0]
        if rng.random() < 0.2:
            trainer["check_val_every_n_epoch"] = 2
        val_at = None
        if rng.random() < 0.25:
            trainer["val_check_interval"], val_at = 0.5, [1, 3]
        values = [rng.choice([0.1, 0.2, 0.3, 0.4, 0.5, "nan"]) for _ in range(rng.choice([1, 2, 4, 5]))]
        result.append({"options": options, "trainer": trainer, "val_at": val_at, "values": values})
    return result


def outcome(callback_class: type, scenario: dict[str, Any]) -> Any:
    """What one run leaves: every save in order, the files with the step inside, and the callback's state."""
    with tempfile.TemporaryDirectory() as directory:
        root = os.path.realpath(directory)
        trainer = StandInTrainer(Path(root), **scenario["trainer"])
        try:
            callback = callback_class(**scenario["options"])
        except Exception as error:
            return type(error).__name__
        scores = [{"val_loss": torch.tensor(float(value))} for value in scenario["values"]]
        trainer.run(callback, scores, tuple(scenario["val_at"]) if scenario["val_at"] else None)
        files = {}
        for path in sorted(Path(root).rglob("*.ckpt")):
            files[str(path.relative_to(root))] = [
                path.read_text(),
                os.readlink(path) if path.is_symlink() else None,
            ]
        state = {
            name: str(round(float(value), 4)) if isinstance(value, torch.Tensor) else str(value).replace(root, "")
            for name, value in callback.state_dict().items()
        }
        return {"saved": trainer.saved, "files": files, "state": state, "key": callback.state_key}


if __name__ == "__main__":
    from lightning.pytorch.callbacks import ModelCheckpoint

    with GOLDENS.open("w") as file:
        rows = [{**scenario, "outcome": outcome(ModelCheckpoint, scenario)} for scenario in scenarios(120)]
        file.write("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")

"""Fits with ModelCheckpoint, under either package: the files, what they hold, and the callback's state.

To record anew, where lightning is installed: python tests/callbacks/model_checkpoint_fits.py > \
tests/goldens/model_checkpoint_lightning_2_6_6.json
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from callback_programs import Names, make_trainer
from fit_programs import scored

Options = dict[str, Any]
SCORE: Options = {"monitor": "score"}
ALL: Options = {"save_top_k": -1}
HALF: Options = {"val_check_interval": 0.5}
FALLING = (3, 2, 1) * 9
TURNING = (3, 2, 1, 4) * 9


@dataclass
class Fit:
    """Four epochs of four batches; an epoch's validation logs the next of `scores`."""

    callbacks: list[Options]
    trainer: Options = field(default_factory=dict)
    scores: Iterable[float] = (3, 2, float("nan"), 2, 1, 1, 5, 0) * 5
    raises_at: int | None = None  # the step in which `training_step` fails
    resumed_in: str | None = None  # then two more epochs, with files in the "same" or in an "other" directory


FITS = {
    "time": Fit([{"train_time_interval": timedelta(0)}]),
    "time_and_score": Fit([{"train_time_interval": timedelta(0), **ALL, **SCORE}]),
    "time_that_does_not_come": Fit([{"train_time_interval": timedelta(hours=1), "save_last": True}]),
    "every_other_epoch": Fit([{"every_n_epochs": 2, **SCORE}]),
    "exception": Fit([{"save_on_exception": True}], scores=FALLING, raises_at=6),
    "exception_and_last": Fit([{"save_on_exception": True, "save_last": True, **SCORE}], scores=FALLING, raises_at=6),
    "exception_and_link": Fit(
        [{"save_on_exception": True, "save_last": "link", "every_n_train_steps": 3}], scores=FALLING, raises_at=8
    ),
    "link": Fit([{"save_last": "link", **SCORE}]),
    "link_and_steps": Fit([{"save_last": "link", "every_n_train_steps": 3, **ALL}]),
    "three_largest": Fit([{"mode": "max", "save_top_k": 3, **SCORE}]),
    "three_smallest": Fit([{"save_top_k": 3, **SCORE}], {"max_epochs": 7}),
    "three_of_equals": Fit([{"save_top_k": 3, **SCORE}], {"max_epochs": 6}, (1,) * 20),
    "two_largest_of_equals": Fit([{"save_top_k": 2, "mode": "max", **SCORE}], {"max_epochs": 6}, (1,) * 20),
    "name_with_metrics": Fit([{"filename": "{epoch}-{val/x:.2f}-{score:.1f}", **SCORE}]),
    "name_without_keys": Fit(
        [{"filename": "e{epoch:02d}_{score:.2f}", "auto_insert_metric_name": False, **ALL, **SCORE}]
    ),
    "three_callbacks": Fit([SCORE, ALL, {"monitor": "val_batch", "mode": "max", "save_last": True}]),
    "smallest_and_largest": Fit([SCORE, {**SCORE, "mode": "max"}]),
    "resumed_elsewhere": Fit([{**SCORE, "save_top_k": 2}], scores=TURNING, resumed_in="other"),
    "resumed": Fit([{**SCORE, "save_top_k": 2}], scores=TURNING, resumed_in="same"),
    "resumed_from_last": Fit([{"save_last": True}], scores=TURNING, resumed_in="same"),
    "epoch_end_of_two_validations": Fit([{**SCORE, "save_on_train_epoch_end": True, **ALL}], HALF),
    "validation_end_of_two": Fit([{**SCORE, "save_on_train_epoch_end": False, **ALL}], HALF),
    "two_validations": Fit([{**SCORE, **ALL}], HALF),
    "two_validations_without_score": Fit([ALL], HALF),
    "validation_end": Fit([{**SCORE, "save_on_train_epoch_end": False}]),
    "steps_of_two_batches": Fit([{"every_n_train_steps": 2, **ALL}], {"accumulate_grad_batches": 2}),
    "steps_and_score": Fit([{"every_n_train_steps": 2, **SCORE}], HALF),
    "steps_between_validations": Fit([{"every_n_train_steps": 3, **ALL, **SCORE}], HALF),
    "weights_only": Fit([{"save_weights_only": True, "filename": "w"}]),
    "one_name_for_two": Fit([{"filename": "same", "save_top_k": 2, **SCORE}]),
    "fast_dev_run": Fit([{}], {"fast_dev_run": True}),
}


def outcome(name: str, root: str) -> Any:
    """What one fit leaves: the error's name, each file's step (or where its link leads), each callback's state."""
    fit, names = FITS[name], Names(root)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory = os.path.realpath(temporary)

        def trainer_of(options: list[Options], epochs: int) -> Any:
            callbacks = [names("callbacks", "ModelCheckpoint")(**given) for given in options]
            given = {"enable_checkpointing": True, "max_epochs": epochs, **fit.trainer}
            return callbacks, make_trainer(names, directory, callbacks=callbacks, **given)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == fit.raises_at:
                raise RuntimeError
            return self.layer(batch).square().mean()

        torch.manual_seed(0)
        callbacks, trainer = trainer_of(fit.callbacks, 4)
        error = None
        try:
            trainer.fit(scored(names, fit.scores, training_step=training_step))
        except RuntimeError as raised:
            error = type(raised).__name__
        if fit.resumed_in:
            ckpt_path = sorted(Path(directory).rglob("*.ckpt"))[-1]
            moved = {"dirpath": f"{directory}/other"} if fit.resumed_in == "other" else {}
            callbacks, trainer = trainer_of([{**given, **moved} for given in fit.callbacks], 6)
            trainer.fit(scored(names, list(fit.scores)[1:]), ckpt_path=str(ckpt_path))
        files = {
            str(path.relative_to(directory)): os.readlink(path)
            if path.is_symlink()
            else torch.load(path, weights_only=False)["global_step"]
            for path in sorted(Path(directory).rglob("*.ckpt"))
        }
        states = [
            {key: str(value).replace(directory, "") for key, value in callback.state_dict().items()}
            for callback in callbacks
        ]
        return {"error": error, "files": files, "states": states}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = (f"{json.dumps(name)}: {json.dumps(outcome(name, 'lightning.pytorch'))}" for name in FITS)
    sys.stdout.write("{\n" + ",\n".join(rows) + "\n}\n")

"""The programs that lightning_recorder.py runs, about exceptions and about going on from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning_recorder import Framework, Recorder, loader, make_callback, make_data, make_module, make_trainer
from lightning_scenarios import SCENARIOS


class OnPurpose(Exception):
    """What the hooks below raise."""


def raises(self: Any, *args: Any, **kwargs: Any) -> None:
    raise OnPurpose


def failing_at(owner: str, hook: str) -> Callable[[Framework, str], Recorder]:
    """A fit with validation and one checkpoint at each epoch's end, in which one hook raises."""

    def program(fw: Framework, root: str) -> Recorder:
        record = Recorder(fw)
        extra = {hook: raises}
        keep = fw.get("callbacks", "ModelCheckpoint")(dirpath=os.path.join(root, "kept"), save_on_exception=True)
        callback = make_callback(record, "a", extra if owner == "callback" else None)
        trainer = make_trainer(
            record, root, callbacks=[callback, keep], enable_checkpointing=True, num_sanity_val_steps=0, max_epochs=1
        )
        module = make_module(record, extra if owner == "module" else None)
        try:
            trainer.fit(module, datamodule=make_data(record, loader(2), loader(1, 1)))
        except OnPurpose:
            record.facts["raised"] = True
        record.facts["status"] = str(trainer.state.status.value)
        record.facts["files"] = sorted(os.listdir(os.path.join(root, "kept"))) if os.path.isdir(f"{root}/kept") else []
        return record

    return program


for _owner, _hook in (
    ("module", "setup"),
    ("module", "on_fit_start"),
    ("module", "validation_step"),
    ("module", "on_validation_epoch_end"),
    ("module", "on_save_checkpoint"),
    ("callback", "on_train_batch_end"),
    ("callback", "on_train_epoch_end"),
    ("callback", "on_save_checkpoint"),
):
    SCENARIOS[f"exception_in_{_owner}_{_hook}"] = failing_at(_owner, _hook)


def resumed_from(hook: str, epoch: int, **options: Any) -> Callable[[Framework, str], Recorder]:
    """One trainer saves in a callback's `hook` of an epoch, the first time it is called there; another goes on."""

    def program(fw: Framework, root: str) -> Recorder:
        path = os.path.join(root, "saved.ckpt")

        def save(self: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.current_epoch == epoch and not trainer.sanity_checking and not os.path.exists(path):
                trainer.save_checkpoint(path)

        def run(extra: dict[str, Any] | None, ckpt_path: str | None) -> Recorder:
            record = Recorder(fw)
            callbacks = [make_callback(record, "a", extra), make_callback(record, "b")]
            trainer = make_trainer(record, root, callbacks=callbacks, max_epochs=2, **options)
            data = make_data(record, loader(4), loader(1, 1), state={"rows_read": 3})
            trainer.fit(make_module(record), datamodule=data, ckpt_path=ckpt_path)
            record.facts.update(global_step=trainer.global_step, current_epoch=trainer.current_epoch)
            return record

        run({hook: save}, None)
        return run(None, path)

    return program


SCENARIOS["resume_after_a_validation_inside_an_epoch"] = resumed_from("on_validation_end", 0, val_check_interval=2)
SCENARIOS["resume_from_the_end_of_a_validation"] = resumed_from("on_validation_end", 0, num_sanity_val_steps=0)
SCENARIOS["resume_from_on_train_epoch_end"] = resumed_from("on_train_epoch_end", 0)
SCENARIOS["resume_from_on_train_end"] = resumed_from("on_train_end", 2)


def callbacks_that_changed(fw: Framework, root: str) -> Recorder:
    """A checkpoint with the state of a callback that the second trainer lacks, which has another one instead."""
    path = os.path.join(root, "saved.ckpt")

    def run(tags: str, ckpt_path: str | None) -> Recorder:
        record = Recorder(fw)
        trainer = make_trainer(record, root, callbacks=[make_callback(record, tag) for tag in tags], max_epochs=1)
        trainer.fit(make_module(record), datamodule=make_data(record, loader(1)), ckpt_path=ckpt_path)
        trainer.save_checkpoint(path)
        return record

    run("ab", None)
    return run("bc", path)


SCENARIOS["callbacks_that_changed"] = callbacks_that_changed

"""Private attributes of Lightning's Trainer that programs use."""

from __future__ import annotations

from typing import Any

from heart_models import Plain, batches, fitted, trainer

import lit_fast
from lit_fast.loggers import DummyLogger


def test_a_checkpoint_without_a_file() -> None:
    made = fitted(Plain(), batches(2), max_epochs=1)
    whole = made._checkpoint_connector.dump_checkpoint()
    assert (whole["epoch"], whole["global_step"]) == (1, 2) and "optimizer_states" in whole
    assert "optimizer_states" not in made._checkpoint_connector.dump_checkpoint(weights_only=True)
    made._checkpoint_connector._ckpt_path = "a.ckpt"
    assert made.ckpt_path == made._checkpoint_connector._ckpt_path == "a.ckpt"


def test_the_steps_that_are_logged() -> None:
    class Watches(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer._logger_connector.should_update_logs)

    seen: list[bool] = []
    fitted(Plain(), batches(5), max_epochs=1, callbacks=Watches(), logger=DummyLogger(), log_every_n_steps=2)
    assert seen == [False, True, False, True, False]
    assert not trainer(log_every_n_steps=0)._logger_connector.should_update_logs


def test_one_device() -> None:
    made = trainer(use_distributed_sampler=False)
    connector = made._accelerator_connector
    assert not connector.is_distributed and not connector.use_distributed_sampler
    assert connector.strategy is made.strategy and connector.accelerator is made.accelerator
    assert connector._accelerator_flag == "cpu"


def test_where_data_comes_from() -> None:
    class Has(Plain):
        def val_dataloader(self) -> Any:
            return [batches(1)]

    assert not trainer().fit_loop._data_source.is_defined()
    data, model = batches(2), Has()
    made = fitted(model, data, max_epochs=1)
    train, val = made.fit_loop._data_source, made.fit_loop.epoch_loop.val_loop._data_source
    assert train.is_defined() and train.instance is train.dataloader() is data
    assert val.is_defined() and val.instance is model and len(val.dataloader()) == 1
    combined = made.fit_loop._combined_loader
    assert combined is not None and combined.flattened == [data] and combined.iterables is data
    assert trainer().fit_loop._combined_loader is None
    assert not made.test_loop._data_source.is_defined() and made.test_loop._combined_loader is None

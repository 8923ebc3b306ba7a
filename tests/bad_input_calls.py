"""Programs whose mistake is around the module: options, callbacks, data, and how the trainer is called."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from bad_input_programs import PROGRAMS, QUIET, fit, loader, module, program, step
from torch.utils.data import DataLoader, IterableDataset

# -- what is passed


@program
def no_training_step(L: Any) -> None:
    fit(L, {"without": ("training_step",)})


@program
def no_configure_optimizers(L: Any) -> None:
    fit(L, {"without": ("configure_optimizers",)})


@program
def no_training_data(L: Any) -> None:
    L.Trainer(**QUIET).fit(module(L))


@program
def training_data_is_no_iterable(L: Any) -> None:
    fit(L, train=3)


@program
def validation_data_is_no_iterable(L: Any) -> None:
    fit(L, {"validation_step": step}, val=3)


@program
def train_dataloader_returns_nothing(L: Any) -> None:
    L.Trainer(**QUIET).fit(module(L, train_dataloader=lambda self: None))


@program
def a_module_of_torch(L: Any) -> None:
    L.Trainer(**QUIET).fit(torch.nn.Linear(1, 1), loader())


@program
def the_class_of_a_module(L: Any) -> None:
    L.Trainer(**QUIET).fit(type(module(L)), loader())


@program
def a_datamodule_and_loaders(L: Any) -> None:
    data = type("Data", (L.LightningDataModule,), {"train_dataloader": lambda self: loader()})()
    L.Trainer(**QUIET).fit(module(L), loader(), datamodule=data)


@program
def no_super_init(L: Any) -> None:
    def init(self: Any) -> None:
        self.weight = 3

    fit(L, {"__init__": init})


@program
def validate_without_a_step(L: Any) -> None:
    L.Trainer(**QUIET).validate(module(L), loader())


@program
def test_without_a_step(L: Any) -> None:
    L.Trainer(**QUIET).test(module(L), loader())


@program
def test_without_data(L: Any) -> None:
    L.Trainer(**QUIET).test(module(L, test_step=step))


@program
def validate_without_a_model(L: Any) -> None:
    L.Trainer(**QUIET).validate(dataloaders=loader())


@program
def predict_without_a_forward(L: Any) -> None:
    L.Trainer(**QUIET).predict(module(L), loader())


@program
def predict_step_is_none(L: Any) -> None:
    L.Trainer(**QUIET).predict(module(L, predict_step=None), loader())


@program
def save_without_a_model(L: Any) -> None:
    L.Trainer(**QUIET).save_checkpoint("nowhere.ckpt")


@program
def module_without_a_trainer(L: Any) -> None:
    module(L).trainer  # noqa: B018


@program
def best_before_any_checkpoint(L: Any) -> None:
    L.Trainer(**QUIET).test(module(L, test_step=step), loader(), ckpt_path="best")


@program
def a_checkpoint_that_is_not_there(L: Any) -> None:
    L.Trainer(**QUIET).fit(module(L), loader(), ckpt_path="nowhere.ckpt")


# -- callbacks


@program
def a_callback_that_is_none(L: Any) -> None:
    L.Trainer(**QUIET, callbacks=[print]).fit(module(L), loader())


@program
def the_class_of_a_callback(L: Any) -> None:
    L.Trainer(**QUIET, callbacks=[L.Callback]).fit(module(L), loader())


@program
def two_callbacks_of_one_state_key(L: Any) -> None:
    own = type("Own", (L.Callback,), {"state_dict": lambda self: {"a": 1}})
    L.Trainer(**QUIET, callbacks=[own(), own()])


@program
def two_progress_bars(L: Any) -> None:
    bar = importlib.import_module(f"{L.__name__}.callbacks").RichProgressBar
    L.Trainer(**{**QUIET, "enable_progress_bar": True}, callbacks=[bar(), bar()])


@program
def a_progress_bar_that_is_switched_off(L: Any) -> None:
    bar = importlib.import_module(f"{L.__name__}.callbacks").RichProgressBar
    L.Trainer(**QUIET, callbacks=[bar()])


@program
def a_checkpoint_callback_that_is_switched_off(L: Any) -> None:
    best = importlib.import_module(f"{L.__name__}.callbacks").ModelCheckpoint
    L.Trainer(**QUIET, callbacks=[best()])


@program
def configure_callbacks_returns_text(L: Any) -> None:
    fit(L, {"configure_callbacks": lambda self: ["text"]})


# -- data


@program
def a_loader_of_no_batches(L: Any) -> None:
    fit(L, train=DataLoader(torch.ones(1, 4), batch_size=2, drop_last=True))  # type: ignore[arg-type]


@program
def a_generator_over_two_epochs(L: Any) -> None:
    fit(L, train=(torch.ones(2, 4) for _ in range(3)), max_epochs=2)


@program
def too_small_a_fraction(L: Any) -> None:
    fit(L, limit_train_batches=0.1)


@program
def a_fraction_of_data_without_length(L: Any) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(torch.ones(4, 4))

    fit(L, train=DataLoader(Stream()), limit_train_batches=0.5)


@program
def validation_rarer_than_an_epoch(L: Any) -> None:
    fit(L, {"validation_step": step}, val=loader(), val_check_interval=10)


# -- what works, and is often a mistake


@program
def validation_data_and_no_step(L: Any) -> None:
    fit(L, val=loader())


@program
def a_validation_step_and_no_data(L: Any) -> None:
    fit(L, {"validation_step": step})


@program
def logging_rarer_than_an_epoch(L: Any) -> None:
    fit(L, logger=importlib.import_module(f"{L.__name__}.loggers.logger").DummyLogger())


@program
def a_module_in_evaluation_mode(L: Any) -> None:
    model = module(L)
    model.layer.eval()
    L.Trainer(**QUIET).fit(model, loader())


@program
def no_limit_on_epochs(L: Any) -> None:
    fit(L, max_epochs=None, limit_train_batches=0)


@program
def max_epochs_reached_already(L: Any) -> None:
    trainer = fit(L)
    trainer.fit(trainer.lightning_module, loader())


@program
def transfer_hooks_in_module_and_datamodule(L: Any) -> None:
    hook = {"on_after_batch_transfer": lambda self, batch, dataloader_idx: batch}
    data = type("Data", (L.LightningDataModule,), {"train_dataloader": lambda self: loader(), **hook})()
    L.Trainer(**QUIET).fit(module(L, **hook), datamodule=data)


@program
def shuffled_validation(L: Any) -> None:
    fit(L, {"validation_step": step}, val=DataLoader(torch.ones(6, 4), batch_size=2, shuffle=True))  # type: ignore[arg-type]


@program
def hyperparameters_of_module_and_datamodule_differ(L: Any) -> None:
    class Model(type(module(L))):  # type: ignore[misc]
        def __init__(self, rate: float = 0.2) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Data(L.LightningDataModule):  # type: ignore[misc,name-defined]
        def __init__(self, rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader()

    logger = importlib.import_module(f"{L.__name__}.loggers.logger").DummyLogger()
    L.Trainer(**{**QUIET, "logger": logger, "log_every_n_steps": 1}).fit(Model(), datamodule=Data())


# -- options


def option(name: str, **options: Any) -> None:
    PROGRAMS[name] = lambda L: L.Trainer(**{**QUIET, **options})


option("option_unknown", max_epoch=3)
option("option_devices_zero", devices=0)
option("option_accelerator_unknown", accelerator="abacus")
option("option_strategy_unknown", strategy="telepathy")
option("option_precision_unknown", precision="int8")
option("option_clip_value_is_text", gradient_clip_val="1")
option("option_clip_algorithm_unknown", gradient_clip_algorithm="l2")
option("option_limit_out_of_range", limit_train_batches=1.5)
option("option_limit_negative", limit_val_batches=-1)
option("option_max_steps_below_minus_one", max_steps=-2)
option("option_max_epochs_below_minus_one", max_epochs=-2)
option("option_fast_dev_run_negative", fast_dev_run=-1)
option("option_profiler_unknown", profiler="stopwatch")
option("option_reload_negative", reload_dataloaders_every_n_epochs=-1)
option("option_check_val_is_a_fraction", check_val_every_n_epoch=0.5)
option("option_check_val_none_with_a_fraction", check_val_every_n_epoch=None, val_check_interval=0.5)
option("option_max_time_unreadable", max_time="soon")
option("option_barebones_with_a_logger", barebones=True, logger=True)
option("option_num_nodes_zero", num_nodes=0)
option("option_plugin_unknown", plugins=[3])
option("option_deterministic_and_benchmark", deterministic=True, benchmark=True)

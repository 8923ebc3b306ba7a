"""Programs with one mistake each, for either package; test_bad_input.py says what must be answered.

python tests/bad_input_programs.py lightning      # what the other package answers, as a table
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 1,
}  # fmt: skip

PROGRAMS: dict[str, Callable[[Any], Any]] = {}


def program(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    PROGRAMS[function.__name__] = function
    return function


def loader(count: int = 3) -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(2 * count, 4), batch_size=2)  # type: ignore[arg-type]


def fit(L: Any, body: dict[str, Any] | None = None, train: Any = None, val: Any = None, **options: Any) -> Any:
    trainer = L.Trainer(**{**QUIET, **options})
    trainer.fit(module(L, **(body or {})), loader() if train is None else train, val)
    return trainer


def module(L: Any, without: tuple[str, ...] = (), **body: Any) -> Any:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def init(self: Any) -> None:
        super(made, self).__init__()
        self.layer = torch.nn.Linear(4, 2)

    plain = {"training_step": training_step, "configure_optimizers": configure_optimizers, "__init__": init}
    kept = {name: value for name, value in {**plain, **body}.items() if name not in without}
    made = type("Model", (L.LightningModule,), kept)
    return made()


def step(self: Any, batch: Any, batch_idx: int) -> Any:
    return self.layer(batch).square().mean()


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


# -- hooks and what they return


@program
def training_epoch_end(L: Any) -> None:
    fit(L, {"training_epoch_end": lambda self, outputs: None})


@program
def validation_epoch_end(L: Any) -> None:
    fit(L, {"validation_epoch_end": lambda self, outputs: None})


@program
def test_epoch_end(L: Any) -> None:
    L.Trainer(**QUIET).test(module(L, test_step=step, test_epoch_end=lambda self, outputs: None), loader())


@program
def both_configure_models(L: Any) -> None:
    fit(L, {"configure_model": lambda self: None, "configure_sharded_model": lambda self: None})


@program
def configure_sharded_model(L: Any) -> None:
    fit(L, {"configure_sharded_model": lambda self: None})


@program
def training_step_of_no_arguments(L: Any) -> None:
    fit(L, {"training_step": lambda self: None})


@program
def training_step_of_three_arguments(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx, optimizer_idx: None})


@program
def training_step_returns_text(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: "loss"})


@program
def training_step_returns_a_number(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: 1.0})


@program
def training_step_returns_a_dict_without_loss(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: {"a": self.layer(batch).sum()}})


@program
def training_step_returns_a_vector(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: self.layer(batch)})


@program
def training_step_returns_no_graph(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: self.layer(batch).sum().detach()})


@program
def training_step_returns_none(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: None})


@program
def manual_step_returns_text(L: Any) -> None:
    fit(L, {"training_step": lambda self, batch, batch_idx: "loss", "automatic_optimization": False})


@program
def on_train_batch_start_of_one_argument(L: Any) -> None:
    fit(L, {"on_train_batch_start": lambda self, batch: None})


@program
def on_train_batch_end_with_an_old_argument(L: Any) -> None:
    fit(L, {"on_train_batch_end": lambda self, outputs, batch, batch_idx, dataloader_idx: None})


@program
def callback_hook_with_an_old_argument(L: Any) -> None:
    body = {"on_train_batch_start": lambda self, trainer, pl_module, batch, batch_idx, dataloader_idx: None}
    fit(L, callbacks=type("Own", (L.Callback,), body)())


@program
def optimizer_step_of_old(L: Any) -> None:
    def optimizer_step(
        self: Any, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_idx: Any, closure: Any, on_tpu: Any, a: Any
    ) -> None:
        optimizer.step(closure=closure)

    fit(L, {"optimizer_step": optimizer_step})


@program
def backward_of_old(L: Any) -> None:
    fit(L, {"backward": lambda self, loss, optimizer, optimizer_idx: loss.backward()})


@program
def setup_without_a_stage(L: Any) -> None:
    fit(L, {"setup": lambda self: None})


@program
def optimizer_step_without_its_closure(L: Any) -> None:
    fit(L, {"optimizer_step": lambda self, epoch, batch_idx, optimizer, optimizer_closure: None})


@program
def validation_step_of_no_arguments(L: Any) -> None:
    fit(L, {"validation_step": lambda self: None}, val=loader())


@program
def several_loaders_and_no_dataloader_idx(L: Any) -> None:
    fit(L, {"validation_step": step}, val=[loader(), loader()])


@program
def dataloader_idx_with_one_loader(L: Any) -> None:
    fit(L, {"validation_step": lambda self, batch, batch_idx, dataloader_idx: None}, val=loader())


@program
def a_property_where_a_hook_is(L: Any) -> None:
    fit(L, {"on_train_start": 3})


# -- optimizers


@program
def configure_optimizers_returns_text(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: "sgd"})


@program
def configure_optimizers_returns_none(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: None})


@program
def configure_optimizers_returns_a_dict_without_optimizer(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: {"lr": 0.1}})


@program
def two_optimizers_under_automatic_optimization(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: [sgd(self), sgd(self)]})


@program
def a_scheduler_dict_with_an_unknown_key(L: Any) -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        return [optimizer], [{"scheduler": step_lr(optimizer), "every": 3}]

    fit(L, {"configure_optimizers": configure})


@program
def a_scheduler_dict_without_a_scheduler(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: ([sgd(self)], [{"interval": "step"}])})


@program
def a_scheduler_with_an_unknown_interval(L: Any) -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        return [optimizer], [{"scheduler": step_lr(optimizer), "interval": "batch"}]

    fit(L, {"configure_optimizers": configure})


@program
def plateau_without_a_monitor(L: Any) -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}

    fit(L, {"configure_optimizers": configure})


@program
def plateau_whose_monitor_is_not_logged(L: Any) -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "nothing"}}

    fit(L, {"configure_optimizers": configure})


@program
def a_scheduler_of_another_optimizer(L: Any) -> None:
    fit(L, {"configure_optimizers": lambda self: ([sgd(self)], [step_lr(sgd(self))])})


@program
def manual_with_clipping(L: Any) -> None:
    fit(L, {"automatic_optimization": False}, gradient_clip_val=1.0)


@program
def manual_with_accumulation(L: Any) -> None:
    fit(L, {"automatic_optimization": False}, accumulate_grad_batches=2)


@program
def manual_backward_under_automatic_optimization(L: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.layer(batch).sum())

    fit(L, {"training_step": training_step})


@program
def clipping_by_an_unknown_algorithm(L: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.clip_gradients(self.optimizers(), 1.0, "l2")

    fit(L, {"training_step": training_step, "automatic_optimization": False})


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


# -- logging


def logs(*args: Any, **options: Any) -> dict[str, Any]:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log(*args, **options)
        return self.layer(batch).sum()

    return {"training_step": training_step}


@program
def log_without_a_trainer(L: Any) -> None:
    module(L).log("a", 1.0)


@program
def log_in_configure_optimizers(L: Any) -> None:
    def configure(self: Any) -> Any:
        self.log("a", 1.0)
        return sgd(self)

    fit(L, {"configure_optimizers": configure})


@program
def log_in_on_fit_start(L: Any) -> None:
    fit(L, {"on_fit_start": lambda self: self.log("a", 1.0)})


@program
def log_each_step_in_an_epoch_hook(L: Any) -> None:
    fit(L, {"on_train_epoch_end": lambda self: self.log("a", 1.0, on_step=True)})


@program
def log_a_vector(L: Any) -> None:
    fit(L, logs("a", torch.ones(3)))


@program
def log_text(L: Any) -> None:
    fit(L, logs("a", "text"))


@program
def log_a_dict(L: Any) -> None:
    fit(L, logs("a", {"b": 1.0}))


@program
def log_by_an_unknown_reduction(L: Any) -> None:
    fit(L, logs("a", 1.0, reduce_fx="median", on_epoch=True))


@program
def log_a_name_that_is_no_text(L: Any) -> None:
    fit(L, logs(3, 1.0))


@program
def log_nothing_at_all(L: Any) -> None:
    fit(L, logs("a", 1.0, on_step=False, on_epoch=False))


@program
def log_with_other_options_the_second_time(L: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("a", 1.0, on_epoch=bool(batch_idx))
        return self.layer(batch).sum()

    fit(L, {"training_step": training_step})


@program
def early_stopping_on_what_is_not_logged(L: Any) -> None:
    early = importlib.import_module(f"{L.__name__}.callbacks").EarlyStopping("nothing")
    fit(L, {"validation_step": step}, val=loader(), callbacks=early)


@program
def checkpoint_of_what_is_not_logged(L: Any) -> None:
    best = importlib.import_module(f"{L.__name__}.callbacks").ModelCheckpoint(monitor="nothing")
    fit(L, {"validation_step": step}, val=loader(), callbacks=best, enable_checkpointing=True)


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


def answer(run: Callable[[Any], Any], L: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """The class and text of the error (or "", ""), and those of each warning."""
    error, text = "", ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            run(L)
        except (Exception, SystemExit) as raised:
            error, text = type(raised).__name__, str(raised)
    return error, text, [(w.category.__name__, str(w.message)) for w in seen]


def main() -> None:
    package = {"lightning": "lightning.pytorch", "lit_fast": "lit_fast.pytorch"}[sys.argv[1]]
    logging.disable(logging.CRITICAL)
    for name, run in PROGRAMS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        error, text, said = answer(run, importlib.import_module(package))
        print(f"{name}\n    {error or 'no error'}: {inspect.cleandoc(text)[:400]}")
        for category, message in said:
            print(f"    warns {category}: {message[:200]}")


if __name__ == "__main__":
    main()

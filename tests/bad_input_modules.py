"""Programs whose mistake is inside the module: its hooks, its optimizers, what it logs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from bad_input_programs import QUIET, fit, loader, module, program, step

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

"""Fits that LearningRateMonitor and callbacks of one's own watch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from callback_programs import Names, make_trainer
from fit_programs import error, program, scored
from torch import nn

# -- LearningRateMonitor


def _rows(names: Names) -> Any:
    class Rows(names("loggers", "Logger")):  # type: ignore[misc]
        name, version = "rows", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            rates = {name: round(float(value), 9) for name, value in metrics.items() if name not in ("epoch", "score")}
            if rates:
                self.rows.append(rates)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Rows()


def _monitored(names: Names, root: str, configure: Callable[[Any], Any], **given: Any) -> Any:
    """Every row of the logger, and what the callback keeps."""
    trainer_options, methods = given.pop("trainer", {}), given.pop("module", {})
    rows, monitor = _rows(names), names("callbacks", "LearningRateMonitor")(**given)
    module = scored(names, [1.0] * 40, configure_optimizers=configure, **methods)
    trainer = make_trainer(
        names, root, callbacks=monitor, **{"logger": rows, "max_epochs": 2, "log_every_n_steps": 2, **trainer_options}
    )
    failed = error(lambda: trainer.fit(module))
    if failed:
        return failed
    shown = {name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name[0] == "l"}
    rows.rows = [row for row in rows.rows if "val_batch" not in row]
    return [rows.rows, monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values, shown]


def _halving(optimizer: Any, **config: Any) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), **config}


def _two_groups(self: Any) -> Any:
    return torch.optim.SGD(
        [{"params": [self.layer.weight], "name": "weight"}, {"params": [self.layer.bias], "lr": 0.5}],
        lr=0.1, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip


def _scheduled(**config: Any) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1, betas=(0.8, 0.9))
        return {"optimizer": optimizer, "lr_scheduler": _halving(optimizer, **config)}

    return configure


@program
def rates_of_one_optimizer(names: Names, root: str) -> Any:
    """With a scheduler of each interval and none, asked for per step, per epoch and as often as it steps."""
    both = {"log_momentum": True, "log_weight_decay": True}
    plain: list[Callable[[Any], Any]] = [
        lambda self: torch.optim.SGD(self.parameters(), lr=0.1), _two_groups, _scheduled(interval="step"),
        _scheduled(interval="epoch", name="warm up"), _scheduled(interval="step", frequency=2, name="often"),
    ]  # fmt: skip
    return [
        _monitored(names, root, configure, logging_interval=interval, **both)
        for interval in (None, "step", "epoch")
        for configure in plain
    ]


@program
def rates_of_several_optimizers(names: Names, root: str) -> Any:
    def by_hand(self: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).square().mean())
            optimizer.step()
        if batch_idx == 3:
            for scheduler in self.lr_schedulers() or ():
                scheduler.step()

    def configure(*kinds: Any) -> Callable[[Any], Any]:
        def optimizers(self: Any) -> Any:
            made, schedulers = [], []
            for kind, config in kinds:
                optimizer = getattr(torch.optim, kind)(self.parameters(), lr=0.1 + len(made))
                made.append(optimizer)
                schedulers += [] if config is None else [_halving(optimizer, **config)]
                if config == {"interval": "twice"}:
                    schedulers[-1:] = [_halving(optimizer), _halving(optimizer, name="second")]
            self.automatic_optimization = False
            return made, schedulers

        return optimizers

    kinds: list[list[tuple[str, Any]]] = [
        [("SGD", None), ("SGD", None)], [("SGD", None), ("Adam", None), ("SGD", None)],
        [("SGD", None), ("SGD", {})], [("SGD", {}), ("Adam", {}), ("SGD", {})],
        [("SGD", {"name": "a"}), ("SGD", {"name": "b"})], [("SGD", {"name": "a"}), ("SGD", {}), ("SGD", {})],
        [("SGD", {"name": "a"}), ("SGD", {"name": "a"})], [("SGD", {}), ("SGD", {"name": "a"}), ("SGD", {"name": "b"})],
        [("SGD", {"interval": "step"}), ("Adam", {"interval": "epoch"})], [("SGD", None), ("Adam", {"name": "x"})],
    ]  # fmt: skip
    return [
        _monitored(names, root, configure(*chosen), logging_interval=interval, log_momentum=True,
                   module={"training_step": by_hand})
        for chosen in kinds for interval in (None, "epoch", "step")
    ]  # fmt: skip


@program
def rates_of_groups_that_come_later(names: Names, root: str) -> Any:
    def add(self: Any) -> None:
        if self.current_epoch == 2:
            optimizer = self.trainer.optimizers[0]
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01 * self.current_epoch})

    return [
        _monitored(names, root, configure, logging_interval=interval, log_momentum=True, trainer={"max_epochs": 4},
                   module={"on_train_epoch_start": add})
        for configure in (lambda self: torch.optim.SGD(self.parameters(), lr=0.1), _two_groups,
                          lambda self: torch.optim.SGD([{"params": self.parameters(), "name": "all"}], lr=0.1))
        for interval in (None, "epoch", "step")
    ]  # fmt: skip


@program
def rates_in_other_runs(names: Names, root: str) -> Any:
    """Accumulation, no rows, fast_dev_run, no logger, no optimizer, twice the same name, no weight decay."""

    def plain(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def twice(self: Any) -> Any:
        return torch.optim.SGD([{"params": [p], "name": "p"} for p in self.parameters()], lr=0.1)

    def clash(self: Any, names_given: Any = ({"name": "pg2"}, {})) -> Any:
        return torch.optim.SGD(
            [{"params": [p], **n} for p, n in zip(self.parameters(), names_given, strict=True)], lr=0.1
        )

    monitor = names("callbacks", "LearningRateMonitor")
    found = [
        _monitored(names, root, _scheduled(interval="step"), trainer={"accumulate_grad_batches": 2}),
        _monitored(names, root, _scheduled(interval="step"), logging_interval="step",
                   trainer={"accumulate_grad_batches": 3, "log_every_n_steps": 1}),
        _monitored(names, root, _scheduled(interval="step"), trainer={"log_every_n_steps": 50}),
        _monitored(names, root, plain, trainer={"log_every_n_steps": 0}, logging_interval="epoch"),
        _monitored(names, root, plain, trainer={"logger": False}),
        _monitored(names, root, lambda self: None),
        _monitored(names, root, twice), _monitored(names, root, clash),
        error(lambda: monitor(logging_interval="batch")), error(lambda: monitor("epoch", True, True)),
    ]  # fmt: skip
    callback = monitor()
    make_trainer(names, root, callbacks=callback, fast_dev_run=True, logger=True).fit(scored(names, [1.0]))
    return [found, callback.lrs]


# -- LambdaCallback and the base


@program
def lambda_callbacks_hear_every_hook(names: Names, root: str) -> Any:
    """In the order in which they are called in a fit with checkpoint, a validation, a test, a prediction."""
    calls: list[str] = []
    make = names("callbacks", "LambdaCallback")
    hooks = sorted(name for name, value in vars(names("callbacks", "Callback")).items()
                   if callable(value) and (name.startswith("on_") or name in ("setup", "teardown")))  # fmt: skip

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append(f"{name}/{len(args) + len(kwargs)}")

    callback = make(**{name: note(name) for name in hooks})
    module = scored(names, [1.0] * 9, test_step=lambda self, batch, i: None, predict_step=lambda self, batch, i: batch)
    trainer = make_trainer(names, root, callbacks=callback, max_epochs=1, limit_train_batches=1)
    trainer.fit(module)
    trainer.save_checkpoint(f"{root}/a.ckpt")
    loader = module.val_dataloader()
    trainer.validate(module, loader, verbose=False)
    trainer.test(module, loader, ckpt_path=f"{root}/a.ckpt", verbose=False)
    trainer.predict(module, loader)
    broken = scored(names, [1.0] * 9, training_step=lambda self, batch, i: 1 / 0)
    make_trainer_error = error(lambda: make_trainer(names, root, callbacks=callback).fit(broken))
    return [hooks, calls, make_trainer_error, error(lambda: make(on_epoch=print)),
            error(lambda: make(on_train_end=None))]  # fmt: skip


@program
def hooks_have_the_same_arguments(names: Names, root: str) -> Any:
    base = names("callbacks", "Callback")
    return {
        name: [[p.name, str(p.kind), p.default if p.default is not p.empty else "none"]
               for p in inspect.signature(value).parameters.values()]
        for name, value in sorted(vars(base).items())
        if inspect.isfunction(value) and not name.startswith("__") and name not in ("live_hooks", "_without")
    }  # fmt: skip


@program
def states_are_kept_by_key(names: Names, root: str) -> Any:
    """A subclass's key, one that is overridden, several instances, a state that nobody takes back."""
    base, calls = names("callbacks", "Callback"), []

    class Counting(base):  # type: ignore[misc]
        def __init__(self, tag: str = "x", n: int = 0) -> None:
            self.tag, self.n = tag, n

        @property
        def state_key(self) -> str:
            return self._generate_state_key(tag=self.tag, values=[1, (2.5, None)], nested={"a": "b'c"})

        def state_dict(self) -> dict[str, Any]:
            calls.append(f"state_dict {self.tag}")
            return {"n": self.n}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            calls.append(f"load_state_dict {self.tag} {state_dict['n']}")
            self.n = state_dict["n"]

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            calls.append(f"on_save_checkpoint {self.tag} {'callbacks' in checkpoint} {'state_dict' in checkpoint}")
            checkpoint["mine " + self.tag] = 1

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            calls.append(f"on_load_checkpoint {self.tag} {checkpoint['mine ' + self.tag]}")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.n += 1
            self.log("seen_" + self.tag, float(self.n), prog_bar=True)
            self.log_dict({"also_" + self.tag: 2.0}, on_epoch=True)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("batch_" + self.tag, float(batch_idx), on_step=True, on_epoch=True)

        def on_validation_batch_end(self, *args: Any) -> None:
            self.log("val_" + self.tag, float(args[-1]))

    class Silent(base):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            return {}

    class Plain(Counting):
        state_key = base.state_key

    callbacks = [Counting("a"), Counting("b", 5), Silent(), Plain("c", 9)]
    trainer = make_trainer(names, root, callbacks=callbacks, max_epochs=2)
    trainer.fit(scored(names, [1.0] * 9))
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    trainer.save_checkpoint(f"{root}/a.ckpt")
    saved = torch.load(f"{root}/a.ckpt", weights_only=False)
    calls.append("resume")
    fresh = [Plain("c"), Counting("a"), Silent(), Counting("z")]
    fresh[-1].on_load_checkpoint = lambda *args: None  # its key is in no checkpoint
    make_trainer(names, root, callbacks=fresh, max_epochs=3).fit(scored(names, [1.0] * 9), ckpt_path=f"{root}/a.ckpt")
    return [saved["callbacks"], [c.n for c in fresh if hasattr(c, "n")], metrics, calls,
            [name for name in saved if name.startswith("mine")]]  # fmt: skip

"""The programs that lightning_recorder.py runs, about testing, predicting, and several loaders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_recorder import Framework, Recorder, Rows, loader, make_callback, make_module, make_trainer
from lightning_scenarios import SCENARIOS, Stream, fit
from torch.utils.data import DataLoader


def plain(value: Any) -> Any:
    """Something that json can hold; a tensor is its numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def running(method: str, **arguments: Any) -> Callable[[Recorder, Any, Any], None]:
    def run(record: Recorder, model: Any, data: Any) -> None:
        quiet = {} if method == "predict" else {"verbose": False}
        answer = getattr(record.trainer, method)(model, datamodule=data, **quiet, **arguments)
        record.facts["returned"] = plain(answer)
        for name in ("num_test_batches", "num_predict_batches"):
            record.facts[name] = str(getattr(record.trainer, name))

    return run


def logs_test(**options: Any) -> dict[str, Any]:
    def test_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("loss", float(batch_idx + 10 * dataloader_idx), **options)
        return {"loss": batch_idx}

    return {"test_step": test_step}


def logs_own_name() -> dict[str, Any]:
    def test_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log(f"loss_{'ab'[dataloader_idx]}", float(batch_idx), add_dataloader_idx=False)

    return {"test_step": test_step}


def predicts() -> dict[str, Any]:
    def predict_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"rows": batch * 2, "at": (batch_idx, dataloader_idx)}

    return {"predict_step": predict_step}


def two() -> list[Any]:
    return [loader(2, 1), loader(1, 2)]


def stage_scenarios() -> None:
    def both_keys(self: Any) -> None:
        self.log("at_end", 1.0)

    table: dict[str, dict[str, Any]] = {
        "test": {"test": lambda: loader(2, 1), "module": logs_test()},
        "test_two_loaders": {"test": two, "module": logs_test()},
        "test_two_loaders_on_step": {
            "test": two,
            "module": {**logs_test(on_step=True, on_epoch=True), "on_test_epoch_end": both_keys},
        },
        "test_own_name_for_each_loader": {"test": two, "module": logs_own_name()},
        "test_not_to_loggers": {"test": two, "module": logs_test(logger=False, prog_bar=True)},
        "test_dict_of_loaders": {"test": lambda: {"a": loader(2, 1), "b": loader(1, 2)}, "module": logs_test()},
        "test_nested_loaders": {
            "test": lambda: {"a": [loader(2, 1), loader(1, 2)], "b": loader(1, 3)},
            "module": logs_test(),
        },
        "test_limit_1": {"test": two, "module": logs_test(), "limit_test_batches": 1},
        "test_limit_0": {"test": two, "module": logs_test(), "limit_test_batches": 0},
        "test_limit_half": {"test": lambda: loader(4, 1), "module": logs_test(), "limit_test_batches": 0.5},
        "test_combined_max_size": {"test": "max_size"},
        "test_combined_min_size": {"test": "min_size"},
        "test_combined_max_size_cycle": {"test": "max_size_cycle"},
        "predict": {"predict": lambda: loader(2, 1), "module": predicts()},
        "predict_default_step": {"predict": lambda: loader(1, 1)},
        "predict_two_loaders": {"predict": two, "module": predicts()},
        "predict_dict_of_loaders": {"predict": lambda: {"a": loader(1, 1), "b": loader(1, 2)}, "module": predicts()},
        "predict_limit_1": {"predict": two, "module": predicts(), "limit_predict_batches": 1},
        "predict_limit_0": {"predict": two, "module": predicts(), "limit_predict_batches": 0},
        "predict_nothing_returned": {"predict": two, "module": predicts(), "arguments": {"return_predictions": False}},
        "predict_one_in_a_list": {"predict": lambda: [loader(2, 1)], "module": predicts()},
    }
    for name, options in table.items():
        SCENARIOS[name] = lambda fw, root, options=options, name=name: stage(fw, root, name, dict(options))


def stage(fw: Framework, root: str, name: str, options: dict[str, Any]) -> Recorder:
    method = name.partition("_")[0]
    given = options.pop(method)
    if isinstance(given, str):
        options["module"] = sees_combined()
        combined = fw.get("utilities.combined_loader", "CombinedLoader")
        options[method] = combined({"a": loader(3, 1), "b": loader(1, 2)}, mode=given)
    else:
        options[method] = given()
    run = running(method, **options.pop("arguments", {}))
    return fit(fw, root, run=run, closure=True, logger=True, **options)


def sees_combined() -> dict[str, Any]:
    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        parts = [value for value in batch.values() if value is not None]
        self.log("parts", float(len(parts)), batch_size=1)

    return {"test_step": test_step}


stage_scenarios()


def scenario(function: Callable[[Framework, str], Any]) -> Callable[[Framework, str], Any]:
    SCENARIOS[function.__name__] = function
    return function


def checkpointing(fw: Framework, root: str, run: Callable[[Recorder, Any, Any], None]) -> Recorder:
    """Runs with a ModelCheckpoint that watches a value which is best in the first of two epochs."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("worse", float(self.trainer.current_epoch))

    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.layer.weight.sum())

    def add(record: Recorder) -> list[Any]:
        made = fw.get("callbacks", "ModelCheckpoint")
        return [made(dirpath=os.path.join(root, "c"), monitor="worse", save_last=True, filename="{epoch}")]

    return fit(
        fw,
        root,
        val=loader(1, 1),
        test=loader(1, 2),
        predict=loader(1, 3),
        module={"validation_step": validation_step, "test_step": test_step},
        extra_callbacks=add,
        enable_checkpointing=True,
        run=run,
    )


def weight(record: Recorder) -> float:
    return float(record.module.layer.weight.sum())


@scenario
def test_the_best_checkpoint(fw: Framework, root: str) -> Recorder:
    def run(record: Recorder, model: Any, data: Any) -> None:
        record.trainer.fit(model, datamodule=data)
        record.losses.append(weight(record))
        record.events = []
        for ckpt_path in ("best", "last", None):
            record.trainer.test(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)
            record.losses.append(weight(record))
            record.facts[str(ckpt_path)] = Path(record.trainer.ckpt_path or "none").name

    return checkpointing(fw, root, run)


@scenario
def no_model_means_the_best_checkpoint(fw: Framework, root: str) -> Recorder:
    def run(record: Recorder, model: Any, data: Any) -> None:
        record.trainer.fit(model, datamodule=data)
        record.events = []
        record.trainer.validate(datamodule=data, verbose=False)
        record.losses.append(weight(record))
        record.trainer.test(datamodule=data, ckpt_path="last", verbose=False)
        record.losses.append(weight(record))
        record.trainer.predict(datamodule=data)
        record.losses.append(weight(record))

    return checkpointing(fw, root, run)


@scenario
def fit_test_predict_fit(fw: Framework, root: str) -> Recorder:
    """One trainer for everything, and what its numbers of batches are meanwhile."""

    def run(record: Recorder, model: Any, data: Any) -> None:
        trainer = record.trainer
        for method in ("fit", "validate", "test", "predict", "fit"):
            getattr(trainer, method)(model, datamodule=data)
            trainer.fit_loop.max_epochs = 2
            names = ("num_training_batches", "num_val_batches", "num_test_batches", "num_predict_batches")
            now = {name: str(getattr(trainer, name)) for name in names}
            record.seen.append({"after": method, **now, "stage": str(trainer.state.stage)})

    data = {"val": loader(1, 1), "test": loader(2, 2), "predict": loader(3, 3)}
    return fit(fw, root, train=loader(2), run=run, max_epochs=1, **data)


@scenario
def test_with_the_modules_loaders(fw: Framework, root: str) -> Recorder:
    """No data module: loaders come from the module's own hooks, or from the arguments."""
    record = Recorder(fw)
    body = {
        "test_dataloader": lambda self: (record.event("lm", "test_dataloader"), loader(2))[1],
        "predict_dataloader": lambda self: (record.event("lm", "predict_dataloader"), loader(1, 1))[1],
    }
    trainer = make_trainer(record, root, callbacks=[make_callback(record, "a")])
    trainer.test(make_module(record, body), verbose=False)
    trainer.predict(record.module)
    trainer.test(make_module(record), loader(1), verbose=False)
    trainer.predict(record.module, [loader(1), loader(1)])
    return record


def failing_in(method: str, kind: type[BaseException]) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise kind

    def run(record: Recorder, model: Any, data: Any) -> None:
        try:
            getattr(record.trainer, method)(model, datamodule=data)
        except BaseException as error:
            record.facts["raised"] = type(error).__name__
            record.facts["exit_code"] = getattr(error, "code", None)
        record.facts["interrupted"] = record.trainer.interrupted

    def failing(fw: Framework, root: str) -> Recorder:
        names = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
        data = {{"validate": "val"}.get(method, method): loader(2)}
        return fit(fw, root, module={names[method]: step}, run=run, logger=True, **data)

    SCENARIOS[f"{kind.__name__}_in_{method}"] = failing


for _method in ("validate", "test", "predict"):
    failing_in(_method, ZeroDivisionError)
    failing_in(_method, KeyboardInterrupt)


@scenario
def modes_around_the_stages(fw: Framework, root: str) -> Recorder:
    """A submodule that was in evaluation mode stays so; a hook that is overridden decides alone."""

    def note(record: Recorder, at: str) -> None:
        modes = [child.training for child in record.module.modules()]
        record.seen.append({"at": at, "modes": modes})

    def build(own: bool) -> dict[str, Any]:
        def on_test_model_train(self: Any) -> None:
            self.layer.train(False)

        def test_step(self: Any, batch: Any, batch_idx: int) -> None:
            note(record, "test_step")

        body: dict[str, Any] = {"test_step": test_step}
        return {**body, "on_test_model_train": on_test_model_train} if own else body

    record = Recorder(fw)
    for own in (False, True):
        trainer = make_trainer(record, root)
        module = _bare(fw, build(own))
        record.module = module
        module.layer.train(not own)
        trainer.test(module, loader(1), verbose=False)
        note(record, "after test")
        trainer.predict(module, loader(1))
        note(record, "after predict")
    record.events = []
    return record


def _bare(fw: Framework, body: dict[str, Any]) -> Any:
    """A module that overrides only what `body` says, and forward."""

    class Bare(fw.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    return type("Body", (Bare,), body)()


def collects() -> dict[str, Any]:
    """A training step that writes down what it is given."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.trainer.callbacks[0].record.seen.append({"b": batch_idx, "batch": shape(batch)})
        tensors = [part for part in torch.utils._pytree.tree_leaves(batch) if part is not None]
        return sum(self(part).square().mean() for part in tensors)

    return {"training_step": training_step}


def shape(batch: Any) -> Any:
    """A batch with each tensor replaced by its first number."""
    if isinstance(batch, torch.Tensor):
        return round(float(batch.flatten()[0]), 6)
    if isinstance(batch, dict):
        return {key: shape(part) for key, part in batch.items()}
    return [shape(part) for part in batch] if isinstance(batch, list | tuple) else batch


def shuffled(batches: int, seed: int) -> Any:
    return DataLoader(Rows(2 * batches, seed), batch_size=2, shuffle=True)


def train_scenarios() -> None:
    loaders: dict[str, Callable[[], Any]] = {
        "list": lambda: [loader(4, 1), loader(2, 2)],
        "list_of_one": lambda: [loader(2, 1)],
        "tuple": lambda: (loader(1, 1), loader(3, 2)),
        "dict": lambda: {"a": loader(2, 1), "b": loader(3, 2)},
        "nested": lambda: {"a": [loader(1, 1), loader(2, 2)], "b": loader(3, 3)},
        "shuffled": lambda: {"a": shuffled(2, 1), "b": shuffled(3, 2)},
    }
    for name, make in loaders.items():
        SCENARIOS[f"fit_{name}_of_loaders"] = lambda fw, root, make=make: fit(
            fw, root, train=make(), module=collects(), callbacks=({},), max_epochs=2
        )
    SCENARIOS["fit_loaders_limited"] = lambda fw, root: fit(
        fw, root, train=[loader(4, 1), loader(2, 2)], module=collects(), limit_train_batches=0.5, max_epochs=2
    )
    for mode in ("min_size", "max_size", "max_size_cycle"):
        for limit in (1.0, 2):
            name = f"fit_combined_{mode}" + ("_limited" if limit == 2 else "")
            SCENARIOS[name] = lambda fw, root, mode=mode, limit=limit: fit_combined(fw, root, mode, limit)
    SCENARIOS["fit_overfit_batches"] = lambda fw, root: fit(
        fw, root, train=shuffled(4, 1), val=shuffled(4, 2), module=collects(), overfit_batches=2
    )
    SCENARIOS["fit_overfit_half"] = lambda fw, root: fit(
        fw, root, train=[shuffled(4, 1), shuffled(2, 2)], val=loader(4, 2), module=collects(), overfit_batches=0.5
    )
    for every in (1, 2):
        SCENARIOS[f"fit_reload_every_{every}"] = lambda fw, root, every=every: fit(
            fw,
            root,
            train=lambda: loader(2),
            val=lambda: loader(1, 1),
            reload_dataloaders_every_n_epochs=every,
            max_epochs=3,
            callbacks=({},),
        )
    SCENARIOS["fit_reload_where_validation_is_rare"] = lambda fw, root: fit(
        fw,
        root,
        train=lambda: loader(1),
        val=lambda: loader(1, 1),
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=2,
        max_epochs=4,
        callbacks=({},),
    )


def fit_combined(fw: Framework, root: str, mode: str, limit: float) -> Recorder:
    combined = fw.get("utilities.combined_loader", "CombinedLoader")
    train = combined({"a": loader(4, 1), "b": loader(3, 2)}, mode=mode)
    return fit(fw, root, train=train, module=collects(), callbacks=({},), limit_train_batches=limit)


train_scenarios()


def iterating(each: int, fails: bool = False) -> dict[str, Any]:
    """Steps that take `dataloader_iter` and fetch `each` batches."""

    def fetched(self: Any, dataloader_iter: Any) -> Any:
        record = self.trainer.callbacks[0].record
        taken = [next(dataloader_iter) for _ in range(each)]
        record.seen.append({"at": record.stage(), "taken": [(shape(b), i, d) for b, i, d in taken]})
        return sum(self(batch).square().mean() for batch, _, _ in taken)

    def training_step(self: Any, dataloader_iter: Any) -> Any:
        return fetched(self, dataloader_iter)

    def validation_step(self: Any, dataloader_iter: Any) -> Any:
        return fetched(self, dataloader_iter)

    def test_step(self: Any, dataloader_iter: Any) -> Any:
        return fetched(self, dataloader_iter)

    def predict_step(self: Any, dataloader_iter: Any) -> Any:
        return fetched(self, dataloader_iter)

    steps = (training_step, validation_step, test_step, predict_step)
    return {step.__name__: step for step in steps}


def iterator_scenarios() -> None:
    for each in (1, 2):
        SCENARIOS[f"fit_dataloader_iter_{each}"] = lambda fw, root, each=each: fit(
            fw, root, train=loader(4), val=loader(2, 1), module=iterating(each), callbacks=({},), max_epochs=2
        )
        for method in ("test", "predict"):
            SCENARIOS[f"{method}_dataloader_iter_{each}"] = lambda fw, root, method=method, each=each: fit(
                fw, root, module=iterating(each), run=running(method), **{method: loader(4)}
            )
    SCENARIOS["fit_dataloader_iter_without_length"] = lambda fw, root: fit(
        fw, root, train=DataLoader(Stream(), batch_size=2), module=iterating(1), max_epochs=2
    )


iterator_scenarios()


@scenario
def fit_with_nested_val_loaders(fw: Framework, root: str) -> Recorder:
    def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("v", float(batch_idx + 10 * dataloader_idx))

    val = {"a": loader(2, 1), "b": [loader(1, 2), loader(1, 3)]}
    return fit(fw, root, val=val, module={"validation_step": validation_step}, logger=True, max_epochs=1)

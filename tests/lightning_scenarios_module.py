"""More programs for lightning_recorder.py: every edge of self.log, and what a module keeps of its arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_recorder import Framework, Recorder, Rows, loader, make_callback, make_module, make_trainer
from lightning_scenarios import scenario
from torch.utils.data import DataLoader

Outcome = dict[str, Any]


def outcome(run: Callable[[], Outcome | None]) -> Outcome:
    """What `run` says, or that it was refused; with the number of warnings that mention what the case is about."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            said = run() or {}
        except Exception as error:
            said = {"refused": type(error).__name__ if "Misconfiguration" in type(error).__name__ else "error"}
    about = ("log", "batch_size", "batch size", "hparam", "hyperparam", "nn.Module")
    ours = [w for w in heard if "lightning" in w.filename or "lit_fast" in w.filename or "self.log" in str(w.message)]
    texts = {str(w.message) for w in ours if any(word in str(w.message) for word in about)}
    return {**said, "warned": bool([t for t in texts if "num_workers" not in t and "no logger configured" not in t])}


def seen(metrics: Any) -> Outcome:
    """Name, value, dtype and shape of each published metric."""
    return {
        name: [
            round(float(value), 6) if value.numel() == 1 else value.tolist(),
            str(value.dtype),
            list(value.shape),
            value.requires_grad,
        ]
        for name, value in sorted(metrics.items())
    }


def one_fit(fw: Framework, root: str, log: Any, data: Any = None, body: Any = None, **options: Any) -> Outcome:
    """A fit of one epoch whose training step calls `log(module, batch, batch_idx)`."""
    record = Recorder(fw)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        log(self, batch, batch_idx)
        return self.layer(torch.ones(1, 4)).square().mean()

    trainer = make_trainer(record, root, **{"max_epochs": 1, **options})
    trainer.fit(make_module(record, {"training_step": training_step, **(body or {})}), data or loader(3))
    return {
        "callback": seen(trainer.callback_metrics),
        "logged": seen(trainer.logged_metrics),
        "bar": {name: [value, type(value).__name__] for name, value in sorted(trainer.progress_bar_metrics.items())},
    }


VALUES: dict[str, Callable[[], Any]] = {
    "float": lambda: 0.1,
    "int": lambda: 3,
    "bool": lambda: True,
    "nan": lambda: float("nan"),
    "none": lambda: None,
    "text": lambda: "0.5",
    "list": lambda: [1.0],
    "dict": lambda: {"a": 1.0},
    "nested": lambda: {"a": {"b": 1.0}},
    "numpy_float64": lambda: np.float64(0.1),
    "numpy_float32": lambda: np.float32(0.1),
    "numpy_int": lambda: np.int64(3),
    "tensor_int": lambda: torch.tensor(3),
    "tensor_bool": lambda: torch.tensor(True),
    "tensor_float64": lambda: torch.tensor(0.1, dtype=torch.float64),
    "tensor_float16": lambda: torch.tensor(0.1, dtype=torch.float16),
    "tensor_bfloat16": lambda: torch.tensor(0.1, dtype=torch.bfloat16),
    "tensor_one": lambda: torch.tensor([[0.5]]),
    "tensor_two": lambda: torch.tensor([0.5, 1.0]),
    "tensor_empty": lambda: torch.tensor([]),
    "tensor_graph": lambda: torch.tensor(0.5, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.tensor(0.5)),
}


@scenario
def log_values(fw: Framework, root: str) -> Recorder:
    record = Recorder(fw)
    for name, make in VALUES.items():
        for how, options in (("step", {"prog_bar": True}), ("epoch", {"on_step": False, "on_epoch": True})):
            record.facts[f"{name} {how}"] = outcome(
                lambda name=name, make=make, how=how, options=options: one_fit(
                    fw, root, lambda module, batch, index: module.log(f"{name}_{how}", make(), **options)
                )
            )
    return record


TWICE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same": ({}, {}),
    "prog_bar": ({"prog_bar": True}, {"prog_bar": False}),
    "logger_default": ({"logger": None}, {"logger": True}),
    "logger": ({"logger": None}, {"logger": False}),
    "on_step_default": ({"on_step": None}, {"on_step": True}),
    "on_epoch": ({}, {"on_epoch": True}),
    "reduce_same": ({"reduce_fx": "mean"}, {"reduce_fx": torch.mean}),
    "reduce_avg": ({"reduce_fx": "MEAN"}, {"reduce_fx": "avg"}),
    "reduce": ({"reduce_fx": "max"}, {"reduce_fx": "min"}),
    "batch_size": ({"batch_size": 2}, {"batch_size": 3}),
    "enable_graph": ({"enable_graph": False}, {"enable_graph": True}),
    "sync_dist": ({"sync_dist": False}, {"sync_dist": True}),
    "add_dataloader_idx": ({"add_dataloader_idx": False}, {"add_dataloader_idx": True}),
    "metric_attribute": ({"metric_attribute": None}, {"metric_attribute": "layer"}),
    "rank_zero_only": ({"rank_zero_only": False}, {"rank_zero_only": True}),
}


@scenario
def log_twice(fw: Framework, root: str) -> Recorder:
    """The same name twice in one hook with other options, and in two hooks."""
    record = Recorder(fw)
    for name, (first, second) in TWICE.items():

        def log(module: Any, batch: Any, index: int, first: Any = first, second: Any = second) -> None:
            module.log("v", 1.0, **first)
            module.log("v", 2.0, **second)

        record.facts[name] = outcome(lambda log=log: one_fit(fw, root, log))

    def again(self: Any, *args: Any) -> None:
        self.log("v", 5.0, prog_bar=True, on_epoch=True)

    for hook in ("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"):
        record.facts[f"in {hook}"] = outcome(
            lambda hook=hook: one_fit(fw, root, lambda module, batch, index: module.log("v", 1.0), body={hook: again})
        )
    return record


REDUCE: dict[str, Any] = {
    "mean": "mean", "Mean": "Mean", "avg": "avg", "sum": "sum", "min": "min", "max": "max", "median": "median",
    "torch.mean": torch.mean, "torch.sum": torch.sum, "torch.min": torch.min, "torch.max": torch.max,
    "torch.median": torch.median, "torch.amax": torch.amax, "builtin sum": sum, "builtin min": min,
    "builtin max": max, "numpy.mean": np.mean, "lambda": lambda values: values, "none": None,
}  # fmt: skip


@scenario
def log_reductions(fw: Framework, root: str) -> Recorder:
    record = Recorder(fw)
    for name, reduce_fx in REDUCE.items():
        record.facts[name] = outcome(
            lambda reduce_fx=reduce_fx: one_fit(
                fw,
                root,
                lambda module, batch, index: module.log(
                    "v", float(index), on_step=True, on_epoch=True, reduce_fx=reduce_fx
                ),
            )
        )
    return record


@dataclass
class Pair:
    first: Any
    second: Any


ones = torch.ones
BATCHES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: ones(3, 4),
    "scalar": lambda: ones(()),
    "pair": lambda: (ones(3, 4), ones(3)),
    "ambiguous": lambda: (ones(3, 4), ones(5)),
    "nested": lambda: [{"a": [ones(2, 1), ones(2)]}, (ones(2),)],
    "text first": lambda: {"a": "text", "b": ones(5)},
    "text last": lambda: {"b": ones(5), "a": "text"},
    "texts": lambda: ["one", "three"],
    "number first": lambda: (7, ones(6, 1)),
    "number": lambda: 7,
    "empty": lambda: [],
    "set": lambda: {1, 2},
    "dataclass": lambda: Pair(ones(4), ones(4, 2)),
    "dataclass of numbers": lambda: Pair(1, 2),
    "object": object,
    "numpy": lambda: np.ones((3, 2)),
}


class Once:
    """Batches as they are, in a loader that no framework looks into."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __iter__(self) -> Any:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


@scenario
def log_batch_sizes(fw: Framework, root: str) -> Recorder:
    """The weight of a batch in an epoch's mean: found in the batch (value 1), beside a batch of weight 1 (value 0)."""
    record = Recorder(fw)
    for name, make in BATCHES.items():

        def log(module: Any, batch: Any, index: int) -> None:
            module.log("v", float(index), on_step=False, on_epoch=True, batch_size=1 if index == 0 else None)
            module.log("step", 1.0)
            module.log("max", 1.0, on_step=False, on_epoch=True, reduce_fx="max")

        record.facts[name] = outcome(
            lambda make=make, log=log: one_fit(fw, root, log, Once([ones(1, 4), make()]))["callback"]
        )
        record.facts[f"{name}, steps only"] = outcome(
            lambda make=make: one_fit(fw, root, lambda module, batch, index: module.log("s", 1.0), Once([make()]))[
                "callback"
            ]
        )
    return record


@scenario
def log_outside(fw: Framework, root: str) -> Recorder:
    """Without a trainer, after a fit, from a module inside the module, and with no logger."""
    record = Recorder(fw)
    facts = record.facts

    class Inner(fw.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            self.log("inner", 1.0)
            return self.layer(x)

    for name in ("float", "text", "tensor_two"):
        facts[f"no trainer, {name}"] = outcome(lambda name=name: Inner().log("v", VALUES[name]()))
    facts["no trainer, log_dict"] = outcome(lambda: Inner().log_dict({"v": 1.0}))

    def after() -> None:
        fitted = Recorder(fw)
        trainer = make_trainer(fitted, root, max_epochs=1)
        module = make_module(fitted)
        trainer.fit(module, loader(1))
        module.log("v", 1.0)

    facts["after a fit"] = outcome(after)
    bad: dict[str, Callable[[Any], None]] = {
        "loader in the name": lambda module: module.log("v/dataloader_idx_0", 1.0),
        "loader in the name, allowed": lambda module: module.log("v/dataloader_idx_0", 1.0, add_dataloader_idx=False),
        "nowhere": lambda module: module.log("v", 1.0, on_step=False, on_epoch=False),
        "unknown option": lambda module: module.log("v", 1.0, unknown=1),
        "dict with unknown option": lambda module: module.log_dict({"v": 1.0}, unknown=1),
        "dict with metric_attribute": lambda module: module.log_dict({"v": 1.0}, metric_attribute="v"),
        "dict in a dict": lambda module: module.log_dict({"v": {"a": 1.0}}),
        "dict of text": lambda module: module.log_dict({"v": "a"}),
        "dict": lambda module: module.log_dict({"v": 1.0, "w": torch.tensor(2.0)}, prog_bar=True, logger=False),
        "dict, empty": lambda module: module.log_dict({}),
    }
    for name, log in bad.items():
        facts[name] = outcome(lambda log=log: one_fit(fw, root, lambda module, batch, index: log(module)))
    return record


@scenario
def log_metric_objects(fw: Framework, root: str) -> Recorder:
    """torchmetrics objects: where they may stand, collections, graphs, results that are no single number."""
    import torchmetrics
    from torchmetrics import ConfusionMatrix, MeanMetric, MeanSquaredError, MetricCollection, SumMetric

    record = Recorder(fw)
    facts = record.facts

    class Several(torchmetrics.Metric):  # type: ignore[misc]
        def update(self, value: Any) -> None: ...

        def compute(self) -> Any:
            return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}

    def run(name: str, make: Callable[[Any], None], log: Any, **options: Any) -> None:
        def setup(self: Any, stage: str) -> None:
            make(self)

        facts[name] = outcome(lambda: one_fit(fw, root, log, body={"setup": setup}, **options))

    def put(name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
        return lambda module: setattr(module, name, value())

    def log_it(find: Callable[[Any], Any], **options: Any) -> Any:
        def log(module: Any, batch: Any, index: int) -> None:
            metric = find(module)
            metric(float(index))
            module.log("m", metric, **options)

        return log

    both = {"on_step": True, "on_epoch": True}

    def two(module: Any) -> None:
        module.m = MeanMetric()
        module.items = [SumMetric()]

    def shared(module: Any) -> None:
        module.a = MeanMetric()
        module.b = module.a

    run("attribute", put("m", MeanMetric), log_it(lambda module: module.m))
    run("attribute, both", put("m", MeanMetric), log_it(lambda module: module.m, **both, prog_bar=True))
    modules = put("d", lambda: torch.nn.ModuleDict({"m": SumMetric()}))
    run("in a dict of modules", modules, log_it(lambda module: module.d["m"], **both))
    listed = put("items", lambda: [MeanMetric()])
    run("in a list", listed, log_it(lambda module: module.items[0]))
    run("in a list, named", listed, log_it(lambda module: module.items[0], metric_attribute="items"))
    run("in a list, another is found", two, log_it(lambda module: module.items[0]))
    run("nowhere", lambda module: None, log_it(lambda module: MeanMetric()))
    run("under two names", shared, log_it(lambda module: module.b, **both))

    def update_only(module: Any, batch: Any, index: int) -> None:
        module.m.update(float(index))
        module.log("m", module.m, **both)

    run("updated, not called", put("m", MeanMetric), update_only)

    def computed(module: Any, batch: Any, index: int) -> None:
        module.m.update(float(index))
        module.log("m", module.m.compute(), **both)

    run("computed by the user", put("m", MeanMetric), computed)

    def graph(**options: Any) -> Any:
        def log(module: Any, batch: Any, index: int) -> None:
            predicted = module.layer(batch)
            module.m(predicted, torch.zeros_like(predicted))
            module.log("m", module.m, **options)
            module.log("loss", predicted.mean(), enable_graph=True)

        return log

    shown: list[Any] = []

    def look(self: Any, *args: Any) -> None:
        shown.append({name: value.requires_grad for name, value in self.trainer.callback_metrics.items()})

    for kept in (False, True):
        shown.clear()
        facts[f"graph kept: {kept}"] = outcome(
            lambda kept=kept: one_fit(
                fw,
                root,
                graph(enable_graph=kept),
                body={"setup": lambda self, stage: put("m", MeanSquaredError)(self), "on_train_batch_end": look},
            )
        )
        facts[f"graph kept: {kept}"]["shown"] = list(shown)

    def collection(**options: Any) -> Callable[[], Any]:
        return lambda: MetricCollection({"mean": MeanMetric(), "sum": SumMetric()}, **options)

    def log_collection(module: Any, batch: Any, index: int) -> None:
        module.c(float(index))
        module.log_dict(module.c, **both)

    run("collection", put("c", collection()), log_collection)
    run("collection with prefix", put("c", collection(prefix="train_", postfix="_x")), log_collection)
    run("collection by log", put("c", collection()), lambda module, batch, index: module.log("c", module.c))

    def dict_of_metrics(module: Any, batch: Any, index: int) -> None:
        module.c(1.0)
        module.log_dict({"a": module.c["mean"], "b": module.c["sum"]})

    run("dict of metrics", put("c", collection()), dict_of_metrics)

    def matrix(**options: Any) -> Any:
        def log(module: Any, batch: Any, index: int) -> None:
            module.m(torch.tensor([0, 1]), torch.tensor([0, 1]))
            module.log("m", module.m, on_step=False, on_epoch=True, **options)

        return log

    def several(module: Any, batch: Any, index: int) -> None:
        module.m.update(1.0)
        module.log("m", module.m, on_step=False, on_epoch=True)

    confusion = put("m", lambda: ConfusionMatrix(task="binary"))
    run("a matrix", confusion, matrix(logger=False))
    run("a matrix on the bar", confusion, matrix(prog_bar=True))
    run("a dict", put("m", Several), several)
    return record


@scenario
def log_metric_resets(fw: Framework, root: str) -> Recorder:
    """When a torchmetrics object is reset, seen at the hooks around an epoch's end."""
    from torchmetrics import SumMetric

    record = Recorder(fw)
    counts: list[Any] = []

    def setup(self: Any, stage: str) -> None:
        self.train_sum, self.val_sum, self.own = SumMetric(), SumMetric(), SumMetric()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.train_sum(float(batch_idx))
        self.own.update(1.0)
        self.log("train_sum", self.train_sum, on_step=True, on_epoch=True)
        return self(batch).square().mean()

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.val_sum.update(float(batch_idx))
        self.log("val_sum", self.val_sum)

    def look(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> None:
            module = record.module
            counts.append([name, *(m._update_count for m in (module.train_sum, module.val_sum, module.own))])
            if name == "on_train_epoch_end" and self is module:
                self.log("own", self.own)

        return hook

    hooks = "on_train_epoch_start on_validation_epoch_end on_validation_end on_train_epoch_end on_train_end".split()
    body = {"setup": setup, "training_step": training_step, "validation_step": validation_step}
    callback = make_callback(record, "a", {name: look(name) for name in hooks})
    trainer = make_trainer(record, root, callbacks=[callback], max_epochs=2)
    trainer.fit(make_module(record, {**body, **{name: look(name) for name in hooks}}), loader(3), loader(2, 1))
    record.events = []
    record.facts["counts"] = counts
    record.facts["callback"] = seen(trainer.callback_metrics)
    return record


@scenario
def log_several_loaders(fw: Framework, root: str) -> Recorder:
    """With several validation loaders: one name in both, with and without the loader's index; each hook."""
    facts: dict[str, Any] = {}

    def run(name: str, step: Any, **hooks: Any) -> None:
        def go() -> Outcome:
            record = Recorder(fw)
            trainer = make_trainer(record, root, max_epochs=1, num_sanity_val_steps=0)
            module = make_module(record, {"validation_step": step, **hooks})
            trainer.fit(module, loader(2), [loader(2, 1), DataLoader(Rows(5, 2), batch_size=2)])
            return {"callback": seen(trainer.callback_metrics), "logged": seen(trainer.logged_metrics)}

        facts[name] = outcome(go)

    def step(**options: Any) -> Any:
        def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("v", float(batch_idx + 10 * dataloader_idx), **options)

        return validation_step

    run("default", step())
    run("without index", step(add_dataloader_idx=False))
    run("forked", step(on_step=True, on_epoch=True, prog_bar=True))
    run("maximum", step(reduce_fx="max"))

    def batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("end", float(dataloader_idx))

    def epoch_end(self: Any) -> None:
        self.log("epoch", 3.0)
        self.log("copied", self.trainer.callback_metrics["v/dataloader_idx_1"])

    run("hooks", step(), on_validation_batch_end=batch_end, on_validation_epoch_end=epoch_end)
    record = Recorder(fw)
    record.facts = facts
    return record

"""Runs the same small programs under Lightning or under lit_fast and writes down what happened, as JSON.

    python tests/lightning_recorder.py --framework lightning --out tests/goldens/lightning_2_6_6.json
    python tests/lightning_recorder.py --framework lit_fast fit_no_validation clip_norm

An event is one line of text: who was called, which hook, and the cheap facts that it can see at that moment.

    lm.validation_step b=1 step=5 epoch=0 validate eval no_grad grads

`b` is batch_idx, `dl` dataloader_idx, `for` the stage given to setup, `step` trainer.global_step, `epoch`
trainer.current_epoch; then, where it is not training, the stage (sanity, validate, none); `eval` where
module.training is off; `no_grad` where torch.is_grad_enabled() is off; `grads` where every parameter has a
gradient, `some_grads` where some have. The scenarios stand in lightning_scenarios*.py; goldens/lightning_2_6_6*.json
hold the records of all of them, those of lightning_scenarios_stages.py in a file of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

MODULE_HOOKS = tuple(
    """
    configure_callbacks prepare_data setup teardown configure_model configure_optimizers
    on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start on_train_epoch_end
    on_train_batch_start on_train_batch_end on_before_backward on_after_backward on_before_zero_grad
    on_before_optimizer_step on_validation_model_zero_grad on_validation_model_eval on_validation_model_train
    on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end
    on_validation_batch_start on_validation_batch_end on_save_checkpoint on_load_checkpoint
    on_test_model_eval on_test_model_train on_test_start on_test_end on_test_epoch_start on_test_epoch_end
    on_test_batch_start on_test_batch_end
    on_predict_model_eval on_predict_start on_predict_end on_predict_epoch_start on_predict_epoch_end
    on_predict_batch_start on_predict_batch_end
    """.split()
)
# A module that overrides one of these changes how the step runs: recorded only where a scenario asks.
STEP_POINTS = tuple(
    """
    optimizer_step optimizer_zero_grad backward configure_gradient_clipping lr_scheduler_step
    on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer
    """.split()
)
CALLBACK_HOOKS = tuple(
    """
    setup teardown on_fit_start on_fit_end on_sanity_check_start on_sanity_check_end
    on_train_start on_train_end
    on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end on_validation_start
    on_validation_end on_validation_epoch_start on_validation_epoch_end on_validation_batch_start
    on_validation_batch_end on_exception state_dict load_state_dict on_save_checkpoint on_load_checkpoint
    on_before_backward on_after_backward on_before_optimizer_step on_before_zero_grad
    on_test_start on_test_end on_test_epoch_start on_test_epoch_end on_test_batch_start on_test_batch_end
    on_predict_start on_predict_end on_predict_epoch_start on_predict_epoch_end on_predict_batch_start
    on_predict_batch_end
    """.split()
)
DATA_HOOKS = tuple(
    """
    prepare_data setup teardown train_dataloader val_dataloader state_dict load_state_dict on_exception
    test_dataloader predict_dataloader
    """.split()
)


class Framework:
    """The names that a scenario needs, taken from one of the two packages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = {"lightning": "lightning.pytorch", "lit_fast": "lit_fast.pytorch"}[name]
        package = importlib.import_module(self.root)
        self.Trainer = package.Trainer
        self.LightningModule = package.LightningModule
        self.LightningDataModule = package.LightningDataModule
        self.Callback = package.Callback
        self.seed_everything = package.seed_everything
        self.Logger = importlib.import_module(f"{self.root}.loggers").Logger
        self.version = importlib.import_module(name).__version__

    def get(self, submodule: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{self.root}.{submodule}"), name)


class Recorder:
    """Collects events; the recording classes hold a reference to it, the trainer and the module."""

    def __init__(self, framework: Framework, *, grad_norms: bool = False, seen_metrics: tuple[str, ...] = ()) -> None:
        self.fw = framework
        self.trainer: Any = None
        self.module: Any = None
        self.events: list[str] = []
        self.grad_norms: list[float] | None = [] if grad_norms else None
        self.logged: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.seen_metrics = seen_metrics
        self.seen: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def stage(self) -> str:
        t = self.trainer
        words = {"sanity_checking": "sanity", "training": "train", "validating": "validate", "testing": "test"}
        for name, word in {**words, "predicting": "predict"}.items():
            if getattr(t, name):
                return word
        return "none"

    def event(self, owner: str, hook: str, arguments: dict[str, Any] | None = None) -> None:
        arguments = arguments or {}
        words = [f"{owner}.{hook}"]
        if "batch_idx" in arguments:
            words.append(f"b={arguments['batch_idx']}")
        if "dataloader_idx" in arguments:
            words.append(f"dl={arguments['dataloader_idx']}")
        if "stage" in arguments:
            words.append(f"for={getattr(arguments['stage'], 'value', arguments['stage'])}")
        if "outputs" in arguments:
            words.append(f"outputs={describe(arguments['outputs'])}")
        if "exception" in arguments:
            words.append(f"exception={type(arguments['exception']).__name__}")
        if hook in ("configure_gradient_clipping",):
            words.append(f"clip={arguments.get('gradient_clip_val')},{arguments.get('gradient_clip_algorithm')}")
        if hook == "lr_scheduler_step":
            words.append(f"metric={'none' if arguments.get('metric') is None else 'given'}")
        t, m = self.trainer, self.module
        words.append(f"step={t.global_step} epoch={t.current_epoch}")
        if self.stage() != "train":
            words.append(self.stage())
        if not m.training:
            words.append("eval")
        if not torch.is_grad_enabled():
            words.append("no_grad")
        given = [p.grad is not None for p in m.parameters()]
        if any(given):
            words.append("grads" if all(given) else "some_grads")
        if t.should_stop:
            words.append("should_stop")
        self.events.append(" ".join(words))
        if self.grad_norms is not None:
            grads = [p.grad for p in m.parameters() if p.grad is not None]
            # float64, so that the norm is not itself a source of differences
            norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
            self.grad_norms.append(norm)
        if f"{owner}.{hook}" in self.seen_metrics:
            metrics = {k: float(v) for k, v in sorted(t.callback_metrics.items())}
            self.seen.append({"at": words[0], "b": arguments.get("batch_idx"), "callback_metrics": metrics})

    def result(self) -> dict[str, Any]:
        out: dict[str, Any] = {"events": self.events}
        for key in ("grad_norms", "logged", "losses", "seen", "facts"):
            value = getattr(self, key)
            if value:
                out[key] = value
        return out


def describe(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(sorted(value)) + "}"
    if isinstance(value, torch.Tensor):
        return f"tensor{'+graph' if value.requires_grad else ''}"
    return type(value).__name__


def same_arguments(base: type, name: str, function: Callable[..., Any]) -> Any:
    """`function` under the name and the signature that `base` gives to its method `name`."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__ = name
    method.__signature__ = inspect.signature(getattr(base, name))  # type: ignore[attr-defined]
    return method


def recording(base: type, owner: str, names: tuple[str, ...], record: Recorder) -> dict[str, Any]:
    """Methods of `base` named `names`, each recorded on entry under the name of its owner."""

    def one(name: str) -> Any:
        original = getattr(base, name)
        signature = inspect.signature(original)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            record.event(owner, name, given)
            answer = original(self, *args, **kwargs)
            if name in ("optimizer_step", "backward"):
                record.event(owner, f"{name}:end", given)
            return answer

        return same_arguments(base, name, method)

    return {name: one(name) for name in names}


class Rows(Dataset[torch.Tensor]):
    """`count` rows of 4 numbers, the same in every process."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def loader(batches: int, seed: int = 0, batch_size: int = 2) -> DataLoader[torch.Tensor]:
    return DataLoader(Rows(batches * batch_size, seed), batch_size=batch_size)


def make_module(record: Recorder, extra: dict[str, Any] | None = None, step_points: bool = False) -> Any:
    """A module that records every hook; `extra` replaces or adds methods under the recording."""
    fw = record.fw

    class Plain(fw.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch).square().mean()

        def test_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch).square().mean()

        def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    base = type("Base", (Plain,), dict(extra or {}))
    steps = ("training_step", "validation_step", "test_step", "predict_step")
    names = (*steps, *MODULE_HOOKS, *(STEP_POINTS if step_points else ()))
    torch.manual_seed(0)
    record.module = type("Recording", (base,), recording(base, "lm", names, record))()
    return record.module


def make_data(
    record: Recorder, train: Any = None, val: Any = None, state: dict[str, Any] | None = None, **more: Any
) -> Any:
    """A data module that records its hooks, with the loaders that are given (`train`, `val`, `test`, `predict`)."""
    loaders = {"train": train, "val": val, **more}
    body: dict[str, Any] = {"state_dict": lambda self: dict(state or {})}
    for stage, given in loaders.items():
        if stage == "train" or given is not None:
            # the same on each call; a function of no arguments makes a new one
            body[f"{stage}_dataloader"] = lambda self, given=given: given() if callable(given) else given
    Data = type("Data", (record.fw.LightningDataModule,), body)
    names = tuple(name for name in DATA_HOOKS if not name.endswith("_dataloader") or name in body)
    return type("RecordingData", (Data,), recording(Data, "dm", names, record))()


def make_callback(record: Recorder, tag: str, extra: dict[str, Any] | None = None) -> Any:
    body = {"state_key": property(lambda self: f"callback {tag}"), "state_dict": lambda self: {"tag": tag}}
    base = type("Base", (record.fw.Callback,), {**body, **(extra or {})})
    callback = type("RecordingCallback", (base,), recording(base, f"cb_{tag}", CALLBACK_HOOKS, record))()
    callback.record = record
    return callback


def make_logger(record: Recorder, events: bool = False) -> Any:
    """A logger that keeps what it is given; with `events` its own calls stand among the hook calls."""

    class Memory(record.fw.Logger):  # type: ignore[name-defined,misc]
        name = "memory"
        version = 0
        experiment = None

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            kept = {k: float(v) for k, v in sorted(metrics.items())}
            record.logged.append({"stage": record.stage(), "step": step, "metrics": kept})
            if events:
                record.event("logger", f"log_metrics({','.join(kept)})")

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            if events:
                record.event("logger", "log_hyperparams")

        def log_graph(self, *args: Any, **kwargs: Any) -> None:
            if events:
                record.event("logger", "log_graph")

        def save(self) -> None:
            if events:
                record.event("logger", "save")

        def finalize(self, status: str) -> None:
            if events:
                record.event("logger", f"finalize({status})")

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            if events:
                record.event("logger", "after_save_checkpoint")

    return Memory()


def make_trainer(record: Recorder, root: str, **options: Any) -> Any:
    """A silent CPU trainer; whatever a scenario does not switch on is off."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": root,
        "max_epochs": 2, "log_every_n_steps": 1,
    }  # fmt: skip
    if options.get("max_steps") is not None:
        quiet["max_epochs"] = None
    record.trainer = record.fw.Trainer(**{**quiet, **options})
    return record.trainer


def all_scenarios() -> dict[str, Callable[[Framework, str], Recorder]]:
    import lightning_scenarios

    # These register theirs in the first one's table.
    import lightning_scenarios_log  # noqa: F401
    import lightning_scenarios_module  # noqa: F401
    import lightning_scenarios_overrides  # noqa: F401
    import lightning_scenarios_resume  # noqa: F401
    import lightning_scenarios_stages  # noqa: F401
    import lightning_scenarios_views  # noqa: F401

    return lightning_scenarios.SCENARIOS


def run_scenario(framework: Framework, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    framework.seed_everything(7)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = all_scenarios()[name](framework, root)
    return result.result()


def main(argv: list[str] | None = None) -> int:
    scenarios = all_scenarios()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("lightning", "lit_fast"), required=True)
    parser.add_argument("--out", help="file to write; without it, to standard output")
    parser.add_argument("scenarios", nargs="*", help="names, or the name of a file of them; without any, all of them")
    options = parser.parse_args(argv)
    of_files = {name for name, function in scenarios.items() if function.__module__ in options.scenarios}
    options.scenarios = [name for name in scenarios if name in of_files or name in options.scenarios] + [
        name for name in options.scenarios if name not in scenarios and name not in sys.modules
    ]
    unknown = set(options.scenarios) - set(scenarios)
    if unknown:
        parser.error(f"unknown scenarios {sorted(unknown)}; there are {', '.join(scenarios)}")
    logging.disable(logging.WARNING)
    framework = Framework(options.framework)
    results: dict[str, Any] = {}
    for name in options.scenarios or scenarios:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            results[name] = run_scenario(framework, name)
    recorded = {
        "framework": framework.name,
        "version": framework.version,
        "torch": torch.__version__.split("+")[0],
        "scenarios": results,
    }
    text = json.dumps(recorded, indent=1, sort_keys=False)
    if options.out:
        Path(options.out).write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    # Under its own name, so that the scenarios and this program share one Recorder class.
    sys.path.insert(0, str(Path(__file__).parent))
    import lightning_recorder

    raise SystemExit(lightning_recorder.main())

"""Where each of Lightning's module names leads in lit_fast, and the importer that follows the table.

A key is Lightning's module name without its first part: `pytorch.callbacks` is lightning.pytorch.callbacks.
A text is the module of ours that stands there, with everything below it. A dict is a module gathered from
single names of several of ours.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIGHTNING_VERSION = "2.6.6"

_RANK_ZERO = {
    name: f"lit_fast.rank_zero:{name}"
    for name in ("rank_zero_debug", "rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn")
}
_CORE = {
    "Callback": "lit_fast:Callback",
    "LightningDataModule": "lit_fast:LightningDataModule",
    "LightningModule": "lit_fast:LightningModule",
    "Trainer": "lit_fast:Trainer",
    "seed_everything": "lit_fast:seed_everything",
}
_WARNINGS = {
    "LightningDeprecationWarning": "lit_fast.errors:LightningDeprecationWarning",
    "PossibleUserWarning": "lit_fast.errors:PossibleUserWarning",
    "WarningCache": "lit_fast.rank_zero:WarningCache",
}
_ACCELERATORS = {
    name: f"lit_fast.accelerators:{name}"
    for name in ("Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator")
}
_EXCEPTIONS = {"MisconfigurationException": "lit_fast.errors:MisconfigurationException"}
_CHECKPOINT_IO = {
    "AsyncCheckpointIO": "lit_fast.checkpoint.plugins:AsyncCheckpointIO",
    "CheckpointIO": "lit_fast.checkpoint.plugins:CheckpointIO",
    "TorchCheckpointIO": "lit_fast.checkpoint.plugins:TorchCheckpointIO",
    "_WrappingCheckpointIO": "lit_fast.checkpoint.plugins:WrappingCheckpointIO",
}
_PLUGINS = {
    **_CHECKPOINT_IO,
    **{
        name: f"lit_fast.precision:{name}"
        for name in ("DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision")
    },
}
_MEMORY = {
    **{name: f"lit_fast.tuner.batch_size_scaling:{name}" for name in ("garbage_collection_cuda", "is_oom_error")},
    "recursive_detach": "lit_fast.pytorch.functions:recursive_detach",
}
_DATA = {
    "extract_batch_size": "lit_fast.log_rules:batch_size_of",
    **{
        name: f"lit_fast.pytorch.functions:{name}"
        for name in ("has_iterable_dataset", "has_len", "sized_len", "suggested_max_num_workers")
    },
}
_PARSING = {
    **{
        name: f"lit_fast.tuner.attributes:{name}"
        for name in ("lightning_getattr", "lightning_hasattr", "lightning_setattr")
    },
    "AttributeDict": "lit_fast.hparams:AttributeDict",
    "is_picklable": "lit_fast.pytorch.functions:is_picklable",
}
_FUNCTIONS = {
    "disable_possible_user_warnings": "lit_fast.pytorch.functions:disable_possible_user_warnings",
    "find_shared_parameters": "lit_fast.pytorch.functions:find_shared_parameters",
    "grad_norm": "lit_fast.pytorch.functions:grad_norm",
    "measure_flops": "lit_fast.profiler.throughput:measure_flops",
    "move_data_to_device": "lit_fast.data.transfer:move",
    "set_shared_parameters": "lit_fast.pytorch.functions:set_shared_parameters",
    "suggested_max_num_workers": "lit_fast.pytorch.functions:suggested_max_num_workers",
}
_UTILITIES = {**_RANK_ZERO, **_FUNCTIONS, "AttributeDict": "lit_fast.hparams:AttributeDict"}
_HPARAMS_FILES = {
    name: f"lit_fast.pytorch.functions:{name}" for name in ("load_hparams_from_yaml", "save_hparams_to_yaml")
}

_LOOPS = {
    "_EvaluationLoop": "lit_fast.evaluation:EvaluationLoop",
    "_FitLoop": "lit_fast.loop:FitLoop",
    "_PredictionLoop": "lit_fast.prediction:PredictionLoop",
    "_TrainingEpochLoop": "lit_fast.loop_views:EpochLoop",
}


def _not_built(name: str) -> dict[str, str]:
    return {name: f"lit_fast.not_built:{name}"}


TABLE: dict[str, str | dict[str, str]] = {
    "": {**_CORE, **_not_built("Fabric")},
    "pytorch": "lit_fast.pytorch",
    "pytorch.accelerators": _ACCELERATORS,
    "pytorch.accelerators.cpu": {"CPUAccelerator": _ACCELERATORS["CPUAccelerator"]},
    "pytorch.accelerators.cuda": {"CUDAAccelerator": _ACCELERATORS["CUDAAccelerator"]},
    "pytorch.accelerators.mps": {"MPSAccelerator": _ACCELERATORS["MPSAccelerator"]},
    "pytorch.callbacks": "lit_fast.callbacks",
    "pytorch.demos": "lit_fast.demos",
    "pytorch.loggers": "lit_fast.loggers",
    "pytorch.loggers.comet": _not_built("CometLogger"),
    "pytorch.loggers.mlflow": _not_built("MLFlowLogger"),
    "pytorch.loggers.wandb": _not_built("WandbLogger"),
    "pytorch.loops": _LOOPS,
    "pytorch.loops.evaluation_loop": {"_EvaluationLoop": _LOOPS["_EvaluationLoop"]},
    "pytorch.loops.fit_loop": {"_FitLoop": _LOOPS["_FitLoop"]},
    "pytorch.loops.prediction_loop": {"_PredictionLoop": _LOOPS["_PredictionLoop"]},
    "pytorch.loops.training_epoch_loop": {"_TrainingEpochLoop": _LOOPS["_TrainingEpochLoop"]},
    "pytorch.core": {
        "LightningDataModule": "lit_fast:LightningDataModule",
        "LightningModule": "lit_fast:LightningModule",
    },
    "pytorch.core.datamodule": "lit_fast.data.datamodule",
    "pytorch.core.hooks": "lit_fast.core_hooks",
    "pytorch.core.module": "lit_fast.module",
    "pytorch.core.saving": _HPARAMS_FILES,
    "pytorch.core.optimizer": "lit_fast.optim.lightning_optimizer",
    "pytorch.core.mixins": {"HyperparametersMixin": "lit_fast.hparams:HyperparametersMixin"},
    "pytorch.core.mixins.hparams_mixin": "lit_fast.hparams",
    "pytorch.plugins": _PLUGINS,
    "pytorch.plugins.precision": "lit_fast.precision",
    "pytorch.plugins.io": _CHECKPOINT_IO,
    "pytorch.plugins.io.checkpoint_plugin": _CHECKPOINT_IO,
    "pytorch.plugins.io.torch_plugin": _CHECKPOINT_IO,
    "pytorch.profilers": "lit_fast.profiler",
    "pytorch.strategies": "lit_fast.strategies",
    "pytorch.strategies.ddp": _not_built("DDPStrategy"),
    "pytorch.strategies.deepspeed": _not_built("DeepSpeedStrategy"),
    "pytorch.strategies.fsdp": _not_built("FSDPStrategy"),
    "pytorch.strategies.model_parallel": _not_built("ModelParallelStrategy"),
    "pytorch.strategies.parallel": _not_built("ParallelStrategy"),
    "pytorch.trainer": {"Trainer": "lit_fast:Trainer", "seed_everything": "lit_fast:seed_everything"},
    "pytorch.trainer.trainer": "lit_fast.trainer",
    "pytorch.trainer.states": "lit_fast.states",
    "pytorch.trainer.connectors": {},
    "pytorch.trainer.connectors.logger_connector": {},
    "pytorch.trainer.connectors.accelerator_connector": {
        name: f"lit_fast.pytorch.types:{name}" for name in ("_LITERAL_WARN", "_PRECISION_INPUT")
    },
    "pytorch.trainer.connectors.logger_connector.result": {
        name: f"lit_fast.pytorch.types:{name}" for name in ("_OUT_DICT", "_PBAR_DICT")
    },
    "pytorch.tuner": "lit_fast.tuner",
    "pytorch.utilities": {
        **_UTILITIES,
        **_PARSING,
        "CombinedLoader": "lit_fast.data.combined:CombinedLoader",
        "GradClipAlgorithmType": "lit_fast.states:GradClipAlgorithmType",
    },
    "pytorch.utilities.data": _DATA,
    "pytorch.utilities.enums": {"GradClipAlgorithmType": "lit_fast.states:GradClipAlgorithmType"},
    "pytorch.utilities.grads": {"grad_norm": "lit_fast.pytorch.functions:grad_norm"},
    "pytorch.utilities.imports": "lit_fast.pytorch.requirements",
    "pytorch.utilities.memory": _MEMORY,
    "pytorch.utilities.model_helpers": {"is_overridden": "lit_fast.pytorch.functions:is_overridden"},
    "pytorch.utilities.model_summary": "lit_fast.model_summary",
    "pytorch.utilities.combined_loader": {"CombinedLoader": "lit_fast.data.combined:CombinedLoader"},
    "pytorch.utilities.exceptions": _EXCEPTIONS,
    "pytorch.utilities.parameter_tying": {
        name: _FUNCTIONS[name] for name in ("find_shared_parameters", "set_shared_parameters")
    },
    "pytorch.utilities.parsing": _PARSING,
    "pytorch.utilities.rank_zero": "lit_fast.rank_zero",
    "pytorch.utilities.seed": "lit_fast.seed",
    "pytorch.utilities.warnings": _WARNINGS,
    "pytorch.utilities.types": "lit_fast.pytorch.types",
    "fabric": {"seed_everything": "lit_fast:seed_everything", **_not_built("Fabric")},
    "fabric.fabric": _not_built("Fabric"),
    "fabric.strategies": {k: v for name in ("DDPStrategy", "FSDPStrategy") for k, v in _not_built(name).items()},
    "fabric.accelerators": _ACCELERATORS,
    "fabric.plugins": _PLUGINS,
    "fabric.plugins.precision": "lit_fast.precision",
    "fabric.plugins.io": _CHECKPOINT_IO,
    "fabric.plugins.io.checkpoint_io": _CHECKPOINT_IO,
    "fabric.plugins.io.torch_io": _CHECKPOINT_IO,
    "fabric.loggers": {name: f"lit_fast.loggers:{name}" for name in ("CSVLogger", "Logger", "TensorBoardLogger")},
    "fabric.loggers.csv_logs": "lit_fast.loggers.csv_logs",
    "fabric.loggers.logger": "lit_fast.loggers.logger",
    "fabric.loggers.tensorboard": "lit_fast.loggers.tensorboard",
    "fabric.utilities": {**_UTILITIES, "Throughput": "lit_fast.profiler.throughput:Throughput"},
    "fabric.utilities.apply_func": {"move_data_to_device": "lit_fast.data.transfer:move"},
    "fabric.utilities.cloud_io": {"get_filesystem": "lit_fast.pytorch.functions:get_filesystem"},
    "fabric.utilities.data": {**_DATA, "AttributeDict": "lit_fast.hparams:AttributeDict"},
    "fabric.utilities.imports": "lit_fast.pytorch.requirements",
    "fabric.utilities.logger": {
        "_add_prefix": "lit_fast.loggers.utilities:add_prefix",
        "_convert_params": "lit_fast.loggers.utilities:params_dict",
        "_flatten_dict": "lit_fast.loggers.utilities:flatten",
        "_sanitize_params": "lit_fast.loggers.utilities:primitives",
    },
    "fabric.utilities.types": "lit_fast.pytorch.types",
    "fabric.utilities.exceptions": _EXCEPTIONS,
    "fabric.utilities.rank_zero": "lit_fast.rank_zero",
    "fabric.utilities.seed": "lit_fast.seed",
    "fabric.utilities.spike": {
        "SpikeDetection": "lit_fast.callbacks.spike:LossSpikes",
        "TrainingSpikeException": "lit_fast.errors:TrainingSpikeException",
    },
    "fabric.utilities.throughput": "lit_fast.profiler.throughput",
    "fabric.utilities.warnings": _WARNINGS,
}


def children(key: str) -> list[str]:
    """The last parts of the module names right below `key`."""
    below = f"{key}." if key else ""
    found = {k[len(below) :].split(".")[0] for k in TABLE if k.startswith(below) and k != key}
    ours = target(key)
    if isinstance(ours, str) and key != "pytorch":
        package = importlib.import_module(ours)
        found |= {m.name for m in pkgutil.iter_modules(getattr(package, "__path__", [])) if m.name[0] != "_"}
    return sorted(found)


def target(key: str) -> str | dict[str, str] | None:
    """The table's entry for `key`, or the submodule of ours that an entry above it leads to."""
    if key in TABLE:
        return TABLE[key]
    above, _, last = key.rpartition(".")
    package = target(above) if above else None
    return f"{package}.{last}" if isinstance(package, str) and above != "pytorch" else None


def exists(key: str) -> bool:
    """Whether `key` leads to a module; imports the packages above it at most."""
    found = target(key)
    if isinstance(found, str):
        try:
            return importlib.util.find_spec(found) is not None
        except ModuleNotFoundError:
            return False
    return found is not None


class Gathered(ModuleType):
    """A module of single names, each fetched when it is first used."""

    def __init__(self, key: str, table: dict[str, str]) -> None:
        name = f"lightning.{key}".rstrip(".")
        super().__init__(name, f"Names of lit_fast, as {name} has them.")
        self.__path__: list[str] = []  # a package to the import system, with nothing on disk
        self.__all__ = sorted(table)
        self.__version__ = LIGHTNING_VERSION
        self._key = key
        self._table = table

    def __getattr__(self, name: str) -> Any:
        if name in self._table:
            home, _, attribute = self._table[name].partition(":")
            value = getattr(importlib.import_module(home), attribute)
        elif name in children(self._key):
            value = load(f"{self._key}.{name}".lstrip("."))
        else:
            known = ", ".join([*self.__all__, *children(self._key)])
            raise AttributeError(f"lit_fast has no {self.__name__}.{name} yet; it has {known}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__all__, *children(self._key)})


_gathered: dict[str, Gathered] = {}


def load(key: str) -> ModuleType:
    """The module that stands at `key`: one of ours, or the gathered one, always the same object."""
    found = target(key)
    if isinstance(found, str):
        return importlib.import_module(found)
    if found is None:
        raise ModuleNotFoundError(f"lit_fast has no lightning.{key} yet", name=key)
    if key not in _gathered:
        _gathered[key] = Gathered(key, found)
    return _gathered[key]


class _Existing(importlib.abc.Loader):
    """Puts an existing module under a second name and leaves it as it was."""

    def __init__(self, key: str) -> None:
        self.key = key

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = load(self.key)
        self.kept = getattr(module, "__spec__", None)  # the import system overwrites it with the second name's
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.kept is not None:
            module.__spec__ = self.kept


class Finder(importlib.abc.MetaPathFinder):
    """Serves the names below the roots it was given; stands first, since PathFinder would load copies."""

    def __init__(self) -> None:
        self.roots: dict[str, str] = {}

    def serve(self, root: str, key: str) -> None:
        """Lets `root` and everything below it lead to `key` of the table."""
        self.roots[root] = key
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def withdraw(self, root: str) -> None:
        self.roots.pop(root, None)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for root, key in self.roots.items():
            if fullname != root and not fullname.startswith(f"{root}."):
                continue
            rest = fullname[len(root) + 1 :]
            if root == "lit_fast.pytorch" and (not rest or rest in ("functions", "names", "requirements", "types")):
                return None  # these are files of this very package
            asked = ".".join(part for part in (key, rest) if part)
            if not exists(asked):
                raise ModuleNotFoundError(
                    f"lit_fast stands in for {root} here and has no {fullname} yet; "
                    f"{fullname.rpartition('.')[0]} has {', '.join(children(asked.rpartition('.')[0]))}",
                    name=fullname,
                )
            # Not marked as a package, or a plain module would be given an empty __path__.
            return ModuleSpec(fullname, _Existing(asked))
        return None


FINDER = Finder()

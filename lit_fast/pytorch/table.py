"""Where each of Lightning's module names leads in lit_fast.

A key is Lightning's module name without its first part: `pytorch.callbacks` is lightning.pytorch.callbacks.
A text is the module of ours that stands there, with everything below it. A dict is a module gathered from
single names of several of ours.
"""

from __future__ import annotations

Entry = str | dict[str, str]


def _from(home: str, *names: str) -> dict[str, str]:
    """Each name as an attribute of our module `home`."""
    return {name: f"lit_fast.{home}:{name}" for name in names}


def _not_built(*names: str) -> dict[str, str]:
    return _from("not_built", *names)


def _below(key: str, modules: dict[str, Entry]) -> dict[str, Entry]:
    """What stands at and below a package that Lightning has twice, for the Trainer and for Fabric."""
    return {f"{key}{rest}": entry for rest, entry in modules.items()}


_MODULES = {name: f"lit_fast:{name}" for name in ("LightningDataModule", "LightningModule")}
_CORE = {**_MODULES, **{name: f"lit_fast:{name}" for name in ("Callback", "Trainer", "seed_everything")}}
_RANK_ZERO = _from(
    "rank_zero", "rank_zero_debug", "rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn"
)
_WARNINGS = {
    **_from("errors", "LightningDeprecationWarning", "PossibleUserWarning"),
    **_from("pytorch.functions", "disable_possible_user_warnings"),
    **_from("rank_zero", "WarningCache"),
}
_EXCEPTIONS = {
    **_from("errors", "MisconfigurationException", "SIGTERMException"),
    "_TunerExitException": "lit_fast.errors:TunerExit",
}
_ENUM = _from("states", "LightningEnum")
_CLIP = _from("states", "GradClipAlgorithmType")
_ACCELERATORS = {
    **_from("accelerators", "Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator"),
    **_from("accelerators", "find_usable_cuda_devices"),
    **_not_built("XLAAccelerator"),
}
_ACCELERATOR_MODULES: dict[str, Entry] = {
    "": _ACCELERATORS,
    ".accelerator": _from("accelerators", "Accelerator"),
    ".cpu": {**_from("accelerators", "CPUAccelerator"), **_from("pytorch.functions", "get_cpu_stats")},
    ".cuda": _from(
        "accelerators", "CUDAAccelerator", "find_usable_cuda_devices", "is_cuda_available", "num_cuda_devices"
    ),
    ".mps": _from("accelerators", "MPSAccelerator"),
    ".xla": _not_built("XLAAccelerator"),
}
_CHECKPOINT_IO = {
    **_from("checkpoint.plugins", "AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO"),
    "_WrappingCheckpointIO": "lit_fast.checkpoint.plugins:WrappingCheckpointIO",
    **_not_built("XLACheckpointIO"),
}
_LATER_PRECISIONS = {
    "bitsandbytes": "BitsandbytesPrecision",
    "fsdp": "FSDPPrecision",
    "transformer_engine": "TransformerEnginePrecision",
    "xla": "XLAPrecision",
}
_PRECISIONS = {
    **_from("precision", "DeepSpeedPrecision", "DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision"),
    **_not_built(*_LATER_PRECISIONS.values()),
}
_OLD_PRECISIONS = {f"{name}Plugin": place for name, place in _PRECISIONS.items()}  # as they were called before 2.2
_PRECISION_MODULES: dict[str, Entry] = {
    "": {**_PRECISIONS, **_OLD_PRECISIONS},
    **{f".{name}": f"lit_fast.precision.{name}" for name in ("amp", "deepspeed", "double", "half", "precision")},
    **{f".{module}": _not_built(name) for module, name in _LATER_PRECISIONS.items()},
}
_ENVIRONMENTS = {
    "cluster_environment": "ClusterEnvironment",
    "kubeflow": "KubeflowEnvironment",
    "lightning": "LightningEnvironment",
    "lsf": "LSFEnvironment",
    "mpi": "MPIEnvironment",
    "slurm": "SLURMEnvironment",
    "torchelastic": "TorchElasticEnvironment",
}
_ENVIRONMENT_MODULES: dict[str, Entry] = {
    "": {**_from("strategies.environments", *_ENVIRONMENTS.values()), **_not_built("XLAEnvironment")},
    **{f".{module}": f"lit_fast.strategies.environments.{module}" for module in _ENVIRONMENTS},
    ".xla": _not_built("XLAEnvironment"),
}
_LAYER_SYNC = _from("strategies.layer_sync", "LayerSync", "TorchSyncBatchNorm")
_PLUGINS = {
    **_CHECKPOINT_IO,
    **_PRECISIONS,
    **_OLD_PRECISIONS,
    **_LAYER_SYNC,
    **_from("strategies.environments", "ClusterEnvironment"),
}
_LATER_STRATEGIES = {
    "single_xla": "SingleDeviceXLAStrategy",
    "xla": "XLAStrategy",
}
_STRATEGIES = {  # ours, by Lightning's modules
    "ddp": "DDPStrategy",
    "deepspeed": "DeepSpeedStrategy",
    "fsdp": "FSDPStrategy",
    "model_parallel": "ModelParallelStrategy",
    "parallel": "ParallelStrategy",
    "single_device": "SingleDeviceStrategy",
    "strategy": "Strategy",
}
_FABRIC_STRATEGIES = {**_LATER_STRATEGIES, "dp": "DataParallelStrategy", "xla_fsdp": "XLAFSDPStrategy"}
_MEMORY = {
    **_from("tuner.batch_size_scaling", "garbage_collection_cuda", "is_cuda_out_of_memory", "is_cudnn_snafu"),
    **_from("tuner.batch_size_scaling", "is_oom_error", "is_out_of_cpu_memory"),
    **_from("pytorch.functions", "recursive_detach"),
}
_DATA = {
    "extract_batch_size": "lit_fast.log_rules:batch_size_of",
    **_from("pytorch.functions", "has_iterable_dataset", "has_len", "has_len_all_ranks", "sized_len"),
    **_from("pytorch.functions", "suggested_max_num_workers"),
}
_PARSING = {
    **_from("tuner.attributes", "lightning_getattr", "lightning_hasattr", "lightning_setattr"),
    **_from("hparams", "AttributeDict"),
    **_from("pytorch.functions", "is_picklable"),
    **_from("pytorch.arguments", "clean_namespace", "collect_init_args", "get_init_args", "parse_class_init_keys"),
    **_from("pytorch.arguments", "save_hyperparameters"),
}
_APPLY = {
    **_from("pytorch.apply", "apply_to_collection", "convert_tensors_to_scalars", "convert_to_tensors"),
    "move_data_to_device": "lit_fast.data.transfer:move",
}
_TYING = _from("pytorch.functions", "find_shared_parameters", "set_shared_parameters")
_UTILITIES = {
    **_RANK_ZERO,
    **_ENUM,
    **_TYING,
    **_from("hparams", "AttributeDict"),
    **_from("profiler.throughput", "measure_flops"),
    **_from("pytorch.functions", "disable_possible_user_warnings", "grad_norm", "is_shared_filesystem"),
    **_from("pytorch.functions", "suggested_max_num_workers"),
    "move_data_to_device": _APPLY["move_data_to_device"],
}
_COMBINED = _from("data.combined", "CombinedLoader")
_SUMMARY = _from(
    "model_summary",
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
)
_LOOPS = {
    "_EvaluationLoop": "lit_fast.evaluation:EvaluationLoop",
    "_FitLoop": "lit_fast.loop:FitLoop",
    "_PredictionLoop": "lit_fast.prediction:PredictionLoop",
    "_TrainingEpochLoop": "lit_fast.loop_views:EpochLoop",
}

TABLE: dict[str, Entry] = {
    "": {**_CORE, **_not_built("Fabric")},
    "pytorch": "lit_fast.pytorch",
    **_below("pytorch.accelerators", _ACCELERATOR_MODULES),
    "pytorch.callbacks": "lit_fast.callbacks",
    "pytorch.cli": {
        **_not_built("LightningArgumentParser", "LightningCLI", "SaveConfigCallback"),
        **_from("pytorch.arguments", "instantiate_class"),
        **_from("pytorch.types", "LRSchedulerTypeTuple", "LRSchedulerTypeUnion"),
    },
    "pytorch.core": _MODULES,
    "pytorch.core.datamodule": "lit_fast.data.datamodule",
    "pytorch.core.hooks": "lit_fast.core_hooks",
    "pytorch.core.mixins": _from("hparams", "HyperparametersMixin"),
    "pytorch.core.mixins.hparams_mixin": "lit_fast.hparams",
    "pytorch.core.module": "lit_fast.module",
    "pytorch.core.optimizer": "lit_fast.optim.lightning_optimizer",
    "pytorch.core.saving": _from("pytorch.functions", "load_hparams_from_yaml", "save_hparams_to_yaml"),
    "pytorch.demos": "lit_fast.demos",
    "pytorch.demos.mnist_datamodule": _not_built("MNISTDataModule"),
    "pytorch.loggers": "lit_fast.loggers",
    "pytorch.loggers.comet": _not_built("CometLogger"),
    "pytorch.loggers.litlogger": _not_built("LitLogger"),
    "pytorch.loggers.mlflow": _not_built("MLFlowLogger"),
    "pytorch.loggers.neptune": _not_built("NeptuneLogger"),
    "pytorch.loggers.wandb": _not_built("WandbLogger"),
    "pytorch.loops": _LOOPS,
    "pytorch.loops.evaluation_loop": {"_EvaluationLoop": _LOOPS["_EvaluationLoop"]},
    "pytorch.loops.fit_loop": {"_FitLoop": _LOOPS["_FitLoop"]},
    "pytorch.loops.prediction_loop": {"_PredictionLoop": _LOOPS["_PredictionLoop"]},
    "pytorch.loops.training_epoch_loop": {"_TrainingEpochLoop": _LOOPS["_TrainingEpochLoop"]},
    "pytorch.overrides": {},
    "pytorch.overrides.distributed": _from(
        "data.samplers", "UnrepeatedDistributedSampler", "UnrepeatedDistributedSamplerWrapper"
    ),
    "pytorch.plugins": _PLUGINS,
    **_below("pytorch.plugins.environments", _ENVIRONMENT_MODULES),
    **_below("pytorch.plugins.precision", _PRECISION_MODULES),
    "pytorch.plugins.io": _CHECKPOINT_IO,
    "pytorch.plugins.io.async_plugin": _from("checkpoint.plugins", "AsyncCheckpointIO"),
    "pytorch.plugins.io.checkpoint_plugin": _CHECKPOINT_IO,
    "pytorch.plugins.io.torch_plugin": _CHECKPOINT_IO,
    "pytorch.plugins.io.wrapper": _CHECKPOINT_IO,
    "pytorch.plugins.io.xla_plugin": _not_built("XLACheckpointIO"),
    "pytorch.plugins.layer_sync": _LAYER_SYNC,
    "pytorch.profilers": "lit_fast.profiler",
    "pytorch.profilers.base": _from("profiler", "PassThroughProfiler", "Profiler"),
    "pytorch.profilers.xla": _not_built("XLAProfiler"),
    "pytorch.strategies": "lit_fast.strategies",
    **{f"pytorch.strategies.{module}": _not_built(name) for module, name in _LATER_STRATEGIES.items()},
    "pytorch.trainer": {name: f"lit_fast:{name}" for name in ("Trainer", "seed_everything")},
    "pytorch.trainer.connectors": {},
    "pytorch.trainer.connectors.accelerator_connector": _from("pytorch.types", "_LITERAL_WARN", "_PRECISION_INPUT"),
    "pytorch.trainer.connectors.logger_connector": {},
    "pytorch.trainer.connectors.logger_connector.result": _from("pytorch.types", "_OUT_DICT", "_PBAR_DICT"),
    "pytorch.trainer.states": "lit_fast.states",
    "pytorch.trainer.trainer": "lit_fast.trainer",
    "pytorch.tuner": "lit_fast.tuner",
    "pytorch.utilities": {**_UTILITIES, **_PARSING, **_COMBINED, **_CLIP},
    "pytorch.utilities.combined_loader": _COMBINED,
    "pytorch.utilities.data": _DATA,
    "pytorch.utilities.enums": {**_CLIP, **_ENUM},
    "pytorch.utilities.exceptions": _EXCEPTIONS,
    "pytorch.utilities.grads": _from("pytorch.functions", "grad_norm"),
    "pytorch.utilities.imports": "lit_fast.pytorch.requirements",
    "pytorch.utilities.memory": _MEMORY,
    "pytorch.utilities.model_helpers": _from("pytorch.functions", "is_overridden"),
    "pytorch.utilities.model_summary": {**_SUMMARY, **_not_built("DeepSpeedSummary")},
    "pytorch.utilities.model_summary.model_summary": _SUMMARY,
    "pytorch.utilities.parameter_tying": _TYING,
    "pytorch.utilities.parsing": _PARSING,
    "pytorch.utilities.rank_zero": "lit_fast.rank_zero",
    "pytorch.utilities.seed": "lit_fast.seed",
    "pytorch.utilities.signature_utils": _from("pytorch.arguments", "is_param_in_hook_signature"),
    "pytorch.utilities.types": "lit_fast.pytorch.types",
    "pytorch.utilities.warnings": _WARNINGS,
    "fabric": {
        "seed_everything": "lit_fast:seed_everything",
        **_from("pytorch.functions", "disable_possible_user_warnings", "is_wrapped"),
        **_not_built("Fabric"),
    },
    "fabric.fabric": _not_built("Fabric"),
    "fabric.wrappers": _from("pytorch.functions", "is_wrapped"),
    **_below("fabric.accelerators", _ACCELERATOR_MODULES),
    "fabric.loggers": _from("loggers", "CSVLogger", "Logger", "TensorBoardLogger"),
    "fabric.loggers.csv_logs": "lit_fast.loggers.csv_logs",
    "fabric.loggers.logger": "lit_fast.loggers.logger",
    "fabric.loggers.tensorboard": "lit_fast.loggers.tensorboard",
    "fabric.plugins": _PLUGINS,
    "fabric.plugins.collectives": _not_built("SingleDeviceCollective", "TorchCollective"),
    **_below("fabric.plugins.environments", _ENVIRONMENT_MODULES),
    **_below("fabric.plugins.precision", _PRECISION_MODULES),
    "fabric.plugins.io": _CHECKPOINT_IO,
    "fabric.plugins.io.checkpoint_io": _CHECKPOINT_IO,
    "fabric.plugins.io.torch_io": _CHECKPOINT_IO,
    "fabric.plugins.io.xla": _not_built("XLACheckpointIO"),
    "fabric.strategies": {
        **_from("strategies", *_STRATEGIES.values()),
        **_not_built(*_FABRIC_STRATEGIES.values()),
    },
    **{f"fabric.strategies.{module}": _from("strategies", name) for module, name in _STRATEGIES.items()},
    **{f"fabric.strategies.{module}": _not_built(name) for module, name in _FABRIC_STRATEGIES.items()},
    "fabric.utilities": {**_UTILITIES, **_from("profiler.throughput", "Throughput"), **_not_built("ThroughputMonitor")},
    "fabric.utilities.apply_func": _APPLY,
    "fabric.utilities.cloud_io": {
        **_from("pytorch.functions", "get_filesystem"),
        "_load": "lit_fast.checkpoint.io:load",
    },
    "fabric.utilities.data": {**_DATA, **_from("hparams", "AttributeDict")},
    "fabric.utilities.distributed": {
        **_from("pytorch.functions", "is_shared_filesystem"),
        **_from("data.samplers", "DistributedSamplerWrapper"),
    },
    "fabric.utilities.enums": _ENUM,
    "fabric.utilities.exceptions": _EXCEPTIONS,
    "fabric.utilities.imports": "lit_fast.pytorch.requirements",
    "fabric.utilities.logger": {
        "_add_prefix": "lit_fast.loggers.utilities:add_prefix",
        "_convert_params": "lit_fast.loggers.utilities:params_dict",
        "_flatten_dict": "lit_fast.loggers.utilities:flatten",
        "_sanitize_params": "lit_fast.loggers.utilities:primitives",
    },
    "fabric.utilities.rank_zero": "lit_fast.rank_zero",
    "fabric.utilities.seed": "lit_fast.seed",
    "fabric.utilities.spike": {
        "SpikeDetection": "lit_fast.callbacks.spike:LossSpikes",
        "TrainingSpikeException": "lit_fast.errors:TrainingSpikeException",
    },
    "fabric.utilities.throughput": "lit_fast.profiler.throughput",
    "fabric.utilities.types": "lit_fast.pytorch.types",
    "fabric.utilities.warnings": _WARNINGS,
}

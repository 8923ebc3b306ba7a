"""Functions of Lightning's utilities: numbers against torch, and what they refuse."""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lit_fast
from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.pytorch import functions, requirements
from lit_fast.pytorch.functions import (
    find_shared_parameters,
    grad_norm,
    is_overridden,
    load_hparams_from_yaml,
    save_hparams_to_yaml,
    set_shared_parameters,
    suggested_max_num_workers,
)


@pytest.mark.parametrize("norm_type", [1, 2.0, "inf"])
def test_grad_norm(norm_type: float | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    model[:2](torch.randn(5, 3)).sum().backward()
    total = nn.utils.get_total_norm([p.grad for p in model[:2].parameters()], float(norm_type))
    norms = grad_norm(model, norm_type, group_separator=".")
    kind = float(norm_type)
    assert list(norms) == [
        *(f"grad_{kind}_norm.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")),
        f"grad_{kind}_norm_total",
    ]
    assert torch.equal(norms[f"grad_{kind}_norm_total"], total)
    assert torch.equal(norms[f"grad_{kind}_norm.0.bias"], model[0].bias.grad.norm(kind))


def test_grad_norm_without_gradients_and_of_nothing() -> None:
    assert grad_norm(nn.Linear(2, 2), 2) == {}
    with pytest.raises(MisconfigurationException, match="norm_type=0"):
        grad_norm(nn.Linear(2, 2), 0)


def test_is_overridden() -> None:
    class Module(lit_fast.LightningModule):
        def training_step(self, batch: object, batch_idx: int) -> None: ...

    assert is_overridden("training_step", Module())
    assert not is_overridden("validation_step", Module())
    assert not is_overridden("training_step")
    assert is_overridden("forward", nn.Identity(), parent=nn.Module)
    with pytest.raises(MisconfigurationException, match="pass as `parent`"):
        is_overridden("forward", nn.Identity())
    with pytest.raises(MisconfigurationException, match="no_such_method"):
        is_overridden("no_such_method", Module())


def test_shared_parameters_come_apart_and_together_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert find_shared_parameters(model) == []
    model[1][0].weight = model[0].weight
    shared = find_shared_parameters(model)
    assert shared == [["0.weight", "1.0.weight"]]
    model[1][0].weight = nn.Parameter(torch.zeros(2, 2))
    assert set_shared_parameters(model, shared) is model
    assert model[1][0].weight is model[0].weight


def test_suggested_workers_leave_a_core_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [suggested_max_num_workers(n) for n in (1, 4, 16, 32)] == [15, 3, 1, 1]
    with pytest.raises(MisconfigurationException, match="local_world_size=0"):
        suggested_max_num_workers(0)


def test_hyperparameters_go_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hparams.yaml"
    assert load_hparams_from_yaml(path) == {}
    save_hparams_to_yaml(path, argparse.Namespace(lr=0.1, sizes=[1, 2], dtype=torch.float32))
    assert load_hparams_from_yaml(path) == {"lr": 0.1, "sizes": [1, 2], "dtype": "torch.float32"}


def test_flags_of_installed_packages() -> None:
    assert requirements._TORCH_AVAILABLE
    assert not requirements._NO_SUCH_PACKAGE_AVAILABLE
    with pytest.raises(AttributeError, match="_TORCH_GREATER"):
        _ = requirements._TORCH_GREATER
    assert requirements._TORCH_GREATER_EQUAL_2_0 and requirements._TORCH_LESS_EQUAL_99
    assert not requirements._TORCH_EQUAL_1_13 and not requirements._TORCH_GREATER_EQUAL_99_0_1
    assert requirements._PYTHON_GREATER_EQUAL_3_10_0 and not requirements._NOSUCH_GREATER_EQUAL_0_1


def test_requirements_of_packages() -> None:
    cache = requirements.RequirementCache
    assert [bool(cache(text)) for text in ("torch>=2.0, <99", "torch>99", "torch!=0.1", "no-such>=1")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert cache(module="json") and not cache(module="no_such.module")
    assert str(cache("no-such>=1")) == "'no-such>=1' is not met; install it: pip install -U 'no-such>=1'"
    assert requirements.compare_version("torch", operator.ge, "2.0")
    assert not requirements.compare_version("no_such_package", operator.ge, "0")
    assert requirements.package_available("torch.nn") and not requirements.package_available("no_such.module")


# As programs write them: "from lightning.pytorch.<module> import <names>".
IMPORTS = {
    "accelerators": "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator find_usable_cuda_devices",
    "accelerators.cuda": "CUDAAccelerator num_cuda_devices is_cuda_available",
    "cli": "LightningCLI LightningArgumentParser SaveConfigCallback instantiate_class",
    "loggers": "CSVLogger CometLogger Logger MLFlowLogger NeptuneLogger TensorBoardLogger WandbLogger",
    "loggers.logger": "DummyLogger Logger rank_zero_experiment",
    "plugins": "AsyncCheckpointIO BitsandbytesPrecision CheckpointIO ClusterEnvironment DeepSpeedPrecision "
    "DoublePrecision FSDPPrecision HalfPrecision LayerSync MixedPrecision MixedPrecisionPlugin Precision "
    "PrecisionPlugin TorchCheckpointIO TorchSyncBatchNorm TransformerEnginePrecision",
    "plugins.environments": "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment "
    "MPIEnvironment SLURMEnvironment TorchElasticEnvironment XLAEnvironment",
    "plugins.layer_sync": "LayerSync TorchSyncBatchNorm",
    "plugins.precision": "DoublePrecision HalfPrecision MixedPrecision MixedPrecisionPlugin Precision",
    "plugins.precision.amp": "MixedPrecision",
    "profilers": "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler XLAProfiler",
    "profilers.base": "PassThroughProfiler",
    "strategies": "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy "
    "SingleDeviceStrategy SingleDeviceXLAStrategy Strategy XLAStrategy",
    "strategies.strategy": "Strategy",
    "trainer.states": "RunningStage TrainerFn TrainerState TrainerStatus",
    "utilities": "AttributeDict CombinedLoader GradClipAlgorithmType LightningEnum grad_norm is_picklable "
    "measure_flops move_data_to_device rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn "
    "suggested_max_num_workers disable_possible_user_warnings",
    "utilities.data": "extract_batch_size has_len has_len_all_ranks sized_len suggested_max_num_workers",
    "utilities.enums": "GradClipAlgorithmType LightningEnum",
    "utilities.exceptions": "MisconfigurationException SIGTERMException",
    "utilities.grads": "grad_norm",
    "utilities.memory": "garbage_collection_cuda is_cuda_out_of_memory is_cudnn_snafu is_oom_error "
    "is_out_of_cpu_memory recursive_detach",
    "utilities.model_helpers": "is_overridden",
    "utilities.model_summary": "LayerSummary ModelSummary get_human_readable_count summarize",
    "utilities.parsing": "AttributeDict clean_namespace collect_init_args get_init_args is_picklable lightning_getattr "
    "lightning_hasattr lightning_setattr parse_class_init_keys save_hyperparameters",
    "utilities.rank_zero": "WarningCache rank_zero_debug rank_zero_info rank_zero_only rank_zero_warn",
    "utilities.signature_utils": "is_param_in_hook_signature",
    "utilities.seed": "isolate_rng seed_everything",
    "utilities.types": "EVAL_DATALOADERS LRSchedulerConfig LRSchedulerConfigType LRSchedulerPLType "
    "LRSchedulerTypeUnion OptimizerConfig OptimizerLRScheduler OptimizerLRSchedulerConfig STEP_OUTPUT "
    "TRAIN_DATALOADERS",
    "utilities.warnings": "PossibleUserWarning",
}


@pytest.mark.parametrize("module", IMPORTS)
def test_names_are_found_where_programs_import_them(module: str) -> None:
    found = importlib.import_module(f"lit_fast.pytorch.{module}")
    for name in IMPORTS[module].split():
        assert getattr(found, name) is not None, name


def test_collections_of_tensors() -> None:
    batch = {"a": [torch.ones(1, requires_grad=True), 3]}
    detached = functions.recursive_detach(batch, to_cpu=True)
    assert detached["a"][1] == 3 and not detached["a"][0].requires_grad


def test_lengths() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([1])

    stream = DataLoader(Stream())
    assert functions.has_iterable_dataset(stream) and not functions.has_len(stream)
    assert functions.sized_len([1, 2]) == 2 and functions.sized_len(stream) is None


def test_pickles() -> None:
    assert functions.is_picklable([1]) and not functions.is_picklable(lambda: 1)


def test_file_systems() -> None:
    pytest.importorskip("fsspec")
    assert functions.get_filesystem("/somewhere").protocol[0] == "file"


def test_possible_mistakes_can_be_silenced() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        functions.disable_possible_user_warnings()
        warnings.warn("quiet", category=PossibleUserWarning, stacklevel=1)
        warnings.warn("loud", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["loud"]

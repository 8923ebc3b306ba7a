"""Which device `accelerator`, `devices` and `strategy` mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain, batches, trainer

import lit_fast
from lit_fast.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, resolve_accelerator
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies import DDPStrategy, SingleDeviceStrategy

ONE = ["auto", 1, "1", " 1 ", [0], "0,", (0,), -1, "-1"]


@pytest.mark.parametrize("devices", ONE, ids=repr)
def test_every_form_of_one_device(devices: Any) -> None:
    accelerator, found = resolve_accelerator("cpu", devices, "auto")
    assert isinstance(accelerator, CPUAccelerator) and found == [torch.device("cpu")]


@pytest.mark.parametrize("strategy", ["auto", "single_device", "ddp", "DDP", "ddp_find_unused_parameters_true"])
def test_strategies_that_are_the_plain_step_on_one_device(strategy: str) -> None:
    made = trainer(strategy=strategy, max_epochs=1)
    made.fit(Plain(), batches(2))
    assert isinstance(made.strategy, DDPStrategy if "ddp" in strategy.lower() else SingleDeviceStrategy)
    assert made.global_step == 2 and made.world_size == 1


def test_a_strategy_object() -> None:
    own = SingleDeviceStrategy("cpu")
    made = lit_fast.Trainer(strategy=own, logger=False, enable_checkpointing=False)
    assert made.strategy is own and isinstance(made.accelerator, CPUAccelerator)


def test_an_accelerator_object() -> None:
    own = CPUAccelerator()
    assert trainer(accelerator=own).accelerator is own
    assert (own.name(), own.auto_device_count(), own.is_available()) == ("cpu", 1, True)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "accelerator,devices,index",
    [("auto", 1, 0), ("gpu", 1, 0), ("cuda", "1", 0), ("gpu", [1], 1), ("gpu", "1,", 1)],
)
def test_one_of_two_gpus(two_gpus: None, accelerator: str, devices: Any, index: int) -> None:
    made, found = resolve_accelerator(accelerator, devices, "auto")
    assert isinstance(made, CUDAAccelerator) and found == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    "devices,message",
    [
        (3, "there are 2 CUDA devices"), ([0, 0], "each for one process"), ([5], "there are 2 CUDA devices"),
        (0, "no device"), ([], "no device"), ("0", "no device"),
        ("two", "number of devices"), (1.5, "list of indices"),
        (True, "list of indices"), (None, "list of indices"), ([0, "1"], "list of indices"), (-2, "list of indices"),
    ],
)  # fmt: skip
def test_devices_that_are_refused(two_gpus: None, devices: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Trainer\(devices=.*{message}"):
        resolve_accelerator("gpu", devices, "auto")


def test_processes_on_the_cpu() -> None:
    assert resolve_accelerator("cpu", 3, "auto")[1] == [torch.device("cpu")] * 3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"accelerator": "tpu"}, "accelerator='tpu'.*'cpu', 'gpu', 'cuda'"),
        ({"accelerator": "mps"}, "accelerator='mps'.*Apple.*accelerator='cpu'"),
        ({"accelerator": 3}, "accelerator=3"),
        ({"strategy": "dpp"}, "strategy='dpp'.*did you mean 'ddp'"),
        ({"strategy": "sharded"}, "strategy='sharded'.*allowed are 'auto', 'single_device', 'ddp'"),
        ({"strategy": "single_device", "devices": 2}, "strategy='single_device'.*devices=2.*'ddp'"),
        ({"strategy": SingleDeviceStrategy("cpu"), "num_nodes": 2}, "SingleDeviceStrategy.*num_nodes=2.*'ddp'"),
        ({"strategy": object()}, "strategy=<object"),
    ],
)
def test_names_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_one() -> None:
    with pytest.raises(MisconfigurationException, match=r"sees no CUDA device.*accelerator='cpu'"):
        trainer(accelerator="gpu")


def test_statistics_of_the_cpu() -> None:
    pytest.importorskip("psutil")
    stats = CPUAccelerator().get_device_stats("cpu")
    assert set(stats) == {"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"}
    assert all(0 <= value <= 100 for value in stats.values())
    with pytest.raises(NotImplementedError):
        Accelerator().get_device_stats("cpu")

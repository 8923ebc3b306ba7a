"""Throughput: counts, rates over the window, FLOPs and device peaks."""

from __future__ import annotations

import pytest
import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.profiler import throughput as room
from lit_fast.profiler.throughput import Throughput, compute_dtype, get_available_flops, measure_flops


def test_rates_of_one_device_appear_with_a_full_window() -> None:
    watch = Throughput(available_flops=50.0, window_size=3)
    watch.update(time=2.0, batches=1, samples=4, lengths=40, flops=100)
    watch.update(time=3.0, batches=2, samples=8, lengths=80, flops=100)
    assert watch.compute() == {"time": 3.0, "batches": 2, "samples": 8, "lengths": 80}
    watch.update(time=6.0, batches=3, samples=12, lengths=140, flops=60)
    assert watch.compute() == {
        "time": 6.0, "batches": 3, "samples": 12, "lengths": 140,
        "device/batches_per_sec": 0.5, "device/samples_per_sec": 2.0, "device/items_per_sec": 25.0,
        "device/flops_per_sec": 40.0, "device/mfu": 0.8,
    }  # fmt: skip
    watch.update(time=7.0, batches=4, samples=16, lengths=180, flops=100)
    assert watch.compute()["device/batches_per_sec"] == 0.5 and watch.compute()["device/flops_per_sec"] == 40.0
    watch.reset()
    watch.update(time=1.0, batches=1, samples=1)
    assert watch.compute() == {"time": 1.0, "batches": 1, "samples": 1}


def test_several_devices_have_totals() -> None:
    watch = Throughput(available_flops=10.0, world_size=4, window_size=2, separator="|")
    watch.update(time=1.0, batches=1, samples=2, flops=5)
    watch.update(time=2.0, batches=2, samples=4, flops=5)
    assert watch.compute() == {
        "time": 2.0, "batches": 2, "samples": 4,
        "device|batches_per_sec": 1.0, "batches_per_sec": 4.0, "device|samples_per_sec": 2.0, "samples_per_sec": 8.0,
        "device|flops_per_sec": 5.0, "flops_per_sec": 20.0, "device|mfu": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"time": 1.0, "batches": 2, "samples": 2}, "time=1.0 does not grow"),
        ({"time": 2.0, "batches": 1, "samples": 2}, "batches=1 does not grow"),
        ({"time": 2.0, "batches": 2, "samples": 1}, "samples=1 is less than batches=2"),
        ({"time": 2.0, "batches": 2, "samples": 3, "lengths": 2}, "lengths=2 is less than samples=3"),
        ({"time": 2.0, "batches": 2, "samples": 3, "lengths": 9}, "always or never"),
    ],
)
def test_counts_that_cannot_be_are_refused(update: dict[str, float], message: str) -> None:
    watch = Throughput()
    watch.update(time=1.0, batches=1, samples=1)
    with pytest.raises(ValueError, match=message):
        watch.update(**update)  # type: ignore[arg-type]


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="window_size=1"):
        Throughput(window_size=1)
    with pytest.raises(MisconfigurationException, match="world_size=0"):
        Throughput(world_size=0)


def test_flops_of_a_matrix_product() -> None:
    with torch.device("meta"):
        model, x = torch.nn.Linear(8, 4, bias=False), torch.randn(2, 8)
    forward = 2 * 2 * 8 * 4  # a multiplication and an addition for each of rows * in * out
    assert measure_flops(model, lambda: model(x)) == forward
    assert measure_flops(model, lambda: model(x), torch.Tensor.sum) == 2 * forward  # backward: the weight's gradient


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, 756.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("Tesla T4", torch.float16, 65.0),
        ("Tesla V100-SXM2-16GB", torch.float64, 7.8),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA RTX A4000", torch.float16, None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, teraflops: float | None) -> None:
    monkeypatch.setattr(room.torch.cuda, "get_device_name", lambda asked: device)
    if teraflops is None:
        with pytest.warns(UserWarning, match=device):
            assert get_available_flops(torch.device("cuda"), dtype) is None
    else:
        assert get_available_flops(torch.device("cuda"), dtype) == int(teraflops * 1e12)


def test_float32_counts_as_tf32_where_torch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.torch.cuda, "get_device_name", lambda asked: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert get_available_flops(torch.device("cuda"), torch.float32) == 156e12
    assert get_available_flops(torch.device("cpu"), torch.float32) is None


def test_what_a_precision_computes_in() -> None:
    names = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {name: compute_dtype(name) for name in names} == names

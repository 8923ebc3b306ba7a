"""A module in other formats: what comes out computes what the module computes, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import fitted

from lit_fast.demos.boring_classes import BoringModel, RandomDataset
from lit_fast.errors import LightningDeprecationWarning, MisconfigurationException


class Model(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(3, 32)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


@pytest.fixture
def model() -> Model:
    """After training, since a new one has no trainer that could be in the way."""
    made = Model()
    loader = torch.utils.data.DataLoader(RandomDataset(32, 4))
    fitted(made, loader, limit_val_batches=0, max_epochs=1)
    return made


def test_torch_export(model: Model) -> None:
    x = model.example_input_array
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript(model: Model, method: str, tmp_path: Path) -> None:
    trainer, x = model._trainer, torch.randn(5, 32)
    model.layer.eval()
    scripted = model.to_torchscript(tmp_path / "model.pt", method=method)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(x), model(x))
    assert not scripted.training and model.training and not model.layer.training and model._trainer is trainer


def test_torchscript_is_deprecated_and_needs_a_sample() -> None:
    with pytest.warns(LightningDeprecationWarning, match=r"torch.export.export") as heard:
        BoringModel().to_torchscript()
    assert heard[0].filename == __file__
    with pytest.warns(DeprecationWarning), pytest.raises(MisconfigurationException, match="example_input_array"):
        BoringModel().to_torchscript(method="trace")
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="'script' and 'trace'"):
        BoringModel().to_torchscript(method="other")


@pytest.mark.parametrize("options", [{"dynamo": False}, pytest.param({}, marks=pytest.mark.slow)])
def test_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model = Model()
    with pytest.raises(MisconfigurationException, match="input_sample"):
        BoringModel().to_onnx(tmp_path / "none.onnx")
    model.to_onnx(tmp_path / "model.onnx", **options)
    session = ReferenceEvaluator(onnx.load(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.input_names[0]: model.example_input_array.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(model.example_input_array).detach())
    assert model.training


def test_freezing_returns_the_module_and_all_gather_the_data() -> None:
    model = Model()
    assert model.freeze() is model and not model.training and model.unfreeze() is model and model.training
    fitted(model, torch.utils.data.DataLoader(RandomDataset(32, 2)), limit_val_batches=0, max_epochs=1)
    gathered = model.all_gather({"a": 1.5, "b": [torch.ones(2)], "c": "text"})
    assert gathered["a"] == torch.tensor(1.5) and torch.equal(gathered["b"][0], torch.ones(2))
    assert gathered["c"] == "text" and model.device_mesh is None

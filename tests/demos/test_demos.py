"""The demo models and data: Lightning's names, and one seed gives what it gives there."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from heart_models import QUIET

import lit_fast
from lit_fast import demos
from lit_fast.demos import boring_classes, lstm, transformer

# Sums in float64 of all weights after torch.manual_seed(3), and of one output, recorded with Lightning 2.6.6.
SUMS = {
    "DemoModel": (boring_classes.DemoModel, -1.0094979718269315),
    "Net": (boring_classes.Net, 1.371434293156069),
    "Transformer": (lambda: demos.Transformer(vocab_size=50), 2451.3039588984216),
    "SimpleLSTM": (lambda: demos.SimpleLSTM(vocab_size=50, ninp=16, nhid=16), -6.849002355580524),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_seed_gives_lightnings_weights(name: str) -> None:
    make, recorded = SUMS[name]
    torch.manual_seed(3)
    total = sum(float(value.double().sum()) for value in make().state_dict().values())
    assert total == pytest.approx(recorded, rel=1e-9)


def test_outputs_are_lightnings() -> None:
    tokens = torch.arange(10).view(2, 5)
    torch.manual_seed(3)
    model = demos.Transformer(vocab_size=50).eval()
    assert model(tokens, tokens + 1).sum().item() == pytest.approx(-2050.225341796875, rel=1e-6)
    torch.manual_seed(3)
    recurrent = demos.SimpleLSTM(vocab_size=50, ninp=16, nhid=16).eval()
    output, _ = recurrent(tokens, recurrent.init_hidden(2))
    assert output.sum().item() == pytest.approx(-1956.124755859375, rel=1e-6)


def test_random_data_is_one_draw() -> None:
    for kind in (boring_classes.RandomDataset, boring_classes.RandomDictDataset):
        torch.manual_seed(5)
        data: Any = kind(32, 64)
        torch.manual_seed(5)
        expected = torch.randn(64, 32)
        assert len(data) == 64 and torch.equal(data.data, expected)
    assert set(data[3]) == {"a", "b"} and torch.equal(data[3]["b"], expected[3] + 2)
    torch.manual_seed(5)
    rows = list(boring_classes.RandomIterableDatasetWithLen(4, 3))
    torch.manual_seed(5)
    assert len(rows) == 3 and all(torch.equal(row, torch.randn(4)) for row in rows)


def boring_by_hand(data: torch.Tensor) -> torch.Tensor:
    """What a fit of BoringModel over `data` does to a layer made by the same seed."""
    torch.manual_seed(4)
    layer = torch.nn.Linear(32, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for row in data:
        output = layer(row[None])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, torch.ones_like(output)).backward()
        optimizer.step()
    return layer.weight


@pytest.mark.parametrize("kind", [boring_classes.BoringModel, boring_classes.ManualOptimBoringModel])
def test_boring_models_train(kind: Any) -> None:
    torch.manual_seed(4)
    model, data = kind(), boring_classes.BoringDataModule()
    lit_fast.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=data)
    assert torch.equal(model.layer.weight, boring_by_hand(data.random_full.data[:64]))


def test_data_without_a_length_trains() -> None:
    model = boring_classes.BoringModel()
    trainer = lit_fast.Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, datamodule=boring_classes.BoringDataModuleNoLen())
    assert trainer.global_step == 512


def test_two_loaders_in_each_stage() -> None:
    data = boring_classes.IterableBoringDataModule()
    for stage, name in (("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")):
        data.setup(stage)
        known, unknown = getattr(data, f"{name}_dataloader")()
        assert len(list(known)) == len(list(unknown)) == len(known)


def test_language_models_learn(tmp_path: Any) -> None:
    (tmp_path / "wikitext-2.txt").write_text("a b c d\n" * 40)
    text = demos.WikiText2(tmp_path, block_size=5)
    assert text.vocab_size == 5 and len(text) == 39
    inputs, target = text[0]
    assert inputs.tolist() == [0, 1, 2, 3, 4] and target.tolist() == [1, 2, 3, 4, 0]
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(text, batch_sampler=demos.SequenceSampler(text, 3))

    class Small(demos.LightningLSTM):
        def __init__(self) -> None:
            super().__init__(vocab_size=5)
            self.model = lstm.SimpleLSTM(5, ninp=8, nhid=8, nlayers=1, dropout=0.0)
            self.losses: list[float] = []

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs["loss"].item())

    model = Small()
    lit_fast.Trainer(max_epochs=10, **QUIET).fit(model, loader)
    assert model.losses[-1] < model.losses[0] / 2 and model.hidden is None


def test_the_text_that_comes_with_python() -> None:
    tokens, dictionary = transformer.tokenize(transformer.python_help())
    assert len(tokens) > 50_000 and len(dictionary) < transformer.WIKITEXT2_WORDS
    assert int(tokens.max()) == len(dictionary) - 1


@pytest.mark.parametrize("name", ["boring_classes", "transformer", "lstm"])
def test_lightnings_paths(name: str) -> None:
    assert importlib.import_module(f"lit_fast.pytorch.demos.{name}") is importlib.import_module(
        f"lit_fast.demos.{name}"
    )
    assert set(demos.__all__) == {
        "BoringDataModule", "BoringModel", "DemoModel", "LightningLSTM", "LightningTransformer", "SequenceSampler",
        "SimpleLSTM", "Transformer", "WikiText2",
    }  # fmt: skip
    assert all(getattr(demos, each).__module__.startswith("lit_fast.demos.") for each in demos.__all__)

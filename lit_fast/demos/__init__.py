"""Small models and random data by Lightning's names: for tests, bug reports and first steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_fast import lazy

if TYPE_CHECKING:
    from lit_fast.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
    from lit_fast.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
    from lit_fast.demos.transformer import LightningTransformer, Transformer, WikiText2

__all__ = [
    "BoringDataModule",
    "BoringModel",
    "DemoModel",
    "LightningLSTM",
    "LightningTransformer",
    "SequenceSampler",
    "SimpleLSTM",
    "Transformer",
    "WikiText2",
]

_HOME = {
    "BoringDataModule": "boring_classes",
    "BoringModel": "boring_classes",
    "DemoModel": "boring_classes",
    "LightningLSTM": "lstm",
    "LightningTransformer": "transformer",
    "SequenceSampler": "lstm",
    "SimpleLSTM": "lstm",
    "Transformer": "transformer",
    "WikiText2": "transformer",
}


def __getattr__(name: str) -> Any:
    return lazy.find(__name__, _HOME, name)

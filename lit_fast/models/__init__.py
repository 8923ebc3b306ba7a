"""Language models that `lit-fast pretrain` trains: ordinary LightningModules, in eager PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_fast import lazy

if TYPE_CHECKING:
    from lit_fast.models.bigram import Bigram
    from lit_fast.models.gpt import GPT
    from lit_fast.models.language_model import LanguageModel
    from lit_fast.models.llama import Llama

__all__ = ["GPT", "Bigram", "LanguageModel", "Llama"]

_HOME = {"GPT": "gpt", "Bigram": "bigram", "LanguageModel": "language_model", "Llama": "llama"}


def __getattr__(name: str) -> Any:
    return lazy.find(__name__, _HOME, name)

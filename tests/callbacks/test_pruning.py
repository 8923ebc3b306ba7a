"""ModelPruning of a module in 16 bits; callback_programs.py compares what it computes otherwise with Lightning."""

from __future__ import annotations

from typing import Any

import torch
from heart_models import Plain, batches, trainer
from torch import Tensor, nn

from lit_fast.callbacks import ModelPruning


class Half(Plain):
    def loss(self, batch: Any) -> Tensor:
        return self.net(batch).float().square().mean()


def test_weights_of_16_bits_are_reset_in_their_dtype() -> None:
    model = Half()
    weights = [layer.weight for layer in model.net if isinstance(layer, nn.Linear)]
    begun = [w.detach().bfloat16() for w in weights]
    pruning = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False)
    trainer(callbacks=[pruning], max_epochs=2, precision="bf16-true").fit(model, batches(5))
    for layer, first in zip((each for each in model.net if isinstance(each, nn.Linear)), begun, strict=True):
        assert layer.weight_orig.dtype == torch.bfloat16
        assert torch.equal(layer.weight_orig, first)  # the last epoch ended with a reset
        assert bool((layer.weight_mask == 0).any())

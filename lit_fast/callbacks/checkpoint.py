"""The base by which the Trainer knows a callback that writes checkpoints: it is called after all others."""

from __future__ import annotations

from lit_fast.callbacks.callback import Callback


class Checkpoint(Callback):
    """Base of every callback that saves checkpoints. They run last, so that they see what others did."""

    reads_gradients = False

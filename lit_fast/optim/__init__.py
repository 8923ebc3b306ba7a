"""Optimizers, compiled, and `adopt`, which steps a `torch.optim` object by the core; one file a formula says how."""

from __future__ import annotations

from lit_fast.optim.adagrad import Adagrad
from lit_fast.optim.adamw import Adam, AdamW
from lit_fast.optim.adopt import adopt
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.lamb import Lamb
from lit_fast.optim.lion import Lion
from lit_fast.optim.muon import Muon
from lit_fast.optim.rmsprop import RMSprop
from lit_fast.optim.sgd import SGD
from lit_fast.optim.storage import to_torch_state_dict

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdoptedOptimizer",
    "Lamb",
    "Lion",
    "Muon",
    "RMSprop",
    "adopt",
    "to_torch_state_dict",
]

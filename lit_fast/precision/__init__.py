"""Precisions: in which dtypes a model computes. Subclass one and pass an object of it as `Trainer(plugins=...)`."""

from lit_fast.precision.amp import MixedPrecision
from lit_fast.precision.deepspeed import DeepSpeedPrecision
from lit_fast.precision.double import DoublePrecision
from lit_fast.precision.half import HalfPrecision
from lit_fast.precision.precision import Precision
from lit_fast.precision.resolve import precision_plugin, resolve_precision

__all__ = [
    "DeepSpeedPrecision",
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "precision_plugin",
    "resolve_precision",
]

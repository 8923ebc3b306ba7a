"""`DoublePrecision`: weights, inputs and arithmetic in float64."""

from __future__ import annotations

import torch

from lit_fast.precision.half import TruePrecision


class DoublePrecision(TruePrecision):
    """Everything in float64.

    Example:
        >>> DoublePrecision().convert_module(torch.nn.Linear(2, 1)).weight.dtype
        torch.float64
    """

    precision = "64-true"
    dtype = torch.float64

"""Optimizers: `adopt` steps a `torch.optim` object through the compiled core; one file a formula says how."""

from __future__ import annotations

from lit_fast.optim.adopt import AdoptedOptimizer, adopt

__all__ = ["AdoptedOptimizer", "adopt"]

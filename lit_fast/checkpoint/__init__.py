"""Checkpoints: files that are whole or not there (`io`), and the state of every random generator (`rng`)."""

from __future__ import annotations

from lit_fast.checkpoint import io, rng
from lit_fast.checkpoint.io import load, save

__all__ = ["io", "load", "rng", "save"]

"""Lightning's module name for the summary drawn by rich."""

from __future__ import annotations

from lit_fast.callbacks.model_summary import RichModelSummary

__all__ = ["RichModelSummary"]

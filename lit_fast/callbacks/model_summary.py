"""A table of the model's layers at the start of a fit."""

from __future__ import annotations

import logging
from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.model_summary import format_table, summarize, totals

log = logging.getLogger(__name__)


class ModelSummary(Callback):
    """Shows layers, parameters, sizes and FLOPs when a fit starts; as plain text, by way of logging.

    Args:
        max_depth: levels of nesting to list; -1 for all, 0 switches the summary off.
        summarize_kwargs: passed to `summarize`.

    Example::

        Trainer(callbacks=[ModelSummary(max_depth=-1)])
    """

    reads_gradients = False

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        super().__init__()
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._max_depth:
            return
        summary = self._summary(trainer, pl_module)
        if trainer.is_global_zero:
            self.summarize(
                summary._get_summary_data(),
                summary.total_parameters,
                summary.trainable_parameters,
                summary.model_size,
                summary.total_training_modes,
                total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )

    def _summary(self, trainer: Any, pl_module: Any) -> Any:
        return summarize(pl_module, max_depth=self._max_depth)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Show one summary. Override it to show it elsewhere.

        Args:
            summary_data: the table, column by column: title, and one text per row.
            model_size: megabytes (1e6 bytes).
            total_training_modes: how many submodules are in training ("train") and in evaluation mode ("eval").
            total_flops: of one forward of the example input.
        """
        numbers = (total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        log.info("\n%s", format_table(summary_data, *numbers))


class RichModelSummary(ModelSummary):
    """The same as a table on the terminal, by rich.

    Args:
        max_depth: levels of nesting to list; -1 for all, 0 switches the summary off.
        summarize_kwargs: `header_style` of the table (rich's style), "bold magenta" when left out.
    """

    reads_gradients = False

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        from rich import get_console
        from rich.table import Table

        console = get_console()
        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for title, _ in summary_data:
            right = title in ("Params", "Params per Device", "FLOPs", "In sizes", "Out sizes")
            table.add_column(title, justify="right" if right else "left", no_wrap=title == "Name")
        for row in zip(*(texts for _, texts in summary_data), strict=True):
            table.add_row(*row)
        console.print(table)
        numbers = (total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        for label, value in totals(*numbers):
            console.print(f"[bold]{label}[/]: {value}", highlight=False)

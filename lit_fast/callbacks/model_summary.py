"""A table of the model's layers at the start of a fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_fast.callbacks.callback import Callback

log = logging.getLogger(__name__)


@dataclass
class LayerSummary:
    """One row: a submodule, its class, and the elements of its parameters."""

    name: str
    type: str
    parameters: int
    training: bool
    lazy: bool = False  # has parameters whose shapes are not known yet


@dataclass
class Summary:
    """The numbers of a whole model. Parameters that several layers share are counted once.

    Attributes:
        model_size: megabytes (1e6 bytes) of all parameters in their own dtypes.
        total_training_modes: how many submodules are in training and in evaluation mode.
    """

    layers: list[LayerSummary]
    total_parameters: int
    trainable_parameters: int
    model_size: float
    total_training_modes: dict[str, int]
    lazy: bool

    def columns(self) -> list[tuple[str, list[str]]]:
        """The table, column by column: title, and one text per row."""
        return [
            (" ", [str(i) for i in range(len(self.layers))]),
            ("Name", [layer.name for layer in self.layers]),
            ("Type", [layer.type for layer in self.layers]),
            ("Params", [count(layer.parameters) + ("?" if layer.lazy else "") for layer in self.layers]),
            ("Mode", ["train" if layer.training else "eval" for layer in self.layers]),
        ]

    def __str__(self) -> str:
        ending = totals(self.total_parameters, self.trainable_parameters, self.model_size, self.total_training_modes)
        return text(self.columns(), ending)


def summarize(module: nn.Module, max_depth: int = 1) -> Summary:
    """Count a module's parameters and list its layers.

    Args:
        max_depth: levels of nesting to list; -1 for all, 0 for none.

    Example::

        >>> summarize(nn.Linear(2, 3)).total_parameters
        9
    """
    parameters = list(module.parameters())
    known = [parameter for parameter in parameters if not _is_lazy(parameter)]
    modes = [child.training for child in module.modules() if child is not module]
    return Summary(
        layers=list(_layers(module, max_depth)),
        total_parameters=sum(parameter.numel() for parameter in known),
        trainable_parameters=sum(parameter.numel() for parameter in known if parameter.requires_grad),
        model_size=sum(parameter.numel() * parameter.element_size() for parameter in known) / 1e6,
        total_training_modes={"train": sum(modes), "eval": len(modes) - sum(modes)},
        lazy=len(known) < len(parameters),
    )


def _layers(module: nn.Module, max_depth: int) -> Iterator[LayerSummary]:
    for name, child in module.named_modules():
        if not name or (max_depth != -1 and name.count(".") >= max_depth):
            continue
        parameters = list(child.parameters())
        known = [parameter for parameter in parameters if not _is_lazy(parameter)]
        total = sum(parameter.numel() for parameter in known)
        yield LayerSummary(name, type(child).__name__, total, child.training, len(known) < len(parameters))


def _is_lazy(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def count(number: int) -> str:
    """A count with three digits at least and a unit: 999, 1.2 K, 124 M.

    Example::

        >>> count(1234), count(124_439_808)
        ('1.2 K', '124 M')
    """
    power = min(4, (len(str(number)) - 1) // 3)
    if power == 0:
        return str(number)
    value = number / 1000**power
    return f"{math.floor(value)} {'KMBT'[power - 1]}" if value >= 100 else f"{value:.1f} {'KMBT'[power - 1]}"


def totals(
    total_parameters: int, trainable_parameters: int, model_size: float, total_training_modes: dict[str, int]
) -> list[tuple[str, str]]:
    """The lines under the table: label and value."""
    return [
        ("Trainable params", count(trainable_parameters)),
        ("Non-trainable params", count(total_parameters - trainable_parameters)),
        ("Total params", count(total_parameters)),
        (
            "Total estimated model params size (MB)",
            f"{model_size:,.3f}" if model_size < 1 else f"{model_size:,.0f}",
        ),
        ("Modules in train mode", str(total_training_modes["train"])),
        ("Modules in eval mode", str(total_training_modes["eval"])),
    ]


def text(columns: list[tuple[str, list[str]]], ending: list[tuple[str, str]]) -> str:
    """A table of `Summary.columns` and below it the lines of `totals`, as plain text."""
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    titles = " | ".join(title.ljust(width) for (title, _), width in zip(columns, widths, strict=True))
    lines = [titles, "-" * len(titles)]
    for row in zip(*(cells for _, cells in columns), strict=True):
        lines.append(" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    lines.append("-" * len(titles))
    return "\n".join([*lines, *(f"{value:<9} {label}" for label, value in ending)])


class ModelSummary(Callback):
    """Shows layers, parameters and size when a fit starts; as plain text, by way of logging.

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
        if not self._max_depth or not trainer.is_global_zero:
            return
        summary = summarize(pl_module, self._max_depth)
        self.summarize(
            summary.columns(),
            summary.total_parameters,
            summary.trainable_parameters,
            summary.model_size,
            summary.total_training_modes,
            0,
            **self._summarize_kwargs,
        )

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
        """Show one summary. Override it to show it elsewhere. `total_flops` is not counted: always 0."""
        ending = totals(total_parameters, trainable_parameters, model_size, total_training_modes)
        log.info("\n%s", text(summary_data, ending))


class RichModelSummary(ModelSummary):
    """The same as a table on the terminal, by rich.

    Args:
        max_depth: levels of nesting to list; -1 for all, 0 switches the summary off.
        summarize_kwargs: `header_style` of the table (rich's style), "bold" when left out.
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
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(header_style=summarize_kwargs.get("header_style", "bold"))
        for title, _ in summary_data:
            table.add_column(title, justify="right" if title == "Params" else "left", no_wrap=title != "Name")
        for row in zip(*(texts for _, texts in summary_data), strict=True):
            table.add_row(*row)
        console.print(table)
        for label, value in totals(total_parameters, trainable_parameters, model_size, total_training_modes):
            console.print(f"[bold]{label}[/]: {value}", highlight=False)

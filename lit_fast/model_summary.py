"""What a model consists of: its layers, their parameters and modes and, by an example input, their sizes and FLOPs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
LEFTOVER_PARAMS_NAME = "other params"
_UNITS = (" ", "K", "M", "B", "T")


class LayerSummary:
    """One submodule: its class, mode and parameters, and the sizes of its next forward's input and output.

    Example::

        >>> layer = torch.nn.Linear(2, 3)
        >>> summary = LayerSummary(layer)
        >>> _ = layer(torch.ones(4, 2))
        >>> summary.num_parameters, summary.in_size, summary.out_size
        (9, [4, 2], [4, 3])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._in_size: str | list[Any] | None = None
        self._out_size: str | list[Any] | None = None
        scripted = isinstance(module, torch.jit.ScriptModule)  # refuses hooks
        self._hook_handle = None if scripted else module.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, *kwargs.values())
        self._in_size = parse_batch_shape(given[0] if len(given) == 1 else given)
        self._out_size = parse_batch_shape(output)
        self.detach_hook()

    def detach_hook(self) -> None:
        """Look at no forward any more."""
        if self._hook_handle is not None:
            self._hook_handle.remove()

    def __del__(self) -> None:
        self.detach_hook()

    @property
    def in_size(self) -> str | list[Any]:
        """Shape of the input, nested as the input is; "?" before a forward."""
        return self._in_size or UNKNOWN_SIZE

    @property
    def out_size(self) -> str | list[Any]:
        """Shape of the output, nested as the output is; "?" before a forward."""
        return self._out_size or UNKNOWN_SIZE

    @property
    def layer_type(self) -> str:
        """Name of the class."""
        return type(self._module).__name__

    @property
    def num_parameters(self) -> int:
        """Elements of its parameters, its children's included."""
        return sum(p.numel() for p in _known(self._module))

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self._module.training


class ModelSummary:
    """A table of a LightningModule's layers; `str` of it is the text.

    Where the module has an `example_input_array`, it is run once (in evaluation mode, without gradients) for sizes and
    FLOPs. Parameters that several layers share count once in the totals.

    Args:
        model: a LightningModule, with or without a Trainer.
        max_depth: levels of nesting to list; -1 for all, 0 for none.

    Raises:
        ValueError: another depth.

    Example::

        print(ModelSummary(model, max_depth=-1))
    """

    def __init__(self, model: Any, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"max_depth={max_depth!r}: allowed are -1 (all), 0 (none), or a number of levels.")
        self._model = model
        self._max_depth = max_depth
        self._flop_counter: Any = None
        if any(True for _ in _unknown(model)):
            warnings.warn(
                "The model has parameters whose shapes are not known before its first forward; they are not counted. "
                "Set example_input_array, or run it once.",
                stacklevel=3,
            )
        self._layer_summary = self.summarize()

    # -- layers

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The submodules that a summary looks at."""
        if self._max_depth == 0:
            return []
        if self._max_depth == 1:
            return list(self._model.named_children())
        return list(self._model.named_modules())[1:]

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at every layer, and run the example input through the model where there is one."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        try:
            if getattr(self._model, "example_input_array", None) is not None:
                self._forward_example_input()
        finally:
            for layer in layers.values():
                layer.detach_hook()
        deep = self._max_depth
        return {name: layer for name, layer in layers.items() if deep < 1 or name.count(".") < deep}

    def _forward_example_input(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model, trainer = self._model, self._model._trainer
        self._flop_counter = FlopCounterMode(display=False, depth=self._max_depth + 1)
        given = model._apply_batch_transfer_handler(model.example_input_array)
        precision: AbstractContextManager[Any] = nullcontext()
        if trainer is not None:
            precision = trainer.precision_plugin.forward_context()
        with _evaluating(model), torch.no_grad(), precision, self._flop_counter:
            if isinstance(given, list | tuple):
                model(*given)
            elif isinstance(given, dict):
                model(**given)
            else:
                model(given)

    @property
    def layer_names(self) -> list[str]:
        """Names within the model."""
        return list(self._layer_summary)

    @property
    def layer_types(self) -> list[str]:
        """Names of the classes."""
        return [layer.layer_type for layer in self._layer_summary.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """Shapes of the inputs."""
        return [layer.in_size for layer in self._layer_summary.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """Shapes of the outputs."""
        return [layer.out_size for layer in self._layer_summary.values()]

    @property
    def param_nums(self) -> list[int]:
        """Elements of the parameters."""
        return [layer.num_parameters for layer in self._layer_summary.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each is in training mode."""
        return [layer.training for layer in self._layer_summary.values()]

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """Floating point operations of the example's forward, by layer and operator."""
        counted = {} if self._flop_counter is None else self._flop_counter.get_flop_counts()
        return {name: counted.get(f"{type(self._model).__name__}.{name}", {}) for name in self.layer_names}

    # -- the whole model

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many submodules are in training and in evaluation mode."""
        modes = [module.training for module in self._model.modules()][1:]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def total_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel() for p in _known(self._model))

    @property
    def trainable_parameters(self) -> int:
        """Elements of those with `requires_grad`."""
        return sum(p.numel() for p in _known(self._model) if p.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """Elements of the listed layers' parameters; nested layers count in each."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """Megabytes (1e6 bytes) of all parameters, each in its own dtype."""
        return sum(p.numel() * p.element_size() for p in _known(self._model)) / 1e6

    @property
    def total_flops(self) -> int:
        """Floating point operations of the example's forward; 0 without an example."""
        return 0 if self._flop_counter is None else int(self._flop_counter.get_total_flops())

    # -- as text

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        """The table, column by column: title, and one text per row."""
        columns = [
            (" ", [str(index) for index in range(len(self._layer_summary))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", [get_human_readable_count(number) for number in self.param_nums]),
            ("Mode", ["train" if mode else "eval" for mode in self.training_modes]),
            ("FLOPs", [get_human_readable_count(sum(counts.values())) for counts in self.flop_counts.values()]),
        ]
        if getattr(self._model, "example_input_array", None) is not None:
            columns.append(("In sizes", [str(size) for size in self.in_sizes]))
            columns.append(("Out sizes", [str(size) for size in self.out_sizes]))
        leftover = self.total_parameters - self.total_layer_params
        if leftover > 0:  # parameters of the model itself
            own = {" ": " ", "Name": LEFTOVER_PARAMS_NAME, "Params": get_human_readable_count(leftover)}
            for title, texts in columns:
                texts.append(own.get(title, NOT_APPLICABLE))
        return columns

    def __str__(self) -> str:
        totals = (self.total_parameters, self.trainable_parameters, self.model_size, self.total_training_modes)
        return format_table(self._get_summary_data(), *totals, self.total_flops)

    __repr__ = __str__


def summarize(lightning_module: Any, max_depth: int = 1) -> ModelSummary:
    """The summary of a module; arguments as `ModelSummary`."""
    return ModelSummary(lightning_module, max_depth=max_depth)


def totals(
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: dict[str, int],
    total_flops: int,
) -> list[tuple[str, str]]:
    """The lines under the table: label and value."""
    return [
        ("Trainable params", get_human_readable_count(trainable_parameters)),
        ("Non-trainable params", get_human_readable_count(total_parameters - trainable_parameters)),
        ("Total params", get_human_readable_count(total_parameters)),
        ("Total estimated model params size (MB)", get_formatted_model_size(model_size)),
        ("Modules in train mode", str(total_training_modes["train"])),
        ("Modules in eval mode", str(total_training_modes["eval"])),
        ("Total FLOPs", get_human_readable_count(total_flops)),
    ]


def format_table(columns: list[tuple[str, list[str]]], *numbers: Any) -> str:
    """Columns and totals (the arguments of `totals`) as lines of text."""
    widths = [max(map(len, (title, *texts))) for title, texts in columns]
    rows = [[title for title, _ in columns], *zip(*(texts for _, texts in columns), strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * (sum(widths) + 3 * (len(columns) + 1))
    return "\n".join([lines[0], rule, *lines[1:], rule, *(f"{value:<10}{label}" for label, value in totals(*numbers))])


def parse_batch_shape(batch: Any) -> str | list[Any]:
    """The shape of whatever has one, lists and tuples item by item; "?" for all else."""
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, list | tuple):
        return [parse_batch_shape(item) for item in batch]
    return UNKNOWN_SIZE


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes with three decimals."""
    return f"{total_model_size:,.3f}"


def get_human_readable_count(number: int) -> str:
    """A count in thousands, millions, billions or trillions, two digits at least.

    Example::

        >>> get_human_readable_count(1234), get_human_readable_count(124_439_808), get_human_readable_count(123)
        ('1.2 K', '124 M', '123  ')
    """
    if number < 0:
        raise ValueError(f"number={number}: a count cannot be negative.")
    digits = int(math.log10(number)) + 1 if number else 1
    power = min((digits - 1) // 3, len(_UNITS) - 1)
    value = number / 1000**power
    return f"{int(value):,d} {_UNITS[power]}" if power == 0 or value >= 100 else f"{value:,.1f} {_UNITS[power]}"


def _known(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if not _is_unknown(p))


def _unknown(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if _is_unknown(p))


def _is_unknown(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training

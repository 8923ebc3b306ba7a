"""What each operation of one step moves and computes, counted while the step runs, call by call.

Bytes are the least that an operation has to move: every input read once, every output written once, at the size that it
has in memory (an expanded tensor at that of its storage). Lookups (`embedding`, `index`, ...) read what they return and
their indices, not the table; views and allocations move nothing. FLOPs are those of torch's own formulas
(torch.utils.flop_counter), for matrix products, convolutions and attention.

**Model and hardware FLOPs.** Hardware FLOPs are all that ran. Model FLOPs leave out what was computed a second time:
what a backward node computes with gradients enabled (activation checkpointing runs a forward there; derivatives run
without), and a fifth of attention's fused backward, which forms the scores anew (one of its five products).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index", "aten::take"}
_WRITE_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_", "aten::bernoulli_"}
_CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"  # torch 2.13 has no formula under this name


class Cost(NamedTuple):
    """Of one call."""

    bytes: float
    flops: float | None = None
    dtype: str = "float32"  # that the FLOPs are computed in


class Costs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that runs inside, in order, by its name.

    Example:
        >>> a, b = torch.ones(4, 8), torch.ones(8, 2)
        >>> with Costs() as costs:
        ...     _ = a @ b
        >>> costs.calls["aten::mm"]
        [Cost(bytes=224.0, flops=128.0, dtype='float32')]
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[Cost]] = {}
        self.model_flops = self.hardware_flops = 0.0
        self.uncounted: dict[str, str] = {}  # operations that could not be counted, and why

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None:  # an operator of higher order, such as torch.cond: its insides come one by one
            return func(*args, **kwargs)
        name = schema.name
        if (
            name not in _FORMULAS and not torch.is_grad_enabled()
        ):  # whole only where no gradient is wanted: aten::linear
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        if not _moves_nothing(schema):
            try:
                self._count(name, schema, args, kwargs, out)
            except Exception as error:  # of a tensor of another kind: the step goes on
                self.uncounted[name] = f"{type(error).__name__}: {error}"
        return out

    def _count(self, name: str, schema: Any, args: Any, kwargs: Any, out: Any) -> None:
        flops: float | None = None
        formula = _FORMULAS.get(name)
        if formula is not None:
            flops = float(formula(*args, **kwargs, out_val=out))
            self.hardware_flops += flops
            self.model_flops += flops * _of_the_model(name)
        dtype = next((str(t.dtype) for t in tree_iter((args, out)) if isinstance(t, Tensor)), "torch.float32")
        moved = float(_bytes(name, schema, args, kwargs, out))
        self.calls.setdefault(name, []).append(Cost(moved, flops, dtype.removeprefix("torch.")))


def _of_the_model(name: str) -> float:
    """The share of an operation's FLOPs that is no repetition."""
    in_backward = torch._C._current_autograd_node() is not None
    if in_backward and torch.is_grad_enabled():
        return 0.0
    return 0.8 if "attention" in name and name.endswith("_backward") else 1.0


def _moves_nothing(schema: Any) -> bool:
    if schema.name.startswith(("aten::empty", "aten::new_empty")):
        return True
    returned = [value.alias_info for value in schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)  # a view


def _size(tensor: Tensor) -> int:
    try:
        return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError):  # sparse: no storage
        return tensor.numel() * tensor.element_size()


def _bytes(name: str, schema: Any, args: Any, kwargs: Any, out: Any) -> int:
    made = sum(_size(t) for t in tree_iter(out) if isinstance(t, Tensor))
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if name in _LOOKUPS:
        return 2 * made + sum(_size(t) for t in given if not t.is_floating_point())
    if name in _WRITE_ONLY:
        return made + sum(_size(t) for t in given[1:])
    if schema.returns or not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return made + sum(_size(t) for t in given)
    written = {a.name: a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    again = (t for key in written for t in tree_iter(named.get(key)) if isinstance(t, Tensor))
    return sum(map(_size, given)) + sum(map(_size, again))  # torch._foreach_*_, fused steps: they return nothing


def _formulas() -> dict[str, Callable[..., Any]]:
    from torch.utils import flop_counter

    forward: Callable[..., int] = flop_counter.sdpa_flop_count
    backward: Callable[..., int] = flop_counter.sdpa_backward_flop_count

    known = {
        packet._qualified_op_name: formula
        for packet, formula in flop_counter.flop_registry.items()
        if hasattr(packet, "_qualified_op_name")
    }

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return forward(query.shape, key.shape, value.shape)

    def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return backward(grad.shape, query.shape, key.shape, value.shape)

    known.setdefault(_CPU_ATTENTION, attention)
    known.setdefault(f"{_CPU_ATTENTION}_backward", attention_backward)
    return known


_FORMULAS = _formulas()

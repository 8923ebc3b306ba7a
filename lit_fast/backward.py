"""From what `training_step` returned to gradients: reading the loss, weighting it, running the autograd engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException

Losses: TypeAlias = Callable[[Any], tuple[Tensor, ...]]


def read_losses(output: Any) -> tuple[Tensor, ...]:
    """The loss in a tuple, to loop over; empty where `training_step` returned None, or a weight of 0.

    Raises:
        MisconfigurationException: no scalar tensor, and no dict with one under "loss"; or a weight that is none.
    """
    if type(output) is Tensor and not output.dim():
        return (output,)
    loss = loss_of(output)
    return () if loss is None or weighs_nothing(weight_of(output)) else (loss,)


def loss_of(output: Any) -> Tensor | None:
    """The loss, 0-dim; None where `training_step` returned None. Raises as `read_losses`."""
    if output is None:
        warnings.warn("training_step returned None: that batch is skipped, which is fine if it is meant.", stacklevel=4)
        return None
    if isinstance(output, Tensor):
        loss: Any = output
    elif hasattr(output, "get"):
        loss = output.get("loss")
        if loss is None:
            raise MisconfigurationException(
                f"training_step returned a dict with the keys {sorted(map(str, output))}; it must hold 'loss'."
            )
    else:
        loss = output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"training_step returned {type(loss).__name__}; allowed are a scalar tensor, a dict with one under 'loss', "
            f"or None to skip this batch."
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step returned a loss of shape {tuple(loss.shape)}; return one number, such as loss.mean()."
        )
    return loss.reshape(())


def weight_of(output: Any) -> float | Tensor | None:
    """What the micro-batch weighs in its window, or None where `training_step` does not say.

    Returns:
        A number; or, where it lies on another device than the CPU, a 0-dim float32 tensor there, which nobody waits
        for: a negative one becomes NaN, since it cannot be refused unread.

    Raises:
        MisconfigurationException: it is no number of at least 0.
    """
    weight = output.get("weight") if hasattr(output, "get") else None
    if weight is None:
        return None
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex() or weight.dtype is torch.bool:
            raise MisconfigurationException(
                f"training_step returned a weight of shape {tuple(weight.shape)} and {weight.dtype}; the 'weight' "
                f"beside a loss is one number of at least 0, such as its number of tokens. Give what else you return "
                f"another name."
            )
        weight = weight.detach()
        if weight.device.type != "cpu":
            weight = weight.reshape(()).to(torch.float32)
            return torch.where(weight >= 0.0, weight, torch.nan)
        weight = weight.item()
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0.0 <= float(weight) < math.inf:
        raise MisconfigurationException(
            f"training_step returned weight={weight!r}; the 'weight' beside a loss is one number of at least 0, such "
            f"as its number of tokens (0: this micro-batch counts nothing)."
        )
    return float(weight)


def weighs_nothing(weight: float | Tensor | None) -> bool:
    """Whether there is nothing to differentiate; a weight on another device is not waited for."""
    return isinstance(weight, float) and weight == 0.0


def losses_over(length: int) -> Losses:
    if length == 1:
        return read_losses
    return lambda output: tuple(loss / length for loss in read_losses(output))


def no_losses(output: Any) -> tuple[Tensor, ...]:
    """Of manual optimization, where `training_step` runs backward itself.

    Raises:
        MisconfigurationException: it returned something that is no tensor, dict or None.
    """
    if output is not None and not isinstance(output, Tensor) and not hasattr(output, "items"):
        raise MisconfigurationException(
            f"training_step returned {type(output).__name__}; in manual optimization a tensor, a dict or None is "
            f"allowed."
        )
    return ()


def no_backward(loss: Tensor) -> None: ...


def detached(losses: Losses) -> Callable[[Any], Tensor | None]:
    def returned_loss(output: Any) -> Tensor | None:
        for loss in losses(output):
            return loss.detach().clone()
        return None

    return returned_loss


def outputs_of(output: Any, losses: Losses) -> dict[str, Any]:
    """What `on_train_batch_end` gets: the detached loss (not a copy, which would cost more than the hook itself), and
    whatever else the step's dict held."""
    if type(output) is Tensor and losses is read_losses:  # what nearly every step returns
        return {"loss": output.detach()}
    for loss in losses(output):
        extra = {key: value for key, value in output.items() if key != "loss"} if hasattr(output, "items") else {}
        return {"loss": loss.detach(), **extra}
    return {} if output is None else {**output, "loss": output["loss"].detach()}  # its weight is 0


def manual_outputs(output: Any) -> dict[str, Any]:
    """The same in manual optimization, where `training_step` need not return anything."""
    if output is None:
        return {}
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    return dict(output)


def engine_backward(weight: float, device: torch.device) -> Callable[[Tensor], None]:
    """Backward through the engine itself: `loss.backward()` builds the same call anew each time, for 8 us more."""
    run_backward = torch.autograd.Variable._execution_engine.run_backward
    seeds = {torch.float32: (torch.full((), weight, device=device, dtype=torch.float32),)}

    def backward(loss: Tensor) -> None:
        seed = seeds.get(loss.dtype)
        if seed is None:
            seed = seeds[loss.dtype] = (torch.full((), weight, device=loss.device, dtype=loss.dtype),)
        run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)

    return backward

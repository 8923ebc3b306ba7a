"""What a micro-batch counts in its window of accumulated gradients: its loss, its backward, and the mean at the end.

That is 1/N each in a window of N. A `training_step` may return how much its mean loss weighs, `{"loss": ..., "weight":
tokens}`: the first time that one does, everything here is bound anew for weights, so a fit without them pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fast import step
from lit_fast.backward import (
    Losses,
    engine_backward,
    loss_of,
    losses_over,
    no_backward,
    no_losses,
    read_losses,
    weighs_nothing,
    weight_of,
)
from lit_fast.calls import in_table
from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    from lit_fast.binding import Binding, StepPlan
    from lit_fast.strategies.strategy import Strategy

NOT_EVERY_WEIGHT = (
    "training_step returned a loss without a 'weight', and others of this fit came with one: what it weighs in its "
    "window is unknown. Return {'loss': ..., 'weight': ...} from every micro-batch, or from none; a weight of 0 leaves "
    "one out."
)


class Place(NamedTuple):
    """Of a micro-batch in its window. `short`: the window was to be of `length`, and the data ended."""

    first: bool
    last: bool
    length: int
    short: bool = False


class WindowWeights:
    """What the micro-batches of the running window weigh, and what follows for its gradients.

    With means m_i of weight w_i the window's gradient is sum(w_i dm_i) / sum(w_i), and the sum is known only at its
    end. Until then each gradient counts w_i / (N w_1), N being the window's length and w_1 the first weight that is
    not 0; the factor N w_1 / sum(w_i) is left for the step. So gradients keep the size that they have without weights,
    as float16 needs, and equal weights give the bits of no weights.

    With W processes both sums go over all of them. They need one reference in the place of w_1, the mean of their
    first weights, which is found once. Their strategy makes gradients their mean over W, so that N W w / sum(w) is left
    for the step: sum(w) is one number, sent between the window's last forward and backward, and read after that.

    Weights on a GPU stay there, and with them everything that is computed here.

    Args:
        strategy: of the processes, where there are several.
    """

    def __init__(self, strategy: Strategy | None = None) -> None:
        self.strategy = strategy if strategy is not None and strategy.world_size > 1 else None
        self._reference: float | None = None  # of all processes
        self.begin()

    def begin(self) -> None:
        """A new window: there are no gradients."""
        self.length = 1
        self.reference: float | Tensor | None = self._reference  # w_1, or what stands for it
        self.total: float | Tensor = 0.0  # of w_i / w_1
        self.share: float | Tensor = 1.0  # of the micro-batch that runs
        self._sum: tuple[Tensor, Any] | None = None  # `total` of all processes, and what has to be waited for

    def losses(self, place: Place, divided: bool) -> Losses:
        """What reads the losses of a micro-batch there; `divided` as in `losses_until_weighted`.

        Raises, when called:
            MisconfigurationException: a loss without a weight, or with one that is none.
        """

        def read(output: Any) -> tuple[Tensor, ...]:
            if place.first:
                self.begin()
            self.length = place.length
            loss = loss_of(output)
            weight = 0.0 if loss is None else weight_of(output)
            if weight is None:
                raise MisconfigurationException(NOT_EVERY_WEIGHT)
            if self.strategy is not None and self.reference is None:
                self.reference = self._reference = self._mean_weight(weight)
            losses: tuple[Tensor, ...] = ()
            if loss is not None and not weighs_nothing(weight):
                divisor = self.add(weight, place.length)
                self.share = 1.0 / divisor
                losses = (loss / divisor if divided else loss,)
            if place.last and self.strategy is not None:
                self._ask_others()
            return losses

        return read

    def _mean_weight(self, weight: float | Tensor) -> float | None:
        """Of those that processes have now, and are not 0; None where all are. Waits, once in a fit."""
        assert self.strategy is not None
        mine = torch.stack([torch.as_tensor(weight, dtype=torch.float64).cpu(), torch.tensor(float(weight > 0.0))])
        total, count = self.strategy.reduce(mine.to(self.strategy.root_device), reduce_op="sum").tolist()
        return float(total / count) if count else None

    def _ask_others(self) -> None:
        assert self.strategy is not None
        total = torch.as_tensor(self.total, dtype=torch.float64, device=self.strategy.root_device).clone()
        self._sum = total, dist.all_reduce(total, async_op=True)

    def _mean_total(self) -> float | Tensor:
        """`total`; of several processes the mean."""
        if self.strategy is None or self._sum is None:
            return self.total
        total, work = self._sum
        work.wait()
        mean = total / self.strategy.world_size
        return mean.item() if mean.is_cpu else mean.to(torch.float32)

    def add(self, weight: float | Tensor, length: int) -> float | Tensor:
        """One more micro-batch, whose gradient counts one part in what is returned."""
        if self.reference is None:
            self.reference = torch.where(weight > 0.0, weight, 1.0) if isinstance(weight, Tensor) else weight
        self.length = length
        self.total = self.total + weight / self.reference
        return length * (self.reference / weight)

    def backward(self, loss: Tensor) -> None:
        """As `engine_backward`, seeded with the micro-batch's share."""
        if isinstance(self.share, Tensor):
            seed = self.share.to(loss.device, loss.dtype)
        else:
            seed = torch.full((), self.share, dtype=loss.dtype, device=loss.device)
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )

    def factor(self) -> float | Tensor:
        """What makes the gradients that were gathered their weighted mean."""
        if self.reference is None:
            return 1.0
        total = self._mean_total()
        if isinstance(total, Tensor):
            return torch.where(total != 0.0, self.length / total, 1.0)
        return self.length / total if total else 1.0

    def average(self, multiply: Callable[[float | Tensor], None]) -> None:
        """Make the gradients their weighted mean, in place; what is gathered on top of it is weighted against it."""
        factor = self.factor()
        if isinstance(factor, Tensor) or factor != 1.0:
            multiply(factor)
        if self.reference is not None:
            self.reference, self.total, self._sum = self.reference / factor, float(self.length), None

    def step(self, step: Callable[..., Any]) -> Callable[[], Any]:
        """`step(grad_scale=...)` with the factor folded in: a number, or a tensor on the device that steps."""
        return lambda: step(grad_scale=self.factor())

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "reference": self.reference, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length, self.reference, self.total = state["length"], state["reference"], state["total"]


def losses_until_weighted(length: int, divided: bool, switch: Callable[[], Losses]) -> Losses:
    """The losses of a window of several micro-batches, as long as none comes with a weight.

    Args:
        divided: give the loss divided by `length`, for hooks that see it; else as it is, for a seeded backward.
        switch: is called at the first weight; gives what reads the losses from there on.
    """

    def as_it_is(output: Any) -> tuple[Tensor, ...]:
        if type(output) is Tensor and not output.dim():  # what nearly every step returns
            return (output,)
        return read_losses(output) if weight_of(output) is None else switch()(output)

    def over_length(output: Any) -> tuple[Tensor, ...]:
        if type(output) is Tensor and not output.dim():
            return (output / length,)
        if weight_of(output) is None:
            return tuple(loss / length for loss in read_losses(output))
        return switch()(output)

    return over_length if divided else as_it_is


def whole_losses(output: Any) -> tuple[Tensor, ...]:
    """The loss, whatever it weighs."""
    loss = loss_of(output)
    return () if loss is None else (loss,)


def bind_backward(binding: Binding, place: Place) -> tuple[Losses, Callable[[Tensor], None], Losses]:
    """What reads the losses, what runs backward from one, and what reads those that hooks and closures are given.

    A micro-batch's share of its window is the engine's seed, which costs nothing; the loss is multiplied by it where a
    hook sees what is differentiated.
    """
    if not binding.automatic:
        return no_losses, no_backward, no_losses
    module, trainer = binding.module, binding.trainer
    hooks = binding.automatic_hooks("on_before_backward")
    own = binding.overrides("backward")
    divided = bool(binding.plugin_backward or own or hooks or trainer.strategy.has_engine)
    shown = losses_over(place.length)
    backward = engine_backward(1.0 if divided else 1.0 / place.length, trainer.config.device)
    losses: Losses
    if place.length == 1 and not binding.several:
        losses = read_losses
    elif binding.weights is None:
        divides = divided and place.length > 1
        losses = losses_until_weighted(place.length, divides, lambda: _first_weight(binding, place))
    else:
        losses = binding.weights.losses(place, divided)
        binding.rows.append(("backward", "training_step", "returns a weight with its loss, which makes that share"))
        shown, backward = whole_losses, backward if divided else binding.weights.backward
    if binding.plugin_backward:
        optimizer, strategy = trainer.optimizers[0], trainer.strategy

        def by_plugin(loss: Tensor) -> None:
            strategy.backward(loss, optimizer)

        return losses, by_plugin, shown
    if own:
        backward = in_table(module.backward, binding.log, binding.log.table("backward", "train"), 1)
    if binding.stepping.scaler is None:
        return losses, backward, shown
    scale = binding.stepping.scaler.scale

    def scaled(loss: Tensor) -> None:
        loss = scale(loss)
        for hook in hooks:
            hook(loss)
        backward(loss)

    return losses, scaled, shown


def _first_weight(binding: Binding, place: Place) -> Losses:
    if not place.first and any(p.grad is not None for p in binding.parameters()):
        raise MisconfigurationException(NOT_EVERY_WEIGHT)  # there is a gradient of a loss without
    binding.weigh()
    return binding.placed[place].losses


def bind_mean(binding: Binding, plan: StepPlan, place: Place) -> None:
    """In the plan of a window's last micro-batch: make the gradients its mean, where their shares are not that yet.

    With weights in the step's own pass over the gradients, unless somebody can look at them: then in place, before.
    """
    weights = binding.weights if place.length > 1 or binding.several else None
    inline = plan.run is step.inline
    if weights is None:
        if place.short:
            before_the_step(plan, inline, lambda: _stretch(binding))
        return
    if not inline or plan.on_before_optimizer_step or plan.clip or binding.stepping.gradients_are_watched():
        before_the_step(
            plan, inline, lambda: weights.average(binding.multiply_gradients), lambda: weights.reference is None
        )
        row = (
            "on_before_optimizer_step",
            "weights",
            "gradients made their weighted mean, in place: a hook can see them",
        )
        binding.rows.insert(0, row)
        return
    update = weights.step(binding.stepping.update_of(0))
    plan.update = (binding.wrap("optimizer", binding.trainer._recorded("optimizer_step", update)),)
    binding.rows.append(("update", "weights", "gradients made their weighted mean, in registers"))


def before_the_step(
    plan: StepPlan, inline: bool, make_mean: Callable[[], None], is_empty: Callable[[], bool] = lambda: False
) -> None:
    """Bind `make_mean` after the last backward; a closure returns None where its window `is_empty`."""
    if inline:
        plan.on_before_optimizer_step = (make_mean, *plan.on_before_optimizer_step)
        return
    returned_loss = plan.returned_loss  # what a closure calls last

    def mean_and_loss(output: Any) -> Tensor | None:
        make_mean()
        return None if is_empty() else returned_loss(output)

    plan.returned_loss = mean_and_loss


def zero_for_none(returned_loss: Callable[[Any], Tensor | None]) -> Callable[[Any], Tensor]:
    """What a closure returns where others take the same step: a process without a loss must not leave it out alone."""

    def loss_or_zero(output: Any) -> Tensor:
        loss = returned_loss(output)
        return torch.zeros(()) if loss is None else loss

    return loss_or_zero


def _stretch(binding: Binding) -> None:
    """The window is shorter than the shares of its micro-batches were made for."""
    length = binding.progress.batch_idx % binding.window + 1
    binding.multiply_gradients(binding.window / length)

"""Keep an average of the weights beside the ones that are trained: validate with it, save it, end with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule

log = logging.getLogger(__name__)

_PREFIX = "module."  # of the model's names in the state of an AveragedModel


class WeightAveraging(Callback):
    """Averages the weights over training with `torch.optim.swa_utils.AveragedModel`.

    Validation runs on the average, and after the fit the module holds it. A checkpoint has the average in
    `state_dict`, the weights being trained in `current_model_state`, and how far the average has got in
    `averaging_state`.

    Override `should_update` to choose when the average takes the weights in: by default after every step of the
    optimizer, each time with the same weight.

    Args:
        device: where the average is kept; None: where the module is.
        use_buffers: average the buffers too. Where False the average has copies of the module's.
        **kwargs: arguments of `AveragedModel`: `avg_fn` or `multi_avg_fn`.

    Example::

        class Late(WeightAveraging):
            def should_update(self, step_idx=None, epoch_idx=None):
                return step_idx is not None and step_idx >= 1000

        Trainer(callbacks=[Late()]).fit(model)
    """

    reads_gradients = False

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        super().__init__()
        unknown = set(kwargs) - {"avg_fn", "multi_avg_fn"}
        if unknown or len(kwargs) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} was given {', '.join(sorted(kwargs))}; allowed besides `device` and "
                f"`use_buffers` is one of `avg_fn` and `multi_avg_fn`."
            )
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average_model: AveragedModel | None = None
        # The share of the weights in an update, by the number of updates before it; None: the user has a function.
        self._share: Callable[[int], float] | None = None if kwargs else _equal_share
        self._latest_update_step = 0  # optimizer steps taken when the average was last updated after a step
        self._latest_update_epoch = -1
        self._swapped = False  # the module holds the average, and `_average_model` the weights being trained
        self._unrounded: dict[str, Tensor] = {}  # while swapped: what the module holds of the average in fewer bits

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update the average now. Asked after every optimizer step and at the end of every training epoch.

        Args:
            step_idx: index of the step that was taken, from 0; None at the end of an epoch.
            epoch_idx: index of the epoch that ends, from 0; None after a step.
        """
        return step_idx is not None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if is_overridden("configure_model", pl_module, LightningModule):
            warnings.warn(
                f"{type(self).__name__} calls {type(pl_module).__name__}.configure_model() now, since it copies the "
                f"whole model; layers are not sharded there, and may not fit into memory.",
                stacklevel=2,
            )
            pl_module.configure_model()
        self._average_model = AveragedModel(pl_module, use_buffers=self._use_buffers, **self._kwargs)
        self._swapped = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        average = self._average_model
        assert average is not None
        # Its own counter stays on the CPU, where looking at it does not wait for the device.
        average.module.to(pl_module.device if self._device is None else self._device)
        pairs = zip(average.module.parameters(), pl_module.parameters(), strict=True)
        if any(ours.dtype != theirs.dtype for ours, theirs in pairs) and self._share is not None:
            # The module was cast to 16 bits, in which an average cannot grow by small parts. The average stays as it
            # was; torch's functions over lists of tensors do not mix dtypes.
            share = self._share
            average.multi_avg_fn = None
            average.avg_fn = lambda ours, theirs, n: _between(ours, theirs, share(int(n)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps = trainer.global_step
        if steps > self._latest_update_step and self.should_update(step_idx=steps - 1):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            self._latest_update_step = steps

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        average, current = self._pairs(pl_module)
        _copy(current, average)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._average_model is not None:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._average_model is not None:
            self._swap(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._swapped:  # a checkpoint that is saved now, and the caller's module, are to be in order
            self._swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            log.info("%s has no average outside a fit; the checkpoint holds the module's weights.", type(self).__name__)
            return
        state = self._average_model.state_dict()
        average = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        current = checkpoint["state_dict"]
        if self._swapped:  # saved in the middle of a validation
            average, current = {**current, **self._unrounded}, average
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, current
        checkpoint["averaging_state"] = {k: value for k, value in state.items() if not k.startswith(_PREFIX)}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        average, weights = self._average_model, checkpoint["state_dict"]
        if average is None:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint is loaded outside a fit, so its average is the module's "
                f"weights, and no averaging goes on. Leave the callback out to be rid of this warning.",
                stacklevel=2,
            )
        elif "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            state = {_PREFIX + name: value for name, value in weights.items()} | checkpoint["averaging_state"]
            average.load_state_dict(state, strict=pl_module.strict_loading)
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)
        else:
            warnings.warn(
                f"The checkpoint was saved without {type(self).__name__}: the average begins with its weights.",
                stacklevel=2,
            )
            average.module.load_state_dict(weights, strict=False)

    def _pairs(self, pl_module: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers of the average, and those of the module, by name, in the same order."""
        assert self._average_model is not None
        module = self._average_model.module
        average = dict(chain(module.named_parameters(), module.named_buffers()))
        current = dict(chain(pl_module.named_parameters(), pl_module.named_buffers()))
        names = [name for name in current if name in average]
        return {name: average[name].detach() for name in names}, {name: current[name].detach() for name in names}

    def _swap(self, pl_module: Any) -> None:
        average, current = self._pairs(pl_module)
        unrounded, self._unrounded = self._unrounded, {}
        if not self._swapped:
            self._unrounded = {n: kept.clone() for n, kept in average.items() if kept.dtype != current[n].dtype}
        held = {name: tensor.clone() for name, tensor in current.items()}
        _copy(current, average)
        _copy(average, held | unrounded)
        self._swapped = not self._swapped


def _equal_share(n: int) -> float:
    return 1 / (n + 1)


def _between(ours: Tensor, theirs: Tensor, share: float) -> Tensor:
    if ours.is_floating_point() or ours.is_complex():
        return torch.lerp(ours, theirs.to(ours.dtype), share)
    return ours * (1 - share) + theirs * share  # counters of batches, which have no `lerp`; torch truncates them, too


def _copy(into: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    if into:
        torch._foreach_copy_(list(into.values()), [source[name] for name in into])


class EMAWeightAveraging(WeightAveraging):
    """The exponential moving average: `average = decay * average + (1 - decay) * weights`.

    The first update copies the weights.

    Args:
        device, use_buffers: as in `WeightAveraging`.
        decay: how much of the average an update keeps, in [0, 1].
        update_every_n_steps: update after every so many optimizer steps, counted from the first; 0: not after steps.
        update_starting_at_step: index of the first step, from 0, that may update; None: every one.
        update_starting_at_epoch: update at the end of every epoch too, from this one on, counted from 0; None: never.

    Raises:
        ValueError: a `decay` outside [0, 1].

    Example::

        Trainer(callbacks=[EMAWeightAveraging(decay=0.999, update_every_n_steps=10)])
    """

    reads_gradients = False

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(device, use_buffers, multi_avg_fn=update, **kwargs)
        self._share = lambda n: 1 - decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            if begun and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0:
                return True
        if epoch_idx is not None and self.update_starting_at_epoch is not None:
            return epoch_idx >= self.update_starting_at_epoch
        return False

"""`Precision`: full precision, and the base of every other one.

A step calls none of these methods by itself. What a subclass overrides is bound into the plan (binding.py) where
Lightning calls it; what it does not override costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_fast.ops import refuse_sparse_gradients

if TYPE_CHECKING:
    from lit_fast.module import LightningModule

OURS = __name__.rpartition(".")[0]


class Precision:
    """float32 throughout. Subclass it, override what should differ, and pass an object as `Trainer(plugins=...)`.

    Example::

        class ScaledLoss(Precision):
            def pre_backward(self, tensor, module):
                return super().pre_backward(tensor * 8, module)

        Trainer(plugins=[ScaledLoss()])
    """

    precision: str = "32-true"

    # -- the model and its data

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Called before a fit's plan is bound; may return other optimizers and schedulers."""
        return model, optimizers, lr_schedulers

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the weights, in place."""
        return module

    def convert_input(self, data: Any) -> Any:
        """A batch as the model takes it; called before it is moved to the device."""
        return data

    def convert_output(self, data: Any) -> Any:
        """What the model returns, as the caller takes it. Called by Fabric, not by the Trainer."""
        return data

    # -- contexts: each call gives one that is entered once

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Inside, new tensors have this precision's dtype."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Inside, new modules have this precision's dtype."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Around the forward pass of every stage, unless that stage's own context is overridden."""
        return nullcontext()

    def train_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def val_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def test_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def predict_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def bind(self, function: Callable[..., Any], stage: str = "train") -> Callable[..., Any]:
        """A step under the context of its stage; the function itself where there is nothing to enter.

        Args:
            stage: "train", "val", "test" or "predict".
        """
        name = f"{stage}_step_context"
        if not self.asks_for(name, "forward_context"):
            return self._bind_own(function)
        context = getattr(self, name)

        def in_context(*args: Any) -> Any:
            with context():
                return function(*args)

        return in_context

    def _bind_own(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`bind` where nobody overrides a context: our classes may know a cheaper way than its `forward_context`."""
        return function

    # -- backward

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        """The tensor to run backward from, after `on_before_backward` has seen it."""
        module.trainer._run_step_hooks("on_before_backward", tensor)
        return tensor

    def backward(
        self, tensor: Tensor, model: LightningModule, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> None:
        """Run backward; `optimizer` is None in manual optimization, the rest is what the caller gave for it."""
        model.backward(tensor, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        """After backward: `on_after_backward`. Returns the tensor without its graph."""
        module.trainer._run_step_hooks("on_after_backward")
        return tensor.detach()

    # -- the optimizer's step

    def optimizer_step(
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """One step of `optimizer`, with `closure` (forward and backward) and what follows it inside.

        An override that calls this steps through the optimizer's own `step`, not the compiled one.
        """

        def evaluate() -> Any:
            result = closure()
            self._after_closure(model, optimizer)
            return result

        return optimizer.step(closure=evaluate, **kwargs)  # type: ignore[call-overload, unused-ignore]

    def _after_closure(self, model: LightningModule, optimizer: Optimizer) -> None:
        """What Lightning does between backward and the update: a hook, then clipping in automatic optimization."""
        trainer = model.trainer
        trainer._run_step_hooks("on_before_optimizer_step", optimizer)
        if model.automatic_optimization:
            model.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str | None = "norm"
    ) -> None:
        """Clip the gradients of one optimizer, rewriting them; nothing for a limit of 0 or less."""
        if clip_val <= 0:
            return
        if gradient_clip_algorithm == "value":
            self.clip_grad_by_value(optimizer, clip_val)
        else:
            self.clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = list(self.main_params(optimizer))
        refuse_sparse_gradients(parameters)
        nn.utils.clip_grad_value_(parameters, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = list(self.main_params(optimizer))
        refuse_sparse_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, clip_val)

    def main_params(self, optimizer: Optimizer) -> Iterator[nn.Parameter]:
        """The parameters whose gradients are clipped."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Undo the scale of the loss in the gradients, where there is one."""

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint keeps under the name of the class; nothing is written where it is empty."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def teardown(self) -> None:
        """The run is over."""

    # -- for whoever binds

    def asks_for(self, *names: str) -> bool:
        """Whether one of these methods is somebody else's: of a class outside this room, or put on the object."""
        kind = type(self)
        return any(
            name in vars(self) or not getattr(getattr(kind, name), "__module__", "").startswith(OURS) for name in names
        )

    @property
    def converts_input(self) -> bool:
        return "convert_input" in vars(self) or type(self).convert_input is not Precision.convert_input


class default_dtype(AbstractContextManager[None]):
    """Tensors made inside have this dtype by default."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self.before)

"""Every process has the whole model, and keeps and steps 1/N of it: of the optimizer's state there is one in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_fast.distributed.learning import DEFAULT_SIZES
from lit_fast.distributed.sharded_optimizer import ShardedOptimizer
from lit_fast.distributed.shards import GradientShards
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule
from lit_fast.optim.scaling import is_torchs_own
from lit_fast.strategies.ddp import DDPStrategy

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# What a precision plugin of somebody else's would do with whole gradients.
_OF_WHOLE_GRADIENTS = (
    "optimizer_step", "clip_gradients", "clip_grad_by_value", "clip_grad_by_norm", "main_params", "unscale_gradients",
)  # fmt: skip


class ZeRO1Strategy(DDPStrategy):
    """Data parallel with a sharded optimizer: `Trainer(strategy="zero1", devices=4)`.

    Gradients are summed so that each process gets its part of the mean, steps that part of the parameters, and all
    parts are gathered again while the next batch is on its way: nobody waits for a parameter until it is used. Weights
    are those of `DDPStrategy`, and so are checkpoints, at any number of processes. Optimizers must update each element
    by itself (AdamW, Adam, SGD, Lion, Adagrad, RMSprop).

    `p.grad` of the model is None after backward: this process's part of the gradients is in the param groups of the
    optimizer, whose parameters are 1-D views of what it keeps, as they arrived; the step unscales and clips in
    registers.

    Args:
        hide_gather: wait for a gathered parameter when it is used; else at once.
        options: of `DDPStrategy`.

    Raises:
        MisconfigurationException: when a fit begins, an optimizer or a precision plugin that needs whole gradients.

    Example::

        Trainer(devices=4, strategy=ZeRO1Strategy(bucket_cap_mb=50))
    """

    strategy_name = "zero1"

    def __init__(self, *args: Any, hide_gather: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.hide_gather = hide_gather
        self._sharded: dict[Optimizer, ShardedOptimizer] = {}
        self._bound_for: list[Any] = []

    @property
    def shards_gradients(self) -> bool:  # type: ignore[override]
        return self.world_size > 1

    # -- a run

    def setup_optimizers(self, trainer: Trainer) -> None:
        if self.world_size == 1:
            return
        self._refuse_whole_gradients()
        before = self._sharded
        self._sharded = {}
        for each in self.optimizers:
            known = before.get(each)
            self._sharded[each] = known or ShardedOptimizer(each, self._names, self.group, self._sizes or DEFAULT_SIZES)
        self.buckets = None

    def _names(self) -> dict[nn.Parameter, str]:
        assert self.lightning_module is not None
        return {p: name for name, p in self.lightning_module.named_parameters()}

    def _refuse_whole_gradients(self) -> None:
        precision, module = self.precision_plugin, self.lightning_module
        scaler = getattr(precision, "scaler", None)
        what = ""
        if precision.asks_for(*_OF_WHOLE_GRADIENTS):
            what = f"{type(precision).__name__} steps or clips by itself"
        elif scaler is not None and not is_torchs_own(scaler):
            what = f"{type(scaler).__name__} unscales by itself"
        elif scaler is not None and any(
            is_overridden(name, module, LightningModule) for name in ("configure_gradient_clipping", "clip_gradients")
        ):
            what = f"{type(module).__name__} clips by itself gradients that are still scaled"
        if what:
            raise MisconfigurationException(
                f"strategy='zero1': {what}, and a process has parts of the gradients alone. Use strategy='ddp', or "
                f"leave unscaling, clipping and the step to the Trainer."
            )

    def refresh(self) -> None:
        """Buckets for the parameters that are trained now."""
        if self.world_size == 1:
            return
        homes = []
        for sharded in self._sharded.values():
            sharded.take_in()
            sharded.watch(self.flights)
            for bucket in sharded.buckets:
                bucket.arrive()
                bucket.move_in()
                bucket.sends = any(p.requires_grad for p in bucket.params)
            homes += [bucket for bucket in sharded.buckets if bucket.sends]
        asked = [(id(p), p.requires_grad, getattr(p, "grad_dtype", None)) for home in homes for p in home.params]
        if self.buckets is not None:
            if asked == self._bound_for:
                return
            self.buckets.remove_hooks()
        self.buckets, self._bound_for = None, asked
        if homes:
            self.buckets = GradientShards(homes, self.group, wire_dtype=self.wire_dtype, riders=self.control)
            if self.flights is not None:
                self.buckets.watch(self.flights)

    def bind_update(self, optimizer: Optimizer, update: Callable[..., Any]) -> Callable[..., Any]:
        sharded = self._sharded.get(optimizer)
        if sharded is None:
            return update
        hidden = self._hides()[0]

        def step_and_gather(*args: Any, **kwargs: Any) -> Any:
            sharded.arrive()  # of an earlier step without a backward
            result = update(*args, **kwargs)
            sharded.gather(hidden)
            return result

        return step_and_gather

    def _hides(self) -> tuple[bool, str]:
        """Whether the gather is waited for only where a parameter is used; and why not."""
        if not self.hide_gather:
            return False, "waited for at once: hide_gather=False"
        for name, child in self.lightning_module.named_modules() if self.lightning_module is not None else ():
            compiled = getattr(child, "_compiled_call_impl", None) or hasattr(child, "_orig_mod")
            if compiled or isinstance(child, torch.jit.ScriptModule):
                return False, f"waited for at once: {name or type(child).__name__} is compiled, and reads them unseen"
        return True, "hidden: each bucket is waited for when one of its parameters is used"

    def shared_norm(self, optimizer: Optimizer) -> Callable[..., Tensor] | None:
        sharded = self._sharded.get(optimizer)
        return None if sharded is None else sharded.norm

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Any) -> None:
        sharded = self._sharded.get(optimizer)
        if sharded is None or algorithm == "value" or clip_val <= 0:
            super().clip_gradients(optimizer, clip_val, algorithm)
        else:
            sharded.clip_by_norm(clip_val)

    def param_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        sharded = self._sharded.get(optimizer)
        if sharded is None:
            return super().param_groups(optimizer)
        whole = sharded.groups_of_whole()
        return [{**group, "params": params} for group, params in zip(optimizer.param_groups, whole, strict=True)]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for sharded in self._sharded.values():
            yield from sharded.named_shards()
        yield from super().named_parameters()

    def teardown(self) -> None:
        for sharded in self._sharded.values():
            sharded.arrive()
            sharded.watch(None)
        super().teardown()

    def on_exception(self, error: BaseException) -> None:
        for sharded in self._sharded.values():
            for bucket in sharded.buckets:
                bucket.give_up()  # the other ranks may be gone
        super().on_exception(error)

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        yield from super().note_rows()
        for optimizer, sharded in self._sharded.items():
            kept, total = sharded.elements()
            name = type(optimizer).__name__
            yield ("update", "ZeRO1Strategy", f"{name} steps {kept:,} of {total:,} elements, the other ranks the rest")
        if self._sharded:
            yield ("update", "ZeRO1Strategy", f"all ranks' parts gathered, {self._hides()[1]}")

    # -- state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """All of it in the first process; in the others without the states of parameters. All must call it."""
        sharded = self._sharded.get(optimizer)
        return super().optimizer_state(optimizer) if sharded is None else sharded.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        sharded = self._sharded.get(optimizer)
        if sharded is None:
            super().load_optimizer_state(optimizer, state)
        else:
            sharded.load_state_dict(state)

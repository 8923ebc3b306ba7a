"""Freeze parts of a model before training and let them join the optimizer in later epochs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException

log = logging.getLogger(__name__)

Modules: TypeAlias = "nn.Module | Iterable[Any]"  # a module, or an iterable of them, nested at will
Groups: TypeAlias = "list[dict[str, Any]]"


def multiplicative(epoch: int) -> float:
    """The default schedule of `BackboneFinetuning`: the rate doubles every epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Base of callbacks that freeze and unfreeze: define `freeze_before_training` and `finetune_function`.

    `freeze_before_training` runs in `setup`, before `configure_optimizers`, which should then give the optimizer only
    the parameters with `requires_grad`. `finetune_function` runs at the start of every epoch, once per optimizer; what
    it unfreezes must enter the optimizer as a new parameter group (`unfreeze_and_add_param_group`). The groups are
    part of checkpoints: a resumed run has them again, and what they had unfrozen is unfrozen.

    Example::

        class UnfreezeAtFive(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.features)

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 5:
                    self.unfreeze_and_add_param_group(pl_module.features, optimizer)
    """

    reads_gradients = False

    def __init__(self) -> None:
        # per optimizer: its groups, with names in the place of parameters
        self._internal_optimizer_metadata: dict[int, Groups] = {}
        self._restarting = False

    # -- for subclasses to define

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze what is not to be trained from the first step."""
        raise NotImplementedError(f"{type(self).__name__} must define freeze_before_training(self, pl_module)")

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is due in `epoch`, and give it to `optimizer`."""
        raise NotImplementedError(
            f"{type(self).__name__} must define finetune_function(self, pl_module, epoch, optimizer)"
        )

    # -- tools

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Every module that owns parameters, or has no children, in `modules` and below."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        found: Iterable[nn.Module]
        if isinstance(modules, Iterable):  # nn.Sequential and nn.ModuleList are iterables too
            found = [leaf for module in modules for leaf in BaseFinetuning.flatten_modules(module)]
        else:
            found = modules.modules()
        return [module for module in found if module._parameters or not any(True for _ in module.children())]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters in `modules` whose `requires_grad` is as given; with `train_bn=False` without batch norm's."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Unfreeze all parameters; batch norm gathers statistics again."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the parameters that `module` itself owns, its children's not; batch norm gathers no statistics."""
        _set_trainable(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters; with `train_bn` all but those of batch norm."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of `params` that the optimizer does not have yet; a warning where it has some."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        given = list(params)
        fresh = [parameter for parameter in given if id(parameter) not in known]
        if len(fresh) < len(given):
            name = type(optimizer).__name__
            warnings.warn(
                f"{len(given) - len(fresh)} of {len(given)} parameters are in a group of {name} already and are left "
                f"there. Give it only what is trained from the start: "
                f"{name}(filter(lambda p: p.requires_grad, self.parameters()), ...).",
                stacklevel=3,
            )
        return fresh

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze `modules` and add their parameters to `optimizer` as a new group.

        Args:
            lr: rate of the new group; None: that of the first group, divided by `initial_denom_lr`.
            train_bn: whether batch norm's parameters are added.
        """
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        found = BaseFinetuning.filter_params(modules, train_bn=train_bn)
        fresh = BaseFinetuning.filter_on_optimizer(optimizer, found)
        if fresh:
            optimizer.add_param_group({"params": fresh, "lr": rate})

    # -- hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._restarting:
            return
        self._restarting = False
        parameters = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            if index not in self._internal_optimizer_metadata:
                continue
            held = trainer.strategy.param_groups(optimizer)
            before = {id(parameter) for group in held for parameter in group["params"]}
            groups = self._apply_mapping_to_param_groups(self._internal_optimizer_metadata[index], parameters)
            optimizer.param_groups = groups
            # `setup` has frozen them anew
            added = {id(parameter) for group in groups for parameter in group["params"]} - before
            for module in pl_module.modules():
                if any(id(parameter) in added for parameter in module.parameters(recurse=False)):
                    _set_trainable(module, True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            count = len(optimizer.param_groups)
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._store(pl_module, index, count, trainer.strategy.param_groups(optimizer))

    def state_dict(self) -> dict[str, Any]:
        return {"internal_optimizer_metadata": self._internal_optimizer_metadata}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restarting = True
        # files of Lightning before 1.7 hold the metadata bare
        self._internal_optimizer_metadata = state_dict.get("internal_optimizer_metadata", state_dict)

    @staticmethod
    def _apply_mapping_to_param_groups(param_groups: Groups, mapping: dict[Any, Any]) -> Groups:
        """The groups with every entry of "params" looked up in `mapping`."""
        return [{**group, "params": [mapping[entry] for entry in group["params"]]} for group in param_groups]

    def _store(self, pl_module: Any, opt_idx: int, num_param_groups: int, current_param_groups: Groups) -> None:
        """Remember the groups of one optimizer, those that are new since there were `num_param_groups`."""
        known = self._internal_optimizer_metadata.setdefault(opt_idx, [])
        new = current_param_groups[num_param_groups:] if known else current_param_groups
        if new:
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            known.extend(self._apply_mapping_to_param_groups(new, names))


class BackboneFinetuning(BaseFinetuning):
    """Trains the module's `backbone` from an epoch on, with a rate of its own that grows every epoch.

    Args:
        unfreeze_backbone_at_epoch: the first epoch (from 0) that trains the backbone.
        lambda_func: epoch -> factor on the backbone's rate, for each epoch after that.
        backbone_initial_ratio_lr: the backbone's first rate as a share of the first group's.
        backbone_initial_lr: the backbone's first rate itself, in place of the ratio.
        should_align: stop the growth at the first group's rate.
        initial_denom_lr: as in `unfreeze_and_add_param_group`; it has no effect where a rate is known, as here.
        train_bn: whether the backbone's batch norm is trained after unfreezing.
        verbose: log both rates every epoch.
        rounding: decimals of the logged rates.

    Raises:
        MisconfigurationException: the module has no `backbone` that is an `nn.Module`.

    Example::

        Trainer(callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.5)])
    """

    reads_gradients = False

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise MisconfigurationException(
                f"BackboneFinetuning trains `module.backbone`, and {type(pl_module).__name__} has no nn.Module of that "
                f"name; call it so, or derive from BaseFinetuning."
            )
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        head = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            given = self.backbone_initial_lr
            rate = head * self.backbone_initial_ratio_lr if given is None else given
            self.unfreeze_and_add_param_group(
                pl_module.backbone, optimizer, rate, train_bn=self.train_bn, initial_denom_lr=self.initial_denom_lr
            )
        else:
            assert self.previous_backbone_lr is not None
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and rate > head:
                rate = head
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            log.info("Epoch %d: lr %s, backbone lr %s", epoch, round(head, self.rounding), round(rate, self.rounding))


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trainable
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trainable

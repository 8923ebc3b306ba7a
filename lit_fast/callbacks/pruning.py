"""Prune weights while training, with `torch.nn.utils.prune`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import prune

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.module import LightningModule

log = logging.getLogger(__name__)

Parameters: TypeAlias = "Sequence[tuple[nn.Module, str]]"

# name -> (method for the whole model at once, function for one tensor)
_FUNCTIONS: dict[str, tuple[type[prune.BasePruningMethod], Callable[..., Any]]] = {
    "l1_unstructured": (prune.L1Unstructured, prune.l1_unstructured),
    "ln_structured": (prune.LnStructured, prune.ln_structured),
    "random_structured": (prune.RandomStructured, prune.random_structured),
    "random_unstructured": (prune.RandomUnstructured, prune.random_unstructured),
}
_CONTAINERS = (LightningModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ModelPruning(Callback):
    """Sets a share of the weights to zero after every epoch, and keeps them there.

    Args:
        pruning_fn: "l1_unstructured", "random_unstructured", "ln_structured", "random_structured", or a subclass of
            `torch.nn.utils.prune.BasePruningMethod`.
        parameters_to_prune: (module, name) pairs; all of the model's where empty.
        parameter_names: of "weight" and "bias", which ones; both by default.
        use_global_unstructured: rank all parameters together; False: each tensor by itself.
        amount: a share (float) or a number (int) of what is left, or a function epoch -> either; 0 skips the epoch.
        apply_pruning: whether to prune at all, or a function epoch -> bool.
        make_pruning_permanent: at the end of the fit and in checkpoints, write the pruned weights in the place of
            weights and masks; training goes on with the masks.
        use_lottery_ticket_hypothesis: after pruning, reset the remaining weights to where they were before training
            (True), or a function epoch -> bool. See Frankle and Carbin 2019, https://arxiv.org/abs/1803.03635.
        resample_parameters: reset them to newly drawn weights instead (`module.reset_parameters()`).
        pruning_dim: for structured pruning, the dimension along which channels are removed.
        pruning_norm: for "ln_structured", the n of the norm that ranks channels.
        verbose: 0 silent, 1 log the sparsity, 2 log every tensor's.
        prune_on_train_epoch_end: at the end of training epochs; False: of validation epochs.

    Raises:
        MisconfigurationException: an argument is out of range or contradicts another; in `setup`, a parameter is not
            the model's.

    Example::

        Trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.2)])
    """

    PARAMETER_NAMES = ("weight", "bias")
    reads_gradients = False

    def __init__(
        self,
        pruning_fn: Callable[..., Any] | str,
        parameters_to_prune: Parameters = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: int | float | Callable[[int], int | float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        for name in parameter_names or ():
            if name not in self.PARAMETER_NAMES:
                raise MisconfigurationException(
                    f"ModelPruning(parameter_names={parameter_names!r}): allowed are 'weight' and 'bias'."
                )
        if not (isinstance(amount, int | float) or callable(amount)):
            raise MisconfigurationException(
                f"ModelPruning(amount={amount!r}): allowed are a share (float), a number (int), or a function of the "
                f"epoch that returns either."
            )
        if verbose not in (0, 1, 2):
            raise MisconfigurationException(f"ModelPruning(verbose={verbose!r}): allowed are 0, 1 and 2.")
        self._global = use_global_unstructured
        self._options: dict[str, Any] = {}  # of the pruning method, but for `amount`
        self.pruning_fn = self._resolve(pruning_fn, pruning_dim, pruning_norm)
        self.amount = amount
        self._parameters_to_prune = parameters_to_prune
        self._parameter_names = parameter_names or self.PARAMETER_NAMES
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        # what each pruned module was before training, by the module's id
        self._original_layers: dict[int, nn.Module] = {}

    def live_hooks(self, trainer: Any = None) -> set[str]:
        unused = "on_validation_epoch_end" if self._prune_on_train_epoch_end else "on_train_epoch_end"
        return self._without(super().live_hooks(trainer), ModelPruning, unused)

    def _resolve(self, given: Any, dim: int | None, norm: int | None) -> Callable[..., Any]:
        """What prunes: a method class for all parameters together, a function for one tensor."""
        if not isinstance(given, str):
            if not (inspect.isclass(given) and issubclass(given, prune.BasePruningMethod)):
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={given!r}): allowed are {', '.join(map(repr, _FUNCTIONS))}, and a "
                    f"subclass of torch.nn.utils.prune.BasePruningMethod (the class, not an instance)."
                )
            if not self._global:
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={given.__name__}) is a class, which needs use_global_unstructured=True; "
                    f"for each tensor by itself pass one of {', '.join(map(repr, _FUNCTIONS))}."
                )
            method: type[prune.BasePruningMethod] = given
            self._pruning_method_name = method.__name__
        else:
            name = given.lower()
            if name not in _FUNCTIONS:
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={given!r}): allowed are {', '.join(map(repr, _FUNCTIONS))}."
                )
            if name.endswith("_structured"):
                if dim is None:
                    raise MisconfigurationException(f"ModelPruning(pruning_fn={given!r}) needs pruning_dim.")
                self._options["dim"] = dim
            if name == "ln_structured":
                if norm is None:
                    raise MisconfigurationException(f"ModelPruning(pruning_fn={given!r}) needs pruning_norm.")
                self._options["n"] = norm
            method, function = _FUNCTIONS[name]
            self._pruning_method_name = method.__name__ if self._global else function.__name__
            if not self._global:
                return partial(function, **self._options)
        kind = getattr(method, "PRUNING_TYPE", None)
        if kind != "unstructured":
            raise MisconfigurationException(
                f"ModelPruning(use_global_unstructured=True) ranks single weights, and {method.__name__} is of type "
                f"{kind!r}; pass use_global_unstructured=False."
            )
        return method

    # -- for subclasses to override

    def filter_parameters_to_prune(self, parameters_to_prune: Parameters = ()) -> Parameters:
        """Leave out what is not to be pruned."""
        return parameters_to_prune

    # -- hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        found = self.sanitize_parameters_to_prune(pl_module, self._parameters_to_prune, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(found)
        if self._use_lottery_ticket_hypothesis:
            self._original_layers = {}
            for module, _ in self._parameters_to_prune:
                if id(module) not in self._original_layers:
                    self._original_layers[id(module)] = deepcopy(module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._prune_on_train_epoch_end:
            self._run_pruning(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and not self._prune_on_train_epoch_end:
            self._run_pruning(trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._make_pruning_permanent:
            self.make_pruning_permanent(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._make_pruning_permanent:
            checkpoint["state_dict"] = _with_masks_applied(pl_module.state_dict())

    # -- pruning

    def _run_pruning(self, current_epoch: int) -> None:
        wanted, amount = _at(self._apply_pruning, current_epoch), _at(self.amount, current_epoch)
        if wanted and amount:
            self.apply_pruning(amount)
            if _at(self._use_lottery_ticket_hypothesis, current_epoch):
                self.apply_lottery_ticket_hypothesis()

    def apply_pruning(self, amount: int | float) -> None:
        """Prune `amount` of the parameters chosen in `setup`."""
        before = self._zeros() if self._verbose else []
        if self._global:
            options = {**self._options, "amount": amount}
            accepted = inspect.signature(self.pruning_fn).parameters
            options = {name: value for name, value in options.items() if name in accepted}
            prune.global_unstructured(self._parameters_to_prune, pruning_method=self.pruning_fn, **options)
        else:
            for module, name in self._parameters_to_prune:
                self.pruning_fn(module, name=name, amount=amount)
        if self._verbose:
            self._report(before, self._zeros(), amount)

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Reset the weights that are left to where they were before training, or to newly drawn ones."""
        origins = {key: self._origin(layer) for key, layer in self._original_layers.items()}
        for module, name in self._parameters_to_prune:
            target, source = getattr(module, f"{name}_orig", None), getattr(origins[id(module)], name)
            target = getattr(module, name) if target is None else target
            if isinstance(target, Tensor) and isinstance(source, Tensor):
                # On one device weights and origin share memory from here on, as in Lightning: the next reset, if
                # nothing is resampled, finds the weights where they are.
                target.data = source.data.to(target.device, target.dtype)

    def _origin(self, layer: nn.Module) -> nn.Module:
        """A layer to reset to: as it was before training, or a copy with newly drawn weights."""
        if not self._resample_parameters or not callable(getattr(layer, "reset_parameters", None)):
            return layer
        drawn = deepcopy(layer)
        drawn.reset_parameters()  # type: ignore[operator]
        return drawn

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Write the pruned weights in the place of weights and masks, in `module` and below."""
        for child in module.modules():
            for key, hook in list(child._forward_pre_hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    hook.remove(child)
                    del child._forward_pre_hooks[key]

    def _zeros(self) -> list[tuple[int, int]]:
        """Of each parameter: (pruned, all) elements; (0, 1) where it has no mask yet."""
        masks = [getattr(module, f"{name}_mask", None) for module, name in self._parameters_to_prune]
        return [(0, 1) if mask is None else (int((mask == 0).sum()), mask.numel()) for mask in masks]

    def _report(self, before: list[tuple[int, int]], after: list[tuple[int, int]], amount: float) -> None:
        total = sum(count for _, count in after)
        was, now = (sum(zeros for zeros, _ in counts) for counts in (before, after))
        log.info(
            "%s(amount=%s): %d of %d weights pruned (%.2f%%), %d before",
            self._pruning_method_name, amount, now, total, 100 * now / total, was,
        )  # fmt: skip
        if self._verbose == 2:
            for (module, name), (was, _), (now, size) in zip(self._parameters_to_prune, before, after, strict=True):
                log.info("  %r.%s: %d of %d pruned (%.2f%%), %d before", module, name, now, size, 100 * now / size, was)

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: Any, parameters_to_prune: Parameters = (), parameter_names: Sequence[str] = ()
    ) -> Parameters:
        """The pairs to prune: those given, once they are known to be the model's, or all that it has.

        Raises:
            MisconfigurationException: they are no (module, name) pairs, or not of this model.
        """
        modules = [module for module in pl_module.modules() if not isinstance(module, _CONTAINERS)]
        if not parameters_to_prune:
            names = parameter_names or ModelPruning.PARAMETER_NAMES
            return [
                (module, name)
                for name in names
                for module in modules
                if isinstance(getattr(module, name, None), nn.Parameter)
            ]
        if not isinstance(parameters_to_prune, list | tuple) or not all(map(_is_pair, parameters_to_prune)):
            raise MisconfigurationException(
                f"ModelPruning(parameters_to_prune={parameters_to_prune!r}): allowed is a list of pairs such as "
                f"(model.layer, 'weight'), or nothing for all parameters."
            )
        own = {id(module) for module in modules}
        missing = [
            f"{module}.{name}"
            for module, name in parameters_to_prune
            if id(module) not in own or not hasattr(module, name)
        ]
        if missing:
            raise MisconfigurationException(
                f"ModelPruning(parameters_to_prune=...): {type(pl_module).__name__} has no {', '.join(missing)}; take "
                f"the modules from the very model that is trained."
            )
        return parameters_to_prune


def _is_pair(given: Any) -> bool:
    return len(given) == 2 and isinstance(given[0], nn.Module) and isinstance(given[1], str)


def _at(value: Any, epoch: int) -> Any:
    return value(epoch) if callable(value) else value


def _with_masks_applied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with `x` in the place of `x_orig` and `x_mask`, its tensors on the CPU."""
    for name in [key.removesuffix("_mask") for key in state if key.endswith("_mask") and f"{key[:-5]}_orig" in state]:
        original, mask = state.pop(f"{name}_orig"), state.pop(f"{name}_mask")
        state[name] = mask.to(dtype=original.dtype) * original
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}

"""Muon for matrices, AdamW for everything else, in one optimizer; and the compiled step of `torch.optim.Muon`.

    B <- momentum * B + (1 - momentum) * g
    O  = NS(g + momentum * (B - g))  with Nesterov,   NS(B)  without
    p <- p * (1 - lr * weight_decay) - lr * adjustment(shape of p) * O

p: parameter, g: gradient, B: `momentum_buffer`. NS: `ns_steps` Newton-Schulz iterations X <- a X + (b A + c A^2) X
with A = X X^T, from X = M / |M|, which drive every singular value of M to about 1. Matrix products are torch's, those
of `torch.optim.Muon` in bfloat16. What lies before and after them are two passes of csrc/formulas/muon.h over all
matrices, with torch's bits in float32. In bfloat16 torch goes on with the rounded momentum, they with the exact one.
Between the passes a step holds one more copy of the matrices.

Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_fast import ops
from lit_fast.errors import MisconfigurationException
from lit_fast.ops import Mapping, ParamGroups, State
from lit_fast.optim.adamw import MAPPING as ADAMW
from lit_fast.optim.compiled import Compiled, check_options
from lit_fast.optim.nonfinite import all_finite
from lit_fast.optim.storage import DEFAULTS, fill, needs_steps

_NS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ADJUSTMENTS = (None, "original", "match_rms_adamw")
# Directions and weights are rounded by random bits of their own: a weight's error must not depend on its direction's.
_OTHER_BITS = 1 << 63


class Muon(Compiled):
    """Muon for matrices and AdamW for the rest, by the key `use_muon` of each param group.

    Embeddings and the output layer are matrices too, and not Muon's: give them a group with `use_muon=False`. A group
    without the key is split: parameters with two dimensions are Muon's, others AdamW's.

    Args:
        params: parameters or param groups. A group may have every option below that its algorithm knows; `lr`, `betas`,
            `eps` and `weight_decay` of an AdamW group are its own, and the `adamw_` ones where it has none.
        lr: Muon's learning rate.
        weight_decay: Muon's, decoupled.
        momentum: of Muon's buffer.
        nesterov: look ahead by one step of the momentum.
        ns_coefficients: a, b and c of the iteration.
        eps: the least that a matrix's norm is divided by.
        ns_steps: iterations.
        adjust_lr_fn: how the learning rate of a matrix of A rows and B columns is adjusted: "original" (and None) by
            sqrt(max(1, A / B)), "match_rms_adamw" by 0.2 sqrt(max(A, B)).
        ns_dtype: of the matrix products: "bfloat16", as in `torch.optim.Muon`; "float32"; None: float32 on the CPU,
            where few machines have instructions for bfloat16 products, and bfloat16 elsewhere.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW's options.
        state_dtype, master, rounding, seed: as in `lit_fast.optim.AdamW`, for both.

    Raises:
        MisconfigurationException: an option that is not allowed; a parameter that is no matrix in a group of Muon's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4))
        >>> embedding = {"params": list(model[0].parameters()), "use_muon": False, "lr": 0.01}
        >>> optimizer = Muon([embedding, {"params": list(model[1].parameters())}], lr=0.02)
        >>> [(group["use_muon"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [(False, 0.01, 1), (True, 0.02, 1), (False, 0.0003, 1)]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: str | torch.dtype | None = None,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
        state_dtype: str | torch.dtype | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        self._of_muon: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": _named(ns_dtype),
        }
        self._of_adamw: dict[str, Any] = {
            "lr": adamw_lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "weight_decay": adamw_weight_decay,
            **_REST_OF_ADAMW,
        }
        _check({**self._of_muon, "use_muon": True})
        _check({**self._of_adamw, "use_muon": False})
        super().__init__(_with_algorithm(params), {})
        self._set_storage(state_dtype=state_dtype, master=master, rounding=rounding, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group without `use_muon` becomes up to two."""
        for given in _with_algorithm([param_group]):
            group = {**(self._of_muon if given["use_muon"] else self._of_adamw), **given}
            _check(group)
            super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved by torch's class, they lack what is ours
            group.setdefault("use_muon", "momentum" in group)
            for name, value in (self._of_muon if group["use_muon"] else self._of_adamw).items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        base: dict[str, Any] = super().__getstate__()
        return {**base, "_of_muon": self._of_muon, "_of_adamw": self._of_adamw}


_REST_OF_ADAMW: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def _with_algorithm(params: Iterable[Any] | dict[str, Any]) -> list[dict[str, Any]]:
    """Param groups that all say `use_muon`."""
    given = [params] if isinstance(params, dict) else list(params)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    groups: list[dict[str, Any]] = []
    for group in given:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        if "use_muon" in group:
            groups.append({**group, "params": members})
            continue
        for use_muon in (True, False):
            chosen = [each for each in members if (_tensor(each).ndim == 2) is use_muon]
            if chosen:
                groups.append({**group, "params": chosen, "use_muon": use_muon})
    return groups


def _tensor(member: Any) -> Tensor:
    tensor: Tensor = member[1] if isinstance(member, tuple) else member  # (name, parameter)
    return tensor


def _named(ns_dtype: Any) -> Any:
    """The name of a dtype that may be given as torch's."""
    return next((name for name, dtype in _NS_DTYPES.items() if ns_dtype is dtype), ns_dtype)


def _check(group: dict[str, Any]) -> None:
    """Raises a MisconfigurationException for options that are not allowed; brings `ns_dtype` into its usual form."""
    check_options(group)
    if not group["use_muon"]:
        return
    if not group["momentum"] < 1.0:
        raise MisconfigurationException(f"momentum={group['momentum']}: a number from 0 to 1, 1 not included.")
    if len(group["ns_coefficients"]) != 3:
        raise MisconfigurationException(f"ns_coefficients={group['ns_coefficients']}: three numbers.")
    if not isinstance(group["ns_steps"], int) or not 0 <= group["ns_steps"] < 100:
        raise MisconfigurationException(f"ns_steps={group['ns_steps']!r}: an int from 0 to 99.")
    group["ns_dtype"] = _named(group["ns_dtype"])
    for name, allowed in (("adjust_lr_fn", _ADJUSTMENTS), ("ns_dtype", (None, *_NS_DTYPES))):
        if group[name] not in allowed:
            raise MisconfigurationException(f"{name}={group[name]!r}: allowed are {', '.join(map(repr, allowed))}.")
    for index, member in enumerate(group.get("params", ())):
        if _tensor(member).ndim != 2:
            raise MisconfigurationException(
                f"Parameter {index} of a group with use_muon=True has the shape {tuple(_tensor(member).shape)}; Muon "
                f"is for matrices. Give it a group with use_muon=False, or leave use_muon out."
            )


# ---- the step ----


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """About U V^T of a [rows, columns] matrix U S V^T, in `dtype`: each singular value ends between 0.7 and 1.2.

    A matrix of zeros stays one. `matrix` is overwritten where it has that dtype.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=eps))  # its largest singular value is at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def adjustment(shape: torch.Size, how: str | None) -> float:
    """What the learning rate of a matrix of that shape is multiplied by."""
    rows, columns = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if columns else 1.0


class MuonStepper(ops.Stepper):
    """What `ops.Stepper` is for one formula: both passes of Muon's with the matrix products between them, and AdamW."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(MAPPING, device)
        self.where += ", matrix products by torch"
        self.skips_on_device = False  # three steps in one, and torch's products between them: the host must know
        self._pass, self.step, self.step_if_finite = self.step, self._step_all, self._step_all_if_finite
        self._adamw = ops.Stepper(ADAMW, device)

    def refusal(self, param_groups: ParamGroups) -> str:
        why_not = next(filter(None, map(_why_not, filter(_is_muons, param_groups))), "")
        stored = [{name: group[name] for name in ("params", *DEFAULTS) if name in group} for group in param_groups]
        of_adamw = [group for group in param_groups if not _is_muons(group)]
        passes = [{**_UNUSED_PASS, **each} for each in stored]
        return why_not or super().refusal(passes) or self._adamw.refusal(of_adamw)

    def _step_all(
        self, param_groups: ParamGroups, state: State, grad_scale: float | Tensor, max_norm: float, clip_value: float
    ) -> Tensor | str | None:
        work = _Work(param_groups, state)
        refusal = work.refusal or self._refusal_of_all(work, state)
        if refusal:
            work.undo_new_states()
            return refusal
        norm: Tensor | None = None
        if max_norm >= 0.0 and self.device.type == "cpu":
            norm = ops.gradient_norm(param_groups, grad_scale)
            grad_scale *= ops.clip_coefficient(norm, max_norm).item()
        elif max_norm >= 0.0:  # in memory, by a coefficient for all groups that the host does not wait for
            norm, grad_scale = ops.clip_gradients_(param_groups, grad_scale, max_norm), 1.0
        self._taken(self._pass(work.first, work.first_state, grad_scale, ops.NO_CLIPPING, clip_value))
        for direction, group in work.directions:
            by_device = "float32" if self.device.type == "cpu" else "bfloat16"
            dtype = _NS_DTYPES[group.get("ns_dtype", "bfloat16") or by_device]  # torch's groups do not say
            found = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"], dtype)
            direction.copy_(found)
        self._taken(self._pass(work.second, work.second_state, 1.0, ops.NO_CLIPPING, ops.NO_CLIPPING))
        if work.has_adamw:
            self._taken(self._adamw.step(work.adamw, state, grad_scale, ops.NO_CLIPPING, clip_value))
        return norm

    def _step_all_if_finite(
        self, param_groups: ParamGroups, state: State, grad_scale: float, max_norm: float, clip_value: float
    ) -> float | str:
        if not all_finite(param_groups):
            return math.nan
        norm = self._step_all(param_groups, state, grad_scale, max_norm, clip_value)
        if isinstance(norm, str):
            return norm
        return 0.0 if norm is None else min(norm.item(), sys.float_info.max)  # float32 may not hold it

    def _refusal_of_all(self, work: _Work, state: State) -> str:
        """Nothing may be refused once something is written."""
        return (
            self.refusal_of_step(work.first, work.first_state)
            or self.refusal_of_step(work.second, work.second_state)
            or (self._adamw.refusal_of_step(work.adamw, state) if work.has_adamw else "")
        )

    @staticmethod
    def _taken(result: Any) -> None:
        assert result is None, f"a step that was checked is refused: {result}"


class _Work:
    """One step's param groups and states as the kernels of both passes and of AdamW see them.

    Each has all of the optimizer's parameters: random bits are those of an element's place among them. What is not
    theirs has no gradient.

    Attributes:
        refusal: why torch's step has to run, or "".
        first, first_state: of the first pass. It writes directions, which stand in the parameters' place.
        second, second_state: of the second, with directions in the gradients' place. Learning rates are a matrix's own.
        adamw: groups for AdamW's kernels; its state is the optimizer's.
        directions: those that are to be made orthogonal, and their param groups.
    """

    def __init__(self, param_groups: ParamGroups, state: State) -> None:
        self.first: ParamGroups = []
        self.second: ParamGroups = []
        self.adamw: ParamGroups = []
        self.first_state: State = {}
        self.second_state: State = {}
        self.directions: list[tuple[Tensor, dict[str, Any]]] = []
        self.refusal, self.has_adamw = "", False
        self._state: State = state
        self._before: list[tuple[Tensor, dict[str, Any] | None]] = []
        for group in param_groups:
            if _is_muons(group):
                self.adamw.append({**_UNUSED_ADAMW, **_without_gradients(group)})
                self.refusal = self.refusal or _why_not(group)
                if not self.refusal:
                    self._add_matrices(group)
            else:
                self.has_adamw = True
                self.adamw.append(group)
                self.first.append({**_UNUSED_PASS, **_without_gradients(group)})
                self.second.append(self.first[-1])

    def undo_new_states(self) -> None:
        for p, entry in self._before:
            if entry is None:
                del self._state[p]
            else:
                self._state[p].clear()
                self._state[p].update(entry)

    def _add_matrices(self, group: dict[str, Any]) -> None:
        lr, rounding, seed = float(group["lr"]), group.get("rounding"), group.get("seed", 0)
        grads, directions = [p.grad for p in group["params"]], []
        for p, grad in zip(group["params"], grads, strict=True):
            step = {"lr": lr, "weight_decay": group["weight_decay"], "second_pass": True, "params": [p]}
            step |= {"adjusted_lr": lr * adjustment(p.shape, group["adjust_lr_fn"]), "momentum": 0, "nesterov": 0}
            step |= {"master": group.get("master"), "rounding": rounding, "seed": seed}
            direction = p if grad is None else torch.empty_like(p, requires_grad=False)
            directions.append(direction)
            self.second.append({**step, "grads": [None if grad is None else direction]})
            if grad is not None:
                self.directions.append((direction, group))
                self._add_state(p, direction, group)
        momentum = {name: group[name] for name in ("momentum", "nesterov")}
        stored = {"state_dtype": group.get("state_dtype"), "rounding": rounding, "seed": seed ^ _OTHER_BITS}
        self.first.append({**_UNUSED_PASS, **momentum, **stored, "params": directions, "grads": grads})

    def _add_state(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        self._before.append((p, dict(self._state[p]) if p in self._state else None))
        init_state(self._state, group, p)
        entry = self._state[p]
        self.first_state[direction] = entry
        self.second_state[p] = {name: entry[name] for name in ("master", "remainder") if name in entry}
        if needs_steps(group):  # each pass counts its own
            self.second_state[p]["step"] = entry["step"].clone()


def _is_muons(group: dict[str, Any]) -> bool:
    return bool(group.get("use_muon", True))  # torch's own has no such key


def _why_not(group: dict[str, Any]) -> str:
    """Why a group of Muon's takes torch's step, or ""."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1):
        return "its option lr is not a number that is known on the host"
    if any(p.ndim != 2 for p in group["params"]):
        return "a parameter is no matrix"
    if "use_muon" not in group and not group["nesterov"] and any(p.dtype == torch.bfloat16 for p in group["params"]):
        return "torch.optim.Muon without nesterov divides the momentum of bfloat16 matrices by its norm, in place"
    return ""


def _without_gradients(group: dict[str, Any]) -> dict[str, Any]:
    return {"params": group["params"], "grads": [None] * len(group["params"])}


def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
    """What torch creates at a matrix's first step, a buffer of zeros, and what the storage options ask for."""
    entry = state.setdefault(param, {})
    if needs_steps(group) and "step" not in entry:
        entry["step"] = torch.zeros((), dtype=torch.float32)
    fill(entry, group, param, MAPPING.state_keys)


def flops(group: dict[str, Any]) -> int:
    """Of one of the two passes."""
    return 3 if group["second_pass"] or not group["nesterov"] else 6


class _MuonMapping(Mapping):
    def stepper(self, device: torch.device) -> ops.Stepper:
        return MuonStepper(device)


# Options are those of a pass, in the groups of _Work.
MAPPING = _MuonMapping(
    formula="muon",
    classes=(Muon, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])),  # from torch 2.9 on
    option_keys=("lr", "adjusted_lr", "weight_decay", "momentum", "nesterov", "second_pass"),
    refused_keys=(),
    state_keys=("momentum_buffer",),
    step_key="step",
    init_state=init_state,
    flops=flops,
    whole_tensors=True,
)
Muon.mapping = MAPPING
_UNUSED_PASS = dict.fromkeys(MAPPING.option_keys, 0.0)
_UNUSED_ADAMW = {**_REST_OF_ADAMW, "lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}

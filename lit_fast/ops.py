"""The typed face of the compiled core, and its only importer.

The core reads tensors where they lie and writes them in place; it holds nothing between two calls. What
it cannot do it refuses with a sentence, before anything is written: callers then do the work with torch and say
so.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_fast import _core, triton
from lit_fast.errors import KernelError
from lit_fast.flat import BucketLayout as BucketLayout
from lit_fast.flat import Packer as Packer
from lit_fast.flat import first_indices as first_indices
from lit_fast.flat import lay_out_buckets as lay_out_buckets
from lit_fast.flat import norm_of as norm_of
from lit_fast.flat import square_chunk as square_chunk
from lit_fast.flat import squares as squares
from lit_fast.flat import sum_pieces as sum_pieces
from lit_fast.flat import unpack as unpack
from lit_fast.phase_clock import MOST_PARTS as MOST_PARTS
from lit_fast.phase_clock import PartTime as PartTime
from lit_fast.phase_clock import PhaseClock as PhaseClock
from lit_fast.phase_clock import Reading as Reading
from lit_fast.phase_clock import SlowStepTime as SlowStepTime
from lit_fast.phase_clock import SpanTime as SpanTime
from lit_fast.phase_clock import Spread as Spread
from lit_fast.phase_clock import bucket_of as bucket_of

ParamGroups: TypeAlias = list[dict[str, Any]]
State: TypeAlias = dict[Tensor, Any]

# (param_groups, state, grad_scale, max_norm, clip_value), see `Stepper.step`
Step: TypeAlias = Callable[[ParamGroups, State, Any, float, float], Tensor | float | str | None]

Skipping: TypeAlias = tuple[Tensor, bool, bool]  # what `Stepper.skipping` takes

NO_CLIPPING = -1.0

# float32 lanes of torch's own CPU kernels, which decide where its vector loop ends (csrc/formulas/math.h).
_VECTOR_WIDTHS = {"AVX512": 16, "AVX2": 8}


@dataclass(frozen=True)
class Mapping:
    """How one family of `torch.optim` classes maps to a formula of the core.

    Attributes:
        formula: the formula's name, as in `formulas()`; the mapping's file bears it too.
        classes: the `torch.optim` classes.
        option_keys: keys of a param group whose numbers, tuples flattened, are the formula's options in order.
        refused_keys: keys of a param group that must be absent or false.
        state_keys: keys of `optimizer.state[p]`, one for each state of the formula.
        step_key: key of the float32 step counter in `optimizer.state[p]`, or None.
        flops: `flops(group)` of an element's step with those options: an FMA is two, all else of the vocabulary one.
        whole_tensors: whether an element's update depends on others of its parameter, so that no part can be stepped.
        measured: whether norms of whole tensors are taken in a pass before the step.
        init_state: `init_state(state, group, param)` fills what is missing in `state[param]`, as the torch class
            would and as the group's storage options ask (lit_fast/optim/storage.py).
    """

    formula: str
    classes: tuple[type[torch.optim.Optimizer], ...]
    option_keys: tuple[str, ...]
    refused_keys: tuple[str, ...]
    state_keys: tuple[str, ...]
    step_key: str | None
    init_state: Callable[[State, dict[str, Any], Tensor], None]
    flops: Callable[[dict[str, Any]], int]
    whole_tensors: bool = False
    measured: bool = False

    def stepper(self, device: torch.device) -> Stepper:
        """What steps these classes on a device."""
        return Stepper(self, device)


def core_stepper(mapping: Mapping) -> _core.Stepper:
    """The core's stepper of a mapping, which keeps no tensor."""
    return _core.Stepper(
        mapping.formula,
        mapping.option_keys,
        mapping.refused_keys,
        mapping.state_keys,
        tuple(f"{key}_codes" for key in mapping.state_keys),
        tuple(f"{key}_scale" for key in mapping.state_keys),
        mapping.step_key,
        mapping.init_state,
    )


class Stepper:
    """One optimizer class's compiled step on one device. Keeps no tensor.

    A param group may have `grads`, a list beside `params`: what stands in for each `p.grad`, tensor or None. And
    `first_indices`, see there, where `params` are parts of parameters.

    Attributes:
        skips_on_device: whether `skipping` gives a step that nobody waits for.
        where: in words, which kernels take the steps: "avx2", "cuda:0", "cuda:0 by Triton, because ...".
        step: `step(param_groups, state, grad_scale, max_norm, clip_value)`. Returns None when the step was
            taken; with a `max_norm` instead the norm of the scaled gradients (a float on the CPU, a tensor on
            CUDA); or a str, the reason why nothing was done. A negative `max_norm` or `clip_value` is none. On a GPU
            `grad_scale` may be a 0-dim tensor there, which nobody waits for.
        step_if_finite: the same on the CPU, which does nothing where a gradient is NaN or infinite. Returns the norm
            with or without a `max_norm`: a float, finite exactly when every gradient is.

    Example:
        >>> from lit_fast.optim.sgd import MAPPING
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> sgd = torch.optim.SGD([weight], lr=0.5)
        >>> stepper = Stepper(MAPPING, torch.device("cpu"))
        >>> stepper.step(sgd.param_groups, sgd.state, 1.0, NO_CLIPPING, NO_CLIPPING)
        >>> weight.detach()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, mapping: Mapping, device: torch.device) -> None:
        self.device = device
        self._mapping = mapping
        self._core = core_stepper(mapping)
        kernels, why = kernels_for(device)
        self.skips_on_device = kernels in ("CUDA", "Triton")
        self.where = _core.build_info()["cpu_target"] if kernels == "CPU" else str(device)
        self._why_not = "" if kernels else why
        self.step: Step = self._core.step
        self.step_if_finite = self._core.step_if_finite
        if kernels == "CUDA":
            self.step = functools.partial(self._step_on_cuda, self._core, None)
        elif kernels == "Triton":
            self.where = f"{device} by Triton, because {why}"
            self._formula, self._why_not = triton.formula_named(mapping.formula, formulas()[mapping.formula]["options"])
            self.step = functools.partial(self._step_by_triton, self._core, None)
        if self._why_not:
            self.step = lambda *_: self._why_not
        self._by_table = kernels == "Triton"

    def refusal(self, param_groups: ParamGroups) -> str:
        """Why these parameters and options cannot be stepped here, or "" if they can."""
        why_not = self._why_not
        if self._by_table and not why_not:
            gradients = ((getattr(p, "grad_dtype", None), p.dtype) for group in param_groups for p in group["params"])
            if any(given not in (None, dtype) for given, dtype in gradients):
                why_not = "the Triton kernels read gradients of their parameters' own dtype alone"
        return why_not or self._core.check_parameters(
            param_groups, self._by_table, self.device.type == "cuda", self.device.index or 0
        )

    def refusal_of_step(self, param_groups: ParamGroups, state: State) -> str:
        """Why `step` would refuse now, or ""; for who must know before another part of its step is taken."""
        capturing = _is_capturing(self.device)
        why_not = self._why_not or (_why_not_captured(param_groups) if capturing else "")
        index = _cuda_index(self.device)
        return why_not or self._core.check_step(param_groups, state, self._by_table, index, capturing)

    def skipping(self, skipped: Tensor, for_good: bool = False, told: bool = False) -> Step:
        """`step` on a GPU, with everything left as it is where a gradient is NaN or infinite: only the device knows.

        Counters of steps lie there then; those of earlier steps are moved. A new momentum begins at zero, not with the
        gradient: the first step is the same unless it is dampened, and for that one the host waits.

        Args:
            skipped: 0-dim int64 tensor on the device, to which each step that is left out adds one.
            for_good: whether after the first such step no other is taken.
            told: it is not looked for in the gradients: `grad_scale`, a tensor, is NaN for such a step.
        """
        if self._why_not:
            return self.step
        mapping = replace(self._mapping, init_state=_beside_its_parameter(self._mapping))
        take = self._step_by_triton if self._by_table else self._step_on_cuda
        step = functools.partial(take, core_stepper(mapping), (skipped, for_good, told))

        def step_or_skip(param_groups: ParamGroups, state: State, *scale: Any) -> Tensor | float | str | None:
            if _begins_dampened(param_groups, state):
                return self._first_step(param_groups, state, skipped, for_good, *scale)
            return step(param_groups, state, *scale)

        return step_or_skip

    def _first_step(
        self,
        param_groups: ParamGroups,
        state: State,
        skipped: Tensor,
        for_good: bool,
        grad_scale: float | Tensor,
        *clipping: float,
    ) -> Tensor | float | str | None:
        """The step with which a dampened momentum begins, which is not dampened: the host must know if it is taken."""
        if _is_capturing(self.device):
            return "its first step is not dampened, and a CUDA graph is being captured, which would repeat it"
        try:
            norm = gradient_norm(param_groups, grad_scale)
        except KernelError as error:
            return str(error)
        if not norm.isfinite().item() or (for_good and skipped.item()):
            skipped += 1
            return norm if clipping[0] >= 0.0 else None
        return self.step(param_groups, state, grad_scale, *clipping)

    def _step_on_cuda(
        self,
        core: _core.Stepper,
        skipping: Skipping | None,
        param_groups: ParamGroups,
        state: State,
        grad_scale: float | Tensor,
        max_norm: float,
        clip_value: float,
    ) -> Tensor | str | None:
        factor, scale = (grad_scale, 1.0) if isinstance(grad_scale, Tensor) else (None, grad_scale)
        with_norm = max_norm >= 0.0
        with torch.cuda.device(self.device):
            if _is_capturing(self.device) and (why_not := _why_not_captured(param_groups)):
                return why_not
            context, norm = _cuda_context(self.device, with_norm or skipping is not None, factor, skipping)
            refusal = core.step_on_cuda(param_groups, state, scale, max_norm, clip_value, context)
        return refusal if refusal is not None or not with_norm else norm

    def _step_by_triton(
        self,
        core: _core.Stepper,
        skipping: Skipping | None,
        param_groups: ParamGroups,
        state: State,
        grad_scale: float | Tensor,
        max_norm: float,
        clip_value: float,
    ) -> Tensor | str | None:
        from lit_fast.triton.launch import Work

        if _is_capturing(self.device):
            # A graph would copy the table anew at each replay, from memory that nothing keeps for it.
            return "a CUDA graph is being captured, and the Triton kernels read a table that the host writes"
        with_norm, skips = max_norm >= 0.0, skipping is not None
        norm = torch.empty((), dtype=torch.float32, device=self.device) if with_norm or skips else None
        work = Work(self.device, grad_scale, max_norm, clip_value, norm, self._formula, skipping=skipping)
        refusal = core.hand_over(param_groups, state, _cuda_index(self.device), work.chunk, skips, work)
        return refusal if refusal is not None or not with_norm else norm


@functools.cache  # asked at every norm; nothing that it depends on changes in a process
def kernels_for(device: torch.device) -> tuple[str, str]:
    """Which kernels work on tensors of a device: "CPU", "CUDA", "Triton" or "" for none; and why."""
    if device.type == "cpu":
        return "CPU", "the core has kernels for every CPU"
    if device.type != "cuda":
        return "", f"there are no kernels for the device {device}"
    info = _core.build_info()
    if info["cuda"]:
        return "CUDA", "this build has CUDA kernels"
    no_cuda = f"this build has no CUDA kernels ({info['cuda_reason']})"
    missing = triton.why_missing()
    return ("", f"{no_cuda}, and {missing}") if missing else ("Triton", no_cuda)


def _is_capturing(device: torch.device) -> bool:
    """Whether what is queued on the current stream goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _why_not_captured(param_groups: ParamGroups) -> str:
    """As in torch, whose optimizers have the option where the host would count the steps; "" where none objects."""
    if all(group.get("capturable", True) for group in param_groups):
        return ""
    return "a CUDA graph is being captured and not every param group is capturable"


def _cuda_index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index or 0


def _cuda_context(
    device: torch.device,
    with_norm: bool,
    factor: Tensor | None = None,
    skipping: Skipping | None = None,
) -> tuple[_core.CudaContext, Tensor | None]:
    """Torch's current stream there, and memory from its caching allocator, which is safe on that stream."""
    if factor is not None:
        factor = factor.to(device, torch.float32)
    norm = torch.empty((), dtype=torch.float32, device=device) if with_norm else None
    stream = torch.cuda.current_stream(device)
    workspace = functools.partial(torch.empty, dtype=torch.float64, device=device)
    capturing = _is_capturing(device)
    skipped, for_good, told = skipping or (None, False, False)
    return (stream.device_index, stream.cuda_stream, norm, workspace, factor, skipped, for_good, capturing, told), norm


def _beside_its_parameter(mapping: Mapping) -> Callable[[State, dict[str, Any], Tensor], None]:
    """The mapping's `init_state` with the counter of steps on the parameter's device."""

    def init_state(state: State, group: dict[str, Any], param: Tensor) -> None:
        mapping.init_state(state, group, param)
        counter = state[param].get(mapping.step_key)
        if isinstance(counter, Tensor):
            state[param][mapping.step_key] = counter.to(param.device, torch.float32)

    return init_state


def _begins_dampened(param_groups: ParamGroups, state: State) -> bool:
    return any(
        p.grad is not None and state.get(p, {}).get("momentum_buffer") is None
        for group in param_groups
        if group.get("momentum") and group.get("dampening")
        for p in group["params"]
    )


def formulas() -> dict[str, dict[str, Any]]:
    """Every formula of the core: name -> {"options", "states", "counts_steps"}."""
    return _core.formulas()


def gradient_norm(param_groups: ParamGroups, grad_scale: float | Tensor = 1.0) -> Tensor:
    """L2 norm of all gradients of `param_groups` times `grad_scale`, from one read, with no host sync.

    Sums squares in float64, in an order that depends on the gradients alone: the same bits for any number of
    threads and any CPU target. Finite exactly when every gradient is (and the norm itself fits a float32).

    Returns:
        0-dim float32 tensor on the gradients' device; relative error against float64 below 1e-7.

    Raises:
        KernelError: a gradient's device, dtype or layout has no kernel.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm([{"params": [weight]}])
        tensor(5.)
    """
    norm = _norm_and_rewrite("gradient_norm", param_groups, grad_scale, NO_CLIPPING, NO_CLIPPING, False)
    assert norm is not None
    return norm


def clip_gradients_(
    param_groups: ParamGroups,
    grad_scale: float | Tensor = 1.0,
    max_norm: float = NO_CLIPPING,
    clip_value: float = NO_CLIPPING,
    norm_type: float = 2.0,
) -> Tensor | None:
    """Rewrite all gradients in place: times `grad_scale`, then clipped as torch's `clip_grad_norm_`/`_value_`.

    Args:
        grad_scale: a number, or a 0-dim tensor on the gradients' device, which nobody waits for.
        norm_type: which norm, a positive number or infinity, under the name that torch gives it. 2 is read by the core;
            others by torch, summed in float64.

    Returns:
        The norm after scaling and before clipping (0-dim float32, on the gradients' device), or None without
        `max_norm`.

    Raises:
        KernelError: a gradient's device, dtype or layout has no kernel; no gradient was changed.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> clip_gradients_([{"params": [weight]}], max_norm=1.0, norm_type=float("inf"))
        tensor(4.)
        >>> weight.grad
        tensor([ 0.7500, -1.0000])
    """
    if max_norm >= 0.0 and norm_type != 2.0:
        norm = gradient_p_norm(param_groups, norm_type, grad_scale)
        scale_gradients_(param_groups, clip_coefficient(norm, max_norm) * grad_scale)
        return norm
    return _norm_and_rewrite("clip_gradients_", param_groups, grad_scale, max_norm, clip_value, True)


def gradient_p_norm(param_groups: ParamGroups, norm_type: float, grad_scale: float | Tensor = 1.0) -> Tensor:
    """`(sum |g * grad_scale|^p)^(1/p)` over all gradients, p being `norm_type`; their largest magnitude for infinity.

    Returns:
        0-dim float32 tensor on the gradients' device; powers are summed in float64.

    Raises:
        KernelError: a gradient is not a dense tensor.
    """
    if norm_type == 2.0:
        return gradient_norm(param_groups, grad_scale)
    gradients = _gradients(param_groups)
    if any(gradient.layout != torch.strided for gradient in gradients):
        raise KernelError("gradient_p_norm: a gradient is sparse. Make it dense.")
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float32)
    norms = torch.stack([n.double() for n in torch._foreach_norm(gradients, norm_type, torch.float64)])
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return (norm * grad_scale).abs().float()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of that norm are multiplied by, as in `torch.nn.utils.clip_grad_norm_`."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def scale_gradients_(param_groups: ParamGroups, factor: Tensor) -> None:
    """Multiply all gradients by a 0-dim tensor, which lies on their device or on the CPU."""
    if gradients := _gradients(param_groups):
        torch._foreach_mul_(gradients, factor)


def refuse_sparse_gradients(parameters: Iterable[Tensor]) -> None:
    """Raises a KernelError before clipping by torch, which fails on them with a sentence about its own parts."""
    for p in parameters:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise KernelError(
                f"The gradient of a parameter of shape {tuple(p.shape)} is sparse ({p.grad.layout}), and torch clips "
                f"none that is. Leave clipping out, or have it dense: torch.nn.Embedding(sparse=False)."
            )


def _gradients(param_groups: ParamGroups) -> list[Tensor]:
    return [p.grad for group in param_groups for p in group["params"] if p.grad is not None]


def _norm_and_rewrite(
    name: str, param_groups: ParamGroups, grad_scale: float | Tensor, max_norm: float, clip_value: float, rewrite: bool
) -> Tensor | None:
    first = next((p.grad for group in param_groups for p in group["params"] if p.grad is not None), None)
    device = torch.device("cpu") if first is None else first.device
    kernels, why_not = kernels_for(device)
    result: float | str | None
    norm: Tensor | None = None
    with_norm = max_norm >= 0.0 or not rewrite
    if not kernels:
        result = why_not
    elif kernels == "CPU":
        result = _core.gradient_norm(param_groups, float(grad_scale), max_norm, clip_value, rewrite, None)
        norm = None if result is None or isinstance(result, str) else scalar(result)
    elif kernels == "Triton":
        result, norm = _hand_over_gradients(param_groups, device, grad_scale, max_norm, clip_value, with_norm, rewrite)
    else:
        factor, scale = (grad_scale, 1.0) if isinstance(grad_scale, Tensor) else (None, grad_scale)
        with torch.cuda.device(device):
            context, norm = _cuda_context(device, with_norm, factor)
            result = _core.gradient_norm(param_groups, scale, max_norm, clip_value, rewrite, context)
    if isinstance(result, str):
        raise KernelError(f"{name}: {result}. Use torch.nn.utils.clip_grad_norm_ for these gradients.")
    return norm


def _hand_over_gradients(
    param_groups: ParamGroups,
    device: torch.device,
    grad_scale: float | Tensor,
    max_norm: float,
    clip_value: float,
    with_norm: bool,
    rewrite: bool,
) -> tuple[str | None, Tensor | None]:
    from lit_fast.triton.launch import Work

    norm = torch.empty((), dtype=torch.float32, device=device) if with_norm else None
    work = Work(device, grad_scale, max_norm, clip_value, norm, rewrite=rewrite)
    return _core.hand_over_gradients(param_groups, rewrite, _cuda_index(device), work.chunk, work), norm


def scalar(value: float) -> Tensor:
    """A 0-dim float32 tensor on the CPU, made the fastest way that torch has."""
    return torch.scalar_tensor(value, dtype=torch.float32)


release_gradients = _core.release_gradients  # (param_groups): every p.grad becomes None


@dataclass(frozen=True)
class AllocatorReport:
    """What `keep_freed_memory` did.

    Attributes:
        applied: whether the allocator was changed.
        what: the settings, or why there are none.
    """

    applied: bool
    what: str

    def __str__(self) -> str:
        return self.what


def keep_freed_memory(keep: bool = True) -> AllocatorReport:
    """Tell the C allocator to keep freed memory for reuse (True) or to follow its defaults (False).

    Gradients that are freed after every step otherwise go back to the system and come back as page faults,
    which cost more than any kernel here. Process-wide, glibc only; elsewhere nothing is done and the report says why.
    """
    return AllocatorReport(*_core.keep_freed_memory(keep))


def build_info() -> dict[str, Any]:
    """What was built, what was chosen, and why: the facts behind `lit-fast info`.

    Keys: cpu_targets_built, cpu_targets_supported, cpu_target, cpu_target_reason, cuda, cuda_reason, threads,
    tensor_access, compiler, architecture, pybind11, python, torch, torch_cpu_capability, vector_width.
    """
    info = _core.build_info()
    info["python"] = platform.python_version()
    info["torch"] = torch.__version__
    info["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    info["vector_width"] = _vector_width()
    return info


def use_cpu_target(name: str) -> None:
    """Switch to another CPU target that this build has and this machine supports: a tool for tests.

    Raises:
        KernelError: no such target here.
    """
    _core.choose_cpu_target(name, "use_cpu_target")


def _vector_width() -> int:
    neon_or_unknown = 4 if platform.machine() == "aarch64" else 8
    return _VECTOR_WIDTHS.get(torch.backends.cpu.get_cpu_capability(), neon_or_unknown)


def connect(use_exchange_api: bool = True) -> None:
    """Show the core torch: how to read its tensors, its threads, its OpenMP runtime. Done at import.

    Args:
        use_exchange_api: read tensors through DLPack's C exchange where this torch has it, and
            through their Python attributes otherwise.
    """
    _core.configure(
        torch, use_exchange_api, torch.autograd.graph.increment_version, torch.get_num_threads, _vector_width()
    )
    _core.find_openmp(os.path.dirname(torch.__file__))


connect()

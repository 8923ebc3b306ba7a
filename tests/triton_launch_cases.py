"""Triton's kernels in its interpreter: what a step launches, waits for and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.interpreter import InterpretedFunction
from triton_interpreter import (
    CPU,
    optimizer_of,
    set_gradients,
    table_of,
)

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim import adamw, adopt, sgd
from lit_fast.optim.adamw import AdamW
from lit_fast.triton import launch
from lit_fast.triton import lion as lion_kernel


def mixed_groups() -> torch.optim.Optimizer:
    """Tensors of both dtypes, with momentum and without."""
    params = [Parameter(torch.ones(2, dtype=d)) for _ in range(3) for d in (torch.float32, torch.bfloat16)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[:2], "momentum": 0.9}, {"params": params[2:4]}, {"params": params[4:], "lr": 0.3}]
    return torch.optim.SGD(groups, lr=0.1)


def test_a_step_takes_two_launches_and_three_with_a_norm(monkeypatch) -> None:
    launched: list[str] = []
    run_kernel = InterpretedFunction.run

    def counting(self, *args, **kwargs):
        launched.append(self.__name__)
        return run_kernel(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counting)
    adopted = adopt(mixed_groups())
    adopted.step()
    assert launched == ["prepare_kernel", "step_kernel"]
    launched.clear()
    adopted.set_clipping(max_norm=1.0)
    adopted.step()
    assert launched == ["square_kernel", "prepare_kernel", "step_kernel"]
    launched.clear()
    adopted.clip_gradients()
    assert launched == ["square_kernel", "prepare_kernel", "scale_kernel"]
    assert adopted.compiled


def test_nothing_on_the_way_waits_for_the_device(monkeypatch) -> None:
    """With launches that do nothing: the interpreter itself reads tensors on the host."""
    optimizer = mixed_groups()
    adopted = adopt(optimizer, max_norm=1.0)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)

    def waits(*args, **kwargs):
        raise AssertionError("the host would wait for the device")

    for name in "item cpu tolist numpy nonzero __bool__ __float__ __int__ __index__ equal".split():
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    norm = adopted.step(grad_scale=0.5)
    assert adopted.compiled and isinstance(norm, Tensor)
    adopted.clip_gradients()
    ops.gradient_norm(optimizer.param_groups)


def test_the_table_goes_to_the_device_by_one_copy_that_is_not_waited_for(monkeypatch) -> None:
    copies: list[tuple[bool, torch.device]] = []
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        copies.append((non_blocking and any(tensor is p for p in pinned), device))
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    elsewhere = torch.device("meta")
    tensor = {name: torch.zeros(3) for name in ("param", "grad", "exp_avg")}
    work = launch.Work(elsewhere, 1.0, -1.0, -1.0, None, lion_kernel)
    work(*table_of([tensor], [0.1, 0.9, 0.99, 0.0, 0.0], ("exp_avg",)))
    assert copies == [(True, elsewhere)]


def test_written_tensors_get_a_new_version_and_gradients_do_not() -> None:
    optimizer = optimizer_of(torch.optim.AdamW, (3,), lr=0.1)
    [param] = optimizer.param_groups[0]["params"]
    adopted = adopt(optimizer)
    set_gradients(optimizer, seed=0)
    adopted.step()
    tensors = [param, *optimizer.state[param].values()]
    versions, of_grad = [t._version for t in tensors], param.grad._version
    adopted.step()
    assert [t._version for t in tensors] == [v + 1 for v in versions] and param.grad._version == of_grad


def test_what_is_refused_is_refused_before_anything_is_written() -> None:
    shared = torch.ones(8)
    params = [Parameter(shared[:5]), Parameter(shared[4:])]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    stepper = ops.Stepper(sgd.MAPPING, CPU)
    refusal = stepper.step(optimizer.param_groups, optimizer.state, 1.0, 1.0, -1.0)
    assert refusal == "parameters 0 and 1 of the optimizer, gradients or states share memory"
    assert torch.equal(shared, torch.ones(8)) and not optimizer.state
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(KernelError, match="clip_gradients_"):
        ops.clip_gradients_(optimizer.param_groups, 0.5)


@pytest.mark.parametrize(
    ("dtype", "options", "known"),
    [
        (torch.float32, {}, True),
        (torch.float32, {"state_dtype": "bfloat16"}, True),
        (torch.float32, {"state_dtype": "bfloat16", "rounding": "stochastic"}, False),
        (torch.float32, {"state_dtype": "8bit"}, False),
        (torch.float32, {"amsgrad": True}, False),
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"state_dtype": "bfloat16"}, True),
        (torch.bfloat16, {"state_dtype": "float32"}, False),
        (torch.bfloat16, {"state_dtype": "8bit"}, False),
        (torch.bfloat16, {"rounding": "stochastic"}, False),
        (torch.bfloat16, {"master": "float32", "state_dtype": "float32"}, False),
        (torch.bfloat16, {"master": "remainder"}, False),
        (torch.float16, {}, False),
    ],
    ids=str,
)
def test_storage_that_the_kernels_do_not_know_is_refused(dtype, options, known) -> None:
    """Before the first step, so that nobody is told of a kernel that there is not, and by the step itself: what only
    the core can step must not be stepped as if it were plain."""
    param = Parameter(torch.ones(300, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], lr=0.5, **options)
    stepper = ops.Stepper(adamw.MAPPING, CPU)
    early = stepper.refusal(optimizer.param_groups)
    late = stepper.step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0)
    assert (not early) is (late is None) is known is not torch.equal(param, torch.ones_like(param))
    if known:
        return
    assert all(why.startswith("only the core has a kernel for its dtypes or options") for why in (early, late))
    adopted = adopt(AdamW([param], lr=0.5, **options))
    assert not adopted.compiled and "its own step, because only the core" in adopted.reason
    if "amsgrad" not in options and options:
        with pytest.raises(KernelError, match="only the core has a kernel"):
            adopted.step()
        with pytest.raises(KernelError, match="only the core has a kernel"):
            adopt(torch.optim.AdamW([param]), **options)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_float32_gradients_of_16_bit_parameters_are_refused_before_the_first_step() -> None:
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    param.grad = torch.ones(3)
    optimizer = torch.optim.SGD([param], lr=0.5)
    assert "of their parameters' own dtype alone" in adopt(optimizer).reason
    assert "only the core" in ops.Stepper(sgd.MAPPING, CPU).step(optimizer.param_groups, {}, 1.0, -1.0, -1.0)


def test_a_formula_without_a_kernel_is_refused_by_the_step_too(monkeypatch) -> None:
    monkeypatch.setattr(ops.triton, "formula_named", lambda name, options: (None, f"there is no kernel for {name}"))
    optimizer = optimizer_of(torch.optim.SGD, (3,), lr=0.1)
    set_gradients(optimizer, seed=0)
    stepper = ops.Stepper(sgd.MAPPING, CPU)
    assert stepper.refusal(optimizer.param_groups) == "there is no kernel for sgd"
    assert stepper.step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0) == "there is no kernel for sgd"


def test_a_launch_that_fails_leaves_the_optimizer_as_it_was(monkeypatch) -> None:
    optimizer = optimizer_of(torch.optim.AdamW, (3,), lr=0.1)
    set_gradients(optimizer, seed=0)
    adopted = adopt(optimizer)

    def fails(self, *args, **kwargs):
        raise RuntimeError("no such device")

    monkeypatch.setattr(InterpretedFunction, "run", fails)
    with pytest.raises(RuntimeError, match="no such device"):
        adopted.step()
    assert not optimizer.state
    monkeypatch.undo()

"""The Triton kernels: what they compute in the interpreter (triton_*_cases.py), what they compile to for GPUs
that need not be here, and who takes which kernels when."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_fast import Trainer, ops, triton
from lit_fast.cli import info
from lit_fast.demos.boring_classes import BoringModel
from lit_fast.errors import NonFiniteGradientError
from lit_fast.optim import adopt, sgd

installed = pytest.mark.skipif(bool(triton.why_missing()), reason=triton.why_missing())


@installed
def test_the_kernels_in_the_interpreter(repository: Path) -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    paths = f"{repository}{os.pathsep}{repository / 'tests'}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    cases = sorted(map(str, (repository / "tests").glob("triton_*_cases.py")))
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "triton_interpreter", *cases]
    done = subprocess.run(program, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout) and "skipped" not in done.stdout


# ---- who takes which ----

NO_CUDA = {"cuda": False, "cuda_reason": "no nvcc", "cpu_target": "avx2"}


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    choose = (ops.kernels_for, triton.why_missing)
    for function in choose:
        function.cache_clear()
    yield
    for function in choose:
        function.cache_clear()


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops._core, "build_info", lambda: dict(NO_CUDA))


@pytest.mark.usefixtures("without_cuda")
def test_a_build_without_cuda_takes_triton_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "why_missing", lambda: "")
    assert ops.kernels_for(torch.device("cuda:1")) == ("Triton", "this build has no CUDA kernels (no nvcc)")
    assert ops.kernels_for(torch.device("cpu")) == ("CPU", "the core has kernels for every CPU")
    assert ops.kernels_for(torch.device("meta")) == ("", "there are no kernels for the device meta")
    assert info.facts()["core"]["gpu_kernels"] == "Triton: this build has no CUDA kernels (no nvcc)"


def test_a_build_with_cuda_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops._core, "build_info", lambda: {**NO_CUDA, "cuda": True})
    assert ops.kernels_for(torch.device("cuda")) == ("CUDA", "this build has CUDA kernels")


@pytest.mark.usefixtures("without_cuda")
def test_without_triton_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    why = "this build has no CUDA kernels (no nvcc), and Triton is not installed (pip install triton)"
    assert ops.kernels_for(torch.device("cuda")) == ("", why)
    assert info.gpu_kernels() == f"none: {why}"
    on_a_gpu = ops.kernels_for(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "kernels_for", lambda device: on_a_gpu)
        adopted = adopt(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    assert not adopted.compiled and adopted.reason == f"SGD: its own step, because {why}"


def test_broken_and_old_installations_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def broken(name: str) -> Any:
        raise OSError("libtriton.so")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    for importing, expected in (
        (lambda name: SimpleNamespace(__version__="3.1.0"), "Triton 3.1.0 is older than 3.4"),
        (lambda name: SimpleNamespace(__version__="3.10.0+git1"), ""),
        (broken, "Triton cannot be imported (OSError: libtriton.so)"),
    ):
        monkeypatch.setattr(importlib, "import_module", importing)
        triton.why_missing.cache_clear()
        found = triton.why_missing()
        triton.why_missing.cache_clear()
        assert found == expected


@installed
def test_formulas_have_kernels_with_the_same_options_or_none() -> None:
    formulas = ops.formulas()
    known = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1}  # amsgrad's third state is the core's alone
    for name, states in known.items():
        kernel, why_not = triton.formula_named(name, formulas[name]["options"])
        assert kernel is not None and why_not == "" and states == kernel.STATES
    for name in formulas.keys() - known.keys():
        assert triton.formula_named(name, formulas[name]["options"])[1] == f"there is no Triton kernel for {name}"


@installed
def test_a_formula_that_the_kernels_do_not_know_is_refused() -> None:
    assert triton.formula_named("adabound", ("lr",)) == (None, "there is no Triton kernel for adabound")
    kernel, why_not = triton.formula_named("sgd", ("lr", "momentum", "temperature"))
    assert kernel is None and why_not == "the Triton kernel for sgd does not know all of the core's options"


@installed
@pytest.mark.usefixtures("without_cuda")
def test_while_a_graph_is_captured_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stepper = ops.Stepper(sgd.MAPPING, torch.device("cuda:0"))
    assert stepper.where == "cuda:0 by Triton, because this build has no CUDA kernels (no nvcc)"
    [param] = [torch.nn.Parameter(torch.ones(2))]
    param.grad = torch.ones(2)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    refusal = stepper.step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0)
    assert isinstance(refusal, str) and "CUDA graph" in refusal
    assert torch.equal(param, torch.ones(2)) and not optimizer.state


@installed
@pytest.mark.usefixtures("without_cuda")
def test_the_plan_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ops.kernels_for(torch.device("cuda"))
    monkeypatch.setattr(ops, "kernels_for", lambda device: chosen)  # for a model on the CPU
    trainer = Trainer(max_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(BoringModel())
    assert "by Triton, because this build has no CUDA kernels (no nvcc)" in str(trainer.explain())


# ---- on a GPU ----


@pytest.mark.gpu
@installed
@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["counters on the host", "on the device"])
def test_a_gpu_gives_the_cpus_bits_and_nobody_waits_for_it(dtype, options) -> None:
    """Sizes without a remainder, see csrc/formulas/math.h; a chunk that is full, one that is not, and none."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(device, dtype)) for n in (1024, 33 * 1024, 0)]
        extra = options if device == "cuda" else {}
        adopted = adopt(torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, **extra), max_norm=0.5)
        assert adopted.compiled and ("Triton" in adopted.reason) == (device == "cuda")
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(device, dtype)
            if device == "cuda" and step == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                norm = adopted.step(grad_scale=0.5)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert adopted.compiled
        results.append([norm, *(p.detach() for p in params)])
    for expected, actual in zip(*results, strict=True):
        assert actual.is_cuda and torch.equal(expected, actual.cpu())


@pytest.mark.gpu
@installed
@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_gpu_leaves_steps_out_and_nobody_waits_for_it(nonfinite) -> None:
    params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1024, 33 * 1024 + 5)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    adopted = adopt(torch.optim.AdamW(params, lr=0.01, fused=True), max_norm=0.5, nonfinite=nonfinite)
    expected = adopt(torch.optim.AdamW(twins, lr=0.01, fused=True), max_norm=0.5)
    assert adopted.compiled and "Triton" in adopted.reason
    for step, bad in enumerate((None, None, torch.nan)):
        gradients = [torch.randn_like(p) for p in params]
        for p, q, gradient in zip(params, twins, gradients, strict=True):
            p.grad, q.grad = gradient.clone(), gradient
        if bad is not None:
            params[1].grad[-1] = bad
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            adopted.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if bad is None:
            expected.step()
    assert all(map(torch.equal, params, twins))
    assert all(state["step"].item() == 2.0 for state in adopted.optimizer.state.values())
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match="parameter 1 of param group 0"):
            adopted.guard.check(adopted.optimizer.param_groups)
    else:
        assert adopted.skipped_steps == 1


# ---- what they compile to; needs no GPU, only the tools that Triton brings ----

TABLE = {"table": "*i64", "rows": "i32"}


def compiled(kernel: Any, compute_capability: int, types: dict[str, str], **constants: Any) -> tuple[str, str]:
    """The machine code for NVIDIA GPUs of a compute capability, and the report on what it needs."""
    import triton as installed_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_fast.triton.launch import COMPILER_OPTIONS

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    found = installed_triton.compile(source, GPUTarget("cuda", compute_capability, 32), dict(COMPILER_OPTIONS))
    tool = Path(installed_triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    code, report = (subprocess.check_output([tool, what, binary], text=True) for what in ("-sass", "-res-usage"))
    return code, report


def step_code(formula: str, compute_capability: int) -> tuple[str, str]:
    from lit_fast.triton import step

    kernel = importlib.import_module(f"lit_fast.triton.{formula}")
    return compiled(
        step.step_kernel,
        compute_capability,
        {**TABLE, "scale": "*fp32", "coefficients": "*fp32"},
        CHUNK=1 << 15,
        ROW_WORDS=10,
        ALIGNED=True,
        UPDATE=kernel.update,
        STATES=kernel.STATES,
        COEFFICIENTS=kernel.COEFFICIENTS,
        SKIPS=True,
    )


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton as installed_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    folder = Path(installed_triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (folder / "cuobjdump").exists():
        pytest.skip("this Triton brings no cuobjdump")


def assert_no_spills(report: str) -> None:
    [(stack, local)] = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", report)
    assert (stack, local) == ("0", "0")


@installed
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("formula", "compute_capability"),
    [
        ("sgd", 90),
        *(
            pytest.param(formula, capability, marks=pytest.mark.slow)
            for formula in ("adamw", "sgd", "lion", "muon")
            for capability in (80, 90, 100)
            if (formula, capability) != ("sgd", 90)
        ),
    ],
)
def test_a_step_moves_128_bits_at_a_time_without_spills_and_without_float64(formula, compute_capability) -> None:
    code, report = step_code(formula, compute_capability)
    assert "lit_fast_step_kernel" in code  # what a profiler shows
    assert_no_spills(report)
    tensors = 4 if formula == "adamw" else 3
    # In each of three layouts, in the loop over whole blocks.
    assert len(re.findall(r"LDG\S*\.128", code)) >= 3 * tensors
    assert len(re.findall(r"STG\S*\.128", code)) >= 3 * (tensors - 1)
    assert not re.findall(r"\b(DFMA|DADD|DMUL|DSETP|F2F\.F64\S*|F2F\.F32\.F64|MUFU\.RCP64H)\b", code)
    assert re.search(r"\bFFMA2?\b", code)


@installed
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_norm_scale_and_preparation_compile_without_spills(compute_capability) -> None:
    from lit_fast.triton import adamw, norm, scale, step

    shape = {"CHUNK": 1 << 15, "ROW_WORDS": 10, "ALIGNED": True}
    for code, report in (
        compiled(norm.square_kernel, compute_capability, {**TABLE, "partial": "*fp64"}, **shape),
        compiled(scale.scale_kernel, compute_capability, {**TABLE, "scale": "*fp32"}, **shape),
    ):
        assert_no_spills(report)
        assert re.search(r"LDG\S*\.128", code)
    numbers = {name: "i32" for name in ("chunks", "options_at", "clipping_at")}
    results = {name: "*fp32" for name in ("norm", "scale", "coefficients")}
    _, report = compiled(
        step.prepare_kernel,
        compute_capability,
        {**TABLE, **numbers, **results, "partial": "*fp64", "skipped": "*i64"},
        ROW_WORDS=10,
        OPTION_WORDS=10,
        WITH_NORM=True,
        SKIPS=True,
        FOR_GOOD=True,
        FORMULA=adamw.coefficients,
        COEFFICIENTS=adamw.COEFFICIENTS,
    )
    assert_no_spills(report)

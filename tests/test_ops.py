from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import new_process
import pytest
import torch
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim import adopt
from lit_fast.optim.mapping import _mappings
from lit_fast.optim.muon import _Work

CSRC = Path(__file__).parent.parent / "csrc"


def groups_with(grads: list[torch.Tensor]) -> list[dict[str, list[Parameter]]]:
    params = []
    for grad in grads:
        params.append(Parameter(torch.zeros_like(grad)))
        params[-1].grad = grad
    return [{"params": params}]


# ---- the norm ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30])
def test_norm_is_within_one_rounding_of_float64(dtype, magnitude):
    grads = [(torch.randn(n) * magnitude).to(dtype) for n in (0, 1, 2, 15, 16, 17, 70, 65_535, 65_536, 200_001)]
    exact = torch.cat([g.double() for g in grads]).norm().item()
    norm = ops.gradient_norm(groups_with(grads))
    assert norm.shape == () and norm.dtype == torch.float32
    # 2^-24 for the float32 result; the float64 sum errs by less than (16384/16 + 4 + 26) * 2^-53, see norm.h.
    assert abs(norm.item() / exact - 1.0) <= 2.0**-24 * 1.001


def test_norm_has_the_same_bits_for_any_number_of_threads_and_any_target():
    groups = groups_with([torch.randn(n) for n in (100_003, 7, 400_000)])
    threads, target, seen = torch.get_num_threads(), ops.build_info()["cpu_target"], set()
    try:
        for name in ops.build_info()["cpu_targets_supported"]:
            ops.use_cpu_target(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                seen.add(ops.gradient_norm(groups).item())
    finally:
        torch.set_num_threads(threads)
        ops.use_cpu_target(target)
    assert len(seen) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 69_999])
def test_norm_is_finite_exactly_when_every_gradient_is(bad, place):
    grad = torch.full((70_000,), 1e19)  # squares of this overflow float32
    assert ops.gradient_norm(groups_with([grad])).isfinite()
    grad[place] = bad
    assert not ops.gradient_norm(groups_with([grad])).isfinite()


def test_norm_without_gradients_is_zero_and_scale_multiplies_it():
    assert ops.gradient_norm([{"params": [Parameter(torch.zeros(2))]}]).item() == 0.0
    assert ops.gradient_norm(groups_with([torch.tensor([3.0, 4.0])]), grad_scale=-0.5).item() == 2.5


def test_what_has_no_kernel_is_a_kernel_error_that_names_the_way_out():
    groups = groups_with([torch.randn(3).double()])
    for call in (ops.gradient_norm, ops.clip_gradients_):
        with pytest.raises(KernelError, match=r"float32, bfloat16 nor float16.*Use torch.nn.utils"):
            call(groups)


# ---- gradients rewritten ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clip_gradients_rewrites_like_torch(dtype):
    grads = [torch.randn(n).to(dtype) for n in (3, 70, 100_000)]
    ours, theirs = groups_with([g.clone() for g in grads]), groups_with([g.clone() for g in grads])
    ops.clip_gradients_(ours, clip_value=0.3)
    torch.nn.utils.clip_grad_value_(theirs[0]["params"], 0.3)
    for a, b in zip(ours[0]["params"], theirs[0]["params"], strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad._version > 0
    norm = ops.clip_gradients_(ours, grad_scale=2.0, max_norm=1.0)
    exact = 2.0 * torch.cat([p.grad.double() for p in theirs[0]["params"]]).norm()
    assert abs(norm.item() / exact.item() - 1.0) <= 1e-7
    after = torch.cat([p.grad.double() for p in ours[0]["params"]]).norm().item()
    assert abs(after - 1.0) <= (1e-6 if dtype == torch.float32 else 2.0**-8)


def test_release_gradients_sets_them_to_none():
    groups = groups_with([torch.ones(2), torch.ones(3)])
    ops.release_gradients(groups)
    assert all(p.grad is None for p in groups[0]["params"])


# ---- targets, threads, allocator ----


def test_the_environment_forces_a_target():
    code = "from lit_fast import ops; i = ops.build_info(); print(i['cpu_target'], i['cpu_target_reason'])"
    result = new_process.run(code, env={"LIT_FAST_CPU_TARGET": "scalar"})
    assert result.stdout.split() == ["scalar", "LIT_FAST_CPU_TARGET"], result.stderr


def test_an_unknown_or_unsupported_target_is_a_clear_error():
    info = ops.build_info()
    lacking = [t for t in info["cpu_targets_built"] if t not in info["cpu_targets_supported"]]
    names = ["nonsense", *lacking]
    code = """
import os, sys, torch
from lit_fast import errors, ops
p = torch.nn.Parameter(torch.zeros(100_000))
p.grad = torch.ones(100_000)
for name in sys.argv[1:]:
    os.environ["LIT_FAST_CPU_TARGET"] = name
    for ask in (ops.build_info, lambda: ops.gradient_norm([{"params": [p]}])):  # the second releases the GIL
        try:
            ask()
        except errors.KernelError as error:
            print(error)
"""
    said = iter(new_process.output_of(code, *names).splitlines())
    for name, *answers in zip(names, said, said, strict=True):
        for answer in answers:
            assert answer.startswith(f"LIT_FAST_CPU_TARGET={name}")
            assert ("lacks these instructions" if name in lacking else "is not a target of this build") in answer
    with pytest.raises(KernelError, match="not part of this build"):
        ops.use_cpu_target("nonsense")


def test_build_info_says_what_and_why():
    info = ops.build_info()
    assert info["cpu_target"] in info["cpu_targets_supported"] <= info["cpu_targets_built"]
    assert info["cpu_targets_built"][-1] == "scalar"
    assert isinstance(info["cuda"], bool) and "LIT_FAST_CUDA" in info["cuda_reason"]
    assert info["threads"].startswith(("openmp: ", "own pool: "))
    assert info["tensor_access"] in ("DLPack C exchange", "Python attributes")
    assert info["torch"] == torch.__version__


def test_the_core_shares_torchs_openmp_runtime():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list loaded libraries in /proc")
    loaded = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read_text()))
    if not loaded:
        pytest.skip("this torch has no OpenMP runtime")
    assert ops.build_info()["threads"].removeprefix("openmp: ") in loaded


def test_the_own_pool_steps_where_no_openmp_runtime_is_loaded():
    """The core by itself, without torch: its description changes only when a runtime appears."""
    code = "from lit_fast import _core; print(_core.build_info()['threads'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).startswith("own pool: ")


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_kept_memory_comes_back_without_page_faults():
    code = """
import resource, torch
from lit_fast import ops
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
report = ops.keep_freed_memory(True)
assert report.applied == ("mallopt" in report.what), report
faults(32)  # until the small remainders of aligned allocations have filled glibc's thread cache
kept = faults(5)
print(report.applied, kept, str(ops.keep_freed_memory(False)))
"""
    said = new_process.output_of(code)
    applied, kept = said.split()[:2]
    if applied == "False":
        pytest.skip(f"nothing to test: {said}")
    assert int(kept) < 200  # five times 16 MiB are 20,480 pages of 4 KiB


# ---- one stem in every tree ----


def test_formulas_headers_and_mappings_match():
    listed = {name.lower() for name in re.findall(r"^\s+X\((\w+)\)", (CSRC / "formulas/all.h").read_text(), re.M)}
    assert listed == set(ops.formulas())
    for name, formula in ops.formulas().items():
        assert (CSRC / "formulas" / f"{name}.h").exists()
        mapping = next(m for m in _mappings().values() if m.formula == name)
        assert list(mapping.state_keys) == formula["states"]
        assert mapping.step_key is not None or not formula["counts_steps"]
        for kind in mapping.classes:
            group = kind([Parameter(torch.zeros(1, 1))], lr=0.1).param_groups[0]
            if name == "muon":  # which makes groups of its own for the kernels
                group = _Work([group], {}).second[0]
            assert set(mapping.option_keys) <= set(group)
            assert all(not group[key] for key in mapping.refused_keys)
            options = [
                v for k in mapping.option_keys for v in (group[k] if isinstance(group[k], tuple) else [group[k]])
            ]
            assert len(options) == len(formula["options"])


def test_a_small_step_is_one_call_into_the_core():
    """No Python function of ours below `step`, and no torch operation."""
    model = torch.nn.Linear(32, 2)
    adopted = adopt(torch.optim.AdamW(model.parameters()))
    model(torch.ones(4, 32)).sum().backward()
    adopted.step()
    frames = []
    sys.setprofile(lambda frame, event, arg: frames.append(frame.f_code) if event == "call" else None)
    try:
        adopted.step()
    finally:
        sys.setprofile(None)
    here = str(Path(ops.__file__).parent)
    assert [code.co_name for code in frames if code.co_filename.startswith(here)] == ["step"]
    # Of torch's: a hash for each parameter's place in optimizer.state, and increment_version.
    assert len(frames) <= 1 + 2 * len(list(model.parameters())) + 1, frames

"""The CPU targets that this machine may lack: the same sources, built on an emulation, must equal the scalar bits.

AVX-512 is built against SIMDe's emulation, NEON is cross-compiled and run under qemu, where the machine is not of that
kind itself. Missing tools skip the test and are named.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{CSRC}"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-Wno-maybe-uninitialized"]


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def build(folder: Path, compiler: str, target: str, flags: list[str]) -> Path:
    output = folder / f"{target}.o"
    command = [compiler, *FLAGS, *flags, f"-DLIT_FAST_TARGET={target}", "-c", str(CSRC / "cpu" / "target.cpp")]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


def compare(folder: Path, compiler: str, target: str, flags: list[str], run: list[str], *link: str) -> None:
    objects = [build(folder, compiler, "scalar", []), build(folder, compiler, target, flags)]
    program = folder / "compare"
    source = HERE / "compare_targets.cpp"
    command = [compiler, *FLAGS, *link, f"-DLIT_FAST_COMPARED={target}", str(source), *map(str, objects)]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([*run, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "39192 comparisons, 0 failures" in result.stdout


def test_avx2_equals_scalar(tmp_path):
    need("g++")
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this machine has no AVX2 with FMA")
    compare(tmp_path, "g++", "avx2", AVX2, [])


def test_avx512_equals_scalar(tmp_path):
    need("g++")
    if {"avx512f", "avx512bw", "avx512vl"} <= cpu_flags():
        compare(tmp_path, "g++", "avx512", AVX512, [])
        return
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("this machine has no AVX-512, and SIMDe (libsimde-dev), which emulates it, is not installed")
    compare(tmp_path, "g++", "avx512", [f"-I{HERE / 'simde_avx512'}"], [])


def test_neon_equals_scalar(tmp_path):
    if platform.machine() == "aarch64":
        need("g++")
        compare(tmp_path, "g++", "neon", [], [])
        return
    need("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    compare(tmp_path, "aarch64-linux-gnu-g++", "neon", [], ["qemu-aarch64-static"], "-static")


def test_cuda_sources_run_as_cpp_equal_scalar(tmp_path):
    """The kernels' indexing, tables and arithmetic, without a GPU; what a GPU adds is tested where there is one."""
    need("g++")
    kernels = tmp_path / "step.o"
    emulation = [f"-I{HERE / 'cuda_emulation'}", "-std=c++20", "-Wno-unknown-pragmas"]
    source = str(CSRC / "cuda" / "step.cu")
    subprocess.run(["g++", *FLAGS, *emulation, "-x", "c++", "-c", source, "-o", str(kernels)], check=True)
    objects = [str(kernels), str(build(tmp_path, "g++", "scalar", []))]
    program = tmp_path / "compare"
    command = ["g++", *FLAGS, "-std=c++20", str(HERE / "compare_cuda.cpp"), *objects, "-pthread"]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout


def test_the_own_pool_works_where_there_is_no_openmp(tmp_path):
    need("g++")
    program = tmp_path / "own_pool"
    sources = [str(HERE / "own_pool.cpp"), str(CSRC / "threads.cpp")]
    subprocess.run(["g++", *FLAGS, *sources, "-pthread", "-ldl", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_function_built_with_a_targets_flags_is_shared(tmp_path):
    """Otherwise the linker could keep the AVX copy of an inline function for machines without AVX."""
    need("g++", "nm")
    if platform.machine() != "x86_64":
        pytest.skip("one target, one set of flags on this architecture")
    for target, flags in (("avx2", AVX2), ("avx512", AVX512)):
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", str(build(tmp_path, "g++", target, flags))],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        shared = [s for s in symbols if s.split()[1] in "WVu" and f"lit_fast::{target}::" not in s]
        assert symbols and not shared

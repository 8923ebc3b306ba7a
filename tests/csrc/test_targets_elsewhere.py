"""The CPU targets that this machine may lack: the same sources, built on an emulation, must equal the scalar bits.

AVX-512 is built against SIMDe's emulation, NEON is cross-compiled and run under qemu, where the machine is not of that
kind itself. Missing tools skip the test and are named.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    made = Objects(tmp_path_factory.mktemp("objects"))
    with made.pool:
        yield made


class Objects:
    """Object files, each compiled once, and those that one test needs beside each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.made: dict[tuple[str, ...], Future[Path]] = {}

    def start(self, compiler: str, source: Path, *flags: str) -> Future[Path]:
        key = (compiler, *flags, "-c", str(source))
        if key not in self.made:
            self.made[key] = self.pool.submit(compile_object, key, self.folder / f"{len(self.made)}.o")
        return self.made[key]

    def target(self, compiler: str, name: str, flags: list[str]) -> Future[Path]:
        return self.start(compiler, CSRC / "cpu" / "target.cpp", *FLAGS, *flags, f"-DLIT_FAST_TARGET={name}")


def compile_object(command: tuple[str, ...], output: Path) -> Path:
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


def run_program(program: list[str], seconds: int = 300) -> str:
    result = subprocess.run(program, capture_output=True, text=True, timeout=seconds, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compare(
    objects: Objects, folder: Path, compiler: str, target: str, flags: list[str], run: list[str], *link: str
) -> None:
    main = objects.start(compiler, HERE / "compare_targets.cpp", *FLAGS, f"-DLIT_FAST_COMPARED={target}")
    parts = [objects.target(compiler, target, flags), objects.target(compiler, "scalar", []), main]
    program = str(folder / "compare")
    subprocess.run([compiler, *link, *(str(part.result()) for part in parts), "-o", program], check=True)
    run_program([*run, program])


def test_avx2_equals_scalar(objects, tmp_path):
    need("g++")
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this machine has no AVX2 with FMA")
    compare(objects, tmp_path, "g++", "avx2", AVX2, [])


def test_avx512_equals_scalar(objects, tmp_path):
    need("g++")
    if {"avx512f", "avx512bw", "avx512vl"} <= cpu_flags():
        compare(objects, tmp_path, "g++", "avx512", AVX512, [])
        return
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("this machine has no AVX-512, and SIMDe (libsimde-dev), which emulates it, is not installed")
    compare(objects, tmp_path, "g++", "avx512", [f"-I{HERE / 'simde_avx512'}"], [])


def test_neon_equals_scalar(objects, tmp_path):
    if platform.machine() == "aarch64":
        need("g++")
        compare(objects, tmp_path, "g++", "neon", [], [])
        return
    need("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    compare(objects, tmp_path, "aarch64-linux-gnu-g++", "neon", [], ["qemu-aarch64-static"], "-static")


def test_cuda_sources_run_as_cpp_equal_scalar(objects, tmp_path):
    """The kernels' indexing, tables and arithmetic, without a GPU; what a GPU adds is tested where there is one."""
    need("g++")
    emulation = [*FLAGS, f"-I{HERE / 'cuda_emulation'}", "-std=c++20", "-Wno-unknown-pragmas", "-x", "c++"]
    parts = [
        objects.start("g++", CSRC / "cuda" / "step.cu", *emulation),
        objects.start("g++", HERE / "compare_cuda.cpp", *FLAGS, "-std=c++20"),
        objects.target("g++", "scalar", []),
    ]
    program = str(tmp_path / "compare")
    subprocess.run(["g++", *(str(part.result()) for part in parts), "-pthread", "-o", program], check=True)
    run_program([program])


def test_the_own_pool_works_where_there_is_no_openmp(tmp_path):
    need("g++")
    program = tmp_path / "own_pool"
    sources = [str(HERE / "own_pool.cpp"), str(CSRC / "threads.cpp")]
    subprocess.run(["g++", *FLAGS, *sources, "-pthread", "-ldl", "-o", str(program)], check=True)
    run_program([str(program)], 60)


def test_no_function_built_with_a_targets_flags_is_shared(objects):
    """Otherwise the linker could keep the AVX copy of an inline function for machines without AVX."""
    need("g++", "nm")
    if platform.machine() != "x86_64":
        pytest.skip("one target, one set of flags on this architecture")
    targets = {"avx2": objects.target("g++", "avx2", AVX2), "avx512": objects.target("g++", "avx512", AVX512)}
    for target, built in targets.items():
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", str(built.result())],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        shared = [s for s in symbols if s.split()[1] in "WVu" and f"lit_fast::{target}::" not in s]
        assert symbols and not shared

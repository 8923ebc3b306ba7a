"""Programs in C++ over csrc/: every CPU target must give the scalar bits, also those that this machine may lack.

AVX-512 is built against SIMDe's emulation, NEON is cross-compiled and run under qemu, where the machine is not of that
kind itself. Missing tools skip the test and are named. Targets are built with the flags that are shipped, which make
vector code of plain loops, or taken from the extension's build, as they take half a minute each; but for the emulation,
whose every intrinsic would become such a loop. CXXFLAGS of the environment come last, when compiling and when linking:
see `make sanitize`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CMAKE = (CSRC.parent / "CMakeLists.txt").read_text()
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{CSRC}"]
EXTRA = os.environ.get("CXXFLAGS", "").split()
SHIPPED = ["-std=c++17", "-O3", *re.search(r"set\(LIT_FAST_FLAGS (.*)\)", CMAKE)[1].split()]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


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
    shared = tmp_path_factory.getbasetemp()  # of this process; its parent is this run's where processes share the tests
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "objects"
    folder.mkdir(exist_ok=True)
    made = Objects(folder)
    with made.pool:
        yield made


class Objects:
    """Object files, each compiled once, and those that one test needs beside each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.made: dict[tuple[str, ...], Future[Path]] = {}

    def start(self, compiler: str, source: Path, *flags: str) -> Future[Path]:
        key = (compiler, *flags, *EXTRA, "-c", str(source))
        if key not in self.made:
            name = hashlib.sha256(" ".join(key).encode()).hexdigest()
            self.made[key] = self.pool.submit(compile_object, key, self.folder / f"{name}.o")
        return self.made[key]

    def target(self, compiler: str, name: str, flags: list[str], source: str = "target") -> Future[Path]:
        if compiler == "g++" and not EXTRA and (made := built(name, flags, source)):
            done: Future[Path] = Future()
            done.set_result(made)
            return done
        return self.start(compiler, CSRC / "cpu" / f"{source}.cpp", *SHIPPED, *flags, f"-DLIT_FAST_TARGET={name}")


def built(name: str, flags: list[str], source: str) -> Path | None:
    """The extension's own object of a CPU target, where it has these flags and ninja finds nothing newer than it."""
    output = f"CMakeFiles/lit_fast_{name}.dir/csrc/cpu/{source}.cpp.o"
    beside = {"-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"}
    for rules in CSRC.parent.glob("build/*/build.ninja"):
        used = re.search(rf"^build {re.escape(output)}:.*\n(?: .*\n)*?  FLAGS = (.*)", rules.read_text(), re.M)
        cache = (rules.parent / "CMakeCache.txt").read_text()
        ninja = shutil.which(re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)", cache, re.M)[1])
        if used is None or ninja is None or set(used[1].split()) - beside != {*SHIPPED, *flags}:
            continue
        asked = subprocess.run([ninja, "-n", output], cwd=rules.parent, capture_output=True, text=True, check=False)
        if "no work to do" in asked.stdout:
            return rules.parent / output
    return None


def compile_object(command: tuple[str, ...], output: Path) -> Path:
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            subprocess.run([*command, "-o", str(output)], check=True)
    return output


def run_program(program: list[str], seconds: int = 300) -> str:
    result = subprocess.run(program, capture_output=True, text=True, timeout=seconds, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compare(
    objects: Objects, folder: Path, compiler: str, target: str, flags: list[str], run: list[str], *link: str
) -> None:
    programs = {"compare_targets": "target", "compare_staged": "target"}
    if target != "scalar":  # a copy is a copy: its reference is itself
        programs = {"compare_buckets": "target_buckets", **programs}
    mains = [objects.start(compiler, HERE / f"{name}.cpp", *FLAGS) for name in programs]
    for (name, source), main in zip(programs.items(), mains, strict=True):
        compared = objects.start(compiler, HERE / "compared.cpp", *FLAGS, f"-DLIT_FAST_{source.upper()}={target}")
        kernels = [objects.target(compiler, t, f, source) for t, f in {"scalar": [], target: flags}.items()]
        parts = [str(part.result()) for part in (main, compared, *kernels)]
        subprocess.run([compiler, *link, *EXTRA, *parts, "-o", str(folder / name)], check=True)
        run_program([*run, str(folder / name)])


def test_scalar_steps_are_as_defined(objects, tmp_path):
    need("g++")
    compare(objects, tmp_path, "g++", "scalar", [], [])


def test_every_way_to_store_a_number(objects, tmp_path):
    need("g++")
    flags = [*FLAGS, *(AVX2 if {"avx2", "fma"} <= cpu_flags() else [])]
    main = objects.start("g++", HERE / "check_storage.cpp", *flags)
    program = str(tmp_path / "check")
    subprocess.run(["g++", *EXTRA, str(main.result()), "-o", program], check=True)
    run_program([program])


def test_avx2_equals_scalar(objects, tmp_path):
    need("g++")
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this machine has no AVX2 with FMA")
    compare(objects, tmp_path, "g++", "avx2", AVX2, [])


@pytest.mark.slow
def test_avx512_equals_scalar(objects, tmp_path):
    need("g++")
    if {"avx512f", "avx512bw", "avx512vl"} <= cpu_flags():
        compare(objects, tmp_path, "g++", "avx512", AVX512, [])
        return
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("this machine has no AVX-512, and SIMDe (libsimde-dev), which emulates it, is not installed")
    compare(objects, tmp_path, "g++", "avx512", ["-O1", f"-I{HERE / 'simde_avx512'}"], [])


@pytest.mark.slow
def test_neon_equals_scalar(objects, tmp_path):
    if platform.machine() == "aarch64":
        need("g++")
        compare(objects, tmp_path, "g++", "neon", [], [])
        return
    need("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    compare(objects, tmp_path, "aarch64-linux-gnu-g++", "neon", [], ["qemu-aarch64-static"], "-static")


EMULATION = [*FLAGS, "-std=c++20", f"-I{HERE / 'cuda_emulation'}", "-Wno-unknown-pragmas"]


@pytest.mark.parametrize("every_nth", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["a quarter", "all"])
def test_cuda_sources_run_as_cpp_equal_scalar(objects, tmp_path, every_nth):
    """The kernels' indexing, tables and arithmetic, without a GPU; what a GPU adds is tested where there is one."""
    need("g++")
    parts = [
        objects.start("g++", CSRC / "cuda" / "step.cu", *EMULATION, "-x", "c++"),
        objects.start("g++", HERE / "compare_cuda.cpp", *FLAGS, "-std=c++20"),
        objects.target("g++", "scalar", []),
    ]
    program = str(tmp_path / "compare")
    subprocess.run(["g++", *EXTRA, *(str(part.result()) for part in parts), "-o", program], check=True)
    run_program([program, str(every_nth)])


def test_cuda_buckets_run_as_cpp_equal_scalar_in_one_launch(objects, tmp_path):
    need("g++")
    parts = [
        *(objects.start("g++", CSRC / "cuda" / f"{n}.cu", *EMULATION, "-x", "c++") for n in ("buckets", "step")),
        objects.start("g++", HERE / "compare_cuda_buckets.cpp", *EMULATION),
        *(objects.target("g++", "scalar", [], source) for source in ("target", "target_buckets")),
    ]
    program = str(tmp_path / "compare")
    subprocess.run(["g++", *EXTRA, *(str(part.result()) for part in parts), "-o", program], check=True)
    run_program([program])


def test_norm_and_step_of_600_tensors_are_three_launches_and_no_wait(objects, tmp_path):
    need("g++")
    large = [*EMULATION, "-O0", "-DCUDART_VERSION=13000", "-x", "c++"]  # with the arguments that kernels have today
    parts = [
        objects.start("g++", CSRC / "cuda" / "step.cu", *large),
        objects.start("g++", HERE / "count_launches.cpp", *large),
    ]
    program = str(tmp_path / "count")
    subprocess.run(["g++", *EXTRA, *(str(part.result()) for part in parts), "-o", program], check=True)
    said = run_program([program])
    assert "parameters: 3 launches" in said and "0 waits" in said


def test_the_own_pool_works_where_there_is_no_openmp(tmp_path):
    need("g++")
    program = tmp_path / "own_pool"
    sources = [str(HERE / "own_pool.cpp"), str(CSRC / "threads.cpp")]
    subprocess.run(["g++", *FLAGS, *EXTRA, *sources, "-pthread", "-ldl", "-o", str(program)], check=True)
    run_program([str(program)], 60)


@pytest.mark.slow
def test_no_function_built_with_a_targets_flags_is_shared(objects):
    """Otherwise the linker could keep the AVX copy of an inline function for machines without AVX."""
    need("g++", "nm")
    if platform.machine() != "x86_64":
        pytest.skip("one target, one set of flags on this architecture")
    flags = {"avx2": AVX2, "avx512": AVX512}
    files = [(t, objects.target("g++", t, f, s)) for t, f in flags.items() for s in ("target", "target_buckets")]
    for target, built in files:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", str(built.result())],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        shared = [s for s in symbols if s.split()[1] in "WVu" and f"lit_fast::{target}::" not in s]
        assert symbols and not shared

"""What nvcc makes of the step kernels, read from its report and its machine code: no GPU is needed.

One formula for one architecture, which takes seconds: nothing may live in local memory, the widest elements must move
by 128 bits, nothing may be computed in double precision. So, too, with the pass before a step that measures tensors,
which sums squares in double precision and does nothing else in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def tool(name: str) -> str:
    """From PATH, CUDA's usual folder, or the Triton wheel, which brings `cuobjdump`."""
    triton = find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)
    if found is None:
        pytest.skip(f"not installed: {name}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The machine code and the compiler's report."""
    cubin = tmp_path_factory.mktemp("cuda") / "step.cubin"
    command = [tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-arch=sm_90", "-cubin", "-Xptxas=-v", f"-I{CSRC}"]
    source = str(HERE / "step_kernels.cu")
    result = subprocess.run([*command, source, "-o", str(cubin)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return cubin, result.stderr


def kernel_name(mangled: str) -> str:
    """E.g. "direct f32 bf16": parameter, state."""
    if "measure_kernel" in mangled:
        return "measure " + LAYOUTS.get(int(re.search(r"LayoutE(\d)E", mangled)[1]), "any")
    if "staged" in mangled:
        return "staged"
    types = re.search(r"ELj\d+E(.*)Lb([01])E", mangled)
    assert types is not None, mangled
    named = re.findall(r"f|NS_4bf16E|S\d_", types[1])
    param, state = ("f32" if t == "f" else "bf16" for t in named)
    return f"direct {param} {state}" + (" master" if types[2] == "1" else "")


LAYOUTS = {0: "f32 f32", 1: "bf16 bf16", 2: "f32 bf16", 3: "bf16 f32 master"}  # csrc/dtypes.h
MEASURING = {
    # loads of 128 bits in the loop, which takes eight neighbours: of parameter or master, gradient, two states
    "measure f32 f32": 2 + 2 + 2 * 2,
    "measure bf16 bf16": 1 + 1 + 2 * 1,
    "measure f32 bf16": 2 + 2 + 2 * 1,
    "measure bf16 f32 master": 2 + 1 + 2 * 2,
    "measure any": None,
}
KERNELS = {
    # accesses of 128 bits in the loop, of 64 where an element is half as wide: (loads, stores, loads, stores)
    "direct f32 f32": (4, 3, 0, 0),
    "direct bf16 bf16": (4, 3, 0, 0),
    "direct f32 bf16": (2, 1, 2, 2),
    "direct bf16 f32 master": (3, 3, 1, 1),
    "staged": None,
}


def test_nothing_lives_in_local_memory_and_blocks_share_a_multiprocessor(compiled):
    reports = re.split(r"Compiling entry function '", compiled[1])[1:]
    assert {kernel_name(report) for report in reports} == KERNELS.keys() | MEASURING.keys()
    for report in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        # 65,536 registers: three blocks of 256 threads with all storages, four with one of them.
        assert registers <= (64 if "direct" in report else 80), report


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """The operations of each kernel."""
    run = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    found = {}
    for code in re.split(r"Function : ", run.stdout)[1:]:
        operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
        found[kernel_name(code.split("\n", 1)[0])] = operations
    return found


def test_measuring_kernels_move_128_bits_and_only_sum_doubles(compiled):
    functions = machine_code(compiled[0])
    for name, loads in MEASURING.items():
        operations = functions[name]
        bases = {operation.split(".")[0] for operation in operations}
        assert not bases & {"LDL", "STL", "LD", "ST"} and "ATOMG" in bases, name
        # Of the eight elements that the loop takes parameter and direction; and the learning rate, by the last block.
        assert operations.count("F2F.F64.F32") == 2 * 8 + 1, name
        assert not any(re.match(r"STG\.E\.(128|U16|U8)", operation) for operation in operations), name
        if loads is not None:
            assert operations.count("LDG.E.128") == loads, name


def test_step_kernels_move_128_bits_and_compute_no_doubles(compiled):
    functions = machine_code(compiled[0])
    assert functions.keys() == KERNELS.keys() | MEASURING.keys()
    table = min(functions[name].count("LDG.E.64") for name in KERNELS)
    for name, expected in KERNELS.items():
        operations = functions[name]
        assert len(operations) > 100, name
        bases = {operation.split(".")[0] for operation in operations}
        # LD and ST: addresses of which the compiler does not know that they are global.
        assert not bases & {"DFMA", "DADD", "DMUL", "DSETP", "LDL", "STL", "LD", "ST"}, name
        assert not any("F64" in operation for operation in operations), name
        if expected is None:
            assert "REDUX" in bases and operations.count("STG.E.128") >= 12, name
            continue
        loads, stores, narrow_loads, narrow_stores = expected
        assert operations.count("LDG.E.128") == loads, name
        assert operations.count("STG.E.128") == stores, name
        assert operations.count("STG.E.64") == narrow_stores, name
        # The table's words are of 64 bits, too: as many loads in every kernel.
        assert operations.count("LDG.E.64") == table + narrow_loads, name


@pytest.mark.slow
def test_bucket_kernels_move_128_bits_and_keep_all_in_registers(tmp_path):
    """Each has one more way for what is not aligned, element by element."""
    cubin = tmp_path / "buckets.cubin"
    command = [tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-arch=sm_90", "-cubin", "-Xptxas=-v", f"-I{CSRC}"]
    source = str(CSRC / "cuda" / "buckets.cu")
    built = subprocess.run([*command, source, "-o", str(cubin)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    reports = re.split(r"Compiling entry function '", built.stderr)[1:]
    assert len(reports) == 3 + 9  # to each dtype; from each to each
    for report in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 40, report
    run = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    codes = re.split(r"Function : ", run.stdout)[1:]
    assert len(codes) == len(reports)
    for code in codes:
        operations = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code))
        assert {"LDG.E.128", "STG.E.128"} <= operations and not any("F64" in operation for operation in operations)
        assert not {operation.split(".")[0] for operation in operations} & {"LDL", "STL", "LD", "ST", "DFMA", "DADD"}

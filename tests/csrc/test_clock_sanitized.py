"""The clock of phases under sanitizers: memory, undefined behaviour, and data races with threads that read it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
SOURCES = [str(HERE / "time_calls.cpp"), str(CSRC / "phase_clock.cpp")]
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", f"-I{CSRC}", "-pthread"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_a_clock_that_others_read_while_it_runs(sanitizers: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("not installed: g++")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = ["g++", *sanitize, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"this g++ comes without the libraries of -fsanitize={sanitizers}")
    program = str(tmp_path / "time_calls")
    subprocess.run(["g++", *FLAGS, *sanitize, *SOURCES, "-o", program], check=True)
    # GCC's thread sanitizer wants to know where memory lies: newer kernels spread it further than it expects.
    fixed = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    around = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=300, env=around, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all of it adds up\n" and done.stderr == ""

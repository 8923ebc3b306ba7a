"""Programs in processes of their own, in which nothing of lit_fast has been imported.

They are forked from a process that has imported torch, and what torch imports with the first optimizer: that takes
seconds, many times in this suite. A test about importing torch, or about how an interpreter ends, needs `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo"])


class NewProcess:
    """Runs a file, or the text of a program, with `arguments`; it leads a session (and process group) of its own.

    `returncode`, `stdout` and `stderr` are those of the program that has ended, after `wait`.
    """

    def __init__(self, program: str | Path, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for output in self._outputs:
            output.touch()
        argv = [str(program) if isinstance(program, Path) else "-c", *map(str, arguments)]
        text = None if isinstance(program, Path) else textwrap.dedent(program)
        environment = {**os.environ, **(env or {})}
        given = (argv, text, environment, Path.cwd(), self._outputs)
        self._process = SERVER.Process(target=_begin, args=given)
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 120.0) -> NewProcess:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        self.returncode = self._process.exitcode
        self.stdout, self.stderr = (output.read_text() for output in self._outputs)
        return self

    def kill(self) -> None:
        self._process.kill()


def run(
    program: str | Path, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 120.0
) -> NewProcess:
    """The program's process, ended."""
    return NewProcess(program, *arguments, env=env).wait(timeout)


def output_of(program: str | Path, *arguments: object, timeout: float = 120.0) -> str:
    """What a program prints that must not fail."""
    done = run(program, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_as_usual() -> None:
    """Processes that this one starts, such as a loader's workers, are started as by a program that nobody has forked.

    multiprocessing hands its own way on to its processes: each would have a server of its own, which imports torch.
    """
    multiprocessing.set_start_method(None, force=True)


def _begin(argv: list[str], text: str | None, environment: dict[str, str], folder: Path, outputs: list[Path]) -> None:
    os.setsid()
    start_as_usual()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY), number)
    sys.argv = argv
    if text is None:
        runpy.run_path(argv[0], run_name="__main__")
    else:
        exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})

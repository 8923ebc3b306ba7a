"""The command line: dispatch, exit codes, and running an unedited program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import new_process
import pytest
from new_process import NewProcess

from lit_fast import __version__
from lit_fast.cli import main as cli


def lit_fast(*arguments: str) -> NewProcess:
    program = "import runpy; runpy.run_module('lit_fast.cli.main', run_name='__main__', alter_sys=True)"
    return new_process.run(program, *arguments)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"lit-fast {__version__}"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [["fly"], []])
def test_wrong_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "command" in said
    if arguments:
        assert "'fly'" in said and "pretrain" in said


def test_every_command_is_a_file_with_main() -> None:
    folder = Path(cli.__file__).parent
    for name in cli.COMMANDS:
        assert "def main(" in (folder / f"{name}.py").read_text()


def test_dispatch_does_not_import_torch() -> None:
    program = "import sys, lit_fast.cli.main as m; m.parser(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_our_own_error_is_printed_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_fast.cli import info
    from lit_fast.errors import DataError

    def failing(argv: list[str]) -> int:
        raise DataError("no text there")

    monkeypatch.setattr(info, "main", failing)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "lit-fast info: no text there\n"


SCRIPT = """
import sys
from pathlib import Path
import lightning as L
from pytorch_lightning.callbacks import ModelCheckpoint
import beside

assert __name__ == "__main__"
assert L.Trainer.__module__.startswith("lit_fast"), L.Trainer
assert beside.here
print(sys.argv[1:], Path(__file__).name)
sys.exit(int(sys.argv[1]))
"""


def test_run_keeps_arguments_and_exit_code(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("here = True\n")
    done = lit_fast("run", str(tmp_path / "script.py"), "3", "--flag", "-x")
    assert done.returncode == 3, done.stderr
    assert done.stdout == "['3', '--flag', '-x'] script.py\n"


def test_run_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("here = True\n")
    (tmp_path / "program.py").write_text(SCRIPT)
    done = lit_fast("run", "-m", "program", "0")
    assert (done.returncode, done.stdout) == (0, "['0'] program.py\n"), done.stderr


def test_run_shows_the_programs_own_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("def inner():\n    raise RuntimeError('from the script')\n\ninner()\n")
    done = lit_fast("run", str(tmp_path / "script.py"))
    assert done.returncode == 1
    assert "from the script" in done.stderr and "in inner" in done.stderr


def test_run_without_a_file() -> None:
    program = [sys.executable, "-m", "lit_fast.cli.main", "run", "nowhere.py"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no file 'nowhere.py'" in done.stderr


def test_info_tells_what_was_built_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from lit_fast import ops

    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    built = ops.build_info()
    chosen = (built["cpu_target"], built["cpu_target_reason"])
    for expected in (__version__, torch.__version__, sys.executable, *chosen):
        assert expected in said
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["core"]["cpu_targets_built"] == built["cpu_targets_built"]

"""A program that runs itself again for every further device, and how all of them end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from new_process import NewProcess

from lit_fast.errors import ClusterError, MisconfigurationException
from lit_fast.strategies.environments import LightningEnvironment
from lit_fast.strategies.launchers import SubprocessScriptLauncher, is_interactive
from lit_fast.strategies.launchers import subprocess_script as module

pytestmark = pytest.mark.dist

# Rank 1 does without torch, which takes seconds to import.
SCRIPT = """
    import json, os, sys, time
    from pathlib import Path

    NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR"]
    folder = os.path.abspath(sys.argv[1])

    def work(a=0, b=0):
        seen = [{name: os.environ[name] for name in NAMES}, sys.argv, sys.warnoptions, os.environ["OMP_NUM_THREADS"]]
        Path(folder, os.environ["LOCAL_RANK"]).write_text(json.dumps([*seen, os.environ["MASTER_PORT"]]))
        return a + b

    if "LOCAL_RANK" in os.environ:
        work()
        time.sleep(60 if sys.argv[2] == "raise" else 0.5)
        Path(folder, "done").touch()
        sys.exit(int(sys.argv[3]))

    from lit_fast.strategies.environments import LightningEnvironment
    from lit_fast.strategies.launchers import SubprocessScriptLauncher, launcher

    launcher.GRACE_SECONDS = 0.5
    os.chdir("/")  # the command that started this named the script by a relative path
    start = SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    print(start.launch(work, 1, b=2), start.launch(work, 3, b=4), len(start.procs))
    while sys.argv[2] == "raise":
        if Path(folder, "1").exists():
            raise ValueError("the first one fails")
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "script.py", str(tmp_path), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_plain_script(tmp_path: Path) -> None:
    """Each knows its place and was started with the same words; the first waits for the other, and fails with it."""
    done = run(tmp_path, "end", "7")
    assert done.stdout == "3 7 1\n", done.stderr
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "GROUP_RANK": "0"}
    places["MASTER_ADDR"] = "127.0.0.1"
    assert first[0] == {**places, "RANK": "0", "LOCAL_RANK": "0"}
    assert second[0] == {**places, "RANK": "1", "LOCAL_RANK": "1"}
    assert first[1] == ["script.py", str(tmp_path), "end", "7"]
    assert second[1] == [str(tmp_path / "script.py"), *first[1][1:]]
    assert first[2] == second[2] == ["ignore::UserWarning"]
    assert first[3:] == second[3:] and first[3] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert (tmp_path / "done").exists() and done.returncode == 7
    assert "lit_fast: rank 1 (pid " in done.stderr and ") ended with exit code 7; the whole run ends" in done.stderr


def test_when_the_first_raises_the_others_end(tmp_path: Path) -> None:
    done = run(tmp_path, "raise", "0")
    assert done.returncode == 1 and "ValueError: the first one fails" in done.stderr
    assert (tmp_path / "1").exists() and not (tmp_path / "done").exists()


# In a fork of a process that has torch already. The other two ranks are programs without it.
FIRST = """
    import os, sys, time
    from lit_fast.strategies.environments import LightningEnvironment
    from lit_fast.strategies.launchers import SubprocessScriptLauncher, launcher, subprocess_script

    launcher.GRACE_SECONDS = 0.5
    subprocess_script.command_line = lambda: [sys.executable, "-c", sys.argv[1]]

    def work():
        print(*[process.pid for process in first.procs], flush=True)
        time.sleep(60)

    first = SubprocessScriptLauncher(LightningEnvironment(), 3)
    first.launch(work)
"""


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("sys.exit(3)", 3, "ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL (out of memory, perhaps)"),
    ],
)
def test_when_another_fails_the_first_ends(end: str, code: int, says: str) -> None:
    """Though it hangs; and so does the third."""
    other = f"import os, signal, sys, time; {end} if os.environ['RANK'] == '2' else time.sleep(60)"
    done = NewProcess(FIRST, other).wait(20)
    assert done.returncode == code
    assert f"lit_fast: rank 2 (pid {done.stdout.split()[1]} on " in done.stderr and says in done.stderr
    assert_gone(*map(int, done.stdout.split()))


def test_nobody_outlives_a_first_that_is_killed() -> None:
    first = NewProcess(FIRST, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    until = time.monotonic() + 20
    while not first._outputs[0].read_text().endswith("\n") and time.monotonic() < until:
        time.sleep(0.02)
    others = [int(text) for text in first._outputs[0].read_text().split()]
    assert len(others) == 2 and all(Path(f"/proc/{pid}").exists() for pid in others)
    os.kill(first.pid, signal.SIGKILL)
    assert_gone(*others)
    assert first.wait(5).returncode == -signal.SIGKILL


def assert_gone(*pids: int) -> None:
    until = time.monotonic() + 5
    while time.monotonic() < until and any(running(pid) for pid in pids):
        time.sleep(0.02)
    assert not [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    main = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def command(file: str | None, argv0: str, *given: str) -> list[str]:
        main.__file__ = file
        monkeypatch.setattr(sys, "argv", [argv0])
        monkeypatch.setattr(sys, "orig_argv", ["python", *given])
        found = module.command_line()
        assert found[0] == sys.executable
        return found[1:]

    assert command("/a/t.py", "t.py", "-O", "t.py", "--x", "1") == ["-O", "/a/t.py", "--x", "1"]
    assert command("/a/pkg/t.py", "/a/pkg/t.py", "-m", "pkg.t", "t.py") == ["-m", "pkg.t", "t.py"]
    assert command(None, "-c", "-c", "pass") == ["-c", "pass"]
    # a program that another runs (`lit-fast run t.py`): the outer command is what has to run again
    assert command("/bin/lit-fast", "t.py", "/bin/lit-fast", "run", "t.py") == ["/bin/lit-fast", "run", "t.py"]
    for given in ([], ["-"], ["-O", "-"]):
        with pytest.raises(MisconfigurationException, match="was read from standard input; write it to a file"):
            command(None, "", *given)
    monkeypatch.setattr(module.multiprocessing, "parent_process", object)
    with pytest.raises(
        MisconfigurationException, match=r"one that `multiprocessing` started .* strategy='ddp_spawn' or"
    ):
        command("/a/t.py", "t.py", "t.py")


def test_nothing_is_started_where_others_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    launcher = SubprocessScriptLauncher(LightningEnvironment(), 2)
    assert launcher.launch(lambda value: value, 5) == 5 and launcher.procs == []
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ClusterError, match="needs 2 processes, and the launcher started 3"):
        launcher.launch(print)


def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_interactive()
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launcher = SubprocessScriptLauncher(LightningEnvironment(), 2)
    assert is_interactive() and not launcher.is_interactive_compatible
    with pytest.raises(MisconfigurationException, match=r"strategy='ddp'\) .* Set Trainer\(strategy='ddp_notebook'\)"):
        launcher.launch(print)
    assert launcher.procs == []

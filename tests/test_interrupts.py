"""Ctrl-C and SIGTERM outside a fit; test_resume.py has those of a fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import new_process
import pytest
import torch
from new_process import NewProcess
from torch.utils.data import DataLoader

import lit_fast
from lit_fast.data import worker_signals
from lit_fast.demos.boring_classes import BoringModel, RandomDataset
from lit_fast.errors import JobRequeued, PossibleUserWarning
from lit_fast.states import TrainerStatus
from lit_fast.strategies.environments import SLURMEnvironment, find_free_network_port

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}
QUIET |= {"enable_checkpointing": False, "enable_model_summary": False}


# Each run is ended by a signal to the whole process group in its third batch, while its workers have more to do.
GROUP = """
    import json, os, signal, sys, warnings
    from multiprocessing import active_children
    from torch.utils.data import DataLoader
    import lit_fast
    from lit_fast.demos.boring_classes import BoringModel, RandomDataset

    warnings.simplefilter("ignore")
    seen = []

    class Signalled(BoringModel):
        def signal_group(self, batch, batch_idx):
            seen.append(batch_idx)
            if batch_idx == 2:
                os.killpg(0, number)
            return self.layer(batch)

        validation_step = test_step = predict_step = signal_group

    class Ends(lit_fast.Callback):
        def on_exception(self, trainer, module, error):
            ends.append([type(error).__name__, trainer.received_sigterm, str(trainer.state.status)])

    ends, codes = [], []
    for stage in ("validate", "test", "predict"):
        for number in (signal.SIGTERM, signal.SIGINT):
            trainer = lit_fast.Trainer(callbacks=[Ends()], **json.loads(sys.argv[1]))
            try:
                getattr(trainer, stage)(Signalled(), DataLoader(RandomDataset(32, 400), num_workers=2))
            except SystemExit as end:
                codes.append(end.code)
    print(json.dumps([codes, seen, ends, len(active_children())]))
"""


def test_a_signal_to_the_group_ends_workers_and_trainer(tmp_path: Path) -> None:
    """Nothing is left: no worker, no folder of its sockets, no traceback."""
    done = new_process.run(GROUP, json.dumps(QUIET), env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    codes, seen, ends, workers = json.loads(done.stdout)
    assert codes == [143, 1] * 3
    assert seen == [0, 1, 2] * 6
    status = str(TrainerStatus.INTERRUPTED)
    assert ends == [["SIGTERMException", True, status], ["KeyboardInterrupt", False, status]] * 3
    assert workers == 0
    assert not list(tmp_path.glob("pymp-*"))


PERSISTENT = """
    import json, sys
    from multiprocessing import active_children
    from torch.utils.data import DataLoader
    import lit_fast
    from lit_fast.demos.boring_classes import BoringModel, RandomDataset

    loader, other = (DataLoader(RandomDataset(32, 4), num_workers=1, persistent_workers=True) for _ in range(2))
    trainer = lit_fast.Trainer(**json.loads(sys.argv[1]))
    trainer.fit(BoringModel(), RandomDataset(32, 4), loader)
    trainer.validate(BoringModel(), other, verbose=False)
    print(len(active_children()))
"""


def test_a_program_ends_while_persistent_workers_live(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PERSISTENT), json.dumps(QUIET)],
        capture_output=True, text=True, timeout=worker_signals.GRACE_SECONDS - 5, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "2\n"
    assert not list(tmp_path.glob("pymp-*"))


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_an_earlier_handler_of_sigterm_still_hears_of_it(stage: str) -> None:
    heard: list[int] = []

    class Terminated(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
            return super().training_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]

    def own(number: int, frame: Any) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(SystemExit) as end:
            getattr(lit_fast.Trainer(**QUIET), stage)(Terminated(), DataLoader(RandomDataset(32, 4)))
        assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


# -- a job of SLURM's that is about to end

SCONTROL = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job: of its checkpoints, of a `scontrol` that writes what it is called with."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    variables = {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 4711, "JOB_NAME": "train"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return tmp_path


class Steps(BoringModel):
    """Notes its batches; is sent a signal in the third, twice, as where SLURM signals a process and its parent."""

    def __init__(self, number: int | None = None) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.number, self.seen = number, list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        if batch_idx == 2 and self.number is not None:
            signal.raise_signal(self.number)
            signal.raise_signal(self.number)
        return super().training_step(batch, batch_idx)


def fit(model: Steps, job: Path, **options: Any) -> lit_fast.Trainer:
    options = {**QUIET, "limit_train_batches": 6, "limit_val_batches": 0, "default_root_dir": job, **options}
    trainer = lit_fast.Trainer(**options)
    torch.manual_seed(2)  # of the data
    trainer.fit(model)
    return trainer


def test_a_job_is_requeued_and_goes_on(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, first, second = Steps(), Steps(signal.SIGUSR1), Steps()
    fit(whole, job)
    heard: list[str] = []
    listener = lit_fast.callbacks.LambdaCallback(on_exception=lambda t, m, error: heard.append(type(error).__name__))
    with pytest.raises(JobRequeued) as end:
        fit(first, job, callbacks=[listener])
    assert end.value.code == 128 + signal.SIGUSR1 and first.seen == [0, 1, 2] and heard == ["JobRequeued"]
    assert (job / "calls").read_text() == "requeue 4711\n"
    said = f"SIGUSR1 after step 3: saved {job}/hpc_ckpt_1.ckpt; job 4711 is back in the queue and goes on from there."
    assert said in capsys.readouterr().out
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PossibleUserWarning)
        trainer = fit(second, job)
    assert second.seen == [3, 4, 5] and trainer.global_step == 6
    assert all(map(torch.equal, whole.state_dict().values(), second.state_dict().values()))


def test_an_array_job_and_another_signal(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "9")
    fit(Steps(), job, max_steps=1).save_checkpoint(job / "hpc_ckpt_8.ckpt")
    with pytest.raises(JobRequeued) as end:
        fit(Steps(signal.SIGHUP), job, plugins=[SLURMEnvironment(requeue_signal=signal.SIGHUP)])
    assert end.value.code == 128 + signal.SIGHUP and (job / "hpc_ckpt_9.ckpt").exists()
    assert (job / "calls").read_text() == "requeue 4700_3\n"


@pytest.mark.parametrize(("broken", "why"), [(True, r"failed \(1\): no"), (False, "No such file")])
def test_a_job_that_cannot_be_requeued(job: Path, broken: bool, why: str) -> None:
    """Its checkpoint is there: submitted again, it goes on from it, with a warning, since nobody requeued it."""
    if broken:
        (job / "scontrol").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    else:
        (job / "scontrol").unlink()
    told = pytest.warns(UserWarning, match=f"hpc_ckpt_1.ckpt; the job was not requeued. .*{why}.* Submit it again")
    with told, pytest.raises(JobRequeued):
        fit(Steps(signal.SIGUSR1), job)
    again = Steps()
    with pytest.warns(PossibleUserWarning, match=r"goes on from .*hpc_ckpt_1\.ckpt, which a requeued job left"):
        fit(again, job)
    assert again.seen == [3, 4, 5]


def test_who_handles_that_signal_keeps_it(job: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        model = Steps(signal.SIGUSR1)
        fit(model, job)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] * 2 and len(model.seen) == 6
    assert not list(job.glob("hpc*")) and not (job / "calls").exists()


TASK = """
    import os, signal, sys, torch
    import lit_fast
    from lit_fast.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            print(batch_idx, flush=True)
            if batch_idx == 2 and self.global_rank == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    torch.set_num_threads(1)
    lit_fast.Trainer(accelerator="cpu", devices=2, max_steps=6, default_root_dir=os.getcwd(), **quiet).fit(Model())
"""


@pytest.mark.dist
def test_a_job_of_two_tasks_is_requeued_once(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second task hears the signal; both end after the same step, and go on from the same file."""
    monkeypatch.chdir(job)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("NTASKS", "NTASKS_PER_NODE"):
        monkeypatch.setenv(f"SLURM_{name}", "2")
    ends: list[list[int]] = []
    batches: list[list[int]] = []
    for attempt in range(2):
        monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        tasks = []
        for rank in ("0", "1"):
            place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            tasks.append(NewProcess(TASK, 1 if attempt == 0 else -1, env=place))
        done = [task.wait(60) for task in tasks]
        ends.append([task.returncode for task in done])
        batches += [[int(line) for line in task.stdout.splitlines() if line.isdecimal()] for task in done]
    assert ends == [[128 + signal.SIGUSR1] * 2, [0, 0]], done[0].stderr + done[1].stderr
    assert (job / "calls").read_text() == "requeue 4711\n"
    assert [path.name for path in job.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert batches[0] == batches[1] and batches[2] == batches[3] and batches[0] + batches[2] == list(range(6))

"""Ctrl-C and SIGTERM outside a fit; test_resume.py has those of a fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import new_process
import pytest
from torch.utils.data import DataLoader

import lit_fast
from lit_fast.data import worker_signals
from lit_fast.demos.boring_classes import BoringModel, RandomDataset
from lit_fast.states import TrainerStatus

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

"""A fit whose files may not grow past a limit from the third epoch on, as on a full disk.

python full_disk_program.py FOLDER
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from heart_models import QUIET, Plain, batches

import lit_fast


class Fills(Plain):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


if __name__ == "__main__":
    options: dict[str, Any] = {**QUIET, "enable_checkpointing": True}
    callback = lit_fast.callbacks.ModelCheckpoint(sys.argv[1])
    try:
        lit_fast.Trainer(**options, max_epochs=4, callbacks=callback).fit(Fills(), batches(3))
    finally:  # the disk has room for what is said about it
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

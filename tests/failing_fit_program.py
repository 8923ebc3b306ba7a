"""A fit in several processes that ends only when one of them fails, in the way that the command line names.

Arguments: rank that fails, how, a folder for checkpoints, number of nodes. Its place is in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor

import lit_fast
from lit_fast.callbacks import ModelCheckpoint
from lit_fast.demos.boring_classes import BoringModel, RandomDataset

victim, how, folder, nodes = sys.argv[1:]
FAILS_AT = 23  # the last checkpoint before is that of step 20


class Model(BoringModel):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_step == FAILS_AT:
            print("running", flush=True)
            if os.environ["RANK"] == victim:
                if how == "raise":
                    raise ValueError("one rank only")
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


class Tells(lit_fast.Callback):
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        print(f"on_exception: {type(exception).__name__}", flush=True)


torch.manual_seed(1)
trainer = lit_fast.Trainer(
    accelerator="cpu",
    strategy="ddp",
    devices=int(os.environ["WORLD_SIZE"]) // int(nodes),
    num_nodes=int(nodes),
    max_steps=10**6,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}"), Tells()],
)
data = torch.utils.data.DataLoader(RandomDataset(32, 10**6), batch_size=2)
trainer.fit(Model(), data)

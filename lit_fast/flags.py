"""What options ask of torch itself, for the whole process, and what a new Trainer says about them."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import torch

from lit_fast.accelerators import CUDAAccelerator
from lit_fast.errors import PossibleUserWarning
from lit_fast.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lit_fast.config import TrainerConfig


def set_torch_flags(config: TrainerConfig) -> None:
    """`deterministic` and `benchmark`, as torch takes them. None leaves what the program set."""
    deterministic, benchmark = config.deterministic, config.benchmark
    if deterministic and benchmark:
        warnings.warn(
            f"Trainer(deterministic={deterministic!r}, benchmark=True): benchmarking lets cuDNN choose other "
            f"algorithms from run to run, whatever `deterministic` asks for; drop benchmark=True.",
            stacklevel=4,
        )
    elif deterministic:
        benchmark = False
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs to give the same bits every time


def announce(config: TrainerConfig) -> None:
    """Say what is unusual about the coming runs."""
    if config.barebones:
        rank_zero_info(
            "Trainer(barebones=True): no checkpoints, progress bar, model summary, logging (self.log does nothing), or "
            "sanity check, so that nothing but the step takes time."
        )
    if config.fast_dev_run:
        rank_zero_info(
            "Trainer(fast_dev_run=%r): every loop runs %d batch(es); nothing is logged, and no checkpoint is written.",
            config.fast_dev_run,
            int(config.fast_dev_run),
        )
    if config.detect_anomaly:
        rank_zero_info("Trainer(detect_anomaly=True): autograd checks every operation; steps are much slower.")
    if config.device.type == "cpu" and CUDAAccelerator.is_available():
        warnings.warn(
            "There is a GPU, and Trainer(accelerator='cpu') does not use it; use accelerator='gpu' or 'auto'.",
            category=PossibleUserWarning,
            stacklevel=4,
        )

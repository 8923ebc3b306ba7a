"""Uploads the core's table and launches the kernels on it: what `lit_fast/ops.py` calls.

Nothing here waits for the device. The table goes there from pinned memory by one copy on torch's current stream; torch
hands out neither end of that copy again before the stream has passed it.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lit_fast.triton.norm import square_kernel
from lit_fast.triton.scale import scale_kernel
from lit_fast.triton.step import prepare_kernel, step_kernel

# Elements that one program takes: thousands of programs in a model, and a lookup of the row that costs nothing beside
# them. A multiple of the block (table.py).
CHUNK = 1 << 15

# A product that a compiler fuses on its own would change bits.
COMPILER_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


@dataclass(frozen=True)
class Work:
    """One step's or one norm's work, to be called by the core with its table (csrc/stepper.h).

    Attributes:
        device: of every tensor.
        grad_scale: what every gradient is multiplied by first; a 0-dim tensor where only the device knows it.
        max_norm: of the scaled gradients; negative for none.
        clip_value: negative for none.
        norm: 0-dim float32 on the device, to be written; None where no norm is wanted.
        skipping: what `Stepper.skipping` takes. A step that is left out is counted and writes the norm alone,
            which must be wanted; None: it is taken.
        formula: a file of this folder that has one; None: gradients alone.
        rewrite: without a formula, whether gradients are scaled and clipped in place.
        chunk: what the table's chunks were counted with.
    """

    device: torch.device
    grad_scale: float | Tensor
    max_norm: float
    clip_value: float
    norm: Tensor | None
    formula: ModuleType | None = None
    rewrite: bool = False
    skipping: tuple[Tensor, bool, bool] | None = None
    chunk: int = CHUNK

    def __call__(
        self, words: bytearray, row_words: int, option_words: int, rows: int, chunks: int, aligned: bool
    ) -> None:
        clipping_at = len(words) // 8
        factor = self.grad_scale
        words += struct.pack("3d", 1.0 if isinstance(factor, Tensor) else factor, self.max_norm, self.clip_value)
        host = torch.frombuffer(words, dtype=torch.int64)
        table = host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)
        if isinstance(factor, Tensor):
            table[clipping_at : clipping_at + 1] = factor.to(self.device, torch.float64).reshape(1).view(torch.int64)
        scale = torch.empty(3, dtype=torch.float32, device=self.device)
        formula, norm = self.formula, self.norm
        skipped, for_good, told = self.skipping or (None, False, False)
        # The norm of nothing is 0 times the factor, which then tells all that there is to know.
        summed = 0 if norm is None or (told and self.max_norm < 0.0) else chunks
        partial = torch.empty(summed, dtype=torch.float64, device=self.device)
        numbers = 0 if formula is None else formula.COEFFICIENTS
        coefficients = torch.empty(numbers * rows, dtype=torch.float32, device=self.device)
        shape = {"CHUNK": self.chunk, "ROW_WORDS": row_words, "ALIGNED": aligned, **COMPILER_OPTIONS}
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if summed > 0:
                square_kernel[(summed,)](table, rows, partial, **shape)
            prepare_kernel[(1,)](
                table,
                rows,
                summed,
                rows * row_words,
                clipping_at,
                partial,
                scale if norm is None else norm,
                scale,
                coefficients,
                partial if skipped is None else skipped,
                ROW_WORDS=row_words,
                OPTION_WORDS=option_words,
                WITH_NORM=norm is not None,
                SKIPS=skipped is not None,
                FOR_GOOD=for_good,
                FORMULA=None if formula is None else formula.coefficients,
                COEFFICIENTS=numbers,
                **COMPILER_OPTIONS,
            )
            if chunks == 0:
                return
            if formula is not None:
                step_kernel[(chunks,)](
                    table,
                    rows,
                    scale,
                    coefficients,
                    **shape,
                    UPDATE=formula.update,
                    STATES=formula.STATES,
                    COEFFICIENTS=numbers,
                    SKIPS=skipped is not None,
                )
            elif self.rewrite:
                scale_kernel[(chunks,)](table, rows, scale, **shape)

"""GPT-2 small, 124M parameters, gradients clipped: on a CPU one sequence of 64 tokens a step, on a GPU 8 of 1,024.

lit-fast profile -m profiling.gpt2_124m --against eager --steps 12
"""

from __future__ import annotations

import torch

import lit_fast as L
from lit_fast.models.gpt import GPT
from profiling import common

if __name__ == "__main__":
    L.seed_everything(1)
    on_gpu = torch.cuda.is_available()
    size, length = (8, 1024) if on_gpu else (1, 64)
    data = common.tokens(200 * size, length, 50257)
    batches = [data[first : first + size] for first in range(0, len(data), size)]
    precision = "bf16-mixed" if on_gpu else "32-true"
    common.trainer(gradient_clip_val=1.0, precision=precision).fit(GPT(vocab_size=50257), batches)

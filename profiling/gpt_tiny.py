"""A GPT of four layers and 0.9M parameters, 8 sequences of 64 tokens a step, gradients clipped.

lit-fast profile -m profiling.gpt_tiny --against eager
"""

from __future__ import annotations

import lit_fast as L
from lit_fast.models.gpt import GPT
from profiling import common

if __name__ == "__main__":
    L.seed_everything(1)
    model = GPT(512, 64, num_layers=4, num_heads=4, embedding_dim=128, total_steps=20_000)
    data = common.tokens(1600, 64, 512)
    batches = [data[first : first + 8] for first in range(0, len(data), 8)]
    common.trainer(gradient_clip_val=1.0).fit(model, batches)

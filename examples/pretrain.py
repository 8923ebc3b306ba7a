"""Pretrain a small GPT on text from Python: what `lit-fast pretrain` does, in one screen.

python examples/pretrain.py [--steps N] [FILE_OR_FOLDER ...]     (default: Python's standard library)
"""

from __future__ import annotations

import argparse

import torch

import lit_fast as L
from lit_fast.data.tokens import prepare_tokens
from lit_fast.models import GPT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="*")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()

    L.seed_everything(1)
    data = prepare_tokens(options.data or None, vocab_size=1024)
    model = GPT(
        vocab_size=1024,
        block_size=128,
        num_layers=2,
        num_heads=4,
        embedding_dim=128,
        learning_rate=2e-3,
        warmup_steps=50,
        total_steps=options.steps,
    )
    train = data.dataloader("train", block_size=128, batch_size=4)
    val = data.dataloader("val", block_size=128, batch_size=32)

    trainer = L.Trainer(max_steps=options.steps, gradient_clip_val=1.0, limit_val_batches=10)
    trainer.fit(model, train, val)
    print(trainer.validate(model, val, verbose=False))
    print(trainer.explain())

    start = torch.tensor([[data.end_of_text]])
    print(data.tokenizer.decode(model.generate(start, 100, temperature=0.8, top_k=50)[0].tolist()))


if __name__ == "__main__":
    main()

"""A character GPT learns to add: trained on lines such as "17+25=42", asked for sums that it has never seen.

python examples/char_gpt.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lit_fast as L
from lit_fast.models import GPT

ALPHABET = "0123456789+=\n"
LIMIT = 30  # summands lie below it


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def equation(a: int, b: int) -> str:
    """Fixed width, the sum's last digit first: so each digit depends on digits already written."""
    return f"{a:02d}+{b:02d}={str(f'{a + b:02d}')[::-1]}\n"


class Adder(GPT):
    """`GPT` as it is, and the share of right sums in validation. A batch is whole lines, of shape (B, 9)."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        written = self.generate(batch[:, :6], max_new_tokens=2, temperature=0.0)
        self.log("right_sums", (written == batch[:, :8]).all(dim=1).float().mean(), prog_bar=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=60)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT)]
    random.shuffle(pairs)
    lines = torch.tensor([encode(equation(a, b)) for a, b in pairs])
    train, val = lines[:800], lines[800:]

    model = Adder(
        vocab_size=len(ALPHABET),
        block_size=lines.shape[1] - 1,
        num_layers=2,
        num_heads=4,
        embedding_dim=64,
        learning_rate=3e-3,
        warmup_steps=20,
        total_steps=options.max_epochs * 13,
    )
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        check_val_every_n_epoch=5,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(val, 100))

    prompt = torch.tensor([encode("17+25=")])
    print("17+25=" + "".join(ALPHABET[i] for i in model.generate(prompt, 2, temperature=0.0)[0, 6:].tolist())[::-1])
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())

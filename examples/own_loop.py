"""A training loop of one's own, with the compiled optimizer step: `adopt` takes any `torch.optim` object.

python examples/own_loop.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_fast.optim import adopt


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=10)
    options = parser.parse_args(argv)

    torch.manual_seed(1)
    digits = load_digits()
    pixels, digit = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(pixels[:1500], digit[:1500]), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.max_epochs)
    adopted = adopt(optimizer, max_norm=1.0)  # clips within the step: one pass over the gradients less
    print(adopted.reason)

    for epoch in range(options.max_epochs):
        for batch, target in loader:
            loss = F.cross_entropy(model(batch), target)
            loss.backward()
            norm = adopted.step()  # the L2 norm of all gradients before clipping
            adopted.zero_grad()
        schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}, gradient norm {float(norm):.3f}")

    with torch.no_grad():
        accuracy = (model(pixels[1500:]).argmax(dim=1) == digit[1500:]).float().mean()
    return {"loss": loss.item(), "accuracy": accuracy.item(), "compiled": float(adopted.compiled)}


if __name__ == "__main__":
    print(main())

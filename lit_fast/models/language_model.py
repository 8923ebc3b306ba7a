"""What every decoder-only language model here shares: loss, optimizer groups, schedule, sampling, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_fast.errors import MisconfigurationException
from lit_fast.models.flops import flops_per_token
from lit_fast.module import LightningModule


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Learning-rate factor of optimizer step `step` (from 0): linear to 1, then half a cosine to `floor`.

    Reaches 1 at the last warm-up step, `floor` at `total_steps`, and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class LanguageModel(LightningModule):
    """Next-token prediction. A subclass defines `forward(tokens)`: (B, T) int64 -> logits (B, T, vocab_size).

    A batch is (B, T + 1) int64: the first T tokens are the input, the last T the targets.

    Args:
        vocab_size, block_size: rows of the vocabulary, and longest context in tokens.
        num_layers, attention_width: blocks, and heads times head width, for the FLOPs.
        learning_rate, min_learning_rate_ratio, warmup_steps, total_steps: the schedule, see `warmup_cosine`.
        weight_decay, betas: AdamW's.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int,
        num_layers: int,
        attention_width: int,
        learning_rate: float,
        min_learning_rate_ratio: float,
        warmup_steps: int,
        total_steps: int,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.num_layers, self.attention_width = num_layers, attention_width
        self.learning_rate, self.min_learning_rate_ratio = learning_rate, min_learning_rate_ratio
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.weight_decay, self.betas = weight_decay, (betas[0], betas[1])

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token over batch (B, T + 1), a 0-dim tensor."""
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.shape[0])
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=batch.shape[0])

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with decay on matrices only (not on biases and norms), warm-up and cosine."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)

        # A plain function is left out of LambdaLR's state, so a resumed run may have a longer schedule.
        def factor(step: int) -> float:
            return warmup_cosine(step, self.warmup_steps, self.total_steps, self.min_learning_rate_ratio)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lookup_parameters(self) -> int:
        """Parameters that are only looked up, never multiplied with: not part of the FLOPs."""
        return 0

    def flops_per_token(self) -> int:
        """Model FLOPs of one token, forward and backward (see `lit_fast.models.flops`)."""
        matmul_parameters = sum(p.numel() for p in self.parameters()) - self.lookup_parameters()
        return flops_per_token(matmul_parameters, self.num_layers, self.attention_width, self.block_size)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` (B, T >= 1) int64 by sampling; returns (B, up to T + max_new_tokens).

        The context is the last `block_size` tokens. `temperature=0` takes the likeliest token. Sampling ends
        early when `stop_token` has come up in every row; a row's tokens after its `stop_token` mean nothing.

        Raises:
            MisconfigurationException: no token to start from, a negative temperature or `top_k` below 1.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise MisconfigurationException(f"tokens has shape {tuple(tokens.shape)}: (batch, at least 1) is needed.")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise MisconfigurationException(f"temperature={temperature}, top_k={top_k}: at least 0 and 1 are allowed.")
        was_training = self.training
        self.eval()
        stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.block_size :])[:, -1].float()
            if top_k is not None and top_k < logits.shape[-1]:
                kept = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < kept, -math.inf)
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], dim=1)
            if stop_token is not None:
                stopped |= chosen[:, 0] == stop_token
                if bool(stopped.all()):
                    break
        self.train(was_training)
        return tokens


def check_heads(embedding_dim: int, num_heads: int) -> int:
    """Width of one head.

    Raises:
        MisconfigurationException: `num_heads` does not divide `embedding_dim`.
    """
    if num_heads < 1 or embedding_dim % num_heads:
        raise MisconfigurationException(
            f"embedding_dim={embedding_dim} is not divisible by num_heads={num_heads}: change one of them."
        )
    return embedding_dim // num_heads


def scaled_init(module: nn.Module, num_layers: int, residual_suffixes: tuple[str, ...]) -> None:
    """GPT-2's initialization: matrices N(0, 0.02), but N(0, 0.02 / sqrt(2 L)) before the residual.

    Biases become 0; norms keep their ones. Source: Radford et al. 2019, section 2.3.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            residual = name.endswith(residual_suffixes)
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

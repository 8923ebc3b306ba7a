"""Llama: pre-norm decoder with RMSNorm, rotary positions, SwiGLU and grouped-query attention.

Shape legend: B batch, T tokens, C embedding_dim, H query heads, G key-value heads, D head width,
V vocabulary.

Sources: Touvron et al. 2023 (arXiv:2302.13971, 2307.09288); rotary positions, Su et al. 2021
(arXiv:2104.09864); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245); SwiGLU, Shazeer 2020
(arXiv:2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_fast.errors import MisconfigurationException
from lit_fast.models.language_model import LanguageModel, check_heads, scaled_init


def rotary_tables(block_size: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base^(-2i / D), both (block_size, head_dim) fp32; D/2 angles, twice."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head by its position's angles; computed in the tables' dtype."""
    first, second = x_BTHD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BTHD * cos_TD[:, None] + turned * sin_TD[:, None]).to(x_BTHD.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal attention in which H / G query heads share one key-value head, (B, T, C) -> (B, T, C)."""

    def __init__(self, embedding_dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise MisconfigurationException(
                f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}: change one of them."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = check_heads(embedding_dim, num_heads)
        self.query = nn.Linear(embedding_dim, num_heads * self.head_dim, bias=False)
        self.key_value = nn.Linear(embedding_dim, 2 * num_kv_heads * self.head_dim, bias=False)
        self.projection = nn.Linear(num_heads * self.head_dim, embedding_dim, bias=False)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BTHD = rotate(self.query(x_BTC).view(B, T, self.num_heads, self.head_dim), cos_TD, sin_TD)
        k_BTGD, v_BTGD = self.key_value(x_BTC).view(B, T, 2, self.num_kv_heads, self.head_dim).unbind(2)
        k_BTGD = rotate(k_BTGD, cos_TD, sin_TD)
        y_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTGD.transpose(1, 2),
            v_BTGD.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.projection(y_BHTD.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, embedding_dim: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(embedding_dim, eps=1e-5)
        self.attention = GroupedQueryAttention(embedding_dim, num_heads, num_kv_heads)
        self.mlp_norm = nn.RMSNorm(embedding_dim, eps=1e-5)
        self.gate = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.up = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, embedding_dim, bias=False)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), cos_TD, sin_TD)
        normed = self.mlp_norm(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(normed)) * self.up(normed))  # type: ignore[no-any-return]


class Llama(LanguageModel):
    """Llama. The defaults have 1.1 billion parameters (the blocks of Llama 3.2 1B with a smaller vocabulary).

    Args:
        vocab_size: rows of the token embedding and of the output head.
        block_size: longest context in tokens.
        num_layers, num_heads, embedding_dim: blocks, query heads a block, width of the residual stream.
        num_kv_heads: key-value heads; divides `num_heads`. None: as many (plain multi-head attention).
        hidden_dim: width of the SwiGLU. None: 8/3 of `embedding_dim`, rounded up to a multiple of 64.
        rope_base: base of the rotary angles.
        tie_embeddings: whether the output head is the token embedding.
        learning_rate: peak of the schedule; `min_learning_rate_ratio` of it is left at `total_steps`.
        warmup_steps, total_steps: optimizer steps of linear warm-up, and of the whole schedule.
        weight_decay, betas: AdamW's.

    Raises:
        MisconfigurationException: the heads do not divide the width, or the head width is odd.

    Example:
        >>> model = Llama(vocab_size=256, block_size=8, num_layers=1, num_heads=2, embedding_dim=16)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 8, 256])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocab_size: int = 32768,
        block_size: int = 2048,
        num_layers: int = 16,
        num_heads: int = 32,
        embedding_dim: int = 2048,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        rope_base: float = 500000.0,
        tie_embeddings: bool = False,
        learning_rate: float = 4e-4,
        min_learning_rate_ratio: float = 0.1,
        warmup_steps: int = 100,
        total_steps: int = 1000,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            block_size=block_size,
            num_layers=num_layers,
            attention_width=embedding_dim,
            learning_rate=learning_rate,
            min_learning_rate_ratio=min_learning_rate_ratio,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            weight_decay=weight_decay,
            betas=betas,
        )
        self.save_hyperparameters()
        head_dim = check_heads(embedding_dim, num_heads)
        if head_dim % 2:
            raise MisconfigurationException(
                f"embedding_dim={embedding_dim} over num_heads={num_heads} is an odd head width, {head_dim}: "
                "rotary positions turn pairs. Change one of them."
            )
        hidden_dim = hidden_dim or -(-8 * embedding_dim // (3 * 64)) * 64
        self.token_embedding = nn.Embedding(vocab_size, embedding_dim)
        self.blocks = nn.ModuleList(
            Block(embedding_dim, num_heads, num_kv_heads or num_heads, hidden_dim) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(embedding_dim, eps=1e-5)
        self.head = nn.Linear(embedding_dim, vocab_size, bias=False)
        self.tie_embeddings = tie_embeddings
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight
        cos, sin = rotary_tables(block_size, head_dim, rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        scaled_init(self, num_layers, ("projection.weight", "down.weight"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, T <= block_size."""
        T = tokens.shape[1]
        if self.block_size < T:
            raise MisconfigurationException(f"{T} tokens were given; block_size={self.block_size} is the most.")
        x_BTC = self.token_embedding(tokens)
        cos_TD, sin_TD = self.cos[:T], self.sin[:T]
        for block in self.blocks:
            x_BTC = block(x_BTC, cos_TD, sin_TD)
        return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]

    def lookup_parameters(self) -> int:
        return 0 if self.tie_embeddings else self.token_embedding.weight.numel()

"""GPT-2: pre-norm decoder, learned positions, GELU, output head tied to the token embedding.

Shape legend: B batch, T tokens, C embedding_dim, H heads, D head width, V vocabulary.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_fast.errors import MisconfigurationException
from lit_fast.models.language_model import LanguageModel, check_heads, scaled_init


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, check_heads(embedding_dim, num_heads)
        self.dropout = dropout
        self.query_key_value = nn.Linear(embedding_dim, 3 * embedding_dim, bias=bias)
        self.projection = nn.Linear(embedding_dim, embedding_dim, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv_BTHD = self.query_key_value(x_BTC).view(B, T, 3, self.num_heads, self.head_dim)
        q_BHTD, k_BHTD, v_BHTD = qkv_BTHD.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, dropout_p=dropout)
        return self.projection(y_BHTD.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the MLP is four times as wide."""

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embedding_dim, bias=bias)
        self.attention = CausalSelfAttention(embedding_dim, num_heads, dropout, bias)
        self.mlp_norm = nn.LayerNorm(embedding_dim, bias=bias)
        self.mlp_in = nn.Linear(embedding_dim, 4 * embedding_dim, bias=bias)
        self.mlp_out = nn.Linear(4 * embedding_dim, embedding_dim, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x_BTC)), approximate="tanh")
        return x_BTC + self.dropout(self.mlp_out(hidden))  # type: ignore[no-any-return]


class GPT(LanguageModel):
    """GPT-2. The defaults are the 124M model's.

    Args:
        vocab_size: rows of the token embedding, which is the output head too.
        block_size: longest context in tokens; positions are learned.
        num_layers, num_heads, embedding_dim: blocks, heads a block, width of the residual stream.
        dropout: probability after embedding, attention and MLP; 0 where no text is seen twice.
        bias: whether linear layers and norms have biases (GPT-2 has them).
        learning_rate: peak of the schedule; `min_learning_rate_ratio` of it is left at `total_steps`.
        warmup_steps, total_steps: optimizer steps of linear warm-up, and of the whole schedule.
        weight_decay, betas: AdamW's.

    Raises:
        MisconfigurationException: `embedding_dim` is not divisible by `num_heads`.

    Example:
        >>> model = GPT(vocab_size=256, block_size=8, num_layers=1, num_heads=2, embedding_dim=16)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 8, 256])
    """

    def __init__(
        self,
        vocab_size: int = 50304,
        block_size: int = 1024,
        num_layers: int = 12,
        num_heads: int = 12,
        embedding_dim: int = 768,
        dropout: float = 0.0,
        bias: bool = True,
        learning_rate: float = 6e-4,
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
        self.token_embedding = nn.Embedding(vocab_size, embedding_dim)
        self.position_embedding = nn.Embedding(block_size, embedding_dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(embedding_dim, num_heads, dropout, bias) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embedding_dim, bias=bias)
        self.head = nn.Linear(embedding_dim, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        scaled_init(self, num_layers, ("projection.weight", "mlp_out.weight"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, T <= block_size."""
        T = tokens.shape[1]
        if self.block_size < T:
            raise MisconfigurationException(f"{T} tokens were given; block_size={self.block_size} is the most.")
        positions = torch.arange(T, device=tokens.device)
        x_BTC = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]

    def lookup_parameters(self) -> int:
        return self.position_embedding.weight.numel()

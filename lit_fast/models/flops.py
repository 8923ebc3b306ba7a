"""Model FLOPs of a transformer, for model FLOPs utilization (MFU); peaks of devices: profiler/throughput.py."""

from __future__ import annotations


def flops_per_token(matmul_parameters: int, layers: int, attention_width: int, block_size: int) -> int:
    """Model FLOPs of one token, forward and backward: 6 N + 12 L H Q T.

    Args:
        matmul_parameters: N, parameters that a token is multiplied with (no lookup-only embedding).
        layers: L.
        attention_width: H Q, heads times head width.
        block_size: T, tokens of context. The causal mask is not counted as a saving, and nothing recomputed
            is added.

    Source: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B.

    Example:
        >>> flops_per_token(124_000_000, layers=12, attention_width=768, block_size=1024)
        857246208
    """
    return 6 * matmul_parameters + 12 * layers * attention_width * block_size

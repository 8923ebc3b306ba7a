"""Model FLOPs and device peaks, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import torch

# Dense peak of one device in TFLOP/s: (16-bit tensor cores, fp32 without TF32), from NVIDIA's data sheets.
# The first name found in the device's name counts, so a special form stands before the plain one.
PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
)


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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device` at a Trainer `precision` ("bf16-mixed", "32-true" ...); None: not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, half, single in PEAK_TFLOPS:
        if known in name:
            fp32 = precision.startswith("32") and not torch.backends.cuda.matmul.allow_tf32
            # TF32 runs at half the 16-bit rate on every device listed here.
            return 1e12 * (single if fp32 else half / 2 if precision.startswith("32") else half)
    return None

"""Quantities as people read them: three digits and a unit."""

from __future__ import annotations

import math

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15))


def seconds(value: float) -> str:
    """
    Example:
        >>> [seconds(s) for s in (93.42, 2.5, 0.0123, 4.56e-7, 0.0)]
        ['93.4 s', '2.50 s', '12.3 ms', '456 ns', '0 s']
    """
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 7200.0:
        return f"{value / 3600.0:.1f} h"
    # The largest unit in which three digits leave at least 1.
    factor, unit = next(((f, u) for f, u in _SECONDS if abs(value) >= 0.9995 * f), _SECONDS[-1])
    return f"{digits(value / factor)} {unit}" if value else "0 s"


def scale(value: float) -> tuple[float, str]:
    """Of a table's column whose largest figure is `value` s: by what to multiply, and the unit.

    Example:
        >>> scale(1.2e-3), scale(0.25), scale(90.0)
        ((1000000.0, 'us'), (1000.0, 'ms'), (1.0, 's'))
    """
    return (1.0, "s") if value >= 10.0 else (1e3, "ms") if value >= 0.00995 else (1e6, "us")


def size(value: float) -> str:
    """
    Example:
        >>> size(1536), size(43 * 2**20)
        ('1.50 KiB', '43.0 MiB')
    """
    power = min(int(math.log2(abs(value)) // 10) if abs(value) >= 1 else 0, len(_BINARY) - 1)
    return f"{value:.0f} B" if not power else f"{digits(value / 1024.0**power)} {_BINARY[power]}"


def rate(value: float, unit: str) -> str:
    """
    Example:
        >>> rate(7.2e14, "FLOP/s"), rate(806_123.0, "tokens/s"), rate(98.53, "steps/s")
        ('720 TFLOP/s', '806k tokens/s', '98.5 steps/s')
    """
    prefix, factor = next(((p, f) for p, f in reversed(_DECIMAL) if abs(value) >= 0.9995 * f), _DECIMAL[0])
    # "T" belongs to the unit of a physicist's rate, "k" to the number of things that are counted.
    return (
        f"{digits(value / factor)} {prefix}{unit}" if unit[0].isupper() else f"{digits(value / factor)}{prefix} {unit}"
    )


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    if not math.isfinite(value):
        return "-"
    size_of = abs(value)
    return f"{value:.0f}" if size_of >= 99.95 else f"{value:.1f}" if size_of >= 9.995 else f"{value:.2f}"


def quantity(value: float, unit: str) -> str:
    """
    Example:
        >>> quantity(4.6e8, "bytes"), quantity(61.0, "°C"), quantity(1905.0, "MHz")
        ('439 MiB', '61.0 °C', '1905 MHz')
    """
    return size(value) if unit == "bytes" else f"{digits(value)} {unit}"


def place(where: str | None) -> str:
    """
    Example:
        >>> place("/home/ann/project/models/gpt.py:31"), place("train.py:3")
        ('models/gpt.py:31', 'train.py:3')
    """
    return "/".join((where or "").split("/")[-2:])


def share(value: float) -> str:
    return f"{100.0 * value:.1f} %" if math.isfinite(value) else "-"


def count(number: int, thing: str) -> str:
    """
    Example:
        >>> count(1, "step"), count(12_000, "step")
        ('1 step', '12,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

"""The bigram that a language model has to beat: interpolated Kneser-Ney over the same tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


class Bigram:
    """p(w | v) = max(c(v w) - d, 0) / c(v) + d n(v) / c(v) * q(w), the strongest usual smoothing of a bigram.

    c counts in the training text; n(v) is how many different tokens follow v; q(w), the continuation
    probability, is the share of different pairs that end in w, itself discounted by d and mixed with the
    uniform distribution. The discount d = n1 / (n1 + 2 n2) comes from the pairs seen once (n1) and twice
    (n2).

    Args:
        tokens: training tokens, 1-D, unsigned integers below `vocab_size`.
        vocab_size: number of possible tokens.

    Source: Kneser and Ney 1995; Chen and Goodman 1998 (Harvard TR-10-98), section 2.7.

    Example:
        >>> bigram = Bigram(np.array([0, 1, 0, 1, 0, 2]), vocab_size=3)
        >>> round(float(bigram.probability(np.full(3, 0), np.arange(3)).sum()), 9)
        1.0
    """

    def __init__(self, tokens: Ids, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
        self.pairs, self.counts = np.unique(pairs, return_counts=True)
        first, second = self.pairs // vocab_size, self.pairs % vocab_size
        self.discount = _discount(self.counts)
        self.context_counts = np.bincount(tokens[:-1], minlength=vocab_size)
        self.followers = np.bincount(first, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        discount = _discount(predecessors[predecessors > 0])
        seen, kinds = max(1, len(self.pairs)), int((predecessors > 0).sum())
        uniform = (discount * kinds / seen if kinds else 1.0) / vocab_size
        self.continuation = np.maximum(predecessors - discount, 0.0) / seen + uniform

    def probability(self, previous: Ids, following: Ids) -> npt.NDArray[np.float64]:
        """p(following | previous), elementwise over two arrays of one shape."""
        previous, following = previous.astype(np.int64), following.astype(np.int64)
        wanted = previous * self.vocab_size + following
        place = np.minimum(np.searchsorted(self.pairs, wanted), max(0, len(self.pairs) - 1))
        count = np.where(self.pairs[place] == wanted, self.counts[place], 0) if len(self.pairs) else wanted * 0
        context = self.context_counts[previous]
        known = np.maximum(context, 1)
        direct = np.maximum(count - self.discount, 0.0) / known
        backoff = np.where(context > 0, self.discount * self.followers[previous] / known, 1.0)
        smoothed: npt.NDArray[np.float64] = direct + backoff * self.continuation[following]
        return smoothed

    def loss(self, previous: Ids, following: Ids) -> float:
        """Mean cross-entropy in nats a token."""
        return float(-np.log(self.probability(previous, following)).mean())


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float:
    """Cross-entropy of `tokens` tokens that stand for `num_bytes` bytes, in bits a byte.

    Example:
        >>> bits_per_byte(math.log(2), tokens=8, num_bytes=4)
        2.0
    """
    return nats_per_token * tokens / math.log(2) / num_bytes


def _discount(counts: npt.NDArray[np.int64]) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # Without pairs seen once there is no estimate; 0.5 is the middle of the allowed (0, 1).
    return once / (once + 2 * twice) if once else 0.5

"""The bigram baseline: a probability distribution, with the numbers that the formula gives by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.models.bigram import Bigram, bits_per_byte


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60))
def test_sums_to_one_after_every_token_seen_or_not(tokens):
    bigram = Bigram(np.array(tokens, dtype=np.uint16), vocab_size=8)
    for previous in range(8):
        probabilities = bigram.probability(np.full(8, previous), np.arange(8))
        assert (probabilities > 0).all()
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_hand_computed_probability():
    # Pairs: 0-1 twice, 1-0 once, 1-2 once, 2-0 once: n1 = 3, n2 = 1, d = 3/5.
    bigram = Bigram(np.array([0, 1, 2, 0, 1, 0]), vocab_size=3)
    assert bigram.discount == pytest.approx(3 / 5)
    # Different predecessors: of 0 two, of 1 one, of 2 one: n1 = 2, n2 = 1, d = 1/2; 4 kinds of pairs.
    uniform = 0.5 * 3 / 4 / 3
    continuation = [(2 - 0.5) / 4 + uniform, (1 - 0.5) / 4 + uniform, (1 - 0.5) / 4 + uniform]
    expected = (2 - 0.6) / 2 + 0.6 * 1 / 2 * continuation[1]
    assert bigram.probability(np.array([0]), np.array([1]))[0] == pytest.approx(expected)
    unseen = 0.6 * 2 / 2 * continuation[1]
    assert bigram.probability(np.array([1]), np.array([1]))[0] == pytest.approx(unseen)


def test_loss_is_low_on_what_repeats_and_bits_follow():
    tokens = np.tile(np.arange(16, dtype=np.uint16), 200)
    bigram = Bigram(tokens, vocab_size=16)
    assert bigram.loss(tokens[:-1], tokens[1:]) < 0.01
    assert bits_per_byte(math.log(2), tokens=8, num_bytes=4) == pytest.approx(2.0)

"""The simulated backward and the paper model: real orders and sizes, torch's own buckets, nothing too early."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from benchmarks import exposed_communication, simulated_network
from benchmarks.exposed_communication import MEBIBYTE, SCALE, Contender, Gradient, Paper, TimedBackward
from benchmarks.simulated_network import INSTANT, NETWORKS, Network
from lit_fast.distributed.tuning import sent_times


@pytest.mark.parametrize(
    ("model", "parameters", "first", "last"),
    [
        ("GPT-2 124M", 124_475_904, "norm.weight", "token_embedding.weight"),
        ("Llama 1B", 943_785_984, "head.weight", "token_embedding.weight"),
    ],
)
def test_gradients_arrive_as_in_the_model(model: str, parameters: int, first: str, last: str) -> None:
    found = exposed_communication.gradients(model)
    names = [gradient.name for gradient in found]
    assert sum(gradient.numel for gradient in found) == parameters and len(set(names)) == len(names)
    assert names[0] == first and last in names[-2:]
    assert names.index("blocks.1.mlp_norm.weight") < names.index("blocks.0.mlp_norm.weight")
    assert all(0 <= a.arrival <= b.arrival for a, b in pairwise(found))
    # Two of three products of a training step, at 6 FLOPs a weight and token: about the whole model, once.
    whole = 4 * parameters * exposed_communication.TOKENS / exposed_communication.TFLOPS
    assert 0.9 * whole < found[-1].arrival < whole


def test_torch_fills_its_buckets_as_on_paper() -> None:
    found = exposed_communication.gradients("GPT-2 124M")
    sizes = [4.0 * (gradient.numel // SCALE) for gradient in found]
    at_once = [gradient._replace(arrival=0.0) for gradient in found]
    for first, cap in ((1, 25), (50, 50)):
        ends = exposed_communication.torch_buckets(sizes, first * MEBIBYTE / SCALE, cap * MEBIBYTE / SCALE)
        with simulated_network.joined(2, INSTANT) as group:
            timed = TimedBackward(at_once)
            one = Contender(timed, exposed_communication.torch_step(timed, first=first, cap=cap)).warm_up(2)
            group.transfers.clear()
            one.exposed()
            sent = [transfer.nbytes for transfer in group.transfers]
        assert sent == [sum(sizes[begin:end]) for begin, end in pairwise([0, *ends])]


def test_nothing_is_sent_before_it_has_arrived() -> None:
    network = Network("slow", bandwidth=1e8, base=1e-3, step=0.0, tree_step=1.0)
    found = [Gradient(f"p{index}", 100_000 * SCALE, 5e-3 * (index + 1)) for index in range(4)]
    with simulated_network.joined(2, network) as group:  # each gradient takes 5 ms: 400 kB, and 1 ms for a collective
        timed = TimedBackward(found)
        one = Contender(timed, exposed_communication.torch_step(timed, first=0.1, cap=100 * SCALE)).warm_up(2)
        group.transfers.clear()
        began = time.perf_counter()
        one.exposed()
    assert timed.last - began >= 20e-3
    assert [transfer.nbytes for transfer in group.transfers] == [400_000, 1_200_000]
    arrivals, sizes = [gradient.arrival for gradient in found], [4e5] * 4
    seconds = lambda nbytes: 1e-3 + nbytes / 1e8  # noqa: E731
    on_paper = sent_times(arrivals, sizes, [1, 4], seconds)[-1] - arrivals[-1]
    assert on_paper == pytest.approx(13e-3)
    assert group.transfers[-1].end - began >= arrivals[-1] + on_paper


def test_on_paper_ours_is_never_later() -> None:
    for model, network, ranks in (
        ("GPT-2 124M", "NVLink", 8),
        ("GPT-2 124M", "InfiniBand NDR", 16),
        ("Llama 1B", "InfiniBand NDR", 64),
        ("Llama 1B", "10 GbE", 1024),
    ):
        paper = Paper.of(model, NETWORKS[network], ranks)
        assert 0 < paper.ours <= paper.best <= paper.default


def test_the_mean_is_looked_at() -> None:
    timed = TimedBackward([Gradient("p", 4 * SCALE, 0.0)])

    def step() -> None:
        timed.model(timed.x).backward()
        timed.model.weights[0].grad = torch.full((4,), 2.0)

    with pytest.raises(AssertionError, match="mean of equal gradients"):
        Contender(timed, step).warm_up(1)

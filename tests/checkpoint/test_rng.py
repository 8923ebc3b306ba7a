"""Random state: what is drawn after a restore is what was drawn after the capture, through a file too."""

from __future__ import annotations

import pathlib
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lit_fast.checkpoint import io, rng
from lit_fast.errors import CheckpointError


def _draw() -> list[object]:
    """Gaussians too: Python's and numpy's keep every second one for the next call."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(40),
        np.random.random(3).tolist(),
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(10).tolist(),
    ]


def test_draws_repeat_through_a_checkpoint_file(tmp_path: pathlib.Path) -> None:
    random.seed(3)
    np.random.seed(4)
    _draw()  # an odd number of gaussians, so that one is pending
    io.save({"rng": rng.capture()}, tmp_path / "a.ckpt")
    expected = [_draw(), _draw()]
    rng.restore(io.load(tmp_path / "a.ckpt", weights_only=True)["rng"])
    assert [_draw(), _draw()] == expected


def test_capture_changes_nothing_and_shares_nothing() -> None:
    before = rng.capture()
    assert rng.equal(before, rng.capture())
    _draw()
    assert not rng.equal(before, rng.capture()), "a capture must be a copy"


def test_kinds_that_are_missing_are_left_alone() -> None:
    state = rng.capture()
    expected = torch.rand(2)
    random.seed(9)
    python = random.getstate()
    rng.restore({"torch": state["torch"]})
    assert torch.equal(torch.rand(2), expected) and random.getstate() == python
    rng.restore({})
    assert random.getstate() == python


def test_cuda_states_without_devices_are_said() -> None:
    missing = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    with pytest.warns(UserWarning, match=r"random states of \d+ CUDA device"):
        rng._restore_cuda([*(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []), *missing[-1:]])


@pytest.mark.parametrize("state", [{"python": {"version": 3}}, {"torch": torch.zeros(4)}, {"numpy": {"a": 1}}])
def test_a_state_that_is_none_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="random state"):
        rng.restore(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(1),
        lambda: random.Random(1),
        lambda: np.random.default_rng(1),
        lambda: np.random.Generator(np.random.Philox(1)),
        lambda: np.random.Generator(np.random.SFC64(1)),
        lambda: np.random.Generator(np.random.MT19937(1)),
        lambda: np.random.RandomState(1),
    ],
)
def test_generators_of_a_users_own(make: object, tmp_path: pathlib.Path) -> None:
    def draw(generator: object) -> object:
        if isinstance(generator, torch.Generator):
            return torch.rand(3, generator=generator).tolist()
        if isinstance(generator, random.Random):
            return [generator.gauss(0, 1) for _ in range(3)]
        return [generator.normal(size=3).tolist(), generator.permutation(9).tolist()]  # type: ignore[attr-defined]

    generator = make()  # type: ignore[operator]
    assert rng.is_generator(generator)
    draw(generator)
    io.save({"g": rng.capture_generator(generator)}, tmp_path / "g.ckpt")
    expected = draw(generator)
    other = make()  # type: ignore[operator]
    rng.restore_generator(other, io.load(tmp_path / "g.ckpt")["g"])
    assert draw(other) == expected


def test_what_is_no_generator() -> None:
    assert not any(map(rng.is_generator, (random, torch, np.random, 3, None, random.SystemRandom())))
    with pytest.raises(CheckpointError, match="does not fit a Generator"):
        rng.restore_generator(torch.Generator(), rng.capture_generator(random.Random(0)))


def test_numpy_is_neither_imported_by_a_capture_nor_forgotten_by_a_restore() -> None:
    script = """
        import sys
        sys.modules.pop("numpy", None)
        from lit_fast.checkpoint import rng
        loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "numpy"}
        assert "numpy" not in rng.capture() and "numpy" not in sys.modules
        sys.modules.update(loaded)
        import numpy
        numpy.random.seed(1)
        state = rng.capture()
        expected = numpy.random.random()
        rng.restore(state)
        assert numpy.random.random() == expected
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_every_cuda_device() -> None:
    torch.cuda.init()
    state = rng.capture()
    assert len(state["cuda"]) == torch.cuda.device_count()
    expected = torch.rand(4, device="cuda")
    rng.restore(state)
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert "cuda" not in rng.capture(cuda=False)

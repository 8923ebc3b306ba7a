"""CombinedLoader: modes, limits, lengths; and a resumed fit over several loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, rows, shuffled, trainer
from torch.utils.data import DataLoader

from lit_fast.checkpoint import rng
from lit_fast.data import DataPosition
from lit_fast.data.combined import MODES, CombinedLoader, is_collection
from lit_fast.errors import DataError, MisconfigurationException


def read(loaders: CombinedLoader) -> list[Any]:
    return [batch for batch, _, _ in loaders]


A, B = range(3), range(10, 12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[0, 10], [1, 11]]),
        ("max_size", [[0, 10], [1, 11], [2, None]]),
        ("max_size_cycle", [[0, 10], [1, 11], [2, 10]]),
        ("sequential", [0, 1, 2, 10, 11]),
    ],
)
def test_modes(mode: str, expected: list[Any]) -> None:
    loaders = CombinedLoader([A, B], mode)
    with pytest.raises(RuntimeError, match="known after iter"):
        len(loaders)
    for _ in range(2):
        assert read(loaders) == expected
    assert len(loaders) == len(expected)
    indices = [(batch_idx, dataloader_idx) for _, batch_idx, dataloader_idx in loaders]
    ahead = [(i, 0) for i in range(3)]
    assert indices == ([*ahead, (0, 1), (1, 1)] if mode == "sequential" else ahead[: len(expected)])


def test_structures_and_properties() -> None:
    first, second = DataLoader(rows(4), batch_size=2), [torch.zeros(1), torch.ones(1)]
    loaders = CombinedLoader({"a": (first, second), "b": A}, "min_size")
    assert loaders.flattened == [first, second, A] and loaders.iterables["b"] is A
    assert loaders.sampler == {"a": (first.sampler, None), "b": None}
    assert loaders.batch_sampler["a"][0] is first.batch_sampler
    assert set(read(loaders)[0]) == {"a", "b"}
    loaders.flattened = [B, B, B]
    assert loaders.iterables == {"a": (B, B), "b": B} and read(loaders)[1] == {"a": (11, 11), "b": 11}
    with pytest.raises(ValueError, match="2 loaders were given for a CombinedLoader of 3"):
        loaders.flattened = [A, B]
    with pytest.raises(ValueError, match="1 limits"):
        loaders.limits = [1]
    with pytest.raises(ValueError, match=r"mode='longest'.*'max_size_cycle'"):
        CombinedLoader([A], "longest")
    assert read(CombinedLoader(A)) == [0, 1, 2]
    assert all(read(CombinedLoader([], mode)) == [] for mode in MODES)


@pytest.mark.parametrize(
    ("mode", "limits", "length"),
    [("min_size", [1, 9], 1), ("max_size", [2, 9], 2), ("max_size_cycle", 2, 2), ("sequential", [2, 1], 3)],
)
def test_limits(mode: str, limits: Any, length: int) -> None:
    loaders = CombinedLoader([A, B], mode)
    loaders.limits = limits
    assert len(iter(loaders)) == length  # type: ignore[arg-type]
    if mode == "sequential":
        assert read(loaders) == [0, 1, 10]


def test_no_length() -> None:
    loaders = CombinedLoader([A, NoLength([1])], "max_size")
    assert loaders.length is None
    with pytest.raises(TypeError, match="no length"):
        len(iter(loaders))  # type: ignore[arg-type]
    assert CombinedLoader([A, NoLength([1])], "min_size").length == 3


def test_workers_stop_with_reset() -> None:
    loader = DataLoader(rows(4), batch_size=2, num_workers=1, persistent_workers=True)
    loaders = CombinedLoader([loader, A], "min_size")
    next(iter(loaders))
    workers = loader._iterator._workers  # type: ignore[union-attr]
    loaders.reset()
    assert loader._iterator is None and not any(worker.is_alive() for worker in workers)


def test_what_a_collection_is() -> None:
    loader = DataLoader(rows(2))
    assert all(map(is_collection, ([loader], (loader, loader), {"a": loader}, {"a": [loader]}, [A, B])))
    tensors = batches(2)
    assert not any(map(is_collection, (loader, tensors, [tensors], [(tensors[0], 1)], [{"x": tensors[0]}], A, [])))


def test_training_on_a_sequence_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="can only be evaluated on"):
        trainer(max_epochs=1).fit(Plain(), CombinedLoader([A], "sequential"))


# -- resuming


class Notes(Plain):
    """Remembers what it was given: two numbers of each loader's batch, and a random one."""

    def __init__(self, save_at: tuple[int, int] | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.save_at, self.path = save_at, path

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = [part for part in batch.values() if part is not None]
        self.seen.append([None if part is None else part[0].flatten()[:2].tolist() for part in batch.values()])
        self.seen[-1].append(torch.rand(()).item())
        return sum(self.loss(part) for part in parts)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == self.save_at:
            self.trainer.save_checkpoint(self.path)  # type: ignore[arg-type]


def data(mode: str, workers: int) -> CombinedLoader:
    loaders = {
        "a": shuffled(14, 2, num_workers=workers),
        "b": shuffled(6, 2),
        "c": DataLoader(rows(4), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)),
    }
    return CombinedLoader(loaders, mode)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("save_at", [(0, 0), (1, 1), (1, 4), (0, 6)])
def test_a_resumed_fit_sees_the_same_batches(mode: str, save_at: tuple[int, int], tmp_path: Path) -> None:
    length = 2 if mode == "min_size" else 7
    epoch, batch_idx = save_at
    batch_idx = min(batch_idx, length - 1)
    torch.manual_seed(1)
    whole = Notes((epoch, batch_idx), tmp_path / "a.ckpt")
    trainer(max_epochs=3).fit(whole, data(mode, workers=0))
    torch.manual_seed(2)
    resumed = Notes()
    trainer(max_epochs=3).fit(resumed, data(mode, workers=0), ckpt_path=tmp_path / "a.ckpt")
    assert len(whole.seen) == 3 * length
    assert resumed.seen == whole.seen[epoch * length + batch_idx + 1 :]


def test_resuming_with_workers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Notes((0, 3), tmp_path / "a.ckpt")
    trainer(max_epochs=1).fit(whole, data("max_size_cycle", workers=2))
    resumed = Notes()
    trainer(max_epochs=1).fit(resumed, data("max_size_cycle", workers=2), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == whole.seen[4:]


def test_a_position_behind_what_was_fetched() -> None:
    """A consumer that looks one batch ahead, as training does where the length is unknown."""
    for consumed in range(1, 7):
        torch.manual_seed(5)
        position = DataPosition(data("max_size_cycle", 0))
        iterator = iter(position)
        fetched = [next(iterator) for _ in range(consumed + 1)]
        state, process = position.state_dict(consumed), rng.capture()
        expected = [fetched[-1], *iterator]
        resumed = DataPosition(data("max_size_cycle", 0))
        resumed.load_state_dict(state)
        rng.restore(process)
        again = next(batches := iter(resumed))
        assert str(again) == str(expected[0])
        assert len([again, *batches]) == len(expected)


def test_other_loaders_than_before() -> None:
    position = DataPosition(CombinedLoader([A, B], "max_size"))
    next(iter(position))
    with pytest.raises(DataError, match="the mode was 'max_size' and is 'min_size'"):
        DataPosition(CombinedLoader([A, B], "min_size")).load_state_dict(position.state_dict())
    with pytest.raises(DataError, match="the number of loaders was 2 and is 1"):
        DataPosition(CombinedLoader([A], "max_size")).load_state_dict(position.state_dict())
    assert "replay" in position.explain()

"""Data in fits of several processes: a ledger of sample ids over a save at 4 and resumes at 2 and 3; uneven ends."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import lit_fast

pytestmark = pytest.mark.dist
SAMPLES = 120


class Ledger(lit_fast.LightningModule):
    """Notes the ids of the samples that it trains on, by epoch; saves in the middle of the second one."""

    def __init__(self, save: str | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save = save
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = batch[0] if isinstance(batch, list) else batch
        self.seen.append((self.current_epoch, ids.flatten().long().tolist()))
        return self.layer(ids.reshape(-1, 1).float()).square().mean() * 1e-6

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save is not None and (self.current_epoch, batch_idx) == (1, 3):
            self.trainer.save_checkpoint(self.save)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loader(kind: str, batch_size: int = 3) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(SAMPLES))
    if kind == "subset":
        return DataLoader(data, batch_size, sampler=SubsetRandomSampler(range(SAMPLES)))
    workers: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"} if kind == "workers" else {}
    return DataLoader(data, batch_size, shuffle=True, **workers)


def fit(world: int, kind: str, epochs: int, save: str | None, resume: str | None) -> list[tuple[int, list[int]]]:
    torch.manual_seed(3)
    model = Ledger(save)
    trainer = made(world, epochs)
    trainer.fit(model, loader(kind), ckpt_path=resume)
    return model.seen


def made(world: int, epochs: int, **options: Any) -> lit_fast.Trainer:
    return lit_fast.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def ids_of(epoch: int, processes: list[Any], steps: int | None = None) -> list[int]:
    """Samples of an epoch, of its first steps only or of all."""
    kept = [[ids for number, ids in seen if number == epoch][:steps] for seen in processes]
    return [i for seen in kept for ids in seen for i in ids]


ledgers = pytest.mark.parametrize(
    "kind", ["shuffled", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("subset", "workers"))]
)


@ledgers
def test_saved_by_four_processes_and_resumed_by_two_and_three(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "four.ckpt")
    four = run_ranks(fit, 4, 4, kind, 2, path, None)
    assert sorted(ids_of(0, four)) == sorted(ids_of(1, four)) == list(range(SAMPLES))
    before = ids_of(1, four, 4)
    assert len(before) == 48
    for world in (2, 3):
        resumed = run_ranks(fit, world, world, kind, 3, None, path)
        assert sorted(before + ids_of(1, resumed)) == list(range(SAMPLES)), "each once, none missing"
        assert sorted(ids_of(2, resumed)) == list(range(SAMPLES))
        assert len({len(seen) for seen in resumed}) == 1


def fit_twice(kind: str, save: str, resume: str) -> Any:
    return fit(2, kind, 2, save, None), fit(2, kind, 2, None, resume)


@ledgers
def test_saved_by_one_process_and_resumed_by_two_and_back(kind: str, tmp_path: Path) -> None:
    one_path, two_path = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    one = fit(1, kind, 2, one_path, None)
    saved, resumed = zip(*run_ranks(fit_twice, 2, kind, two_path, one_path), strict=True)
    assert sorted(ids_of(1, [one], 4) + ids_of(1, resumed)) == list(range(SAMPLES))
    back = fit(1, kind, 2, None, two_path)
    assert sorted(ids_of(1, saved, 4) + ids_of(1, [back])) == list(range(SAMPLES))


class Uneven(IterableDataset[int]):
    """Process r has 8 + 2 r batches of one sample, and does not say so."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank = torch.distributed.get_rank()
        return iter(torch.arange(8 + 2 * rank, dtype=torch.float32) + 100 * rank)


def fit_uneven() -> list[tuple[list[Any], list[str]]]:
    rank = int(os.environ["RANK"])
    results = []
    for data in ([torch.tensor([float(i + 100 * rank)]) for i in range(8 + 2 * rank)], DataLoader(Uneven())):
        model = Ledger()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made(3, 2).fit(model, data)
        results.append((model.seen, [str(warning.message) for warning in said]))
    return results


def test_uneven_ends() -> None:
    for rank, (lists, streams) in enumerate(run_ranks(fit_uneven, 3)):
        expected = [(epoch, [i + 100 * rank]) for epoch, i in itertools.product(range(2), range(8))]
        assert lists[0] == streams[0] == expected, "both epochs end after the shortest"
        assert any("8 in process 0, 10 in process 1, 12 in process 2" in text for text in lists[1])
        told = "ends here after 8 batches, because process 0 has no more"
        assert any(told in text for text in streams[1]) is (rank > 0)

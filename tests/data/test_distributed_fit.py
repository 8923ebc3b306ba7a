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
from lit_fast.data.distributed import for_rank

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_fast"]["data"] = self.trainer.strategy.gather_objects(checkpoint["lit_fast"]["data"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        strategy = self.trainer.strategy
        checkpoint["lit_fast"]["data"] = for_rank(
            checkpoint["lit_fast"]["data"], strategy.global_rank, strategy.world_size
        )

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


@pytest.mark.parametrize("kind", ["shuffled", "subset", pytest.param("workers", marks=pytest.mark.slow)])
def test_saved_by_four_processes_and_resumed_by_two_and_three(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "four.ckpt")
    four = run_ranks(fit, 4, 4, kind, 2, path, None)
    assert sorted(ids_of(0, four)) == sorted(ids_of(1, four)) == list(range(SAMPLES))
    before = ids_of(1, four, 4)
    assert len(before) == 48
    for world in (2, 3) if kind == "shuffled" else (3,):
        resumed = run_ranks(fit, world, world, kind, 3, None, path)
        assert sorted(before + ids_of(1, resumed)) == list(range(SAMPLES)), "each once, none missing"
        assert sorted(ids_of(2, resumed)) == list(range(SAMPLES))
        assert len({len(seen) for seen in resumed}) == 1
    if kind == "shuffled":
        again = run_ranks(fit, 4, 4, kind, 2, None, path)
        assert [seen for seen in again] == [seen[10 + 4 :] for seen in four], "as many processes: the very batches"


def test_saved_by_one_process_and_resumed_by_two_and_back(tmp_path: Path) -> None:
    one_path, two_path = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    (one,) = run_ranks(fit, 1, 1, "shuffled", 2, one_path, None)
    two = run_ranks(fit, 2, 2, "shuffled", 2, two_path, None)
    assert sorted(ids_of(1, [one], 4) + ids_of(1, run_ranks(fit, 2, 2, "shuffled", 2, None, one_path))) == list(
        range(SAMPLES)
    )
    assert sorted(ids_of(1, two, 4) + ids_of(1, run_ranks(fit, 1, 1, "shuffled", 2, None, two_path))) == list(
        range(SAMPLES)
    )


class Uneven(IterableDataset[int]):
    """Process r has 8 + 2 r batches of one sample, and does not say so."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank = torch.distributed.get_rank()
        return iter(torch.arange(8 + 2 * rank, dtype=torch.float32) + 100 * rank)


def fit_uneven(kind: str) -> tuple[list[Any], list[str]]:
    rank = int(os.environ["RANK"])
    data: Any = DataLoader(Uneven(), batch_size=1)
    if kind == "lists":
        data = [torch.tensor([float(i + 100 * rank)]) for i in range(8 + 2 * rank)]
    model = Ledger()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made(3, 2).fit(model, data)
    return model.seen, [str(warning.message) for warning in said]


@pytest.mark.parametrize("kind", ["lists", "streams"])
def test_uneven_ends(kind: str) -> None:
    results = run_ranks(fit_uneven, 3, kind)
    for rank, (seen, said) in enumerate(results):
        expected = [(epoch, [i + 100 * rank]) for epoch, i in itertools.product(range(2), range(8))]
        assert seen == expected, "both epochs end after the shortest"
        if kind == "lists":
            assert any("8 in process 0, 10 in process 1, 12 in process 2" in text for text in said)
        else:
            assert any("ends here after 8 batches, because process 0 has no more" in t for t in said) is (rank > 0)

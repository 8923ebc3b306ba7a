"""`LightningDataModule` without a Trainer: its loaders, hooks, hyperparameters and state."""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lit_fast.checkpoint import io
from lit_fast.data.datamodule import LightningDataModule
from lit_fast.errors import CheckpointError, MisconfigurationException


class _Six(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return index


class _Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class _Sized(LightningDataModule):
    def __init__(self, batch_size: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def test_from_datasets_makes_loaders() -> None:
    module = LightningDataModule.from_datasets(
        _Six(), val_dataset=[_Six(), _Six()], test_dataset={"a": _Six()}, batch_size=4
    )
    train = module.train_dataloader()
    assert isinstance(train, DataLoader) and isinstance(train.sampler, RandomSampler) and train.batch_size == 4
    first, second = module.val_dataloader()
    assert isinstance(first.sampler, SequentialSampler) and [b.tolist() for b in second] == [
        [0, 1, 2, 3],
        [4, 5],
    ]
    assert list(module.test_dataloader()) == ["a"]
    with pytest.raises(MisconfigurationException, match="no predict_dataloader"):
        module.predict_dataloader()
    assert len(list(pickle.loads(pickle.dumps(module)).train_dataloader())) == 2


def test_from_datasets_does_not_shuffle_what_has_no_order() -> None:
    module = LightningDataModule.from_datasets(_Endless(), batch_size=4)
    assert [batch.tolist() for batch in module.train_dataloader()] == [[0, 1, 2, 3], [4, 5]]


def test_from_datasets_passes_what_init_takes() -> None:
    module = _Sized.from_datasets(_Six(), batch_size=4, num_workers=0, scale=2.0)
    assert module.hparams == {"batch_size": 4, "scale": 2.0}
    with pytest.raises(MisconfigurationException, match="val_dataset is a int"):
        LightningDataModule.from_datasets(val_dataset=3)


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_a_loader_that_is_not_defined_is_named(stage: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"_Sized has no {stage}_dataloader"):
        getattr(_Sized(), f"{stage}_dataloader")()


def test_hooks_do_nothing_by_default() -> None:
    module = LightningDataModule("any", argument=1)
    batch = {"x": torch.ones(2)}
    assert module.on_before_batch_transfer(batch, 0) is batch and module.on_after_batch_transfer(batch, 0) is batch
    assert module.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    assert module.transfer_batch_to_device(batch, torch.device("meta"), 0)["x"].is_meta
    (
        module.prepare_data(),
        module.setup("fit"),
        module.teardown("fit"),
        module.on_exception(KeyboardInterrupt()),
    )
    module.load_state_dict({})
    assert module.state_dict() == {} and module.name is None and module.trainer is None
    assert module.prepare_data_per_node and not module.allow_zero_length_dataloader_with_multiple_devices


def test_load_from_checkpoint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    module = _Sized(7)
    module.position = 12
    io.save({"datamodule_hyper_parameters": dict(module.hparams), _Sized.__qualname__: module.state_dict()}, path)
    loaded = _Sized.load_from_checkpoint(path, scale=3.0)
    assert loaded.hparams == {"batch_size": 7, "scale": 3.0} and loaded.position == 12
    with pytest.raises(MisconfigurationException, match="hparams_file"):
        _Sized.load_from_checkpoint(path, hparams_file="x.yaml")

    class Needy(LightningDataModule):
        def __init__(self, root: str) -> None:
            super().__init__()

    with pytest.raises(CheckpointError, match="Needy cannot be built"):
        Needy.load_from_checkpoint(path)
    assert Needy.load_from_checkpoint(path, root="/")


def test_it_is_printed_with_the_sizes_of_its_loaders() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1

    class Module(LightningDataModule):
        def setup(self, stage: str) -> None:
            self.data = torch.zeros(3)

        def train_dataloader(self) -> Any:
            return DataLoader(self.data)  # type: ignore[arg-type]

        def val_dataloader(self) -> Any:
            return [DataLoader(torch.zeros(4)), DataLoader(Endless())]  # type: ignore[arg-type]

    module = Module()
    lines = ["{Validation dataloader: 1. size=4 ; 2. NA}", "{Test dataloader: None}", "{Predict dataloader: None}"]
    assert str(module).splitlines() == ["{Train dataloader: None}", *lines]
    module.setup("fit")
    assert str(module).splitlines() == ["{Train dataloader: size=3}", *lines]

"""What is done to loaders before a loop reads them, and what is said of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from heart_models import Plain, batches, rows, shuffled, trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lit_fast.data import loaders
from lit_fast.errors import DataError, MisconfigurationException, PossibleUserWarning


class Validates(Plain):
    seen: list[Any]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0][0, 0].item())


def said(loader: Any, trains: bool = True, reloaded: bool = False) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaders.warn_of(loader, "data", trains, reloaded)
    return [f"{w.category.__name__}: {w.message}" for w in caught]


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "usable_processors", lambda: 8)


def test_few_workers(many_processors: None) -> None:
    (message,) = said(DataLoader(rows(4)))
    assert message.startswith("PossibleUserWarning: The data has 0 workers") and "num_workers=7" in message
    assert said(DataLoader(rows(4), num_workers=2)) == [] and said(batches(1)) == []


def test_few_processors_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "usable_processors", lambda: 2)
    assert said(DataLoader(rows(4))) == []


def test_spawned_workers_and_pinned_memory(many_processors: None) -> None:
    (message,) = said(DataLoader(rows(4), num_workers=2, multiprocessing_context="spawn"))
    assert "persistent_workers=True" in message
    pinned = DataLoader(rows(4), num_workers=2, persistent_workers=True, pin_memory=True)
    assert said(pinned) == [] and "pin_memory=False" in said(pinned, reloaded=True)[0]


def test_shuffled_evaluation_data() -> None:
    assert any("is shuffled" in text for text in said(shuffled(4), trains=False))
    assert not any("is shuffled" in text for text in said(shuffled(4)) + said(DataLoader(rows(4)), trains=False))
    with pytest.warns(PossibleUserWarning, match="The validation data is shuffled"):
        model = Validates()
        model.seen = []
        trainer().validate(model, shuffled(4), verbose=False)


class Sized(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


def test_lengths() -> None:
    assert any("is empty" in text for text in said(DataLoader(rows(1), batch_size=2, drop_last=True)))
    assert any("IterableDataset with a length" in text for text in said(DataLoader(Sized())))


def test_nothing_to_iterate() -> None:
    with pytest.raises(DataError, match="training data is int"):
        trainer(max_epochs=1).fit(Plain(), [shuffled(4), 3])


def test_overfit_batches_read_the_same_rows_in_every_epoch() -> None:
    model = Validates()
    model.seen = []
    train, val = shuffled(16), shuffled(16, generator=None)
    with pytest.warns(UserWarning, match="overfit_batches: the training data is read in order"):
        made = trainer(max_epochs=3, overfit_batches=2, num_sanity_val_steps=0).fit_loop.trainer
        made.fit(model, train, val)
    assert made.num_training_batches == 2 and made.num_val_batches == [2] and made.overfit_batches == 2
    assert model.losses[:2] != model.losses[2:4] and len(model.seen) == 6 and model.seen[:2] == model.seen[2:4]
    assert isinstance(train.sampler, RandomSampler), "the user's loader is as it was"
    assert isinstance(made.train_dataloader.sampler, SequentialSampler)


def test_in_order() -> None:
    own = BatchSampler(RandomSampler(rows(4)), 2, False)
    loader = loaders.in_order(DataLoader(rows(4), batch_sampler=own))
    assert list(loader.batch_sampler) == [[0, 1], [2, 3]]

    class Custom(BatchSampler):
        """A batch sampler of the user's."""

    custom = Custom(RandomSampler(rows(4)), 2, False)
    assert list(loaders.in_order(DataLoader(rows(4), batch_sampler=custom)).batch_sampler) == [[0, 1], [2, 3]]
    single = loaders.in_order(DataLoader(rows(3), batch_size=None, shuffle=True))
    assert list(single.sampler) == [0, 1, 2] and len(list(single)) == 3
    stream = DataLoader(Sized())
    assert loaders.in_order(stream) is stream
    with pytest.raises(MisconfigurationException, match="no attribute `sampler`"):
        loaders.in_order(DataLoader(rows(4), batch_sampler=[[3], [1]]))


def test_reloading_is_an_attribute_too() -> None:
    class Owns(Plain):
        asked = 0

        def train_dataloader(self) -> Any:
            self.asked += 1
            return batches(1)

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[misc]

    model = Owns()
    trainer(max_epochs=4).fit(model)
    assert model.asked == 3
    with pytest.raises(MisconfigurationException, match="reload_dataloaders_every_n_epochs=-1"):
        trainer(reload_dataloaders_every_n_epochs=-1)


def test_a_step_that_fetches_its_batches_resumes_behind_what_it_fetched(tmp_path: Any) -> None:
    class Fetches(Plain):
        save = True

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            taken = [next(dataloader_iter)[0] for _ in range(2)]
            self.seen += [batch[0][0, 0].item() for batch in taken]
            return sum(self.loss(batch) for batch in taken)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.save and batch_idx == 1:
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    whole, resumed = Fetches(), Fetches()
    resumed.save = False
    trainer(max_epochs=1).fit(whole, shuffled(24))
    trainer(max_epochs=1).fit(resumed, shuffled(24), ckpt_path=tmp_path / "a.ckpt")
    assert len(whole.seen) == 6 and resumed.seen == whole.seen[2:][-len(resumed.seen) :]


class Sees(Plain):
    """Notes which rows it trains on, each marked by its first number, and saves after some batches of an epoch."""

    def __init__(self, save: Any = None) -> None:
        super().__init__()
        self.save, self.seen = save, []  # type: ignore[var-annotated]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, [round(row[0].item(), 4) for row in batch[0]]))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save is not None and (self.current_epoch, batch_idx) == (1, 2):
            self.trainer.save_checkpoint(self.save)


@pytest.mark.parametrize(
    ("options", "left", "usual"),
    [
        ({}, [7, 5], [7] * 3 + [3]),
        ({"limit_train_batches": 4}, [7], [7] * 3 + [3]),
        ({"limit_train_batches": 0.5}, [], [7, 7]),
    ],
    ids=str,
)
def test_a_fit_goes_on_with_batches_of_another_size(
    tmp_path: Any, options: dict[str, Any], left: list[int], usual: list[int]
) -> None:
    """Its epoch has other batches than its loader's length says; the next one has as many again."""
    path = tmp_path / "a.ckpt"
    first, second = Sees(path), Sees()
    trainer(max_epochs=2, **options).fit(first, shuffled(24))
    resumed = trainer(max_epochs=3, **options)
    resumed.fit(second, shuffled(24, 7), ckpt_path=path)
    assert [len(rows) for epoch, rows in second.seen if epoch == 1] == left
    assert [len(rows) for epoch, rows in second.seen if epoch == 2] == usual and resumed.current_epoch == 3
    before = [row for rows in [rows for epoch, rows in first.seen if epoch == 1][:3] for row in rows]
    after = [row for epoch, rows in second.seen if epoch == 1 for row in rows]
    assert len({*before, *after}) == len(before) + len(after) == (24 if not options else len(before) + sum(left))

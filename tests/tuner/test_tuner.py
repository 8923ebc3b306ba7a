"""The Tuner beyond what callback_programs compares with Lightning: evaluation, what is put back, memory errors."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from callback_programs import Names, dataset, make_module, make_trainer

import lit_fast
from lit_fast.callbacks import BatchSizeFinder, LearningRateFinder
from lit_fast.checkpoint import rng
from lit_fast.errors import MisconfigurationException
from lit_fast.tuner import Tuner
from lit_fast.tuner.batch_size_scaling import Search, binary_search, is_oom_error, power_search
from lit_fast.tuner.lr_finder import _LRFinder

NAMES = Names("lit_fast.pytorch")


def test_a_search_leaves_no_trace(tmp_path: Path) -> None:
    class Look(lit_fast.Callback):
        def state(self, trainer: Any, module: Any) -> tuple[Any, ...]:
            tensors = [t.clone() for t in (*module.parameters(), *module.buffers())]
            optimizers = [trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
            ours = (trainer.fit_loop, trainer.callbacks, trainer.loggers, trainer.config, trainer._metric_log)
            return (tensors, str(optimizers), rng.capture()["torch"], trainer.global_step, [*map(id, ours)],
                    "step" in vars(trainer.optimizers[0]), [m.training for m in module.modules()],
                    str(trainer.state))  # fmt: skip

    class Search(LearningRateFinder):
        def lr_find(self, trainer: Any, pl_module: Any) -> None:
            before = look.state(trainer, pl_module)
            super().lr_find(trainer, pl_module)
            after = look.state(trainer, pl_module)
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
            assert torch.equal(before[2], after[2])
            assert (before[1], before[3:]) == (after[1], after[3:])
            searched.append(len(self.optimal_lr.results["loss"]))

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch != 1:
                self.lr_find(trainer, pl_module)

    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def fit(callbacks: list[Any]) -> list[float]:
        torch.manual_seed(3)
        module = make_module(NAMES, configure_optimizers=configure_optimizers)
        make_trainer(NAMES, str(tmp_path), callbacks=callbacks, max_epochs=4).fit(module)
        return list(module.losses)

    look, searched = Look(), []
    plain = fit([])
    losses = fit([Search(num_training_steps=7, update_attr=False, early_stop_threshold=None)])
    assert searched == [7, 7, 6]  # the last epoch has no more
    trained = losses[7:13] + losses[13:19] + losses[26:32] + losses[38:44]
    assert trained == plain


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_batch_sizes_of_the_other_methods(tmp_path: Path, method: str) -> None:
    sizes: list[int] = []

    def loader(self: Any) -> Any:
        return DataLoader(dataset(50), batch_size=self.batch_size)

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        sizes.append(len(batch[0]))
        if len(batch[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    names = {"validate": ("validation_step", "val_dataloader")}.get(method, (f"{method}_step", f"{method}_dataloader"))
    module = make_module(NAMES, **{names[0]: step, names[1]: loader})
    weights = [p.clone() for p in module.parameters()]
    trainer = make_trainer(NAMES, str(tmp_path))
    assert Tuner(trainer).scale_batch_size(module, method=method, steps_per_trial=2) == 16  # type: ignore[arg-type]
    assert sizes == [2, 2, 4, 4, 8, 8, 16, 16, 32]
    assert module.batch_size == 16 and all(map(torch.equal, weights, module.parameters()))
    sizes.clear()
    trainer = make_trainer(NAMES, str(tmp_path), callbacks=[BatchSizeFinder(init_val=16, steps_per_trial=1)])
    getattr(trainer, method)(module)
    assert sizes == [16, 32, 16, 16, 16, 2]


def test_a_size_found_inside_a_run_is_used_from_that_epoch_on(tmp_path: Path) -> None:
    class Later(BatchSizeFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.sizes.clear()
                self.scale_batch_size(trainer, pl_module)
                pl_module.sizes.clear()

    module = make_module(NAMES, rows=24)
    make_trainer(NAMES, str(tmp_path), callbacks=[Later(max_val=16)], max_epochs=2).fit(module)
    assert module.sizes == [16, 8]


def test_what_counts_as_out_of_memory() -> None:
    assert is_oom_error(RuntimeError("CUDA error: out of memory"))
    assert is_oom_error(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."))
    assert is_oom_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_oom_error(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_oom_error(caught.value)
    assert not is_oom_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_oom_error(ValueError("out of memory on CUDA"))


def test_other_errors_end_the_search_and_put_everything_back(tmp_path: Path) -> None:
    module = make_module(NAMES)
    weights = [p.clone() for p in module.parameters()]

    def training_step(batch: Any, batch_idx: int) -> Any:
        if len(module.losses) == 3:
            raise RuntimeError("a bug")
        return type(module).training_step(module, batch, batch_idx)

    module.training_step = training_step
    trainer = make_trainer(NAMES, str(tmp_path))
    loop = trainer.fit_loop
    with pytest.raises(RuntimeError, match="a bug"):
        Tuner(trainer).lr_find(module)
    assert all(map(torch.equal, weights, module.parameters()))
    assert trainer.fit_loop is loop and trainer.callbacks == [] and module.lr == 0.05


def test_not_even_one_row_fits(tmp_path: Path) -> None:
    module = make_module(NAMES)

    def training_step(batch: Any, batch_idx: int) -> Any:
        raise MemoryError

    module.training_step = training_step
    with pytest.raises(MisconfigurationException, match="batch size 1"):
        Tuner(make_trainer(NAMES, str(tmp_path))).scale_batch_size(module)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 8, 63, 64, 65, 100, 1000])
def test_what_the_searches_find(limit: int) -> None:
    def found(search: Any, init: int, max_val: int = 500) -> int:
        size = [init]
        put = functools.partial(size.__setitem__, 0)
        search(Search(lambda: size[0] <= limit, lambda: size[0], put, lambda: None, max_val), 99)
        return size[0]

    for init in (1, 2, 5, 64):
        best = found(power_search, init)
        assert best <= limit or best == 500
        assert best * 2 > limit or best == 500
        assert found(binary_search, init) == min(limit, 500)


def test_suggestion_and_plot() -> None:
    finder = _LRFinder("exponential", 1e-3, 1.0, 6)
    finder.results = {"lr": [0.1, 0.2, 0.4, 0.5, 0.6, 0.8], "loss": [5.0, 4.9, float("nan"), 1.0, 1.9, 9.0]}
    assert finder.suggestion(skip_begin=1, skip_end=1) == 0.2  # the fall to 1.0 begins there
    assert finder.suggestion(skip_begin=0, skip_end=0) == 0.2
    assert finder.suggestion(skip_begin=4, skip_end=1) is None
    pytest.importorskip("matplotlib")
    figure = finder.plot()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.lines[0].get_xdata().tolist() == finder.results["lr"]
    assert finder.plot(suggest=True, ax=axes) is figure and len(axes.lines) == 2


def test_margin_and_fast_dev_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"margin=1\.0"):
        BatchSizeFinder(margin=1.0)
    tuner = Tuner(make_trainer(NAMES, str(tmp_path), fast_dev_run=True))
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert tuner.lr_find(make_module(NAMES)) is None
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert tuner.scale_batch_size(make_module(NAMES)) is None

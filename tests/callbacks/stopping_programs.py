"""Fits that EarlyStopping and Timer end, or only measure."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import torch
from callback_programs import Names, make_trainer
from fit_programs import error, program, scored

NAN, INF = float("nan"), float("inf")


# -- EarlyStopping


def _stopped(names: Names, root: str, scores: Any, where: str = "on_validation_epoch_end", **given: Any) -> Any:
    """Options of EarlyStopping, but for those of the Trainer under "trainer" and of the module under "module"."""
    trainer_options, methods = given.pop("trainer", {}), given.pop("module", {})
    module = scored(names, scores, where, **methods)
    stopping = names("callbacks", "EarlyStopping")("score", **given)
    trainer = make_trainer(names, root, callbacks=stopping, **{"max_epochs": 8, **trainer_options})
    try:
        trainer.fit(module)
    except Exception as caught:
        # lightning raises a RuntimeError
        assert isinstance(caught, RuntimeError), caught
        return "RuntimeError"
    state = stopping.state_dict()
    state["best_score"] = float(state["best_score"])
    state["stopping_reason_message"] = state["stopping_reason_message"] is not None
    return [module.batches, trainer.current_epoch, trainer.global_step, trainer.should_stop, stopping.min_delta,
            stopping._check_on_train_epoch_end, state]  # fmt: skip


FALLING = [8, 7, 6, 5, 4, 3, 2, 1]
CRITERIA: list[tuple[list[float], dict[str, Any]]] = [
    (FALLING, {}), (FALLING, {"mode": "max"}), (FALLING, {"patience": 0}), ([3, 3, 3, 3, 3, 3], {"patience": 2}),
    (FALLING, {"min_delta": 1.0, "patience": 2}), (FALLING, {"min_delta": 0.99, "patience": 2}),
    (FALLING, {"min_delta": -1.0, "mode": "max", "patience": 2}), (FALLING[::-1], {"mode": "max", "min_delta": 1.0}),
    ([2, NAN, 1], {}), ([2, INF, 1], {}), ([2, -INF, 1], {}),
    ([2, NAN, 1, INF, 1, 1], {"check_finite": False, "patience": 2}),
    ([2, -INF, 1, 1, 1], {"check_finite": False, "patience": 2}),
    (FALLING, {"stopping_threshold": 5}), (FALLING, {"stopping_threshold": 5, "mode": "max"}),
    (FALLING, {"divergence_threshold": 5}), (FALLING, {"divergence_threshold": 5, "mode": "max"}),
    (FALLING, {"divergence_threshold": 5, "stopping_threshold": 5, "mode": "max"}),
    (FALLING, {"divergence_threshold": 8}), ([1, 2, 1, 2, 0, 1, 1, 1], {"patience": 2}),
]  # fmt: skip


@program
def early_stopping_criteria(names: Names, root: str) -> Any:
    return [_stopped(names, root, scores, **options) for scores, options in CRITERIA]


@program
def early_stopping_checks_when(names: Names, root: str) -> Any:
    """Several validations an epoch, epochs without one, and either place asked for."""
    flat = [1.0] * 40
    return [
        _stopped(names, root, flat, patience=2, check_on_train_epoch_end=asked, trainer=trainer)
        for asked in (None, True, False)
        for trainer in (
            {}, {"val_check_interval": 0.5}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2},
            {"val_check_interval": 3, "check_val_every_n_epoch": None}, {"val_check_interval": 1},
            {"fast_dev_run": True}, {"max_epochs": 2, "num_sanity_val_steps": 0},
        )
    ]  # fmt: skip


@program
def early_stopping_and_the_least_of_training(names: Names, root: str) -> Any:
    flat = [1.0] * 40
    return [
        _stopped(names, root, flat, patience=1, trainer=trainer)
        for trainer in (
            {"min_epochs": 4}, {"min_steps": 11}, {"min_steps": 13, "min_epochs": 2}, {"max_steps": 5},
            {"min_steps": 11, "val_check_interval": 0.5}, {"min_epochs": 3, "val_check_interval": 0.25},
            {"min_steps": 5, "accumulate_grad_batches": 3}, {"limit_train_batches": 3, "min_steps": 10},
        )
    ]  # fmt: skip


@program
def early_stopping_on_what_training_logs(names: Names, root: str) -> Any:
    flat = [1.0] * 40
    return [
        _stopped(names, root, flat, where="on_train_epoch_end", patience=2, trainer={"limit_val_batches": 0}),
        _stopped(names, root, flat, where="on_train_epoch_end", patience=2),
        _stopped(names, root, flat, where="on_train_epoch_start", patience=2, strict=False),
        _stopped(names, root, flat, where="on_train_epoch_end", check_on_train_epoch_end=False),
        _stopped(names, root, flat, where="on_train_epoch_end", check_on_train_epoch_end=False, strict=False),
        _stopped(names, root, flat, where="on_fit_end_of_nobody"),
        _stopped(names, root, flat, where="on_fit_end_of_nobody", strict=False, verbose=True),
        _stopped(names, root, flat, where="on_fit_end_of_nobody", trainer={"fast_dev_run": True}),
    ]


@program
def several_early_stoppings(names: Names, root: str) -> Any:
    make = names("callbacks", "EarlyStopping")
    callbacks = [make("score", patience=5), make("score", mode="max", patience=2), make("val_batch", patience=9)]
    module = scored(names, FALLING)
    trainer = make_trainer(names, root, callbacks=callbacks, max_epochs=8)
    trainer.fit(module)
    trainer.save_checkpoint(f"{root}/end.ckpt")
    saved = torch.load(f"{root}/end.ckpt", weights_only=False)["callbacks"]
    return [
        trainer.current_epoch, [c.wait_count for c in callbacks], [c.stopped_epoch for c in callbacks],
        [c.stopping_reason.name for c in callbacks], {key: sorted(state) for key, state in saved.items()},
        [c is d for c, d in zip(trainer.early_stopping_callbacks, callbacks, strict=True)],
        trainer.early_stopping_callback is callbacks[0],
    ]  # fmt: skip


@program
def early_stopping_goes_on_after_a_resume(names: Names, root: str) -> Any:
    make, found, path = names("callbacks", "EarlyStopping"), [], f"{root}/two.ckpt"
    for scores, epochs, ckpt_path, patience in (([3, 2], 2, None, 4), ([2, 2, 2, 2, 2, 2], 9, path, 3)):
        stopping = make("score", patience=patience)
        trainer = make_trainer(names, root, callbacks=stopping, max_epochs=epochs)
        trainer.fit(scored(names, scores), ckpt_path=ckpt_path)
        if ckpt_path is None:
            trainer.save_checkpoint(path)
        found.append([trainer.current_epoch, stopping.wait_count, stopping.patience, stopping.stopped_epoch,
                      float(stopping.best_score), stopping.stopping_reason.name])  # fmt: skip
    trainer.should_stop = False
    trainer.validate(scored(names, [9, 9]), verbose=False)
    return [found, stopping.wait_count, trainer.should_stop]


@program
def early_stopping_tells(names: Names, root: str) -> Any:
    """How many lines `verbose` logs, and on which logger below the package's."""
    counts = []
    base = names("callbacks", "EarlyStopping").__module__
    for verbose in (False, True):
        lines: list[str] = []

        class Keep(logging.Handler):
            def emit(self, record: logging.LogRecord, lines: list[str] = lines) -> None:
                lines.append(record.getMessage())

        log, handler, before = logging.getLogger(base), Keep(), logging.root.manager.disable
        logging.disable(logging.NOTSET)
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        try:
            _stopped(names, root, [3, 2, 2, 2], patience=2, verbose=verbose, log_rank_zero_only=True)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            logging.disable(before)
        counts.append([len(lines), all("score" in line for line in lines)])
    return counts


# -- Timer


@program
def timers_stop(names: Names, root: str) -> Any:
    """How far a fit gets whose time is up at once, or never; with accumulation and the least of training."""
    timer, found = names("callbacks", "Timer"), []
    for duration in (timedelta(0), {"microseconds": 1}, "00:01:00:00"):
        for interval in ("step", "epoch"):
            for options in ({}, {"accumulate_grad_batches": 3}, {"min_epochs": 2}, {"min_steps": 3}):
                callback, module = timer(duration, interval, verbose=False), scored(names, [1.0] * 40)
                trainer = make_trainer(names, root, callbacks=callback, max_epochs=3, **options)
                trainer.fit(module)
                found.append([module.batches, trainer.global_step, trainer.current_epoch, trainer.should_stop])
    return found


@program
def timers_measure(names: Names, root: str) -> Any:
    callback = names("callbacks", "Timer")()
    stages = ("train", "sanity_check", "validate", "test", "predict")
    before = [[callback.start_time(s), callback.end_time(s), callback.time_elapsed(s)] for s in stages]

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.01)

    module = scored(names, [1.0] * 9, where="nowhere", validation_step=validation_step, test_step=validation_step)
    trainer = make_trainer(names, root, callbacks=callback, max_epochs=1)
    trainer.fit(module)
    trainer.test(module, module.val_dataloader(), verbose=False)
    state = callback.state_dict()
    again = names("callbacks", "Timer")({"seconds": 100})
    again.load_state_dict({"time_elapsed": {"train": 30.0, "validate": 20.0}})
    limits = (0.01, 0, 0.02, 0.02, 0)
    return [
        before, [[callback.start_time(s) is None, callback.end_time(s) is None] for s in stages],
        [callback.time_elapsed(s) >= limit for s, limit in zip(stages, limits, strict=True)], callback.time_remaining(),
        sorted(state), sorted(state["time_elapsed"]), callback.state_key,
        [again.time_elapsed(s) for s in stages], [again.time_remaining(s) for s in stages],
        error(lambda: callback.time_elapsed("fly")) is not None,
    ]  # fmt: skip


@program
def a_timer_that_has_run_out_before(names: Names, root: str) -> Any:
    timer, path = names("callbacks", "Timer"), f"{root}/out.ckpt"
    first = timer("00:00:00:00", verbose=False)
    trainer = make_trainer(names, root, callbacks=first, max_epochs=3)
    trainer.fit(scored(names, [1.0] * 9))
    trainer.save_checkpoint(path)
    second, module = timer({"microseconds": 1}, verbose=False), scored(names, [1.0] * 9)
    trainer = make_trainer(names, root, callbacks=second, max_epochs=3)
    trainer.fit(module, ckpt_path=path)
    return [module.batches, trainer.global_step, trainer.current_epoch, second._offset > 0]


@program
def timers_refuse(names: Names, root: str) -> Any:
    timer = names("callbacks", "Timer")
    refused = [{"duration": d} for d in ("1:2:3", "1:02:03:4", "x", "00:00:00:00:00", {"hour": 1})]
    accepted = [{"duration": d} for d in (" 1:02:03:04 ", "100:99:99:99", {"weeks": 1, "minutes": 2})]
    return [
        [error(lambda given=given: timer(**given)) is not None for given in [*refused, {"interval": "batch"}]],
        [timer(**given).time_remaining() for given in accepted],
    ]

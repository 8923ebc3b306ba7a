"""The fit loop: the data, epochs, and the visits between steps. What is due at a visit is in schedule.py, the step
itself in step.py.

Between two steps the loop only compares one integer: `progress.boundary` is the next batch after which anything but
another step may be due. It is computed once per visit; setting `trainer.should_stop`, or a signal, pulls it here.
"""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any, cast

from lit_fast.binding import SkipEpoch
from lit_fast.calls import skip
from lit_fast.config import batch_limit
from lit_fast.connectors import DataSource
from lit_fast.data.combined import CombinedLoader, is_collection
from lit_fast.data.distributed import Verdict, agreement, settle_length, together
from lit_fast.data.loader_iterator import EndOfData, LoaderIterator, takes_iterator
from lit_fast.data.loaders import all_in_order, check_iterable, warn_of
from lit_fast.data.position import DataPosition
from lit_fast.data.randomness import length_of
from lit_fast.errors import DataError, MisconfigurationException, PossibleUserWarning
from lit_fast.loop_views import EpochLoop, Restarted
from lit_fast.profiler.actions import recorded, recorded_batches
from lit_fast.progress import NOW
from lit_fast.rank_zero import WarningCache, rank_zero_info
from lit_fast.schedule import ASK_OTHERS, Schedule
from lit_fast.step import closure, inline
from lit_fast.strategies.control import Wish

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class FitLoop(Schedule, Restarted):
    """Runs a bound plan over epochs of data until a limit, a stop, or an interrupt."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.loader: Any = None  # one loader, or several in a CombinedLoader
        self.length: int | None = None  # of a pass over it, without limits
        self.loaded_in: int | None = None  # the epoch before which it was asked for
        self.position: DataPosition | None = None
        self.epoch_loop = EpochLoop(self)
        self.epoch_progress = self.epoch_loop.counters.epoch_progress()
        self._say_once = WarningCache().info
        self._batches_ahead: Iterator[Any] | None = None  # of the first epoch, begun before on_train_start
        self._new_data = False  # whether the loader has been asked for and no iterator of it made
        self._skip_backward = False  # Lightning's name: set at an epoch's start, that epoch only runs forward
        self.pending_data: dict[str, Any] | None = None  # position in the data, from a checkpoint
        # Length and total of the epochs to come, while one goes on that other processes, or other batches, began.
        self._usual_length: tuple[int | None, int | None] | None = None
        self._agree: Callable[[bool], Verdict] | None = None  # asks all processes whether they have another batch
        self._fetching: LoaderIterator | None = None  # what a step that takes an iterator is given

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "plans": None,
            "_batches_ahead": None,
            "_agree": None,
        }  # of this fit; a copy's next one binds its own

    # -- what callbacks read

    @property
    def batch_idx(self) -> int:
        return self.epoch_loop.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """Of the running batch, counted over all epochs."""
        return self.epoch_loop.total_batch_idx

    @property
    def max_batches(self) -> int | float:
        """Batches of an epoch (inf where unknown)."""
        return self.trainer.num_training_batches

    @property
    def done(self) -> bool:
        """Whether a limit is reached, or a stop that was asked for may come."""
        epochs = self.epoch_loop.counters.epochs("processed")  # in the last hooks of an epoch, that one included
        enough = self.max_epochs not in (None, -1) and epochs >= self.max_epochs
        return self.max_batches == 0 or enough or self._finished()

    @property
    def skip(self) -> bool:
        """Whether there is nothing to run."""
        return self.done or self.trainer.limit_train_batches == 0

    # -- before the first step

    @property
    def _data_source(self) -> DataSource:
        return DataSource(self.trainer, "train_dataloader")

    @property
    def _combined_loader(self) -> CombinedLoader | None:
        """The training data as Lightning holds it: combined also where it is a single loader."""
        loader = self.loader
        return (
            loader if loader is None or isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        )

    def setup_data(self) -> None:
        """Ask for the training data where there is none yet, or it is due anew; settle how much of it an epoch uses.

        Raises:
            MisconfigurationException: limits or intervals that this data cannot satisfy.
            DataError: what was given cannot be iterated.
        """
        trainer, config = self.trainer, self.trainer.config
        if config.limit_train_batches == 0:
            return
        every = config.reload_dataloaders_every_n_epochs
        due = every and self.loaded_in is not None and self.progress.epoch - self.loaded_in >= every
        if self.loader is None or due:
            if self.position is not None:
                self.position.close()
            given = trainer._request_loader("train_dataloader")
            combined = given if isinstance(given, CombinedLoader) else None
            if is_collection(given):
                combined = CombinedLoader(given, "max_size_cycle")
            if combined is not None and combined.mode == "sequential":
                raise MisconfigurationException(
                    "The training data is a CombinedLoader(mode='sequential'), which can only be evaluated on; use "
                    "'max_size_cycle', 'max_size' or 'min_size', or join the data sets: torch.utils.data.ConcatDataset."
                )
            loaders = [given] if combined is None else combined.flattened
            for loader in loaders:
                check_iterable(loader, "training")
            if config.overfit_batches:
                loaders = all_in_order(loaders, "training data")
            for loader in loaders:
                warn_of(loader, "training data", trains=True, reloaded=every > 0)
            loaders = trainer._distribute(loaders, "train", "training data")
            limit = config.limit_train_batches
            limits = [batch_limit("limit_train_batches", limit, length_of(loader)) for loader in loaders]
            if combined is None:
                self.loader, self.length, self.progress.total = loaders[0], length_of(loaders[0]), limits[0]
            else:
                combined.flattened, combined.limits = loaders, None
                self.loader, self.length = combined, combined.length
                combined.limits = [math.inf if batches is None else batches for batches in limits]
                self.progress.total = combined.length
            self._usual_length = None
            self._agree_on_length()
            self.loaded_in = self.progress.epoch
            self.val_check_batch = self._val_check_batch()
            self.last_validation = time.monotonic()
            self._warn_of_rare_logging()
            self.position, self._new_data, self._batches_ahead = DataPosition(self.loader), True, None
        if self.pending_data is not None:
            assert self.position is not None
            self.position.load_state_dict(self.pending_data)
            self.pending_data = None
            self._take_up_epoch()

    def _take_up_epoch(self) -> None:
        """The epoch that goes on has other batches than the data's length says, where others began it."""
        assert self.position is not None
        length, limit = self.position.epoch_length, self.trainer.config.limit_train_batches
        if length is None or self.length is None or self.progress.total is None:
            return
        self._usual_length = self.length, self.progress.total
        left_out = self.length - self.progress.total
        total = min(limit, length) if isinstance(limit, int) else length - left_out  # a fraction is one of the samples
        self.length, self.progress.total = length, max(total, self.progress.batch_idx + 1)
        self._agree_on_length()
        self.val_check_batch = self._val_check_batch()

    def _agree_on_length(self) -> None:
        """Epochs have as many batches in every process; of unknown length they are where one process does not know."""
        strategy, progress = self.trainer.strategy, self.progress
        if strategy.world_size > 1:
            self.length, progress.total = settle_length(
                self.length, progress.total, "training data", strategy.all_gather
            )

    def _warn_of_rare_logging(self) -> None:
        config, total = self.trainer.config, self.progress.total
        if self.trainer.loggers and total and total < config.log_every_n_steps and not config.fast_dev_run:
            warnings.warn(
                f"An epoch has {total} batches, and Trainer(log_every_n_steps={config.log_every_n_steps}) logs a row "
                f"every {config.log_every_n_steps} steps: most epochs will have none. Lower it to see more.",
                category=PossibleUserWarning,
                stacklevel=2,
            )

    # -- the run

    def run(self) -> None:
        trainer, progress = self.trainer, self.progress
        if self.loader is None or progress.total == 0:
            rank_zero_info("Trainer.fit stopped: there are no training batches.")
            return
        with trainer._in_phase("data"):
            self._begin_data()
        trainer._agree()
        if self._finished():
            return self._say_why()
        if progress.stage == "epoch_end":  # resumed from a checkpoint that was written in the last hooks of an epoch
            self._leave_epoch(whole=True)
            if self._finished():
                return self._say_why()
        assert self.plans is not None
        trainer._call("on_train_start")
        self.plans.refresh()
        trainer._restore_rng()  # as the checkpoint holds them, after everything that only a resumed run does
        while True:
            if progress.stage == "start":
                self._start_epoch()
            try:
                recorded(trainer._actions, "run_training_epoch", self.run_epoch)()
            except (SkipEpoch, EndOfData):
                progress.batch_idx -= 1  # that batch did not run
                self._leave_together()
                self._skip_rest_of_epoch()
            self._end_epoch()
            if self._finished():
                break
        self._say_why()
        trainer._call("on_train_end")

    def _begin_data(self) -> None:
        """Draw for new data what Lightning draws: it makes an iterator of it, and a second one for a later epoch.

        A resumed fit draws nothing: it gets its random numbers from the checkpoint.
        """
        assert self.position is not None
        if not self._new_data:
            return
        self._new_data = False
        if self.trainer._pending_rng is not None:
            return
        if self.progress.epoch or self._finished():
            self.position.draw()
        else:
            self.position.set_epoch(0)
            self._batches_ahead = iter(self.position)

    def _say_why(self) -> None:
        """Which limit ended the fit; who set `should_stop` says so himself."""
        if self._steps_reached():
            rank_zero_info("Trainer.fit stopped: max_steps=%d reached.", self.max_steps)
        elif self._epochs_reached():
            rank_zero_info("Trainer.fit stopped: max_epochs=%d reached.", self.max_epochs)

    def _start_epoch(self) -> None:
        progress = self.progress
        if self._usual_length is not None:
            (self.length, progress.total), self._usual_length = self._usual_length, None
            self.val_check_batch = self._val_check_batch()
        with self.trainer._in_phase("data"):
            self.setup_data()
            assert self.position is not None and self.plans is not None
            self._begin_data()
            self.position.set_epoch(progress.epoch)
        self.trainer._call("on_train_epoch_start")  # they still see the counters of the epoch before
        progress.stepped_before = self.windows_completed()
        progress.scheduled_before = progress.scheduled
        progress.total_before += progress.batch_idx + 1
        progress.batch_idx, progress.is_last_batch = -1, False
        self._cut_short = False
        self.epoch_loop.val_loop.batch_progress.total.reset()
        self.plans.refresh()

    def run_epoch(self) -> None:
        """One epoch, or the rest of one after a resume. The loop below is all that stands between two steps."""
        assert self.plans is not None
        progress = self.progress
        start = progress.batch_idx + 1
        with self.trainer._in_phase("data"):
            batches = self._batches(start)
        self.trainer._metric_log.epoch_end = False  # from here on, a value that is read is the newest step's
        if progress.stage in ("batch", "stepped") and self._visit():  # resumed between a step and what was due after it
            return
        if progress.stage == "validated" and not self._window_is_open():  # ... or after its validation
            self.step_plateau_schedulers("step", self.trainer)
        if progress.is_last_batch:
            return
        self._go_on()
        total = progress.total if self.length is not None else None
        for batch_idx, batch, plan in zip(count(start), batches, self.plans.windows(start, total), strict=False):
            progress.batch_idx = batch_idx
            (plan.run if batch is not None else skip)(plan, batch, batch_idx)
            if batch_idx >= progress.boundary and self._visit():
                return
        self._ended_early()

    def _batches(self, start: int) -> Iterator[Any]:
        """The batches from `start` on; what comes back is the loader's own iterator wherever that is enough."""
        assert self.position is not None
        ahead, self._batches_ahead = self._batches_ahead, None
        batches = iter(self.position) if ahead is None else ahead
        total, length = self.progress.total, self.length
        if takes_iterator(self.trainer.lightning_module.training_step):
            batches = self._together(batches) if length is None else batches
            if self.trainer._profiler is None:
                return self._iterator_for_steps(batches)
            turns = self._iterator_for_steps(self.trainer._profiler.wrap_items("data", batches))
            return cast("Iterator[Any]", self.trainer._profiler.wrap_batches(turns))
        if total is not None and total != length:
            batches = islice(batches, max(0, total - start))
        if length is None:
            batches = self._knowing_the_last(self._together(batches))
        profiler, on_device = self.trainer._profiler, self.trainer.config.device.type != "cpu"
        if profiler is not None and on_device:
            batches = profiler.wrap_items("data", batches)
        if on_device:
            batches = self.trainer._to_device_ahead(batches)
        if profiler is not None:
            return cast("Iterator[Any]", profiler.wrap_batches(batches, "transfer" if on_device else "data"))
        left = None if total is None else total - start
        return recorded_batches(self.trainer._actions, "[_TrainingEpochLoop].train_dataloader_next", batches, left)

    def _iterator_for_steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        """For a `training_step(self, dataloader_iter)`, which fetches as many batches as it wants."""
        assert self.position is not None
        progress, log = self.progress, self.trainer._metric_log

        def on_fetch(batch: Any) -> None:
            log.batch = batch

        def on_done() -> None:
            progress.is_last_batch, progress.boundary = True, NOW

        self._fetching = LoaderIterator(
            batches,
            progress.total,
            fetched=self.position.handed_out,
            on_fetch=on_fetch,
            on_done=on_done,
        )
        return self._fetching.turns()

    def data_state(self, consumed: int | None) -> dict[str, Any] | None:
        """The position in the data after `consumed` batches of this epoch (None: after all that were handed out)."""
        if self.position is None:
            return None
        if consumed is not None and takes_iterator(self.trainer.lightning_module.training_step):
            # A step is not a batch; what a step has fetched it has used.
            consumed = None if self._fetching is None else self._fetching.fetched
        return self.position.state_dict(consumed)

    def _together(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Data of unknown length ends in all processes after the same batch."""
        strategy = self.trainer.strategy
        if strategy.world_size == 1:
            return batches
        if self._agree is None:
            self._agree = agreement(getattr(strategy, "timeout", None))
        agree = self._agree if strategy.flights is None else strategy.flights.answering(self._agree, "agreement")
        return together(batches, agree, "training data")

    def _knowing_the_last(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Reads one batch ahead: a loader without a length ends without notice, and the last step must know."""
        progress = self.progress
        nothing = object()
        batch = next(batches, nothing)
        while batch is not nothing:
            following = next(batches, nothing)
            if following is nothing:
                progress.is_last_batch, progress.boundary = True, NOW
            yield batch
            batch = following

    def _ended_early(self) -> None:
        """The data gave fewer batches than it has by its own account.

        Raises:
            DataError: it gave none at all.
        """
        progress = self.progress
        if progress.batch_idx < 0:
            raise DataError(
                f"The training data ({type(self.loader).__name__}) gave no batch in epoch {progress.epoch}: an "
                f"iterator, such as a generator, can be read only once: pass an object whose __iter__ begins anew, or "
                f"max_epochs=1."
            )
        if progress.batch_idx + 1 == progress.total:  # nothing was left for these processes of an epoch that goes on
            self._skip_rest_of_epoch()
            self._visit()
            return
        warnings.warn(
            f"The training data ({type(self.loader).__name__}) ended after {progress.batch_idx + 1} of the "
            f"{progress.total} batches that its length promises; the epoch ends there"
            f"{', without a step for its open accumulation window' if self._window_is_open() else ''}. Correct its "
            f"__len__, or set limit_train_batches.",
            stacklevel=2,
        )
        self._leave_together()
        self._skip_rest_of_epoch()
        self._visit()

    def note_exception(self, error: BaseException) -> None:
        """A step that an exception cut short, before its last hooks, counts as not begun in what is saved now.

        An error of the data loader comes between two steps: the batch before it stays done.
        """
        codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        current = self.trainer._metric_log.current
        through = current is not None and current.hook in ("lr_scheduler_step", "on_train_batch_end")
        if self.progress.stage == "batch" and codes & {inline.__code__, closure.__code__} and not through:
            self.progress.stage = "broken"

    # -- between two steps

    def _visit(self) -> bool:
        """Everything that may be due after a step: logging, validation, stopping. True ends the epoch."""
        trainer, progress = self.trainer, self.progress
        progress.stage = "stepped"
        progress.is_last_batch = progress.is_last_batch or progress.batch_idx + 1 == progress.total
        window_open = self._window_is_open()
        stopping = trainer._should_stop and self._may_stop()
        if not window_open:
            every = trainer.config.log_every_n_steps
            if self._asks_others and self.windows_completed() % (every or ASK_OTHERS) == 0:
                trainer._agree()
                stopping = trainer._should_stop and self._may_stop()
            if every and (self.windows_completed() % every == 0 or trainer._should_stop):
                with trainer._in_phase("logging"):
                    trainer._metric_log.share_step()
                    trainer._log_metrics(trainer._metric_log.collect())
        if trainer._interrupt is not None and not (window_open and self.plans is not None and self.plans.trains):
            trainer._raise_interrupt()
        if trainer._should_stop and not stopping:
            self._say_once(
                f"A stop was asked for before min_epochs={self.min_epochs} or min_steps={self.min_steps} was reached; "
                f"training goes on until it is."
            )
        if self._validation_is_due(stopping):
            self.epoch_loop.val_loop.run_in_fit(release_gradients=not window_open)
            self.last_validation = time.monotonic()
            if trainer._shared is not None:
                trainer._shared.fulfilled(Wish.VALIDATE)
            trainer._agree()
            stopping = trainer._should_stop and self._may_stop()
        if not window_open:
            self.step_plateau_schedulers("step", trainer)
        if self._steps_reached() or stopping or progress.is_last_batch:
            return True
        self._go_on()
        return False

    def _go_on(self) -> None:
        """Into the next steps, up to the next boundary."""
        progress, trainer = self.progress, self.trainer
        progress.stage = "batch"
        progress.boundary = self._next_boundary()
        if trainer._interrupt is not None or trainer._should_stop:  # between the two lines above
            progress.boundary = NOW

    # -- the end of an epoch

    def _leave_together(self) -> None:
        """Nothing is left of the epoch here. Others may be in a step, and wait for gradients: they are told with them.

        Raises:
            MisconfigurationException: in all processes, where some have another batch.
        """
        control, strategy, plans = self.trainer._shared, self.trainer.strategy, self.plans
        reduces = plans is not None and plans.automatic and plans.trains
        if control is None or not strategy.rides or not reduces:
            return
        control.wish(Wish.LEAVE)
        for take_part in strategy.before_step():
            take_part()
        control.fulfilled(Wish.LEAVE)

    def _skip_rest_of_epoch(self) -> None:
        assert self.plans is not None
        self.progress.is_last_batch = self._cut_short = True
        for schedule in self.plans.whole.schedulers:
            schedule(self.progress.batch_idx)

    def _end_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        if trainer._profiler is not None:
            trainer._profiler.end_step()
        if self.plans is not None:
            self.plans.binding.stepping.check_gradients()
        with trainer._in_phase("logging"):
            trainer._metric_log.collect()
            trainer._metric_log.epoch_end, trainer._metric_log.batch = True, None
            trainer._metric_log.share()
        progress.stage = "epoch_end"
        if progress.is_last_batch and self.position is not None:
            with trainer._in_phase("data"):
                self.position.end_epoch()
        trainer._call_epoch_end("on_train_epoch_end")
        trainer._agree()
        self._leave_epoch(progress.is_last_batch)
        progress.resumed = None
        if trainer._interrupt is not None:
            trainer._raise_interrupt()

    def _leave_epoch(self, whole: bool) -> None:
        trainer, progress = self.trainer, self.progress
        if whole:
            self.step_plateau_schedulers("epoch", trainer)
        with trainer._in_phase("logging"):
            trainer._metric_log.share()
            trainer._log_metrics(trainer._metric_log.collect())
            trainer._metric_log.end_epoch()
        progress.epoch += 1
        progress.stage = "start"

    def step_plateau_schedulers(self, interval: str, trainer: Trainer) -> None:
        """Schedulers that watch a metric, after an epoch, or after a step and its validation."""
        done = (self.progress.epoch if interval == "epoch" else self.progress.batch_idx) + 1
        for config in trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau or not trainer.lightning_module.automatic_optimization:
                continue
            if config.interval == interval and done % config.frequency == 0:
                metrics = trainer.callback_metrics
                value = metrics.get(config.monitor or "")
                if trainer._shared is not None:  # learning rates must not differ
                    value = trainer.strategy.broadcast(None if value is None else value.cpu())
                if value is not None:
                    with trainer._in_phase("schedulers"):
                        trainer._scheduler_step(config)(value)
                elif config.strict:
                    raise MisconfigurationException(
                        f"A ReduceLROnPlateau scheduler watches {config.monitor!r}, which was not logged; logged were: "
                        f"{', '.join(sorted(metrics)) or 'nothing'}. Log it, or set 'strict': False."
                    )
                else:
                    warnings.warn(
                        f"A ReduceLROnPlateau scheduler watches {config.monitor!r}, which was not logged, and 'strict' "
                        f"is False: the learning rate stays.",
                        RuntimeWarning,
                        stacklevel=2,
                    )

"""The evaluation loop: validation inside a fit, the sanity check before it, `Trainer.validate` and `Trainer.test`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_fast.checkpoint import rng
from lit_fast.config import batch_limit
from lit_fast.connectors import DataSource
from lit_fast.data.combined import CombinedLoader
from lit_fast.data.loader_iterator import EndOfData, LoaderIterator, hook_of, step_of, takes_iterator
from lit_fast.data.loaders import all_in_order, check_iterable, warn_of
from lit_fast.data.position import tell_epoch
from lit_fast.data.randomness import length_of
from lit_fast.data.worker_signals import left_to_parent
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.loop_views import StageCounters
from lit_fast.metrics import Table, to_float
from lit_fast.module import LightningModule
from lit_fast.profiler.actions import recorded, recorded_batches
from lit_fast.states import TrainerFn

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class StageNames(NamedTuple):
    """What one stage is called in the trainer's state and the log, in its hooks, and in names of loaders and limits."""

    stage: str
    hooks: str
    data: str

    @property
    def step(self) -> str:
        return f"{self.hooks}_step"


class BoundPass(NamedTuple):
    """What runs for each batch of one loader, in execution order."""

    suffix: str  # of the names that are logged, where there are several loaders
    where: tuple[int, ...]  # the loader's index, where steps and hooks are told it
    batches: Iterator[Any]
    receive: tuple[Callable[[Any], Any], ...]
    starts: tuple[Callable[..., Any], ...]
    step: Callable[..., Any]
    table: Table
    ends: tuple[Callable[..., Any], ...]


VALIDATION = StageNames("validate", "validation", "val")
TEST = StageNames("test", "test", "test")


class StageLoop:
    """What validation, test and prediction share: their loaders, where they are in them, and the module's modes."""

    def __init__(self, trainer: Trainer, names: StageNames) -> None:
        self.trainer, self.names = trainer, names
        self.inference_mode = trainer.config.inference_mode  # a fit's validation sets it to False
        self.combined: CombinedLoader | None = None
        self.limits: list[int | float] = []  # batches of each loader; inf where unknown
        self.batch_idx, self.dataloader_idx = -1, 0  # what runs now; the progress bar reads them from its thread
        self.batches_before = 0  # in the loaders of this run that are through
        self._training_modes: dict[torch.nn.Module, bool] = {}
        self.counters = StageCounters(self)
        self.batch_progress = self.counters.batch_progress()

    # -- what callbacks read

    restarting = is_resuming = restarted_mid_evaluation = False  # it never goes on in the middle of a run

    @property
    def skip(self) -> bool:
        """Whether there is nothing to run."""
        return sum(self.max_batches) == 0

    # -- data

    def setup_data(self) -> None:
        """Ask for the loaders, once per run.

        Raises:
            DataError: what was given is no loader.
            MisconfigurationException: a limit that a loader cannot satisfy.
        """
        names, trainer = self.names, self.trainer
        limited = f"limit_{names.data}_batches"
        limit = getattr(trainer.config, limited)
        if self.combined is not None or limit == 0:
            return
        given = trainer._request_loader(f"{names.data}_dataloader")
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "sequential")
        for loader in combined.flattened:
            check_iterable(loader, names.hooks)
        loaders = combined.flattened
        if trainer.config.overfit_batches and trainer.state.fn == TrainerFn.FITTING:
            loaders = all_in_order(loaders, f"{names.hooks} data")
        reloaded = trainer.config.reload_dataloaders_every_n_epochs > 0
        for loader in loaders:
            warn_of(self.prepared(loader), f"{names.hooks} data", trains=False, reloaded=reloaded)
        shared = trainer._distribute(loaders, names.stage, f"{names.hooks} data")
        combined.flattened = [self.prepared(loader) for loader in shared]
        self.limits = [
            math.inf if (known := batch_limit(limited, limit, length_of(loader))) is None else known
            for loader in combined.flattened
        ]
        self.combined = combined

    def prepared(self, loader: Any) -> Any:
        """The loader as this stage reads it."""
        return loader

    @property
    def loaders(self) -> Any:
        """The loaders as they were given, or None before they were asked for."""
        combined = self.combined
        return None if combined is None else combined.iterables

    @property
    def _data_source(self) -> DataSource:
        return DataSource(self.trainer, f"{self.names.data}_dataloader")

    @property
    def _combined_loader(self) -> CombinedLoader | None:
        return self.combined

    @property
    def max_batches(self) -> list[int | float]:
        """How many batches of each loader run."""
        return self.limits

    @property
    def num_dataloaders(self) -> int:
        return 0 if self.combined is None else len(self.combined.flattened)

    @property
    def several(self) -> bool:
        """Whether hooks and steps are told which loader a batch is from."""
        return self.combined is not None and self.combined.mode == "sequential" and self.num_dataloaders > 1

    @property
    def batches_run(self) -> int:
        """In the run that goes on or ran last, over all loaders."""
        return self.batches_before + self.batch_idx + 1

    def passes(self) -> Iterator[tuple[int, Iterator[Any]]]:
        """What runs one after the other: each loader, or all of them at once where they are combined otherwise."""
        combined = self.combined
        assert combined is not None
        if combined.mode != "sequential":
            combined.limits = self.max_batches
            self.dataloader_idx = 0
            tell_epoch(combined, self.trainer._progress.epoch)
            with left_to_parent(combined.flattened):
                walk = map(itemgetter(0), combined)
            try:
                yield 0, islice(walk, combined.length)
            finally:
                combined.end_pass()
            return
        for index, (loader, limit) in enumerate(zip(combined.flattened, self.max_batches, strict=True)):
            self.batches_before, self.batch_idx, self.dataloader_idx = self.batches_run, -1, index
            tell_epoch(loader, self.trainer._progress.epoch)
            with left_to_parent([loader]):
                batches = iter(loader)
            yield index, batches if limit == math.inf else islice(batches, int(limit))

    def begun_passes(self) -> Iterator[tuple[int, Iterator[Any]]]:
        """`passes`, the first of them begun: what its iterator draws comes before what the first hooks draw."""
        passes = self.passes()
        return chain([next(passes)], passes)

    # -- around the batches

    def no_grad(self) -> AbstractContextManager[Any]:
        return torch.inference_mode() if self.inference_mode else torch.no_grad()

    def bind(self, index: int, batches: Iterator[Any]) -> BoundPass:
        """Everything that stands between one batch of a loader and the next."""
        trainer, names = self.trainer, self.names
        log, module = trainer._metric_log, trainer.lightning_module
        suffix = f"/dataloader_idx_{index}" if self.several else ""
        starts = trainer._bound_hooks(f"on_{names.hooks}_batch_start", names.stage, suffix)
        ends = trainer._bound_hooks(f"on_{names.hooks}_batch_end", names.stage, suffix)
        receive = trainer._batch_receivers(log, names.stage, index)
        step = getattr(module, names.step)
        if takes_iterator(step):
            batches, step, receive = self._iterator_for_steps(index, batches), step_of(step), ()
            starts, ends = tuple(map(hook_of, starts)), tuple(map(hook_of, ends))
        elif not _takes(step, "batch_idx", at_least=2):
            step = _without_index(step)
        step = trainer.strategy.bind_evaluation_step(trainer.precision_plugin.bind(step, names.data))
        if trainer._actions is not None:
            step = recorded(trainer._actions, trainer._strategy_action(names.step), step)
            loop = "_PredictionLoop" if names.stage == "predict" else "_EvaluationLoop"
            limits, combined = self.max_batches, self.combined
            length = limits[index] if combined is None or combined.mode == "sequential" else combined.length
            batches = recorded_batches(trainer._actions, f"[{loop}].{names.data}_next", batches, length)
        if trainer._profiler is not None:
            step = trainer._profiler.wrap("validation", step, f"{names.step}{suffix}", getattr(module, names.step))
            batches = trainer._profiler.wrap_items("validation", batches, f"{names.data} data{suffix}")
        table = log.table(names.step, names.stage, suffix)
        return BoundPass(suffix, (index,) if suffix else (), batches, receive, starts, step, table, ends)

    def _iterator_for_steps(self, index: int, batches: Iterator[Any]) -> Iterator[Any]:
        """A loader's batches for a step that fetches them itself: in each turn the same iterator."""
        log, combined = self.trainer._metric_log, self.combined
        assert combined is not None
        limit = self.max_batches[index] if combined.mode == "sequential" else combined.length

        def on_fetch(batch: Any) -> None:
            log.batch = batch

        length = None if limit is None or limit == math.inf else int(limit)
        return LoaderIterator(batches, length, dataloader_idx=index, on_fetch=on_fetch).turns()

    def check_arguments(self) -> None:
        """Raises: MisconfigurationException, where a step or hook must take `dataloader_idx`, or must not need it."""
        module, hooks = self.trainer.lightning_module, self.names.hooks
        for name in (self.names.step, f"on_{hooks}_batch_start", f"on_{hooks}_batch_end"):
            function = getattr(module, name)
            if takes_iterator(function):
                continue
            if self.several and not _takes(function, "dataloader_idx"):
                raise MisconfigurationException(
                    f"There are several {hooks} loaders, but {name} does not take `dataloader_idx`; define it as "
                    f"{name}(self, ..., batch_idx, dataloader_idx=0)."
                )
            if not self.several and _needs(function, "dataloader_idx"):
                raise MisconfigurationException(
                    f"There is one {hooks} loader, but {name} needs `dataloader_idx`; leave it out of "
                    f"{type(module).__name__}.{name}, or give it a default: dataloader_idx=0."
                )

    def model_eval(self) -> None:
        """Into evaluation mode, remembering which submodules were training."""
        self._training_modes = {child: child.training for child in self.trainer.lightning_module.modules()}
        self.trainer._call_module(f"on_{self.names.hooks}_model_eval")

    def model_train(self) -> None:
        """Every submodule as it was before `model_eval`; or as the module's own hook says."""
        hook = f"on_{self.names.hooks}_model_train"
        if is_overridden(hook, self.trainer.lightning_module, LightningModule):
            self.trainer._call_module(hook)
        else:
            for child, training in self._training_modes.items():
                child.training = training
        self._training_modes = {}


class EvaluationLoop(StageLoop):
    """Runs `validation_step` or `test_step` over every loader, without gradients, in evaluation mode."""

    def __init__(self, trainer: Trainer, names: StageNames, verbose: bool = True) -> None:
        super().__init__(trainer, names)
        self.verbose = verbose
        self._loaded_in: int | None = None  # the epoch for which a fit asked for the loaders
        self._seen: list[int] = []  # batches of each loader so far, which counts what is logged per batch
        self.rng_before: dict[str, Any] = {}  # what a checkpoint holds that is written while validation runs

    def setup_data(self) -> None:
        trainer = self.trainer
        every, epoch = trainer.config.reload_dataloaders_every_n_epochs, trainer._progress.epoch
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and every and (self._loaded_in is None or epoch - self._loaded_in >= every):
            self.combined = None
        if self.combined is None:
            super().setup_data()
            self._seen = [0] * max(1, self.num_dataloaders)
            if fitting and not (trainer.sanity_checking and trainer.fit_loop.skips_validation()):
                self._loaded_in = epoch

    @property
    def max_batches(self) -> list[int | float]:
        if not self.trainer.sanity_checking:
            return self.limits
        steps = self.trainer.num_sanity_val_steps
        return [min(steps, limit) for limit in self.limits]

    def run_in_fit(self, release_gradients: bool) -> None:
        """Validation in the middle of a fit: afterwards the training state is as before."""
        log = self.trainer._metric_log
        batch, log.batch = log.batch, None
        log.collect()
        self.rng_before = rng.capture()
        self.trainer._stage = "validate"
        if release_gradients:
            self.trainer._call_module("on_validation_model_zero_grad")
        self.run()  # an exception leaves the stage as it is: whoever hears of it, or saves, is inside validation
        self.trainer._stage = "train"
        log.stage, log.batch, log.epoch_end = "train", batch, False

    def sanity_check(self) -> None:
        """A few validation batches before the first step, so that a mistake there does not cost an epoch."""
        from lit_fast.seed import isolate_rng

        trainer = self.trainer
        trainer._stage = "sanity_check"
        trainer._metric_log.sanity_checking = True
        with isolate_rng():
            trainer._call_callbacks("on_sanity_check_start")
            self.run()
            trainer._call_callbacks("on_sanity_check_end")
        self.batch_progress.reset()
        trainer._metric_log.drop_values()
        trainer._metric_log.sanity_checking, trainer._metric_log.stage = False, "train"
        trainer._stage = "train"

    def run(self) -> list[dict[str, float]]:
        """All loaders once; returns the logged values of each, as `Trainer.validate` and `Trainer.test` do."""
        trainer = self.trainer
        log = trainer._metric_log
        log.stage, log.epoch_end = self.names.stage, False
        with self.no_grad(), trainer._in_phase("validation"):
            self.setup_data()
            return [] if self.skip else self._run()

    def _run(self) -> list[dict[str, float]]:
        trainer, log, hooks = self.trainer, self.trainer._metric_log, self.names.hooks
        self.counters.begin_run()
        self.check_arguments()
        passes = self.begun_passes()
        self.model_eval()
        trainer._call(f"on_{hooks}_start")
        trainer._call(f"on_{hooks}_epoch_start")
        results: list[dict[str, Any]] = []
        for index, batches in passes:
            bound = self.bind(index, batches)
            suffix = bound.suffix
            log.epoch_end = False
            try:
                self._run_loader(index, bound)
            except EndOfData:
                self.batch_idx -= 1  # that step found no batch
            log.collect(suffix)
            log.epoch_end = True
            log.share(suffix)
            results.append(log.collect(suffix, settle=True))
        self.counters.running = False
        log.batch = None
        trainer._call(f"on_{hooks}_epoch_end")
        log.share()
        of_all = log.collect()
        results = [{**logged, **of_all} for logged in results]
        if not trainer.sanity_checking:
            trainer._log_metrics({name: value for logged in results for name, value in logged.items()})
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            trainer._progress.stage = "validated"
        trainer._call(f"on_{hooks}_end")
        self.model_train()
        log.end_epoch()
        return [{name: to_float(value) for name, value in logged.items()} for logged in results]

    def _run_loader(self, index: int, bound: BoundPass) -> None:
        trainer, log = self.trainer, self.trainer._metric_log
        suffix, where, batches, receive, starts, step, table, ends = bound
        counts, seen = not trainer.sanity_checking, self._seen[index]
        for batch_idx, given in enumerate(batches):
            self.batch_idx, batch = batch_idx, given
            for function in receive:
                batch = function(batch)
            log.batch = batch
            for hook in starts:
                hook(batch, batch_idx, *where)
            log.current = table
            output = step(batch, batch_idx, *where)
            for hook in ends:
                hook(output, batch, batch_idx, *where)
            if log.evaluates_steps and counts:
                if log.shares_evaluation_steps:
                    log.share(suffix)
                trainer._log_metrics(log.collect(suffix), step=seen + batch_idx)
            if trainer._interrupt is not None:
                trainer._raise_interrupt()
        if counts:
            self._seen[index] += self.batch_idx + 1


def _without_index(step: Callable[..., Any]) -> Callable[..., Any]:
    def call(batch: Any, batch_idx: int, *where: int) -> Any:
        return step(batch, *where)

    return call


def _takes(function: Callable[..., Any], name: str, at_least: int | None = None) -> bool:
    """Whether a step can be given the argument `name`: by that name, or among any number of arguments, or as one of
    `at_least` arguments of any name. A compiled step, whose signature cannot be read, takes them all."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    kinds = {p.kind for p in parameters.values()}
    if name in parameters or inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
        return True
    return at_least is not None and len(parameters) >= at_least


def _needs(function: Callable[..., Any], name: str) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return (
        parameter is not None and parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    )


def print_results(results: list[dict[str, float]], stage: str) -> None:
    """The table that `Trainer.validate` and `Trainer.test` print: a row for each name, a column for each loader."""
    rows = [{name.split("/dataloader_idx_")[0]: value for name, value in result.items()} for result in results]
    names = sorted({name for row in rows for name in row})
    if not names:
        return
    from rich import get_console
    from rich.table import Table

    table = Table()
    for title in (f"{stage.capitalize()} metric", *(f"DataLoader {index}" for index in range(len(rows)))):
        table.add_column(title, justify="center", min_width=25)
    for name in names:
        table.add_row(name, *(str(row.get(name, "")) for row in rows))
    get_console().print(table)


def can_validate(module: LightningModule) -> bool:
    return is_overridden("validation_step", module, LightningModule)

"""The progress bar drawn by tqdm, for programs that customize its bars."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from typing import Any

try:
    if importlib.util.find_spec("ipywidgets") is not None:  # tqdm.auto warns where it cannot draw in a notebook
        from tqdm.auto import tqdm as _tqdm
    else:
        from tqdm import tqdm as _tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "TQDMProgressBar needs tqdm, which is not installed: pip install 'lit-fast[progress]'. RichProgressBar needs "
        "nothing more.",
        name="tqdm",
    ) from error

from lit_fast.callbacks.progress.live_area import is_terminal
from lit_fast.callbacks.progress.progress_bar import ProgressBar

_WIDTH = 5  # letters of a number beside the bar, so that the line does not jump
_LOG_INTERVAL = 5.0  # seconds between two drawings into a file or a pipe


class Tqdm(_tqdm):  # type: ignore[misc]
    """tqdm's bar, whose numbers keep their width."""

    @staticmethod
    def format_num(n: float | str) -> str:
        """A number, or what is to stand for one, filled up with zeros to five letters."""
        text = n if isinstance(n, str) else str(_tqdm.format_num(n))
        if isinstance(n, int) or "e" in text:
            return text
        if "." not in text and len(text) < _WIDTH:
            try:
                float(text)
            except ValueError:
                return text
            text += "."
        return text.ljust(_WIDTH, "0")


class TQDMProgressBar(ProgressBar):
    """One bar for training, one below it for a running validation, on standard output.

    Every `refresh_rate` batches the bar counts. It is drawn, and `get_metrics` asked, only where it was last drawn at
    least tqdm's `mininterval` ago (0.1 s on a terminal, 5 s in a file or a pipe, unless `init_train_tqdm` says
    otherwise): a drawing takes 0.2 ms, which would be most of a short step. Where a validation begins, and at the
    ends of epochs and runs, what is shown is up to date in any case.

    Args:
        refresh_rate: batches between two counts; 0 switches the bar off.
        process_position: lines to leave free above, for bars of others.
        leave: keep the line of every epoch.

    Raises:
        ModuleNotFoundError: on import, where tqdm is not installed.

    Example::

        class MyBar(TQDMProgressBar):
            def init_validation_tqdm(self):
                bar = super().init_validation_tqdm()
                bar.set_description("checking")
                return bar
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    reads_gradients = False

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__()
        self._refresh_rate = _resolved(refresh_rate)
        self._process_position = process_position
        self._leave = leave
        self._enabled = True
        self._next_draw = 0.0
        self._train_progress_bar: Any = None
        self._val_progress_bar: Any = None
        self._test_progress_bar: Any = None
        self._predict_progress_bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # a bar holds a stream and locks, which cannot be pickled
        return {name: None if isinstance(value, _tqdm) else value for name, value in vars(self).items()}

    def live_hooks(self, trainer: Any = None) -> set[str]:
        live = super().live_hooks(trainer)
        batches = [name for name in live if "_batch_" in name]
        return live if self._refresh_rate > 0 else self._without(live, TQDMProgressBar, *batches)

    # -- the bars, and how they are made

    @property
    def train_progress_bar(self) -> Any:
        """The bar of training; setting it replaces it. So with the other three."""
        return self._known("_train_progress_bar")

    @train_progress_bar.setter
    def train_progress_bar(self, bar: Any) -> None:
        self._train_progress_bar = bar

    @property
    def val_progress_bar(self) -> Any:
        """The bar of validation, and of the sanity check."""
        return self._known("_val_progress_bar")

    @val_progress_bar.setter
    def val_progress_bar(self, bar: Any) -> None:
        self._val_progress_bar = bar

    @property
    def test_progress_bar(self) -> Any:
        """The bar of testing."""
        return self._known("_test_progress_bar")

    @test_progress_bar.setter
    def test_progress_bar(self, bar: Any) -> None:
        self._test_progress_bar = bar

    @property
    def predict_progress_bar(self) -> Any:
        """The bar of prediction."""
        return self._known("_predict_progress_bar")

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: Any) -> None:
        self._predict_progress_bar = bar

    def _known(self, name: str) -> Any:
        bar = getattr(self, name)
        if bar is None:
            raise TypeError(f"{type(self).__name__}.{name[1:]} exists from the start of its stage on.")
        return bar

    @property
    def refresh_rate(self) -> int:
        """Batches between two counts."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """Lines left free above."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether the bar shows anything."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether the bar shows nothing."""
        return not self.is_enabled

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def init_sanity_tqdm(self) -> Any:
        """Make the bar of the sanity check. Override it, as the next four, to make another one."""
        return self._bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        """Make the bar of training; of each epoch, with `leave`."""
        return self._bar(self.train_description, smoothing=0)

    def init_validation_tqdm(self) -> Any:
        """Make the bar of a validation: below that of training, and gone afterwards, where there is one."""
        below = self.trainer.state.fn != "validate"
        return self._bar(self.validation_description, below=below, leave=not below)

    def init_test_tqdm(self) -> Any:
        """Make the bar of testing."""
        return self._bar(self.test_description)

    def init_predict_tqdm(self) -> Any:
        """Make the bar of prediction."""
        return self._bar(self.predict_description, smoothing=0)

    def _bar(self, description: str, below: bool = False, leave: bool = True, **options: Any) -> Tqdm:
        return Tqdm(
            desc=description,
            position=2 * self.process_position + below,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=_interval(sys.stdout),
            bar_format=self.BAR_FORMAT,
            **options,
        )

    # -- training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.train_progress_bar = self.init_train_tqdm()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._leave:
            self.train_progress_bar = self.init_train_tqdm()
        _restart(self.train_progress_bar, f"Epoch {trainer.current_epoch}", self.total_train_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._counts(self._train_progress_bar, batch_idx + 1):
            self._train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
        if self._leave:
            self.train_progress_bar.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.train_progress_bar.close()

    # -- evaluation

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self.val_progress_bar = self.init_sanity_tqdm()
        self.train_progress_bar = Tqdm(disable=True)  # hooks of users expect one

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self.val_progress_bar.close()
        self.train_progress_bar.close()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        main = self._train_progress_bar
        if trainer.state.fn == "fit" and main is not None and not main.disable:  # it stands still for a while
            main.set_postfix(self.get_metrics(trainer, pl_module))
        self.val_progress_bar = self.init_validation_tqdm()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            what = self.sanity_check_description if trainer.sanity_checking else self.validation_description
            total = self.total_val_batches_current_dataloader
            _restart(self.val_progress_bar, f"{what} DataLoader {dataloader_idx}", total)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._counts(self._val_progress_bar, batch_idx + 1):
            self._val_progress_bar.refresh()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if self._train_progress_bar is not None and trainer.state.fn == "fit":
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.test_progress_bar = self.init_test_tqdm()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_test_batches_current_dataloader
            _restart(self.test_progress_bar, f"{self.test_description} DataLoader {dataloader_idx}", total)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._counts(self._test_progress_bar, batch_idx + 1):
            self._test_progress_bar.refresh()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.test_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.predict_progress_bar = self.init_predict_tqdm()

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_predict_batches_current_dataloader
            _restart(self.predict_progress_bar, f"{self.predict_description} DataLoader {dataloader_idx}", total)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._counts(self._predict_progress_bar, batch_idx + 1):
            self._predict_progress_bar.refresh()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self.predict_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    # -- drawing

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar; `kwargs` are `file` and `end`."""
        bars = (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar, self._predict_progress_bar)
        for bar in bars:
            if bar is not None and not bar.disable:
                bar.write(sep.join(map(str, args)), **kwargs)
                return
        print(*args, sep=sep, **kwargs)

    def _counts(self, bar: Any, batches: int) -> bool:
        """Count up to `batches` where that is due; True where the bar is to be drawn, too."""
        if not self._enabled or bar is None or bar.disable:
            return False
        if batches % self._refresh_rate and batches != bar.total:
            return False
        bar.n = batches
        now = time.monotonic()
        if now < self._next_draw and batches != bar.total:
            return False
        self._next_draw = now + bar.mininterval
        return True


def _restart(bar: Any, description: str, total: float) -> None:
    """From 0 of `total` batches; drawn once."""
    bar.total = convert_inf(total)
    bar.initial = 0
    bar.set_description(description, refresh=False)
    bar.reset()


def convert_inf(total: float | None) -> float | None:
    """A number of batches as tqdm takes it: None where it is unknown (inf, nan)."""
    return total if total is not None and math.isfinite(total) else None


def _interval(stream: Any) -> float:
    """Seconds between two drawings: as tqdm has it where they replace each other, more where a file keeps them all."""
    return 0.1 if is_terminal(stream) or "ipykernel" in sys.modules else _LOG_INTERVAL


def _resolved(refresh_rate: int) -> int:
    """The rate that the environment allows: Colab breaks down under more, and tqdm's own variable asks for less."""
    if os.environ.get("COLAB_GPU") and refresh_rate == 1:
        return 20
    return max(int(os.environ.get("TQDM_MINITERS", refresh_rate)), refresh_rate)

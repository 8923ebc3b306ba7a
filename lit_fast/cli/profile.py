"""`lit-fast profile script.py ...`: where a program's fit spends its time, and how that compares."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path
from typing import Any

USAGE = (
    "lit-fast profile [-h] [--against eager|lightning|none|RUN.json] [--steps N] [--out DIR] [--fail-if-slower P%%] "
    "[--lightning-python PATH] (script.py | -m module) [arguments ...]"
)
STEPS = 200
WINDOW_SECONDS = 0.02  # below, what else a machine does shows in every window
OTHERS = 10.0  # s that the first process waits for the others' last files


def main(argv: Sequence[str]) -> int:
    """The program's own exit code where that is not 0; else 1 where the comparison found what must not be."""
    return Watch(parsed(argv)).run()


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lit-fast profile",
        usage=USAGE,
        allow_abbrev=False,
        description="Runs an unedited program, records its first fit, and compares the steps of it. Options may stand "
        "before or after the program; what is none of these goes to the program, and so does everything after `--`.",
    )
    parser.add_argument(
        "--against",
        default="eager",
        help="eager (default): the plain PyTorch loop that one would write by hand for the module, in alternating "
        "windows; lightning: the program under Lightning's Trainer; RUN.json: a report of an earlier run; none",
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help=f"optimizer steps of each side, about ({STEPS})")
    parser.add_argument(
        "--out", type=Path, default=Path("lit_fast_profile"), metavar="DIR", help="where the report is written"
    )
    parser.add_argument(
        "--fail-if-slower",
        type=_percent,
        metavar="P%",
        help="exit code 1 where a step takes longer than the baseline's by more, with 95 %% confidence",
    )
    parser.add_argument(
        "--lightning-python", default=sys.executable, metavar="PATH", help="an interpreter that has Lightning installed"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module's name, not a file")
    parser.add_argument("program")
    cut = list(argv).index("--") if "--" in argv else len(argv)
    options, rest = parser.parse_known_args(argv[:cut])
    options.arguments = [*rest, *argv[cut + 1 :]]
    if not options.module and not Path(options.program).is_file():
        parser.error(f"there is no file {options.program!r}; for a module: lit-fast profile -m {options.program}")
    if options.against not in ("eager", "lightning", "none") and not Path(options.against).is_file():
        parser.error(f"--against {options.against}: allowed are eager, lightning, none, or the report.json of a run.")
    if why := _not_writable(options.out):
        parser.error(f"--out {options.out}: {why}; name a folder that the report can be written to.")
    if options.fail_if_slower is not None and options.against == "none":
        parser.error("--fail-if-slower needs a baseline, and there is none with --against none.")
    return options


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be written there, as far as that can be told before hours of training."""
    whole = folder.absolute()
    nearest = next(path for path in (whole, *whole.parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"there is no permission to write to {nearest}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 step.")
    return value


def _percent(text: str) -> float:
    """2% as 0.02."""
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text}: a share in percent is wanted, such as 2%.")
    try:
        value = float(text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: a share in percent is wanted, such as 2%.") from None
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text}: allowed is 0% and more.")
    return value / 100.0


class Watch:
    """Runs the program with `Trainer.fit` replaced: its first fit is recorded, and compared right after it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.fits = 0
        self.busy = False  # in the first fit, which may call fit again in its processes, or in a comparison
        self.recorded: Any = None  # the clock of the first fit
        self.report: Any = None
        self.source: str | None = None  # of the loop by hand
        self.error: Exception | None = None  # why there is no comparison
        self.baseline: Any = None

    def run(self) -> int:
        from lit_fast.cli.run import execute
        from lit_fast.errors import LitFastError, ProfileError
        from lit_fast.profiler.files import read
        from lit_fast.trainer import Trainer

        options, original, code = self.options, Trainer.fit, 0
        if options.against not in ("eager", "lightning", "none"):
            self.baseline = read(options.against)  # before anything runs: it may be foreign
        with ExitStack() as afterwards:
            afterwards.callback(setattr, Trainer, "fit", original)
            afterwards.callback(setattr, sys, "argv", sys.argv)
            afterwards.callback(setattr, sys, "path", list(sys.path))
            Trainer.fit = self._fit(original)  # type: ignore[method-assign]
            try:
                execute(options.program, options.arguments, options.module)
            except SystemExit as end:
                code = _exit_code(end)
            except BaseException as error:
                if self.error is None or error is not self.error:
                    traceback.print_exception(error)
                code = 1
        if not self.fits and not code:
            raise ProfileError(f"{options.program} ended without calling Trainer.fit: there is nothing to profile.")
        if options.against == "lightning" and self.report is not None and not code:
            self._attempt(self._against_lightning)
        if self.report is not None:
            self._finish()
        elif self.fits and not code:
            return 0  # one of several processes: the first has the report
        if isinstance(self.error, LitFastError):
            raise self.error
        if self.error is not None:  # of the program's own code, in the loop by hand
            traceback.print_exception(self.error)
            return 1
        return code or self._verdict()

    # -- the fit

    def _fit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def fit(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.busy:
                return original(trainer, *args, **kwargs)
            self.fits += 1
            if self.fits > 1:
                return original(trainer, *args, **kwargs)
            given = signature.bind(trainer, *args, **kwargs)
            self.busy = True
            try:
                return self._first_fit(trainer, given, lambda: original(*given.args, **given.kwargs))
            finally:
                self.busy = False

        return fit

    def _first_fit(self, trainer: Any, given: inspect.BoundArguments, run: Callable[[], Any]) -> Any:
        from lit_fast.profiler.windows import WINDOWS, FirstSteps

        prepared = None
        if self.options.against == "eager":
            prepared = self._attempt(lambda: self._prepare(trainer, given.arguments))
            if prepared is None:
                raise SystemExit(1)  # before hours of training
        window, steps = trainer.accumulate_grad_batches, self.options.steps or STEPS
        windows = min(WINDOWS + 1, steps)
        clock = FirstSteps(
            trainer, max(1, round(steps / windows)) * window, windows, dirpath=self.options.out, write_every=1.0
        )
        clock.marks_device = self.options.against != "lightning"  # whose windows have no such marks to pay for
        trainer.fit_loop.min_epochs = trainer.fit_loop.min_steps = None  # they would hold back the end
        self.recorded, before = clock, trainer.profiler
        trainer.profiler = clock
        try:
            result = run()
        finally:
            trainer.profiler = before
            if trainer.is_global_zero:
                self._record(clock)
        if prepared is not None:
            self._attempt(lambda: self._against_eager(prepared, clock, trainer))
        elif self.baseline is not None:
            self._attempt(self._against_report)
        return result

    def _prepare(self, trainer: Any, given: dict[str, Any]) -> Any:
        from lit_fast.profiler.compare import Prepared

        data, datamodule = given.get("train_dataloaders"), given.get("datamodule")
        if hasattr(data, "prepare_data"):
            data, datamodule = None, data
        prepared = Prepared(trainer, given["model"], data, datamodule)
        if given.get("ckpt_path") is not None:
            prepared.notes.append("both sides begin with the module as it was passed, not with the checkpoint")
        return prepared

    def _record(self, clock: Any) -> None:
        from lit_fast.profiler.merge import of_profiles

        profile = clock.profile()
        profile.header.script = " ".join([self.options.program, *self.options.arguments])
        profile.windows = clock.windows
        self.report = of_profiles([profile])

    # -- baselines

    def _attempt(self, compare: Callable[[], Any]) -> Any:
        """What goes wrong in a comparison is told after the report: what was recorded is not lost."""
        try:
            return compare()
        except Exception as error:
            self.error = error
            return None

    def _against_eager(self, prepared: Any, clock: Any, trainer: Any) -> None:
        from lit_fast.errors import ProfileError
        from lit_fast.profiler.windows import FEWEST, WINDOWS

        size, windows, accumulated = clock.size, WINDOWS, trainer.accumulate_grad_batches
        batches, taken = _batches_of(trainer, clock), self.report.profiles[0].steps.count
        if batches <= FEWEST * accumulated:
            raise ProfileError(
                f"The fit took {taken} steps, too few to compare: {(FEWEST + 2) * accumulated} are needed at least. "
                f"Train longer (max_steps, max_epochs, more data), or profile without a comparison (--against none)."
            )
        if self.options.steps is not None:
            windows = min(WINDOWS, self.options.steps)
        elif clock.windows:
            step = min(sum(window.values()) for window in clock.windows)
            size = max(size, ceil(WINDOW_SECONDS / step / accumulated) * accumulated)
        most = batches // (windows + 1) // accumulated * accumulated
        with _silent():  # the fit that was recorded has said it
            self.report.comparison, self.source = prepared.against_eager(max(accumulated, min(size, most)), windows)

    def _against_report(self) -> None:
        from lit_fast.profiler.compare import against_report

        self.report.comparison = against_report(self.report, self.baseline, self.options.against, self.recorded.size)

    def _against_lightning(self) -> None:
        from lit_fast.errors import ProfileError
        from lit_fast.profiler import lightning_side
        from lit_fast.profiler.compare import against_lightning

        clock, options = self.recorded, self.options
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "lightning.json")
            program = ["-m", options.program] if options.module else [options.program]
            command = [options.lightning_python, lightning_side.__file__, out, clock.size, clock.wanted]
            ended = subprocess.run([*map(str, command), *program, *options.arguments], check=False)
            if not out.exists():
                raise ProfileError(
                    f"The program could not be run under Lightning by {options.lightning_python} (exit code "
                    f"{ended.returncode}; what it said is above). Name an interpreter that has Lightning and the "
                    f"program's packages: --lightning-python PATH."
                )
            found = json.loads(out.read_text())
        self.report.comparison = against_lightning(self.report, found, clock.size)

    # -- the end

    def _finish(self) -> None:
        """Findings, the table, and files."""
        from lit_fast.errors import ProfileError
        from lit_fast.profiler.compare import differing_losses
        from lit_fast.profiler.files import write
        from lit_fast.profiler.report import findings
        from lit_fast.profiler.report.html import write_html
        from lit_fast.profiler.report.terminal import print_report

        out = self.options.out
        if self.report.profiles[0].header.world_size > 1:
            self._add_other_ranks()
        report = self.report
        report.findings = [*differing_losses(report.comparison), *findings.find(report)]
        print_report(report)
        if self.fits > 1:
            print(f"\nThe program fitted {self.fits} times; the first one is shown.")
        written = ["report.json", *(["eager.py"] if self.source is not None else [])]
        try:
            write(report, out / "report.json")
            if self.source is not None:
                (out / "eager.py").write_text(self.source, encoding="utf-8")
            write_html(report, out / "report.html")
            written.append("report.html")
        except ModuleNotFoundError as error:
            print(error)
        except OSError as error:
            raise ProfileError(f"The report cannot be written to {out}: {error.strerror}.") from error
        print(f"\nwritten: {', '.join(str(out / name) for name in written)}")

    def _add_other_ranks(self) -> None:
        """What the other processes have written; they may end a little later than the first."""
        from lit_fast.errors import ProfileError
        from lit_fast.profiler.merge import merge

        until = time.monotonic() + OTHERS
        while True:
            try:
                found = merge(self.options.out)
            except ProfileError:  # the folder cannot be written: the figures of this process are left
                return
            ended = all(rank.finished or rank.ended_by for rank in found.ranks)
            if (ended and not found.missing) or time.monotonic() > until:
                break
            time.sleep(0.2)
        own = self.report.profiles[0]
        found.profiles = [own if one.header.rank == own.header.rank else one for one in found.profiles]
        found.comparison = self.report.comparison
        self.report = found

    def _verdict(self) -> int:
        from lit_fast.profiler.compare import differing_losses

        comparison, limit = self.report.comparison, self.options.fail_if_slower
        if comparison is None:
            return 0
        code = 1 if differing_losses(comparison) else 0
        step = next(row for row in comparison.rows if row.name == "step")
        if limit is not None:
            slower = step.low > 1.0 + limit
            says = "slower" if slower else "not shown to be slower"
            ratio = f"{step.ratio:.3f} [{step.low:.3f}, {step.high:.3f}]"
            print(f"A step takes {ratio} times {comparison.against}'s: {says} by more than {100 * limit:g}%.")
            code = 1 if slower else code
        return code


@contextmanager
def _silent() -> Iterator[None]:
    log = logging.getLogger("lit_fast")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _batches_of(trainer: Any, clock: Any) -> int:
    """Micro-batches that such a fit has before it ends by itself, less the one in which we end it."""
    recorded = len(clock.windows) * clock.size
    steps = trainer.estimated_stepping_batches
    if not clock.ended_it or not trainer.global_step:
        return int(recorded)
    return sys.maxsize if steps == float("inf") else int(steps * recorded / trainer.global_step) - 1


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1

"""Ctrl-C, SIGTERM and the signal before a job ends: what they wait for, and what they leave behind."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from lit_fast.checkpoint import finding
from lit_fast.errors import ClusterError, JobRequeued, SIGTERMException
from lit_fast.progress import NOW
from lit_fast.rank_zero import rank_zero_only
from lit_fast.states import TrainerFn
from lit_fast.strategies.control import SIGNALS, Control, Wish
from lit_fast.strategies.environments.slurm import SLURMEnvironment, srun_used


class Interrupts:
    """The part of a `Trainer` that signals concern."""

    _terminated = False  # SIGTERM ended the last run

    if TYPE_CHECKING:
        _interrupt: int | None

        def __getattr__(self, name: str) -> Any: ...

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the running step, then a checkpoint is written; a second Ctrl-C does not wait.

        So does the signal that a job of SLURM's is about to end, unless the program handles that itself.

        Outside a fit there is nothing to save: Ctrl-C ends the run at once, SIGTERM after the running batch. Whoever
        handled SIGTERM before still hears of it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        process = os.getpid()

        def wait_for_step(number: int, frame: Any) -> None:
            if os.getpid() != process:  # a forked process inherits this: Ctrl-C is its parent's to handle
                if number == signal.SIGTERM:
                    os._exit(128 + number)
                return
            if number == signal.SIGINT and (self._interrupt is not None or self._asks_for(Wish.SIGINT)):
                raise KeyboardInterrupt
            if self._shared is not None:  # all processes end after the same step
                self._shared.wish(Wish.of_signal(number))
            else:
                self._interrupt = number
                self._progress.boundary = NOW
            earlier = before.get(signal.SIGTERM) if number == signal.SIGTERM else None
            if callable(earlier):
                earlier(number, frame)

        waiting = [signal.SIGTERM]
        if self.state.fn == TrainerFn.FITTING:
            slurm = self._requeuing_cluster()
            asked = () if slurm is None or slurm.requeue_signal is None else (slurm.requeue_signal,)
            waiting += [signal.SIGINT, *(number for number in asked if signal.getsignal(number) is signal.SIG_DFL)]
        before = {number: signal.getsignal(number) for number in waiting}
        for number in before:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, wait_for_step)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if self._interrupt is not None:  # it came when there was no step left to wait for
            signal.raise_signal(self._interrupt)

    # -- several processes

    @property
    def _shared(self) -> Control | None:
        """What the processes of a fit agree on; None where this one decides alone."""
        return self.strategy.control if self.state.fn == TrainerFn.FITTING else None

    def _asks_for(self, wish: Wish) -> bool:
        return self._shared is not None and self._shared.wished(wish)

    def _agreed(self, wishes: list[Wish]) -> None:
        """All processes hear this at the same step."""
        for wish in wishes:
            if wish is Wish.STOP:
                self._should_stop = True
            elif wish in SIGNALS:
                self._interrupt = SIGNALS[wish]
        self._progress.boundary = NOW

    def _agree(self) -> None:
        """At a step that all processes know: what one wishes all do from here on."""
        if self._shared is not None:
            self._shared.agree()

    def _raise_interrupt(self) -> None:
        """End the run between two steps; a fit saves first and says how to go on."""
        number, self._interrupt = self._interrupt, None
        if number not in (signal.SIGINT, signal.SIGTERM, None):
            self._requeue(number)
        self._terminated = number == signal.SIGTERM
        saves = self.state.fn == TrainerFn.FITTING and not self.sanity_checking
        path = self.strategy.of_first(lambda: finding.interrupt_path(self._trainer)) if saves else None
        name = signal.Signals(number).name if number is not None else "interrupt"
        if path is not None:
            self.save_checkpoint(path)
            self.strategy.barrier()  # a process that ends earlier may have the others ended by what started them
            rank_zero_only(self.print)(
                f"{name} after step {self.global_step}: saved {os.fspath(path)}\n"
                f"Go on from there with trainer.fit(model, ckpt_path={os.fspath(path)!r})."
            )
        if number == signal.SIGTERM:
            raise SIGTERMException
        raise KeyboardInterrupt

    def _requeuing_cluster(self) -> SLURMEnvironment | None:
        """The SLURM job that this is, where it is to be requeued before its time is over."""
        cluster = self.strategy.cluster_environment
        if cluster is None and srun_used():
            cluster = SLURMEnvironment()
        return cluster if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue else None

    def _requeue(self, number: int) -> NoReturn:
        """Save the fit where its job finds it when it begins again, put the job back into the queue, and end."""
        slurm = self._requeuing_cluster()
        assert slurm is not None, "a signal waits that nothing waits for"
        done = f"{signal.Signals(number).name} after step {self.global_step}:"
        if not self.sanity_checking:
            path = self.strategy.broadcast(os.fspath(finding.requeue_path(self._trainer)))
            self.save_checkpoint(path)
            self.strategy.barrier()
            done += f" saved {path};"
        if self.is_global_zero:
            try:
                self.print(f"{done} job {slurm.requeue()} is back in the queue and goes on from there.")
            except ClusterError as error:
                warnings.warn(f"{done} the job was not requeued. {error} Submit it again to go on.", stacklevel=2)
        raise JobRequeued(number)

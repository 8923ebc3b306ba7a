"""Where a fit stands: the few counters that the loop writes and everyone reads."""

from __future__ import annotations

NOW = -1  # as `boundary`: after the step that runs


class Progress:
    """Where a fit stands. Written by the loop, read by everyone (the progress bar from its own thread)."""

    __slots__ = (
        "batch_idx", "boundary", "epoch", "global_step", "is_last_batch", "resumed", "scheduled", "scheduled_before",
        "stage", "stepped_before", "total", "total_before",
    )  # fmt: skip

    def __init__(self) -> None:
        self.epoch = 0  # epochs finished
        self.global_step = 0  # optimizer steps taken
        self.batch_idx = -1  # batch of this epoch that runs or ran last
        self.total: int | None = None  # batches in this epoch, None: unknown
        self.total_before = 0  # batches of all epochs before this one
        self.stepped_before = 0  # windows completed in all epochs before this one
        self.scheduled = 0  # steps of learning rate schedulers taken
        self.scheduled_before = 0  # ... in all epochs before this one
        self.is_last_batch = False
        self.boundary = NOW
        # How far: start (of an epoch), batch (in a step), broken (an exception came before the step was through),
        # stepped, validated, scheduled, epoch_end (in its hooks).
        self.stage = "start"
        # Where the checkpoint was written that this run goes on from, until an epoch is over, as (place, batch_idx):
        # epoch_start (in its hooks), batches, batch_end (in its hooks), epoch_end (in its hooks), between (two epochs).
        self.resumed: tuple[str, int] | None = None

"""Private attributes of Lightning's Trainer that programs use all the same, as views without state of their own.

Only what public code was seen to read: `trainer._checkpoint_connector.dump_checkpoint()`,
`trainer._logger_connector.should_update_logs`, `trainer._accelerator_connector.is_distributed`,
`trainer.fit_loop._data_source.is_defined()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_fast.checkpoint import state as checkpoint_state

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class View:
    """Something of a Trainer's, under another name."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer


class CheckpointConnector(View):
    """`trainer._checkpoint_connector`."""

    @property
    def _ckpt_path(self) -> Any:
        return self.trainer.ckpt_path

    @_ckpt_path.setter
    def _ckpt_path(self, path: Any) -> None:
        self.trainer.ckpt_path = path

    def dump_checkpoint(self, weights_only: bool | None = False) -> dict[str, Any]:
        """What `save_checkpoint` would write."""
        return checkpoint_state.dump(self.trainer, bool(weights_only))


class LoggerConnector(View):
    """`trainer._logger_connector`."""

    @property
    def should_update_logs(self) -> bool:
        """Whether the running step is one whose values the loggers get."""
        every, trainer = self.trainer.log_every_n_steps, self.trainer
        if not every:
            return False
        return trainer.should_stop or (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


class AcceleratorConnector(View):
    """`trainer._accelerator_connector`."""

    @property
    def is_distributed(self) -> bool:
        return self.trainer.strategy.is_distributed

    @property
    def cluster_environment(self) -> Any:
        return self.trainer.strategy.cluster_environment

    @property
    def use_distributed_sampler(self) -> bool:
        return self.trainer.config.use_distributed_sampler

    @property
    def accelerator(self) -> Any:
        return self.trainer.accelerator

    @property
    def strategy(self) -> Any:
        return self.trainer.strategy

    @property
    def _accelerator_flag(self) -> str:
        return self.trainer.accelerator.name()


class DataSource(View):
    """`fit_loop._data_source`: where the loader of one name comes from."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer)
        self.name = name

    @property
    def instance(self) -> Any:
        """The loader that was passed, else the datamodule or the module that defines it."""
        given = self.trainer._sources.get(self.name)
        if given is not None:
            return given
        return self.trainer.lightning_module if self.trainer._data_owner is None else self.trainer._data_owner

    def is_defined(self) -> bool:
        return self.trainer.lightning_module is not None and self.trainer._defines_loader(self.name)

    def dataloader(self) -> Any:
        """The loader, asked for anew."""
        return self.trainer._request_loader(self.name)

"""What a Trainer that ran in another process hands back to the one that called it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_fast.states import TrainerFn


def collect(trainer: Any) -> dict[str, Any]:
    """In every process, after the run; what the first one returns is handed back."""
    weights = trainer.lightning_module.state_dict()  # in every process: metrics gather theirs
    return {
        "state": trainer.state,
        "best_model_path": getattr(trainer.checkpoint_callback, "best_model_path", None),
        "callback_metrics": {name: _on_cpu(value) for name, value in trainer.callback_metrics.items()},
        "weights": weights if is_fit(trainer) else None,
    }


def restore(trainer: Any, held: dict[str, Any]) -> None:
    """In the process that called, on the trainer and module that it holds."""
    trainer.state = held["state"]
    if held["best_model_path"] is not None:
        trainer.checkpoint_callback.best_model_path = held["best_model_path"]
    trainer.callback_metrics.update(held["callback_metrics"])
    if held["weights"] is not None:
        # Not strict: `configure_model` may have made layers there that this module has not.
        trainer.lightning_module.load_state_dict(held["weights"], strict=False)


def is_fit(trainer: Any) -> bool:
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value

"""What programs with one mistake each are made of, for either package, and what answers them.

The programs are in bad_input_calls.py and bad_input_modules.py; test_bad_input.py says what must be answered.

python tests/bad_input_programs.py lightning      # what the other package answers, as a table
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 1,
}  # fmt: skip

PROGRAMS: dict[str, Callable[[Any], Any]] = {}


def program(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    PROGRAMS[function.__name__] = function
    return function


def loader(count: int = 3) -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(2 * count, 4), batch_size=2)  # type: ignore[arg-type]


def fit(L: Any, body: dict[str, Any] | None = None, train: Any = None, val: Any = None, **options: Any) -> Any:
    trainer = L.Trainer(**{**QUIET, **options})
    trainer.fit(module(L, **(body or {})), loader() if train is None else train, val)
    return trainer


def module(L: Any, without: tuple[str, ...] = (), **body: Any) -> Any:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def init(self: Any) -> None:
        super(made, self).__init__()
        self.layer = torch.nn.Linear(4, 2)

    plain = {"training_step": training_step, "configure_optimizers": configure_optimizers, "__init__": init}
    kept = {name: value for name, value in {**plain, **body}.items() if name not in without}
    made = type("Model", (L.LightningModule,), kept)
    return made()


def step(self: Any, batch: Any, batch_idx: int) -> Any:
    return self.layer(batch).square().mean()


def answer(run: Callable[[Any], Any], L: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """The class and text of the error (or "", ""), and those of each warning."""
    error, text = "", ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            run(L)
        except (Exception, SystemExit) as raised:
            error, text = type(raised).__name__, str(raised)
    return error, text, [(w.category.__name__, str(w.message)) for w in seen]


def main() -> None:
    package = {"lightning": "lightning.pytorch", "lit_fast": "lit_fast.pytorch"}[sys.argv[1]]
    import bad_input_calls  # noqa: F401
    import bad_input_modules  # noqa: F401
    import bad_input_programs

    logging.disable(logging.CRITICAL)
    for name, run in bad_input_programs.PROGRAMS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        error, text, said = answer(run, importlib.import_module(package))
        print(f"{name}\n    {error or 'no error'}: {inspect.cleandoc(text)[:400]}")
        for category, message in said:
            print(f"    warns {category}: {message[:200]}")


if __name__ == "__main__":
    main()

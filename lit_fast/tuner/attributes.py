"""An option of the model by name, wherever a program keeps it: on the module, its data module, or their `hparams`."""

from __future__ import annotations

from typing import Any


def _holders(model: Any, attribute: str) -> list[Any]:
    datamodule = model._trainer.datamodule if model._trainer is not None else None
    found: list[Any] = []
    for owner in (model, datamodule):
        if owner is None:
            continue
        if hasattr(owner, attribute):
            found.append(owner)
        if attribute in getattr(owner, "hparams", ()):
            found.append(owner.hparams)
    return found


def _missing(model: Any, attribute: str) -> AttributeError:
    return AttributeError(
        f"{attribute!r} is no attribute of {type(model).__name__} or its data module, and not in their hparams."
    )


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Whether the module, its data module, or the `hparams` of either has `attribute`."""
    return bool(_holders(model, attribute))


def lightning_getattr(model: Any, attribute: str) -> Any:
    """The value; the data module's goes before the module's, and `hparams` before plain attributes.

    Raises:
        AttributeError: nobody has it.
    """
    holders = _holders(model, attribute)
    if not holders:
        raise _missing(model, attribute)
    holder = holders[-1]
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set it wherever it is.

    Raises:
        AttributeError: nobody has it.
    """
    holders = _holders(model, attribute)
    if not holders:
        raise _missing(model, attribute)
    for holder in holders:
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)

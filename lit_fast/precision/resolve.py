"""From `Trainer(precision=..., plugins=...)` to one precision."""

from __future__ import annotations

import warnings
from typing import Any

from lit_fast.errors import MisconfigurationException
from lit_fast.precision.amp import MixedPrecision
from lit_fast.precision.double import DoublePrecision
from lit_fast.precision.half import HalfPrecision
from lit_fast.precision.precision import Precision
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.layer_sync import LayerSync

_ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
_ALLOWED = ("64-true", "32-true", "16-true", "16-mixed", "bf16-true", "bf16-mixed")
_LATER = ("transformer-engine", "transformer-engine-float16")


def resolve_precision(given: Any, plugin: Precision | None = None, device: str = "cpu") -> Precision:
    """The precision by Lightning's name, or the plugin that was passed instead.

    Args:
        given: a name, or its short form 64, 32, 16 or "bf16"; None is "32-true".
        plugin: what `Trainer(plugins=...)` holds.
        device: the kind of device, "cpu" or "cuda".

    Raises:
        MisconfigurationException: an unknown name, one that is not built yet, or a name and a plugin.
    """
    if plugin is not None:
        if given is not None:
            raise MisconfigurationException(
                f"Trainer(precision={given!r}, plugins={type(plugin).__name__}(...)): both choose the precision; "
                f"leave one of them out."
            )
        return plugin
    name = "32-true" if given is None else str(given)
    name = _ALIASES.get(name, name)
    if name == "32-true":
        return Precision()
    if name == "64-true":
        return DoublePrecision()
    if name in ("16-true", "bf16-true"):
        return HalfPrecision(name)
    if name == "16-mixed" and device == "cpu":
        warnings.warn(
            "Trainer(precision='16-mixed') on the CPU computes in bfloat16 instead ('bf16-mixed'), as in Lightning: "
            "CPUs have no fast float16. Pass plugins=MixedPrecision('16-mixed', 'cpu') to have float16 all the same.",
            stacklevel=4,
        )
        name = "bf16-mixed"
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, device)
    allowed = ", ".join(repr(known) for known in (*_ALLOWED, *(int(short) for short in _ALIASES if short != "bf16")))
    if name in _LATER:
        raise MisconfigurationException(f"Trainer(precision={given!r}) is not built yet; allowed so far: {allowed}.")
    raise MisconfigurationException(f"Trainer(precision={given!r}) is unknown; allowed: {allowed}.")


def precision_plugin(plugins: Any) -> Precision | None:
    """The precision among `Trainer(plugins=...)`, which may be None, one plugin, or a list.

    Raises:
        MisconfigurationException: several of them, or something that is no plugin.
    """
    given = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    # One process has no others to find, and no statistics to share with them.
    given = [plugin for plugin in given if not isinstance(plugin, ClusterEnvironment | LayerSync)]
    for plugin in given:
        if not isinstance(plugin, Precision):
            raise MisconfigurationException(
                f"Trainer(plugins=...) was given {type(plugin).__name__}; allowed so far is an object of a class that "
                f"derives from lit_fast.precision.Precision, CheckpointIO, ClusterEnvironment or LayerSync."
            )
    if len(given) > 1:
        names = ", ".join(type(plugin).__name__ for plugin in given)
        raise MisconfigurationException(
            f"Trainer(plugins=...) was given {len(given)} precisions ({names}); pass one of them."
        )
    return given[0] if given else None

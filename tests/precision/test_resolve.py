"""Names and plugins of a precision, and what is refused."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
from heart_models import trainer

from lit_fast.errors import MisconfigurationException
from lit_fast.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision, resolve_precision

KINDS: list[tuple[Any, type[Precision], str]] = [
    (None, Precision, "32-true"),
    (32, Precision, "32-true"),
    ("32", Precision, "32-true"),
    ("32-true", Precision, "32-true"),
    (64, DoublePrecision, "64-true"),
    ("64", DoublePrecision, "64-true"),
    ("64-true", DoublePrecision, "64-true"),
    ("16-true", HalfPrecision, "16-true"),
    ("bf16-true", HalfPrecision, "bf16-true"),
    ("bf16", MixedPrecision, "bf16-mixed"),
    ("bf16-mixed", MixedPrecision, "bf16-mixed"),
    (16, MixedPrecision, "16-mixed"),
    ("16", MixedPrecision, "16-mixed"),
    ("16-mixed", MixedPrecision, "16-mixed"),
]


@pytest.mark.parametrize("given,kind,name", KINDS)
def test_names(given: Any, kind: type[Precision], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: without CUDA this scaler is switched off
        found = resolve_precision(given, device="cuda" if name == "16-mixed" else "cpu")
    assert type(found) is kind and found.precision == name


def test_float16_on_the_cpu_is_bfloat16_as_in_lightning() -> None:
    with pytest.warns(UserWarning, match="computes in bfloat16 instead"):
        made = trainer(precision=16)
    assert made.precision == "bf16-mixed" and made.scaler is None


@pytest.mark.parametrize("given", ["8", 128, "float16", "bf16-half", "transformer-engine"])
def test_unknown_names(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"unknown; allowed|not built yet; allowed"):
        trainer(precision=given)


def test_plugins() -> None:
    plugin = HalfPrecision("bf16-true")
    for given in (plugin, [plugin], (plugin,)):
        made = trainer(plugins=given)
        assert made.precision_plugin is made.strategy.precision_plugin is plugin and made.precision == "bf16-true"
    assert type(trainer(plugins=[]).precision_plugin) is Precision
    with pytest.raises(MisconfigurationException, match="both choose the precision"):
        trainer(plugins=plugin, precision="bf16-true")
    with pytest.raises(MisconfigurationException, match=r"\(HalfPrecision, DoublePrecision\); pass one of them"):
        trainer(plugins=[plugin, DoublePrecision()])
    with pytest.raises(MisconfigurationException, match="was given object"):
        trainer(plugins=[object()])


@pytest.mark.parametrize("package", ["pytorch", "fabric"])
def test_lightnings_names_lead_here(package: str) -> None:
    from lit_fast.pytorch import names

    for name in ("Precision", "MixedPrecision", "HalfPrecision", "DoublePrecision"):
        kind = getattr(importlib.import_module("lit_fast.precision"), name)
        assert getattr(names.load(f"{package}.plugins"), name) is kind
        assert getattr(names.load(f"{package}.plugins.precision"), name) is kind
    assert names.load(f"{package}.plugins.precision.amp").MixedPrecision is MixedPrecision

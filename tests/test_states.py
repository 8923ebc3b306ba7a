"""Enumerations of texts: compared and found as Lightning 2.6.6's are."""

from __future__ import annotations

import pytest

from lit_fast.states import GradClipAlgorithmType, LightningEnum, RunningStage, TrainerFn


class Kind(LightningEnum):
    MEAN = "mean"
    B_b = "bee"


def test_texts_are_compared_without_case() -> None:
    assert Kind.MEAN == "MEAN" and Kind.MEAN == "mean" and Kind.MEAN != "sum" and Kind.MEAN != 3
    assert Kind.MEAN == Kind.MEAN and Kind.B_b != Kind.MEAN and hash(Kind.MEAN) == hash("mean")
    assert (str(Kind.MEAN), repr(Kind.MEAN)) == ("Kind.MEAN", "<Kind.MEAN: 'mean'>")
    assert GradClipAlgorithmType("norm") == "NORM"


def test_members_are_found_by_name_and_value() -> None:
    assert Kind.from_str("b_B") is Kind.B_b and Kind.from_str("BEE", source="value") is Kind.B_b
    assert Kind.try_from_str("bee") is None and Kind.try_from_str("bee", source="any") is Kind.B_b
    with pytest.raises(ValueError, match="'sum' is no Kind; allowed are MEAN, B_b"):
        Kind.from_str("sum")


def test_the_trainers_are_of_that_kind() -> None:
    assert (
        isinstance(TrainerFn.FITTING, LightningEnum) and TrainerFn.FITTING == "fit" and str(TrainerFn.FITTING) == "fit"
    )
    assert RunningStage("test") is RunningStage.TESTING and len({RunningStage.TESTING, "test"}) == 1

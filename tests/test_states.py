"""Enumerations of texts: compared and found as Lightning 2.6.6's are."""

from __future__ import annotations

import json

import pytest

from lit_fast.states import (
    GradClipAlgorithmType,
    LightningEnum,
    RunningStage,
    TrainerFn,
    TrainerState,
    TrainerStatus,
)


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
    assert Kind.try_from_str("bee", source="any") is Kind.B_b
    with pytest.warns(UserWarning, match="'bee' is no Kind"):
        assert Kind.try_from_str("bee") is None
    with pytest.raises(ValueError, match="'sum' is no Kind; allowed are MEAN, B_b"):
        Kind.from_str("sum")


def test_a_member_is_text_and_has_a_name() -> None:
    stage = RunningStage.SANITY_CHECKING
    assert (str(stage), f"{stage}") == ("RunningStage.SANITY_CHECKING",) * 2
    assert repr(stage) == "<RunningStage.SANITY_CHECKING: 'sanity_check'>"
    assert (stage.value, stage.name, stage.upper()) == ("sanity_check", "SANITY_CHECKING", "SANITY_CHECK")
    assert isinstance(stage, str) and json.dumps([TrainerFn.FITTING]) == '["fit"]'


def test_it_equals_its_value_in_any_case_of_letters() -> None:
    assert TrainerFn.FITTING == "fit" == TrainerFn.FITTING
    assert TrainerFn.FITTING == "FIT" and TrainerFn.FITTING != "fitting" and TrainerFn.FITTING != None  # noqa: E711
    assert TrainerFn.VALIDATING == RunningStage.VALIDATING != RunningStage.SANITY_CHECKING
    assert {"validate": 1}[RunningStage.VALIDATING] == {TrainerFn.VALIDATING: 1}["validate"] == 1
    assert GradClipAlgorithmType.NORM == "norm" and GradClipAlgorithmType.supported_type("value")
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]


def test_what_a_stage_and_a_status_say() -> None:
    assert [stage.dataloader_prefix for stage in RunningStage] == ["train", "val", "val", "test", "predict"]
    assert [stage.evaluating for stage in RunningStage] == [False, True, True, True, False]
    assert [status.stopped for status in TrainerStatus] == [False, False, True, True]
    assert repr(TrainerState(fn=TrainerFn.FITTING)) == (
        "TrainerState(status=<TrainerStatus.INITIALIZING: 'initializing'>, fn=<TrainerFn.FITTING: 'fit'>, stage=None)"
    )
    assert TrainerState(TrainerStatus.FINISHED).finished and not TrainerState(TrainerStatus.RUNNING).stopped

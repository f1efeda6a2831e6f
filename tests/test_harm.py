"""Harm against its definition, one request at a time."""

from typing import Any

import polars as pl
import pytest
from synthetic import make_run

from kvguard import schema
from kvguard.harm import HARM_COLUMNS, at_risk, judge_harm

BASELINE = {"press": "none", "ratio": "0.000"}


def _outcomes(before: dict[str, Any], after: dict[str, Any]) -> pl.DataFrame:
    """The uncompressed and the compressed run of one prompt; unnamed failures did not happen."""
    keys = {"model": "m", "press": "snapkv", "ratio": "0.500", "prompt_id": "p"}
    calm = dict.fromkeys(("looping", "non_termination", "amnesia", "catastrophe"), False)
    rows = [keys | BASELINE | calm | {"agrees": True} | before, keys | calm | after]
    return pl.DataFrame(rows, schema=schema.OUTCOMES)


@pytest.mark.parametrize(
    ("before", "after", "harmed", "rescued", "silent"),
    [
        ({"right": True}, {"right": True}, False, False, False),
        ({"right": True}, {"right": False}, True, False, True),
        ({"right": True}, {"right": False, "looping": True}, True, False, False),
        ({"right": True}, {"right": False, "non_termination": True}, True, False, False),
        ({"right": False}, {"right": True}, False, True, False),
        ({"right": False}, {"right": False, "looping": True}, False, False, False),
        ({"right": None}, {"right": False}, None, None, None),
        # without a right answer: the twin's answer and its failures are the reference
        ({}, {"agrees": True}, False, False, False),
        ({}, {"agrees": False}, True, False, True),
        ({}, {"agrees": True, "looping": True}, True, False, False),
        ({"looping": True}, {"agrees": False}, False, True, False),
        ({"looping": True}, {"agrees": False, "looping": True}, False, False, False),
    ],
)
def test_harm_is_as_defined(
    before: dict[str, Any], after: dict[str, Any], harmed: Any, rescued: Any, silent: Any
) -> None:
    outcomes = _outcomes(before, after)
    found = judge_harm(outcomes, outcomes)
    assert found.row(1)[1:] == (harmed, rescued, silent)
    if None not in (harmed, before.get("right", True)):
        assert found.row(0)[1:] == (False, False, False), "nothing harms the uncompressed run"


def test_a_request_that_a_policy_ended_is_not_silent() -> None:
    outcomes = _outcomes({"right": True}, {"right": False})
    ended = outcomes.with_columns(stop_reason=pl.Series(["eos", "stopped"]))
    assert judge_harm(ended, outcomes)["silent_harm"].to_list() == [False, False]


def test_only_a_right_or_sound_twin_puts_a_request_at_risk() -> None:
    assert at_risk(
        _outcomes({"right": False}, {"right": False}).with_columns(baseline_right=pl.lit(False))
    ).to_list() == [False, False]
    assert at_risk(_outcomes({"catastrophe": True}, {})).to_list() == [False, False]
    assert at_risk(_outcomes({}, {"catastrophe": True})).to_list() == [True, True]


def test_a_synthetic_run_is_judged_as_planted() -> None:
    run = make_run(24, seed=3)
    assert judge_harm(run.outcomes, run.outcomes).equals(run.outcomes.select(HARM_COLUMNS))
    assert run.outcomes["harmed"].sum() > 3

"""The failure rate as a function of the definitions."""

import polars as pl
import pytest
from synthetic import make_run

from kvguard.config import Detection
from kvguard.detectors import detect_outcomes
from kvguard.sensitivity import sensitivity_table


@pytest.fixture(scope="module")
def run():
    return make_run(num_prompts=12, max_new_tokens=64, seed=3)


def test_configured_value_gives_the_planted_rate_and_is_always_tried(run):
    table = sensitivity_table(
        run.prompts, run.traces, run.tokens, Detection(loop_repeats=3), {"loop_repeats": [2]}
    )
    assert sorted(set(table["value"])) == [2.0, 3.0]
    at_config = table.filter("configured")
    assert set(at_config["value"]) == {3.0}
    for row in at_config.iter_rows(named=True):
        planted = run.outcomes.filter(
            (pl.col("press") == row["press"]) & (pl.col("ratio") == row["ratio"])
        )["catastrophe"].drop_nulls()
        assert row["requests"] == len(planted)
        assert row["cfr"] == pytest.approx(sum(planted) / len(planted))
        assert row["cfr_low"] - 1e-9 <= row["cfr"] <= row["cfr_high"] + 1e-9


def test_stricter_definitions_never_find_more(run):
    table = sensitivity_table(run.prompts, run.traces, run.tokens, Detection())
    for _, line in table.sort("value").group_by("parameter", "press", "ratio"):
        rates = line.sort("value")["cfr"].to_list()
        assert rates == sorted(rates, reverse=True)
    llr = table.filter((pl.col("parameter") == "amnesia_llr") & (pl.col("ratio") == "0.750"))
    assert llr.sort("value")["catastrophes"][0] > llr.sort("value")["catastrophes"][-1]


def test_agrees_with_detection_under_each_setting(run):
    table = sensitivity_table(
        run.prompts, run.traces, run.tokens, Detection(), {"amnesia_llr": [0.3]}
    )
    outcomes = detect_outcomes(run.prompts, run.traces, run.tokens, Detection(amnesia_llr=0.3))
    expected = outcomes.group_by("press", "ratio").agg(catastrophes=pl.col("catastrophe").sum())
    found = table.filter(pl.col("value") == 0.3).join(expected, on=["press", "ratio"])
    assert found.height == 3
    assert found["catastrophes"].to_list() == found["catastrophes_right"].to_list()


def test_unknown_parameter_and_bad_value_are_named(run):
    with pytest.raises(ValueError, match=r"loop_repeat'.*loop_window_tokens"):
        sensitivity_table(run.prompts, run.traces, run.tokens, Detection(), {"loop_repeat": [2]})
    with pytest.raises(ValueError, match=r"loop_repeats"):
        sensitivity_table(run.prompts, run.traces, run.tokens, Detection(), {"loop_repeats": [1]})

"""Policies compared in pairs, against counts and p-values worked out by hand."""

from collections.abc import Mapping, Sequence

import polars as pl
import pytest
from scipy import stats

from kvguard.policy_tests import compare_pairs


def runs(harmed: Mapping[str, Sequence[bool | None]], bytes_: dict[str, int]) -> pl.DataFrame:
    rows = [
        {"model": "m", "press": "p", "ratio": "0.500", "source": "live", "status": "ok"}
        | {"policy": policy, "prompt_id": f"{index:02d}", "harmed": hurt}
        | {"device_byte_steps": bytes_[policy] + index}
        for policy, answers in harmed.items()
        for index, hurt in enumerate(answers)
    ]
    return pl.DataFrame(rows)


def test_pairs_are_mcnemars_and_a_holm_family() -> None:
    none = [True] * 9 + [False] * 11
    guard = [False] * 8 + [True] + [False] * 11
    table = compare_pairs(
        runs(
            {"none": none, "guard": guard, "always_safe": [False] * 20},
            {"none": 100, "guard": 150, "always_safe": 300},
        )
    )
    assert table.select("policy", "other").rows() == [
        ("none", "always_safe"),
        ("none", "guard"),
        ("always_safe", "guard"),
    ]
    row = table.row(1, named=True)
    counts = ("harmed", "other_harmed", "only_harmed", "only_other")
    assert [row[name] for name in counts] == [9, 1, 8, 0]
    assert row["harm_p_value"] == pytest.approx(stats.binomtest(8, 8, 0.5).pvalue)
    assert row["harm_difference"] == pytest.approx(8 / 20)
    assert row["byte_steps_difference"] == pytest.approx(-50)
    smallest = table["harm_p_value"].min()
    assert table["harm_p_adjusted"].min() == pytest.approx(3 * float(str(smallest)))


def test_nothing_that_varied_has_an_exact_bound_and_unknown_harm_is_left_out() -> None:
    table = compare_pairs(
        runs({"none": [False] * 19 + [None], "lossless": [False] * 20}, {"none": 1, "lossless": 2})
    )
    row = table.row(0, named=True)
    assert (row["prompts"], row["harm_difference"], row["harm_p_value"]) == (19, 0.0, 1.0)
    assert row["discordant_high"] == pytest.approx(1 - 0.05 ** (1 / 19))

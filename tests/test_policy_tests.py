"""Policies compared in pairs, against counts and p-values worked out by hand."""

from collections.abc import Mapping, Sequence

import polars as pl
import pytest
from scipy import stats

from kvguard.paired_tests import Estimate
from kvguard.policy_tests import compare_pairs, compare_with_guard, p_of_interval


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


def test_the_guard_against_its_rivals_over_all_conditions_and_in_each() -> None:
    """Two conditions of 20 prompts; the guard repairs 6 of 8 in each and costs half of the full."""
    none = [True] * 8 + [False] * 12
    guard = [True] * 2 + [False] * 18
    one = runs(
        {"none": none, "guard": guard, "lossless": guard, "always_safe": [False] * 20},
        {"none": 100, "guard": 150, "lossless": 290, "always_safe": 290},
    )
    table = compare_with_guard(pl.concat([one, one.with_columns(ratio=pl.lit("0.750"))]))
    groups = table["ratio"].unique(maintain_order=True).to_list()
    assert groups == [None, "0.500", "0.750"]
    pooled = {row["other"]: row for row in table.filter(pl.col("ratio").is_null()).to_dicts()}
    assert set(pooled) == {"none", "lossless", "always_safe"}
    alone = pooled["none"]
    assert (alone["requests"], alone["prompts"]) == (40, 20)
    assert (alone["only_harmed"], alone["only_other"]) == (0, 12)
    assert alone["harm_p_value"] == pytest.approx(2 * 0.5**12)
    assert alone["harm_p_adjusted"] == pytest.approx(3 * 2 * 0.5**12)
    assert alone["harm_difference"] == pytest.approx(-12 / 40)
    # Prompts are resampled: two equal conditions say no more than one of them.
    apart = table.filter(pl.col("other") == "none", pl.col("ratio") == "0.500").row(0, named=True)
    assert alone["harm_low"] == pytest.approx(apart["harm_low"])
    assert apart["harm_p_value"] == pytest.approx(2 * 0.5**6)
    assert alone["byte_steps_difference"] == pytest.approx(50 / (290 + 9.5))
    # Nothing differs in harm: the exact interval of 20 prompts, and p is 1.
    same = pooled["lossless"]
    assert same["harm_high"] == -same["harm_low"] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert same["harm_p_value"] == 1


def test_a_p_value_that_comes_from_an_interval() -> None:
    """The other way round: an interval that ends at 0 has p = 0.05."""
    assert p_of_interval(Estimate(0.2, 0.0, 0.4), 12) == pytest.approx(0.05)
    reach = 0.3 * float(stats.t.ppf(0.975, 11))
    expected = 2 * stats.t.sf(0.5 / 0.3, 11)
    assert p_of_interval(Estimate(0.5, 0.5 - reach, 0.5 + reach), 12) == pytest.approx(expected)
    assert p_of_interval(Estimate(0.5, None, None), 12) is None
    assert p_of_interval(Estimate(0.0, 0.0, 0.0), 12) is None

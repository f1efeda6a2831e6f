"""Policies compared in pairs, against counts and p-values worked out by hand."""

from collections.abc import Mapping, Sequence

import polars as pl
import pytest
from scipy import stats

from kvguard.compare_policies import pool_conditions, summarize_runs
from kvguard.paired_tests import Estimate
from kvguard.policy_tests import (
    GUARD_COLUMNS,
    compare_listed,
    compare_pairs,
    compare_with_guard,
    live_tables,
    p_of_interval,
)
from kvguard.schema import COSTS


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


PROMPT, STEPS, TOKEN_BYTES = 10, 4, 100
WHOLE = (PROMPT + (10 + 1) + (11 + 1) + (12 + 1) + (13 + 1)) * TOKEN_BYTES
"""What offloading moves: the prompt, then at each step what is there and one new token."""


def moving(moved: Mapping[str, int]) -> pl.DataFrame:
    """20 prompts whose policies moved so many bytes each, up and down by a prompt's place."""
    harmed = {policy: [policy == "none"] * 6 + [False] * 14 for policy in moved}
    frame = runs(harmed, dict.fromkeys(moved, 1000)).with_columns(
        prompt_tokens=pl.lit(PROMPT, pl.Int32),
        cache_bytes_before=pl.lit(PROMPT * TOKEN_BYTES),
        decode_steps=pl.lit(STEPS, pl.Int64),
        task=pl.lit("t"),
        bytes_moved=pl.col("policy").replace_strict(moved, return_dtype=pl.Int64),
        **{name: pl.lit(False) for name in ("silent_harm", "rescued", "alarmed")},
        **{name: pl.lit(False) for name in ("catastrophe", "right", "agrees")},
    )
    spread = pl.col("prompt_id").cast(pl.Int64) % 2 * 2 - 1
    acts = pl.col("policy").is_in(["guard", "lossless"])
    frame = frame.with_columns(bytes_moved=pl.col("bytes_moved") + acts * spread * 50)
    absent = [name for name in COSTS if name not in frame.columns]
    return frame.with_columns(pl.lit(0, pl.Int64).alias(name) for name in absent)


MOVED = {"none": 0, "always_safe": 0, "guard": WHOLE // 4, "lossless": WHOLE // 2}


def test_bytes_moved_are_relative_to_offloading_the_same_requests() -> None:
    expected = {"none": 0.0, "always_safe": 0.0, "guard": 0.25, "lossless": 0.5}
    frame = moving(MOVED)
    outcomes = frame.filter(policy="none").with_columns(press=pl.lit("none"))
    for table in (
        pool_conditions(frame).filter(pl.col("task").is_null()),
        summarize_runs(frame, outcomes),
    ):
        found = dict(table.select("policy", "relative_bus_traffic").iter_rows())
        assert found == pytest.approx(expected)
    # The same without `always_safe`, from `offload`, which is 1 by what it is.
    offload = moving({"none": 0, "offload": WHOLE, "guard": WHOLE // 4})
    pooled = pool_conditions(offload).filter(pl.col("task").is_null())
    found = dict(pooled.select("policy", "relative_bus_traffic").iter_rows())
    assert found == pytest.approx({"none": 0.0, "offload": 1.0, "guard": 0.25})
    # Files of earlier versions counted on a CPU what was parked alone: unknown, not small.
    older = frame.drop("prompt_tokens", "cache_bytes_before")
    assert pool_conditions(older)["relative_bus_traffic"].null_count() == 8
    alone = frame.filter(pl.col("policy").is_in(["none", "guard"]))
    assert pool_conditions(alone)["relative_bus_traffic"].null_count() == 4


def test_planned_pairs_are_one_family_and_one_that_did_not_run_is_null() -> None:
    planned = [("guard", "none"), ("lossless", "guard"), ("ladder", "gate")]
    table = compare_listed(moving(MOVED), planned)
    assert table.schema == pl.Schema(GUARD_COLUMNS)
    assert table["press"].to_list() == [None] * 3 + ["p"] * 3
    first, second, third = table.head(3).to_dicts()
    assert (first["policy"], first["other"]) == planned[0]
    p_value = 2 * 0.5**6
    assert first["harm_p_value"] == pytest.approx(p_value)
    assert first["harm_p_adjusted"] == pytest.approx(2 * p_value), "of two pairs that ran"
    assert first["bus_traffic_difference"] == pytest.approx(0.25)
    assert second["bus_traffic_difference"] == pytest.approx(0.25)
    assert first["bus_traffic_low"] < 0.25 < first["bus_traffic_high"]
    assert second["byte_steps_difference"] == 0
    assert third["requests"] == third["prompts"] == 0
    measured = list(GUARD_COLUMNS)[list(GUARD_COLUMNS).index("harmed") :]
    assert all(third[name] is None for name in measured)
    assert compare_listed(moving(MOVED), []).is_empty()
    guard = compare_with_guard(moving(MOVED), rivals=["none", "gate"])
    assert set(guard["other"]) == {"none"}
    assert guard["bus_traffic_difference"].to_list() == pytest.approx([0.25, 0.25])
    assert (
        compare_listed(moving(MOVED).drop("prompt_tokens"), planned)[
            "bus_traffic_difference"
        ].null_count()
        == 6
    )


def test_a_run_has_the_planned_table_whether_anything_was_planned_or_not() -> None:
    live = moving(MOVED)
    simulated = live.with_columns(source=pl.lit("simulation"))
    assert live_tables(live, simulated, 20, 0)["planned_tests"].is_empty()
    tables = live_tables(live, simulated, 20, 0, [("guard", "lossless")])
    assert tables["planned_tests"]["other"].to_list() == ["lossless"] * 2

"""Paired tests of policies in docs/findings.md: the guard against its rivals, and planned pairs."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from kvguard.config import POLICIES
from kvguard.markdown import measured, p_value, table

Row = Mapping[str, Any]


def condition(row: Row) -> str:
    """Press and ratio in a table."""
    return f"{row['press']} {row['ratio']}"


def guard_tests(tests: pl.DataFrame) -> tuple[str, str]:
    """The guard against its rivals: exact McNemar on harm, paired bootstrap on byte-steps."""
    text = (
        "**Policies.** Live test requests: *guard* against each rival, harm by the exact McNemar "
        "test, device byte-steps (as shares of the full KV cache's) and bytes moved (of what "
        "offloading it moves) by a paired bootstrap over prompts, each adjusted over the rivals. "
        "Differences are guard minus rival: below 0 the guard does better. Over all conditions a "
        "prompt makes one pair per condition; McNemar's test takes these as independent, the "
        "intervals do not. All rivals in each condition are in `tables/guard_tests`."
    )
    if tests.is_empty():
        return "", text + " The guard did not run live in this run."
    lines = []
    shown = tests.filter(pl.col("press").is_null() | (pl.col("other") == "verify_on_failure"))
    for row in shown.to_dicts():
        lines.append(
            [
                "all" if row["press"] is None else condition(row),
                POLICIES[row["other"]].label,
                *_compared(row),
            ]
        )
    head = ["condition", "rival", "harmed, guard and rival", "only guard / only rival", *_TESTED]
    answers = []
    for row in tests.filter(pl.col("press").is_null()).to_dicts():
        if row["other"] in ("verify_on_failure", "lossless", "lossless_auto"):
            p = row["harm_p_adjusted"]
            sure = p is not None and p < 0.05
            more = row["harm_difference"] is not None and row["harm_difference"] > 0
            found = f"leaves {'more' if more else 'fewer'}" if sure else "is not shown to differ in"
            cost = _span(row, "byte_steps")
            answers.append(
                f"Against *{POLICIES[row['other']].label}* the guard {found} harmed requests "
                f"(adjusted p {p_value(p)}); byte-steps, guard minus rival: {cost}."
            )
    answer = " ".join(answers)
    return answer, f"{text}\n\n{table(head, lines)}"


def _span(row: Row, name: str, *, percent: bool = False) -> str:
    value = row.get(f"{name}_difference")
    if value is None:
        return "undefined"
    if row[f"{name}_low"] is None:
        return f"{value:.2f} (the same in every pair)"
    renamed = {"x": value, "x_low": row[f"{name}_low"], "x_high": row[f"{name}_high"]}
    return measured(renamed, "x", percent=percent)


def planned_section(tests: pl.DataFrame) -> str:
    """The comparisons that the configuration lists; nothing where it lists none."""
    if tests.is_empty():
        return ""
    lines = [
        [
            f"{POLICIES[row['policy']].label} against {POLICIES[row['other']].label}",
            *_compared(row),
        ]
        for row in tests.filter(pl.col("press").is_null()).to_dicts()
    ]
    head = ["policies", "harmed, both", "only first / only second", *_TESTED]
    return (
        "### Planned comparisons\n\nThe pairs of `live.planned_tests`, live test requests of all "
        "conditions together: as the test of policies above, first minus second, adjusted over the "
        "list, each measure apart. Undefined: one of the two did not run, or the measure is not "
        "known. Each condition is in `tables/planned_tests`.\n\n" + table(head, lines)
    )


_TESTED = ("harm", "adjusted p", "byte-steps", "adjusted p", "bus traffic", "adjusted p")


def _compared(row: Row) -> list[str]:
    """Counts of harm and the differences of a pair of policies, with adjusted p-values."""
    if not row["requests"]:
        return ["did not run", "-", *["undefined"] * len(_TESTED)]
    return [
        f"{row['harmed']} and {row['other_harmed']} of {row['requests']}",
        f"{row['only_harmed']} / {row['only_other']}",
        _span(row, "harm", percent=True),
        p_value(row["harm_p_adjusted"]),
        _span(row, "byte_steps"),
        p_value(row["byte_steps_p_adjusted"]),
        _span(row, "bus_traffic"),
        p_value(row.get("bus_traffic_p_adjusted")),
    ]

"""Words for numbers with intervals, and Markdown tables, as findings use them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _number(value: float, *, percent: bool, digits: int) -> str:
    return f"{value:.0%}" if percent else f"{value:.{digits}f}"


def span(
    row: Mapping[str, Any], low: str, high: str, *, percent: bool = False, digits: int = 2
) -> str:
    if row["value"] is None:
        return "undefined"
    value = _number(row["value"], percent=percent, digits=digits)
    if row[low] is None:
        return f"{value} [too few prompts]"
    ends = [_number(row[end], percent=percent, digits=digits) for end in (low, high)]
    return f"{value} [{ends[0]}, {ends[1]}]"


def measured(row: Mapping[str, Any], name: str, *, percent: bool = False, digits: int = 2) -> str:
    """A column with its interval, ``name``, ``name_low`` and ``name_high``."""
    renamed = {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
    return span(renamed, "low", "high", percent=percent, digits=digits)


def counted(row: Mapping[str, Any], name: str, requests: int) -> str:
    """A share of requests as a count, with its interval: ``4 of 30 [3%, 43%]``."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return "undefined"
    text = f"{round(value * requests)} of {requests}"
    return f"{text} [{low:.0%}, {high:.0%}]" if low is not None else f"{text} [too few prompts]"


def number_or_dash(value: float | None, scale: float = 1, digits: int = 0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def p_value(value: float | None) -> str:
    if value is None:
        return "undefined"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def bracket(row: Mapping[str, Any]) -> str:
    return span(row, "low", "high")


def pointwise(row: Mapping[str, Any], *, percent: bool = False, digits: int = 2) -> str:
    return span(row, "low_pointwise", "high_pointwise", percent=percent, digits=digits)


def difference(row: Mapping[str, Any]) -> str:
    renamed = dict(row) | {"value": row["difference"]}
    return span(renamed, "difference_low", "difference_high")


def above(row: Mapping[str, Any], *, family: bool = True) -> bool:
    low = row["low" if family else "low_pointwise"]
    return low is not None and low > 0.5


def verdict(row: Mapping[str, Any], *, family: bool = True) -> str:
    low, high = (row[name if family else f"{name}_pointwise"] for name in ("low", "high"))
    if row["value"] is None:
        return "undefined"
    if low is None:
        return "too few prompts to tell"
    if low > 0.5:
        return "above chance"
    return "below chance" if high < 0.5 else "interval includes chance"


def changed(row: Mapping[str, Any]) -> str:
    low, high = row["difference_low"], row["difference_high"]
    if low is None:
        return "too few prompts to tell"
    if high < 0:
        return "worse"
    return "better" if low > 0 else "interval includes no change"


def quote(text: str) -> str:
    return "\n>\n".join(f"> {line}" for line in text.splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

"""The section of docs/findings.md about the certificate over prices of harm."""

from pathlib import Path

import polars as pl

from kvguard import schema
from kvguard.certificate import upper_bound
from kvguard.markdown import p_value, quote, table
from kvguard.price_certificate import (
    PRICE_CERTIFICATE,
    PriceCertificate,
    PriceStatement,
    load_price_certificate,
)

MB = 1e6


def price_sections(results: str | Path) -> list[str]:
    """The section of a run's results folder; none where no price was to be certified."""
    folder = Path(results)
    path = folder / "models" / PRICE_CERTIFICATE
    if not path.is_file():
        return []
    rows = schema.read_table(folder / "tables" / "price_certificate.parquet")
    return [price_section(load_price_certificate(path), rows)]


def price_section(certificate: PriceCertificate, rows: pl.DataFrame) -> str:
    """What is certified about prices: the summary, a sentence a statement, every price.

    Args:
        certificate: as loaded.
        rows: ``tables/price_certificate``.
    """
    summary = certificate.text.splitlines()[0]
    points = [f"- {_named(one)}: {_answer(one)}" for one in certificate.statements]
    levels = sorted(certificate.levels)
    lines = []
    for (model, press, ratio, price), part in rows.group_by(
        "model", "press", "ratio", "harm_price", maintain_order=True
    ):
        by_level = {row["level"]: row for row in part.to_dicts()}
        row = by_level[levels[0]]
        bound = upper_bound(row)
        most = "-" if bound is None else f"{bound:.1%}"
        name = "all mixed" if press is None else f"{press} {ratio}"
        lines.append(
            [
                f"{model}, {name}",
                f"{price:g}",
                f"{row['harmed']} of {row['requests']}",
                str(row["silent"]),
                f"{row['observed']:.1%}",
                most,
                *(_tested(by_level[level]) for level in levels),
                f"{row['checks']:.2f}",
                f"{row['tokens_wasted']:.2f}",
                "-" if row["bytes_moved"] is None else f"{row['bytes_moved'] / MB:.2f}",
            ]
        )
    tests = [f"p, above {level:.0%}" for level in levels]
    head = ["condition", "harm_price", "harmed", "silently", "mean over units", "at most", *tests]
    unit = rows["unit"][0] if rows.height else "prompt"
    return (
        "### What is certified about the price\n\n`guard_price` ran live on the calibration "
        "prompts that fitted nothing, once at each price; these requests are in no other table. A "
        "request that failed or could not be judged counts as harmed. Prices are tested from the "
        "highest down, and the first that is not certified ends the sequence. Unit: the "
        f"{unit}. At most: the exact upper bound for this price alone, where each unit is one "
        "request. Bold: certified. Costs are means per request.\n\n"
        + quote(summary)
        + "\n\n"
        + "\n".join(points)
        + "\n\n"
        + table([*head, "checks", "tokens wasted", "MB moved"], lines)
    )


def _named(statement: PriceStatement) -> str:
    use = statement.use
    where = "all conditions mixed" if use is None else f"{use.press} {use.ratio}"
    return f"{where}, at most {statement.level:.0%} harmed"


def _answer(statement: PriceStatement) -> str:
    price = statement.certified_price
    if price is not None:
        return f"certified down to `harm_price={price:g}`."
    bound = statement.prices[0].bound
    return (
        f"no price is certified; the highest, {statement.prices[0].harm_price:g}, leaves "
        f"{bound.observed:.1%}, and {bound.units_needed_at_zero} {bound.unit}s would be needed "
        "without any harm."
    )


def _tested(row: dict[str, object]) -> str:
    value = p_value(float(str(row["p_value"])))
    return f"**{value}**" if row["certified"] else value

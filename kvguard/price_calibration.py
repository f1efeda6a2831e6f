"""Certify prices of harm from live runs on prompts that fitted nothing.

What `guard_price` leaves behind a rejection no stored trace shows, so every price of a grid is run
live on the certifying prompts. **The statement**: with probability 1 - delta over the draw of these
prompts, at most ``level`` of requests are harmed at a price.

**Loss and unit.** The unit is the prompt, or the template where a task draws prompts from
templates; its loss is the share of its requests that are harmed, failed or could not be judged. A
statement about one condition (model, press, ratio) has one request a prompt and the exact binomial
tail as p-value; one about all conditions mixed has one a condition, dependent within the prompt,
and the p-value of Hoeffding and Bentkus (`learn_then_test`).

**Sequence.** Prices are tested from the highest down, an order that no data chose, and the first
that is not rejected ends the sequence: with family-wise error delta no correction for the grid is
paid, and no monotony is assumed. The highest price removes most harm; an infinite one is lossless
and needs no test. Every (condition, level) has a sequence with a delta of its own. Levels nest (a
price certified at 5 % satisfies 10 %), but their sequences may err on different prices, so all
statements together hold with what their deltas leave in sum.

**Independence.** Prompts are drawn independently. Rows that decode together share passes, so when
a row is checked depends a little on its neighbours; losses are independent up to that.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from kvguard.calibration import PriorUse
from kvguard.certificate import Bound
from kvguard.config import digest
from kvguard.harm_model import HarmModel
from kvguard.leakage import LeakageCheck, LeakageError, assert_disjoint
from kvguard.learn_then_test import Bools, Floats, certify, p_values, prompts_needed
from kvguard.price_certificate import (
    PriceBound,
    PriceCertificate,
    PriceStatement,
    PriceUse,
    harm_model_digest,
)
from kvguard.splits import Table, read_splits, unit_names

logger = logging.getLogger(__name__)

CONDITION = ("model", "press", "ratio")

_COSTS = ("checks", "tokens_wasted", "bytes_moved", "device_byte_steps")


class PriceCalibration(NamedTuple):
    """The certificate and its tables, ``price_certificate`` and ``leakage_check_price``."""

    certificate: PriceCertificate
    tables: dict[str, pl.DataFrame]


def fitting_prompts(model: HarmModel) -> set[str]:
    """Prompts that a model of harm or its gate's probabilities were fitted on."""
    gate = (model.gate or {}).get("provenance", {})
    return {*model.provenance.get("prompts", []), *gate.get("probability_prompts", [])}


def rows_together(runs: pl.DataFrame, batch_size: int) -> int:
    """Rows that the largest shard of some runs had at work at once."""
    shards = runs.group_by(*CONDITION, "harm_price", "task", "shard").len()["len"]
    return min(batch_size, int(shards.cast(pl.Int64).to_numpy().max(initial=1)))


def certify_prices(
    runs: pl.DataFrame,
    splits: Table,
    prompts: Sequence[str],
    model: HarmModel,
    uses: Sequence[PriceUse],
    *,
    prices: Sequence[float],
    levels: Sequence[float],
    delta: float,
    prior_use: PriorUse | None = None,
) -> PriceCalibration:
    """Test every price against every level, for each use and for all uses of a model mixed.

    Args:
        runs: `schema.CERTIFYING_RUNS` of ``guard_price``: every prompt under every use and price.
        splits: `schema.SPLITS`.
        prompts: those that certify.
        model: of harm, that the runs asked.
        uses: what statements are bound to.
        prices: the grid.
        levels: shares of harmed requests, the primary first.
        delta: of each sequence of tests.
        prior_use: earlier certificates from these prompts, and whether the plan came first.

    Returns:
        The certificate; ``price_certificate`` has one row for each statement and price.

    Raises:
        LeakageError: a certifying prompt fitted something or is of another split.
        ValueError: no prompt certifies, or a run is missing or twice.
    """
    known = read_splits(splits)
    if not prompts:
        raise ValueError("no calibration prompt is left to certify: more prompts are needed")
    assert_disjoint({"price certificate": prompts, "model of harm": fitting_prompts(model)})
    _check_complete(runs, prompts, uses, prices)
    check = LeakageCheck(known)
    check.check("certificate", runs["prompt_id"], "harm_price")
    judged = runs.join(unit_names(known), on="prompt_id", how="left").with_columns(
        wrong=pl.col("harmed").fill_null(True) | (pl.col("status") != "ok"),
        unknown=pl.col("harmed").is_null() | (pl.col("status") != "ok"),
    )
    order = sorted(prices, reverse=True)
    statements, rows = [], []
    for name in dict.fromkeys(use.model for use in uses):
        own = [use for use in uses if use.model == name]
        for use in (None, *own):
            scope = {"model": name} if use is None else _condition(use)
            part = judged.filter(**scope)
            for level in levels:
                bounds = _sequence(part, order, level, delta)
                one = PriceStatement(model=name, use=use, level=level, prices=bounds)
                statements.append(one)
                rows += _rows(one, part)
    prior_use = prior_use or PriorUse()
    certificate = PriceCertificate(
        harm_model_digest=harm_model_digest(model),
        delta=delta,
        levels=list(levels),
        looks=prior_use.certificates,
        frozen=prior_use.frozen,
        frozen_before_prompts=prior_use.frozen_before_prompts,
        uses=list(uses),
        statements=statements,
        prompts_certifying=len(prompts),
        prompts_digest=digest(sorted(prompts)),
    )
    logger.info("%s", certificate.text)
    tables = {
        "price_certificate": pl.DataFrame(rows, schema=_TABLE),
        "leakage_check_price": check.table(),
    }
    return PriceCalibration(certificate, tables)


def _condition(use: PriceUse) -> dict[str, str]:
    return {name: getattr(use, name) for name in CONDITION}


def _check_complete(
    runs: pl.DataFrame, prompts: Sequence[str], uses: Sequence[PriceUse], prices: Sequence[float]
) -> None:
    """Every prompt ran once under every use and price, and nothing else did."""
    expected = {
        (*_condition(use).values(), price, prompt)
        for use in uses
        for price in prices
        for prompt in prompts
    }
    rows = runs.select(*CONDITION, "harm_price", "prompt_id").rows()
    foreign = sorted({str(row[-1]) for row in rows} - set(prompts))
    if foreign:
        raise LeakageError(f"runs that certify hold {foreign[0]}, which is not to certify")
    if len(rows) != len(set(rows)) or set(rows) != expected:
        odd = sorted(set(rows) ^ expected, key=str) or sorted(rows, key=str)
        raise ValueError(
            f"{len(expected)} runs are to certify, found {len(rows)} of which "
            f"{len(set(rows))} differ; such as {odd[0]}"
        )


class Losses(NamedTuple):
    """(P,) mean losses of prices over ``units`` units, which hold ``requests`` requests."""

    means: Floats
    units: int
    requests: int


def price_losses(runs: pl.DataFrame, prices: Sequence[float]) -> Losses:
    """Mean over units of the share of their requests that went wrong, at each price.

    Args:
        runs: ``unit``, ``harm_price`` and ``wrong`` of the requests that a statement is about.
        prices: in the order of the result.
    """
    found = (
        runs.group_by("harm_price", "unit")
        .agg(loss=pl.col("wrong").mean(), requests=pl.len())
        .group_by("harm_price")
        .agg(pl.col("loss").mean(), units=pl.len(), requests=pl.col("requests").sum())
    )
    rows = {row["harm_price"]: row for row in found.to_dicts()}
    first = rows[prices[0]]
    means = np.array([rows[price]["loss"] for price in prices], np.float64)
    return Losses(means, first["units"], first["requests"])


def certified_prices(losses: Losses, level: float, delta: float) -> tuple[Floats, Bools]:
    """P-values (P,) of "more than ``level`` is harmed", and the prices that the sequence certifies.

    Args:
        losses: of the prices in the order of their tests.
        level: share of harmed requests.
        delta: bound on the chance that any certified price harms more.
    """
    single = losses.units == losses.requests
    values = p_values(losses.means, losses.units, level, single=single)
    return values, certify(values, np.arange(len(values)), delta)


def _sequence(
    runs: pl.DataFrame, prices: Sequence[float], level: float, delta: float
) -> list[PriceBound]:
    """The tests of one statement, in their order."""
    losses = price_losses(runs, prices)
    values, certified = certified_prices(losses, level, delta)
    single = losses.units == losses.requests
    at_zero = prompts_needed(0.0, level, delta, single=single)
    if at_zero is None:
        raise ValueError(f"certify_levels: {level:g} is too small to be certified")
    templated = bool((runs["unit"] != runs["prompt_id"]).any())
    return [
        PriceBound(
            harm_price=price,
            bound=Bound(
                risk="harm_left",
                alpha=level,
                delta=delta,
                unit="template" if templated else "prompt",
                units=losses.units,
                requests=losses.requests,
                observed=float(mean),
                p_value=float(value),
                certified=bool(sure),
                units_needed_at_zero=at_zero,
                units_needed=prompts_needed(float(mean), level, delta, single=single),
            ),
        )
        for price, mean, value, sure in zip(prices, losses.means, values, certified, strict=True)
    ]


def _rows(statement: PriceStatement, runs: pl.DataFrame) -> list[dict[str, object]]:
    """One row for each price; costs are means over requests."""
    use = statement.use
    scope = (
        {"press": None, "ratio": None}
        if use is None
        else {"press": use.press} | {"ratio": use.ratio}
    )
    rows = []
    for one in statement.prices:
        part = runs.filter(harm_price=one.harm_price)
        counts: dict[str, object] = part.select(
            pl.col("wrong").sum().alias("harmed"),
            pl.col("silent_harm").fill_null(False).sum().alias("silent"),
            pl.col("unknown").sum(),
            *(pl.col(name).mean() for name in _COSTS),
        ).row(0, named=True)
        lowest = one.harm_price == statement.certified_price
        rows.append(
            {"model": statement.model, **scope, "level": statement.level}
            | {"harm_price": one.harm_price, "lowest_certified": lowest}
            | one.bound.model_dump(exclude={"risk", "alpha"})
            | counts
        )
    return rows


_TABLE: dict[str, pl.DataType] = {
    "model": pl.String(),
    "press": pl.String(),  # null: all conditions mixed
    "ratio": pl.String(),
    "level": pl.Float64(),
    "harm_price": pl.Float64(),
    "certified": pl.Boolean(),
    "lowest_certified": pl.Boolean(),
    "observed": pl.Float64(),
    "p_value": pl.Float64(),
    "delta": pl.Float64(),
    "unit": pl.String(),
    "units": pl.Int64(),
    "requests": pl.Int64(),
    "harmed": pl.Int64(),  # unknown ones included
    "silent": pl.Int64(),
    "unknown": pl.Int64(),
    "units_needed_at_zero": pl.Int64(),
    "units_needed": pl.Int64(),
    **dict.fromkeys(_COSTS, pl.Float64()),
}

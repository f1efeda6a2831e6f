"""Metrics that a clock cannot win: does a score know which request goes wrong, and when?

Harm comes at typical positions, and a request that goes wrong is often long. A score that knows the
position alone therefore ranks tokens well, and knows nothing. Every metric here compares requests
after the same number of tokens, within one (model, press, ratio, task), so that a score of position
gets exactly 0.5; the mean over those conditions is reported. All are AUROCs: the chance that the
harmed one of a pair scores higher; ties count half.

- ``same_position``: at each position, requests whose onset lies within the horizon against those
  still at risk (incident/dynamic AUROC, Heagerty and Zheng 2005).
- ``request``: a harmed against an unharmed request, by the mean score of as many tokens as both
  have before the harmed one's onset. ``request_any_time``: by as many as both have at all, as for a
  check after the fact. ``request_worst_run``: as ``request``, by the worst run of 8 tokens.
- ``within_prompt``, ``within_prompt_any_time``: the same of pairs that share their prompt: harmed
  under one press and ratio, not under another. The prompt's difficulty does not help; knowing which
  of the two presses or ratios harms more does, in every score alike.

Each is also given as a paired difference from two scores that anyone has: ``clock_repetition``
(position, length and repetition alone) and ``mean_entropy``. Intervals resample prompts, or
templates where a task draws its prompts from them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import schema
from kvguard.metrics import (
    INTERVAL_TYPES,
    Bools,
    Floats,
    Measured,
    resample_weights,
    undefined,
    with_intervals,
)
from kvguard.rows import Rows, as_bools

Ints = NDArray[np.int64]

REFERENCES = ("clock_repetition", "mean_entropy")
"""What every score is compared with."""

NO_HEADLINE = ("any", "non_termination")
"""Targets whose onset is partly a proxy that position defines; they get no metric here."""

HARM_METRICS = (
    "same_position",
    "within_prompt",
    "request",
    "within_prompt_any_time",
    "request_any_time",
    "request_worst_run",
)
_RUN_TOKENS = 8


class Panel(NamedTuple):
    """The compressed requests of a sample that were judged for a target, one row each.

    Attributes:
        table: `schema.TRACE_KEYS`, ``task`` and ``unit`` (template or prompt).
        cells: (tokens,) index of each used token of the sample.
        place: (2, tokens) request and position of each of them.
        positive: (n, T) the onset lies within the horizon, and not before.
        at_risk: (n, T) the token is there, before the onset.
        harmed: (n,).
        onset: (n,) of harmed requests; may lie past the end.
        lengths: (n,) tokens.
        condition: (n,) code of (model, press, ratio, task).
        prompt: (n,) code of (model, prompt).
        unit: (n,) column of ``weights``.
        weights: (B, units) how often a unit was drawn.
    """

    table: pl.DataFrame
    cells: Ints
    place: Ints
    positive: Bools
    at_risk: Bools
    harmed: Bools
    onset: Ints
    lengths: Ints
    condition: Ints
    prompt: Ints
    unit: Ints
    weights: Floats

    def grid(self, scores: NDArray[np.floating[Any]]) -> Floats:
        """Scores (all tokens of the sample,) as (n, T); NaN where there is no token."""
        grid = np.full(self.at_risk.shape, np.nan)
        grid[self.place[0], self.place[1]] = np.asarray(scores, np.float64)[self.cells]
        return grid


def build_panel(rows: Rows, target: str, splits: pl.DataFrame, samples: int, seed: int) -> Panel:
    """Lay out the requests of a sample for `measure_panel`.

    Args:
        rows: all tokens of whole requests, sorted by `schema.TOKEN_KEYS`.
        target: whose onset makes a request harmed.
        splits: `schema.SPLITS`, for tasks and templates.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """
    judged = as_bools(rows.keys[f"hazard_{target}"].is_not_null())
    used = judged & rows.compressed()
    cells = np.flatnonzero(used)
    keys = rows.keys.filter(used).with_columns(
        onset=pl.col(f"steps_to_{target}") + pl.col("position")
    )
    table = keys.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        onset=pl.col("onset").first(), length=pl.len()
    )
    known = splits.select("prompt_id", "task", unit=pl.coalesce("template", "prompt_id"))
    table = table.join(known, on="prompt_id", how="left", maintain_order="left")
    lengths = table["length"].to_numpy().astype(np.int64)
    place = np.stack([np.repeat(np.arange(len(table)), lengths), keys["position"].to_numpy()])
    shape = (len(table), int(lengths.max(initial=1)))
    positive, at_risk = np.zeros((2, *shape), np.bool_)
    before = rows.before_onset(target)[cells]
    at_risk[place[0], place[1]] = before
    positive[place[0], place[1]] = before & rows.label(target)[cells]

    def codes(*columns: str) -> Ints:
        ids = table.select(pl.struct(pl.col(columns)).rank("dense"))
        return ids.to_series().to_numpy().astype(np.int64) - 1

    unit = codes("unit")
    count = int(unit.max(initial=-1)) + 1
    return Panel(
        table.select(*schema.TRACE_KEYS, "task", "unit"),
        cells,
        place.astype(np.int64),
        positive,
        at_risk,
        as_bools(table["onset"].is_not_null()),
        table["onset"].fill_null(-1).to_numpy().astype(np.int64),
        lengths,
        codes("model", "press", "ratio", "task"),
        codes("model", "prompt_id"),
        unit,
        resample_weights(count, samples, seed),
    )


Comparison = Callable[[int, Ints], tuple[Floats, Floats]]
"""(harmed request, other requests) -> concordant and all comparisons with each of them."""


def measure_panel(
    panel: Panel, scores: NDArray[np.floating[Any]], *, running: bool = False
) -> dict[str, dict[int, Measured]]:
    """Every metric of `HARM_METRICS` by condition code; conditions without a pair are absent.

    Args:
        panel: the requests.
        scores: (all tokens of the sample,) higher is riskier.
        running: a score is a mean over all tokens so far, and is not averaged again.
    """
    grid = panel.grid(scores)
    mean = grid if running else np.nancumsum(grid, axis=1) / np.arange(1, grid.shape[1] + 1)
    worst = np.maximum.accumulate(_run_means(grid), axis=1)

    def position(row: int, others: Ints) -> tuple[Floats, Floats]:
        at = np.flatnonzero(panel.positive[row])
        controls = panel.at_risk[np.ix_(others, at)] & ~panel.positive[np.ix_(others, at)]
        wins = _wins(grid[row, at], grid[np.ix_(others, at)])
        return (wins * controls).sum(axis=1), controls.sum(axis=1).astype(float)

    def after(running: Floats, *, before_onset: bool) -> Comparison:
        def compare(row: int, others: Ints) -> tuple[Floats, Floats]:
            seen = np.minimum(panel.lengths[row], panel.lengths[others])
            if before_onset:
                seen = np.minimum(seen, panel.onset[row])
            last = np.maximum(seen - 1, 0)
            wins = np.where(seen > 0, _wins(running[row, last], running[others, last]), 0.5)
            return wins, np.ones(len(others))

        return compare

    forecast, any_time = after(mean, before_onset=True), after(mean, before_onset=False)
    alike = {
        "same_position": (position, panel.condition),
        "within_prompt": (forecast, panel.prompt),
        "request": (forecast, panel.condition),
        "within_prompt_any_time": (any_time, panel.prompt),
        "request_any_time": (any_time, panel.condition),
        "request_worst_run": (after(worst, before_onset=True), panel.condition),
    }
    return {
        metric: _by_condition(panel, compare, stratum, dynamic=metric == "same_position")
        for metric, (compare, stratum) in alike.items()
    }


def _wins(one: Floats, others: Floats) -> Floats:
    return np.asarray((one > others) + 0.5 * (one == others), dtype=np.float64)


def _run_means(grid: Floats) -> Floats:
    """Mean of the last 8 scores up to each token; 0, below every risk, before there are 8."""
    total = np.cumsum(np.nan_to_num(grid), axis=1)
    runs = np.zeros_like(total)
    runs[:, _RUN_TOKENS - 1 :] = total[:, _RUN_TOKENS - 1 :]
    runs[:, _RUN_TOKENS:] -= total[:, :-_RUN_TOKENS]
    return runs / _RUN_TOKENS


def _by_condition(
    panel: Panel, compare: Comparison, stratum: Ints, *, dynamic: bool
) -> dict[int, Measured]:
    """AUROC over pairs of one stratum, by the condition of the harmed request."""
    size = panel.weights.shape[1]
    found: dict[int, Measured] = {}
    for condition in np.unique(panel.condition):
        top, bottom = np.zeros((2, size * size))
        harmed_units: set[int] = set()
        other_units: set[int] = set()
        for row in np.flatnonzero(panel.harmed & (panel.condition == condition)).tolist():
            rival = (stratum == stratum[row]) & (dynamic | ~panel.harmed)
            rival[row] = False
            others = np.flatnonzero(rival)
            if not len(others):
                continue
            wins, pairs = compare(row, others)
            cells = panel.unit[row] * size + panel.unit[others]
            top += np.bincount(cells, weights=wins, minlength=size * size)
            bottom += np.bincount(cells, weights=pairs, minlength=size * size)
            if pairs.any():
                harmed_units.add(int(panel.unit[row]))
                other_units |= set(panel.unit[others[pairs > 0]].tolist())
        if not bottom.any():
            continue
        concordant, pairs_ = top.reshape(size, size), bottom.reshape(size, size)
        seen = np.flatnonzero(pairs_.any(axis=0) | pairs_.any(axis=1))  # most units are elsewhere
        concordant, pairs_ = (cell[np.ix_(seen, seen)] for cell in (concordant, pairs_))
        weights = panel.weights[:, seen]
        drawn = [((weights @ cell) * weights).sum(axis=1) for cell in (concordant, pairs_)]
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates = np.where(drawn[1] > 0, drawn[0] / drawn[1], np.nan)
        units = min(len(harmed_units), len(other_units))
        found[int(condition)] = Measured(float(top.sum() / bottom.sum()), replicates, units)
    return found


def mean_over(panel: Panel, found: Mapping[int, Measured], conditions: Ints) -> Measured:
    """The mean of a metric over some conditions, each with the same weight."""
    chosen = [found[int(code)] for code in conditions if int(code) in found]
    if not chosen:
        return undefined(panel.weights)
    values = [each.value for each in chosen if each.value is not None]
    replicates = np.stack([each.replicates for each in chosen])
    known = np.isfinite(replicates)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, replicates, 0).sum(axis=0) / known.sum(axis=0)
    inside = np.isin(panel.condition, list(conditions))
    units = [len(np.unique(panel.unit[inside & part])) for part in (panel.harmed, ~panel.harmed)]
    return Measured(float(np.mean(values)), mean, min(units))


HARM_TYPES: dict[str, Any] = (
    dict.fromkeys(("metric", "target", "predictor", "task", "model", "press", "ratio"), pl.String)
    | INTERVAL_TYPES
    | {"compared_with": pl.String}
    | dict.fromkeys(("difference", "difference_low", "difference_high"), pl.Float64)
    | dict.fromkeys(("prompts", "requests", "harmed", "conditions"), pl.Int64)
)


def harm_table(panel: Panel, target: str, scores: Mapping[str, NDArray[Any]]) -> pl.DataFrame:
    """Every score's metrics, pooled and by task, press, and condition.

    Args:
        panel: the requests of the test prompts.
        target: what the scores forecast.
        scores: by predictor, (all tokens of the sample,); `REFERENCES` among them where trained.

    Returns:
        One row per metric, predictor, group and reference; ``difference`` is to the reference, over
        the same resamples. ``low`` and ``high`` hold for all rows of a metric together.
    """
    measured = {
        name: measure_panel(panel, values, running=name == "mean_entropy")
        for name, values in scores.items()
    }
    any_score = next(iter(measured.values()))
    rows: list[tuple[dict[str, Any], Measured]] = []
    for group, conditions in condition_groups(panel):
        inside = np.isin(panel.condition, conditions)
        size = {
            "prompts": panel.table.filter(inside)["prompt_id"].n_unique(),
            "requests": int(inside.sum()),
            "harmed": int((inside & panel.harmed).sum()),
        }
        for metric in HARM_METRICS:
            means = {
                name: mean_over(panel, found[metric], conditions)
                for name, found in measured.items()
            }
            counted = size | {"conditions": len(set(conditions.tolist()) & set(any_score[metric]))}
            for name, value in means.items():
                described = {"metric": metric, "target": target, "predictor": name} | group
                for reference in REFERENCES:
                    row: dict[str, Any] = described | {"compared_with": reference} | counted
                    row |= {"difference": None, "difference_low": None, "difference_high": None}
                    if reference in means and reference != name:
                        paired = value.minus(means[reference])
                        low, high = paired.interval()
                        row |= {"difference": paired.value}
                        row |= {"difference_low": low, "difference_high": high}
                    rows.append((row, value))
    finished = with_intervals(
        rows,
        lambda row: row["metric"],
        lambda row: (
            row["predictor"] == "hazard"
            and row["compared_with"] == REFERENCES[0]
            and not any(row[name] for name in ("task", "press"))
        ),
    )
    return pl.DataFrame(finished, schema=HARM_TYPES)


def condition_groups(panel: Panel) -> list[tuple[dict[str, str | None], Ints]]:
    """Groups of conditions, and the codes in each: all; each task, each press, each alone."""
    nothing: dict[str, str | None] = dict.fromkeys(("task", "model", "press", "ratio"))
    codes = panel.table.with_columns(code=pl.Series(panel.condition)).unique("code").sort("code")
    groups: list[tuple[dict[str, str | None], Ints]] = [(nothing, codes["code"].to_numpy())]
    for columns in (("task",), ("press",), ("task", "model", "press", "ratio")):
        for values, part in codes.sort(columns).group_by(columns, maintain_order=True):
            named = dict(zip(columns, map(_text, values), strict=True))
            groups.append((nothing | named, part["code"].to_numpy()))
    return groups


def _text(value: object) -> str | None:
    return None if value is None else str(value)

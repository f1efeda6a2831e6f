"""Curves of the predictors on test prompts: ROC, precision-recall, calibration."""

from typing import Any

import numpy as np
import polars as pl

from kvguard.metrics import Floats, Measured, Sample, share, tally_levels
from kvguard.predictor import Predictor
from kvguard.rows import Rows

CURVE_POINTS = 101
CALIBRATION_BINS = 10

CURVE_TYPES: dict[str, Any] = {
    "target": pl.String,
    "predictor": pl.String,
    "curve": pl.String,
    "x": pl.Float64,
    "y": pl.Float64,
    "y_low": pl.Float64,
    "y_high": pl.Float64,
    "score": pl.Float64,
    "score_low": pl.Float64,
    "score_high": pl.Float64,
}

_CURVE_SCORES = {"roc": "auroc", "precision_recall": "pr_auc", "calibration": "brier"}


def predictor_curves(
    candidates: dict[str, dict[str, Predictor]], test: Rows, weights: Floats, metrics: pl.DataFrame
) -> pl.DataFrame:
    """Curves over all compressed tokens before the onset; bands are pointwise, over prompts.

    Args:
        candidates: predictors by name, by target.
        test: tokens of the test prompts.
        weights: (B, prompts) bootstrap weights.
        metrics: ``predictor_metrics``, for the score in each curve's legend.
    """
    rows: list[dict[str, Any]] = []
    for target, models in candidates.items():
        part = test.take(test.before_onset(target) & test.compressed())
        codes = np.unique(test.keys["prompt_id"].to_numpy())
        prompts = np.searchsorted(codes, part.keys["prompt_id"].to_numpy())
        for name, model in models.items():
            scores = model.predict(part.features, part.press).astype(np.float64)
            sample = Sample(scores, part.label(target), prompts, weights)
            if not sample.ranks_something:
                continue
            points = _ranking_curves(sample) | {"calibration": _calibration_curve(sample)}
            pooled = metrics.filter(target=target, predictor=name, group_by="all")
            for curve, values in points.items():
                found = pooled.filter(metric=_CURVE_SCORES[curve]).row(0, named=True)
                described = {
                    "target": target,
                    "predictor": name,
                    "curve": curve,
                    "score": found["value"],
                    "score_low": found["low"],
                    "score_high": found["high"],
                }
                rows += [
                    described | dict(zip(("x", "y", "y_low", "y_high"), point, strict=True))
                    for point in values
                ]
    return pl.DataFrame(rows, schema=CURVE_TYPES)


Point = tuple[float, float | None, float | None, float | None]


def _ranking_curves(sample: Sample) -> dict[str, list[Point]]:
    """ROC (recall at false-alarm rates) and precision-recall (precision at recalls)."""
    grid = np.linspace(0, 1, CURVE_POINTS)
    levels = tally_levels(sample)
    both = (
        _read_curves(levels.exact_positive, levels.exact_negative, grid),
        _read_curves(levels.positive, levels.negative, grid),
    )
    curves: dict[str, list[Point]] = {}
    for index, curve in enumerate(("roc", "precision_recall")):
        value, replicates = both[0][index][0], both[1][index]
        points: list[Point] = []
        for at, x in enumerate(grid):
            measured = Measured(float(value[at]), replicates[:, at], sample.units)
            points.append((float(x), measured.value, *measured.interval()))
        curves[curve] = points
    return curves


def _read_curves(positive: Floats, negative: Floats, grid: Floats) -> tuple[Floats, Floats]:
    """Recall at each false-alarm rate and precision at each recall: (B, points) each."""
    caught = np.cumsum(positive[:, ::-1], axis=1)
    false = np.cumsum(negative[:, ::-1], axis=1)
    roc = np.full((len(caught), len(grid)), np.nan)
    precision = np.full((len(caught), len(grid)), np.nan)
    for row in range(len(caught)):
        if caught[row, -1] == 0 or false[row, -1] == 0:
            continue
        recall, rate = caught[row] / caught[row, -1], false[row] / false[row, -1]
        roc[row] = np.interp(grid, np.r_[0, rate], np.r_[0, recall])
        purity = caught[row] / np.maximum(caught[row] + false[row], 1e-300)
        reached = np.searchsorted(recall, grid, side="left").clip(0, len(recall) - 1)
        precision[row] = purity[reached]
    return roc, precision


def _calibration_curve(sample: Sample) -> list[Point]:
    """Observed share of positives against the mean prediction, in bins of equal size."""
    order = np.argsort(sample.scores, kind="stable")
    points: list[Point] = []
    for part in np.array_split(order, min(CALIBRATION_BINS, len(order))):
        measured = share(sample.labels[part], sample.prompts[part], sample.weights)
        points.append((float(sample.scores[part].mean()), measured.value, *measured.interval()))
    return points

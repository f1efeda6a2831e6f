"""Figures of the predictor: curves before the onset, and when alarms come."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kvguard.plot_style import (
    FAINT,
    GREY,
    INK,
    LineEnd,
    PressStyle,
    floats,
    in_order,
    label_ends,
    need,
    press_styles,
    styled,
    target_label,
)

# --- predictor -----------------------------------------------------------------------------------

_PREDICTORS = {
    "hazard": ("hazard predictor", INK, "-", 1.6),
    "logistic": ("logistic regression", GREY, "--", 1.1),
    "entropy": ("entropy alone", "#8C8C8C", "-.", 1.1),
    "position": ("position alone", "#8C8C8C", ":", 1.1),
}


@styled
def plot_predictor(curves: pl.DataFrame) -> Figure:
    """ROC, precision-recall and calibration curves before onset, on test prompts, per target.

    Args:
        curves: one row per point: ``target``, ``predictor`` (a key of `_PREDICTORS`),
            ``curve`` ("roc", "precision_recall", "calibration"), ``x``, ``y``, ``y_low``,
            ``y_high`` (bootstrap over prompts; null where there is none), and for the legend
            ``score``, ``score_low``, ``score_high`` (AUROC, PR-AUC, Brier score), constant along a
            curve. ROC: x false-alarm rate, y recall. PR: x recall, y precision. Calibration: x
            predicted, y observed.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    columns = ["target", "predictor", "curve", "x", "y", "y_low", "y_high"]
    need(curves, [*columns, "score", "score_low", "score_high"], "predictor")
    kinds = {
        "roc": ("false-alarm rate", "recall", "AUROC"),
        "precision_recall": ("recall", "precision", "PR-AUC"),
        "calibration": ("predicted hazard", "observed", "Brier"),
    }
    targets = in_order(curves["target"])
    figure = Figure(figsize=(1.6 * len(targets) + 0.5, 5.2), layout="constrained")
    grid = figure.subplots(len(kinds), len(targets), squeeze=False)
    for row, (kind, (xlabel, ylabel, score_name)) in enumerate(kinds.items()):
        for axes, target in zip(grid[row], targets, strict=True):
            of_panel = curves.filter((pl.col("curve") == kind) & (pl.col("target") == target))
            texts = []
            for name, (_, colour, ls, lw) in _PREDICTORS.items():
                line = of_panel.filter(pl.col("predictor") == name).drop_nulls(["x", "y"])
                line = line.sort("x", maintain_order=True)
                if line.is_empty():
                    continue
                x, y = line["x"].to_numpy(), line["y"].to_numpy()
                marker = "o" if kind == "calibration" else None
                axes.plot(x, y, color=colour, ls=ls, lw=lw, marker=marker, ms=2.5, label=name)
                if name == "hazard":
                    band = line.drop_nulls(["y_low", "y_high"])
                    low, high = band["y_low"].to_numpy(), band["y_high"].to_numpy()
                    axes.fill_between(band["x"].to_numpy(), low, high, color=FAINT, lw=0, zorder=0)
                texts.append((_score_text(line.row(0, named=True)), colour))
            if of_panel.is_empty():
                axes.text(0.5, 0.5, "undefined", ha="center", color=GREY)
            if kind != "precision_recall":
                axes.plot([0, 1], [0, 1], color=GREY, lw=0.6, ls=":")
            at_top = kind == "precision_recall"
            for index, (text, colour) in enumerate(texts):
                axes.text(
                    0.97,
                    0.97 - 0.1 * index if at_top else 0.04 + 0.1 * (len(texts) - 1 - index),
                    f"{score_name} {text}" if index == 0 else text,
                    ha="right",
                    va="top" if at_top else "bottom",
                    fontsize=5.8,
                    color=colour,
                    transform=axes.transAxes,
                    bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.6},
                )
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=xlabel)
            axes.set_aspect("equal")
            axes.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
            axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
            if row == 0:
                axes.set_title(target_label(target))
        grid[row][0].set_ylabel(ylabel)
    handles = [
        Line2D([], [], color=colour, ls=ls, lw=lw, label=label)
        for label, colour, ls, lw in _PREDICTORS.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _score_text(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return "undefined"
    if row["score_low"] is None or row["score_high"] is None:
        return f"{row['score']:.2f}"
    return f"{row['score']:.2f} [{row['score_low']:.2f}, {row['score_high']:.2f}]"


# --- when alarms come ----------------------------------------------------------------------------


@styled
def plot_lead_time(alarms: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """How early alarms come: lead time before the onset, and delay after the first rejected token.

    Both are cumulative shares of all harmed requests, so a curve ends at the share that ever
    alarmed; bands are 95 % Dvoretzky-Kiefer-Wolfowitz bounds.

    Args:
        alarms: one row per harmed test request and target: ``target``, ``press``,
            ``lead_time_tokens`` (onset minus first alarm; negative: after the onset; null: no
            alarm) and ``detection_delay_tokens`` (first alarm minus first rejected token; null: no
            alarm, or nothing was rejected).
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    columns = ["target", "press", "lead_time_tokens", "detection_delay_tokens"]
    need(alarms, columns, "lead_time")
    styles = press_styles([*presses, *alarms["press"]])
    targets = in_order(alarms["target"])
    figure = Figure(figsize=(6.4, 1.75 * len(targets) + 0.7), layout="constrained")
    grid = figure.subplots(len(targets), 2, squeeze=False, sharex="col", sharey=True)
    grid[0][0].set_ylim(-0.03, 1.03)
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    labels: list[tuple[Axes, list[LineEnd]]] = []
    for (lead, delay), target in zip(grid, targets, strict=True):
        of_target = alarms.filter(pl.col("target") == target)
        ends = []
        for press in in_order(of_target["press"], styles):
            rows = of_target.filter(pl.col("press") == press)
            # an alarm t tokens ahead counts for every lead up to t: read from early to late
            _distribution(lead, -floats(rows["lead_time_tokens"]), styles[press])
            end = _distribution(delay, floats(rows["detection_delay_tokens"]), styles[press])
            name = f"{styles[press].label} ({rows.height})"
            ends.append((*end, name, styles[press].colour))
        labels.append((delay, ends))
        lead.axvline(0, color=GREY, lw=0.8, ls=":")
        lead.set_ylabel(f"{target_label(target)}\nshare alarmed by then")
        for axes in (lead, delay):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y")
    lead.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{0 - value:g}"))
    grid[0][0].set_title("lead time")
    grid[0][1].set_title("time to detection")
    lead.set_xlabel("tokens before the onset")
    delay.set_xlabel("tokens after the first rejected token")
    for axes, ends in labels:
        label_ends(axes, ends)
    return figure


def _distribution(
    axes: Axes, values: NDArray[np.float64], style: PressStyle
) -> tuple[float, float]:
    """Draw a cumulative share of all values, NaN counting as never; return the line's end.

    Without any value there is no line, and the end's x is NaN.
    """
    count, known = len(values), np.sort(values[np.isfinite(values)])
    if not len(known):
        return math.nan, 0.0
    x = np.concatenate([[known[0]], known])
    y = np.arange(len(known) + 1) / count
    reach = math.sqrt(math.log(2 / 0.05) / (2 * count))
    low, high = np.clip(y - reach, 0, 1), np.clip(y + reach, 0, 1)
    axes.step(x, y, where="post", color=style.colour, label=style.label)
    axes.fill_between(x, low, high, step="post", color=style.colour, alpha=0.12, lw=0)
    return float(x[-1]), float(y[-1])

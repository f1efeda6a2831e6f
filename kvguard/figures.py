"""One function a figure: a tidy frame in, a matplotlib Figure out; `save_figure` writes both files.

A function states the columns that it needs; a frame without them, or without rows, raises
`MissingData`. Nothing is computed here that a table should hold: rates, intervals and curves arrive
as columns, ``<metric>``, ``<metric>_low`` and ``<metric>_high``; an undefined value is null and
leaves a gap. Every press has one colour and one marker in all figures; pass the experiment's
``presses`` so that a figure that shows only some of them agrees with the rest.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from kvguard.config import BASELINE, OperatingPoint
from kvguard.schema import atomic_path

STYLE_FILE = Path(__file__).parents[1] / "reports" / "kvguard.mplstyle"
"""The plot style; every figure is made and saved under it."""

INK, GREY, FAINT, ACCENT = "#202020", "#707070", "#DADADA", "#AA3377"
"""Text and main line; secondary line; bands; rejected tokens and limits."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")

_WELL_KNOWN = {
    "snapkv": "SnapKV",
    "streaming_llm": "StreamingLLM",
    "expected_attention": "Expected attention",
    "observed_attention": "Observed attention",
    "knorm": "Knorm",
    "tova": "TOVA",
    "pyramidkv": "PyramidKV",
    "keydiff": "KeyDiff",
}

MODES = ("NORMAL", "ALERT", "SAFE")
MODE_COLOURS = ("#E8E8E8", "#EECC66", "#6699CC")
"""In the order of `controller.Mode`: 0, 1, 2."""

KINDS = {
    "looping": "looping",
    "non_termination": "no end",
    "amnesia": "amnesia",
    "divergence": "divergence",
    "disagreement": "another answer",
}
"""Kinds of failure and their titles; they overlap: a loop rarely ends."""

_RELATIVE = ("agreement", "disagreement", "amnesia", "divergence")
"""Metrics that compare with the uncompressed run, whose own value is known without an interval."""

P = ParamSpec("P")

LineEnd = tuple[float, float, str, str]
"""Where a line ends (x, y of the data), the name that it gets there, and its colour."""


class MissingData(ValueError):
    """A frame that lacks columns or rows that a figure needs."""


class PressStyle(NamedTuple):
    """How one press looks in every figure."""

    label: str
    colour: str
    marker: str


def press_styles(presses: Iterable[str]) -> dict[str, PressStyle]:
    """Colours and markers by press, the baseline first; independent of the order given.

    Well-known presses keep their own colour; others take free ones in alphabetical order. After
    eight presses colours repeat with other markers.
    """
    names = set(presses) - {BASELINE}
    known = list(_WELL_KNOWN)
    slots = {name: index for index, name in enumerate(known) if name in names}
    free = [index for index in range(len(_COLOURS)) if index not in slots.values()]
    for index, name in enumerate(sorted(names - set(known))):
        slots[name] = free[index] if index < len(free) else len(_COLOURS) + index - len(free)
    styles = {BASELINE: PressStyle("uncompressed", INK, "*")}
    for name, slot in slots.items():
        colour, marker = _COLOURS[slot % len(_COLOURS)], _MARKERS[slot % len(_MARKERS)]
        styles[name] = PressStyle(_WELL_KNOWN.get(name, name), colour, marker)
    return styles


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write ``stem``.pdf and ``stem``.png, each all or nothing, without dates in them.

    Args:
        figure: what a function of this module returned.
        stem: path without suffix; its folder is made.
    """
    stem = Path(stem)
    pdf, png = stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.png")
    without_dates: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None},
        "png": {"Software": None},
    }
    with matplotlib.rc_context(fname=STYLE_FILE):
        for target in (pdf, png):
            suffix = target.suffix[1:]
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=suffix, metadata=without_dates[suffix])
    return pdf, png


def _styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(fname=STYLE_FILE):
            return function(*args, **kwargs)

    return drawn


# --- rates by press and ratio --------------------------------------------------------------------


@_styled
def plot_rates(summary: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Accuracy, agreement with the uncompressed answer, and CFR against the ratio, by press.

    Accuracy and agreement: higher is better; CFR, the share of requests with a catastrophe: lower.

    Args:
        summary: one row per (model, press, ratio): ``requests`` and, for each of ``accuracy``,
            ``agreement`` and ``cfr``, the share and its Wilson interval. The press "none" becomes
            the band.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    titles = {
        "accuracy": "accuracy",
        "agreement": "agrees with uncompressed",
        "cfr": "catastrophic failure rate",
    }
    return _rates_by_ratio(summary, titles, presses, "rates")


@_styled
def plot_failure_kinds(summary: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Share of requests with each kind of failure against the ratio, by press; lower is better.

    The kinds overlap, so they are panels and not parts of a stack.

    Args:
        summary: one row per (model, press, ratio): ``requests`` and, for each of `KINDS`, the share
            and its Wilson interval.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    return _rates_by_ratio(summary, KINDS, presses, "failure_kinds", width=1.55)


def _rates_by_ratio(
    summary: pl.DataFrame,
    titles: Mapping[str, str],
    presses: Sequence[str],
    name: str,
    width: float = 2.1,
) -> Figure:
    intervals = [f"{metric}{end}" for metric in titles for end in ("", "_low", "_high")]
    _need(summary, ["model", "press", "ratio", "requests", *intervals], name)
    styles = press_styles([*presses, *summary["press"]])
    models = _in_order(summary["model"])
    figure = Figure(
        figsize=(width * len(titles) + 1.4, 1.75 * len(models) + 0.45), layout="constrained"
    )
    grid = figure.subplots(len(models), len(titles), squeeze=False, sharex=True, sharey=True)
    shown = _in_order(summary.filter(pl.col("press") != BASELINE)["press"], styles)
    ticks = sorted({float(r) for r in summary.filter(pl.col("press") != BASELINE)["ratio"]})
    labels: list[tuple[Axes, list[LineEnd]]] = []
    top = grid[0][0]
    top.set_ylim(-0.03, 1.03)
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    if ticks:
        margin = 0.06 + 0.008 * len(shown)
        top.set_xlim(ticks[0] - margin, ticks[-1] + margin)
        top.xaxis.set_major_locator(FixedLocator(_spaced(ticks, 0.2 / width)))
        top.xaxis.set_minor_locator(FixedLocator(ticks))
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for row, model in enumerate(models):
        of_model = summary.filter(pl.col("model") == model)
        for axes, (metric, title) in zip(grid[row], titles.items(), strict=True):
            ends = _baseline_band(axes, of_model, metric)
            for index, press in enumerate(shown):
                lines = of_model.filter(pl.col("press") == press).drop_nulls(metric)
                lines = lines.with_columns(x=pl.col("ratio").cast(pl.Float64)).sort("x")
                if lines.is_empty():
                    continue
                dodge = (index - (len(shown) - 1) / 2) * 0.012
                x = lines["x"].to_numpy() + dodge
                _interval_line(axes, x, lines, metric, styles[press])
                ends.append((x[-1], lines[metric][-1], styles[press].label, styles[press].colour))
            if not ends:
                axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", color=GREY)
            if row == 0:
                axes.set_title(title)
            axes.grid(axis="y")
        grid[row][0].set_ylabel(
            f"{model}\nshare of requests" if len(models) > 1 else "share of requests"
        )
        labels.append((grid[row][-1], ends))
    figure.supxlabel(
        f"share of cache entries removed   ({_count_text(summary['requests'])} requests a point, "
        "95 % Wilson intervals)",
        fontsize=7.5,
        color=INK,
    )
    for axes, ends in labels:
        _label_ends(axes, ends)
    return figure


def _baseline_band(axes: Axes, rows: pl.DataFrame, metric: str) -> list[LineEnd]:
    """Draw the uncompressed rate, and its interval where it has one; return where to name it."""
    baseline = rows.filter(pl.col("press") == BASELINE).drop_nulls(metric)
    for entry in baseline.to_dicts():
        if metric not in _RELATIVE:
            band = entry[f"{metric}_low"], entry[f"{metric}_high"]
            axes.axhspan(*band, color=FAINT, lw=0, alpha=0.6)
        axes.axhline(entry[metric], color=GREY, lw=0.9, ls=(0, (4, 2)))
    right = axes.get_xlim()[1]
    return [(right, entry[metric], "uncompressed", GREY) for entry in baseline.to_dicts()]


def _interval_line(
    axes: Axes, x: NDArray[np.float64], rows: pl.DataFrame, metric: str, style: PressStyle
) -> None:
    y = rows[metric].to_numpy()
    low, high = rows[f"{metric}_low"].to_numpy(), rows[f"{metric}_high"].to_numpy()
    axes.errorbar(
        x,
        y,
        yerr=_reach(y, low, high),
        color=style.colour,
        marker=style.marker,
        label=style.label,
        elinewidth=0.9,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


# --- excess failures, paired ---------------------------------------------------------------------


@_styled
def plot_excess(excess: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Excess CFR and excess error of each press and ratio, paired with the uncompressed run.

    Excess: the share of prompts, under compression minus without; above 0 is compression's harm.

    Args:
        excess: one row per (model, press, ratio): ``prompts``, and ``excess_cfr`` and
            ``excess_error`` with their paired intervals.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    metrics = {"excess_cfr": "catastrophes", "excess_error": "wrong answers"}
    intervals = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    _need(excess, ["model", "press", "ratio", "prompts", *intervals], "excess")
    excess = excess.filter(pl.col("press") != BASELINE)
    _need(excess, [], "excess")
    styles = press_styles([*presses, *excess["press"]])
    models = _in_order(excess["model"])
    keys = sorted(
        set(zip(excess["press"], excess["ratio"], strict=True)),
        key=lambda key: (list(styles).index(key[0]), key[1]),
    )
    places = _grouped_places([press for press, _ in keys])
    figure = Figure(
        figsize=(2.5 * len(models) + 1.9, 0.19 * places[-1] + 1.3), layout="constrained"
    )
    grid = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for axes, model in zip(grid, models, strict=True):
        of_model = {
            (row["press"], row["ratio"]): row
            for row in excess.filter(pl.col("model") == model).iter_rows(named=True)
        }
        for key, place in zip(keys, places, strict=True):
            for metric, shift, filled in (
                ("excess_cfr", -0.14, True),
                ("excess_error", 0.2, False),
            ):
                row = of_model.get(key)
                if row is not None:
                    _horizontal_interval(axes, row, metric, place + shift, styles[key[0]], filled)
        axes.axvline(0, color=GREY, lw=0.9)
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(model)
    grid[0].set_yticks(
        places, [f"{styles[press].label}  {float(ratio):g}" for press, ratio in keys]
    )
    for label, (press, _) in zip(grid[0].get_yticklabels(), keys, strict=True):
        label.set_color(styles[press].colour)
    grid[0].set_ylim(places[-1] + 0.7, places[0] - 0.7)
    handles = [
        Line2D([], [], color=GREY, marker="o", ls="-", label=metrics["excess_cfr"]),
        Line2D([], [], color=GREY, marker="o", ls="-", mfc="white", label=metrics["excess_error"]),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    figure.supxlabel(
        "share of requests, compressed minus uncompressed\n"
        f"({_count_text(excess['prompts'])} prompts, paired; 95 % intervals)",
        fontsize=7.5,
        color=INK,
    )
    return figure


def _horizontal_interval(
    axes: Axes,
    row: Mapping[str, Any],
    metric: str,
    place: float,
    style: PressStyle,
    filled: bool = True,
    size: float | None = None,
    scale: float = 1.0,
) -> None:
    """One dot with its interval at the height ``place``; nothing where the value is null."""
    value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return
    reach = None if low is None or high is None else scale * _reach(value, low, high)
    axes.errorbar(
        [scale * value],
        [place],
        xerr=reach,
        color=style.colour,
        marker=style.marker,
        mfc=style.colour if filled else "white",
        mec=style.colour,
        ms=size,
        elinewidth=0.9,
        ls="none",
        label=metric,
    )


# --- one trace -----------------------------------------------------------------------------------


@_styled
def plot_trace(
    tokens: pl.DataFrame,
    *,
    press: str,
    title: str,
    marks: Mapping[str, int | None],
    thresholds: tuple[float, float],
    presses: Sequence[str] = (),
) -> Figure:
    """One answer as a timeline: its text, entropy, hazard, controller mode and LLR.

    Args:
        tokens: one row per generated token: ``position``, ``token_text``, ``entropy`` (nats),
            ``hazard`` (probability), ``mode`` (0, 1, 2 as in `MODES`), ``llr`` (nats; positive:
            compression likes the token more) and ``audit_is_argmax``. Null: not known.
        press: whose colour the lines take.
        title: e.g. press, ratio and what went wrong.
        marks: name to position, e.g. {"first rejected": 6, "looping": 40}; None is left out.
        thresholds: (tau_low, tau_high) of the controller.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    columns = ["position", "token_text", "entropy", "hazard", "mode", "llr", "audit_is_argmax"]
    _need(tokens, columns, "trace")
    tokens = tokens.sort("position")
    colour = press_styles([*presses, press])[press].colour
    position = tokens["position"].to_numpy().astype(float)
    slot_inches, widest = 0.084, 11.0
    per_label = max(1, math.ceil(len(position) * slot_inches / (widest - 1.3)))
    width = min(max(len(position) * slot_inches / per_label + 1.3, 6.5), widest)
    figure = Figure(figsize=(width, 4.3), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[1.0, 1.0, 0.16, 1.0])
    entropy, hazard, mode, llr = panels

    entropy.plot(position, _floats(tokens["entropy"]), color=colour, lw=1)
    entropy.set_ylabel("entropy\n(nats)")
    entropy.set_ylim(bottom=0)

    hazard.plot(position, _floats(tokens["hazard"]), color=colour, lw=1)
    for threshold, name, ls in zip(thresholds, ("low", "high"), (":", "--"), strict=True):
        hazard.axhline(threshold, color=GREY, lw=0.8, ls=ls)
        _beside(hazard, threshold, rf"$\tau_{{\rm {name}}}$", GREY)
    hazard.set_ylim(-0.03, 1.03)
    hazard.set_ylabel("hazard")

    for start, stop, value in _runs(tokens["mode"]):
        mode.axvspan(start - 0.5, stop - 0.5, color=MODE_COLOURS[value], lw=0)
    mode.set_yticks([])
    mode.set_ylabel("mode", rotation=0, ha="right", va="center")
    mode.spines[:].set_visible(False)
    mode.legend(
        handles=[Patch(color=c, label=m) for m, c in zip(MODES, MODE_COLOURS, strict=True)],
        loc="center left",
        bbox_to_anchor=(1.005, 0.5),
        fontsize=5.5,
        handlelength=0.8,
        labelspacing=0.15,
    )

    values = _floats(tokens["llr"])
    rejected = (~tokens["audit_is_argmax"].fill_null(True)).to_numpy()
    llr.vlines(position, 0, values, color=np.where(rejected, ACCENT, GREY), lw=1.4)
    llr.axhline(0, color=INK, lw=0.6)
    llr.set_ylabel("LLR\n(nats)")
    if rejected.any():
        _beside(llr, 0.0, "rejected by\nuncompressed", ACCENT)
    for axes, column, reason in (
        (hazard, "hazard", "no predictor"),
        (mode, "mode", "no controller"),
        (llr, "llr", "not audited"),
    ):
        if tokens[column].is_null().all():
            axes.set_yticks([])
            axes.text(
                0.5, 0.75, reason, transform=axes.transAxes, ha="center", va="center", color=GREY
            )
    for axes in (entropy, hazard, mode):
        axes.tick_params(bottom=False)

    texts = tokens["token_text"].to_list()
    starts = range(0, len(texts), per_label)
    llr.set_xticks(position[::per_label])
    llr.set_xticklabels(
        [_printable("".join(texts[start : start + per_label])) for start in starts],
        rotation=90,
        fontsize=5.5,
        family="monospace",
        parse_math=False,
    )
    for label, start in zip(llr.get_xticklabels(), starts, strict=True):
        label.set_color(
            ACCENT if per_label < 3 and rejected[start : start + per_label].any() else INK
        )
    llr.set_xlim(position[0] - 0.8, position[-1] + 0.8)
    known = {name: place for name, place in marks.items() if place is not None}
    for axes in panels:
        for place in known.values():
            axes.axvline(place, color=INK, lw=0.8, ls=(0, (2, 1.5)))
    levels = _label_levels(list(known.values()), [len(name) for name in known], position, width)
    for (name, place), level in zip(known.items(), levels, strict=True):
        near_end = place > position[0] + 0.85 * (position[-1] - position[0])
        entropy.annotate(
            name,
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-2 if near_end else 2, 2 + 8 * level),
            textcoords="offset points",
            ha="right" if near_end else "left",
            fontsize=6.5,
            color=INK,
        )
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=8.5, parse_math=False)
    return figure


def _label_levels(
    places: Sequence[int], lengths: Sequence[int], position: NDArray[np.float64], width: float
) -> list[int]:
    """Line above the axes for each label, so that labels that would touch stand on each other."""
    inches = (width - 1.3) / max(position[-1] - position[0], 1)
    taken: list[float] = []
    levels = [0] * len(places)
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        start = places[index] * inches
        level = next((at for at, end in enumerate(taken) if end <= start), len(taken))
        end = start + 0.058 * lengths[index] + 0.08
        taken[level : level + 1] = [end]
        levels[index] = level
    return levels


def _printable(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "→").strip() or "␣"
    return text if len(text) <= 16 else f"{text[:15]}…"


def _runs(values: pl.Series) -> list[tuple[int, int, int]]:
    """(start, stop, value) of each stretch of equal, known values; positions from 0."""
    runs = pl.DataFrame({"value": values}).with_row_index("at")
    runs = runs.with_columns(run=pl.col("value").rle_id()).drop_nulls("value")
    spans = runs.group_by("run", maintain_order=True).agg(
        start=pl.col("at").min(), stop=pl.col("at").max() + 1, value=pl.col("value").first()
    )
    return list(spans.select("start", "stop", "value").iter_rows())


# --- predictor -----------------------------------------------------------------------------------

_PREDICTORS = {
    "hazard": ("hazard predictor", INK, "-", 1.6),
    "logistic": ("logistic regression", GREY, "--", 1.1),
    "entropy": ("entropy alone", "#8C8C8C", "-.", 1.1),
    "position": ("position alone", "#8C8C8C", ":", 1.1),
}


@_styled
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
    _need(curves, [*columns, "score", "score_low", "score_high"], "predictor")
    kinds = {
        "roc": ("false-alarm rate", "recall", "AUROC"),
        "precision_recall": ("recall", "precision", "PR-AUC"),
        "calibration": ("predicted hazard", "observed", "Brier"),
    }
    targets = _in_order(curves["target"])
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
                axes.set_title(_target_label(target))
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


@_styled
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
    _need(alarms, columns, "lead_time")
    styles = press_styles([*presses, *alarms["press"]])
    targets = _in_order(alarms["target"])
    figure = Figure(figsize=(6.4, 1.75 * len(targets) + 0.7), layout="constrained")
    grid = figure.subplots(len(targets), 2, squeeze=False, sharex="col", sharey=True)
    grid[0][0].set_ylim(-0.03, 1.03)
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    labels: list[tuple[Axes, list[LineEnd]]] = []
    for (lead, delay), target in zip(grid, targets, strict=True):
        of_target = alarms.filter(pl.col("target") == target)
        ends = []
        for press in _in_order(of_target["press"], styles):
            rows = of_target.filter(pl.col("press") == press)
            # an alarm t tokens ahead counts for every lead up to t: read from early to late
            _distribution(lead, -_floats(rows["lead_time_tokens"]), styles[press])
            end = _distribution(delay, _floats(rows["detection_delay_tokens"]), styles[press])
            name = f"{styles[press].label} ({rows.height})"
            ends.append((*end, name, styles[press].colour))
        labels.append((delay, ends))
        lead.axvline(0, color=GREY, lw=0.8, ls=":")
        lead.set_ylabel(f"{_target_label(target)}\nshare alarmed by then")
        for axes in (lead, delay):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y")
    lead.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{0 - value:g}"))
    grid[0][0].set_title("lead time")
    grid[0][1].set_title("time to detection")
    lead.set_xlabel("tokens before the onset")
    delay.set_xlabel("tokens after the first rejected token")
    for axes, ends in labels:
        _label_ends(axes, ends)
    return figure


def _target_label(target: str) -> str:
    return "any catastrophe" if target == "any" else KINDS.get(target, target)


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


# --- sensitivity to the definitions --------------------------------------------------------------


_PARAMETERS = {
    "amnesia_llr": "amnesia: mean LLR (nats)",
    "amnesia_window_tokens": "amnesia: window (tokens)",
    "loop_window_tokens": "looping: window (tokens)",
    "loop_repeats": "looping: occurrences",
    "divergence_llr": "divergence: mean LLR (nats)",
    "divergence_window_tokens": "divergence: window (tokens)",
}

_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (1, 2)), (0, (5, 1, 1, 1, 1, 1)))


@_styled
def plot_sensitivity(sensitivity: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """CFR against each parameter of the definitions, the others at their configured values.

    Args:
        sensitivity: one row per (parameter, value, model, press, ratio): ``parameter`` (a field of
            `config.Detection`), ``value``, ``configured`` (is it the config's value?), and ``cfr``
            with its Wilson interval.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    columns = ["parameter", "value", "configured", "model", "press", "ratio"]
    _need(sensitivity, [*columns, "cfr", "cfr_low", "cfr_high"], "sensitivity")
    styles = press_styles([*presses, *sensitivity["press"]])
    parameters, models = _in_order(sensitivity["parameter"]), _in_order(sensitivity["model"])
    ratios = sorted(set(sensitivity.filter(pl.col("press") != BASELINE)["ratio"]))
    dashes = {ratio: _DASHES[index % len(_DASHES)] for index, ratio in enumerate(ratios)}
    figure = Figure(
        figsize=(2.0 * len(parameters) + 1.6, 2.1 * len(models) + 0.4), layout="constrained"
    )
    grid = figure.subplots(len(models), len(parameters), squeeze=False, sharex="col", sharey=True)
    grid[0][0].set_ylim(-0.03, 1.03)
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for column, parameter in enumerate(parameters):
        of_parameter = sensitivity.filter(pl.col("parameter") == parameter)
        values = sorted(set(of_parameter["value"]))
        for row, model in enumerate(models):
            axes = grid[row][column]
            of_panel = of_parameter.filter(pl.col("model") == model)
            groups = of_panel.drop_nulls("cfr").sort("value").group_by("press", "ratio")
            for (press, ratio), line in sorted(groups, key=lambda group: str(group[0])):
                style, dash = styles[str(press)], dashes.get(str(ratio), "-")
                x = line["value"].to_numpy()
                y, low, high = (line[f"cfr{end}"].to_numpy() for end in ("", "_low", "_high"))
                axes.plot(x, y, color=style.colour, ls=dash, marker=style.marker, ms=3, lw=1)
                axes.fill_between(x, low, high, color=style.colour, alpha=0.07, lw=0)
            for value in of_panel.filter("configured")["value"].unique():
                axes.axvline(value, color=GREY, lw=0.8, ls=":")
            axes.grid(axis="y")
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(_PARAMETERS.get(parameter, parameter.replace("_", " ")))
    for row, model in enumerate(models):
        grid[row][0].set_ylabel(f"{model}\nCFR")
    used = _in_order(sensitivity["press"], styles)
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, ms=3, label=style.label)
        for style in map(styles.__getitem__, used)
    ]
    handles += [
        Line2D([], [], color=GREY, ls=dash, label=f"ratio {float(ratio):g}")
        for ratio, dash in dashes.items()
    ]
    handles.append(Line2D([], [], color=INK, lw=0.8, ls=":", label="configured value"))
    figure.legend(handles=handles, loc="outside right center")
    return figure


# --- memory over time ----------------------------------------------------------------------------


@_styled
def plot_memory(steps: pl.DataFrame, *, title: str) -> Figure:
    """KV memory of one request over its decode steps, under several policies.

    Args:
        steps: one row per (policy, step): ``policy``, ``step`` (decode steps since the prefill),
            ``kv_bytes`` (allocated for the row at that step) and ``mode`` (0, 1, 2 as in `MODES`;
            null: the policy has none). The first policy that has modes shades the background.
        title: names the request.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    _need(steps, ["policy", "step", "kv_bytes", "mode"], "memory")
    largest = float(_floats(steps["kv_bytes"]).max())
    unit, scale = ("MiB", 2**20) if largest >= 2**20 else ("KiB", 2**10)
    policies = sorted(set(steps["policy"]), key=_policy_order)
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    axes = figure.subplots()
    ends: list[LineEnd] = []
    shaded = ""
    for index, policy in enumerate(policies):
        rows = steps.filter(pl.col("policy") == policy).sort("step")
        x, y = rows["step"].to_numpy(), rows["kv_bytes"].to_numpy() / scale
        style = _policy_style(policy)
        dash = _DASHES[index % len(_DASHES)]
        axes.step(x, y, where="post", color=style.colour, ls=dash, lw=1.2)
        ends.append((float(x[-1]), float(y[-1]), style.label, style.colour))
        if not shaded and rows["mode"].is_not_null().any():
            shaded = style.label
            for start, stop, value in _runs(rows["mode"]):
                if value:
                    bounds = float(x[start]), float(x[min(stop, len(x) - 1)])
                    axes.axvspan(*bounds, color=MODE_COLOURS[value], alpha=0.35, lw=0)
    axes.set(xlabel="decode steps", ylabel=f"KV cache ({unit})")
    axes.set_ylim(0, 1.12 * largest / scale)
    axes.set_title(title, parse_math=False)
    axes.grid(axis="y")
    if shaded:
        handles = [
            Patch(color=MODE_COLOURS[at], alpha=0.35, label=f"{shaded} in {MODES[at]}")
            for at in sorted(set(steps["mode"].drop_nulls()) - {0})
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    _label_ends(axes, ends)
    return figure


# --- policies ------------------------------------------------------------------------------------

_POLICY_LABELS = {
    "none": "compression alone",
    "always_safe": "always safe",
    "random": "random",
    "entropy": "entropy",
    "ergo": "ERGO",
    "ngram_stop": "n-gram stop",
    "loopguard": "LoopGuard",
    "periodic_refresh": "periodic refresh",
    "verify_all": "verify all",
    "constant": "constant ratio",
    "guard_relax_only": "guard: relax only",
    "guard_recompute": "guard: recompute",
    "guard_restart": "guard: restart",
    "guard_rewind": "guard: rewind",
    "guard_rewind_tolerant": "guard: rewind, tolerant",
    "guard_rewind_resume": "guard: rewind, resume",
    "guard_gate": "guard: gate",
}

POLICY_METRICS = {
    "excess_cfr": ("excess CFR", "share"),
    "excess_error": ("excess error", "share"),
    "alarmed": ("requests alarmed", "share"),
    "kv_bytes_mean": ("KV memory (MiB)", "mebibytes"),
    "prefilled_tokens": ("tokens prefilled", "count"),
    "wasted_tokens": ("tokens wasted", "count"),
}
"""Benefit and cost of a policy, per request: columns of the policy tables, title, unit."""

_UNITS = {"share": 1.0, "mebibytes": 2.0**-20, "count": 1.0}


class PolicyStyle(NamedTuple):
    """How one policy looks; the guard's own are in ink, its rivals in grey."""

    label: str
    colour: str
    marker: str


def _policy_style(policy: str) -> PolicyStyle:
    names = list(_POLICY_LABELS)
    index = names.index(policy) if policy in names else len(names)
    colour = INK if policy.startswith("guard") else GREY
    return PolicyStyle(_POLICY_LABELS.get(policy, policy), colour, _MARKERS[index % len(_MARKERS)])


def _policy_order(policy: str) -> tuple[int, str]:
    names = list(_POLICY_LABELS)
    return (names.index(policy) if policy in names else len(names), policy)


@_styled
def plot_policies(policies: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Benefit and cost of every policy in the live experiment, as dots with intervals.

    Args:
        policies: one row per (policy, model, press, ratio), all of one source: ``requests`` and,
            each with its interval, `POLICY_METRICS`, as `compare_policies.summarize_runs` gives
            them. Lower is better in all of them.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    intervals = [f"{metric}{end}" for metric in POLICY_METRICS for end in ("", "_low", "_high")]
    _need(policies, ["policy", "model", "press", "ratio", "requests", *intervals], "policies")
    styles = press_styles([*presses, *policies["press"]])
    names = sorted(set(policies["policy"]), key=_policy_order)
    models = _in_order(policies["model"])
    keys = sorted(
        set(zip(policies["press"], policies["ratio"], strict=True)),
        key=lambda key: (list(styles).index(key[0]), key[1]),
    )
    ratios = sorted({ratio for _, ratio in keys})
    height = max(0.2, 0.055 * min(len(keys), 8) + 0.03 * max(len(keys) - 8, 0) + 0.08) * len(names)
    figure = Figure(
        figsize=(1.45 * len(POLICY_METRICS) + 1.5, height * len(models) + 1.1),
        layout="constrained",
    )
    grid = figure.subplots(
        len(models), len(POLICY_METRICS), squeeze=False, sharex="col", sharey=True
    )
    for row, model in enumerate(models):
        of_model = policies.filter(pl.col("model") == model).to_dicts()
        for axes, (metric, (title, unit)) in zip(grid[row], POLICY_METRICS.items(), strict=True):
            for entry in of_model:
                at = keys.index((entry["press"], entry["ratio"]))
                place = names.index(entry["policy"]) + 0.72 * ((at + 0.5) / len(keys) - 0.5)
                size = _ratio_size(ratios, entry["ratio"])
                style = styles[entry["press"]]
                _horizontal_interval(axes, entry, metric, place, style, True, size, _UNITS[unit])
            for between in range(1, len(names)):
                axes.axhline(between - 0.5, color=FAINT, lw=0.5)
            if unit == "share":
                axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.axvline(0, color=GREY, lw=0.7)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
            if row == 0:
                axes.set_title(title, fontsize=7.5)
        if len(models) > 1:
            grid[row][0].set_ylabel(model)
    grid[0][0].set_yticks(range(len(names)), [_policy_style(name).label for name in names])
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    for row in range(len(models)):
        for label, name in zip(grid[row][0].get_yticklabels(), names, strict=True):
            label.set_color(_policy_style(name).colour)
    figure.legend(handles=_condition_handles(keys, styles), loc="outside upper right", ncols=8)
    figure.supxlabel(
        f"per request, {_count_text(policies['requests'])} requests a point, 95 % intervals",
        fontsize=7.5,
        color=INK,
    )
    return figure


def _ratio_size(ratios: Sequence[str], ratio: str) -> float:
    """Marker size: the higher the ratio, the larger."""
    return 2.4 + 2.2 * (ratios.index(ratio) + 1) / len(ratios)


def _condition_handles(
    keys: Sequence[tuple[str, str]], styles: Mapping[str, PressStyle]
) -> list[Line2D]:
    """Legend entries for presses (colour, marker) and ratios (marker size)."""
    ratios = sorted({ratio for _, ratio in keys})
    shown = [styles[press] for press in styles if press in {press for press, _ in keys}]
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, ls="none", label=style.label)
        for style in shown
    ]
    for ratio in ratios:
        size, label = _ratio_size(ratios, ratio), f"ratio {float(ratio):g}"
        handles.append(Line2D([], [], color=GREY, marker="o", ms=size, ls="none", label=label))
    return handles


@_styled
def plot_pareto(
    pareto: pl.DataFrame,
    *,
    cost: str,
    operating_points: Mapping[str, OperatingPoint],
    presses: Sequence[str] = (),
) -> Figure:
    """Harm left over against one cost: every setting of the guard, and its rivals.

    Lower left is better. The guard's settings are dots in the press's colour, and a line joins
    those that no other setting beats in both; its operating points are named. Intervals are drawn
    for operating points and rivals.

    Args:
        pareto: `compare_policies.pareto`: one row per (model, press, ratio, policy), and for the
            guard's grid per setting (``tau_low``, ``tau_high``, ``k``, ``j``; null: no grid), with
            the cost and ``excess_cfr`` with its interval. Rows whose harm is null are left out.
        cost: a key of `POLICY_METRICS`: "kv_bytes_mean" or "prefilled_tokens".
        operating_points: settings by name.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    title, unit = POLICY_METRICS[cost]
    harm = ("excess_cfr", "excess_cfr_low", "excess_cfr_high")
    settings = ("tau_low", "tau_high", "k", "j")
    _need(pareto, ["model", "press", "ratio", "policy", *settings, cost, *harm], "pareto")
    ran = set(pareto.select("model", "press", "ratio").iter_rows())
    pareto = pareto.drop_nulls(["excess_cfr", cost]).filter(pl.col("press") != BASELINE)
    _need(pareto, [], "pareto")
    pareto = pareto.with_columns(pl.col(cost) * _UNITS[unit])
    styles = press_styles([*presses, *pareto["press"]])
    models = _in_order(pareto["model"])
    lines = [(model, press) for model in models for press in _in_order(pareto["press"], styles)]
    ratios = sorted(set(pareto["ratio"]))
    rivals = sorted(set(pareto.filter(pl.col("tau_low").is_null())["policy"]), key=_policy_order)
    height = max(1.75 * len(lines), 0.155 * len(rivals) + 0.4) + 0.4
    figure = Figure(figsize=(1.9 * len(ratios) + 1.9, height), layout="constrained")
    grid = figure.subplots(len(lines), len(ratios), squeeze=False, sharex="row", sharey="row")
    labels: list[tuple[Axes, list[LineEnd]]] = []
    for row, (model, press) in enumerate(lines):
        for axes, ratio in zip(grid[row], ratios, strict=True):
            here = pareto.filter(
                (pl.col("model") == model) & (pl.col("press") == press) & (pl.col("ratio") == ratio)
            )
            if here.is_empty():
                word = "unknown" if (model, press, ratio) in ran else "not run"
                axes.text(0.5, 0.5, word, transform=axes.transAxes, ha="center", color=GREY)
            colour = styles[press].colour
            tried = here.filter(pl.col("tau_low").is_not_null())
            x, y = tried[cost].to_numpy(), tried["excess_cfr"].to_numpy()
            axes.plot(x, y, ".", ms=3, color=colour, alpha=0.35, mew=0)
            if tried.height:
                axes.step(*_front(x, y), where="post", color=colour, lw=0.8)
            for entry in here.filter(pl.col("tau_low").is_null()).to_dicts():
                style = _policy_style(entry["policy"])
                _vertical_interval(axes, entry, cost, style.colour, style.marker)
            names = []
            for name, point in operating_points.items():
                chosen = tried.filter(
                    [pl.col(field) == getattr(point, field) for field in settings]
                )
                for entry in chosen.to_dicts():
                    _vertical_interval(axes, entry, cost, colour, styles[press].marker)
                    names.append((entry[cost], entry["excess_cfr"], name, colour))
            labels.append((axes, names))
            axes.axhline(0, color=GREY, lw=0.7)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
            axes.margins(x=0.12, y=0.1)
            if row == 0:
                axes.set_title(f"ratio {float(ratio):g}")
        low, high = grid[row][0].get_ylim()  # shared: known once the whole row is drawn
        grid[row][0].set_ylim(min(low, -0.05), max(high, 0.05))
        of_model = f"{model}\n" if len(models) > 1 else ""
        grid[row][0].set_ylabel(f"{of_model}{styles[press].label}\nexcess CFR")
    figure.supxlabel(f"{title} per request", fontsize=8)
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, ls="none", label=style.label)
        for style in map(_policy_style, rivals)
    ]
    handles.append(Line2D([], [], color=INK, lw=0.8, marker=".", ms=3, label="guard's settings"))
    figure.legend(handles=handles, loc="outside right center")
    for axes, names in labels:
        _label_points(axes, names)
    return figure


def _vertical_interval(
    axes: Axes, row: Mapping[str, Any], cost: str, colour: str, marker: str
) -> None:
    """A policy's dot at (cost, excess CFR) with the interval of its excess CFR."""
    value, low, high = (row[f"excess_cfr{end}"] for end in ("", "_low", "_high"))
    axes.errorbar(
        [row[cost]],
        [value],
        yerr=None if low is None or high is None else _reach(value, low, high),
        color=colour,
        marker=marker,
        ms=4,
        elinewidth=0.6,
        ls="none",
        label=row["policy"],
    )


def _front(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points that no other point beats in both coordinates, by rising x; lower is better."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    best = np.minimum.accumulate(y)
    keep = np.concatenate([[True], best[1:] < best[:-1]])
    return x[keep], y[keep]


def _label_points(axes: Axes, points: Sequence[LineEnd]) -> None:
    """Name points (x, y, text, colour) beside them, where the name meets the fewest other things.

    Greedy: each label in turn takes the best of a few places around its point.
    """
    figure = axes.get_figure(root=True)
    if not points or figure is None:
        return
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    at = axes.transData.transform([(x, y) for x, y, _, _ in points]) * scale  # (n, 2) in pt
    frame = np.asarray(axes.get_window_extent().extents) * scale
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at]
    places = [(dx, dy, "left") for dx in (5,) for dy in (0, 7, -7, 14, -14, 21, -21)]
    places += [(-dx, dy, "right") for dx, dy, _ in places]
    for (x, y), (data_x, data_y, text, colour) in zip(at, points, strict=True):
        width = 3.4 * len(text)
        best: tuple[float, tuple[int, int, str], tuple[float, float, float, float]] | None = None
        for dx, dy, side in places:
            left = x + dx - (width if side == "right" else 0)
            box = (left, y + dy - 3.5, left + width, y + dy + 3.5)
            outside = max(frame[0] - box[0], box[2] - frame[2], box[3] - frame[3], 0)
            cost = sum(_overlap(box, other) for other in taken) + 8 * outside + abs(dy) / 2
            if best is None or cost < best[0]:
                best = cost, (dx, dy, side), box
        assert best is not None
        _, (dx, dy, side), box = best
        taken.append(box)
        axes.annotate(
            text,
            (data_x, data_y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=6,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2}
            if dy
            else None,
        )


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(tall, 0)


@_styled
def plot_simulation_gap(summary: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """What the offline simulation says of each policy against what the live run measured.

    On the diagonal the simulation is right; the largest gaps of a panel are named.

    Args:
        summary: `compare_policies.summarize_runs` of both sources: one row per (policy, model,
            press, ratio, ``source``), source "live" or "simulation", with `POLICY_METRICS` and
            their intervals. A measure that is null in either source has no point.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or no policy is in both sources.
    """
    keys = ["policy", "model", "press", "ratio"]
    intervals = [f"{metric}{end}" for metric in POLICY_METRICS for end in ("", "_low", "_high")]
    _need(summary, [*keys, "source", *intervals], "simulation_gap")
    live, simulated = (
        summary.filter((pl.col("source") == source) & (pl.col("press") != BASELINE)).select(
            *keys, *intervals
        )
        for source in ("live", "simulation")
    )
    pairs = live.join(simulated, on=keys, suffix="_simulated", maintain_order="left")
    _need(pairs, [], "simulation_gap")
    styles = press_styles([*presses, *pairs["press"]])
    conditions = sorted(set(zip(pairs["press"], pairs["ratio"], strict=True)))
    ratios = sorted({ratio for _, ratio in conditions})
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    grid = figure.subplots(2, len(POLICY_METRICS) // 2, squeeze=False)
    labels: list[tuple[Axes, list[LineEnd]]] = []
    for axes, (metric, (title, unit)) in zip(grid.flat, POLICY_METRICS.items(), strict=True):
        axes.set(title=title, xlabel="simulation", ylabel="live")
        of_panel = pairs.drop_nulls([metric, f"{metric}_simulated"])
        of_panel = of_panel.with_columns(pl.col(f"^{metric}(_.*)?$") * _UNITS[unit])
        if of_panel.is_empty():
            axes.text(0.5, 0.5, "not simulated", transform=axes.transAxes, ha="center", color=GREY)
            axes.set(xticks=[], yticks=[])
            continue
        for entry in of_panel.to_dicts():
            style, size = styles[entry["press"]], _ratio_size(ratios, entry["ratio"])
            x, y = entry[f"{metric}_simulated"], entry[metric]
            axes.plot([x], [y], style.marker, color=style.colour, ms=size, mec="white", mew=0.4)
            bars = {}
            for name, value, end in (("yerr", y, ""), ("xerr", x, "_simulated")):
                low, high = entry[f"{metric}_low{end}"], entry[f"{metric}_high{end}"]
                bars[name] = None if low is None or high is None else _reach(value, low, high)
            axes.errorbar(
                [x],
                [y],
                **bars,
                color=style.colour,
                alpha=0.35,
                elinewidth=0.5,
                ls="none",
                zorder=0,
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.axline((0, 0), slope=1, color=GREY, lw=0.7, ls=":")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            if unit == "share":
                axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        apart = (pl.col(metric) - pl.col(f"{metric}_simulated")).abs()
        span = of_panel.select(pl.max_horizontal(metric, f"{metric}_simulated")).max().item()
        largest = of_panel.filter(apart > 0.02 * abs(span)).sort(apart, descending=True).head(3)
        names = [
            (entry[f"{metric}_simulated"], entry[metric], _policy_style(entry["policy"]).label, INK)
            for entry in largest.to_dicts()
        ]
        labels.append((axes, names))
    handles = _condition_handles(conditions, styles)
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    for axes, names in labels:
        _label_points(axes, names)
    return figure


# --- shared --------------------------------------------------------------------------------------


def _need(frame: pl.DataFrame, columns: Iterable[str], figure: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise MissingData(
            f"figure {figure!r} needs column {', '.join(map(repr, missing))}; the table has "
            f"{', '.join(frame.columns) or 'none'}"
        )
    if frame.is_empty():
        raise MissingData(f"figure {figure!r} needs at least one row; the table is empty")


def _in_order(values: pl.Series, order: Iterable[str] = ()) -> list[str]:
    """Distinct values: in the given order, or as they first appear."""
    distinct = values.unique(maintain_order=True).to_list()
    ranks = {name: rank for rank, name in enumerate(order)}
    return sorted(distinct, key=lambda name: ranks[name]) if ranks else distinct


def _floats(values: pl.Series) -> NDArray[np.float64]:
    """Values as float64, null as NaN."""
    return values.cast(pl.Float64).fill_null(math.nan).to_numpy()


def _reach(y: Any, low: Any, high: Any) -> NDArray[np.float64]:
    """Error bars (2, n) below and above y; rounding may put y a hair outside its interval."""
    below, above = np.atleast_1d(np.subtract(y, low)), np.atleast_1d(np.subtract(high, y))
    return np.maximum(np.array([below, above], dtype=np.float64), 0)


def _count_text(counts: pl.Series) -> str:
    distinct = sorted(set(counts))
    return " to ".join(map(str, dict.fromkeys((distinct[0], distinct[-1]))))


def _grouped_places(groups: Sequence[str]) -> list[float]:
    """Places 0, 1, ... with a gap of a half where the group changes."""
    places = [0.0]
    for previous, current in itertools.pairwise(groups):
        places.append(places[-1] + (1.0 if previous == current else 1.5))
    return places


def _spaced(ticks: Sequence[float], least: float) -> list[float]:
    """Ticks at least that far apart, the last one always kept."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or kept[-1] - tick >= least:
            kept.append(tick)
    return kept[::-1]


def _beside(axes: Axes, y: float, text: str, colour: str) -> None:
    """Text right of the axes at the height y of the data."""
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=6,
        color=colour,
        annotation_clip=False,
    )


def _label_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Name lines right of the axes at their ends, spread so that no names overlap.

    An end whose x is NaN gets its name at its height, without a leader to it.
    """
    if not ends:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides how tall the axes are
    points = axes.get_window_extent().height / figure.dpi * 72
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    order = sorted(ends, key=lambda end: (end[1], end[2]))
    wanted = np.array([to_fraction((0, y))[1] for _, y, _, _ in order])
    leader = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, colour), height in zip(order, _spread(wanted, 8.5 / points), strict=True):
        nowhere = math.isnan(x)
        axes.annotate(
            text,
            (1, height) if nowhere else (x, y),
            xycoords="axes fraction" if nowhere else "data",
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=6.5,
            color=colour,
            arrowprops=None if nowhere else leader | {"color": colour},
            annotation_clip=False,
        )


def _spread(wanted: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Heights in ascending order, at least ``gap`` apart, as near the wanted ones as that allows.

    Least squares under the order is isotonic regression once each height's own gap is taken off.
    """
    steps = gap * np.arange(len(wanted))
    return np.asarray(isotonic_regression(wanted - steps).x + steps)

"""Figures of failures: rates, kinds, excess over the uncompressed run, definitions, one answer."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kvguard.config import BASELINE, OperatingPoint
from kvguard.plot_style import (
    ACCENT,
    DASHES,
    FAINT,
    GREY,
    INK,
    KINDS,
    MODE_COLOURS,
    MODES,
    LineEnd,
    PressStyle,
    beside,
    count_text,
    floats,
    grouped_places,
    horizontal_interval,
    in_order,
    interval_reach,
    label_ends,
    need,
    press_styles,
    spaced,
    stretches,
    styled,
)
from kvguard.schema import TRACE_KEYS
from kvguard.timeline import choose_example

_RELATIVE = ("agreement", "disagreement", "amnesia", "divergence")
"""Metrics that compare with the uncompressed run, whose own value is known without an interval."""


# --- rates by press and ratio --------------------------------------------------------------------


@styled
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


@styled
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
    need(summary, ["model", "press", "ratio", "requests", *intervals], name)
    styles = press_styles([*presses, *summary["press"]])
    models = in_order(summary["model"])
    figure = Figure(
        figsize=(width * len(titles) + 1.4, 1.75 * len(models) + 0.45), layout="constrained"
    )
    grid = figure.subplots(len(models), len(titles), squeeze=False, sharex=True, sharey=True)
    shown = in_order(summary.filter(pl.col("press") != BASELINE)["press"], styles)
    ticks = sorted({float(r) for r in summary.filter(pl.col("press") != BASELINE)["ratio"]})
    labels: list[tuple[Axes, list[LineEnd]]] = []
    top = grid[0][0]
    top.set_ylim(-0.03, 1.03)
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    if ticks:
        margin = 0.06 + 0.008 * len(shown)
        top.set_xlim(ticks[0] - margin, ticks[-1] + margin)
        top.xaxis.set_major_locator(FixedLocator(spaced(ticks, 0.2 / width)))
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
        f"share of cache entries removed   ({count_text(summary['requests'])} requests a point, "
        "95 % Wilson intervals)",
        fontsize=7.5,
        color=INK,
    )
    for axes, ends in labels:
        label_ends(axes, ends)
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
        yerr=interval_reach(y, low, high),
        color=style.colour,
        marker=style.marker,
        label=style.label,
        elinewidth=0.9,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


# --- excess failures, paired ---------------------------------------------------------------------


@styled
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
    need(excess, ["model", "press", "ratio", "prompts", *intervals], "excess")
    excess = excess.filter(pl.col("press") != BASELINE)
    need(excess, [], "excess")
    styles = press_styles([*presses, *excess["press"]])
    models = in_order(excess["model"])
    keys = sorted(
        set(zip(excess["press"], excess["ratio"], strict=True)),
        key=lambda key: (list(styles).index(key[0]), key[1]),
    )
    places = grouped_places([press for press, _ in keys])
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
                    horizontal_interval(axes, row, metric, place + shift, styles[key[0]], filled)
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
        f"({count_text(excess['prompts'])} prompts, paired; 95 % intervals)",
        fontsize=7.5,
        color=INK,
    )
    return figure


# --- one trace -----------------------------------------------------------------------------------


@styled
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
        press: gives the lines their colour.
        title: e.g. press, ratio and what went wrong.
        marks: name to position, e.g. {"first rejected": 6, "looping": 40}; None is left out.
        thresholds: (tau_low, tau_high) of the controller.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    columns = ["position", "token_text", "entropy", "hazard", "mode", "llr", "audit_is_argmax"]
    need(tokens, columns, "trace")
    tokens = tokens.sort("position")
    colour = press_styles([*presses, press])[press].colour
    position = tokens["position"].to_numpy().astype(float)
    slot_inches, widest = 0.084, 11.0
    per_label = max(1, math.ceil(len(position) * slot_inches / (widest - 1.3)))
    width = min(max(len(position) * slot_inches / per_label + 1.3, 6.5), widest)
    figure = Figure(figsize=(width, 4.3), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[1.0, 1.0, 0.16, 1.0])
    entropy, hazard, mode, llr = panels

    entropy.plot(position, floats(tokens["entropy"]), color=colour, lw=1)
    entropy.set_ylabel("entropy\n(nats)")
    entropy.set_ylim(bottom=0)

    hazard.plot(position, floats(tokens["hazard"]), color=colour, lw=1)
    close = abs(thresholds[1] - thresholds[0]) < 0.08  # two labels would overlap
    names = (None, "low, high") if close else ("low", "high")
    for threshold, name, ls in zip(thresholds, names, (":", "--"), strict=True):
        hazard.axhline(threshold, color=GREY, lw=0.8, ls=ls)
        if name is not None:
            beside(hazard, threshold, rf"$\tau_{{\rm {name}}}$", GREY)
    hazard.set_ylim(-0.03, 1.03)
    hazard.set_ylabel("hazard")

    for start, stop, value in stretches(tokens["mode"]):
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

    values = floats(tokens["llr"])
    rejected = (~tokens["audit_is_argmax"].fill_null(True)).to_numpy()
    llr.vlines(position, 0, values, color=np.where(rejected, ACCENT, GREY), lw=1.4)
    llr.axhline(0, color=INK, lw=0.6)
    llr.set_ylabel("LLR\n(nats)")
    if rejected.any():
        beside(llr, 0.0, "rejected by\nuncompressed", ACCENT)
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


def plot_example(
    timeline: pl.DataFrame,
    outcomes: pl.DataFrame,
    splits: pl.DataFrame,
    *,
    operating_point: OperatingPoint,
    presses: Sequence[str] = (),
) -> Figure:
    """The test request that best shows a failure and the guard's warning, drawn by `plot_trace`.

    Args:
        timeline: `timeline.build_timeline`.
        outcomes: `schema.OUTCOMES`.
        splits: `schema.SPLITS`: of other prompts the predictor has seen the outcomes.
        operating_point: whose modes the timeline holds.
        presses: all presses of the experiment, for stable colours.
    """
    test = splits.filter(split="test").select("prompt_id")
    keys = choose_example(timeline.join(test, on="prompt_id", how="semi"), outcomes)
    chosen = [pl.col(key) == keys[key] for key in TRACE_KEYS]
    outcome = outcomes.filter(chosen).row(0, named=True)
    kinds = [kind for kind in ("looping", "non_termination", "amnesia") if outcome[kind]]
    marks: dict[str, int | None] = {"first rejected": outcome["first_rejected"]}
    marks |= {kind.replace("_", " "): outcome[f"{kind}_onset"] for kind in kinds}
    return plot_trace(
        timeline.filter(chosen),
        press=keys["press"],
        title=f"{keys['model']}, {keys['press']} {keys['ratio']}, prompt {keys['prompt_id']}",
        marks=marks,
        thresholds=(operating_point.tau_low, operating_point.tau_high),
        presses=presses,
    )


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


# --- sensitivity to the definitions --------------------------------------------------------------


_PARAMETERS = {
    "amnesia_llr": "amnesia: mean LLR (nats)",
    "amnesia_window_tokens": "amnesia: window (tokens)",
    "loop_window_tokens": "looping: window (tokens)",
    "loop_repeats": "looping: occurrences",
    "divergence_llr": "divergence: mean LLR (nats)",
    "divergence_window_tokens": "divergence: window (tokens)",
}


@styled
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
    need(sensitivity, [*columns, "cfr", "cfr_low", "cfr_high"], "sensitivity")
    styles = press_styles([*presses, *sensitivity["press"]])
    parameters, models = in_order(sensitivity["parameter"]), in_order(sensitivity["model"])
    ratios = sorted(set(sensitivity.filter(pl.col("press") != BASELINE)["ratio"]))
    dashes = {ratio: DASHES[index % len(DASHES)] for index, ratio in enumerate(ratios)}
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
    used = in_order(sensitivity["press"], styles)
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

"""Figures of harm: where compression causes it, what undoing it costs, what predicts it, and what
is certified about it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kvguard.certificate import upper_bound
from kvguard.config import BASELINE
from kvguard.plot_style import (
    DASHES,
    FAINT,
    GREY,
    INK,
    LineEnd,
    PressStyle,
    condition_label,
    conditions_in_order,
    floats,
    grouped_places,
    horizontal_interval,
    in_order,
    interval_reach,
    label_points,
    need,
    policy_order,
    policy_style,
    press_styles,
    styled,
)

HARM_COLUMNS = tuple(
    f"{metric}{end}" for metric in ("harmed", "silent_harm") for end in ("", "_low", "_high")
)


@styled
def plot_harm(harm: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Harmed requests of each condition, by task: all of them, and silent ones.

    Harmed: the uncompressed answer is right and the compressed one wrong. Silent: harmed, ended by
    itself, no loop. Both are shares of requests; lower is better.

    Args:
        harm: one row per (task, model, press, ratio): ``requests``, ``baseline_right`` (requests
            that the uncompressed model answers rightly; null where the task has no right answer)
            and ``harmed`` and ``silent_harm`` with their intervals.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no compressed rows.
    """
    columns = ["task", "model", "press", "ratio", "requests", "baseline_right", *HARM_COLUMNS]
    need(harm, columns, "harm")
    harm = harm.filter(pl.col("press") != BASELINE)
    need(harm, [], "harm")
    styles = press_styles([*presses, *harm["press"]])
    keys = conditions_in_order(harm, styles)
    places = grouped_places([press for press, _ in keys])
    tasks, models = in_order(harm["task"]), in_order(harm["model"])
    height = 0.2 * places[-1] + 0.75
    figure = Figure(
        figsize=(1.75 * len(tasks) + 1.7, height * len(models) + 0.7), layout="constrained"
    )
    grid = figure.subplots(len(models), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, model in enumerate(models):
        for axes, task in zip(grid[row], tasks, strict=True):
            of_panel = harm.filter(model=model, task=task)
            entries = {(entry["press"], entry["ratio"]): entry for entry in of_panel.to_dicts()}
            for key, place in zip(keys, places, strict=True):
                if key in entries:
                    entry, style = entries[key], styles[key[0]]
                    horizontal_interval(axes, entry, "harmed", place - 0.14, style)
                    horizontal_interval(axes, entry, "silent_harm", place + 0.2, style, False)
            axes.set_title(f"{task}\n{_right_of(of_panel)}", fontsize=7.5)
            axes.grid(axis="x")
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_major_locator(MaxNLocator(3))
        if len(models) > 1:
            grid[row][0].set_ylabel(model)
    grid[0][0].set_yticks(places, [condition_label(key, styles) for key in keys])
    for row in range(len(models)):
        for label, (press, _) in zip(grid[row][0].get_yticklabels(), keys, strict=True):
            label.set_color(styles[press].colour)
    grid[0][0].set_ylim(places[-1] + 0.7, places[0] - 0.7)
    handles = [
        Line2D([], [], color=GREY, marker="o", ls="-", label="harmed"),
        Line2D([], [], color=GREY, marker="o", ls="-", mfc="white", label="silently"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    figure.supxlabel("share of requests (95 % intervals)", fontsize=7.5, color=INK)
    return figure


def _right_of(rows: pl.DataFrame) -> str:
    """How many requests the uncompressed model answers rightly, of how many."""
    entries = rows.drop_nulls("baseline_right").sort("requests", descending=True).to_dicts()
    if not entries:
        return "no right answers"
    return f"{entries[0]['baseline_right']} of {entries[0]['requests']} right uncompressed"


@styled
def plot_harm_metrics(metrics: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """How much better the predictor ranks harm than a clock with a loop detector, or entropy.

    Differences of AUROC, paired by prompt; above 0 the predictor is better, and an interval that
    includes 0 shows no difference.

    Args:
        metrics: `harm_metrics.harm_table`, of which the rows of the hazard predictor for the target
            "harm" are drawn, all conditions together and each press; where the run has no such
            target, its first. ``difference`` is to ``compared_with`` (a key of `COMPARED`).
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    needed = ["metric", "target", "predictor", "task", "press", "ratio", "compared_with"]
    needed += [f"difference{end}" for end in ("", "_low", "_high")]
    need(metrics, needed, "harm_metrics")
    metrics = metrics.filter(pl.col("predictor") == "hazard", pl.col("task").is_null())
    targets = in_order(metrics["target"])
    metrics = metrics.filter(target="harm" if "harm" in targets else next(iter(targets), "harm"))
    need(metrics, [], "harm_metrics")
    pooled = PressStyle("all conditions", INK, "D")
    styles = press_styles([*presses, *metrics["press"].drop_nulls()])
    found = set(metrics["press"].drop_nulls())
    keys: list[str | None] = [None, *(press for press in styles if press in found)]
    places = [0.0, *(1.3 + index for index in range(len(keys) - 1))]
    shown = [name for name in HARM_METRICS if name in set(metrics["metric"])]
    need(metrics.filter(pl.col("metric").is_in(shown)), [], "harm_metrics")
    height = max(0.24 * places[-1] + 1.25, 1.7)
    figure = Figure(figsize=(1.9 * len(shown) + 1.9, height), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    for axes, metric in zip(grid, shown, strict=True):
        of_metric = metrics.filter(metric=metric)
        for key, place in zip(keys, places, strict=True):
            here = of_metric.filter(
                pl.col("press").eq_missing(pl.lit(key, pl.String)), pl.col("ratio").is_null()
            )
            style = pooled if key is None else styles[key]
            for entry in here.to_dicts():
                filled = entry["compared_with"] == "clock_repetition"
                shift = -0.16 if filled else 0.18
                horizontal_interval(axes, entry, "difference", place + shift, style, filled)
        axes.axvline(0, color=GREY, lw=0.9)
        axes.grid(axis="x")
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -1), min(right, 1))  # no difference of two AUROCs lies beyond
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(HARM_METRICS[metric], fontsize=7.5)
    labels = ["all conditions" if key is None else styles[key].label for key in keys]
    grid[0].set_yticks(places, labels)
    for label, key in zip(grid[0].get_yticklabels(), keys, strict=True):
        label.set_color(INK if key is None else styles[key].colour)
    grid[0].set_ylim(places[-1] + 0.7, places[0] - 0.7)
    handles = [
        Line2D(
            [],
            [],
            color=GREY,
            marker="o",
            ls="-",
            mfc=GREY if name == "clock_repetition" else "white",
            label=label,
        )
        for name, label in COMPARED.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    figure.supxlabel("difference of AUROC, paired by prompt (95 % intervals)", fontsize=7.5)
    return figure


HARM_METRICS = {
    "same_position": "same position,\nsame condition",
    "within_prompt": "same prompt,\nother condition",
    "request": "whole requests,\nequally many tokens",
}
"""Metrics of harm that a clock cannot win."""

COMPARED = {
    "clock_repetition": "minus position, length, repetition",
    "mean_entropy": "minus mean entropy",
}
"""What the predictor is compared with."""


# --- harm against cost ---------------------------------------------------------------------------


@styled
def plot_harm_against_cost(policies: pl.DataFrame) -> Figure:
    """Harm left by each policy against device memory over time, and against traffic on the bus.

    One row a condition, harm at one height in both panels. Lower left is better in both. A policy
    to the right of 1 costs more than never compressing (left) or moves more than offloading the
    full KV cache (right): its marker is open. The line is the press without a policy, between
    the ratios at which it was measured: a policy below it leaves less harm than a constant ratio of
    the same cost.

    Args:
        policies: `compare_policies.summarize_runs`: one row per (policy, model, press, ratio,
            ``source``): ``harmed``, ``relative_byte_steps`` (device byte-steps over those of the
            full KV cache on the same prompts) and ``relative_bus_traffic`` (bytes moved over those
            of offloading it), each with its interval. Policies are taken from the live runs,
            oracles (``oracle_...``) from any source, offloading from the simulation where it did
            not run live, the line of constant ratios from the simulated rows of ``none``.

    Raises:
        MissingData: a column is absent, or no row has harm and byte-steps.
    """
    steps, traffic = "relative_byte_steps", "relative_bus_traffic"
    measures = ("harmed", steps, traffic)
    intervals = [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    need(policies, ["policy", "model", "press", "ratio", "source", *intervals], "harm_against_cost")
    shown = _shown_beside_live(policies.filter(pl.col("press") != BASELINE), steps)
    need(shown, [], "harm_against_cost")
    conditions = list(
        shown.select("model", "press", "ratio").unique(maintain_order=True).iter_rows()
    )
    names = sorted(set(shown["policy"]), key=policy_order)
    rows = len(conditions)
    figure = Figure(
        figsize=(7.2, max(1.9 * rows, 0.17 * len(names) + 0.6) + 0.4), layout="constrained"
    )
    grid = figure.subplots(rows, 2, squeeze=False, sharey="row")
    several = len({model for model, _, _ in conditions}) > 1
    styles = press_styles(shown["press"])
    constant: dict[str, Any] = {"color": GREY, "lw": 1, "ls": "--", "marker": "."}
    constant["label"] = "constant ratio"
    lined = False
    for (left, right), (model, press, ratio) in zip(grid, conditions, strict=True):
        here = shown.filter(model=model, press=press, ratio=ratio)
        line = _constant_line(policies, model, press, steps)
        if line.height > 1:
            left.plot(line[steps], line["harmed"], **constant, zorder=1)
            lined = True
        for axes, cost in ((left, steps), (right, traffic)):
            _draw_costs(axes, here.drop_nulls(cost), cost)
        title = condition_label((press, ratio), styles)
        left.set_title(f"{model}\n{title}" if several else title)
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        left.set_ylim(bottom=min(-0.03, left.get_ylim()[0]))
    figure.supylabel("harmed requests", fontsize=8)
    grid[-1][0].set_xlabel("device byte-steps\n(never compressing = 1)")
    grid[-1][1].set_xlabel("bytes over the bus\n(offloading the full cache = 1)")
    handles = []
    for name in names:
        style = policy_style(name)
        face = style.colour if style.filled else "white"
        handles.append(
            Line2D(
                [],
                [],
                color=style.colour,
                marker=style.marker,
                mfc=face,
                ls="none",
                label=style.label,
            )
        )
    if lined:
        handles.append(Line2D([], [], **constant))
    figure.legend(handles=handles, loc="outside right center")
    return figure


def _shown_beside_live(policies: pl.DataFrame, cost: str) -> pl.DataFrame:
    """Live rows, oracles of any source, and offloading, whose costs are counted in both."""
    live = policies.filter(source="live")
    counted = policies.filter(pl.col("policy") == "offload", pl.col("source") != "live").join(
        live, on=["policy", "model", "press", "ratio"], how="anti", maintain_order="left"
    )
    oracles = policies.filter(
        pl.col("policy").str.starts_with("oracle"), pl.col("source") != "live"
    )
    shown = pl.concat([live, counted, oracles]).drop_nulls(["harmed", cost])
    ran = live.drop_nulls(["harmed", cost]).select("model", "press", "ratio")
    if ran.is_empty():
        return shown
    # A condition with oracles alone compares nothing.
    return shown.join(ran.unique(), on=ran.columns, how="semi", maintain_order="left")


def _draw_costs(axes: Axes, rows: pl.DataFrame, cost: str) -> None:
    """Policies of one condition at (cost, harmed); shaded beyond 1."""
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")
    if rows.is_empty():
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xlim(0, 1.15)
        return
    dear = max(1.15, 1.05 * float(floats(rows[cost]).max()))
    axes.axvspan(1, dear, color=FAINT, alpha=0.45, lw=0, zorder=0)
    axes.set_xlim(-0.02 * dear, dear)
    # Oracles first: what really ran must not lie hidden below them.
    for entry in sorted(rows.to_dicts(), key=_drawing_order):
        _benefit(axes, entry, cost)


def _constant_line(policies: pl.DataFrame, model: str, press: str, cost: str) -> pl.DataFrame:
    """Cost and harm of a press alone at each of its ratios, and of never compressing."""
    alone = policies.filter(
        source=pl.lit("simulation"), policy=pl.lit("none"), model=pl.lit(model)
    ).drop_nulls(["harmed", cost])
    own = alone.filter(pl.col("press") == press).select(cost, "harmed")
    if own.is_empty():
        return own
    full = pl.DataFrame({cost: [1.0], "harmed": [0.0]})
    return pl.concat([own, full]).sort(cost)


def _drawing_order(entry: Mapping[str, Any]) -> tuple[bool, tuple[int, str]]:
    return not entry["policy"].startswith("oracle"), policy_order(entry["policy"])


def _benefit(axes: Axes, entry: dict[str, Any], cost: str) -> None:
    """One policy at (cost, harmed) with both intervals; open where it exceeds 1."""
    style = policy_style(entry["policy"])
    bars: dict[str, Any] = {}
    for name, column in (("xerr", cost), ("yerr", "harmed")):
        low, high = entry[f"{column}_low"], entry[f"{column}_high"]
        known = low is not None and high is not None
        bars[name] = interval_reach(entry[column], low, high) if known else None
    axes.errorbar(
        [entry[cost]],
        [entry["harmed"]],
        **bars,
        color=style.colour,
        marker=style.marker,
        mfc="white" if entry[cost] > 1 or not style.filled else style.colour,
        mec=style.colour,
        ms=8 if entry["policy"] == "always_safe" else 5,
        elinewidth=0.5,
        ls="none",
        label=entry["policy"],
    )


# --- harm against the price ----------------------------------------------------------------------

_PRICE_COSTS = {
    "device_byte_steps": "device byte-steps a request,\nin millions",
    "bytes_moved": "bytes over the bus a request,\nin millions",
}


@styled
def plot_harm_against_price(certificate: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Harm that each price leaves on the certifying prompts, against what it costs.

    One row for all conditions mixed and one a condition; down and left is better in both panels. A
    mark is filled where the price is certified at every level, half filled at some, open at none.

    Args:
        certificate: ``tables/price_certificate``: one row per (model, press, ratio, ``level``,
            ``harm_price``), press and ratio null where conditions are mixed: ``observed`` (mean
            over units of the share of their requests that went wrong) of ``units`` units and
            ``requests`` requests, ``delta``, ``certified``, and ``device_byte_steps`` and
            ``bytes_moved``, means per request.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    keys = ["model", "press", "ratio"]
    numbers = ["observed", "units", "requests", "delta", "certified", *_PRICE_COSTS]
    need(certificate, [*keys, "level", "harm_price", *numbers], "harm_against_price")
    styles = press_styles([*presses, *certificate["press"].drop_nulls()])
    scopes = list(certificate.select(keys).unique(maintain_order=True).iter_rows())
    levels = sorted(set(certificate["level"]))
    several = len({model for model, _, _ in scopes}) > 1
    figure = Figure(figsize=(7.2, 1.6 * len(scopes) + 0.7), layout="constrained")
    grid = figure.subplots(len(scopes), 2, squeeze=False, sharey=True)
    named = []
    for pair, (model, press, ratio) in zip(grid, scopes, strict=True):
        here = certificate.filter(
            pl.col("model") == model,
            pl.col("press").eq_missing(pl.lit(press, pl.String)),
            pl.col("ratio").eq_missing(pl.lit(ratio, pl.String)),
        )
        prices = [_price_entry(part) for _, part in here.group_by("harm_price")]
        prices.sort(key=lambda entry: -entry["harm_price"])
        mixed = press is None
        colour = INK if mixed else styles[press].colour
        for axes, cost in zip(pair, _PRICE_COSTS, strict=True):
            named.append((axes, _draw_prices(axes, prices, cost, colour)))
            for level, dashes in zip(levels, itertools.cycle(DASHES[:0:-1])):
                axes.axhline(level, color=INK, lw=0.9, ls=dashes, zorder=1)
        title = "all conditions mixed" if mixed else condition_label((press, ratio), styles)
        pair[0].set_title(f"{model}\n{title}" if several else title)
    grid[0][0].set_ylim(bottom=-0.06 * grid[0][0].get_ylim()[1])
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    grid[0][0].yaxis.set_major_locator(MaxNLocator(4))
    for axes, text in zip(grid[-1], _PRICE_COSTS.values(), strict=True):
        axes.set_xlabel(text)
    sure = f"{1 - float(certificate['delta'][0]):.0%}"
    figure.supylabel(f"harmed requests (one-sided bounds, {sure})", fontsize=8)
    mark: dict[str, Any] = {"color": GREY, "marker": "o", "ls": "none", "mfcalt": "white"}
    fillings = {"full": "certified at every level", "bottom": "at some", "none": "at none"}
    handles = [
        Line2D([], [], **mark | {"fillstyle": filling, "label": text})
        for filling, text in fillings.items()
    ]
    handles += [
        Line2D([], [], color=INK, lw=0.9, ls=dashes, label=f"at most {100 * level:g} %")
        for level, dashes in zip(levels, itertools.cycle(DASHES[:0:-1]))
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    for axes, points in named:
        label_points(axes, points)
    return figure


def _price_entry(rows: pl.DataFrame) -> dict[str, Any]:
    """One price: what was seen of it, its bound, and the share of levels that certify it."""
    from kvguard.learn_then_test import rate_bounds  # no other figure needs the tests' library

    entry = rows.row(0, named=True)
    single = entry["units"] == entry["requests"]
    bound = rate_bounds(entry["observed"], entry["units"], entry["delta"], single=single)[1]
    return entry | {"bound": bound, "certified": rows["certified"].sum() / rows.height}


def _draw_prices(
    axes: Axes, prices: Sequence[Mapping[str, Any]], cost: str, colour: str
) -> list[LineEnd]:
    """Prices at (cost, harm) with their upper bounds; returns what names them."""
    axes.grid(axis="y")
    known = [entry for entry in prices if entry[cost] is not None]
    if not known:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=GREY)
        return []
    places = [entry[cost] / 1e6 for entry in known]
    shares = [entry["observed"] for entry in known]
    axes.plot(places, shares, color=FAINT, lw=1, zorder=1)
    for entry, place in zip(known, places, strict=True):
        filling = {0.0: "none", 1.0: "full"}.get(entry["certified"], "bottom")
        axes.errorbar(
            [place],
            [entry["observed"]],
            yerr=[[0], [entry["bound"] - entry["observed"]]],
            color=colour,
            marker="o",
            fillstyle=filling,
            mfcalt="white",
            mec=colour,
            ms=5,
            elinewidth=0.6,
            ls="none",
            clip_on=False,
            label=f"{entry['harm_price']:g}",
        )
    # Costs of prices may differ by less than a hundredth: such a difference must not look large.
    middle = (min(places) + max(places)) / 2
    reach = max(0.7 * (max(places) - min(places)), 0.1 * middle)
    axes.set_xlim(middle - reach, middle + reach)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return [
        (place, share, f"{entry['harm_price']:g}", colour)
        for entry, place, share in zip(known, places, shares, strict=True)
    ]


# --- certificate ---------------------------------------------------------------------------------

POINT_MARKERS = {"conservative": "<", "balanced": "o", "aggressive": ">"}
"""Markers of the operating points."""

_RISKS = {"harm_left": "harmed and\nnot repaired", "alarm": "alarmed"}


@styled
def plot_certificate(certificate: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """What was observed on the calibration prompts against what is to be certified.

    Args:
        certificate: one row per (model, press, ratio, task, ``recovery``, ``operating_point``,
            ``risk``): ``observed`` (share of calibration requests), ``alpha`` (what it is to stay
            under) and ``certified``, and ``units``, ``requests`` and ``delta`` for the exact upper
            bound that is drawn where every prompt is one request. Of the risks ``harm_left`` and
            ``alarm`` are drawn; lower is better.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    keys = ["model", "press", "ratio", "task", "recovery", "operating_point", "risk"]
    numbers = ["observed", "alpha", "certified", "units", "requests", "delta"]
    need(certificate, [*keys, *numbers], "certificate")
    shown = certificate.filter(pl.col("risk").is_in(list(_RISKS)))
    need(shown, [], "certificate")
    styles = press_styles([*presses, *shown["press"]])
    columns = [
        *(("harm_left", recovery) for recovery in in_order(shown["recovery"])),
        ("alarm", shown["recovery"][0]),  # the recovery does not change who alarms
    ]
    tasks, models = in_order(shown["task"]), in_order(shown["model"])
    places, labels, colours = _certificate_rows(shown, tasks, styles)
    height = 0.17 * (max(places.values()) + 1) + 0.95
    figure = Figure(
        figsize=(1.75 * len(columns) + 2.2, height * len(models) + 0.4), layout="constrained"
    )
    grid = figure.subplots(len(models), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, model in enumerate(models):
        for axes, (risk, recovery) in zip(grid[row], columns, strict=True):
            here = shown.filter(model=model, risk=risk, recovery=recovery)
            for entry in here.drop_nulls("observed").to_dicts():
                _observed_share(axes, entry, places, styles)
            for alpha in here["alpha"].unique():
                axes.axvline(alpha, color=INK, lw=0.9, ls=":")
            words = _RISKS[risk]
            axes.set_title(words if risk == "alarm" else f"{words}, {recovery}", fontsize=7.5)
            axes.set_xlim(-0.04, 1.04)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.grid(axis="x")
        if len(models) > 1:
            grid[row][0].set_ylabel(model)
        grid[row][0].set_yticks(list(places.values()), labels)
        for label, colour in zip(grid[row][0].get_yticklabels(), colours, strict=True):
            label.set_color(colour)
    grid[0][0].set_ylim(max(places.values()) + 0.7, min(places.values()) - 0.7)
    handles = [
        Line2D([], [], color=GREY, marker=marker, ls="none", mfc="white", label=point)
        for point, marker in POINT_MARKERS.items()
        if point in set(shown["operating_point"])
    ]
    handles += [
        Line2D([], [], color=GREY, marker="o", ls="none", label="filled: certified"),
        Line2D([], [], color=INK, lw=0.9, ls=":", label="to stay under"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=5)
    figure.supxlabel(
        f"share of calibration requests (exact upper bounds at {1 - shown['delta'][0]:.0%})",
        fontsize=7.5,
    )
    return figure


def _certificate_rows(
    shown: pl.DataFrame, tasks: Sequence[str], styles: Mapping[str, PressStyle]
) -> tuple[dict[tuple[str, str, str], float], list[str], list[str]]:
    """Height, label and colour of each (task, press, ratio), tasks apart from each other."""
    places: dict[tuple[str, str, str], float] = {}
    labels, colours, height = [], [], 0.0
    for task in tasks:
        for press, ratio in conditions_in_order(shown.filter(task=task), styles):
            places[task, press, ratio] = height
            named = condition_label((press, ratio), styles)
            labels.append(named if len(tasks) == 1 else f"{task}  {named}")
            colours.append(styles[press].colour)
            height += 1
        height += 0.6
    return places, labels, colours


def _observed_share(
    axes: Axes,
    entry: dict[str, Any],
    places: Mapping[tuple[str, str, str], float],
    styles: Mapping[str, PressStyle],
) -> None:
    """One operating point's observed share, with the exact upper bound of a binomial share."""
    style, point = styles[entry["press"]], entry["operating_point"]
    shift = 0.24 * (list(POINT_MARKERS).index(point) - 1)
    bound = upper_bound(entry)
    axes.errorbar(
        [entry["observed"]],
        [places[entry["task"], entry["press"], entry["ratio"]] + shift],
        xerr=None if bound is None else [[0], [max(bound - entry["observed"], 0)]],
        color=style.colour,
        marker=POINT_MARKERS[point],
        mfc=style.colour if entry["certified"] else "white",
        mec=style.colour,
        ms=3.2,
        elinewidth=0.5,
        ls="none",
        label=point,
    )

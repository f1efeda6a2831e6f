"""Figures of policies: memory over time, benefit and cost, simulation against live."""

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kvguard.config import BASELINE
from kvguard.plot_style import (
    DASHES,
    FAINT,
    GREY,
    INK,
    MODE_COLOURS,
    MODES,
    LineEnd,
    PressStyle,
    conditions_in_order,
    count_text,
    floats,
    horizontal_interval,
    in_order,
    interval_reach,
    label_ends,
    label_points,
    need,
    policy_order,
    policy_style,
    press_styles,
    stretches,
    styled,
)

# --- memory over time ----------------------------------------------------------------------------


@styled
def plot_memory(steps: pl.DataFrame, *, title: str = "one recovered request") -> Figure:
    """KV memory of one request over its decode steps, under several policies.

    Args:
        steps: one row per (policy, step): ``policy``, ``step`` (decode steps since the prefill),
            ``kv_bytes`` (allocated for the row at that step) and ``mode`` (0, 1, 2 as in `MODES`;
            null: the policy has none). The first policy that has modes shades the background.
        title: names the request.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    need(steps, ["policy", "step", "kv_bytes", "mode"], "memory")
    largest = float(floats(steps["kv_bytes"]).max())
    unit, scale = ("MiB", 2**20) if largest >= 2**20 else ("KiB", 2**10)
    policies = sorted(set(steps["policy"]), key=policy_order)
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    axes = figure.subplots()
    ends: list[LineEnd] = []
    shaded = ""
    for index, policy in enumerate(policies):
        rows = steps.filter(pl.col("policy") == policy).sort("step")
        x, y = rows["step"].to_numpy(), rows["kv_bytes"].to_numpy() / scale
        style = policy_style(policy)
        dash = DASHES[index % len(DASHES)]
        axes.step(x, y, where="post", color=style.colour, ls=dash, lw=1.2)
        ends.append((float(x[-1]), float(y[-1]), style.label, style.colour))
        if not shaded and rows["mode"].is_not_null().any():
            shaded = style.label
            for start, stop, value in stretches(rows["mode"]):
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
    label_ends(axes, ends)
    return figure


# --- policies ------------------------------------------------------------------------------------

POLICY_METRICS = {
    "harmed": ("harmed", "share"),
    "silent_harm": ("silently harmed", "share"),
    "excess_cfr": ("excess CFR", "share"),
    "alarmed": ("alarmed", "share"),
    "relative_byte_steps": ("byte-steps (rel.)", "count"),
    "device_bytes_peak": ("peak (MiB)", "mebibytes"),
    "tokens_prefilled": ("prefilled", "count"),
    "seconds": ("seconds", "count"),
}
"""Benefit and cost of a policy, per request: columns of the policy tables, title, unit."""

_UNITS = {"share": 1.0, "mebibytes": 2.0**-20, "count": 1.0}


@styled
def plot_policies(policies: pl.DataFrame, *, presses: Sequence[str] = ()) -> Figure:
    """Benefit and cost of every policy in the live experiment, as dots with intervals.

    Args:
        policies: `compare_policies.summarize_runs`: one row per (policy, model, press, ratio,
            ``source``), with ``requests`` and, each with its interval, `POLICY_METRICS`. Rows
            whose source is not "live" are left out. Lower is better in all metrics.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a column is absent, or there are no rows.
    """
    intervals = [f"{metric}{end}" for metric in POLICY_METRICS for end in ("", "_low", "_high")]
    keys = ["policy", "model", "press", "ratio", "source"]
    need(policies, [*keys, "requests", *intervals], "policies")
    policies = policies.filter(source="live")
    need(policies, [], "policies")
    styles = press_styles([*presses, *policies["press"]])
    names = sorted(set(policies["policy"]), key=policy_order)
    models = in_order(policies["model"])
    conditions = conditions_in_order(policies, styles)
    ratios = sorted({ratio for _, ratio in conditions})
    shown, columns = len(conditions), len(POLICY_METRICS) // 2
    height = max(0.2, 0.055 * min(shown, 8) + 0.03 * max(shown - 8, 0) + 0.08) * len(names)
    figure = Figure(
        figsize=(1.4 * columns + 1.7, 2 * (height + 0.45) * len(models) + 0.6),
        layout="constrained",
    )
    grid = figure.subplots(2 * len(models), columns, squeeze=False, sharey=True)
    for at, model in enumerate(models):
        of_model = policies.filter(pl.col("model") == model).to_dicts()
        panels = grid[2 * at : 2 * at + 2].ravel()
        for axes, (metric, (title, unit)) in zip(panels, POLICY_METRICS.items(), strict=True):
            for entry in of_model:
                here = conditions.index((entry["press"], entry["ratio"]))
                place = names.index(entry["policy"]) + 0.72 * ((here + 0.5) / shown - 0.5)
                size = _ratio_size(ratios, entry["ratio"])
                style = styles[entry["press"]]
                horizontal_interval(axes, entry, metric, place, style, True, size, _UNITS[unit])
            for between in range(1, len(names)):
                axes.axhline(between - 0.5, color=FAINT, lw=0.5)
            if unit == "share":
                axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.axvline(0, color=GREY, lw=0.7)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
            axes.set_title(title, fontsize=7.5)
        if len(models) > 1:
            for row in (2 * at, 2 * at + 1):
                grid[row][0].set_ylabel(model)
    grid[0][0].set_yticks(range(len(names)), [policy_style(name).label for name in names])
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    for row in range(2 * len(models)):
        for label, name in zip(grid[row][0].get_yticklabels(), names, strict=True):
            label.set_color(policy_style(name).colour)
    figure.legend(
        handles=_condition_handles(conditions, styles), loc="outside upper right", ncols=6
    )
    figure.supxlabel(
        f"per request, {count_text(policies['requests'])} requests a point, 95 % intervals",
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


@styled
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
    need(summary, [*keys, "source", *intervals], "simulation_gap")
    live, simulated = (
        summary.filter((pl.col("source") == source) & (pl.col("press") != BASELINE)).select(
            *keys, *intervals
        )
        for source in ("live", "simulation")
    )
    pairs = live.join(simulated, on=keys, suffix="_simulated", maintain_order="left")
    need(pairs, [], "simulation_gap")
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
                bars[name] = (
                    None if low is None or high is None else interval_reach(value, low, high)
                )
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
        largest = of_panel.filter(apart > 0.02 * abs(span)).sort(apart, descending=True)
        largest = largest.unique("policy", keep="first", maintain_order=True).head(3)
        names = []
        for entry in largest.to_dicts():
            label = policy_style(entry["policy"]).label.replace(": ", ":\n")  # panels are narrow
            names.append((entry[f"{metric}_simulated"], entry[metric], label, INK))
        labels.append((axes, names))
    handles = _condition_handles(conditions, styles)
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    for axes, names in labels:
        label_points(axes, names)
    return figure

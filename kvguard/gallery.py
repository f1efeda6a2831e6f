"""Every figure of a run by name, drawn from the run's tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from kvguard import figures
from kvguard.config import OperatingPoint
from kvguard.schema import TRACE_KEYS
from kvguard.viewer import choose_example

TABLES = (
    "condition_summary",
    "excess",
    "sensitivity",
    "timeline",
    "outcomes",
    "predictor_curves",
    "lead_times",
    "policies",
    "pareto",
    "memory",
)
"""Tables that `draw_run` reads."""


def draw_run(
    tables: Mapping[str, pl.DataFrame],
    operating_points: Mapping[str, OperatingPoint],
    watched: str,
    presses: Sequence[str],
) -> dict[str, Figure]:
    """Draw the figures of one run.

    A table without rows (no request failed, nothing was rewound) becomes a figure that says so.

    Args:
        tables: by name, all of `TABLES`.
        operating_points: the controller's settings by name.
        watched: the operating point whose modes the timeline holds.
        presses: all presses of the experiment, for stable colours.

    Raises:
        MissingData: a table lacks a column that its figure needs.
    """
    live = tables["policies"].filter(pl.col("source") == "live")
    named = {"presses": presses}
    pareto = named | {"operating_points": operating_points}
    memory = {"title": "one request that was rewound"}
    plans: dict[str, tuple[Callable[..., Figure], pl.DataFrame, dict[str, Any]]] = {
        "rates": (figures.plot_rates, tables["condition_summary"], named),
        "failure_kinds": (figures.plot_failure_kinds, tables["condition_summary"], named),
        "excess": (figures.plot_excess, tables["excess"], named),
        "sensitivity": (figures.plot_sensitivity, tables["sensitivity"], named),
        "predictor": (figures.plot_predictor, tables["predictor_curves"], {}),
        "lead_time": (figures.plot_lead_time, tables["lead_times"], named),
        "policies": (figures.plot_policies, live, named),
        "pareto_memory": (
            figures.plot_pareto,
            tables["pareto"],
            pareto | {"cost": "kv_bytes_mean"},
        ),
        "pareto_prefill": (
            figures.plot_pareto,
            tables["pareto"],
            pareto | {"cost": "prefilled_tokens"},
        ),
        "simulation_gap": (figures.plot_simulation_gap, tables["policies"], named),
        "memory": (figures.plot_memory, tables["memory"], memory),
    }
    drawn = {
        name: plot(table, **options) if table.height else empty_figure(name)
        for name, (plot, table, options) in plans.items()
    }
    point = operating_points[watched]
    return drawn | {"trace": example(tables["timeline"], tables["outcomes"], point, presses)}


def example(
    timeline: pl.DataFrame,
    outcomes: pl.DataFrame,
    controller: OperatingPoint,
    presses: Sequence[str],
) -> Figure:
    """One request that shows a failure and the guard's warning, see `viewer.choose_example`."""
    keys = choose_example(timeline, outcomes)
    chosen = [pl.col(key) == keys[key] for key in TRACE_KEYS]
    outcome = outcomes.filter(chosen).row(0, named=True)
    kinds = [kind for kind in ("looping", "non_termination", "amnesia") if outcome[kind]]
    marks: dict[str, int | None] = {"first rejected": outcome["first_rejected"]}
    marks |= {kind.replace("_", " "): outcome[f"{kind}_onset"] for kind in kinds}
    return figures.plot_trace(
        timeline.filter(chosen),
        press=keys["press"],
        title=f"{keys['model']}, {keys['press']} {keys['ratio']}, prompt {keys['prompt_id']}",
        marks=marks,
        thresholds=(controller.tau_low, controller.tau_high),
        presses=presses,
    )


def empty_figure(name: str) -> Figure:
    """A figure that says that this run has nothing to show in it."""
    figure = Figure(figsize=(4, 1.5))
    figure.text(0.5, 0.5, f"{name}: no such request in this run", ha="center", va="center")
    return figure

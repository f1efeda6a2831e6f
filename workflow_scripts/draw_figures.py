"""Draw every figure of the run from its tables, as PDF and PNG."""

from functools import partial
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from kvguard import figures, joblog
from kvguard.certificate import POINTS, Certificate, load_certificate
from kvguard.schema import TRACE_KEYS, read_table
from kvguard.viewer import choose_example


def main(
    tables: dict[str, Path],
    certificate: Certificate,
    watched: str,
    presses: list[str],
    folder: Path,
) -> None:
    """Write the figures; ``watched`` is the operating point whose modes the timeline holds."""
    frames = {name: read_table(path) for name, path in tables.items()}
    points = {name: certificate.operating_point(name) for name in POINTS}
    summary, policies = frames["condition_summary"], frames["policies"]
    named = {"presses": presses}
    pareto = partial(figures.plot_pareto, frames["pareto"], operating_points=points, **named)
    thresholds = (points[watched].tau_low, points[watched].tau_high)
    drawn = {
        "rates": figures.plot_rates(summary, **named),
        "failure_kinds": figures.plot_failure_kinds(summary, **named),
        "excess": figures.plot_excess(frames["excess"], **named),
        "sensitivity": figures.plot_sensitivity(frames["sensitivity"], **named),
        "trace": example(frames["timeline"], frames["outcomes"], thresholds, presses),
        "predictor": figures.plot_predictor(frames["predictor_curves"]),
        "lead_time": figures.plot_lead_time(frames["lead_times"], **named),
        "policies": figures.plot_policies(policies.filter(pl.col("source") == "live"), **named),
        "pareto_memory": pareto(cost="kv_bytes_mean"),
        "pareto_prefill": pareto(cost="prefilled_tokens"),
        "simulation_gap": figures.plot_simulation_gap(policies, **named),
    }
    for name, figure in drawn.items():
        figures.save_figure(figure, folder / name)


def example(
    timeline: pl.DataFrame,
    outcomes: pl.DataFrame,
    thresholds: tuple[float, float],
    presses: list[str],
) -> Figure:
    """One request that shows a failure and the guard's warning, as a timeline."""
    keys = choose_example(timeline, outcomes)
    chosen = [pl.col(key) == keys[key] for key in TRACE_KEYS]
    outcome = outcomes.filter(chosen).row(0, named=True)
    kinds = [kind for kind in ("looping", "non_termination", "amnesia") if outcome[kind]]
    marks = {"first rejected": outcome["first_rejected"]}
    marks |= {kind.replace("_", " "): outcome[f"{kind}_onset"] for kind in kinds}
    title = f"{keys['model']}, {keys['press']} {keys['ratio']}, prompt {keys['prompt_id']}"
    rows = timeline.filter(chosen)
    return figures.plot_trace(
        rows, press=keys["press"], title=title, marks=marks, thresholds=thresholds, presses=presses
    )


if __name__ == "__main__":
    snakemake = joblog.start_job()
    inputs = {name: Path(path) for name, path in snakemake.input.items()}
    certificate = load_certificate(inputs.pop("certificate"))
    params, folder = snakemake.params, Path(snakemake.output.rates).parent
    main(inputs, certificate, params.operating_point, params.presses, folder)

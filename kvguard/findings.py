"""docs/findings.md from tables: how compression fails, and what the guard prevents and costs.

Every number comes from a table of a run, and every claim ("above chance", "interval includes
chance") from the interval beside it, so the text changes with the run. The sections about harm and
policies are `kvguard.findings_policies`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import schema
from kvguard.certificate import load_certificate
from kvguard.config import config_part
from kvguard.findings_policies import live_sections, pooled_table, sections, visible_text
from kvguard.findings_price import price_sections
from kvguard.imported_models import Origin, read_origin
from kvguard.markdown import above, bracket, changed, difference, pointwise, table, verdict
from kvguard.policy_tests import GUARD_COLUMNS, live_tables

TABLES = (
    "harm",
    "harm_metrics",
    "training",
    "predictor_metrics",
    "ablation",
    "feature_importance",
    "formulation",
    "controls",
    "leave_one_out",
    "transfer",
    "certificate",
    "policies",
    "simulation_reasons",
)

DERIVED = ("policies_pooled", "guard_tests")
"""Tables that runs of older versions lack; made from their live runs and their simulation."""

PREDICTORS = {
    "hazard": "predictor",
    "logistic": "logistic regression",
    "entropy": "entropy alone",
    "position": "position alone",
    "rules": "rules",
}

_HEAD = """# Findings

Where compression does harm, what undoes it at which cost, and what a predictor knows before it
happens. `make findings` writes this file from the tables of the runs named below; nothing in it is
typed by hand.

Harm: the uncompressed model answers rightly and the compressed one wrongly; for a task without
right answers, a failure or another final answer where the uncompressed run did not fail. Silent
harm: the request ended by itself and does not loop, so that nothing in the finished text gives it
away.

Unless a table says otherwise, all numbers are on test prompts, which nothing was fitted to or
chosen on. Brackets are 95 % intervals over prompts. In the table "Before the onset" they hold for
all groups at once, elsewhere each holds on its own. "Above chance" means that the interval lies
above the value that a predictor without knowledge has; "interval includes chance" is not the same
as "no better". Alarms are always those of the deployed operating point: no table uses another
threshold.
"""


def write_findings(results: Iterable[str | Path], target: str | Path) -> None:
    """Write the findings of one or more runs as Markdown, all or nothing.

    Args:
        results: results folders, each with ``config.json``, ``tables/`` and ``models/``.
        target: the file to write.

    Raises:
        FileNotFoundError: a table is missing; names it and the command that makes it.
    """
    sections = [_section(Path(folder)) for folder in results]
    with schema.atomic_path(target) as temporary:
        temporary.write_text("\n".join([_HEAD, *sections]).rstrip() + "\n")


RESULTS_BEGIN, RESULTS_END = "<!-- results: written by `make findings` -->", "<!-- results end -->"
"""What `write_results` replaces in a page lies between these lines."""


def write_results(results: str | Path, page: str | Path) -> None:
    """Replace the results of a page, between its two markers, by those of a run.

    Args:
        results: a results folder.
        page: a Markdown file that holds `RESULTS_BEGIN` and `RESULTS_END`.

    Raises:
        ValueError: a marker is missing.
    """
    text = Path(page).read_text()
    before, begin, rest = text.partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ValueError(f"{page}: no line {RESULTS_BEGIN!r} followed by {RESULTS_END!r}")
    folder = Path(results)
    described = _described(folder)
    tables = {"policies": _read(folder, "policies")} | _derived(folder, described)
    body = _title(described).partition("\n\n")[2]
    body += f"\n\n{visible_text(tables)}\n\n{pooled_table(tables)}"
    with schema.atomic_path(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: {folder} holds no run; `snakemake` makes one")
    described: dict[str, Any] = json.loads(path.read_text())
    return described


def _section(folder: Path) -> str:
    described = _described(folder)
    origin = read_origin(folder / "models")
    if origin is not None:
        return _imported_section(folder, described, origin)
    tables = {name: _read(folder, name) for name in TABLES} | _derived(folder, described)
    certificate = load_certificate(folder / "models" / "certificate.json")
    before, behind = sections(tables, described, certificate)
    return "\n\n".join(
        [
            _title(described),
            *before,
            _foreseen(tables),
            _before_onset(tables),
            _by_group(tables),
            _unknown(tables),
            _made_of(tables),
            _controls(tables),
            *behind,
            *price_sections(folder),
        ]
    )


def _imported_section(folder: Path, described: Mapping[str, Any], origin: Origin) -> str:
    """Of a run that uses another one's models: where they come from, and its live runs."""
    names = ("policies", "policies_pooled", "guard_tests", "planned_tests")
    tables = {name: _read(folder, name) for name in names}
    return "\n\n".join(
        [
            _title(described),
            f"### Where the models come from\n\n{origin.text} Nothing was fitted in this run.",
            *live_sections(tables, described),
            *price_sections(folder),
        ]
    )


def _read(folder: Path, name: str) -> pl.DataFrame:
    return schema.read_table(folder / "tables" / f"{name}.parquet")


def _derived(folder: Path, described: Mapping[str, Any]) -> dict[str, pl.DataFrame]:
    """The tables of `DERIVED`: those of the run, or made now as `summarize_live` makes them."""
    there = {
        name: _read(folder, name)
        for name in (*DERIVED, "planned_tests")
        if (folder / "tables" / f"{name}.parquet").is_file()
    }
    if set(DERIVED) <= set(there):
        return {"planned_tests": pl.DataFrame(schema=GUARD_COLUMNS)} | there
    # Files that the configuration names (a model, questions) need not be on this machine.
    tasks = [
        {"kind": "gsm_symbolic", "name": task["name"], "num_prompts": task["num_prompts"]}
        for task in described["tasks"]
    ]
    named = ("presses", "live", "splits", "predictor", "seed")
    experiment = config_part({name: described[name] for name in named} | {"tasks": tasks})
    live = pl.concat(
        schema.read_table(
            folder / "live" / model["name"] / press / ratio / policy / f"{shard:02d}.parquet",
            schema.RUNS,
        )
        for model in described["models"]
        for press, ratio in experiment.live_conditions
        for policy in experiment.live_policies(press, ratio)
        for shard in range(len(experiment.live_shards))
    )
    simulated = schema.read_table(folder / "simulation.parquet", schema.RUNS)
    return live_tables(
        live,
        simulated,
        experiment.predictor.bootstrap_samples,
        experiment.seed,
        [(pair.policy, pair.other) for pair in experiment.live.planned_tests],
    )


def _title(described: Mapping[str, Any]) -> str:
    models = ", ".join(model["name"] for model in described["models"])
    presses = "; ".join(
        f"{press['name']} at {', '.join(press['ratios'])}" for press in described["presses"]
    )
    tasks = ", ".join(f"{task['name']} ({task['num_prompts']})" for task in described["tasks"])
    return (
        f"## Run `{described['name']}`\n\n"
        f"Model {models}; prompts by task: {tasks}; presses {presses}; "
        f"at most {described['generation']['max_new_tokens']} new tokens; seed "
        f"{described['seed']}. Made by Snakemake on this run's configuration, tables "
        f"in `{described['results_dir']}/tables/`."
    )


# --- predictor -----------------------------------------------------------------------------------


_HEADLINE = ("same_position", "within_prompt", "request")
"""Metrics of harm that are read before the onset; the others look back, or at the worst run."""


def _foreseen(tables: Mapping[str, pl.DataFrame]) -> str:
    """Metrics of harm that a clock cannot win: pooled, by task, by press and by condition."""
    rows = tables["harm_metrics"].filter(predictor="hazard")
    targets = set(rows["target"])
    first = "harm" if "harm" in targets or rows.is_empty() else str(rows["target"][0])
    pooled = pl.all_horizontal(pl.col("task", "press", "ratio").is_null())
    main = pl.col("target") == first
    shown = rows.filter(
        (pooled & (main | pl.col("metric").is_in(_HEADLINE)))
        | (main & ~pooled & (pl.col("metric") == "same_position"))
    )
    told = shown.drop_nulls("difference_low")
    text = (
        "### What foresees harm, beyond a clock\n\nSame position: harmed and unharmed requests "
        "compared at the same token of the same condition. Within prompt: the same prompt, harmed "
        "under one condition and not under another. Request: whole requests over equally many "
        "tokens before the onset; worst run: by the worst 8 tokens; any time: after the fact, what "
        "follows the onset included. `clock repetition` is a predictor that knows position, length "
        f"and repetition alone. Differences are paired by prompt. {_left_out(shown, told)}"
    )
    return text if told.is_empty() else f"{text}\n\n{_harm_table(told)}"


def _left_out(rows: pl.DataFrame, told: pl.DataFrame) -> str:
    missing = rows.height - told.height
    if not missing:
        return "No comparison is left out."
    return (
        f"{missing} of {rows.height} comparisons are left out: undefined, or too few prompts for "
        "an interval."
    )


def _harm_table(rows: pl.DataFrame) -> str:
    lines = []
    for row in rows.to_dicts():
        named = [str(row[name]) for name in ("task", "press", "ratio") if row[name] is not None]
        lines.append(
            [
                " ".join(named) or "all",
                row["metric"].replace("_", " "),
                str(row["target"]),
                f"{row['harmed']} of {row['requests']}",
                str(row["prompts"]),
                bracket(row),
                row["compared_with"].replace("_", " "),
                difference(row),
                changed(row),
            ]
        )
    head = ["group", "AUROC", "target", "harmed", "prompts", "predictor", "compared with"]
    return table([*head, "difference", "it is"], lines)


def _before_onset(tables: Mapping[str, pl.DataFrame]) -> str:
    pooled = tables["predictor_metrics"].filter(group_by="all", metric="auroc")
    lines = []
    for target in pooled["target"].unique(maintain_order=True):
        rows = {row["predictor"]: row for row in pooled.filter(target=target).to_dicts()}
        own = rows["hazard"]
        cells = [bracket(rows[name]) if name in rows else "" for name in PREDICTORS]
        harm = f"{own['harmed']} of {own['requests']}"
        lines.append([target, harm, str(own["prompts"]), *cells, verdict(own)])
    text = "### Before the onset, token by token\n\nAUROC of tokens before the onset.\n\n" + table(
        ["target", "requests with an onset", "prompts", *PREDICTORS.values(), "predictor is"], lines
    )
    refused = tables["training"].filter(predictor="hazard", status="refused")
    for row in refused.iter_rows(named=True):
        text += f"\n\nNo predictor was trained for `{row['target']}`: {row['reason']}."
    return text


def _by_group(tables: Mapping[str, pl.DataFrame]) -> str:
    metrics = tables["predictor_metrics"]
    target = _first_target(metrics)
    rows = metrics.filter(pl.col("group_by").is_in(["press", "kind"]))
    rows = rows.filter(target=target, predictor="hazard")
    lines, missing = [], 0
    for group in rows.filter(metric="auroc").to_dicts():
        if group["low_pointwise"] is None:
            missing += 1
            continue
        same = {name: group[name] for name in ("group_by", "model", "press", "ratio", "kind")}
        here = rows.filter([pl.col(name).eq_missing(pl.lit(value)) for name, value in same.items()])
        found = _values(here)
        names = [group[name] for name in ("model", "press", "ratio") if group[name] is not None]
        label = f"first failure: {group['kind']}" if group["kind"] else " ".join(names)
        lines.append(
            [
                label,
                f"{group['harmed']} of {group['requests']}",
                pointwise(found["auroc"]),
                verdict(found["auroc"], family=False),
            ]
        )
    text = f"### By press and kind of failure (target `{target}`)\n\n"
    if missing:
        text += f"{missing} groups are left out: undefined, or too few prompts for an interval.\n\n"
    return text + table(["group", "requests with an onset", "AUROC", "is"], lines)


def _unknown(tables: Mapping[str, pl.DataFrame]) -> str:
    metrics = tables["predictor_metrics"]
    first = _first_target(metrics)
    auroc = metrics.filter(metric="auroc", predictor="hazard")
    points = []
    pooled = auroc.filter(group_by="all").to_dicts()
    unsure = [f"`{row['target']}` {bracket(row)}" for row in pooled if not above(row)]
    if unsure:
        points.append("Targets whose interval includes chance: " + ", ".join(unsure) + ".")
    for group_by in ("press", "kind"):
        rows = auroc.filter(group_by=group_by, target=first).to_dicts()
        weak = [
            f"{row[group_by]} {pointwise(row)}"
            for row in rows
            if row["low_pointwise"] is not None
            and not above(row, family=False)
            and row[group_by] != "none"
        ]
        if weak:
            points.append(f"By {group_by}, intervals that include chance: " + ", ".join(weak) + ".")
    ablation = tables["ablation"].filter(target=first, metric="auroc").to_dicts()
    by_set = {row["feature_set"]: row for row in ablation}
    for name, words in (
        ("no_position", "Without the position in the answer"),
        ("no_repetition", "Without ratio and repetition features"),
        ("logit_only", "With the logits' features alone"),
    ):
        row = by_set.get(name)
        if row is not None and row["value"] is not None and row["difference"] is not None:
            points.append(
                f"{words} AUROC is {pointwise(row)}, a change of {difference(row)} "
                f"({changed(row)})."
            )
    left = tables["leave_one_out"].filter(metric="auroc").to_dicts()
    moved = [row for row in left if changed(row) in ("worse", "better")]
    for row in moved:
        what = f"{row['left_out']} {row['value_left_out']}"
        trained = f"without {what}" if row["trained_on"] == "others" else f"on {what} alone"
        points.append(
            f"Trained {trained} and tested on it: {pointwise(row)}, a change of "
            f"{difference(row)} ({changed(row)})."
        )
    if len(moved) < len(left):
        points.append(
            f"{len(left) - len(moved)} of {len(left)} trainings without one task, press or ratio, "
            "or on it alone, show no change: the interval includes it, or there are too few "
            "prompts for one (`tables/leave_one_out`)."
        )
    for row in tables["transfer"].filter(metric="auroc").to_dicts():
        if row["value"] is None:
            points.append(f"Transfer between models: {row['reason']}.")
        elif row["trained_on"] != row["tested_on"]:
            points.append(
                f"Trained on {row['trained_on']}, tested on {row['tested_on']}: {pointwise(row)}, "
                f"a change of {difference(row)} ({changed(row)})."
            )
    return "### What it does not know, and what it leans on\n\n" + "\n".join(
        f"- {point}" for point in points
    )


def _made_of(tables: Mapping[str, pl.DataFrame]) -> str:
    measured = tables["feature_importance"].drop_nulls("value")
    importance = measured.filter(pl.col("low_pointwise") > 0)
    lines = [
        [row["group"], str(row["features"]), pointwise(row, digits=3)]
        for row in importance.to_dicts()
    ]
    text = (
        "### Features and formulation\n\nHow much the AUROC of boosted trees falls when a group of "
        "features is permuted (on calibration prompts: in sample for the choice of thresholds, not "
        "for the fit):\n\n"
    ) + table(["group", "features", "fall"], lines)
    text += (
        f"\n\n{measured.height - importance.height} of {measured.height} groups are left out: the "
        "interval of their fall includes 0."
    )
    formulation = tables["formulation"].filter(metric="auroc", sample="train_out_of_fold")
    for row in formulation.drop_nulls("difference").to_dicts():
        other = formulation.filter(target=row["target"], formulation="windowed").to_dicts()[0]
        text += (
            f"\n\nTarget `{row['target']}`, out of fold on train prompts: windowed "
            f"{pointwise(other)}, discrete-time {pointwise(row)}; difference "
            f"{difference(row)} ({changed(row)})."
        )
    return text


def _controls(tables: Mapping[str, pl.DataFrame]) -> str:
    """Controls that must fail: how many did, and those that did not."""
    rows = tables["controls"].drop_nulls("expected")
    judged = rows.drop_nulls("as_expected")
    wrong = judged.filter(~pl.col("as_expected"))
    names = ", ".join(f"*{name}*" for name in judged["control"].unique(maintain_order=True))
    text = (
        f"### Controls that must fail\n\n{judged.height - wrong.height} of {judged.height} results "
        f"of controls include the value of knowing nothing ({names}; `tables/controls`)."
    )
    if judged.height < rows.height:
        text += f" {rows.height - judged.height} more are undefined."
    if wrong.is_empty():
        return text
    lines = [
        [
            row["control"],
            row["predictor"] or "",
            row["metric"],
            f"{row['expected']:.2f}",
            bracket(row),
        ]
        for row in wrong.to_dicts()
    ]
    head = ["NOT as it must", "predictor", "metric", "expected", "found"]
    return f"{text}\n\n{table(head, lines)}"


def _first_target(metrics: pl.DataFrame) -> str:
    return str(metrics["target"][0]) if len(metrics) else "any"


def _values(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in rows.to_dicts()}

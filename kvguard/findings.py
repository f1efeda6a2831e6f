"""docs/findings.md from tables: how compression fails, and what the guard prevents and costs.

Every number comes from a table of a run, and every claim ("above chance", "interval includes
chance") from the interval beside it, so the text changes with the run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import schema
from kvguard.certificate import load_certificate
from kvguard.config import POLICIES
from kvguard.markdown import (
    above,
    bracket,
    changed,
    difference,
    measured,
    pointwise,
    quote,
    table,
    verdict,
)

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
    tables = {
        "policies": schema.read_table(folder / "tables" / "policies.parquet"),
    }
    described = json.loads((folder / "config.json").read_text())
    body = _title(described).partition("\n\n")[2]
    body += "\n\n" + _visible_alone(tables).partition("\n\n")[2]
    with schema.atomic_path(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _section(folder: Path) -> str:
    tables = {name: schema.read_table(folder / "tables" / f"{name}.parquet") for name in TABLES}
    described = json.loads((folder / "config.json").read_text())
    certificate = load_certificate(folder / "models" / "certificate.json")
    return "\n\n".join(
        [
            _title(described),
            _harm(tables),
            _visible_alone(tables),
            _policies(tables, described),
            _foreseen(tables),
            _before_onset(tables),
            _by_group(tables),
            _unknown(tables),
            _made_of(tables),
            _controls(tables),
            _certified(certificate.text),
        ]
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


# --- harm and policies ---------------------------------------------------------------------------

HEADLINE_POLICIES = (
    "none",
    "verify_on_failure",
    "clock_or_loop",
    "guard",
    "lossless",
    "always_safe",
)
"""Policies of the short tables, in order; those that did not run are left out."""


def _harm(tables: Mapping[str, pl.DataFrame]) -> str:
    lines = []
    for row in tables["harm"].to_dicts():
        right = row["baseline_right"]
        lines.append(
            [
                str(row["task"]),
                _condition(row),
                "-" if right is None else f"{right} of {row['requests']}",
                *(
                    measured(row, name, percent=True)
                    for name in ("harmed", "silent_harm", "rescued")
                ),
            ]
        )
    head = ["task", "condition", "right uncompressed", "harmed", "silently", "rescued"]
    return (
        "### What compression breaks\n\nCompression alone, all prompts of the run (nothing is "
        "fitted here), as shares of requests. Rescued: wrong uncompressed and right compressed.\n\n"
        + table(head, lines)
    )


def _live(tables: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Live rows of compressed conditions, policies in the order of `config.POLICIES`."""
    live = tables["policies"].filter(pl.col("source") == "live").to_dicts()
    keys = list(dict.fromkeys(_condition(row) for row in live))
    order = list(POLICIES)
    return sorted(live, key=lambda row: (keys.index(_condition(row)), order.index(row["policy"])))


def _visible_alone(tables: Mapping[str, pl.DataFrame]) -> str:
    """What a check of loops and overruns in finished answers would have achieved."""
    rows = [row for row in _live(tables) if row["policy"] in HEADLINE_POLICIES]
    title = "### What checking only loops and overruns would have got"
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], []).append(row)
    sentences = []
    alone = by_policy.get("none", [])
    known = [row for row in alone if row["harmed"] is not None and row["silent_harm"] is not None]
    harmed = round(sum(row["harmed"] * row["requests"] for row in known))
    silent = round(sum(row["silent_harm"] * row["requests"] for row in known))
    if known:
        requests = sum(row["requests"] for row in known)
        sentences.append(
            f"Under compression alone {harmed} of {requests} live test requests are harmed, "
            f"{silent} of them silently: a check of finished answers for loops and overruns cannot "
            "see those."
        )
    for policy in ("verify_on_failure", "clock_or_loop", "guard"):
        sentence = _left(policy, by_policy.get(policy, []))
        if sentence:
            sentences.append(sentence)
    losses = _dearer(by_policy.get("guard", []))
    if losses:
        sentences.append(losses)
    return f"{title}\n\n{' '.join(sentences)}\n\n{policy_table(rows)}"


def _left(policy: str, rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row for row in rows if row["harmed"] is not None]
    if not known:
        return ""
    requests = sum(row["requests"] for row in known)
    left = round(sum(row["harmed"] * row["requests"] for row in known))
    costs = [row["relative_byte_steps"] for row in known if row["relative_byte_steps"] is not None]
    cost = f", at {min(costs):.2f} to {max(costs):.2f} of the full KV cache's byte-steps"
    label = POLICIES[policy].label
    return f"*{label}* leaves {left} of {requests} harmed{cost if costs else ''}."


def _dearer(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the guard costs more device memory over time than never compressing."""
    known = [row for row in rows if row["relative_byte_steps"] is not None]
    dear = [row for row in known if row["relative_byte_steps"] > 1]
    if not known:
        return ""
    if not dear:
        return "In no condition does the guard cost more byte-steps than never compressing."
    named = ", ".join(f"{_condition(row)} ({row['relative_byte_steps']:.2f})" for row in dear)
    return (
        f"In {len(dear)} of {len(known)} conditions the guard costs **more** device byte-steps "
        f"than never compressing, so the full KV cache is the better choice there: {named}."
    )


def policy_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Harm left and every cost of policies, one row per condition and policy, as Markdown."""
    lines = []
    for row in rows:
        relative = row["relative_byte_steps"]
        reference = row["policy"] == "always_safe"
        over = relative is not None and relative > 1 and not reference
        byte_steps = "1 (reference)" if reference else measured(row, "relative_byte_steps")
        lines.append(
            [
                _condition(row),
                POLICIES[row["policy"]].label,
                *(
                    measured(row, name, percent=True)
                    for name in ("harmed", "silent_harm", "rescued", "alarmed")
                ),
                f"**{byte_steps}**" if over else byte_steps,
                _mean(row["device_bytes_peak"], 2**-20, 1),
                _mean(row["tokens_prefilled"]),
                _mean(row["tokens_wasted"]),
                _mean(row["checks"], digits=1),
                _mean(row["seconds"], digits=2),
            ]
        )
    head = ["condition", "policy", "harmed", "silently", "rescued", "alarmed"]
    costs = ["byte-steps", "peak MiB", "prefilled", "wasted", "checks", "seconds"]
    return table([*head, *costs], lines)


def _mean(value: float | None, scale: float = 1, digits: int = 0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _policies(tables: Mapping[str, pl.DataFrame], described: Mapping[str, Any]) -> str:
    """Every policy that ran live, and how far the simulation agrees."""
    rows = _live(tables)
    every = described["guard"].get("check_every_tokens", 1)
    requests = max((row["requests"] for row in rows), default=0)
    text = (
        f"### Every policy\n\nPolicies on {requests} test prompts a condition, through the engine; "
        "the guard judges a request "
        f"{f'every {every} tokens' if every > 1 else 'at every token'}, at the operating point "
        f"`{described['live']['operating_point']}` that was chosen on calibration prompts. Costs "
        "are means per request. Byte-steps: allocated device bytes summed over model steps, checks "
        "included, as a multiple of the full KV cache's on the same prompts; bold where a policy "
        "costs more than that. `kvguard/policies.py` describes each policy.\n\n"
        + policy_table(rows)
    )
    counts = tables["simulation_reasons"].group_by("reason").agg(pl.col("requests").sum())
    found = {str(row["reason"]): int(row["requests"]) for row in counts.to_dicts()}
    same, unknown = found.pop("same", 0), found.pop("outcome unknown offline", 0)
    unknown += found.pop("not simulated", 0)
    text += (
        f"\n\nOf the live requests whose outcome the simulation knows, {same} of "
        f"{same + sum(found.values())} had the simulated alarm step and final tokens; of {unknown} "
        "more it knows no outcome (a cache that no trace holds)."
    )
    for reason, count in sorted(found.items()):
        text += f" {count}: {reason}."
    return text


def _condition(row: Mapping[str, Any]) -> str:
    return f"{row['press']} {row['ratio']}"


# --- predictor -----------------------------------------------------------------------------------


def _foreseen(tables: Mapping[str, pl.DataFrame]) -> str:
    """Metrics of harm that a clock cannot win, pooled over conditions."""
    rows = tables["harm_metrics"].filter(
        pl.col("press").is_null() & pl.col("ratio").is_null() & (pl.col("predictor") == "hazard")
    )
    lines = []
    for row in rows.to_dicts():
        lines.append(
            [
                row["metric"].replace("_", " "),
                str(row["target"]),
                str(row["prompts"]),
                bracket(row),
                row["compared_with"].replace("_", " "),
                difference(row),
                changed(row),
            ]
        )
    head = ["AUROC", "target", "prompts", "predictor", "compared with", "difference", "it is"]
    return (
        "### What foresees harm, beyond a clock\n\nSame position: harmed and unharmed requests "
        "compared at the same token of the same condition. Within prompt: the same prompt, harmed "
        "under one condition and not under another. Request: whole requests over equally "
        "many tokens. `clock repetition` is a predictor that knows position, length and repetition "
        "alone. "
        "Differences are paired by prompt.\n\n" + table(head, lines)
    )


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
    rows = metrics.filter(pl.col("group_by").is_in(["press", "condition", "kind"]))
    rows = rows.filter(target=target, predictor="hazard")
    lines = []
    for group in rows.filter(metric="auroc").to_dicts():
        if group["group_by"] == "condition" and group["press"] == "none":
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
    return f"### By press, ratio and kind of failure (target `{target}`)\n\n" + table(
        ["group", "requests with an onset", "AUROC", "is"],
        lines,
    )


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
            if not above(row, family=False) and row[group_by] != "none"
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
    for row in left:
        if row["difference"] is None:
            continue
        what = f"{row['left_out']} {row['value_left_out']}"
        trained = f"without {what}" if row["trained_on"] == "others" else f"on {what} alone"
        points.append(
            f"Trained {trained} and tested on it: {pointwise(row)}, a change of "
            f"{difference(row)} ({changed(row)})."
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
    importance = tables["feature_importance"].drop_nulls("value")
    lines = [
        [row["group"], str(row["features"]), pointwise(row, digits=3)]
        for row in importance.to_dicts()
    ]
    text = (
        "### Features and formulation\n\nHow much AUROC falls when a group of features is permuted "
        "(on calibration prompts: in sample for the choice of thresholds, not for the fit):\n\n"
    ) + table(["group", "features", "fall"], lines)
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
    lines = []
    for row in tables["controls"].drop_nulls("expected").to_dicts():
        answer = {True: "as it must", False: "NOT as it must", None: row["reason"] or "undefined"}
        expected = f"{row['expected']:.2f}"
        lines.append(
            [
                row["control"],
                row["predictor"] or "",
                row["metric"],
                expected,
                bracket(row),
                answer[row["as_expected"]],
            ]
        )
    return "### Controls that must fail\n\n" + table(
        ["control", "predictor", "metric", "expected", "found", "verdict"], lines
    )


def _certified(text: str) -> str:
    return (
        "### What is certified\n\nShares that are called observed are those of the calibration "
        "prompts, on which the settings were chosen; the statement beside each allows for that.\n\n"
        + quote(text)
    )


def _first_target(metrics: pl.DataFrame) -> str:
    return str(metrics["target"][0]) if len(metrics) else "any"


def _values(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in rows.to_dicts()}

"""docs/findings.md: what predictor and guard are worth, in sentences made from tables.

Every number comes from a table of a run, and every claim ("above chance", "not told from chance")
from the interval beside it, so the text changes with the run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import schema
from kvguard.certificate import load_certificate

TABLES = (
    "training",
    "predictor_metrics",
    "detection",
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

What the hazard predictor knows before a failure begins, what it does not, and how that changes by
press. This file is written by `kvguard.findings.write_findings` from the tables of the runs named
below; nothing in it is typed by hand.

All metrics are on test prompts, which nothing was fitted to or chosen on, and count tokens before
the onset of compressed requests only. Brackets are intervals over prompts. In the first table of
each run they hold for all groups at once with 95 %, elsewhere each holds on its own with 95 %.
"Above chance" means that the interval lies above the value that a predictor without knowledge has;
where it does not exclude that value, the text says "not told from chance", which is not the same as
"no better". How the metrics are defined: `kvguard/evaluate_predictor.py`.

The last table of each run says what the policies did: `kvguard/policies.py` describes them.
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


def _section(folder: Path) -> str:
    tables = {name: schema.read_table(folder / "tables" / f"{name}.parquet") for name in TABLES}
    described = json.loads((folder / "config.json").read_text())
    certificate = load_certificate(folder / "models" / "certificate.json")
    return "\n\n".join(
        [
            _title(described),
            _before_onset(tables),
            _in_time(tables),
            _by_group(tables),
            _unknown(tables),
            _made_of(tables),
            _controls(tables),
            "### What is certified\n\n" + _quote(certificate.text),
            _guarded(tables, described),
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


# --- sections ------------------------------------------------------------------------------------


def _before_onset(tables: Mapping[str, pl.DataFrame]) -> str:
    pooled = tables["predictor_metrics"].filter(group_by="all", metric="auroc")
    lines = []
    for target in pooled["target"].unique(maintain_order=True):
        rows = {row["predictor"]: row for row in pooled.filter(target=target).to_dicts()}
        own = rows["hazard"]
        cells = [_bracket(rows[name]) if name in rows else "" for name in PREDICTORS]
        harm = f"{own['harmed']} of {own['requests']}"
        lines.append([target, harm, str(own["prompts"]), *cells, _verdict(own)])
    text = "### Before the onset, token by token\n\nAUROC of tokens before the onset.\n\n" + _table(
        ["target", "harmed requests", "prompts", *PREDICTORS.values(), "predictor is"], lines
    )
    refused = tables["training"].filter(predictor="hazard", status="refused")
    for row in refused.iter_rows(named=True):
        text += f"\n\nNo predictor was trained for `{row['target']}`: {row['reason']}."
    return text


def _in_time(tables: Mapping[str, pl.DataFrame]) -> str:
    metrics, detection = tables["predictor_metrics"], tables["detection"]
    target = _first_target(metrics)
    found = _values(metrics.filter(group_by="all", target=target, predictor="hazard"))
    alarms = _values(detection.filter(group_by="all", target=target))
    parts = [
        f"### In time\n\nFor target `{target}`, a request's score is its worst run of 8 tokens. "
        "Compared over equally many tokens, a harmed request scores above a harmless one with "
        f"probability {_pointwise(found['request_auroc'])} "
        f"({_verdict(found['request_auroc'], family=False)}); within the first 32 tokens, "
        f"{_pointwise(found['request_auroc_early'])} "
        f"({_verdict(found['request_auroc_early'], family=False)})."
    ]
    parts.append(
        "With the alarm threshold chosen on calibration prompts, "
        f"{_pointwise(found['recall'], percent=True)} of harmed requests alarm before their onset "
        f"and {_pointwise(found['recall_any_time'], percent=True)} before they end, which is what "
        "counts for verifying and rewinding; "
        f"{_pointwise(found['false_alarm_rate'], percent=True)} of harmless requests alarm."
    )
    if alarms and alarms["lead_time_tokens_median"]["value"] is not None:
        lead, wasted = alarms["lead_time_tokens_median"], alarms["wasted_tokens_median"]
        parts.append(
            f"Among the alarmed, the median lead time is {_pointwise(lead, digits=0)} tokens "
            f"(negative: after the onset), and a rewind would drop "
            f"{_pointwise(wasted, digits=0)} tokens in the median."
        )
    return "\n\n".join(parts)


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
                _pointwise(found["auroc"]),
                _verdict(found["auroc"], family=False),
                _pointwise(found["recall_any_time"], percent=True),
                _pointwise(found["false_alarm_rate"], percent=True),
            ]
        )
    return f"### By press, ratio and kind of failure (target `{target}`)\n\n" + _table(
        ["group", "harmed requests", "AUROC", "is", "alarmed if harmed", "alarmed if harmless"],
        lines,
    )


def _unknown(tables: Mapping[str, pl.DataFrame]) -> str:
    metrics = tables["predictor_metrics"]
    first = _first_target(metrics)
    auroc = metrics.filter(metric="auroc", predictor="hazard")
    points = []
    pooled = auroc.filter(group_by="all").to_dicts()
    unsure = [f"`{row['target']}` {_bracket(row)}" for row in pooled if not _above(row)]
    if unsure:
        points.append("Targets not told from chance: " + ", ".join(unsure) + ".")
    for group_by in ("press", "kind"):
        rows = auroc.filter(group_by=group_by, target=first).to_dicts()
        weak = [
            f"{row[group_by]} {_pointwise(row)}"
            for row in rows
            if not _above(row, family=False) and row[group_by] != "none"
        ]
        if weak:
            points.append(f"By {group_by}, not told from chance: " + ", ".join(weak) + ".")
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
                f"{words} AUROC is {_pointwise(row)}, a change of {_difference(row)} "
                f"({_changed(row)})."
            )
    left = tables["leave_one_out"].filter(metric="auroc").to_dicts()
    for row in left:
        if row["difference"] is None:
            continue
        what = f"{row['left_out']} {row['value_left_out']}"
        trained = f"without {what}" if row["trained_on"] == "others" else f"on {what} alone"
        points.append(
            f"Trained {trained} and tested on it: {_pointwise(row)}, a change of "
            f"{_difference(row)} ({_changed(row)})."
        )
    for row in tables["transfer"].filter(metric="auroc").to_dicts():
        if row["value"] is None:
            points.append(f"Transfer between models: {row['reason']}.")
        elif row["trained_on"] != row["tested_on"]:
            points.append(
                f"Trained on {row['trained_on']}, tested on {row['tested_on']}: {_pointwise(row)}, "
                f"a change of {_difference(row)} ({_changed(row)})."
            )
    return "### What it does not know, and what it leans on\n\n" + "\n".join(
        f"- {point}" for point in points
    )


def _made_of(tables: Mapping[str, pl.DataFrame]) -> str:
    importance = tables["feature_importance"].drop_nulls("value")
    lines = [
        [row["group"], str(row["features"]), _pointwise(row, digits=3)]
        for row in importance.to_dicts()
    ]
    text = (
        "### Features and formulation\n\nHow much AUROC falls when a group of features is permuted "
        "(calibration prompts, all features):\n\n"
    ) + _table(["group", "features", "fall"], lines)
    formulation = tables["formulation"].filter(metric="auroc", sample="train_out_of_fold")
    for row in formulation.drop_nulls("difference").to_dicts():
        other = formulation.filter(target=row["target"], formulation="windowed").to_dicts()[0]
        text += (
            f"\n\nTarget `{row['target']}`, out of fold on train prompts: windowed "
            f"{_pointwise(other)}, discrete-time {_pointwise(row)}; difference "
            f"{_difference(row)} ({_changed(row)})."
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
                _bracket(row),
                answer[row["as_expected"]],
            ]
        )
    return "### Controls that must fail\n\n" + _table(
        ["control", "predictor", "metric", "expected", "found", "verdict"], lines
    )


def _guarded(tables: Mapping[str, pl.DataFrame], described: Mapping[str, Any]) -> str:
    """Every policy that ran live, beside the simulation of the same requests."""
    runs = tables["policies"]
    live = runs.filter(source="live")
    keys = ["model", "press", "ratio", "policy"]
    offline = {
        tuple(row[key] for key in keys): row for row in runs.filter(source="simulation").to_dicts()
    }
    lines = []
    for row in live.to_dicts():
        beside = offline.get(tuple(row[key] for key in keys), {})
        known = beside.get("known") == 1 and beside.get("excess_cfr") is not None
        lines.append(
            [
                f"{row['press']} {row['ratio']}",
                row["policy"],
                *(_measured(row, name) for name in ("alarmed", "excess_cfr", "excess_error")),
                _measured(beside, "excess_cfr") if known else "unknown",
                f"{row['kv_bytes_mean'] / 2**20:.1f}",
                *(f"{row[name]:.0f}" for name in ("tokens_prefilled", "tokens_wasted")),
            ]
        )
    every = described["guard"].get("check_every_tokens", 1)
    requests = max(live["requests"].to_list(), default=0)
    text = (
        f"### What the guard does, beside its rivals\n\nPolicies on {requests} test prompts a "
        "condition, through the engine; the guard looks at a request "
        f"{f'every {every} tokens' if every > 1 else 'at every token'}. Alarmed is a share of "
        "requests. Excess CFR is "
        "the catastrophic failure rate above the uncompressed model's on the same prompts, excess "
        "error its accuracy above the policy's; lower is better. Costs are means a request: KV "
        "memory in MiB, tokens prefilled (prompt, verification, recovery), tokens generated and "
        "dropped.\n\n"
    )
    head = ["condition", "policy", "alarmed", "excess CFR", "excess error", "excess CFR, simulated"]
    text += _table([*head, "KV MiB", "prefilled", "wasted"], lines)
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


# --- words ---------------------------------------------------------------------------------------


def _first_target(metrics: pl.DataFrame) -> str:
    return str(metrics["target"][0]) if len(metrics) else "any"


def _values(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in rows.to_dicts()}


def _text(value: float, *, percent: bool, digits: int) -> str:
    return f"{value:.0%}" if percent else f"{value:.{digits}f}"


def _span(
    row: Mapping[str, Any], low: str, high: str, *, percent: bool = False, digits: int = 2
) -> str:
    if row["value"] is None:
        return "undefined"
    value = _text(row["value"], percent=percent, digits=digits)
    if row[low] is None:
        return f"{value} [too few prompts]"
    ends = [_text(row[end], percent=percent, digits=digits) for end in (low, high)]
    return f"{value} [{ends[0]}, {ends[1]}]"


def _measured(row: Mapping[str, Any], name: str) -> str:
    renamed = {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
    if renamed["low"] is None and row[name] is not None:
        return f"{row[name]:.2f}"  # every prompt has the same value
    return _bracket(renamed)


def _bracket(row: Mapping[str, Any]) -> str:
    return _span(row, "low", "high")


def _pointwise(row: Mapping[str, Any], *, percent: bool = False, digits: int = 2) -> str:
    return _span(row, "low_pointwise", "high_pointwise", percent=percent, digits=digits)


def _difference(row: Mapping[str, Any]) -> str:
    renamed = dict(row) | {"value": row["difference"]}
    return _span(renamed, "difference_low", "difference_high")


def _above(row: Mapping[str, Any], *, family: bool = True) -> bool:
    low = row["low" if family else "low_pointwise"]
    return low is not None and low > 0.5


def _verdict(row: Mapping[str, Any], *, family: bool = True) -> str:
    low, high = (row[name if family else f"{name}_pointwise"] for name in ("low", "high"))
    if row["value"] is None:
        return "undefined"
    if low is None:
        return "too few prompts to tell"
    if low > 0.5:
        return "above chance"
    return "below chance" if high < 0.5 else "not told from chance"


def _changed(row: Mapping[str, Any]) -> str:
    low, high = row["difference_low"], row["difference_high"]
    if low is None:
        return "too few prompts to tell"
    if high < 0:
        return "worse"
    return "better" if low > 0 else "not told from no change"


def _quote(text: str) -> str:
    return "\n>\n".join(f"> {line}" for line in text.splitlines())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

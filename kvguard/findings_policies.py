"""The sections of docs/findings.md about harm, policies, tests and certificates.

Every function takes tables of a run and returns Markdown; `kvguard.findings` puts them together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from kvguard.certificate import Certificate, upper_bound
from kvguard.config import POLICIES
from kvguard.findings_tests import Row, condition, guard_tests, planned_section
from kvguard.markdown import counted, measured, number_or_dash, p_value, quote, table
from kvguard.metrics import MIN_UNITS, wilson_interval
from kvguard.paired_tests import Estimate, holm
from kvguard.policy_tests import p_of_interval

Tables = Mapping[str, pl.DataFrame]

HEADLINE_POLICIES = (
    "none",
    "verify_on_failure",
    "clock_or_loop",
    "guard",
    "guard_price",
    "guard_promote",
    "gate",
    "ladder",
    "lossless",
    "lossless_auto",
    "always_safe",
    "offload",
    "shared_prefix",
    "oracle_gate",
    "oracle_onset",
)
"""Policies of the short table, in order; those that neither ran nor were simulated are left out."""

TOLD_POLICIES = (
    *("verify_on_failure", "clock_or_loop", "guard", "guard_price", "guard_promote", "ladder"),
    *("lossless", "lossless_auto"),
)
"""Policies of the sentences that sum the short table up."""

SILENT_HARM_FLOOR = 0.05
"""Silent harm counts as there where the whole interval lies above this share."""


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows of one condition after the other, policies in the order of `config.POLICIES`."""
    rows = list(rows)
    conditions = list(dict.fromkeys(condition(row) for row in rows))
    order = list(POLICIES)
    return sorted(
        rows, key=lambda row: (conditions.index(condition(row)), order.index(row["policy"]))
    )


# --- harm ----------------------------------------------------------------------------------------


def harm_section(tables: Tables) -> str:
    """What compression breaks: each condition, by task and all tasks together."""
    harm = tables["harm"].sort("press", "ratio", "task", maintain_order=True)
    tasks = harm["task"].unique(maintain_order=True).to_list()
    lines = []
    for row in _by_condition(harm):
        of_task = {part["task"]: part for part in row["tasks"]}
        found = "yes" if row["above_floor"] else "no"
        lines.append(
            [
                condition(row),
                *(_harmed_and_silent(of_task[task]) if task in of_task else "-" for task in tasks),
                *(counted(row, name, row["requests"]) for name in ("harmed", "silent_harm")),
                found,
                str(row["rescued"]),
            ]
        )
    head = ["condition", *map(str, tasks), "all: harmed", "all: silently"]
    head += [f"silent above {SILENT_HARM_FLOOR:.0%}", "rescued"]
    known = harm.drop_nulls("baseline_right").unique("task", maintain_order=True).to_dicts()
    right = ", ".join(
        f"{row['task']} {row['baseline_right']} of {row['requests']}"
        for row in sorted(known, key=lambda row: tasks.index(row["task"]))
    )
    return (
        "### What compression breaks\n\nCompression alone, all prompts of the run (nothing is "
        f"fitted here). Right uncompressed: {right or 'no task has right answers'}. Cells are "
        "requests that are harmed, in brackets the Wilson interval of their share, behind it those "
        "that are harmed silently. Rescued: wrong uncompressed and right compressed.\n\n"
        + table(head, lines)
    )


def _harmed_and_silent(row: Row) -> str:
    silent = "undefined" if row["silent_harm"] is None else str(_count(row, "silent_harm"))
    return f"{counted(row, 'harmed', row['requests'])}, {silent}"


def _by_condition(harm: pl.DataFrame) -> list[dict[str, Any]]:
    """Harm and silent harm of each condition, all tasks and prompts, and the rows by task."""
    rows = []
    groups = harm.sort("model", "press", "ratio").group_by(
        "model", "press", "ratio", maintain_order=True
    )
    for (model, press, ratio), part in groups:
        requests = int(part["requests"].sum())
        row: dict[str, Any] = {"model": model, "press": press, "ratio": ratio}
        row |= {"requests": requests, "tasks": part.to_dicts()}
        for name in ("harmed", "silent_harm"):
            count = round((part[name].fill_null(0) * part["requests"]).sum())
            low, high = wilson_interval(count, requests)
            row |= {name: count / requests, f"{name}_low": low, f"{name}_high": high}
        row["rescued"] = round((part["rescued"].fill_null(0) * part["requests"]).sum())
        row["above_floor"] = row["silent_harm_low"] > SILENT_HARM_FLOOR
        rows.append(row)
    return rows


# --- policies ------------------------------------------------------------------------------------


def visible_section(tables: Tables) -> str:
    """What a check of loops and overruns in finished answers gets, in one table."""
    text = (
        "### What checking only loops and overruns would have got\n\n"
        "The row *check visible failures*: an answer that loops or runs out is checked, and "
        "nothing else. Live test requests, all conditions together; the next section has each "
        "condition."
    )
    return f"{text}\n\n{pooled_table(tables)}"


def pooled_rows(tables: Tables, task: str | None = None) -> list[dict[str, Any]]:
    """Rows of the headline policies over all live conditions: live, else simulated, by policy."""
    rows = tables["policies_pooled"].filter(pl.col("task").eq_missing(pl.lit(task, pl.String)))
    found = {}
    for source in ("simulation", "live"):  # what ran live replaces what was simulated
        for row in rows.filter(source=source, policy=pl.col("policy")).to_dicts():
            if source == "live" or row["harmed"] is not None:
                found[row["policy"]] = row
    return [found[name] for name in HEADLINE_POLICIES if name in found]


def pooled_table(tables: Tables, task: str | None = None) -> str:
    """Harm left and costs of the headline policies over all live conditions, as Markdown."""
    lines = [
        [_named(row), *_shares(row), _byte_steps(row), _traffic(row), *_costs(row)]
        for row in pooled_rows(tables, task)
    ]
    return table(["policy", *_SHARES, "byte-steps", "bus traffic", *_COSTS], lines)


_SHARES = ("harmed", "silently", "rescued", "alarmed")
_COSTS = ("peak MiB", "prefilled", "wasted", "checks", "seconds")


def _named(row: Row) -> str:
    label = POLICIES[row["policy"]].label
    return label if row["source"] == "live" else f"{label} (simulated)"


def _shares(row: Row) -> list[str]:
    return [
        counted(row, name, row["requests"])
        for name in ("harmed", "silent_harm", "rescued", "alarmed")
    ]


def _byte_steps(row: Row) -> str:
    if row["policy"] == "always_safe":
        return "1 (reference)"
    text = _least(row) + _multiple(row, "relative_byte_steps")
    relative = row["relative_byte_steps"]
    return f"**{text}**" if relative is not None and relative > 1 else text


def _traffic(row: Row) -> str:
    """Bytes moved, as a multiple of what offloading the full KV cache moves; a dash: not known."""
    value = row.get("relative_bus_traffic")
    if row["policy"] == "offload":
        return "1 (reference)"
    if not value:
        return "-" if value is None else "0"
    text = _multiple(row, "relative_bus_traffic")
    return f"**{text}**" if value > 1 else text


def _multiple(row: Row, name: str) -> str:
    """A relative cost with its interval, which is undefined where no prompt differs."""
    text = measured(row, name)
    prompts = row.get("prompts", row["requests"])  # within a condition they are the same
    if row[f"{name}_low"] is None and prompts >= MIN_UNITS:
        text = text.replace("[too few prompts]", "(the same for every prompt)")
    return text


def _least(row: Row) -> str:
    """Simulated byte-steps of a request that a policy touched are a low estimate (`costs`)."""
    exact = row["source"] == "live" or row["policy"] in ("none", "offload")
    return "" if exact or row["relative_byte_steps"] is None else "at least "


def _costs(row: Row) -> list[str]:
    return [
        number_or_dash(row["device_bytes_peak"], 2**-20, 1),
        number_or_dash(row["tokens_prefilled"]),
        number_or_dash(row["tokens_wasted"]),
        number_or_dash(row["checks"], digits=1),
        number_or_dash(row["seconds"], digits=2),
    ]


def visible_text(tables: Tables) -> str:
    """The sentences beside `pooled_table`: harm that a check of the text misses, and the price."""
    by_policy = {row["policy"]: row for row in pooled_rows(tables)}
    sentences = []
    alone = by_policy.get("none")
    if alone is not None and alone["harmed"] is not None and alone["silent_harm"] is not None:
        sentences.append(
            f"Under compression alone {_count(alone, 'harmed')} of {alone['requests']} live test "
            f"requests ({alone['prompts']} prompts under {alone['conditions']} conditions) are "
            f"harmed, {_count(alone, 'silent_harm')} of them silently: a check of finished answers "
            "for loops and overruns cannot see those."
        )
    for policy in TOLD_POLICIES:
        row = by_policy.get(policy)
        if row is None or row["harmed"] is None:
            continue
        relative = row["relative_byte_steps"]
        cost = (
            ""
            if relative is None
            else f", {_least(row) or 'at '}{relative:.2f} of the device byte-steps of never "
            "compressing"
        )
        traffic = row.get("relative_bus_traffic")
        if traffic is not None:
            cost += f" and {traffic:.2f} of the bytes that offloading the whole cache would move"
        sentences.append(
            f"*{_named(row)}* leaves {_count(row, 'harmed')} of {row['requests']} harmed{cost}."
        )
    losses = _dearer(tables)
    return " ".join([*sentences, losses] if losses else sentences)


def _count(row: Row, name: str) -> int:
    return round(float(row[name]) * int(row["requests"]))


def _dear_alone(rows: Iterable[Row]) -> str:
    """Why compression alone can cost more byte-steps than never compressing."""
    rows = list(rows)
    full = {condition(row): row for row in rows if row["policy"] == "always_safe"}
    said = []
    for row in rows:
        relative = row["relative_byte_steps"]
        if row["policy"] != "none" or relative is None or relative <= 1:
            continue
        steps, own = full[condition(row)]["decode_steps"], row["decode_steps"]
        said.append(f"{condition(row)} ({own:.0f} decode steps against {steps:.0f})")
    if not said:
        return ""
    return (
        " Compression alone costs more than never compressing where its answers are longer, or "
        "where the prompt is so short that it saves no whole page of memory: "
        f"{', '.join(said)}."
    )


def _dearer(tables: Tables) -> str:
    """Where the guard costs more device memory over time than never compressing."""
    live = tables["policies"].filter((pl.col("source") == "live") & (pl.col("policy") == "guard"))
    known = live.drop_nulls("relative_byte_steps").to_dicts()
    dear = [row for row in known if row["relative_byte_steps"] > 1]
    if not known:
        return ""
    if not dear:
        return "In no condition does the guard cost more byte-steps than never compressing."
    named = ", ".join(f"{condition(row)} ({row['relative_byte_steps']:.2f})" for row in dear)
    return (
        f"In {len(dear)} of {len(known)} conditions the guard costs **more** device byte-steps "
        f"than never compressing, so the full KV cache is the better choice there: {named}."
    )


def policy_table(rows: Iterable[Row]) -> str:
    """Harm left and every cost of policies, one row per condition and policy, as Markdown."""
    lines = [
        [
            condition(row),
            _named(row),
            *_shares(row),
            _byte_steps(row),
            _traffic(row),
            _constant(row),
            *_costs(row),
        ]
        for row in rows
    ]
    head = ["condition", "policy", *_SHARES, "byte-steps", "bus traffic"]
    head += ["constant ratio", *_COSTS]
    return table(head, lines)


def _constant(row: Row) -> str:
    value = row.get("constant_harmed")
    return "-" if value is None else f"{value:.0%}"


def policies_section(tables: Tables, described: Row) -> str:
    """Every policy that ran live, and how far the simulation agrees."""
    rows = in_order(tables["policies"].filter(pl.col("source") == "live").to_dicts())
    every = described["guard"].get("check_every_tokens", 1)
    requests = max((row["requests"] for row in rows), default=0)
    text = (
        f"### Every policy\n\nPolicies on {requests} test prompts a condition, through the engine; "
        "the guard judges a request "
        f"{f'every {every} tokens' if every > 1 else 'at every token'}, at the operating point "
        f"`{described['live']['operating_point']}` that was chosen on calibration prompts. Shares "
        "are of requests; costs are means per request (their intervals are in `tables/policies`). "
        "Byte-steps: allocated device bytes summed over model steps, checks included, as a "
        "multiple of the full KV cache's on the same prompts; bold where a policy costs more than "
        "that. Bus traffic: bytes of entries that cross between the device and where they are "
        "parked, as a multiple of what offloading the full KV cache would move for the same "
        "answers; bold above that. Constant ratio: the share of harmed requests that the press "
        "without a policy would leave at the same byte-steps, between its measured ratios (ratio 0 "
        "included); a policy is worth having where it leaves less. A dash: not known, or outside "
        "the measured ratios. "
        f"`kvguard/policies.py` describes each policy.{_dear_alone(rows)}\n\n" + policy_table(rows)
    )
    if "simulation_reasons" not in tables:
        return text
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


def tasks_section(tables: Tables) -> str:
    """The headline policies by task, all live conditions together; nothing with a single task."""
    tasks = tables["policies_pooled"]["task"].drop_nulls().unique(maintain_order=True).to_list()
    if len(tasks) < 2:
        return ""
    lines = [
        [task, _named(row), *_shares(row), _byte_steps(row), _traffic(row)]
        for task in tasks
        for row in pooled_rows(tables, task)
        if row["policy"] in ("none", "verify_on_failure", "guard")
    ]
    return "### By task\n\nTest prompts of each task, all live conditions together.\n\n" + table(
        ["task", "policy", *_SHARES, "byte-steps", "bus traffic"], lines
    )


# --- tests ---------------------------------------------------------------------------------------


def lead_section(tables: Tables, certificate: Certificate) -> str:
    """The page's answers, one sentence each; the sections below say how they are known."""
    made = sum(statement.certified for statement in certificate.statements)
    points = [
        _existence(tables["harm"])[0],
        visible_text(tables),
        _prediction(tables["harm_metrics"])[0],
        guard_tests(tables["guard_tests"])[0],
        f"{made} of {len(certificate.statements)} statements about harm left and alarms are "
        "certified.",
    ]
    return "### In short\n\n" + "\n".join(f"- {point}" for point in points if point)


def tests_section(tables: Tables) -> str:
    """Is there silent harm, is it foreseen, does the guard leave less: one test each."""
    parts = (
        _existence(tables["harm"]),
        _prediction(tables["harm_metrics"]),
        guard_tests(tables["guard_tests"]),
    )
    head = '### Three tests\n\nTwo-sided; "adjusted" is Holm\'s, within one test. '
    return head + "\n\n".join(details for _, details in parts)


def _existence(harm: pl.DataFrame) -> tuple[str, str]:
    """Which presses do silent harm at their lightest ratio: the answer, and the details."""
    lightest: dict[object, bool] = {}
    for row in _by_condition(harm):
        lightest.setdefault((row["model"], row["press"]), row["above_floor"])
    answer = (
        f"At its lightest ratio {sum(lightest.values())} of {len(lightest)} presses do silent harm "
        f"whose interval lies above {SILENT_HARM_FLOOR:.0%}."
    )
    where = "All prompts, tasks together: the columns of the first table."
    return answer, f"**Existence.** {where} {answer}"


def _prediction(metrics: pl.DataFrame) -> tuple[str, str]:
    """AUROC at the same position, predictor minus clock and minus entropy, over all conditions."""
    pooled = metrics.filter(
        *(pl.col(name).is_null() for name in ("task", "press", "ratio")),
        pl.col("metric") == "same_position",
        pl.col("target") == "harm",
        pl.col("predictor") == "hazard",
    )
    text = (
        "**Prediction.** Test prompts: AUROC of harm at the same position under the same "
        "condition, predictor minus reference, paired by prompt. "
    )
    rows = pooled.drop_nulls("difference").to_dicts()
    if not rows:
        answer = "Whether harm is foreseen is undefined here: no two requests can be compared."
        return answer, text + answer
    adjusted = holm([p_of_interval(_difference(row), _units(row)) for row in rows])
    said, shown = [], []
    for row, value in zip(rows, adjusted, strict=True):
        name, low = row["compared_with"].replace("_", " "), row["difference_low"]
        supported = value is not None and value < 0.05 and low is not None and low > 0
        said.append(
            f"Minus {name}: {measured(row, 'difference')}, adjusted p {p_value(value)}: "
            f"{'supported' if supported else 'not supported'}."
        )
        shown.append(f"{'is' if supported else 'is not'} shown to beat {name}")
    answer = f"At the same position the predictor {' and '.join(shown)}."
    return answer, (
        text
        + " ".join(said)
        + " The p-values come from the intervals, with as few degrees of freedom as the number of "
        "harmed requests allows."
    )


def _difference(row: Row) -> Estimate:
    return Estimate(row["difference"], row["difference_low"], row["difference_high"])


def _units(row: Row) -> int:
    """Prompts that are at least behind an AUROC: each is harmed, or not, once per condition."""
    requests, prompts = int(row["requests"]), int(row["prompts"])
    fewer = min(int(row["harmed"]), requests - int(row["harmed"]))
    per_prompt = max(-(-requests // max(prompts, 1)), 1)
    return -(-fewer // per_prompt)


# --- certificate ---------------------------------------------------------------------------------


def certificate_section(tables: Tables, certificate: Certificate, point: str) -> str:
    """The certificate's summary, and a table of the deployed operating point."""
    summary, *rest = certificate.text.splitlines()
    points = "; ".join(rest[: len(certificate.points)])
    rows = tables["certificate"].filter(
        pl.col("operating_point") == point, pl.col("risk").is_in(["harm_left", "alarm"])
    )
    tasks = rows["task"].unique(maintain_order=True).to_list()
    lines = []
    for (press, ratio, recovery), part in rows.group_by(
        "press", "ratio", "recovery", maintain_order=True
    ):
        cells = {(row["task"], row["risk"]): row for row in part.to_dicts()}
        lines.append(
            [
                f"{press} {ratio}",
                str(recovery),
                *(
                    _certified_cell(cells[task, "harm_left"], cells[task, "alarm"])
                    if (task, "harm_left") in cells
                    else "-"
                    for task in tasks
                ),
            ]
        )
    alphas = " and ".join(
        f"at most {float(alpha):.0%} {words}"
        for risk, words in (("harm_left", "harmed and not repaired"), ("alarm", "alarmed"))
        for alpha in rows.filter(risk=risk)["alpha"].unique(maintain_order=True)
    )
    needed = max(rows.filter(risk="harm_left")["units_needed_at_zero"].to_list(), default=0)
    return (
        "### What is certified\n\nShares that are called observed are those of the calibration "
        "prompts, on which the settings were chosen: in sample. The statement beside each allows "
        "for that. All statements are in `tables/certificate`.\n\n"
        + quote(f"{summary} Operating points: {points}.")
        + f"\n\nObserved at the deployed operating point `{point}`: harmed and not repaired, in "
        "brackets the most that the prompts leave possible at the certificate's confidence (for "
        "that statement alone), and alarmed. Bold: certified, which takes that "
        f"{alphas} can be said; at least {needed} prompts, with nothing going wrong on them. After "
        "`continue` a request that alarmed counts as harmed, because no trace proves how it ends."
        "\n\n" + table(["condition", "recovery", *map(str, tasks)], lines)
    )


def _certified_cell(left: Row, alarms: Row) -> str:
    alarmed = "-" if alarms["observed"] is None else f"{alarms['observed']:.0%}"
    text = f"{observed(left)}, {alarmed}"
    return f"**{text}**" if left["certified"] else text


def observed(row: Row) -> str:
    """A share of calibration prompts with its exact upper bound, where each is one request."""
    if row["observed"] is None:
        return "no such request"
    bound = upper_bound(row)
    most = "" if bound is None else f" [at most {bound:.0%}]"
    return f"{row['observed']:.0%} of {row['units']}{most}"


def live_sections(tables: Tables, described: Row) -> list[str]:
    """What live runs alone tell; empty sections are left out."""
    found = [
        f"### In short\n\n{visible_text(tables)}",
        visible_section(tables),
        policies_section(tables, described),
        tasks_section(tables),
        planned_section(tables["planned_tests"]),
    ]
    if not tables["guard_tests"].is_empty():
        found.insert(-1, guard_tests(tables["guard_tests"])[1])
    return [text for text in found if text]


def sections(
    tables: Tables, described: Row, certificate: Certificate
) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before and behind the sections about the predictor; empty ones are left out."""
    before = [
        lead_section(tables, certificate),
        harm_section(tables),
        visible_section(tables),
        policies_section(tables, described),
        tasks_section(tables),
        tests_section(tables),
        planned_section(tables["planned_tests"]),
    ]
    behind = [certificate_section(tables, certificate, described["live"]["operating_point"])]
    return [text for text in before if text], behind

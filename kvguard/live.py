"""The live experiment: policies on the same prompts, through the engine, with what they cost."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import config
from kvguard.audit import first_rejected
from kvguard.costs import matched_ratio, offload_row
from kvguard.detectors import agreement, detect_outcomes, judge_instructions
from kvguard.engine import Session
from kvguard.experiment import (
    AuditColumns,
    audit_completions,
    prepare_requests,
    tokens_frame,
    trace_row,
)
from kvguard.guard_observer import GuardObserver, HazardModel, guarded
from kvguard.guard_report import RowReport
from kvguard.harm import judge_harm
from kvguard.harm_model import HarmModel
from kvguard.joblog import progress
from kvguard.ladder import RatioLadder
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import Predictor, for_press
from kvguard.presses import build_press
from kvguard.probes import marked_tokens, reads_probes
from kvguard.prompts import Example, Prompt, load_task, prompts_frame
from kvguard.replays import replay_for
from kvguard.requests import Completion
from kvguard.rival_settings import NO_GATE, NO_LADDER, gate_risk, gate_scores
from kvguard.rivals import Ladder, Offload, SharedPrefix
from kvguard.schema import RUNS, TOKENS, TRACES, check, conform
from kvguard.splits import prompts_of, read_splits


def run_policy_shard(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    *,
    press: config.Press,
    ratio: str,
    policy: str,
    shard: int,
    experiment: config.Config,
    baseline: pl.DataFrame,
    predictor: HazardModel | None = None,
    controller: config.OperatingPoint | None = None,
    alarm_rate: float | None = None,
    constant_ratio: str | None = None,
    clock_tokens: int | None = None,
    gate_threshold: float | None = None,
    ladder_threshold: float | None = None,
    gate: Predictor | None = None,
    harm_model: HarmModel | None = None,
) -> pl.DataFrame:
    """Run one policy over one condition's prompts.

    Args:
        model: a loaded model.
        prompts: of the test split, all of one task.
        examples: few-shot examples of that task.
        press: the press to guard.
        ratio: its ratio.
        policy: one of config.POLICY_NAMES.
        shard: number, stored in the rows.
        experiment: the whole configuration.
        baseline: OUTCOMES that hold the uncompressed run of these prompts.
        predictor: for the guard's policies.
        controller: their thresholds.
        alarm_rate: share of requests that ``random`` alarms.
        constant_ratio: the ratio of ``constant``.
        clock_tokens: when ``clock_or_loop`` alarms.
        gate_threshold: of the score of ``gate``.
        ladder_threshold: of ``ladder``, whose ratios are the press's up to ``ratio``.
        gate: scores the probes of a prefill for both; None: ``gate`` goes by the first token's
            entropy, and ``ladder`` starts every request at ``ratio``.
        harm_model: of ``guard_price``; its gate scores the probes; None: its default.

    Returns:
        RUNS, source "live", one row a prompt in the prompts' order. What a request failed with is
        in its row. ``tokens_prefilled`` counts a shared prefix for every pass that starts with it,
        as if nothing were shared; ``seconds`` are those of the shared computation.
    """
    ready = prepare_requests(model, prompts, examples, experiment)
    rule = make_policy(
        policy,
        ready.rows,
        max_new_tokens=ready.decoding.max_new_tokens,
        live=experiment.live,
        controller=controller,
        check_every_tokens=experiment.guard.check_every_tokens,
        alarm_rate=alarm_rate,
        press_ratio=constant_ratio,
        clock_tokens=clock_tokens,
        gate_threshold=gate_threshold,
        ladder_threshold=ladder_threshold,
        harm_model=harm_model,
    )
    detection, guard = experiment.detection, experiment.guard
    compressor = build_press(press, rule.press_ratio or ratio)
    scores = ladder = None
    if policy == "guard_price" and harm_model is not None:
        scores = harm_model.scorer(press.name, float(ratio))
    if policy == "gate" and gate is not None:
        scores = partial(gate_scores, gate, press=press.name, ratio=float(ratio))
    if isinstance(rule, Ladder):
        ladder = make_ladder(press, ratio, gate, float(rule.threshold[0]))
    reader = {"guard_price": harm_model, "gate": gate}.get(policy, predictor)
    probes = (rule.needs_hazard and reads_probes(predictor)) or scores is not None
    probes |= ladder is not None and gate is not None
    session = Session(
        model.model,
        ready.decoding,
        press=compressor,
        rows=ready.rows,
        prefix=ready.prefix,
        cold=guard.cold
        if (rule.checks and not rule.fresh_checks) or rule.chooses_ratio
        else "none",
        probes=probes,
        replay=replay_for(reader, waits=policy == "guard_price"),
        marked=marked_tokens(model.tokenizer, model.model.config.vocab_size) if probes else None,
        ladder=ladder,
        sharing="full" if isinstance(rule, SharedPrefix) else guard.sharing,
    )
    observer = GuardObserver(
        session,
        rule,
        predictor=for_press(predictor, press.name),
        probe_score=scores,
        bus_ratio=guard.bus_ratio,
        ratio=float(rule.press_ratio or ratio),
        safe_ratio=0.0 if isinstance(rule, (Offload, SharedPrefix)) else float(guard.safe_ratio),
        margin_nats=guard.margin_nats,
        tolerance=guard.tolerance,
        check_every_tokens=guard.check_every_tokens,
        holdback_tokens=guard.holdback_tokens,
        released=lambda _key, _tokens: None,  # counts what a streaming user would have seen
        final=False,
    )
    keys = {"model": model.name, "press": press.name, "ratio": ratio}
    place = {"task": prompts[0].task, "shard": shard}
    traces, tokens, rows = [], [], []
    reports: dict[str, RowReport] = {}

    def finished() -> Iterator[Completion]:
        for completion, report in guarded(session, ready.requests, observer):
            reports[completion.request.key] = report
            yield completion

    with progress(len(prompts), f"{press.name} {ratio} {policy} shard {shard:02d}") as advance:
        for completion, audit, _ in audit_completions(model, finished(), ready):
            report = reports[completion.request.key]
            if policy in ("gate", "ladder") and gate is None:
                report.notes.append(NO_GATE if policy == "gate" else NO_LADDER)
            row = trace_row(completion, model, ready.decoding) | keys | place
            if isinstance(rule, Offload):
                row = offload_row(row, model.model.config.num_hidden_layers)
            traces.append(row)
            rows.append(_report_row(completion, report))
            if audit is not None:
                tokens.append(_audited_tokens(completion, report, audit, keys, guard.margin_nats))
            advance(1, f"{len(report.alarm_steps)} alarms")
    frame = pl.DataFrame(traces, schema=TRACES)
    outcomes = detect_outcomes(
        prompts_frame(prompts), frame, pl.concat([pl.DataFrame(schema=TOKENS), *tokens]), detection
    )
    outcomes = outcomes.with_columns(agrees=agreement(outcomes, baseline))
    ended = outcomes.join(
        frame.select("prompt_id", "stop_reason"), on="prompt_id", how="left", maintain_order="left"
    )
    outcomes = outcomes.with_columns(judge_harm(ended, baseline))
    outcomes = judge_instructions(outcomes, prompts_frame(prompts))
    order = pl.DataFrame({"prompt_id": [prompt.prompt_id for prompt in prompts]})
    runs = (
        order.join(frame, on="prompt_id", maintain_order="left")
        .join(pl.DataFrame(rows, schema=_REPORT), on="prompt_id", maintain_order="left")
        .join(
            outcomes.drop("model", "press", "ratio", "task"), on="prompt_id", maintain_order="left"
        )
        .with_columns(policy=pl.lit(policy), source=pl.lit("live"))
    )
    return check(conform(runs, RUNS), RUNS, "runs")


def repeat_full_cache(
    runs: pl.DataFrame, press: str, ratio: str, policy: str, layers: int
) -> pl.DataFrame:
    """Live runs of ``always_safe`` as those of another condition, or as ``offload``.

    With a safe ratio of 0 no press is at work in either: under every press and ratio they are the
    same computation. ``seconds`` are those of the one that ran; of ``offload`` they are null. Runs
    of ``shared_prefix`` are those of its other conditions alike.

    Args:
        runs: RUNS of ``always_safe``, one condition; of ``shared_prefix`` for that policy.
        press: of the other condition.
        ratio: of the other condition.
        policy: ``always_safe``, ``offload`` or ``shared_prefix``.
        layers: of the model.
    """
    rows = runs.to_dicts()
    if policy == "offload":
        rows = [offload_row(row, layers) for row in rows]
    named = {"press": press, "ratio": ratio, "policy": policy}
    return check(pl.DataFrame([row | named for row in rows], schema=RUNS), RUNS, "runs")


def make_ladder(
    press: config.Press, ratio: str, gate: Predictor | None, threshold: float
) -> RatioLadder:
    """The ladder of a press's ratios, a condition's own at most, with a gate's risk."""
    ratios = sorted((each for each in press.ratios if each <= ratio), reverse=True)
    risk = None if gate is None else partial(gate_risk, gate, press.name)
    return RatioLadder({each: build_press(press, each) for each in ratios}, risk, threshold)


def live_prompts(
    experiment: config.Config, count: int, folder: Path | None
) -> tuple[list[Prompt], list[Example]]:
    """Prompts of the experiment's first task, and its few-shot examples.

    Args:
        experiment: its seed draws the prompts.
        count: how many.
        folder: of the results of a run: where it has splits, the prompts are of its test split, so
            that a predictor trained there has not seen them. None: the first prompts of the task.

    Raises:
        ConfigError: the run has fewer test prompts of that task.
    """
    task = experiment.tasks[0]
    path = None if folder is None else folder / "splits.parquet"
    if path is None or not path.is_file():
        return load_task(task.model_copy(update={"num_prompts": count}), experiment.seed)
    splits = read_splits(path)
    stored = max(splits.filter(pl.col("task") == task.name).height, count)
    drawn, examples = load_task(task.model_copy(update={"num_prompts": stored}), experiment.seed)
    test = set(prompts_of(splits, "test"))
    prompts = [prompt for prompt in drawn if prompt.prompt_id in test]
    if len(prompts) < count:
        raise config.ConfigError(
            f"--num-prompts: of the prompts of task {task.name}, {path} has {len(prompts)} in its "
            f"test split, got {count}; give fewer, the run's --config, or --seed for new prompts"
        )
    return prompts[:count], examples


def match_guard(
    runs: pl.DataFrame, policy: str, *, model: str, press: str, ratio: str
) -> dict[str, Any]:
    """What makes a rival comparable to ``guard_promote`` in one condition: arguments of a live run.

    ``random`` gets the share of requests that the simulated guard alarms as ``alarm_rate``.
    ``constant`` gets as ``constant_ratio`` the mildest ratio at which the press costs the mean
    device byte-steps that the guard was measured to cost live (`costs.matched_ratio`), between the
    press's ratios, ratio 0 included, on the same prompts. The simulation's byte-steps of a request
    that the guard touched are a low estimate and would give a rival less memory. Other policies
    need nothing.

    Args:
        runs: RUNS: with source "simulation" ``guard_promote`` for its alarms and ``none``, whose
            costs are the measured traces'; for ``constant`` with source "live" ``guard_promote``.
        policy: one of config.POLICY_NAMES.
        model: of the condition.
        press: of the condition.
        ratio: of the condition.

    Raises:
        ValueError: the guard or its cost in this condition is not among the runs.
    """
    if policy not in ("random", "constant"):
        return {}
    source = "simulation" if policy == "random" else "live"
    where = f"{model} {press} {ratio}"
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("model") == model))
    guard = ran.filter(
        (pl.col("policy") == "guard_promote")
        & (pl.col("source") == source)
        & (pl.col("press") == press)
        & (pl.col("ratio") == ratio)
    )
    if not guard.height:
        raise ValueError(f"no guard_promote with source {source!r} for {where}")
    if policy == "random":
        return {"alarm_rate": float(guard["alarmed"].to_numpy().mean())}
    alone = (pl.col("policy") == "none") & (pl.col("source") == "simulation")
    measured = (
        ran.filter(alone & pl.col("press").is_in([press, config.BASELINE]))
        .join(guard.select("prompt_id"), on="prompt_id", how="semi")
        .group_by("ratio")
        .agg(pl.col("device_byte_steps").mean())
        .drop_nulls()
    )
    if guard["device_byte_steps"].null_count() or not measured.height:
        raise ValueError(f"the device byte-steps of guard_promote for {where} are not known")
    found = matched_ratio(
        measured["ratio"].cast(pl.Float64).to_numpy(),
        measured["device_byte_steps"].to_numpy(),
        float(guard["device_byte_steps"].to_numpy().mean()),
    )
    return {"constant_ratio": f"{found:.3f}"}


_REPORT = {
    name: RUNS[name]
    for name in (
        "prompt_id",
        "token_ids",
        "alarmed",
        "alarm_steps",
        "rewound_to",
        "unrecoverable",
        "start_ratio",
    )
}


def _report_row(completion: Completion, report: RowReport) -> dict[str, object]:
    ok = completion.error is None
    return {
        "prompt_id": completion.request.key,
        "token_ids": completion.token_ids if ok else None,
        "alarmed": bool(report.alarm_steps),
        "alarm_steps": report.alarm_steps,
        "rewound_to": report.rewound_to,
        "unrecoverable": report.unrecoverable,
        "start_ratio": report.start_ratio,
    }


def _audited_tokens(
    completion: Completion,
    report: RowReport,
    audit: AuditColumns,
    keys: dict[str, str],
    margin_nats: float,
) -> pl.DataFrame:
    """TOKENS of the final answer, audited; an audit is a measurement and costs the policy nothing.

    Tokens that a recovery verified and the uncompressed model accepts are as much its own: their
    log-likelihood ratio is 0.
    """
    rejected = first_rejected(audit["audit_gap"], margin_nats)
    verified = max(report.rewound_to, default=0)
    if rejected is not None:
        verified = min(verified, rejected)
    frame = tokens_frame(completion, keys | {"prompt_id": completion.request.key}, audit, own=False)
    accepted = pl.col("position") < pl.lit(verified, pl.Int32)
    return frame.with_columns(
        chosen_logprob=pl.when(accepted).then("audit_logprob").otherwise("chosen_logprob"),
        llr=pl.when(accepted).then(pl.lit(0.0, pl.Float32)).otherwise("llr"),
    )

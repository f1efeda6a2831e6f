"""Schema-valid synthetic runs with planted truth, for tests that need data but no language model.

Every outcome is planted: the token ids, texts and log-likelihood ratios are built so that the
default `kvguard.config.Detection` finds exactly the kinds and onsets that were chosen first. The
signals of a token are those of a real softmax over a small vocabulary, flattened more and more in
the 32 tokens before the onset, so that a predictor has something to learn.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import schema

VOCABULARY = 32
"""Size of the softmax behind the signals; token ids are drawn from a larger range."""

TOKEN_IDS = 4000
RAMP_TOKENS = 32
LOOP_WINDOW_TOKENS = 20
LLR_WINDOW_TOKENS = 16
KINDS = ("looping", "non_termination", "amnesia", "divergence", "harmless")
CONDITIONS = (("none", "0.000"), ("snapkv", "0.500"), ("snapkv", "0.750"))


class SyntheticRun(NamedTuple):
    """Tables of one run; ``outcomes`` is the planted truth under the default detection."""

    prompts: pl.DataFrame
    traces: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame


class RunFiles(NamedTuple):
    """Where `write_run` put a run: the layout of a results folder."""

    results: Path
    prompts: Path
    traces: list[Path]
    tokens: list[Path]
    outcomes: Path


class _Plan(NamedTuple):
    """What is planted in one trace; positions count generated tokens from 0."""

    kind: str
    length: int
    loop_start: int | None  # first token of the repeated cycle
    period: int | None
    lift: int | None  # from here on the LLR is high
    lift_nats: tuple[float, float]
    stop_reason: str


def make_run(
    num_prompts: int = 24,
    conditions: Sequence[tuple[str, str]] = CONDITIONS,
    model: str = "tiny",
    seed: int = 0,
    max_new_tokens: int = 64,
    error_rate: float = 0.03,
    shard_size: int = 8,
) -> SyntheticRun:
    """Make a run of ``num_prompts`` prompts under each (press, ratio) condition.

    With at least six prompts, every compressed condition holds each of `KINDS` at least once. With
    a positive ``error_rate`` at least one trace of the last condition is an error row too.

    Raises:
        ValueError: ``max_new_tokens`` is too small to hold three occurrences of a loop's window.
    """
    if max_new_tokens < 56:
        raise ValueError(f"max_new_tokens must be at least 56 to plant loops, got {max_new_tokens}")
    prompts = _prompts(num_prompts)
    references = prompts["reference"].to_list()
    traces: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    tokens: list[pl.DataFrame] = []
    for number, (press, ratio) in enumerate(conditions):
        rng = np.random.default_rng([seed, number, num_prompts])
        last = number == len(conditions) - 1
        for index, prompt_id in enumerate(prompts["prompt_id"].to_list()):
            keys = {"model": model, "press": press, "ratio": ratio, "prompt_id": prompt_id}
            task = {"task": "synthetic"}
            slot = (index + 5 * number) % num_prompts
            forced = error_rate > 0 and last and slot == len(KINDS)
            failed = forced or bool(rng.random() < error_rate and slot >= len(KINDS))
            plan = _plan(rng, slot, float(ratio), max_new_tokens)
            trace = (
                keys
                | task
                | {
                    "shard": index // shard_size,
                    "seed": seed,
                    "max_new_tokens": max_new_tokens,
                    "prompt_tokens": 100 + index,
                }
            )
            if failed:
                error = "ValueError: the prompt is too short for the press"
                traces.append(trace | {"status": "error", "error": error, "generated_tokens": 0})
                outcomes.append(keys | task)
                continue
            frame, text, answer, rejected = _generate(
                rng, plan, float(ratio), int(references[index])
            )
            frame = frame.with_columns(pl.lit(value).alias(key) for key, value in keys.items())
            tokens.append(schema.conform(frame, schema.TOKENS))
            before = 9216 * (100 + index)
            kept = round(before * (1 - float(ratio)))
            traces.append(
                trace
                | {
                    "status": "ok",
                    "generated_tokens": plan.length,
                    "stop_reason": plan.stop_reason,
                    "text": text,
                    "cache_bytes_before": before,
                    "cache_bytes_after": kept,
                    "kv_kept_bytes_mean": kept + 4608.0 * plan.length,
                    "kv_masked_bytes_mean": 0.0,
                    "kv_padding_bytes_mean": 1024.0,
                    "kv_allocated_bytes_peak": kept + 9216 * plan.length + 1024,
                    "prefill_seconds": 0.2,
                    "decode_seconds": 0.01 * plan.length,
                    "audit_seconds": 0.1,
                }
            )
            outcomes.append(
                keys
                | task
                | _planted(plan, frame["llr"].to_numpy(), max_new_tokens)
                | {
                    "first_rejected": rejected,
                    "answer": answer,
                    "answered": answer is not None,
                    "right": answer == references[index],
                }
            )
    planted = pl.DataFrame(_with_harm(outcomes), schema=schema.OUTCOMES)
    return SyntheticRun(
        prompts,
        pl.DataFrame(traces, schema=schema.TRACES),
        pl.concat(tokens) if tokens else pl.DataFrame(schema=schema.TOKENS),
        planted.with_columns(pl.Series("agrees", _agreement(planted), dtype=pl.Boolean)),
    )


def write_run(run: SyntheticRun, results: Path) -> RunFiles:
    """Write a run's tables as the files of a results folder, one file a shard."""
    schema.write_table(run.prompts, results / "prompts" / "prompts.parquet", schema.PROMPTS)
    schema.write_table(run.outcomes, results / "outcomes.parquet", schema.OUTCOMES)
    traces, tokens = [], []
    groups = run.traces.group_by("model", "press", "ratio", "shard", maintain_order=True)
    for (model, press, ratio, shard), part in groups:
        name = Path(str(model), str(press), str(ratio), f"{shard:02d}.parquet")
        own = run.tokens.join(part.select(schema.TRACE_KEYS), on=schema.TRACE_KEYS, how="semi")
        schema.write_table(part, results / "traces" / name, schema.TRACES)
        schema.write_table(own, results / "tokens" / name, schema.TOKENS)
        traces.append(results / "traces" / name)
        tokens.append(results / "tokens" / name)
    return RunFiles(
        results,
        results / "prompts" / "prompts.parquet",
        traces,
        tokens,
        results / "outcomes.parquet",
    )


def _prompts(num_prompts: int) -> pl.DataFrame:
    rows = []
    for index in range(num_prompts):
        first, second = 3 + index, 2 + index % 7
        question = f"Ada has {first} shelves with {second} books each. How many books is that?"
        answer = str(first * second)
        reference = f"{first} times {second} is {answer}.\n#### {answer}"
        identity = "\n".join(("synthetic", question, reference))
        rows.append(
            {
                "prompt_id": hashlib.sha256(identity.encode()).hexdigest()[:16],
                "task": "synthetic",
                "kind": "gsm8k",
                "template": None,
                "index": index,
                "question": question,
                "reference": answer,
                "spec": json.dumps({"answer": answer}),
            }
        )
    return pl.DataFrame(rows, schema=schema.PROMPTS)


def _plan(rng: np.random.Generator, slot: int, ratio: float, max_new_tokens: int) -> _Plan:
    failing = 0.35 + 0.5 * ratio
    shares = [0.3 * failing, 0.3 * failing, 0.2 * failing, 0.2 * failing, 1 - failing]
    if ratio == 0:
        kind = str(rng.choice(KINDS, p=[0.03, 0.05, 0.0, 0.0, 0.92]))
    else:
        kind = KINDS[slot] if slot < len(KINDS) else str(rng.choice(KINDS, p=shares))
    length = int(rng.integers(40, max_new_tokens))
    stop_reason = "eos"
    if kind == "non_termination" or (kind == "looping" and rng.random() < 0.5):
        length, stop_reason = max_new_tokens, "length"
    loop_start = period = lift = None
    lift_nats = (-0.004, 0.0)
    if kind == "looping":
        period = int(rng.integers(1, 7))
        length = max(length, 54)
        latest = length - LOOP_WINDOW_TOKENS - 2 * period
        loop_start = int(rng.integers(latest // 2, latest + 1))
    elif kind == "amnesia":
        lift, lift_nats = int(rng.integers(12, length - LLR_WINDOW_TOKENS + 1)), (1.01, 1.06)
    elif kind == "divergence":
        lift, lift_nats = int(rng.integers(12, length - LLR_WINDOW_TOKENS + 1)), (0.305, 0.318)
    return _Plan(kind, length, loop_start, period, lift, lift_nats, stop_reason)


def _planted(plan: _Plan, llr: NDArray[np.float32], max_new_tokens: int) -> dict[str, Any]:
    """Kinds and onsets that follow from the plan alone, under the default detection."""
    looping = amnesia = divergence = None
    if plan.loop_start is not None and plan.period is not None:
        looping = plan.loop_start + plan.period
    ran_out = -(-3 * max_new_tokens // 4) if plan.stop_reason == "length" else None
    if plan.kind == "amnesia" and plan.lift is not None:
        # 5 lifted tokens of 16 already average more than 0.3 nats, 4 do not.
        amnesia, divergence = plan.lift, plan.lift - 11
    elif plan.kind == "divergence":
        divergence = plan.lift
    onsets = [onset for onset in (looping, ran_out, amnesia) if onset is not None]
    windows = np.lib.stride_tricks.sliding_window_view(llr.astype(np.float64), LLR_WINDOW_TOKENS)
    return {
        "looping": looping is not None,
        "looping_onset": looping,
        "non_termination": ran_out is not None,
        "non_termination_onset": ran_out,
        "amnesia": amnesia is not None,
        "amnesia_onset": amnesia,
        "divergence": divergence is not None,
        "divergence_onset": divergence,
        "catastrophe": bool(onsets),
        "onset": min(onsets, default=None),
        "max_windowed_llr": float(windows.mean(axis=1).max()),
    }


def _generate(
    rng: np.random.Generator, plan: _Plan, ratio: float, reference: int
) -> tuple[pl.DataFrame, str, str | None, int | None]:
    """Token rows without keys, the text, its answer and the first rejected position."""
    length = plan.length
    ids = rng.choice(TOKEN_IDS, size=length, replace=False)
    onset = length + RAMP_TOKENS
    if plan.loop_start is not None and plan.period is not None:
        inside = np.arange(length) >= plan.loop_start
        cycle = (np.arange(length) - plan.loop_start) % plan.period + plan.loop_start
        ids = np.where(inside, ids[np.where(inside, cycle, 0)], ids)
        onset = plan.loop_start + plan.period
    elif plan.lift is not None:
        onset = plan.lift
    elif plan.stop_reason == "length":
        onset = -(-3 * length // 4)
    position = np.arange(length)
    risk = np.clip(1 - (onset - position) / RAMP_TOKENS, 0, 1)

    scale = 3.2 - 1.6 * risk + rng.normal(0, 0.15, length) + rng.normal(0, 0.2)
    logits = np.maximum(scale, 0.4)[:, None] * rng.standard_normal((length, VOCABULARY))
    logprob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logprob = -np.sort(-logprob, axis=1)  # (length, VOCABULARY), largest first
    probability = np.exp(logprob)
    others = probability[:, 1:] / probability[:, 1:].sum(axis=1, keepdims=True)
    entropy = -(probability * logprob).sum(axis=1)
    chosen = logprob[:, 0]

    low, high = plan.lift_nats
    lifted = position >= (length if plan.lift is None else plan.lift)
    llr = np.where(lifted, rng.uniform(low, high, length), rng.uniform(-0.004, 0, length))
    llr = np.maximum(llr, chosen) if ratio > 0 else np.zeros(length)
    chosen32 = chosen.astype(np.float32)
    audit = np.minimum(chosen32 - llr.astype(np.float32), np.float32(0))

    gap = np.zeros(length, dtype=np.float32)
    rejected: int | None = None
    open_to_doubt = np.flatnonzero(audit < -0.05)
    if ratio > 0 and len(open_to_doubt) > 4 and (plan.kind != "harmless" or rng.random() < 0.7):
        rejected = int(open_to_doubt[rng.integers(0, len(open_to_doubt) // 2)])
        later = (position > rejected) & (rng.random(length) < 0.3)
        doubt = later | (position == rejected)
        gap = np.where(doubt, np.minimum(0.5, -0.9 * audit), 0).astype(np.float32)

    answer: str | None = None
    if plan.kind in ("harmless", "amnesia", "divergence") and rng.random() < 0.9:
        wrong = plan.kind != "harmless" or rng.random() < 0.2
        answer = str(reference + int(rng.integers(1, 9)) if wrong else reference)
    text = " ".join(f"word{token}" for token in ids.tolist())
    if answer is not None:
        text += f"\n#### {answer}"
    frame = pl.DataFrame(
        {
            "position": position,
            "token_id": ids,
            "entropy": entropy,
            "alternatives_entropy": -(others * np.log(others)).sum(axis=1),
            "top1_probability": probability[:, 0],
            "top5_probability": probability[:, :5].sum(axis=1),
            "mean_logprob": logprob.mean(axis=1),
            "entropy_delta": pl.Series([None, *np.diff(entropy).tolist()], dtype=pl.Float32),
            "chosen_logprob": chosen32,
            "chosen_rank": np.zeros(length, dtype=np.int32),
        }
        | {
            f"top_logprob_{rank:02d}": logprob[:, rank].astype(np.float32)
            for rank in range(schema.TOP_LOGPROBS)
        }
        | {
            "audit_logprob": audit,
            "audit_is_argmax": gap == 0,
            "audit_gap": gap,
            "llr": chosen32 - audit,
        }
    )
    return frame, text, answer, rejected


def _with_harm(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DESIGN's harm, one trace at a time; every synthetic prompt has a right answer."""
    baseline = {row["prompt_id"]: row.get("right") for row in outcomes if row["press"] == "none"}
    judged = []
    for row in outcomes:
        right, before = row.get("right"), baseline.get(row["prompt_id"])
        harm: dict[str, Any] = {"baseline_right": before}
        if right is not None and before is not None:
            ended = not row["looping"] and not row["non_termination"]
            harm |= {"harmed": before and not right, "rescued": right and not before}
            harm["silent_harm"] = harm["harmed"] and ended
        judged.append(row | harm)
    return judged


def _agreement(outcomes: pl.DataFrame) -> list[bool | None]:
    """DESIGN's rule, one trace at a time: the same answer, or both silent and neither broken."""
    rows = outcomes.to_dicts()
    baseline = {row["prompt_id"]: row for row in rows if row["press"] == "none"}
    agrees: list[bool | None] = []
    for row in rows:
        other = baseline.get(row["prompt_id"])
        if row["catastrophe"] is None or other is None or other["catastrophe"] is None:
            agrees.append(None)
        elif row["press"] == "none":
            agrees.append(True)
        elif row["answer"] is None and other["answer"] is None:
            broken = [entry["looping"] or entry["non_termination"] for entry in (row, other)]
            agrees.append(not any(broken))
        else:
            agrees.append(row["answer"] == other["answer"])
    return agrees

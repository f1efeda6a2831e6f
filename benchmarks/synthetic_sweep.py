"""A sweep that nobody ran, as large as wanted: traces, tokens and outcomes with planted harm.

No benchmark itself; `benchmarks/scale.py` measures on it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import schema
from kvguard.config import BASELINE, BASELINE_RATIO, Splits
from kvguard.splits import split_prompts

MODEL = "synthetic"
PRESSES = ("streaming_llm", "snapkv", "observed_attention")
RATIOS = ("0.250", "0.500", "0.625", "0.750", "0.875")
CONDITIONS = ((BASELINE, BASELINE_RATIO), *((press, r) for press in PRESSES for r in RATIOS))
"""Those of experiments/paper.yaml."""

MAX_NEW_TOKENS = 512
PROMPTS_PER_SHARD = 250
VOCABULARY = 49_152
RAMP_TOKENS = 32
"""Tokens over which the entropy rises before a planted onset."""

Ints = NDArray[np.int64]


class Sweep(NamedTuple):
    """Where `make_sweep` wrote its tables."""

    folder: Path
    rows: int
    prompts: Path
    outcomes: Path
    splits: Path
    traces: list[Path]
    tokens: list[Path]


class _Plan(NamedTuple):
    """What is planted in the requests of one condition and shard; a missing onset is -1."""

    length: Ints  # (n,)
    token_ids: Ints  # (n, T) behind the length: what would have come
    differs: Ints  # (n,) first token that is not the uncompressed one; -1: none is
    right: NDArray[np.bool_]  # (n,)
    harm_onset: Ints  # (n,)
    loop_onset: Ints  # (n,)


def make_sweep(
    folder: Path,
    rows: int,
    *,
    conditions: Sequence[tuple[str, str]] = CONDITIONS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prompts_per_shard: int = PROMPTS_PER_SHARD,
    seed: int = 0,
) -> Sweep:
    """Write the tables of a sweep that nobody ran, at least ``rows`` tokens long.

    Every prompt has a right answer. Uncompressed, 80 % of the answers are right; under compression
    a request is harmed with a chance that grows with the ratio, and loops with a small one. The
    entropy rises over the `RAMP_TOKENS` tokens before such an onset. A compressed answer is the
    uncompressed one up to its first difference, which its audit rejects, so that the simulation
    finds what it relies on. All numbers are random; only their shape is that of a real run.

    Args:
        folder: of the results; the layout is that of the workflow.
        rows: token rows, of all conditions together.
        conditions: (press, ratio) pairs; the first is the uncompressed baseline.
        max_new_tokens: longest answer; lengths are uniform from a quarter of it.
        prompts_per_shard: prompts of one file.
        seed: of everything.
    """
    traces: list[Path] = []
    tokens: list[Path] = []
    outcomes: list[pl.DataFrame] = []
    ids: list[str] = []
    made = shard = 0
    while made < rows:
        left = -(-(rows - made) // (len(conditions) * (max_new_tokens * 5 // 8)))
        count = min(prompts_per_shard, left)
        names = [f"{index:016x}" for index in range(len(ids), len(ids) + count)]
        ids += names
        base = _baseline(np.random.default_rng([seed, shard]), count, max_new_tokens)
        for number, (press, ratio) in enumerate(conditions):
            rng = np.random.default_rng([seed, shard, number + 1])
            plan = base if press == BASELINE else _compressed(rng, base, float(ratio))
            keys = pl.DataFrame(
                {"model": MODEL, "press": press, "ratio": ratio, "prompt_id": names}
            )
            made += int(plan.length.sum())
            place = Path(MODEL, press, ratio, f"{shard:02d}.parquet")
            traces.append(folder / "traces" / place)
            tokens.append(folder / "tokens" / place)
            own = _traces(rng, keys, plan, shard, max_new_tokens)
            schema.write_table(own, traces[-1], schema.TRACES)
            schema.write_table(_tokens(rng, keys, plan), tokens[-1], schema.TOKENS)
            outcomes.append(_outcomes(keys, plan, base, max_new_tokens))
        shard += 1
        measuring.say(f"made {made:,} of {rows:,} token rows")
    prompts = _prompts(ids)
    splits = split_prompts(prompts, Splits(), seed)
    sweep = Sweep(
        folder,
        made,
        folder / "prompts" / "prompts.parquet",
        folder / "outcomes.parquet",
        folder / "splits.parquet",
        traces,
        tokens,
    )
    schema.write_table(prompts, sweep.prompts, schema.PROMPTS)
    schema.write_table(pl.concat(outcomes), sweep.outcomes, schema.OUTCOMES)
    schema.write_table(splits, sweep.splits, schema.SPLITS)
    return sweep


def _prompts(ids: Sequence[str]) -> pl.DataFrame:
    frame = pl.DataFrame({"prompt_id": ids}).with_columns(
        pl.lit("synthetic").alias("task"),
        pl.lit("gsm8k").alias("kind"),
        pl.lit(None, pl.String).alias("template"),
        pl.int_range(pl.len(), dtype=pl.Int32).alias("index"),
        pl.format("What is {}?", "prompt_id").alias("question"),
        pl.lit("7").alias("reference"),
        pl.lit(json.dumps({"answer": "7"})).alias("spec"),
    )
    return schema.conform(frame, schema.PROMPTS)


def _baseline(rng: np.random.Generator, count: int, max_new_tokens: int) -> _Plan:
    length = rng.integers(max_new_tokens // 4, max_new_tokens, count)
    token_ids = np.minimum(rng.zipf(1.3, (count, max_new_tokens)), VOCABULARY - 1)
    nowhere = np.full(count, -1)
    return _Plan(length, token_ids, nowhere, rng.random(count) < 0.8, nowhere, nowhere)


def _compressed(rng: np.random.Generator, base: _Plan, ratio: float) -> _Plan:
    count, steps = base.token_ids.shape
    same = rng.random(count) < 0.2 * (1 - ratio)
    length = np.where(same, base.length, rng.integers(steps // 4, steps, count))
    loops = np.logical_and(~same, rng.random(count) < 0.1 * ratio)
    length = np.where(loops, steps, length)
    shorter = np.minimum(length, base.length)
    differs = np.where(same, -1, (rng.random(count) * shorter / 2).astype(np.int64))
    at = np.arange(steps)
    fresh = np.minimum(rng.zipf(1.3, (count, steps)), VOCABULARY - 1)
    fresh = np.where(fresh == base.token_ids, (fresh + 1) % VOCABULARY, fresh)
    changed = (differs[:, None] >= 0) & (at >= differs[:, None])
    token_ids = np.where(changed, fresh, base.token_ids)
    start = differs + 1 + (rng.random(count) * (steps // 4)).astype(np.int64)
    loop_onset = np.where(loops, start + 4, -1)
    cycle = start[:, None] + (at - start[:, None]) % 4  # from its second occurrence on it repeats
    repeated = np.take_along_axis(token_ids, np.clip(cycle, 0, steps - 1), axis=1)
    token_ids = np.where(loops[:, None] & (at >= start[:, None]), repeated, token_ids)
    harmed = base.right & ~same & (loops | (rng.random(count) < 0.6 * ratio))
    onset = differs + (rng.random(count) * (length - differs)).astype(np.int64)
    onset = np.where(loops, loop_onset, onset)
    right = np.where(base.right, ~harmed, ~same & ~loops & (rng.random(count) < 0.05))
    return _Plan(length, token_ids, differs, right, np.where(harmed, onset, -1), loop_onset)


def _traces(
    rng: np.random.Generator, keys: pl.DataFrame, plan: _Plan, shard: int, max_new_tokens: int
) -> pl.DataFrame:
    count = keys.height
    ratio = float(keys["ratio"][0])
    prompt_tokens = np.array([400 + int(name, 16) % 200 for name in keys["prompt_id"]])
    entry = 36_864  # bytes of one token's entries
    kept = np.round(prompt_tokens * (1 - ratio)) * entry
    mean = kept + entry * plan.length / 2
    words = np.where(plan.right, "7", "8")
    long = plan.length >= max_new_tokens
    known: dict[str, Any] = {
        "task": "synthetic",
        "shard": shard,
        "seed": 0,
        "status": "ok",
        "prompt_tokens": prompt_tokens,
        "generated_tokens": plan.length,
        "max_new_tokens": max_new_tokens,
        "stop_reason": np.where(long, "length", "eos"),
        "text": np.char.add("one word and another\n#### ", words),
        "cache_bytes_before": entry * prompt_tokens,
        "cache_bytes_after": kept,
        "kv_kept_bytes_mean": mean,
        "kv_masked_bytes_mean": 0.0,
        "kv_padding_bytes_mean": 0.0,
        "kv_allocated_bytes_peak": kept + entry * plan.length,
        "prefill_seconds": 0.2,
        "decode_seconds": 0.01 * plan.length,
        "audit_seconds": 0.1,
        "device_byte_steps": mean * (plan.length - 1),
    }
    harmed = plan.harm_onset >= 0
    probes = rng.normal(size=(count, len(schema.PROBE_NAMES))) + harmed[:, None]
    frame = keys.with_columns(
        *(
            pl.lit(value).alias(name) if np.isscalar(value) else pl.Series(name, value)
            for name, value in known.items()
        ),
        *(pl.Series(name, probes[:, at]) for at, name in enumerate(schema.PROBE_NAMES)),
    )
    return _completed(frame, schema.TRACES)


def _tokens(rng: np.random.Generator, keys: pl.DataFrame, plan: _Plan) -> pl.DataFrame:
    rows = int(plan.length.sum())
    request = np.repeat(np.arange(len(plan.length)), plan.length)
    position = np.arange(rows) - np.repeat(np.cumsum(plan.length) - plan.length, plan.length)
    onset = np.where(plan.loop_onset >= 0, plan.loop_onset, plan.harm_onset)[request]
    near = 1 - (onset - position) / RAMP_TOKENS
    risk = np.where(onset >= 0, np.clip(near, 0, 1), 0).astype(np.float32)
    # ranks' log-probabilities: ever larger steps down from the first, larger where it is certain
    steps = rng.standard_exponential((rows, schema.TOP_LOGPROBS), np.float32)
    steps[:, 0] *= 0.3 * (1 + 2 * risk)
    steps[:, 1:] *= (2 - 1.5 * risk)[:, None]
    logprobs = -np.cumsum(steps, axis=1)
    top, five = np.exp(logprobs[:, 0]), np.exp(logprobs[:, :5]).sum(axis=1)
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1) + 0.3 * rng.random(rows, np.float32)
    rejected = position == plan.differs[request]
    gap = np.where(rejected, 0.5 + rng.random(rows, np.float32), 0).astype(np.float32)
    llr = np.where(rejected, gap, 0.02 * rng.standard_normal(rows, np.float32))
    chosen = logprobs[:, 0]
    audit = np.minimum(chosen - llr, 0)
    frame = keys[request].with_columns(
        pl.Series("position", position),
        pl.Series("token_id", plan.token_ids[request, position]),
        pl.Series("entropy", entropy),
        pl.Series("alternatives_entropy", entropy * (1 - top)),
        pl.Series("top1_probability", top),
        pl.Series("top5_probability", np.minimum(five, 1)),
        pl.Series("mean_logprob", logprobs.mean(axis=1)),
        pl.Series("entropy_delta", np.diff(entropy, prepend=np.float32(0))),
        pl.Series("chosen_logprob", chosen),
        pl.lit(0).alias("chosen_rank"),
        *(
            pl.Series(f"top_logprob_{rank:02d}", logprobs[:, rank])
            for rank in range(schema.TOP_LOGPROBS)
        ),
        pl.Series("audit_logprob", audit),
        pl.Series("audit_is_argmax", ~rejected),
        pl.Series("audit_gap", gap),
        pl.Series("llr", chosen - audit),
    )
    started = pl.col("position") > 0
    frame = frame.with_columns(entropy_delta=pl.when(started).then("entropy_delta"))
    return schema.conform(frame, schema.TOKENS)


def _outcomes(keys: pl.DataFrame, plan: _Plan, base: _Plan, max_new_tokens: int) -> pl.DataFrame:
    loops, endless = plan.loop_onset >= 0, plan.length >= max_new_tokens
    run_out = np.where(endless, 3 * max_new_tokens // 4, -1)
    onsets = {"looping": plan.loop_onset, "non_termination": run_out, "harm": plan.harm_onset}
    earliest = np.where(loops, np.minimum(plan.loop_onset, run_out), run_out)
    onsets |= {"onset": earliest, "rejected": plan.differs}
    harmed = base.right & ~plan.right
    frame = keys.with_columns(
        pl.lit("synthetic").alias("task"),
        *(pl.Series(name, found) for name, found in onsets.items()),
    )
    onset = {name: pl.when(pl.col(name) >= 0).then(pl.col(name)) for name in onsets}
    frame = frame.select(
        pl.exclude(list(onsets)),
        pl.Series("looping", loops),
        pl.Series("non_termination", endless),
        pl.Series("catastrophe", loops | endless),
        *(pl.lit(False).alias(name) for name in ("amnesia", "divergence")),
        onset["looping"].alias("looping_onset"),
        onset["non_termination"].alias("non_termination_onset"),
        onset["onset"].alias("onset"),
        onset["rejected"].alias("first_rejected"),
        onset["harm"].alias("harm_onset"),
        pl.Series("answer", np.where(plan.right, "7", "8")),
        pl.lit(True).alias("answered"),
        pl.Series("right", plan.right),
        pl.Series("agrees", plan.right == base.right),
        pl.Series("baseline_right", base.right),
        pl.Series("harmed", harmed),
        pl.Series("rescued", plan.right & ~base.right),
        pl.Series("silent_harm", harmed & ~loops & ~endless),
    )
    return _completed(frame, schema.OUTCOMES)


def _completed(frame: pl.DataFrame, kinds: dict[str, pl.DataType]) -> pl.DataFrame:
    """The frame with the schema's other columns, all null, in its order."""
    missing = [pl.lit(None).alias(name) for name in kinds if name not in frame.columns]
    return schema.conform(frame.with_columns(missing), kinds)

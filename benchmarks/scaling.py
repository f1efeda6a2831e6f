"""On paper: lossless decoding of an 8B model at 32k tokens on one GPU, from acceptance lengths.

    python benchmarks/scaling.py

Arithmetic, not a measurement: Llama-3.1-8B's shapes in bfloat16 on one 80 GB GPU of H100's
published rates, at the stated efficiency. A cycle is m drafted tokens of every row and one check of
each, g rows in a pass; reading the cold cache over the bus overlaps with drafting, the check does
not:

    seconds = max(m * step + rows * check, rows * cold_bytes / bus)
    check = max(arithmetic of m tokens, (weights / g + cold_bytes) / HBM rate)
    tokens = rows * (1 + the expected accepted ones of m)      A: tokens_per_rejection

A pass of g rows holds two layers of the cold cache of each, which leaves less room for rows. The
horizon m and g are the best ones. With the adaptive horizon (``adaptive``: `lossless_auto`) a row
is checked when the survival of its draft falls below a threshold, the best one; its tokens differ
in how sure they are as `TOP1` says, scaled to the same acceptance length, and the rows' drafts are
of different lengths, so that a cycle is the mean draft. What the bus cannot bring in time waits,
as before. Writes results/bench/scaling.json: ``machine`` and ``model``,
what follows from them, and for acceptance lengths A, some of them those that acceptance.json
measured with a small model, tokens per second over never compressing (``speedup``), ``bus`` PCIe or
the direct link of a GH200.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvguard.check_timing import rejection_rate

TARGET = Path("results/bench/scaling.json")
MEASURED = Path("results/bench/acceptance.json")
HBM_BYTES, HBM_RATE, EFFICIENCY = 80e9, 3.35e12, 0.8
FLOPS, FLOPS_EFFICIENCY = 990e12, 0.5
BUSES = {"PCIe 5 x16": 50e9, "NVLink-C2C": 400e9}
PARAMETERS, LAYERS, KV_HEADS, HEADS, HEAD_DIM, ITEM = 8.03e9, 32, 8, 32, 128, 2
CONTEXT, ACTIVATIONS = 32_768, 6e9
ENTRY = 2 * LAYERS * KV_HEADS * HEAD_DIM * ITEM
FULL = CONTEXT * ENTRY
ASSUMED = (4, 16, 64, 256, 1024)
GROUPS = (1, 2, 4, 8, 16)
"""Rows that are checked in one pass."""


class Batch(NamedTuple):
    """Rows that fit, and seconds of a step that reads weights and caches once."""

    rows: int
    step: float


def batch(row_bytes: float, reserved: float = 0) -> Batch:
    """The largest batch of rows of that size."""
    room = 0.9 * HBM_BYTES - PARAMETERS * ITEM - ACTIVATIONS - reserved
    rows = int(room / row_bytes)
    step = (PARAMETERS * ITEM + rows * row_bytes) / (HBM_RATE * EFFICIENCY)
    return Batch(rows, step)


def arithmetic_seconds(tokens: int) -> float:
    """The arithmetic of a row's check of so many tokens."""
    per_token = 2 * PARAMETERS + 4 * LAYERS * HEADS * HEAD_DIM * CONTEXT
    return tokens * per_token / (FLOPS * FLOPS_EFFICIENCY)


def check_seconds(tokens: int, group: int) -> float:
    """A row's part of a check of several rows: arithmetic, or reading weights and cold cache."""
    reading = (PARAMETERS * ITEM / group + FULL) / (HBM_RATE * EFFICIENCY)
    return max(arithmetic_seconds(tokens), reading)


TOP1 = (
    *(0.33, 0.562, 0.711, 0.834, 0.901, 0.937, 0.957, 0.971, 0.979, 0.985),
    *(0.989, 0.992, 0.9944, 0.9964, 0.9975, 0.9985, 0.9991, 0.9994, 0.9997, 1.0),
)
"""Top-1 probabilities of drafted tokens, in steps of 5 % of them (docs/decisions.jsonl)."""
DRAFTS, LONGEST = 400, 2_048


class Best(NamedTuple):
    """Tokens per second at the best horizon and the best number of rows in a check."""

    rate: float
    horizon: float
    group: int


def draft_survivals(accepted: float) -> NDArray[np.float64]:
    """(drafts, tokens) survival of random drafts whose tokens differ in how sure they are."""
    draws = np.random.default_rng(0).integers(len(TOP1), size=(DRAFTS, LONGEST))
    rates = rejection_rate(np.array(TOP1))
    low, high = 0.0, 1e4
    for _ in range(60):  # the factor at which a token is rejected once in so many
        factor = (low + high) / 2
        rejected = float(np.mean(1 - np.exp(-factor * rates)))
        low, high = (factor, high) if rejected < 1 / accepted else (low, factor)
    return np.exp(-np.cumsum(factor * rates[draws], axis=1))


def adaptive(ratio: float, accepted: float, bus: float) -> Best:
    """The best that an adaptive horizon does at an acceptance length."""
    survival = draft_survivals(accepted)
    kept = np.cumsum(survival, axis=1)
    found = []
    for threshold in np.linspace(0.005, 0.9995, 200):
        tokens = np.minimum((survival >= threshold).sum(axis=1) + 1, LONGEST)
        horizon = float(tokens.mean())
        made = 1 + float(kept[np.arange(DRAFTS), tokens - 1].mean())
        for group in GROUPS:
            drafting = batch(FULL * (1 - ratio), reserved=group * 2 * FULL / LAYERS)
            if group > drafting.rows:
                continue
            checks = drafting.rows * check_seconds(round(horizon), group)
            seconds = max(horizon * drafting.step + checks, drafting.rows * FULL / bus)
            found.append(Best(drafting.rows * made / seconds, horizon, group))
    return max(found)


def lossless(ratio: float, accepted: float, bus: float) -> Best:
    """The best that lossless decoding does at an acceptance length."""
    found = []
    for group in GROUPS:
        drafting = batch(FULL * (1 - ratio), reserved=group * 2 * FULL / LAYERS)
        if group > drafting.rows:
            continue
        for horizon in range(1, 2049):
            survives = 1 - 1 / accepted
            made = 1 + (1 - survives**horizon) * accepted * survives  # 1: the check's own token
            checks = drafting.rows * check_seconds(horizon, group)
            seconds = max(horizon * drafting.step + checks, drafting.rows * FULL / bus)
            found.append(Best(drafting.rows * made / seconds, horizon, group))
    return max(found)


def main() -> None:
    full, compressed = batch(FULL), batch(FULL / 4)
    baseline = full.rows / full.step
    result: dict[str, object] = {
        "machine": "80 GB of HBM at 3.35 TB/s (80 % reached), 990 TFLOP/s bfloat16 (50 % reached)",
        "model": "8.03 G parameters, 32 layers, 8 KV heads of 128, 32,768 tokens of context",
        "full_row_bytes": FULL,
        "rows_uncompressed": full.rows,
        "rows_at_0.750": compressed.rows,
        "step_ms_uncompressed": full.step * 1e3,
        "step_ms_at_0.750": compressed.step * 1e3,
        "uncompressed_tokens_per_second": baseline,
        "unchecked_speedup_at_0.750": compressed.rows / compressed.step / baseline,
        "arithmetic_ms_of_64_tokens": arithmetic_seconds(64) * 1e3,
        **{f"check_ms_of_64_tokens {g} rows": check_seconds(64, g) * 1e3 for g in (1, 8)},
        **{f"check_transfer_ms {name}": FULL / rate * 1e3 for name, rate in BUSES.items()},
    }
    lengths: list[tuple[str, float, float]] = [
        ("assumed", 0.75, float(length)) for length in ASSUMED
    ]
    if MEASURED.is_file():
        for row in json.loads(MEASURED.read_text())["acceptance"]:
            if row["tokens_per_rejection"] is not None and row["m"] == 16:
                source = f"{row['press']}, SmolLM2 at {row['prompt_tokens']} tokens"
                lengths.append((source, float(row["ratio"]), row["tokens_per_rejection"]))
    table = []
    for source, ratio, accepted in lengths:
        for name, bus in BUSES.items():
            best = lossless(ratio, max(accepted, 1.0), bus)
            auto = adaptive(ratio, max(accepted, 1.0), bus)
            table.append(
                {
                    "acceptance": source,
                    "ratio": f"{ratio:.3f}",
                    "tokens_per_rejection": accepted,
                    "bus": name,
                    "best_horizon": best.horizon,
                    "rows_a_check": best.group,
                    "speedup": best.rate / baseline,
                    "mean_adaptive_horizon": auto.horizon,
                    "adaptive_speedup": auto.rate / baseline,
                }
            )
    result["lossless"] = table
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

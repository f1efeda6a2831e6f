"""On paper: lossless decoding of an 8B model at 32k tokens on one GPU, from acceptance lengths.

    python benchmarks/scaling.py

Arithmetic, not a measurement: Llama-3.1-8B's shapes in bfloat16 on one 80 GB GPU of H100's
published rates, at the stated efficiency. A cycle is m drafted tokens of every row and one check of
each, g rows in a pass; reading the cold cache over the bus overlaps with drafting, the check does
not:

    seconds = max(m * step + rows * check, rows * cold_bytes / bus)
    check = max(arithmetic of m tokens, (weights / g + cold_bytes) / HBM rate)
    tokens = rows * (1 - (1 - 1 / A) ** m) * A      A: tokens_per_rejection

A pass of g rows holds two layers of the cold cache of each, which leaves less room for rows. The
horizon m and g are the best ones. Writes results/bench/scaling.json: ``machine`` and ``model``,
what follows from them, and for acceptance lengths A, some of them those that acceptance.json
measured with a small model, tokens per second over never compressing (``speedup``), ``bus`` PCIe or
the direct link of a GH200.
"""

import json
from pathlib import Path
from typing import NamedTuple

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


class Best(NamedTuple):
    """Tokens per second at the best horizon and the best number of rows in a check."""

    rate: float
    horizon: int
    group: int


def lossless(ratio: float, accepted: float, bus: float) -> Best:
    """The best that lossless decoding does at an acceptance length."""
    found = []
    for group in GROUPS:
        drafting = batch(FULL * (1 - ratio), reserved=group * 2 * FULL / LAYERS)
        if group > drafting.rows:
            continue
        for horizon in range(1, 2049):
            made = (1 - (1 - 1 / accepted) ** horizon) * accepted
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
            table.append(
                {
                    "acceptance": source,
                    "ratio": f"{ratio:.3f}",
                    "tokens_per_rejection": accepted,
                    "bus": name,
                    "best_horizon": best.horizon,
                    "rows_a_check": best.group,
                    "speedup": best.rate / baseline,
                }
            )
    result["lossless"] = table
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

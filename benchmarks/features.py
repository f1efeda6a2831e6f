"""How fast features are computed: token rows a second, from Parquet files to one Parquet file.

    python benchmarks/features.py [rows]

makes a synthetic run of at least that many token rows (1,000,000 by default) as shard files, times
`kvguard.features.build_features` on them, each time in a process of its own, and writes
results/bench/features.json:

- ``rows_per_second``: median over the repeats, reading and writing included; higher is better;
- ``cpu_seconds``: processor time of one such build, all threads: what the machine's load does not
  change much;
- ``kernel_rows_per_second``: the same for a table in memory, without files;
- ``peak_rss_bytes``: of the process that built the file, and ``peak_rss_bytes_half`` of one that
  built half of it: out of core means that they hardly differ;
- ``step_seconds``: one streaming step of the guard at batch 1 and 32: median and 99th percentile.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.feature_files import build_features
from kvguard.features import FeatureState, compute_features

TRACES_PER_SHARD = 500
MAX_NEW_TOKENS = 256
REPEATS = 5
TARGET = Path("results/bench/features.json")


def make_shard(shard: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Traces and tokens of one shard: random signals, token ids that repeat as words do."""
    rng = np.random.default_rng(shard)
    lengths = rng.integers(MAX_NEW_TOKENS // 4, MAX_NEW_TOKENS + 1, TRACES_PER_SHARD)
    keys = pl.DataFrame(
        {
            "model": "synthetic",
            "press": "snapkv",
            "ratio": "0.500",
            "prompt_id": [f"{shard:06d}{trace:010d}" for trace in range(TRACES_PER_SHARD)],
        }
    )
    rows = int(lengths.sum())
    trace = np.repeat(np.arange(TRACES_PER_SHARD), lengths)
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    measured = [name for name in schema.SIGNALS if name != "chosen_rank"]
    numbers = {name: rng.normal(size=rows).astype(np.float32) for name in measured}
    tokens = keys[trace].with_columns(
        pl.Series("position", np.arange(rows) - start, dtype=pl.Int32),
        pl.Series("token_id", np.minimum(rng.zipf(1.3, rows), 49_151), dtype=pl.Int32),
        *(pl.Series(name, values) for name, values in numbers.items()),
        *(pl.Series(name, numbers["entropy"]) for name in ("audit_logprob", "audit_gap", "llr")),
        audit_is_argmax=pl.lit(True),
        chosen_rank=pl.lit(0, dtype=pl.Int32),
    )
    first = pl.col("position") == 0
    tokens = tokens.with_columns(entropy_delta=pl.when(~first).then("entropy_delta"))
    traces = keys.with_columns(
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in schema.TRACES.items()
        if name not in schema.TRACE_KEYS
    ).with_columns(max_new_tokens=pl.lit(MAX_NEW_TOKENS, dtype=pl.Int32))
    return schema.conform(traces, schema.TRACES), schema.conform(tokens, schema.TOKENS)


def build(folder: Path, shards: int) -> dict[str, float]:
    """Build the features of the first shards; seconds and the process's peak memory."""
    names = [f"{shard:03d}.parquet" for shard in range(shards)]
    tokens = [folder / "tokens" / name for name in names]
    traces = [folder / "traces" / name for name in names]
    started, cpu_started = time.perf_counter(), time.process_time()
    build_features(tokens, traces, folder / "features.parquet")
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak}


def build_apart(folder: Path, shards: int) -> dict[str, float]:
    """`build` in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--build", str(folder), str(shards)]
    found: dict[str, float] = json.loads(subprocess.check_output(command))
    return found


def kernel_seconds(folder: Path) -> tuple[int, float]:
    """Rows and best seconds of `compute_features` on one shard in memory."""
    tokens = pl.read_parquet(folder / "tokens" / "000.parquet")
    traces = pl.read_parquet(folder / "traces" / "000.parquet")
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        compute_features(tokens, traces)
        seconds.append(time.perf_counter() - started)
    return tokens.height, statistics.median(seconds)


def step_seconds(rows: int, steps: int = 2000) -> dict[str, float]:
    """Time of one `FeatureState.advance` by one token of a batch of ``rows``."""
    rng = np.random.default_rng(0)
    state = FeatureState(rows, max_new_tokens=steps, ratio=0.5)
    signals = rng.normal(size=(steps, rows, len(schema.SIGNALS))).astype(np.float32)
    token_ids = np.minimum(rng.zipf(1.3, (steps, rows)), 49_151)
    every = np.arange(rows)
    seconds = np.empty(steps)
    for step in range(steps):
        positions = np.full(rows, step)
        started = time.perf_counter()
        state.advance(every, signals[step][:, None], token_ids[step][:, None], positions)
        seconds[step] = time.perf_counter() - started
    return {"p50": float(np.median(seconds)), "p99": float(np.quantile(seconds, 0.99))}


def main(rows: int) -> None:
    """Measure and write the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = shards = 0
        while made < rows:
            traces, tokens = make_shard(shards)
            schema.write_table(traces, folder / "traces" / f"{shards:03d}.parquet", schema.TRACES)
            schema.write_table(tokens, folder / "tokens" / f"{shards:03d}.parquet", schema.TOKENS)
            made += tokens.height
            shards += 1
            print(f"made {made:,} of {rows:,} token rows", flush=True)
        runs = []
        for repeat in range(REPEATS):
            runs.append(build_apart(folder, shards))
            print(f"build {repeat + 1}: {made / runs[-1]['seconds']:,.0f} rows/s", flush=True)
        half = build_apart(folder, max(1, shards // 2))
        kernel_rows, seconds = kernel_seconds(folder)
        result = {
            "rows": made,
            "shards": shards,
            "rows_per_second": made / statistics.median(run["seconds"] for run in runs),
            "rows_per_second_all": [made / run["seconds"] for run in runs],
            "kernel_rows_per_second": kernel_rows / seconds,
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "peak_rss_bytes_half": half["peak_rss_bytes"],
            "step_seconds": {str(batch): step_seconds(batch) for batch in (1, 32)},
            "cores": os.cpu_count(),
        }
    with schema.atomic_path(TARGET) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        print(json.dumps(build(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)

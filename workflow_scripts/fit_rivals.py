"""Choose the rivals' numbers: clocks on train prompts, gates on calibration prompts."""

import logging
from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.rival_settings import (
    NO_GATE,
    fit_rivals,
    load_gate,
    save_rivals,
    trace_scores,
)
from kvguard.schema import OUTCOMES, TRACE_KEYS, read_table
from kvguard.splits import read_splits


def main(
    traces: list[Path],
    tokens: list[Path],
    outcomes: Path,
    splits: Path,
    baselines: Path,
    target: Path,
) -> None:
    """Write the settings of every condition."""
    known = read_splits(splits)
    unread = known.filter(pl.col("split") == "test")["prompt_id"].to_list()
    chosen = ~pl.col("prompt_id").is_in(unread)
    rows = pl.scan_parquet(traces, hive_partitioning=False).filter(chosen).collect()
    gate = load_gate(baselines)
    if gate is None:
        logging.warning(NO_GATE)
        scores = (
            pl.scan_parquet(tokens, hive_partitioning=False)
            .filter(chosen & (pl.col("position") == 0))
            .select(*TRACE_KEYS, score="entropy")
            .collect()
        )
    else:
        scores = trace_scores(gate, rows)
    save_rivals(fit_rivals(rows, scores, read_table(outcomes, OUTCOMES), known), target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    main(
        [Path(path) for path in source.traces],
        [Path(path) for path in source.tokens],
        Path(source.outcomes),
        Path(source.splits),
        Path(source.baselines),
        Path(snakemake.output.rivals),
    )

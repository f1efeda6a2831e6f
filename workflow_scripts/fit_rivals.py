"""Choose the rivals' numbers: clocks on train prompts, gates on calibration prompts."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.rival_settings import fit_rivals, save_rivals
from kvguard.schema import OUTCOMES, TRACE_KEYS, read_table
from kvguard.splits import read_splits


def main(
    traces: list[Path], tokens: list[Path], outcomes: Path, splits: Path, target: Path
) -> None:
    """Write the settings of every condition."""
    known = read_splits(splits)
    chosen = pl.col("prompt_id").is_in(
        known.filter(pl.col("split") != "test")["prompt_id"].to_list()
    )
    first = (
        pl.scan_parquet(tokens, hive_partitioning=False)
        .filter(chosen & (pl.col("position") == 0))
        .select(*TRACE_KEYS, "entropy")
        .collect()
    )
    rows = pl.scan_parquet(traces, hive_partitioning=False).filter(chosen).collect()
    save_rivals(fit_rivals(rows, first, read_table(outcomes, OUTCOMES), known), target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    main(
        [Path(path) for path in source.traces],
        [Path(path) for path in source.tokens],
        Path(source.outcomes),
        Path(source.splits),
        Path(snakemake.output.rivals),
    )

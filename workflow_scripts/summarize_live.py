"""Pair every policy with the uncompressed run, live and simulated, and count where they differ."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.compare_policies import (
    compare_live_simulation,
    summarize_differences,
    summarize_runs,
)
from kvguard.schema import OUTCOMES, RUNS, read_table, write_table


def main(
    live_paths: list[Path],
    simulation_path: Path,
    outcomes_path: Path,
    bootstrap_samples: int,
    seed: int,
    targets: dict[str, Path],
) -> None:
    """Write the tables ``policies`` (both sources), ``differences`` and ``reasons``."""
    live = pl.read_parquet(live_paths, hive_partitioning=False)
    simulated = read_table(simulation_path, RUNS)
    outcomes = read_table(outcomes_path, OUTCOMES)
    policies = pl.concat(
        summarize_runs(runs, outcomes, bootstrap_samples=bootstrap_samples, seed=seed).with_columns(
            source=pl.lit(source)
        )
        for source, runs in (("live", live), ("simulation", simulated))
    )
    differences = compare_live_simulation(live, simulated)
    write_table(policies, targets["policies"])
    write_table(differences, targets["differences"])
    write_table(summarize_differences(differences), targets["reasons"])


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    main(
        [Path(path) for path in source.live],
        Path(source.simulation),
        Path(source.outcomes),
        snakemake.params.bootstrap_samples,
        snakemake.params.seed,
        {name: Path(path) for name, path in snakemake.output.items()},
    )

"""Pair every policy with the uncompressed run, live and simulated, and count where they differ."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.compare_policies import (
    compare_live_simulation,
    constant_frontier,
    summarize_differences,
    summarize_runs,
)
from kvguard.costs import memory_of_rewind
from kvguard.policy_tests import compare_pairs, live_tables
from kvguard.schema import OUTCOMES, RUNS, read_table, write_table


def main(
    live_paths: list[Path],
    trace_paths: list[Path],
    tables: dict[str, Path],
    bootstrap_samples: int,
    seed: int,
    planned: list[tuple[str, str]],
    targets: dict[str, Path],
) -> None:
    """Write the targets; ``tables`` are outcomes and simulation, ``planned`` pairs of policies.

    Beside each policy stands what a constant ratio gives at equal device byte-steps. A run that
    uses another one's models has no simulation.
    """
    live = pl.read_parquet(live_paths, hive_partitioning=False)
    simulated = read_table(tables["simulation"], RUNS) if "simulation" in tables else live.clear()
    outcomes = read_table(tables["outcomes"], OUTCOMES)
    policies, pairs = [], []
    sources = {"live": live} | ({} if simulated.is_empty() else {"simulation": simulated})
    for source, runs in sources.items():
        table = summarize_runs(runs, outcomes, bootstrap_samples=bootstrap_samples, seed=seed)
        policies.append(table.with_columns(source=pl.lit(source)))
        pairs.append(compare_pairs(runs, samples=bootstrap_samples, seed=seed))
    differences = compare_live_simulation(live, simulated)
    traces = pl.read_parquet(trace_paths, hive_partitioning=False)
    write_table(constant_frontier(pl.concat(policies), measured=policies[-1]), targets["policies"])
    write_table(pl.concat(pairs), targets["tests"])
    for name, table in live_tables(live, simulated, bootstrap_samples, seed, planned).items():
        write_table(table, targets[name])
    write_table(memory_of_rewind(traces, live), targets["memory"])
    write_table(differences, targets["differences"])
    write_table(summarize_differences(differences), targets["reasons"])


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    main(
        [Path(path) for path in source.live],
        [Path(path) for path in source.traces],
        {name: Path(source[name]) for name in ("simulation", "outcomes") if source.get(name)},
        params.bootstrap_samples,
        params.seed,
        [(policy, other) for policy, other in params.planned],
        {name: Path(path) for name, path in snakemake.output.items()},
    )

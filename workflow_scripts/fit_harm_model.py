"""Fit the probability of harm that `guard_price` weighs, on prompts that fit probabilities."""

import logging
from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.harm_model import fit_harm_model, save_harm_model
from kvguard.rival_settings import load_gate, trace_scores
from kvguard.schema import OUTCOMES, TRACE_KEYS, read_table
from kvguard.splits import calibration_parts, read_splits


def main(
    traces: list[Path],
    tokens: list[Path],
    outcomes: Path,
    splits: Path,
    baselines: Path,
    probability_share: float,
    target: Path,
) -> None:
    """Write the model."""
    prompts, _ = calibration_parts(read_splits(splits), probability_share)
    chosen = pl.col("prompt_id").is_in(prompts)
    rows = pl.scan_parquet(traces, hive_partitioning=False).filter(chosen).collect()
    drafts = pl.scan_parquet(tokens, hive_partitioning=False).filter(chosen)
    gate = load_gate(baselines)
    scores = None if gate is None else trace_scores(gate, rows)
    model = fit_harm_model(
        drafts.select(*TRACE_KEYS, "position", "top1_probability").collect(),
        read_table(outcomes, OUTCOMES),
        scores,
        gate,
    )
    logging.info("%s", {name: value for name, value in model if name != "gate"})
    save_harm_model(model, target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    main(
        [Path(path) for path in source.traces],
        [Path(path) for path in source.tokens],
        Path(source.outcomes),
        Path(source.splits),
        Path(source.baselines),
        snakemake.params.probability_share,
        Path(snakemake.output.harm_model),
    )

"""Assign every prompt to train, calibration or test; every later rule reads this one table."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Splits
from kvguard.schema import PROMPTS, SPLITS, read_table, write_table
from kvguard.splits import split_prompts


def main(prompts: Path, splits: Splits, seed: int, target: Path) -> None:
    """Write one row per prompt."""
    write_table(split_prompts(read_table(prompts, PROMPTS), splits, seed), target, SPLITS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.prompts),
        Splits.model_validate(snakemake.params.splits),
        snakemake.params.seed,
        Path(snakemake.output.splits),
    )

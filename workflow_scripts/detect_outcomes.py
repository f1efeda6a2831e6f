"""Judge every answer: catastrophes with their onsets, final answers, agreement."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.config import Detection
from kvguard.detectors import DETECTION_COLUMNS, detect_outcomes
from kvguard.schema import OUTCOMES, PROMPTS, read_table, write_table


def main(
    prompts: Path, traces: list[Path], tokens: list[Path], detection: Detection, target: Path
) -> None:
    """Write one row per trace; of the tokens only what detection needs is read."""
    outcomes = detect_outcomes(
        read_table(prompts, PROMPTS),
        pl.read_parquet(traces, hive_partitioning=False),
        pl.read_parquet(tokens, columns=list(DETECTION_COLUMNS), hive_partitioning=False),
        detection,
    )
    write_table(outcomes, target, OUTCOMES)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.prompts),
        [Path(path) for path in snakemake.input.traces],
        [Path(path) for path in snakemake.input.tokens],
        Detection.model_validate(snakemake.params.detection),
        Path(snakemake.output.outcomes),
    )

"""Judge the stored tokens again under other definitions of the catastrophes."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.config import Detection
from kvguard.detectors import DETECTION_COLUMNS
from kvguard.schema import PROMPTS, read_table, write_table
from kvguard.sensitivity import sensitivity_table


def main(
    prompts: Path, traces: list[Path], tokens: list[Path], detection: Detection, target: Path
) -> None:
    """Write the failure rate of every condition under every value of every parameter."""
    table = sensitivity_table(
        read_table(prompts, PROMPTS),
        pl.read_parquet(traces, hive_partitioning=False),
        pl.read_parquet(tokens, columns=list(DETECTION_COLUMNS), hive_partitioning=False),
        detection,
    )
    write_table(table, target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        Path(snakemake.input.prompts),
        [Path(path) for path in snakemake.input.traces],
        [Path(path) for path in snakemake.input.tokens],
        Detection.model_validate(snakemake.params.detection),
        Path(snakemake.output.sensitivity),
    )

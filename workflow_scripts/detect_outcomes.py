"""Judge every answer: catastrophes with their onsets, final answers, agreement."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.config import Detection
from kvguard.detectors import detect_outcomes, read_answers
from kvguard.schema import OUTCOMES, write_table

if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    answers = read_answers(source.prompts, source.traces, source.tokens)
    detection = Detection.model_validate(snakemake.params.detection)
    onsets = None  # a run without stored compressed answers has none
    if source.get("onsets"):
        onsets = pl.read_parquet(list(source.onsets), hive_partitioning=False)
    write_table(
        detect_outcomes(*answers, detection, onsets), Path(snakemake.output.outcomes), OUTCOMES
    )

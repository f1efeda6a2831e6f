"""Judge the stored tokens again under other definitions of the catastrophes."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Detection
from kvguard.detectors import read_answers
from kvguard.schema import write_table
from kvguard.sensitivity import sensitivity_table

if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    answers = read_answers(source.prompts, source.traces, source.tokens)
    detection = Detection.model_validate(snakemake.params.detection)
    write_table(sensitivity_table(*answers, detection), Path(snakemake.output.sensitivity))

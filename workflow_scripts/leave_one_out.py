"""Train without one press, one ratio or one model, and test on what was left out."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Predictor
from kvguard.schema import write_table
from kvguard.supposed_checks import evidence_of
from kvguard.trainer import make_trainer
from kvguard.transfer import leave_one_out

if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    trainer = make_trainer(
        Path(source.splits),
        Predictor.model_validate(params.predictor),
        horizon_tokens=params.labels["horizon_tokens"],
        seed=params.seed,
        threads=snakemake.threads,
        evidence=evidence_of(source.tokens, params.guard, params.seed),
    )
    tables = leave_one_out(Path(source.features), Path(source.labels), trainer)
    for name, table in tables.items():
        write_table(table, Path(snakemake.output.leakage_check).with_name(f"{name}.parquet"))

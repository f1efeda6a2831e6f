"""Train without one press, one ratio or one model, and test on what was left out."""

from pathlib import Path
from typing import Any

from kvguard import joblog
from kvguard.ablation import leave_one_out
from kvguard.config import Predictor
from kvguard.schema import write_table


def main(
    features: Path,
    labels: Path,
    splits: Path,
    settings: Predictor,
    options: dict[str, Any],
    tables_folder: Path,
) -> None:
    """Write the tables; ``options`` are keywords of `leave_one_out`."""
    for name, table in leave_one_out(features, labels, splits, settings, **options).items():
        write_table(table, tables_folder / f"{name}.parquet")


if __name__ == "__main__":
    snakemake = joblog.start_job()
    params = snakemake.params
    main(
        Path(snakemake.input.features),
        Path(snakemake.input.labels),
        Path(snakemake.input.splits),
        Predictor.model_validate(params.predictor),
        {
            "horizon_tokens": params.labels["horizon_tokens"],
            "seed": params.seed,
            "threads": snakemake.threads,
        },
        Path(snakemake.output.leave_one_out).parent,
    )

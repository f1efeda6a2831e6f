"""Train again with fewer features, another formulation, and controls that must fail."""

from pathlib import Path
from typing import Any

from kvguard import joblog
from kvguard.ablation import ablate
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
    """Write the tables; ``options`` are keywords of `ablate`."""
    for name, table in ablate(features, labels, splits, settings, **options).items():
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
        Path(snakemake.output.ablation).parent,
    )

"""Score the predictors and their baselines on the test prompts."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Predictor
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.schema import write_table
from kvguard.train import load_models


def main(
    models_folder: Path,
    inputs: dict[str, Path],
    settings: Predictor,
    seed: int,
    tables_folder: Path,
) -> None:
    """Write the evaluation's tables; ``inputs`` are features, labels, splits and outcomes."""
    tables = evaluate_predictors(load_models(models_folder), **inputs, settings=settings, seed=seed)
    for name, table in tables.items():
        write_table(table, tables_folder / f"{name}.parquet")


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source = snakemake.input
    main(
        Path(source.predictor).parent,
        {name: Path(source[name]) for name in ("features", "labels", "splits", "outcomes")},
        Predictor.model_validate(snakemake.params.predictor),
        snakemake.params.seed,
        Path(snakemake.output.predictor_metrics).parent,
    )

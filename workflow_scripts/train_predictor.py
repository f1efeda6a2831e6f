"""Train one hazard predictor per target, with its baselines, and predict every token."""

from pathlib import Path

from kvguard import joblog
from kvguard.config import Predictor, digest
from kvguard.schema import write_table
from kvguard.supposed_checks import evidence_of
from kvguard.train import save_models, train_predictors, write_predictions
from kvguard.trainer import Trainer, make_trainer


def main(
    features: Path,
    labels: Path,
    trainer: Trainer,
    config_digest: str,
    models_folder: Path,
    predictions: Path,
    tables: dict[str, Path],
) -> None:
    """Write models, predictions and tables."""
    models = train_predictors(features, labels, trainer, config_digest)
    for name, target in tables.items():
        write_table(models.tables[name], target)
    write_predictions(models.predictors, features, trainer.splits, predictions)
    save_models(models, models_folder)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, output, params = snakemake.input, snakemake.output, snakemake.params
    main(
        Path(source.features),
        Path(source.labels),
        make_trainer(
            Path(source.splits),
            Predictor.model_validate(params.predictor),
            horizon_tokens=params.labels["horizon_tokens"],
            seed=params.seed,
            threads=snakemake.threads,
            evidence=evidence_of(source.tokens, params.guard, params.seed),
        ),
        digest([params.predictor, params.labels, params.seed]),
        Path(output.predictor).parent,
        Path(output.predictions),
        {name: Path(output[name]) for name in ("training", "search_trials", "leakage_check")},
    )

"""What the predictors know before onset: metrics, ablations, controls, transfer."""

import polars as pl

from kvguard import config
from kvguard.train import Models, Table


def evaluate_predictors(
    models: Models,
    features: Table,
    labels: Table,
    splits: Table,
    outcomes: Table,
    settings: config.Predictor,
    *,
    seed: int,
) -> dict[str, pl.DataFrame]:
    """Tables predictor_metrics, predictor_curves, lead_times, detection, leakage_check_evaluation.

    predictor_curves and lead_times have the columns that `figures.plot_predictor` and
    `figures.plot_lead_time` ask for.
    """
    raise NotImplementedError


def ablate(
    features: Table,
    labels: Table,
    splits: Table,
    settings: config.Predictor,
    *,
    horizon_tokens: int,
    seed: int,
    threads: int = 1,
) -> dict[str, pl.DataFrame]:
    """Tables ablation, feature_importance, formulation, controls, leakage_check_ablation."""
    raise NotImplementedError


def leave_one_out(
    features: Table,
    labels: Table,
    splits: Table,
    settings: config.Predictor,
    *,
    horizon_tokens: int,
    seed: int,
    threads: int = 1,
) -> dict[str, pl.DataFrame]:
    """Tables leave_one_out (press, ratio), transfer (model), leakage_check_leave_one_out."""
    raise NotImplementedError

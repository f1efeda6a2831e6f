"""Splits, leakage checks and training of the hazard predictors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl

from kvguard import config

Table = pl.DataFrame | str | Path
"""A table, or the Parquet file that holds it."""


class Predictor:
    """A trained hazard model; see `load_predictor`."""


class Models(NamedTuple):
    """What training made."""

    predictors: dict[str, Predictor]  # by target; refused targets are absent
    baselines: dict[str, dict[str, Predictor]]  # by kind ("logistic", "entropy", ...), by target
    refusals: dict[str, str]  # by target: why there is no predictor
    tables: dict[str, pl.DataFrame]  # training, search_trials, leakage_check


def split_prompts(prompt_ids: Iterable[str], splits: config.Splits, seed: int) -> pl.DataFrame:
    """Assign every prompt to train, calibration or test (SPLITS)."""
    raise NotImplementedError


def train_predictors(
    features: Table,
    labels: Table,
    splits: Table,
    settings: config.Predictor,
    *,
    horizon_tokens: int,
    seed: int,
    threads: int = 1,
    config_digest: str = "",
) -> Models:
    """Train one predictor per target, with its baselines."""
    raise NotImplementedError


def save_models(models: Models, folder: str | Path) -> None:
    """Write hazard_predictor.json, hazard_{target}.json (every target) and baselines.json.

    A refused target's file says why; `load_predictor` raises that reason.
    """
    raise NotImplementedError


def load_models(folder: str | Path) -> Models:
    """Read what `save_models` wrote (tables are empty)."""
    raise NotImplementedError


def load_predictor(path: str | Path) -> Predictor:
    """Read one predictor; refuses other feature versions and unknown features."""
    raise NotImplementedError


def rules_predictor() -> Predictor:
    """Rule-based risk from repetition and entropy, no training needed."""
    raise NotImplementedError


def predict_tokens(
    predictors: Mapping[str, Predictor], features: Table, splits: Table
) -> pl.DataFrame:
    """Hazard of every token, every target (PREDICTIONS)."""
    raise NotImplementedError


def write_predictions(
    predictors: Mapping[str, Predictor], features: str | Path, splits: Table, target: str | Path
) -> None:
    """`predict_tokens` out of core, one condition at a time, into a Parquet file."""
    raise NotImplementedError

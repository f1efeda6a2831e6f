"""Predictors trained again with fewer features and in the other formulation, and controls.

Everything is fitted and measured as `kvguard.variants` says.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.controls import measure_controls
from kvguard.evaluate_predictor import (
    bootstrap_weights,
    counts,
    measure,
    score,
)
from kvguard.features import FEATURE_SETS, without_evidence
from kvguard.metrics import (
    INTERVAL_TYPES,
    Measured,
    Sample,
    auroc,
    with_intervals,
)
from kvguard.predictor import Features
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table
from kvguard.trainer import Formulation, Refusal, Trainer
from kvguard.variants import RANKING, Study, compared, load_study, pooled, variant_table

logger = logging.getLogger(__name__)

FEATURE_GROUPS: dict[str, tuple[str, ...]] = {
    "entropy": (
        *("entropy", "alternatives_entropy", "entropy_mean_8", "entropy_std_8"),
        *("alternatives_entropy_mean_8", "alternatives_entropy_std_8"),
        *("entropy_mean", "entropy_max"),
    ),
    "entropy change": ("entropy_delta", "entropy_delta_mean_8", "entropy_delta_std_8"),
    "confidence": (
        *("top1_probability", "top5_probability"),
        *("top1_probability_mean_8", "top1_probability_std_8"),
        *("top1_probability_mean", "runner_up_probability_mean"),
    ),
    "chosen token": ("chosen_logprob", "chosen_rank"),
    "top log-probabilities": (
        "mean_logprob",
        *(f"top_logprob_{rank:02d}" for rank in range(schema.TOP_LOGPROBS)),
    ),
    "repetition": ("repeated_ngram", "repetition_sum"),
    "position": ("relative_position",),
    "ratio": ("compression_ratio",),
    "probes": schema.PROBE_NAMES,
}
"""Features that are permuted together; every one is in one group."""


def ablate(features: Table, labels: Table, trainer: Trainer) -> dict[str, pl.DataFrame]:
    """Train again with fewer features and in the other formulation; and controls that must fail.

    All variants are trees with the configured parameters, so that they differ in one thing only;
    the controls are of the configured kind.

    Args:
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        trainer: settings, splits and seeds.

    Returns:
        - ``ablation``: each named feature set, and the configured one without the position, on test
          prompts; ``difference`` is to the configured set, with a paired 95 % interval. Of the
          first target also ``with_evidence`` and ``without_evidence``, both on the tokens that have
          evidence of supposed checks; ``difference`` is between these two.
        - ``feature_importance``: how much AUROC falls when a group of features is permuted, on
          calibration prompts, which no fit has seen and from which nothing is chosen here.
        - ``formulation``: windowed against discrete-time, out of fold on train prompts (where the
          choice is made) and on test prompts; ``difference`` is to windowed.
        - ``controls``: labels of whole requests permuted within model, press and ratio, and harm
          dealt by a coin at one position, in all splits (``expected`` 0.5, for the predictor and
          for the clock); a random alarm as frequent as the predictor's (``expected``: its rate).
        - ``leakage_check_ablation``.
    """
    study = load_study(features, labels, trainer)
    targets = study.targets()
    calibration = load_rows(features, labels, trainer.splits, "calibration")
    return {
        "ablation": _ablation(study, targets),
        "feature_importance": _importance(study, calibration, targets[0]),
        "formulation": _formulations(study, targets),
        "controls": measure_controls(study, calibration, targets[0]),
        "leakage_check_ablation": trainer.leakage.table(),
    }


def _compared_targets(targets: Sequence[str]) -> list[str]:
    """The default target, any catastrophe, divergence; the single kinds are rarer and say less."""
    return [*targets[:1], *(name for name in targets[1:] if name in ("harm", "any", "divergence"))]


def _ablation(study: Study, targets: Sequence[str]) -> pl.DataFrame:
    compressed = pl.col("press") != BASELINE
    configured = study.trainer.settings.feature_set
    if configured == "with_evidence":  # on all tokens: what it is without
        configured = "no_ratio"
    chosen = FEATURE_SETS[configured]
    without_position = tuple(name for name in chosen if name != "relative_position")
    sets = {configured: chosen} | FEATURE_SETS | {"no_position": without_position}
    del sets["with_evidence"]  # measured on other tokens, at the end
    rows: list[tuple[dict[str, Any], Measured]] = []
    for target in _compared_targets(targets):
        reference: dict[str, Measured] | None = None
        for name, columns in sets.items():
            described = {
                "target": target,
                "feature_set": name,
                "features": len(columns),
                "configured": name == configured,
            }
            try:
                predictor = study.fit(
                    target,
                    columns,
                    f"ablation {target}, {name}",
                    normalised=True if name == "normalised" else None,
                )
            except Refusal as refusal:
                rows += compared(described, str(refusal), None, {})
                continue
            found, size = study.measure(predictor, compressed)
            rows += compared(described, found, reference, size)
            reference = reference or found
    rows += _evidence_rows(study, targets[0])
    columns_ = {
        "target": pl.String,
        "feature_set": pl.String,
        "features": pl.Int64,
        "configured": pl.Boolean,
    }
    return variant_table(rows, columns_)


def _evidence_rows(study: Study, target: str) -> list[tuple[dict[str, Any], Measured]]:
    """With evidence of supposed checks and without, fitted and measured on the same tokens."""
    rows: list[tuple[dict[str, Any], Measured]] = []
    reference: dict[str, Measured] | None = None
    whole = FEATURE_SETS["with_evidence"]
    for name, columns in (
        ("without_evidence", without_evidence(whole)),
        ("with_evidence", whole),
    ):
        described = {
            "target": target,
            "feature_set": name,
            "features": len(columns),
            "configured": name == study.trainer.settings.feature_set,
        }
        try:
            train, test = (study.trainer.with_evidence(part) for part in (study.train, study.test))
            predictor = study.fit(target, columns, f"ablation {target}, {name}", rows=train)
            samples, seed = study.trainer.settings.bootstrap_samples, study.trainer.seed
            checked = study._replace(test=test, weights=bootstrap_weights(test, samples, seed))
            found, size = checked.measure(predictor, pl.col("press") != BASELINE)
        except Refusal as refusal:
            rows += compared(described, str(refusal), None, {})
            continue
        rows += compared(described, found, reference, size)
        reference = reference or found
    return rows


def _importance(study: Study, calibration: Rows, target: str, repeats: int = 10) -> pl.DataFrame:
    types: dict[str, Any] = (
        {"target": pl.String, "group": pl.String, "features": pl.Int64}
        | {"auroc": pl.Float64, "auroc_permuted": pl.Float64}
        | INTERVAL_TYPES
        | {"prompts": pl.Int64}
    )
    rows = calibration.take(calibration.before_onset(target) & calibration.compressed())
    try:
        predictor = study.fit(target, FEATURE_SETS["full"], f"importance {target}")
    except Refusal as refusal:
        logger.warning("no feature importance: %s", refusal)
        return pl.DataFrame(schema=types)
    study.trainer.leakage.check("importance", rows.keys["prompt_id"], target)
    weights = bootstrap_weights(rows, study.trainer.settings.bootstrap_samples, study.trainer.seed)
    prompts = np.unique(rows.keys["prompt_id"].to_numpy(), return_inverse=True)[1]
    rng = np.random.default_rng(study.trainer.seed)
    press = rows.press

    def ranked(matrix: Features) -> Measured:
        return auroc(
            Sample(predictor.log_odds(matrix, press), rows.label(target), prompts, weights)
        )

    base = ranked(rows.features)
    found: list[tuple[dict[str, Any], Measured]] = []
    for group, names in FEATURE_GROUPS.items():
        columns = [schema.FEATURE_NAMES.index(name) for name in names]
        permuted = []
        for _ in range(repeats):
            matrix = rows.features.copy()
            matrix[:, columns] = matrix[rng.permutation(len(matrix))][:, columns]
            permuted.append(ranked(matrix))
        described = {"target": target, "group": group, "features": len(columns)}
        described["prompts"] = weights.shape[1]
        described |= {"auroc": base.value, "auroc_permuted": None}
        fall = base
        if base.value is not None:
            mean = float(np.mean([one.value for one in permuted]))
            described["auroc_permuted"] = mean
            average = base._replace(
                value=mean, replicates=np.mean([one.replicates for one in permuted], axis=0)
            )
            fall = base.minus(average)
        found.append((described, fall))
    finished = with_intervals(found, lambda _: "importance")
    frame = pl.DataFrame(finished, schema=types)
    return frame.sort("value", descending=True, nulls_last=True)


def _formulations(study: Study, targets: Sequence[str]) -> pl.DataFrame:
    compressed = pl.col("press") != BASELINE
    names = without_evidence(FEATURE_SETS[study.trainer.settings.feature_set])
    settings = study.trainer.settings
    fold_weights = bootstrap_weights(study.train, settings.bootstrap_samples, study.trainer.seed)
    rows: list[tuple[dict[str, Any], Measured]] = []
    for target in _compared_targets(targets):
        reference: dict[str, dict[str, Measured]] = {}
        for formulation in ("windowed", "discrete_time"):
            described: dict[str, Any] = {"target": target, "formulation": formulation}
            described["configured"] = formulation == settings.formulation
            purpose = f"formulation {target}, {formulation}"
            kind: Formulation = "windowed" if formulation == "windowed" else "discrete_time"
            try:
                ranks = study.trainer.out_of_fold(
                    study.train, target, names, purpose, formulation=kind
                )
                ranked = np.isfinite(ranks)
                part = study.train.take(ranked)
                scored = score(part, ranks[ranked], target, fold_weights)
                folded = measure(scored, compressed, false_alarm_rate=settings.false_alarm_rate)
                folded |= pooled(study.panel(part, target), ranks[ranked])
                found = {
                    "train_out_of_fold": (
                        {metric: folded[metric] for metric in RANKING},
                        counts(scored, compressed),
                    ),
                    "test": study.measure(
                        study.fit(target, names, purpose, formulation=kind), compressed
                    ),
                }
            except Refusal as refusal:
                for sample in ("train_out_of_fold", "test"):
                    rows += compared(described | {"sample": sample}, str(refusal), None, {})
                continue
            for sample, (metrics, size) in found.items():
                rows += compared(
                    described | {"sample": sample}, metrics, reference.get(sample), size
                )
                reference.setdefault(sample, metrics)
    columns = {
        "target": pl.String,
        "formulation": pl.String,
        "configured": pl.Boolean,
        "sample": pl.String,
    }
    return variant_table(rows, columns)

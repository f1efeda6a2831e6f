"""Predictors trained again with less: features, presses, ratios, models, and controls.

Everything here is retrained on train prompts with the config's own tree parameters and measured on
test prompts as `kvguard.evaluate_predictor` does it. Nothing is chosen from these tables. ``low``
and ``high`` hold for all rows of a table at once with 95 % (Bonferroni), ``low_pointwise``,
``high_pointwise`` and the intervals of differences for their own row alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.evaluate_predictor import (
    CONDITION,
    COUNT_TYPES,
    bootstrap_weights,
    condition_codes,
    counts,
    measure,
    request_threshold,
    score,
)
from kvguard.features import FEATURE_SETS
from kvguard.metrics import (
    INTERVAL_TYPES,
    Floats,
    Measured,
    Sample,
    auroc,
    auroc_within,
    share,
    undefined,
    with_intervals,
)
from kvguard.predictor import Features, Predictor
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table
from kvguard.trainer import Formulation, Refusal, Trainer

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


_RANKING = ("auroc", "auroc_within", "pr_auc", "request_auroc", "request_auroc_early")

_VARIANT_TYPES: dict[str, Any] = (
    {"metric": pl.String}
    | INTERVAL_TYPES
    | {"difference": pl.Float64, "difference_low": pl.Float64, "difference_high": pl.Float64}
    | COUNT_TYPES
    | {"reason": pl.String}
)


class _Study(NamedTuple):
    """What all retrained variants share: the trainer, train and test tokens, the resamples."""

    trainer: Trainer
    train: Rows
    test: Rows
    weights: Floats

    def fit(
        self,
        target: str,
        names: Sequence[str],
        purpose: str,
        *,
        rows: Rows | None = None,
        formulation: Formulation | None = None,
    ) -> Predictor:
        """A predictor with the config's own parameters, its probabilities not calibrated."""
        train = self.train if rows is None else rows
        return self.trainer.fit(train, target, names, purpose, formulation=formulation)

    def targets(self) -> list[str]:
        """The configured targets, those that can be trained first, the default in front."""
        wanted: list[str] = sorted(self.trainer.settings.targets, key=schema.TARGETS.index)
        refused = {target: self.trainer.refusal(self.train, target) for target in wanted}
        return sorted(wanted, key=lambda target: refused[target] is not None)

    def measure(
        self, predictor: Predictor, where: pl.Expr
    ) -> tuple[dict[str, Measured], dict[str, int]]:
        """Ranking metrics on the test tokens that ``where`` selects, and how many there are."""
        scored = score(
            self.test, predictor.predict(self.test.features), predictor.target, self.weights
        )
        rate = self.trainer.settings.false_alarm_rate
        found = measure(scored, where, false_alarm_rate=rate)
        return {metric: found[metric] for metric in _RANKING}, counts(scored, where)


def _study(features: Table, labels: Table, trainer: Trainer) -> _Study:
    train = load_rows(features, labels, trainer.splits, "train")
    test = load_rows(features, labels, trainer.splits, "test")
    trainer.leakage.check("evaluate", test.keys["prompt_id"], "retrained variants")
    weights = bootstrap_weights(test, trainer.settings.bootstrap_samples, trainer.seed)
    return _Study(trainer, train, test, weights)


def _compared(
    described: dict[str, Any],
    found: Mapping[str, Measured] | str,
    reference: Mapping[str, Measured] | None,
    held: dict[str, int],
) -> list[tuple[dict[str, Any], Measured]]:
    """Rows of one variant, with the paired difference to a reference; a reason where it failed."""
    if isinstance(found, str):
        nothing = Measured(None, np.zeros(0), 0)
        empty = {"difference": None, "difference_low": None, "difference_high": None}
        return [
            (described | {"metric": metric, "reason": found} | empty | held, nothing)
            for metric in _RANKING
        ]
    rows = []
    for metric, measured in found.items():
        difference: dict[str, Any] = {}
        if reference is not None:
            paired = measured.minus(reference[metric])
            low, high = paired.interval()
            difference = {
                "difference": paired.value,
                "difference_low": low,
                "difference_high": high,
            }
        rows.append((described | {"metric": metric, "reason": None} | difference | held, measured))
    return rows


def _variant_table(
    rows: Sequence[tuple[dict[str, Any], Measured]], columns: Mapping[str, Any]
) -> pl.DataFrame:
    finished = with_intervals(rows, lambda _: "table")
    return pl.DataFrame(finished, schema=dict(columns) | _VARIANT_TYPES)


def ablate(features: Table, labels: Table, trainer: Trainer) -> dict[str, pl.DataFrame]:
    """Train again with fewer features and in the other formulation; and controls that must fail.

    All variants have the config's own tree parameters, so that they differ in one thing only.

    Args:
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        trainer: settings, splits and seeds.

    Returns:
        - ``ablation``: each named feature set, and the configured one without the position, on test
          prompts; ``difference`` is to the configured set, with a paired 95 % interval.
        - ``feature_importance``: how much AUROC falls when a group of features is permuted, on
          calibration prompts, which no fit has seen and from which nothing is chosen here.
        - ``formulation``: windowed against discrete-time, out of fold on train prompts (where the
          choice is made) and on test prompts; ``difference`` is to windowed.
        - ``controls``: labels permuted within model, press and ratio, in all splits (``expected``
          0.5); a random alarm as frequent as the predictor's (``expected``: its rate).
        - ``leakage_check_ablation``.
    """
    study = _study(features, labels, trainer)
    targets = study.targets()
    calibration = load_rows(features, labels, trainer.splits, "calibration")
    return {
        "ablation": _ablation(study, targets),
        "feature_importance": _importance(study, calibration, targets[0]),
        "formulation": _formulations(study, targets),
        "controls": _controls(study, calibration, targets[0]),
        "leakage_check_ablation": trainer.leakage.table(),
    }


def _compared_targets(targets: Sequence[str]) -> list[str]:
    """The default target, any catastrophe, divergence; the single kinds are rarer and say less."""
    return [*targets[:1], *(name for name in targets[1:] if name in ("harm", "any", "divergence"))]


def _ablation(study: _Study, targets: Sequence[str]) -> pl.DataFrame:
    compressed = pl.col("press") != BASELINE
    configured = study.trainer.settings.feature_set
    own = FEATURE_SETS[configured]
    without_position = tuple(name for name in own if name != "relative_position")
    sets = {configured: own} | FEATURE_SETS | {"no_position": without_position}
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
                predictor = study.fit(target, columns, f"ablation {target}, {name}")
            except Refusal as refusal:
                rows += _compared(described, str(refusal), None, {})
                continue
            found, held = study.measure(predictor, compressed)
            rows += _compared(described, found, reference, held)
            reference = reference or found
    columns_ = {
        "target": pl.String,
        "feature_set": pl.String,
        "features": pl.Int64,
        "configured": pl.Boolean,
    }
    return _variant_table(rows, columns_)


def _importance(study: _Study, calibration: Rows, target: str, repeats: int = 10) -> pl.DataFrame:
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

    def ranked(matrix: Features) -> Measured:
        return auroc(Sample(predictor.log_odds(matrix), rows.label(target), prompts, weights))

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


def _formulations(study: _Study, targets: Sequence[str]) -> pl.DataFrame:
    compressed = pl.col("press") != BASELINE
    names = FEATURE_SETS[study.trainer.settings.feature_set]
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
                held = np.isfinite(ranks)
                part = study.train.take(held)
                scored = score(part, ranks[held], target, fold_weights)
                folded = measure(scored, compressed, false_alarm_rate=settings.false_alarm_rate)
                found = {
                    "train_out_of_fold": (
                        {metric: folded[metric] for metric in _RANKING},
                        counts(scored, compressed),
                    ),
                    "test": study.measure(
                        study.fit(target, names, purpose, formulation=kind), compressed
                    ),
                }
            except Refusal as refusal:
                for sample in ("train_out_of_fold", "test"):
                    rows += _compared(described | {"sample": sample}, str(refusal), None, {})
                continue
            for sample, (metrics, size) in found.items():
                rows += _compared(
                    described | {"sample": sample}, metrics, reference.get(sample), size
                )
                reference.setdefault(sample, metrics)
    columns = {
        "target": pl.String,
        "formulation": pl.String,
        "configured": pl.Boolean,
        "sample": pl.String,
    }
    return _variant_table(rows, columns)


_CONTROL_TYPES: dict[str, Any] = (
    {"control": pl.String, "target": pl.String, "metric": pl.String, "expected": pl.Float64}
    | INTERVAL_TYPES
    | {"as_expected": pl.Boolean, "prompts": pl.Int64, "reason": pl.String}
)


def _controls(study: _Study, calibration: Rows, target: str) -> pl.DataFrame:
    settings, seed = study.trainer.settings, study.trainer.seed
    names = FEATURE_SETS[settings.feature_set]
    prompts = study.weights.shape[1]
    rows: list[tuple[dict[str, Any], Measured]] = []

    def add(control: str, metric: str, expected: float | None, measured: Measured | str) -> None:
        described: dict[str, Any] = {"control": control, "target": target, "metric": metric}
        described |= {"expected": expected, "prompts": prompts, "reason": None}
        if isinstance(measured, str):
            described["reason"] = measured
            measured = undefined(study.weights)
        rows.append((described, measured))

    try:
        shuffled = permute_labels(study.train, target, seed)
        windowed = settings.model_copy(update={"include_post_onset": False})
        permuted = replace(study.trainer, settings=windowed).fit(
            shuffled, target, names, "control: permuted labels", formulation="windowed"
        )
        test = permute_labels(study.test, target, seed + 1)
        test = test.take(test.compressed())
        sample = Sample(
            permuted.log_odds(test.features),
            test.label(target),
            np.searchsorted(
                study.test.keys["prompt_id"].unique().sort().to_numpy(),
                test.keys["prompt_id"].to_numpy(),
            ),
            study.weights,
        )
        within = auroc_within(sample, condition_codes(test.keys))
        add("permuted labels", "auroc_within", 0.5, within)
    except Refusal as refusal:
        add("permuted labels", "auroc_within", 0.5, str(refusal))

    try:
        predictor = study.fit(target, names, "control: matched rate")
    except Refusal as refusal:
        add("random alarm", "recall", None, str(refusal))
    else:
        study.trainer.leakage.check(
            "thresholds", calibration.keys["prompt_id"], "control: matched rate"
        )
        threshold = request_threshold(calibration, predictor, target, settings.false_alarm_rate)
        hazard = predictor.predict(study.test.features)
        scored = score(study.test, hazard, target, study.weights)
        requests = scored.requests.table.filter(pl.col("press") != BASELINE)
        codes, harmed = scored.codes(requests["prompt_id"]), requests["harmed"].to_numpy()
        alarmed = requests["any_time"].to_numpy() > threshold
        rate = float(alarmed.mean()) if len(alarmed) else 0.0
        chance = np.random.default_rng(seed).random(len(alarmed))
        drawn = chance < rate
        add("predictor", "alarm_rate", None, share(alarmed, codes, study.weights))
        add("predictor", "recall", None, share(alarmed[harmed], codes[harmed], study.weights))
        recall = share(drawn[harmed], codes[harmed], study.weights)
        add("random alarm", "recall", rate, recall)
        add(
            "random alarm",
            "request_auroc",
            0.5,
            auroc(Sample(-chance, harmed, codes, study.weights)),
        )
    finished = with_intervals(rows, lambda _: "controls")
    for row in finished:
        defined = row["expected"] is not None and row["low"] is not None
        row["as_expected"] = row["low"] <= row["expected"] <= row["high"] if defined else None
    return pl.DataFrame(finished, schema=_CONTROL_TYPES)


def permute_labels(rows: Rows, target: str, seed: int) -> Rows:
    """Tokens before the onset, their labels permuted among those of the same model, press, ratio.

    Prevalence per condition stays, any tie between a token's features and its label goes.
    """
    part = rows.take(rows.before_onset(target))
    label = pl.col(f"hazard_{target}")
    keys = part.keys.with_columns(label.shuffle(seed=seed).over(CONDITION))
    return Rows(keys, part.features)


# --- what carries over ---------------------------------------------------------------------------


def leave_one_out(features: Table, labels: Table, trainer: Trainer) -> dict[str, pl.DataFrame]:
    """Train without one press, ratio or model, and test on what was left out; prompts stay split.

    Arguments as in `ablate`. Trees have the config's own parameters: a search would have seen what
    is left out.

    Returns:
        - ``leave_one_out``: one row per press and ratio left out and metric, on the test prompts of
          that press or ratio; ``difference`` is to a predictor trained on everything.
        - ``transfer``: one row per (trained on, tested on) pair of models and metric;
          ``difference`` is to a predictor of the tested model. With one model a null row says so.
        - ``leakage_check_leave_one_out``.
    """
    study = _study(features, labels, trainer)
    target = study.targets()[0]
    return {
        "leave_one_out": _leave_one_out(study, target),
        "transfer": _transfer(study, target),
        "leakage_check_leave_one_out": trainer.leakage.table(),
    }


def _values(rows: Rows, column: str) -> list[str]:
    return rows.keys.filter(pl.col("press") != BASELINE)[column].unique().sort().to_list()


def _without(rows: Rows, column: str, value: str, *, keep: bool = False) -> Rows:
    mask = (rows.keys[column] == value).to_numpy()
    return rows.take(mask if keep else ~mask)


def _leave_one_out(study: _Study, target: str) -> pl.DataFrame:
    names = FEATURE_SETS[study.trainer.settings.feature_set]
    rows: list[tuple[dict[str, Any], Measured]] = []
    try:
        whole: Predictor | str = study.fit(target, names, "leave one out: everything")
    except Refusal as refusal:
        whole = str(refusal)
    for column in ("press", "ratio"):
        values = _values(study.train, column)
        for value in values:
            described = {"target": target, "left_out": column, "value_left_out": value}
            where = (pl.col(column) == value) & (pl.col("press") != BASELINE)
            if len(values) == 1:
                rows += _compared(described, f"{value} is the only {column}", None, {})
                continue
            if isinstance(whole, str):
                rows += _compared(described, whole, None, {})
                continue
            try:
                kept = _without(study.train, column, value)
                purpose = f"leave out {column} {value}"
                predictor = study.fit(target, names, purpose, rows=kept)
            except Refusal as refusal:
                rows += _compared(described, str(refusal), None, {})
                continue
            found, held = study.measure(predictor, where)
            rows += _compared(described, found, study.measure(whole, where)[0], held)
    columns = {"target": pl.String, "left_out": pl.String, "value_left_out": pl.String}
    return _variant_table(rows, columns)


def _transfer(study: _Study, target: str) -> pl.DataFrame:
    names = FEATURE_SETS[study.trainer.settings.feature_set]
    models = _values(study.train, "model")
    rows: list[tuple[dict[str, Any], Measured]] = []
    if len(models) == 1:
        described = {"target": target, "trained_on": models[0], "tested_on": models[0]}
        rows += _compared(described, f"{models[0]} is the only model", None, {})[:1]
    fitted: dict[str, Predictor | str] = {}
    for model in models if len(models) > 1 else ():
        try:
            part = _without(study.train, "model", model, keep=True)
            fitted[model] = study.fit(target, names, f"transfer from {model}", rows=part)
        except Refusal as refusal:
            fitted[model] = str(refusal)
    for tested in fitted:
        where = (pl.col("model") == tested) & (pl.col("press") != BASELINE)
        own = fitted[tested]
        reference = None if isinstance(own, str) else study.measure(own, where)[0]
        for trained, predictor in fitted.items():
            described = {"target": target, "trained_on": trained, "tested_on": tested}
            if isinstance(predictor, str):
                rows += _compared(described, predictor, None, {})
                continue
            found, held = study.measure(predictor, where)
            rows += _compared(described, found, None if trained == tested else reference, held)
    columns = {"target": pl.String, "trained_on": pl.String, "tested_on": pl.String}
    return _variant_table(rows, columns)

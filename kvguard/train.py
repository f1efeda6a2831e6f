"""Training of the hazard predictors.

**Two formulations.** ``windowed``: one binary model of "the onset lies within the horizon".
``discrete_time``: the horizon is cut into `LEAD_BINS` stretches; one model gives the hazard of an
onset in a stretch, given none before it, and the risk is one minus the survival over all of them
(Singer and Willett 1993; a request that ends is known to have no later onset, so nothing is
censored).
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet
import xgboost
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from kvguard import config, schema
from kvguard.config import BASELINE, digest
from kvguard.features import FEATURE_SETS
from kvguard.predictor import (
    CalibrationMap,
    Features,
    Floats,
    Predictor,
    PredictorError,
    lead_rows,
    load_predictor,
    parse_predictor,
    rules_predictor,
    save_predictor,
    save_refusal,
    survival_log_odds,
)
from kvguard.splits import (
    LeakageError,
    SplitGuard,
    Table,
    assert_disjoint,
    calibration_parts,
    hash_order,
    prompts_of,
    read_splits,
    scan_table,
    split_prompts,
    splits_digest,
)

__all__ = [
    "LeakageError",
    "Models",
    "Predictor",
    "PredictorError",
    "Rows",
    "SplitGuard",
    "calibration_parts",
    "fit_predictor",
    "load_models",
    "load_predictor",
    "load_rows",
    "predict_tokens",
    "rules_predictor",
    "save_models",
    "save_predictor",
    "split_prompts",
    "train_predictors",
    "write_predictions",
]

logger = logging.getLogger(__name__)

Bools = NDArray[np.bool_]
Formulation = Literal["windowed", "discrete_time"]
Parameters = dict[str, float | int]

MIN_HARMED_PROMPTS = 4
"""Train prompts with a token before an onset that a target needs; with fewer it is refused."""

LEAD_BINS = 4
MAX_CLASS_WEIGHT = 50.0
_ROWS_PER_THREAD = 100_000
BaselineKind = Literal["logistic", "entropy", "position"]
BASELINE_KINDS: tuple[BaselineKind, ...] = ("logistic", "entropy", "position")
MODEL_FILE = "hazard_{target}.json"
DEFAULT_FILE = "hazard_predictor.json"
BASELINES_FILE = "baselines.json"


# --- rows ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Tokens of one split: ``keys`` holds `schema.LABELS`, ``features`` is (n, 40) float32."""

    keys: pl.DataFrame
    features: Features

    def take(self, mask: Bools) -> "Rows":
        """The rows where ``mask`` is true."""
        return Rows(self.keys.filter(mask), self.features[mask])

    def label(self, target: str) -> Bools:
        """Whether the onset lies within the horizon; a token that nobody judged counts as no."""
        return _bools(self.keys[f"hazard_{target}"])

    def before_onset(self, target: str) -> Bools:
        """Tokens that were judged and come before the target's onset."""
        return _bools(~self.keys[f"post_onset_{target}"])

    def compressed(self) -> Bools:
        """Tokens of compressed requests; the uncompressed baseline is an easy negative."""
        return _bools(self.keys["press"] != BASELINE)


def load_rows(
    features: Table, labels: Table, splits: pl.DataFrame, split: str | Iterable[str]
) -> Rows:
    """Features and labels of one split's tokens, sorted by `schema.TOKEN_KEYS`.

    From files only the rows of the split are read.

    Args:
        features: `schema.FEATURES`.
        labels: `schema.LABELS`.
        splits: `schema.SPLITS`.
        split: a split's name, or prompt ids.

    Raises:
        ValueError: a token has features but no label, or there are no tokens.
    """
    ids = prompts_of(splits, split) if isinstance(split, str) else sorted(split)
    chosen = pl.LazyFrame({"prompt_id": ids}, schema={"prompt_id": pl.String})
    left, right = (
        scan_table(table).join(chosen, on="prompt_id", how="semi") for table in (features, labels)
    )
    lengths = [part.select(pl.len()).collect().item() for part in (left, right)]
    joined = left.join(right, on=schema.TOKEN_KEYS, how="inner").sort(schema.TOKEN_KEYS).collect()
    if joined.is_empty():
        raise ValueError(f"no tokens of the {split if isinstance(split, str) else ids} prompts")
    if lengths != [len(joined)] * 2:
        raise ValueError(
            f"features and labels do not belong together: {lengths[0]} and {lengths[1]} tokens, "
            f"{len(joined)} in both"
        )
    matrix = joined.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32, order="C")
    return Rows(joined.select(list(schema.LABELS)), matrix)


def eligible(rows: Rows, target: str, settings: config.Predictor) -> Bools:
    """Rows that may be fitted: judged, before the onset unless the config says otherwise."""
    judged = _bools(rows.keys[f"hazard_{target}"].is_not_null())
    usable = judged if settings.include_post_onset else rows.before_onset(target)
    return usable if settings.include_baseline else usable & rows.compressed()


def outcome(rows: Rows, target: str) -> Bools:
    """What a fit learns: the hazard label; tokens after the onset, where kept, count as hazard."""
    return rows.label(target) | _bools(rows.keys[f"post_onset_{target}"])


def _bools(column: pl.Series) -> Bools:
    return np.asarray(column.fill_null(False).to_numpy(), dtype=np.bool_)


# --- fitting -------------------------------------------------------------------------------------


class Refusal(ValueError):
    """There is too little to learn a target from; the message says what is missing."""


def fit_predictor(
    train: Rows,
    target: str,
    feature_names: Sequence[str],
    settings: config.Predictor,
    *,
    formulation: Formulation,
    parameters: Mapping[str, float | int],
    horizon_tokens: int,
    seed: int,
    threads: int,
    guard: SplitGuard,
    purpose: str = "",
) -> Predictor:
    """Fit one booster: rounds chosen on a part of the train prompts, then fitted to all of them.

    Rows are weighted so that positives and negatives count the same (positives at most
    `MAX_CLASS_WEIGHT` times); `Predictor.log_odds` undoes it. The probabilities are not calibrated
    yet, see `calibrate_probabilities`.

    Args:
        train: tokens of train prompts.
        target: one of `schema.TARGETS`.
        feature_names: the columns to use.
        settings: rounds, early stopping, which rows are kept.
        formulation: see the module.
        parameters: of XGBoost, beyond the config's.
        horizon_tokens: of the labels.
        seed: of XGBoost's subsampling.
        threads: XGBoost's.
        guard: checks and records the prompts of each matrix.
        purpose: kept in the record.

    Raises:
        Refusal: fewer than `MIN_HARMED_PROMPTS` train prompts come before an onset.
        LeakageError: ``train`` holds a prompt of another split.
    """
    rows = train.take(eligible(train, target, settings))
    _enough(rows, target)
    guard.check("fit", rows.keys["prompt_id"], purpose)
    stopping = _stopping_prompts(rows, target, settings.early_stopping_share)
    guard.check("early_stopping", stopping, purpose)

    columns = [schema.FEATURE_NAMES.index(name) for name in feature_names]
    bins = min(LEAD_BINS, horizon_tokens) if formulation == "discrete_time" else 0
    options = _options(parameters, seed, threads, len(rows.features))
    _, rounds, weight = _stopped_fit(rows, target, columns, bins, horizon_tokens, settings, options)
    everything = _matrix(rows, target, columns, bins, horizon_tokens, weight, None)
    booster = xgboost.train(options, everything, rounds)
    return Predictor(
        kind="xgboost",
        target=target,
        formulation=formulation,
        horizon_tokens=horizon_tokens,
        feature_names=tuple(feature_names),
        feature_version=schema.FEATURE_VERSION,
        model={
            "booster": json.loads(booster.save_raw("json")),
            "class_weight": weight,
            "lead_bins": bins,
        },
        provenance=_provenance(rows, target, seed)
        | {"rounds": rounds, "parameters": dict(parameters), "stopping_prompts": len(stopping)},
    )


def calibrate_probabilities(
    predictor: Predictor,
    rows: Rows,
    method: Literal["isotonic", "platt", "none"],
    guard: SplitGuard,
    purpose: str = "",
) -> Predictor:
    """Fit the map from log-odds to probabilities on tokens before the onset, compressed only.

    Where the prompts hold no positive or no negative token the map stays the identity, and says so.

    Args:
        predictor: as fitted.
        rows: tokens of the calibration prompts that `calibration_parts` sets aside for this.
        method: ``platt`` (Platt 1999, slope kept positive so that the ranking stays),
            ``isotonic``, or ``none``.
        guard: checks and records the prompts.
        purpose: kept in the record.
    """
    used = rows.take(rows.before_onset(predictor.target) & rows.compressed())
    prompts = used.keys["prompt_id"].unique().sort().to_list()
    provenance = predictor.provenance | {"probability_prompts": prompts}
    labels = used.label(predictor.target)
    if method == "none" or labels.all() or not labels.any():
        note = None if method == "none" else "too few calibration prompts: no onset among them"
        mapping = CalibrationMap(note=note)
    else:
        guard.check("probability_calibration", used.keys["prompt_id"], purpose)
        mapping = _fit_map(predictor.log_odds(used.features), labels, method)
    return predictor.model_copy(update={"calibration": mapping, "provenance": provenance})


def _fit_map(
    log_odds: Floats, labels: Bools, method: Literal["isotonic", "platt"]
) -> CalibrationMap:
    if method == "isotonic":
        fit = IsotonicRegression(y_min=1e-4, y_max=1 - 1e-4, out_of_bounds="clip")
        fit.fit(log_odds, labels)
        return CalibrationMap(
            method="isotonic", x=fit.X_thresholds_.tolist(), y=fit.y_thresholds_.tolist()
        )
    positives = int(labels.sum())
    # Platt's own targets: a Laplace-like correction, so that separable scores stay finite
    high, low = (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2)
    wanted = np.where(labels, high, low)

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = point[0] * log_odds + point[1]
        residual = expit(margin) - wanted
        value = np.mean(np.logaddexp(0, margin) - wanted * margin)
        return float(value), np.array([np.mean(residual * log_odds), np.mean(residual)])

    found = optimize.minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.05, 20.0), (-50.0, 50.0)],
    )
    return CalibrationMap(method="platt", slope=float(found.x[0]), intercept=float(found.x[1]))


def _enough(rows: Rows, target: str) -> None:
    positive = outcome(rows, target)
    harmed = rows.keys.filter(positive)["prompt_id"].n_unique()
    if harmed < MIN_HARMED_PROMPTS:
        raise Refusal(
            f"{harmed} train prompts have a token within the horizon of an onset of {target}; "
            f"at least {MIN_HARMED_PROMPTS} are needed"
        )
    if positive.all():
        raise Refusal(f"every train token lies within the horizon of an onset of {target}")


def _stopping_prompts(rows: Rows, target: str, share: float) -> list[str]:
    """Prompts that choose the number of rounds: a share of the harmed and of the other ones."""
    harmed = set(rows.keys.filter(outcome(rows, target))["prompt_id"])
    others = set(rows.keys["prompt_id"]) - harmed
    chosen: list[str] = []
    for group in (harmed, others):
        ordered = hash_order(group, "early stopping")
        chosen += ordered[: min(max(round(share * len(ordered)), 1), len(ordered) - 1)]
    return sorted(chosen)


def _class_weight(rows: Rows, target: str, bins: int, horizon_tokens: int) -> float:
    _, labels = _expand(rows, target, bins, horizon_tokens)
    return float(np.clip((~labels).sum() / max(labels.sum(), 1), 1.0, MAX_CLASS_WEIGHT))


def _expand(rows: Rows, target: str, bins: int, horizon_tokens: int) -> tuple[Bools, Bools]:
    """Which (row, stretch) pairs are at risk, flattened, and the event of those at risk."""
    if not bins:
        return np.ones(len(rows.features), np.bool_), outcome(rows, target)
    steps = rows.keys[f"steps_to_{target}"].fill_null(np.iinfo(np.int32).max).to_numpy()
    edges = np.round(np.linspace(0, horizon_tokens, bins + 1))
    distance = np.maximum(steps, 0)[:, None]
    at_risk = distance >= edges[None, :-1]
    event = at_risk & (distance < edges[None, 1:])
    return at_risk.ravel(), event.ravel()[at_risk.ravel()]


def _matrix(
    rows: Rows,
    target: str,
    columns: Sequence[int],
    bins: int,
    horizon_tokens: int,
    weight: float,
    reference: xgboost.QuantileDMatrix | None,
) -> xgboost.QuantileDMatrix:
    at_risk, labels = _expand(rows, target, bins, horizon_tokens)
    data = rows.features[:, columns]
    if bins:
        data = lead_rows(data, bins)[at_risk]
    weights = np.where(labels, weight, 1.0)
    return xgboost.QuantileDMatrix(
        data, labels, weight=weights / weights.mean(), ref=reference, nthread=1
    )


def _options(
    parameters: Mapping[str, float | int], seed: int, threads: int, rows: int
) -> dict[str, Any]:
    """XGBoost's options; under 100,000 rows a second thread costs more than it gives."""
    return {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "seed": seed,
        "nthread": threads if rows >= _ROWS_PER_THREAD else 1,
    } | dict(parameters)


def default_parameters(settings: config.Predictor) -> Parameters:
    """XGBoost's parameters where no search was done."""
    return {"max_depth": settings.max_depth, "learning_rate": settings.learning_rate}


def _provenance(rows: Rows, target: str, seed: int) -> dict[str, Any]:
    labels = outcome(rows, target)
    content = hashlib.sha256(np.ascontiguousarray(rows.features).tobytes())
    content.update(labels.tobytes())
    prompts = rows.keys["prompt_id"].unique().sort().to_list()
    content.update("".join(prompts).encode())
    return {
        "seed": seed,
        "data_digest": content.hexdigest()[:16],
        "train_prompts": len(prompts),
        "train_prompts_digest": digest(prompts),
        "train_rows": len(labels),
        "positive_rows": int(labels.sum()),
        "harmed_prompts": rows.keys.filter(labels)["prompt_id"].n_unique(),
        "versions": {
            name: metadata.version(name) for name in ("xgboost", "scikit-learn", "numpy", "polars")
        },
    }


# --- scores trained beside it --------------------------------------------------------------------


def fit_baseline(
    train: Rows,
    target: str,
    kind: BaselineKind,
    feature_names: Sequence[str],
    settings: config.Predictor,
    *,
    horizon_tokens: int,
    seed: int,
    guard: SplitGuard,
) -> Predictor:
    """Fit a score to compare with: logistic regression, or one feature as it is.

    ``entropy`` and ``position`` (share of the token budget used) learn one bit from train: whether
    high or low values are the risk.

    Raises:
        Refusal, LeakageError: as `fit_predictor`.
    """
    rows = train.take(eligible(train, target, settings))
    _enough(rows, target)
    guard.check("fit", rows.keys["prompt_id"], f"{kind} {target}")
    labels = outcome(rows, target)
    single = {"entropy": "entropy", "position": "relative_position"}
    names = tuple(feature_names) if kind == "logistic" else (single[kind],)
    data = rows.features[:, [schema.FEATURE_NAMES.index(name) for name in names]].astype(np.float64)
    means, scales = np.nanmean(data, axis=0), np.nanstd(data, axis=0)
    scales = np.where(scales > 0, scales, 1.0)
    standardised = np.nan_to_num((data - means) / scales)
    if kind == "logistic":
        fit = LogisticRegression(class_weight="balanced", max_iter=1000, C=1.0)
        fit.fit(standardised, labels)
        coefficients = fit.coef_[0]
        odds = labels.mean() / (1 - labels.mean())
        intercept = float(fit.intercept_[0] + np.log(odds))  # undoes the balanced weights
    else:
        sign = 1.0 if roc_auc_score(labels, standardised[:, 0]) >= 0.5 else -1.0
        coefficients, intercept = np.array([sign]), 0.0
    return Predictor(
        kind=kind,
        target=target,
        horizon_tokens=horizon_tokens,
        feature_names=names,
        feature_version=schema.FEATURE_VERSION,
        model={
            "means": means.tolist(),
            "scales": scales.tolist(),
            "coefficients": coefficients.tolist(),
            "intercept": intercept,
        },
        provenance=_provenance(rows, target, seed),
    )


# --- search --------------------------------------------------------------------------------------


def out_of_fold(
    train: Rows,
    target: str,
    feature_names: Sequence[str],
    settings: config.Predictor,
    *,
    formulation: Formulation,
    parameters: Mapping[str, float | int],
    horizon_tokens: int,
    seed: int,
    threads: int,
    guard: SplitGuard,
    purpose: str = "",
) -> Floats:
    """Score each train token with a model that never saw its prompt: (n,) in (0, 1].

    Prompt-grouped cross-validation with ``settings.search_folds`` folds; each fold holds harmed
    prompts, and the rounds are chosen on prompts inside the other folds. A score is the rank among
    the tokens of its fold: a model whose train folds held less harm scores its own fold lower, so
    log-odds of different folds must not be compared (with independent labels their AUROC falls
    under 0.5).

    Returns:
        NaN for prompts without an eligible token.

    Raises:
        Refusal: fewer harmed prompts than twice the folds.
        LeakageError: as in `fit_predictor`.
    """
    usable = eligible(train, target, settings)
    folds = _folds(train.take(usable), target, settings.search_folds)
    guard.check("out_of_fold", train.keys["prompt_id"], purpose)
    fold_of = train.keys["prompt_id"].replace_strict(folds, default=-1, return_dtype=pl.Int32)
    fold = fold_of.to_numpy()
    columns = [schema.FEATURE_NAMES.index(name) for name in feature_names]
    bins = min(LEAD_BINS, horizon_tokens) if formulation == "discrete_time" else 0
    options = _options(parameters, seed, threads, len(train.features))
    scores = np.full(len(fold), np.nan)
    for number in range(settings.search_folds):
        fitted = train.take(usable & (fold != number))
        booster, rounds, weight = _stopped_fit(
            fitted, target, columns, bins, horizon_tokens, settings, options
        )
        inside = fold == number
        data = train.features[inside][:, columns]
        raw = booster.inplace_predict(
            lead_rows(data, bins) if bins else data,
            iteration_range=(0, rounds),
            predict_type="margin",
        )
        margin = raw.astype(np.float64) - np.log(weight)
        log_odds = survival_log_odds(margin.reshape(-1, bins)) if bins else margin
        scores[inside] = stats.rankdata(log_odds) / len(log_odds)
    return scores


def _stopped_fit(
    rows: Rows,
    target: str,
    columns: Sequence[int],
    bins: int,
    horizon_tokens: int,
    settings: config.Predictor,
    options: Mapping[str, Any],
) -> tuple[xgboost.Booster, int, float]:
    """A booster on part of the prompts, the rounds that suit the others best, the class weight."""
    stopping = _stopping_prompts(rows, target, settings.early_stopping_share)
    held = _bools(rows.keys["prompt_id"].is_in(stopping))
    fitted, watched = rows.take(~held), rows.take(held)
    assert_disjoint({"fit": fitted.keys["prompt_id"], "early stopping": watched.keys["prompt_id"]})
    weight = _class_weight(rows, target, bins, horizon_tokens)
    matrix = _matrix(fitted, target, columns, bins, horizon_tokens, weight, None)
    watch = _matrix(watched, target, columns, bins, horizon_tokens, weight, matrix)
    booster = xgboost.train(
        dict(options),
        matrix,
        settings.max_rounds,
        evals=[(watch, "stopping")],
        early_stopping_rounds=settings.early_stopping_rounds,
        verbose_eval=False,
    )
    return booster, booster.best_iteration + 1, weight


def search_parameters(
    train: Rows,
    target: str,
    feature_names: Sequence[str],
    settings: config.Predictor,
    *,
    formulation: Formulation,
    horizon_tokens: int,
    seed: int,
    threads: int,
    guard: SplitGuard,
) -> tuple[Parameters, pl.DataFrame]:
    """A small seeded search (Optuna's TPE) for XGBoost's parameters, inside train.

    The first trial is the config's own depth and learning rate. The objective is the out-of-fold
    AUROC over tokens before the onset, compressed requests only.

    Returns:
        The best parameters, and one row per trial: number, auroc, the parameters as JSON, best.
        Without a search (no trials asked for, or too few harmed prompts) the config's own.
    """
    trials: list[dict[str, Any]] = []
    best = default_parameters(settings)
    if settings.search_trials:
        try:
            best = _run_search(
                train,
                target,
                feature_names,
                settings,
                formulation,
                horizon_tokens,
                seed,
                threads,
                guard,
                trials,
            )
        except Refusal as refusal:
            logger.warning("no search for %s: %s", target, refusal)
    frame = pl.DataFrame(
        trials,
        schema={
            "target": pl.String,
            "formulation": pl.String,
            "trial": pl.Int64,
            "auroc": pl.Float64,
            "parameters": pl.String,
        },
    )
    chosen = json.dumps(best, sort_keys=True)
    return best, frame.with_columns(best=pl.col("parameters") == chosen)


def _run_search(
    train: Rows,
    target: str,
    feature_names: Sequence[str],
    settings: config.Predictor,
    formulation: Formulation,
    horizon_tokens: int,
    seed: int,
    threads: int,
    guard: SplitGuard,
    trials: list[dict[str, Any]],
) -> Parameters:
    import optuna  # half a second to import, and only the search needs it

    judged = train.before_onset(target) & train.compressed()
    labels = train.label(target)[judged]
    _folds(train.take(eligible(train, target, settings)), target, settings.search_folds)
    if labels.all() or not labels.any():
        raise Refusal("no compressed token lies before an onset")
    guard.check("search", train.keys["prompt_id"], target)

    def objective(trial: "optuna.Trial") -> float:
        parameters: Parameters = {
            "max_depth": trial.suggest_int("max_depth", 2, 8),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.4, log=True),
            "min_child_weight": trial.suggest_float("min_child_weight", 1, 50, log=True),
            "subsample": trial.suggest_float("subsample", 0.5, 1),
            "colsample_bytree": trial.suggest_float("colsample_bytree", 0.4, 1),
            "reg_lambda": trial.suggest_float("reg_lambda", 0.5, 20, log=True),
        }
        scores = out_of_fold(
            train,
            target,
            feature_names,
            settings,
            formulation=formulation,
            parameters=parameters,
            horizon_tokens=horizon_tokens,
            seed=seed,
            threads=threads,
            guard=guard,
            purpose=f"search {target}, trial {trial.number}",
        )
        auroc = float(roc_auc_score(labels, scores[judged]))
        trials.append(
            {
                "target": target,
                "formulation": formulation,
                "trial": trial.number,
                "auroc": auroc,
                "parameters": json.dumps(parameters, sort_keys=True),
            }
        )
        return auroc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    own = {"min_child_weight": 1.0, "subsample": 1.0, "colsample_bytree": 1.0, "reg_lambda": 1.0}
    study.enqueue_trial(default_parameters(settings) | own)
    study.optimize(objective, n_trials=settings.search_trials)
    return dict(study.best_params)


def _folds(rows: Rows, target: str, folds: int) -> dict[str, int]:
    """Fold of each prompt, the harmed ones dealt out evenly."""
    harmed = set(rows.keys.filter(outcome(rows, target))["prompt_id"])
    others = set(rows.keys["prompt_id"]) - harmed
    if len(harmed) < 2 * folds:
        raise Refusal(f"{len(harmed)} harmed train prompts; {folds} folds need {2 * folds}")
    dealt = hash_order(harmed, "fold") + hash_order(others, "fold")
    return {prompt: index % folds for index, prompt in enumerate(dealt)}


# --- the whole training --------------------------------------------------------------------------


class Models(NamedTuple):
    """What training made."""

    predictors: dict[str, Predictor]  # by target; refused targets are absent
    baselines: dict[str, dict[str, Predictor]]  # by kind, by target
    refusals: dict[str, str]  # by target: why there is no predictor
    tables: dict[str, pl.DataFrame]  # training, search_trials, leakage_check


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
    """Train one predictor per target, with logistic regression and single features beside it.

    The parameters are searched once, for the first target (``any`` where it is listed): single
    kinds of failure are too rare for a search to find more than noise. A target with too few harmed
    prompts is refused with a row that says so; for the first target the rule-based risk stands in,
    so that a guard has a default.

    Args:
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        splits: `schema.SPLITS`.
        settings: the config's section.
        horizon_tokens: of the labels.
        seed: of search and subsampling.
        threads: XGBoost's.
        config_digest: kept in each model.

    Returns:
        Models and tables: ``training`` (one row per model), ``search_trials``, ``leakage_check``.

    Raises:
        LeakageError: a matrix holds a prompt of another split.
    """
    known = read_splits(splits)
    guard = SplitGuard(known)
    train = load_rows(features, labels, known, "train")
    probability_ids, certificate_ids = calibration_parts(known, settings.probability_share)
    assert_disjoint({"probability calibration": probability_ids, "certificate": certificate_ids})
    held = load_rows(features, labels, known, probability_ids or certificate_ids)
    names = FEATURE_SETS[settings.feature_set]
    targets = sorted(settings.targets, key=lambda target: target != "any")

    parameters, trials = search_parameters(
        train,
        targets[0],
        names,
        settings,
        formulation=settings.formulation,
        horizon_tokens=horizon_tokens,
        seed=seed,
        threads=threads,
        guard=guard,
    )
    predictors: dict[str, Predictor] = {}
    baselines: dict[str, dict[str, Predictor]] = {kind: {} for kind in BASELINE_KINDS}
    refusals: dict[str, str] = {}
    method = settings.probability_calibration if probability_ids else "none"
    for target in targets:
        try:
            fitted = fit_predictor(
                train,
                target,
                names,
                settings,
                formulation=settings.formulation,
                parameters=parameters,
                horizon_tokens=horizon_tokens,
                seed=seed,
                threads=threads,
                guard=guard,
                purpose=f"hazard {target}",
            )
        except Refusal as refusal:
            refusals[target] = str(refusal)
            logger.warning("no predictor for %s: %s", target, refusal)
            if target == targets[0]:
                predictors[target] = _stand_in(target, str(refusal), splits_digest(known))
            continue
        made: dict[str, Predictor] = {"hazard": fitted} | {
            kind: fit_baseline(
                train,
                target,
                kind,
                names,
                settings,
                horizon_tokens=horizon_tokens,
                seed=seed,
                guard=guard,
            )
            for kind in BASELINE_KINDS
        }
        for kind, model in made.items():
            calibrated = calibrate_probabilities(model, held, method, guard, f"{kind} {target}")
            origin = {
                "config_digest": config_digest,
                "splits_digest": splits_digest(known),
                "settings": settings.model_dump(mode="json"),
                "searched_for": targets[0],
            }
            final = calibrated.model_copy(update={"provenance": calibrated.provenance | origin})
            if kind == "hazard":
                predictors[target] = final
            else:
                baselines[kind][target] = final
        logger.info("trained %s: %d rounds", target, fitted.provenance["rounds"])
    tables = {
        "training": _training_table(targets, predictors, baselines, refusals),
        "search_trials": trials,
        "leakage_check": guard.table(),
    }
    return Models(predictors, baselines, refusals, tables)


def _stand_in(target: str, reason: str, digest_of_splits: str) -> Predictor:
    """The rule-based risk, in place of the default predictor that could not be trained."""
    origin = {"refused": reason, "splits_digest": digest_of_splits, "probability_prompts": []}
    return rules_predictor(target).model_copy(update={"provenance": origin})


def _training_table(
    targets: Sequence[str],
    predictors: Mapping[str, Predictor],
    baselines: Mapping[str, Mapping[str, Predictor]],
    refusals: Mapping[str, str],
) -> pl.DataFrame:
    rows = []
    for target in targets:
        for kind, models in ({"hazard": predictors} | dict(baselines)).items():
            row: dict[str, Any] = {"target": target, "predictor": kind}
            if target in refusals:
                row |= {"status": "refused", "reason": refusals[target]}
            else:
                model = models[target]
                origin = model.provenance
                row |= {
                    "status": "trained",
                    "formulation": model.formulation,
                    "features": len(model.feature_names),
                    "rounds": origin.get("rounds"),
                    "parameters": json.dumps(origin.get("parameters", {}), sort_keys=True),
                    "train_prompts": origin["train_prompts"],
                    "harmed_prompts": origin["harmed_prompts"],
                    "train_rows": origin["train_rows"],
                    "positive_rows": origin["positive_rows"],
                    "probability_calibration": model.calibration.method,
                    "probability_prompts": len(origin["probability_prompts"]),
                    "calibration_note": model.calibration.note,
                    "data_digest": origin["data_digest"],
                    "predictor_digest": model.digest,
                }
            rows.append(row)
    text, whole = pl.String, pl.Int64
    return pl.DataFrame(
        rows,
        schema={
            "target": text,
            "predictor": text,
            "status": text,
            "reason": text,
            "formulation": text,
            "features": whole,
            "rounds": whole,
            "parameters": text,
            "train_prompts": whole,
            "harmed_prompts": whole,
            "train_rows": whole,
            "positive_rows": whole,
            "probability_calibration": text,
            "probability_prompts": whole,
            "calibration_note": text,
            "data_digest": text,
            "predictor_digest": text,
        },
    )


# --- files and predictions -----------------------------------------------------------------------


def save_models(models: Models, folder: str | Path) -> None:
    """Write hazard_predictor.json (target ``any``), hazard_{target}.json and baselines.json.

    A refused target's file says why, and `load_predictor` raises that reason; the default is never
    missing, see `train_predictors`. Without ``any`` among the targets the first one is the default.
    """
    folder = Path(folder)
    for target, model in models.predictors.items():
        save_predictor(model, folder / MODEL_FILE.format(target=target))
    for target, reason in models.refusals.items():
        if target not in models.predictors:
            save_refusal(target, reason, folder / MODEL_FILE.format(target=target))
    default = "any" if "any" in models.predictors else next(iter(models.predictors))
    save_predictor(models.predictors[default], folder / DEFAULT_FILE)
    content = {
        kind: {target: model.model_dump(mode="json") for target, model in by_target.items()}
        for kind, by_target in models.baselines.items()
    }
    with schema.atomic_path(folder / BASELINES_FILE) as temporary:
        temporary.write_text(json.dumps(content))


def load_models(folder: str | Path) -> Models:
    """Read what `save_models` wrote; the tables are empty.

    Raises:
        FileNotFoundError: names the path.
        PredictorError: as in `load_predictor`, but for refused targets, which are listed.
    """
    folder = Path(folder)
    path = folder / BASELINES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no models at {folder}; `kvguard train` makes them")
    predictors: dict[str, Predictor] = {}
    refusals: dict[str, str] = {}
    for target in schema.TARGETS:
        file = folder / MODEL_FILE.format(target=target)
        if not file.is_file():
            continue
        content = json.loads(file.read_text())
        if "refused" in content:
            refusals[target] = content["refused"]
        else:
            predictors[target] = parse_predictor(content, str(file))
            if "refused" in predictors[target].provenance:
                refusals[target] = predictors[target].provenance["refused"]
    baselines = {
        kind: {target: parse_predictor(model, str(path)) for target, model in by_target.items()}
        for kind, by_target in json.loads(path.read_text()).items()
    }
    return Models(predictors, baselines, refusals, {})


def predict_tokens(
    predictors: Mapping[str, Predictor], features: Table, splits: Table
) -> pl.DataFrame:
    """Calibrated hazard of every token for every predictor.

    Args:
        predictors: by target.
        features: `schema.FEATURES`, a frame or its file.
        splits: `schema.SPLITS`; tokens of prompts in no split are left out.

    Returns:
        `schema.PREDICTIONS`, targets one after the other, tokens in the order of ``features``.
    """
    known = read_splits(splits)
    rows = (
        scan_table(features)
        .collect()
        .join(known, on="prompt_id", how="inner", maintain_order="left")
    )
    matrix = rows.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32, order="C")
    keys = rows.select(*schema.TOKEN_KEYS, "split")
    parts = [
        keys.with_columns(
            pl.lit(target).alias("target"), pl.Series("hazard", model.predict(matrix), pl.Float32)
        )
        for target, model in predictors.items()
    ]
    if not parts:
        return pl.DataFrame(schema=schema.PREDICTIONS)
    return schema.check(pl.concat(parts), schema.PREDICTIONS, "predictions")


def write_predictions(
    predictors: Mapping[str, Predictor], features: str | Path, splits: Table, target: str | Path
) -> None:
    """`predict_tokens` out of core, one (model, press, ratio) at a time, into a Parquet file."""
    known = read_splits(splits)
    condition = ["model", "press", "ratio"]
    lazy = scan_table(features)
    conditions = lazy.select(condition).unique().sort(condition).collect()
    empty = pl.DataFrame(schema=schema.PREDICTIONS).to_arrow()
    with (
        schema.atomic_path(target) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, empty.schema, compression="zstd") as writer,
    ):
        for keys in conditions.iter_rows(named=True):
            part = lazy.filter(*(pl.col(name) == value for name, value in keys.items())).collect()
            writer.write_table(predict_tokens(predictors, part, known).to_arrow())

"""Train one hazard predictor per target and what it is compared with; files and predictions.

How one predictor is fitted is `kvguard.trainer`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import polars as pl
import pyarrow.parquet
from sklearn.metrics import roc_auc_score

from kvguard import config, schema
from kvguard.config_predictor import PredictorKind
from kvguard.features import FEATURE_SETS, without_evidence
from kvguard.leakage import assert_disjoint
from kvguard.predictor import (
    Predictor,
    parse_predictor,
    rules_predictor,
    save_predictor,
    save_refusal,
)
from kvguard.rows import Rows, load_rows
from kvguard.splits import Table, calibration_parts, read_splits, scan_table, splits_digest
from kvguard.trainer import BASELINE_KINDS, Parameters, Refusal, Trainer

logger = logging.getLogger(__name__)

MODEL_FILE = "hazard_{target}.json"
DEFAULT_FILE = "hazard_predictor.json"
BASELINES_FILE = "baselines.json"
GATE_FILE = "gate_predictor.json"


def fitted_kinds(settings: config.Predictor) -> list[PredictorKind]:
    """The kinds of predictor that are fitted, the configured one first."""
    kinds: tuple[PredictorKind, ...] = get_args(PredictorKind)
    others = [kind for kind in kinds if kind != settings.kind and settings.compare_kinds]
    return [settings.kind, *others]


# --- search --------------------------------------------------------------------------------------


def search_parameters(
    trainer: Trainer, train: Rows, target: str, feature_names: Sequence[str]
) -> tuple[Parameters, pl.DataFrame]:
    """A small seeded search (Optuna's TPE) for XGBoost's parameters, inside train.

    The first trial is the configured depth and learning rate. The objective is the out-of-fold
    AUROC over tokens before the onset, compressed requests only.

    Returns:
        The best parameters, and one row per trial: number, auroc, the parameters as JSON, best.
        Without a search (no trials asked for, too few harmed prompts, no trees) the configured
        ones.
    """
    trials: list[dict[str, Any]] = []
    best = trainer.parameters
    if trainer.settings.search_trials and "boosted" in fitted_kinds(trainer.settings):
        try:
            best = _run_search(trainer, train, target, feature_names, trials)
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
    trainer: Trainer,
    train: Rows,
    target: str,
    feature_names: Sequence[str],
    trials: list[dict[str, Any]],
) -> Parameters:
    import optuna  # half a second to import, and only the search needs it

    judged = train.before_onset(target) & train.compressed()
    labels = train.label(target)[judged]
    if labels.all() or not labels.any():
        raise Refusal("no compressed token lies before an onset")
    trainer.leakage.check("search", train.keys["prompt_id"], target)

    def objective(trial: "optuna.Trial") -> float:
        parameters: Parameters = {
            "max_depth": trial.suggest_int("max_depth", 2, 8),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.4, log=True),
            "min_child_weight": trial.suggest_float("min_child_weight", 1, 50, log=True),
            "subsample": trial.suggest_float("subsample", 0.5, 1),
            "colsample_bytree": trial.suggest_float("colsample_bytree", 0.4, 1),
            "reg_lambda": trial.suggest_float("reg_lambda", 0.5, 20, log=True),
        }
        scores = trainer.out_of_fold(
            train,
            target,
            feature_names,
            f"search {target}, trial {trial.number}",
            parameters=parameters,
        )
        auroc = float(roc_auc_score(labels, scores[judged]))
        trials.append(
            {
                "target": target,
                "formulation": trainer.settings.formulation,
                "trial": trial.number,
                "auroc": auroc,
                "parameters": json.dumps(parameters, sort_keys=True),
            }
        )
        return auroc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=trainer.seed)
    )
    untuned = {
        "min_child_weight": 1.0,
        "subsample": 1.0,
        "colsample_bytree": 1.0,
        "reg_lambda": 1.0,
    }
    study.enqueue_trial(trainer.parameters | untuned)
    study.optimize(objective, n_trials=trainer.settings.search_trials)
    return dict(study.best_params)


# --- the whole training --------------------------------------------------------------------------


class Models(NamedTuple):
    """What training made."""

    predictors: dict[str, Predictor]  # by target, the default first; refused targets are absent
    baselines: dict[str, dict[str, Predictor]]  # by kind, by target
    refusals: dict[str, str]  # by target: why there is no predictor
    tables: dict[str, pl.DataFrame]  # training, search_trials, leakage_check


def train_predictors(
    features: Table, labels: Table, trainer: Trainer, config_digest: str = ""
) -> Models:
    """Train one predictor per target, with logistic regression and single features beside it.

    The default is the first target of `schema.TARGETS` that can be trained: harm, where the train
    prompts hold enough of it. The parameters are searched once, for the default: single kinds of
    failure are too rare for a search to find more than noise. A target with too few harmed prompts
    is refused with a row that says so; where all are, the rule-based risk stands in, so that a
    guard has a default.

    Args:
        features: `schema.FEATURES`, a frame or its file.
        labels: `schema.LABELS`.
        trainer: settings and splits.
        config_digest: kept in each model.

    Returns:
        Models and tables: ``training`` (one row per model), ``search_trials``, ``leakage_check``.

    Raises:
        LeakageError: a matrix holds a prompt of another split.
    """
    settings, known = trainer.settings, trainer.splits
    train = load_rows(features, labels, known, "train").compact()
    probability_ids, certificate_ids = calibration_parts(known, settings.probability_share)
    assert_disjoint({"probability calibration": probability_ids, "certificate": certificate_ids})
    calibration = load_rows(features, labels, known, probability_ids or certificate_ids)
    names = without_evidence(FEATURE_SETS[settings.feature_set])
    targets: list[str] = sorted(settings.targets, key=schema.TARGETS.index)
    refusals = {target: why for target in targets if (why := trainer.refusal(train, target))}
    searched = next((target for target in targets if target not in refusals), targets[0])
    others = fitted_kinds(settings)[1:]
    parameters, trials = search_parameters(trainer, train, searched, names)
    predictors: dict[str, Predictor] = {}
    baselines: dict[str, dict[str, Predictor]]
    baselines = {kind: {} for kind in (*others, *BASELINE_KINDS)}
    missing: dict[tuple[str, str], str] = {}
    method = settings.probability_calibration if probability_ids else "none"
    for target in targets:
        if target in refusals:
            logger.warning("no predictor for %s: %s", target, refusals[target])
            continue
        try:
            purpose = f"hazard {target}"
            fitted = trainer.fit_kind(settings.kind, train, target, purpose, parameters)
        except Refusal as refusal:  # a sequence needs enough of it in compressed answers
            refusals[target] = str(refusal)
            logger.warning("no predictor for %s: %s", target, refusal)
            continue
        made: dict[str, Predictor] = {"hazard": fitted}
        for other in others:
            try:
                purpose = f"{other} {target}"
                made[other] = trainer.fit_kind(other, train, target, purpose, parameters)
            except Refusal as refusal:
                missing[target, other] = str(refusal)
        for baseline in BASELINE_KINDS:
            try:
                made[baseline] = trainer.fit_baseline(train, target, baseline, names)
            except Refusal as refusal:
                missing[target, baseline] = str(refusal)
        for kind, model in made.items():
            calibrated = trainer.calibrate(model, calibration, method, f"{kind} {target}")
            origin = {
                "config_digest": config_digest,
                "splits_digest": splits_digest(known),
                "settings": settings.model_dump(mode="json"),
                "searched_for": searched,
            }
            final = calibrated.model_copy(update={"provenance": calibrated.provenance | origin})
            if kind == "hazard":
                predictors[target] = final
            else:
                baselines[kind][target] = final
        logger.info("trained %s: %d rounds", target, fitted.provenance["rounds"])
    if not predictors:
        stand_in = _stand_in(targets[0], refusals[targets[0]], splits_digest(known))
        predictors[targets[0]] = stand_in
    tables = {
        "training": _training_table(targets, predictors, baselines, refusals, missing),
        "search_trials": trials,
        "leakage_check": trainer.leakage.table(),
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
    missing: Mapping[tuple[str, str], str],
) -> pl.DataFrame:
    rows = []
    for target in targets:
        for kind, models in ({"hazard": predictors} | dict(baselines)).items():
            row: dict[str, Any] = {"target": target, "predictor": kind}
            if reason := refusals.get(target) or missing.get((target, kind)):
                row |= {"status": "refused", "reason": reason}
            else:
                model = models[target]
                origin = model.provenance
                row |= {
                    "status": "trained",
                    "kind": model.kind,
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
            "kind": text,
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
    """Write hazard_predictor.json (the default), hazard_{target}.json and baselines.json.

    The gate of harm, which a `KVGuard` with a ladder takes, is also a file of its own.

    A refused target's file says why, and `load_predictor` raises that reason; the default is never
    missing, see `train_predictors`.
    """
    folder = Path(folder)
    for target, model in models.predictors.items():
        save_predictor(model, folder / MODEL_FILE.format(target=target))
    for target, reason in models.refusals.items():
        if target not in models.predictors:
            save_refusal(target, reason, folder / MODEL_FILE.format(target=target))
    save_predictor(next(iter(models.predictors.values())), folder / DEFAULT_FILE)
    gate = models.baselines.get("gate", {}).get("harm")
    if gate is None:
        save_refusal("harm", "no gate was trained on the cache's probes", folder / GATE_FILE)
    else:
        save_predictor(gate, folder / GATE_FILE)
    content = {
        kind: {target: model.content() for target, model in by_target.items()}
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
    press = rows["press"].to_numpy()
    parts = [
        keys.with_columns(
            pl.lit(target).alias("target"),
            pl.Series("hazard", model.predict(matrix, press), pl.Float32),
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

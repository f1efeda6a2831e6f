"""Models of silent harm that `signal_study` compares: fitted on some prompts, scores for all.

Each answers "is this request silently harmed?" after every token (or, the gates, before the first).
Settings are fixed; `choose` alone decides between models, by cross-validation over prompts.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import xgboost
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression

from kvguard import schema
from kvguard.features import FEATURE_SETS, SEQUENCE_SIGNALS
from kvguard.probe_scale import PROBE_COLUMNS
from kvguard.sequence_predictor import fit_gru, watched_prompts
from kvguard.signal_answers import Answers, Bools, Floats, deal_folds
from kvguard.trainer import Refusal

logger = logging.getLogger(__name__)

CLOCK = "clock_repetition"

TOKEN_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    CLOCK: ("trees", ("clock_repetition",)),
    "logistic_entropy": ("logistic", ("entropy_only",)),
    "logistic_signals": ("logistic", ("no_ratio",)),
    "trees_signals": ("trees", ("no_ratio",)),
    "trees_probes": ("trees", ("no_ratio", "probes")),
    "logistic_normalised": ("logistic", ("no_ratio", "ranks")),
    "trees_normalised": ("trees", ("no_ratio", "ranks")),
    "logistic_levels": ("logistic", ("no_ratio", "ranks", "levels")),
    "trees_levels": ("trees", ("no_ratio", "ranks", "levels")),
    "gru": ("gru", ("sequence", "ranks")),
}
"""Models by name: how they are fitted, and on which blocks of columns."""

GATE_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gate_logistic_raw": ("logistic", ("probes",)),
    "gate_logistic_normalised": ("logistic", ("ranks",)),
    "gate_trees_raw": ("trees", ("probes",)),
    "gate_trees_normalised": ("trees", ("ranks",)),
    "gate_press_normalised": ("logistic_by_press", ("ranks",)),
}
"""Models of the first token alone: what is known before it."""

TREES: dict[str, Any] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    "max_depth": 3,
    "learning_rate": 0.05,
    "subsample": 0.8,
    "colsample_bytree": 0.5,
    "min_child_weight": 5,
    "reg_lambda": 5.0,
    "nthread": 1,
}
TREE_ROUNDS = 150
RIDGE = 0.1
WATCHED_SHARE = 0.25
"""Of the fit prompts: they choose the GRU's epoch."""
MIN_SILENT_PROMPTS = 4
"""Fit prompts with a silently harmed request that a fit needs, and with an unharmed one."""

Scores = Floats
"""(tokens,) or, of gates, (requests,) log-odds; NaN: the model cannot say."""


def fit_and_score(name: str, answers: Answers, fitted: Bools, seed: int) -> Scores:
    """Fit a model on some requests and score all.

    Args:
        name: of `TOKEN_MODELS` or `GATE_MODELS`.
        answers: all requests.
        fitted: (requests,) those to fit on; the scales and levels come from their prompts too.
        seed: of subsampling, weights and dropout.

    Returns:
        (tokens,) for token models, (requests,) for gates.

    Raises:
        Refusal: too few prompts with, or without, silent harm among those to fit on.
    """
    known_prompts = np.unique(answers.prompts[fitted]).tolist()
    fitted = fitted & answers.ranked
    for kind, wanted in (("silently harmed", True), ("unharmed", False)):
        prompts = len(np.unique(answers.prompts[fitted & (answers.silent == wanted)]))
        if prompts < MIN_SILENT_PROMPTS:
            raise Refusal(
                f"{name}: {prompts} prompts with a request that is {kind}; at least "
                f"{MIN_SILENT_PROMPTS} are needed"
            )
    gate = name in GATE_MODELS
    how, blocks = (GATE_MODELS if gate else TOKEN_MODELS)[name]
    data = _columns(answers, blocks, known_prompts)
    owner = answers.owner
    if gate:
        data, owner = data[answers.first], np.arange(len(answers.lengths))
    use = fitted[owner]
    labels = answers.silent[owner]
    if how == "gru":
        watched = watched_prompts(answers.prompts[fitted].tolist(), WATCHED_SHARE, seed)
        lengths = answers.lengths[fitted]
        return fit_gru(data[use], lengths, labels[use], watched, seed=seed)[0].predict(
            data, answers.lengths
        )
    weights = np.ones(len(owner)) if gate else 1 / answers.lengths[owner]
    if how == "trees":
        return _trees(data, labels, weights, use, seed)
    if how == "logistic":
        return _logistic(data, labels, weights, use)
    scores = np.full(len(owner), np.nan)
    press = answers.presses[owner]
    for one in np.unique(press):
        inside, mine = press == one, use & (press == one)
        if labels[mine].any() and not labels[mine].all():
            scores[inside] = _logistic(data, labels, weights, mine)[inside]
    return scores


def _columns(
    answers: Answers, blocks: Sequence[str], prompts: Sequence[str]
) -> NDArray[np.float32]:
    """The matrix (tokens, columns) of some blocks, references from ``prompts``."""
    parts: list[NDArray[np.float32]] = []
    features = answers.rows.features
    for block in blocks:
        if block == "probes":
            parts.append(features[:, PROBE_COLUMNS])
        elif block == "ranks":
            own = features[answers.first][:, PROBE_COLUMNS]
            ranks = answers.scale(prompts).ranks(own, answers.presses)
            parts.append(ranks[answers.owner])
        elif block == "levels":
            parts.append(answers.signals(prompts))
        else:
            chosen = SEQUENCE_SIGNALS if block == "sequence" else FEATURE_SETS[block]
            parts.append(features[:, [schema.FEATURE_NAMES.index(name) for name in chosen]])
    return np.concatenate(parts, axis=1)


def _trees(
    data: NDArray[np.float32], labels: Bools, weights: Floats, use: Bools, seed: int
) -> Floats:
    matrix = xgboost.QuantileDMatrix(data[use], labels[use], weight=weights[use], nthread=1)
    weight = weights[use].sum() / use.sum()
    # a row weighs less than 1, and a leaf asks for as many requests as it would of single rows
    options = TREES | {"seed": seed, "min_child_weight": TREES["min_child_weight"] * weight}
    booster = xgboost.train(options, matrix, TREE_ROUNDS)
    booster.set_param({"nthread": 1})
    return np.asarray(booster.inplace_predict(data, predict_type="margin"), np.float64)


def _logistic(data: NDArray[np.float32], labels: Bools, weights: Floats, use: Bools) -> Floats:
    values = data.astype(np.float64)
    known = ~np.isnan(values[use]).all(axis=0)
    values = values[:, known]
    means = np.nanmean(values[use], axis=0)
    scales = np.nanstd(values[use], axis=0)
    scales = np.where(scales > 0, scales, 1.0)
    standardised = np.nan_to_num((values - means) / scales)
    if not standardised.shape[1]:
        return np.full(len(data), np.nan)
    fit = LogisticRegression(C=RIDGE, max_iter=2000)
    fit.fit(standardised[use], labels[use], sample_weight=weights[use])
    return np.asarray(fit.decision_function(standardised), np.float64)


# --- cross-validation ----------------------------------------------------------------------------


def ranks_within(scores: Scores) -> Floats:
    """Ranks in (0, 1], so that folds whose models have other levels can be laid together."""
    return np.asarray(stats.rankdata(scores, nan_policy="omit") / max(len(scores), 1))


def out_of_fold(
    names: Sequence[str],
    answers: Answers,
    usable: Bools,
    splits: pl.DataFrame,
    folds: int,
    seed: int,
    *,
    ranked: bool = True,
) -> dict[str, Scores]:
    """Scores of requests by models that never saw their prompts.

    Args:
        names: models; one that is refused in any fold is left out, with a warning.
        answers: all requests.
        usable: (requests,) those to deal into folds; the others get NaN.
        splits: `schema.SPLITS`, for tasks and templates.
        folds: how many.
        seed: of the models.
        ranked: ranks within the fold instead of log-odds.

    Returns:
        By name, as `fit_and_score`.

    Raises:
        Refusal: fewer prompts than folds.
    """
    mine = splits.filter(pl.col("prompt_id").is_in(np.unique(answers.prompts[usable]).tolist()))
    try:
        dealt = deal_folds(mine, folds, f"signals {folds}")
    except ValueError as error:
        raise Refusal(str(error)) from None
    fold = np.array([dealt.get(prompt, -1) for prompt in answers.prompts.tolist()])
    found: dict[str, Scores] = {}
    for name in names:
        size = len(answers.lengths) if name in GATE_MODELS else len(answers.rows.features)
        scores = np.full(size, np.nan)
        owner = np.arange(size) if name in GATE_MODELS else answers.owner
        try:
            for number in range(folds):
                fitted = usable & (fold != number)
                inside = (fold == number)[owner]
                fresh = fit_and_score(name, answers, fitted, seed)[inside]
                scores[inside] = ranks_within(fresh) if ranked else fresh
        except Refusal as refusal:
            logger.warning("out of fold: %s", refusal)
            continue
        found[name] = scores
    return found


Quality = Callable[[Scores, Bools, bool], float | None]
"""(scores, requests, of a gate) -> how well the scores rank those requests; None: undefined."""


def choose(
    names: Sequence[str],
    answers: Answers,
    usable: Bools,
    splits: pl.DataFrame,
    folds: int,
    seed: int,
    quality: Quality,
) -> tuple[str | None, dict[str, float]]:
    """The model that ranks best out of fold among ``usable`` requests.

    Returns:
        Its name (None: none can be fitted), and the quality of each that could.
    """
    found: dict[str, float] = {}
    try:
        scores = out_of_fold(names, answers, usable, splits, folds, seed)
    except Refusal as refusal:
        logger.warning("choice between models: %s", refusal)
        return None, found
    for name, values in scores.items():
        value = quality(values, usable, name in GATE_MODELS)
        if value is not None:
            found[name] = value
    best = max(found, key=lambda name: found[name]) if found else None
    return best, found

"""Fitting of hazard predictors: one `Trainer` for training, ablations and transfer.

**Two formulations.** ``windowed``: one binary model of "the onset lies within the horizon".
``discrete_time``: the horizon is cut into `LEAD_BINS` stretches; one model gives the hazard of an
onset in a stretch, given none before it, and the risk is one minus the survival over all of them
(Singer and Willett 1993; a request that ends is known to have no later onset, so nothing is
censored).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import xgboost
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from kvguard import config, schema
from kvguard.config_predictor import PredictorKind
from kvguard.features import FEATURE_SETS, SEQUENCE_FEATURES
from kvguard.gru import answer_lengths
from kvguard.leakage import LeakageCheck, assert_disjoint
from kvguard.predictor import (
    CalibrationMap,
    Features,
    Floats,
    Predictor,
    lead_rows,
    survival_log_odds,
)
from kvguard.predictor_provenance import provenance
from kvguard.probability_maps import fit_calibration_map
from kvguard.probe_scale import PROBE_COLUMNS, ProbeScale, fit_probe_scale
from kvguard.row_batches import quantile_matrix
from kvguard.rows import Bools, Rows, as_bools, eligible, outcome, share_of_answers
from kvguard.splits import Table, hash_order, read_splits
from kvguard.supposed_checks import rows_with_evidence

Formulation = Literal["windowed", "discrete_time"]
Parameters = dict[str, float | int]

MIN_HARMED_PROMPTS = 4
"""Train prompts with a token before an onset that a target needs; with fewer it is refused."""

LEAD_BINS = 4
BASELINE_ROWS = 500_000
"""Rows that a score beside the booster is fitted on; of more, every second, third and so on."""
MAX_CLASS_WEIGHT = 50.0
_ROWS_PER_THREAD = 100_000
BaselineKind = Literal[
    "logistic", "entropy", "mean_entropy", "position", "clock_repetition", "gate"
]
BASELINE_KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)
_SINGLE_FEATURES = {
    "entropy": "entropy",
    "mean_entropy": "entropy_mean",
    "position": "relative_position",
}


class Refusal(ValueError):
    """Too few rows to train a predictor of this target; the message says what is missing."""


class _Layout(NamedTuple):
    """How rows become a matrix: the target, the columns, stretches of the horizon (0: windowed)."""

    target: str
    columns: Sequence[int]
    bins: int
    horizon_tokens: int


@dataclass(frozen=True)
class Trainer:
    """Fits every predictor in the same way; make it with `make_trainer`.

    Attributes:
        splits: `schema.SPLITS`.
        settings: the config's section.
        horizon_tokens: of the labels.
        seed: of search, subsampling and bootstrap.
        threads: XGBoost's.
        leakage: checks and records the prompts of every matrix.
        evidence: of `supposed_checks.suppose_checks`; None: no predictor with evidence can be made.
    """

    splits: pl.DataFrame
    settings: config.Predictor
    horizon_tokens: int
    seed: int
    threads: int
    leakage: LeakageCheck
    evidence: pl.DataFrame | None = None

    @property
    def parameters(self) -> Parameters:
        """XGBoost's parameters where no search was done."""
        return {
            "max_depth": self.settings.max_depth,
            "learning_rate": self.settings.learning_rate,
        }

    def refusal(self, train: Rows, target: str) -> str | None:
        """Why a target cannot be trained on these tokens; None: it can."""
        try:
            _enough(train.take(eligible(train, target, self.settings)), target)
        except Refusal as refusal:
            return str(refusal)
        return None

    def fit_kind(
        self,
        kind: PredictorKind,
        train: Rows,
        target: str,
        purpose: str,
        parameters: Parameters | None = None,
    ) -> Predictor:
        """Fit a predictor of one kind on the features that the configuration gives it."""
        if kind == "sequence":
            return self.fit_sequence(train, target, purpose)
        names = FEATURE_SETS[self.settings.feature_set]
        return self.fit(train, target, names, purpose, parameters=parameters)

    def fit_sequence(self, train: Rows, target: str, purpose: str) -> Predictor:
        """Fit a GRU over whole compressed answers; a part of the train prompts chooses the epoch.

        A token is positive where the onset lies within the horizon, or behind it: a check that
        comes late cuts back to the first rejected token all the same, so after the onset one is
        due no less than before it. Tokens after the onset are therefore fitted whatever
        ``include_post_onset`` says. Every answer weighs the same.

        Args:
            train: tokens of train prompts, whole answers.
            target: one of `schema.TARGETS`.
            purpose: kept in the record of matrices.

        Raises:
            Refusal, LeakageError: as `fit`.
        """
        from kvguard.sequence_predictor import fit_gru  # torch

        settings, names = self.settings.sequence, SEQUENCE_FEATURES
        if refused := self.refusal(train, target):
            raise Refusal(refused)
        train, scale = self._scaled(train, names, True)
        judged = as_bools(train.keys[f"hazard_{target}"].is_not_null()) & train.compressed()
        rows = share_of_answers(train.take(judged), BASELINE_ROWS)
        _enough(rows, target)
        self.leakage.check("fit", rows.keys["prompt_id"], purpose)
        stopping = _stopping_prompts(rows, target, self.settings.early_stopping_share)
        self.leakage.check("early_stopping", stopping, purpose)
        lengths = answer_lengths(rows.features)
        first = np.cumsum(lengths) - lengths
        unit, epochs = fit_gru(
            rows.features[:, [schema.FEATURE_NAMES.index(name) for name in names]],
            lengths,
            outcome(rows, target),
            as_bools(rows.keys["prompt_id"].is_in(stopping))[first],
            seed=self.seed,
            settings=settings,
        )
        return Predictor(
            kind="sequence",
            target=target,
            horizon_tokens=self.horizon_tokens,
            feature_names=names,
            feature_version=schema.FEATURE_VERSION,
            model=unit.to_json(),
            probe_scale=scale,
            provenance=provenance(rows, target, self.seed)
            | {
                "rounds": epochs,
                "parameters": settings.model_dump(mode="json"),
                "stopping_prompts": len(stopping),
            },
        )

    def fit(
        self,
        train: Rows,
        target: str,
        feature_names: Sequence[str],
        purpose: str,
        *,
        formulation: Formulation | None = None,
        parameters: Parameters | None = None,
        normalised: bool | None = None,
    ) -> Predictor:
        """Fit one booster: a part of the train prompts chooses the rounds, all of them are fitted.

        Rows are weighted so that positives and negatives count the same (positives at most
        `MAX_CLASS_WEIGHT` times); `Predictor.log_odds` undoes it. The probabilities are not
        calibrated yet, see `calibrate`.

        Args:
            train: tokens of train prompts.
            target: one of `schema.TARGETS`.
            feature_names: the columns to use.
            purpose: kept in the record of matrices.
            formulation: see the module; None: the configured one.
            parameters: of XGBoost; None: the configured ones.
            normalised: probes as ranks under their press; None: where the configured feature set is
                ``normalised``. The predictor then carries the scale.

        Raises:
            Refusal: fewer than `MIN_HARMED_PROMPTS` train prompts come before an onset.
            LeakageError: ``train`` holds a prompt of another split.
        """
        settings = self.settings
        formulation = formulation or settings.formulation
        parameters = self.parameters if parameters is None else parameters
        train, scale = self._scaled(train.about(target), feature_names, normalised)
        if set(feature_names) & set(schema.EVIDENCE_NAMES):
            train = self.with_evidence(train)
        rows = train.take(eligible(train, target, settings))
        _enough(rows, target)
        self.leakage.check("fit", rows.keys["prompt_id"], purpose)
        stopping = _stopping_prompts(rows, target, settings.early_stopping_share)
        self.leakage.check("early_stopping", stopping, purpose)

        layout = self._layout(target, feature_names, formulation)
        options = self._options(parameters, len(rows.features))
        _, rounds, weight = self._stopped_fit(rows, layout, options)
        booster = xgboost.train(options, _matrix(rows, layout, weight, None), rounds)
        return Predictor(
            kind="xgboost",
            target=target,
            formulation=formulation,
            horizon_tokens=self.horizon_tokens,
            feature_names=tuple(feature_names),
            feature_version=schema.FEATURE_VERSION,
            model={
                "booster": json.loads(booster.save_raw("json")),
                "class_weight": weight,
                "lead_bins": layout.bins,
            },
            probe_scale=scale,
            provenance=provenance(rows, target, self.seed)
            | {"rounds": rounds, "parameters": dict(parameters), "stopping_prompts": len(stopping)},
        )

    def fit_baseline(
        self, train: Rows, target: str, kind: BaselineKind, feature_names: Sequence[str]
    ) -> Predictor:
        """Fit a score to compare with.

        ``logistic`` is a regression on the same features, ``clock_repetition`` the same booster on
        position and repetition alone. ``entropy``, ``mean_entropy`` and ``position`` (share of the
        token budget used) are one feature as it is, and learn one bit from train: whether high or
        low values are the risk. ``gate`` is a regression on the cache's probes, one row a request:
        what is known before the first token.

        Raises:
            Refusal, LeakageError: as `fit`; or no train request has a probe.
        """
        if kind == "clock_repetition":
            return self.fit(train, target, FEATURE_SETS[kind], f"{kind} {target}")
        if kind == "gate":
            return self._fit_gate(train, target)
        rows = train.take(eligible(train, target, self.settings))
        _enough(rows, target)
        self.leakage.check("fit", rows.keys["prompt_id"], f"{kind} {target}")
        labels = outcome(rows, target)
        single = _SINGLE_FEATURES.get(kind)
        names = (single,) if single else tuple(feature_names)
        rows, scale = self._scaled(rows, names, None)
        columns = [schema.FEATURE_NAMES.index(name) for name in names]
        every = -(-len(labels) // BASELINE_ROWS)  # of more rows an even share says the same
        labels = labels[::every]
        standardised = rows.features[::every][:, columns].astype(np.float64)
        means, scales = _level_and_spread(standardised)
        standardised -= means
        standardised /= scales
        np.nan_to_num(standardised, copy=False)
        if kind == "logistic":
            fit = LogisticRegression(class_weight="balanced", max_iter=1000, C=1.0)
            fit.fit(standardised, labels)
            coefficients = fit.coef_[0]
            odds = labels.mean() / (1 - labels.mean())
            intercept = float(fit.intercept_[0] + np.log(odds))  # undoes the balanced weights
        else:
            sign = 1.0 if roc_auc_score(labels, standardised[:, 0]) >= 0.5 else -1.0
            harmed = as_bools(rows.keys[f"steps_to_{target}"].is_not_null())[::every]
            if kind != "position" and not harmed.all():  # which request, not how far along it is
                sign = 1.0 if roc_auc_score(harmed, standardised[:, 0]) >= 0.5 else -1.0
            coefficients, intercept = np.array([sign]), 0.0
        return Predictor(
            kind=kind,
            target=target,
            horizon_tokens=self.horizon_tokens,
            feature_names=names,
            feature_version=schema.FEATURE_VERSION,
            model={
                "means": means.tolist(),
                "scales": scales.tolist(),
                "coefficients": coefficients.tolist(),
                "intercept": intercept,
            },
            probe_scale=scale,
            provenance=provenance(rows, target, self.seed),
        )

    def _fit_gate(self, train: Rows, target: str) -> Predictor:
        """Logistic regression of "this request is harmed" on its probes, on the press's scale.

        The ratio is an input, so that requests of all ratios of a press teach one model, and it can
        be asked about each ratio of a request (`kvguard.ladder`).
        """
        names = schema.GATE_FEATURES
        first = train.take(train.compressed() & as_bools(train.keys["position"] == 0))
        first, scale = self._scaled(first, names, True)  # docs/experiments/003-signals.md
        rows = first.take(first.first_tokens(target))
        columns = [schema.FEATURE_NAMES.index(name) for name in names]
        data = rows.features[:, columns].astype(np.float64)
        if not len(data) or np.isnan(data[:, : len(schema.PROBE_NAMES)]).all():
            raise Refusal("no compressed train request has probes of its cache")
        harmed = as_bools(rows.keys[f"steps_to_{target}"].is_not_null())
        prompts = rows.keys.filter(harmed)["prompt_id"].n_unique()
        if prompts < MIN_HARMED_PROMPTS or harmed.all():
            raise Refusal(
                f"{prompts} train prompts are harmed; at least {MIN_HARMED_PROMPTS} needed"
            )
        self.leakage.check("fit", rows.keys["prompt_id"], f"gate {target}")
        means, scales = _level_and_spread(data)
        fit = LogisticRegression(max_iter=1000, C=0.1)  # few requests, 25 inputs
        fit.fit(np.nan_to_num((data - means) / scales), harmed)
        return Predictor(
            kind="gate",
            target=target,
            horizon_tokens=self.horizon_tokens,
            feature_names=names,
            feature_version=schema.FEATURE_VERSION,
            model={
                "means": means.tolist(),
                "scales": scales.tolist(),
                "coefficients": fit.coef_[0].tolist(),
                "intercept": float(fit.intercept_[0]),
            },
            probe_scale=scale,
            provenance=provenance(rows, target, self.seed),
        )

    def calibrate(
        self,
        predictor: Predictor,
        rows: Rows,
        method: Literal["isotonic", "platt", "none"],
        purpose: str,
    ) -> Predictor:
        """Fit the map from log-odds to probabilities on tokens before the onset, compressed only.

        That of a gate is fitted on requests, one row each.

        Where the prompts hold no positive or no negative token the map stays the identity, and says
        so.

        Args:
            predictor: as fitted.
            rows: tokens of the calibration prompts that `calibration_parts` sets aside for this.
            method: ``platt`` (Platt 1999, slope kept positive so that the ranking stays),
                ``isotonic``, or ``none``.
            purpose: kept in the record of matrices.
        """
        if predictor.reads_evidence:
            rows = self.with_evidence(rows)
        if predictor.kind == "gate":  # its probability is of a whole request
            used = rows.take(rows.first_tokens(predictor.target))
            labels = as_bools(used.keys[f"steps_to_{predictor.target}"].is_not_null())
        else:
            used = rows.take(rows.before_onset(predictor.target) & rows.compressed())
            labels = used.label(predictor.target)
        prompts = used.keys["prompt_id"].unique().sort().to_list()
        origin = predictor.provenance | {"probability_prompts": prompts}
        if method == "none" or labels.all() or not labels.any():
            note = None if method == "none" else "too few calibration prompts: no onset among them"
            mapping = CalibrationMap(note=note)
        else:
            self.leakage.check("probability_calibration", used.keys["prompt_id"], purpose)
            mapping = fit_calibration_map(
                predictor.log_odds(used.features, used.press), labels, method
            )
        return predictor.model_copy(update={"calibration": mapping, "provenance": origin})

    def out_of_fold(
        self,
        train: Rows,
        target: str,
        feature_names: Sequence[str],
        purpose: str,
        *,
        formulation: Formulation | None = None,
        parameters: Parameters | None = None,
    ) -> Floats:
        """Score each train token with a model that never saw its prompt: (n,) in (0, 1].

        Prompt-grouped cross-validation with the configured number of folds; each fold holds harmed
        prompts, and the rounds are chosen on prompts inside the other folds. A score is the rank
        among the tokens of its fold: a model whose train folds held less harm scores its own fold
        lower, so log-odds of different folds must not be compared (with independent labels their
        AUROC falls under 0.5).

        Returns:
            NaN for prompts without an eligible token.

        Raises:
            Refusal: fewer harmed prompts than twice the folds.
            LeakageError: as in `fit`.
        """
        train, _ = self._scaled(train, feature_names, None)
        usable = eligible(train, target, self.settings)
        folds = _folds(train.take(usable), target, self.settings.search_folds)
        self.leakage.check("out_of_fold", train.keys["prompt_id"], purpose)
        fold_of = train.keys["prompt_id"].replace_strict(folds, default=-1, return_dtype=pl.Int32)
        fold = fold_of.to_numpy()
        layout = self._layout(target, feature_names, formulation or self.settings.formulation)
        bins = layout.bins
        options = self._options(
            self.parameters if parameters is None else parameters, len(train.features)
        )
        scores = np.full(len(fold), np.nan)
        for number in range(self.settings.search_folds):
            fitted = train.take(usable & (fold != number))
            booster, rounds, weight = self._stopped_fit(fitted, layout, options)
            inside = fold == number
            data = train.features[inside][:, layout.columns]
            raw = booster.inplace_predict(
                lead_rows(data, bins) if bins else data,
                iteration_range=(0, rounds),
                predict_type="margin",
            )
            margin = raw.astype(np.float64) - np.log(weight)
            log_odds = survival_log_odds(margin.reshape(-1, bins)) if bins else margin
            scores[inside] = stats.rankdata(log_odds) / len(log_odds)
        return scores

    def with_evidence(self, rows: Rows) -> Rows:
        """Tokens with evidence of supposed checks behind their features, where there is some."""
        if rows.features.shape[1] > len(schema.FEATURE_NAMES):
            return rows  # it is there
        if self.evidence is None:
            raise Refusal("no audited tokens were given, which evidence of checks comes from")
        return rows_with_evidence(rows, self.evidence)

    def _scaled(
        self, train: Rows, feature_names: Sequence[str], normalised: bool | None
    ) -> tuple[Rows, ProbeScale | None]:
        """Rows with their probes on each press's own scale, and that scale; None: as they are.

        The scale is that of all compressed train requests: no outcome is read.
        """
        if normalised is None:
            normalised = self.settings.feature_set == "normalised"
        if not normalised or not set(feature_names) & set(schema.PROBE_NAMES):
            return train, None
        first = train.take(train.compressed() & as_bools(train.keys["position"] == 0))
        scale = fit_probe_scale(first.features[:, PROBE_COLUMNS], first.press)
        return train.scaled(scale), scale

    def _stopped_fit(
        self, rows: Rows, layout: "_Layout", options: Mapping[str, Any]
    ) -> tuple[xgboost.Booster, int, float]:
        """A booster on part of the prompts, the rounds best for the others, the class weight."""
        settings = self.settings
        stopping = _stopping_prompts(rows, layout.target, settings.early_stopping_share)
        watching = as_bools(rows.keys["prompt_id"].is_in(stopping))
        fitted, watched = rows.take(~watching), rows.take(watching)
        assert_disjoint(
            {"fit": fitted.keys["prompt_id"], "early stopping": watched.keys["prompt_id"]}
        )
        weight = _class_weight(rows, layout)
        matrix = _matrix(fitted, layout, weight, None)
        watch = _matrix(watched, layout, weight, matrix)
        booster = xgboost.train(
            dict(options),
            matrix,
            settings.max_rounds,
            evals=[(watch, "stopping")],
            early_stopping_rounds=settings.early_stopping_rounds,
            verbose_eval=False,
        )
        return booster, booster.best_iteration + 1, weight

    def _layout(
        self, target: str, feature_names: Sequence[str], formulation: Formulation
    ) -> "_Layout":
        columns = [schema.COLUMN_NAMES.index(name) for name in feature_names]
        bins = min(LEAD_BINS, self.horizon_tokens) if formulation == "discrete_time" else 0
        return _Layout(target, columns, bins, self.horizon_tokens)

    def _options(self, parameters: Mapping[str, float | int], rows: int) -> dict[str, Any]:
        """XGBoost's options; under 100,000 rows a second thread costs more than it gives."""
        return {
            "objective": "binary:logistic",
            "eval_metric": "logloss",
            "tree_method": "hist",
            "seed": self.seed,
            "nthread": self.threads if rows >= _ROWS_PER_THREAD else 1,
        } | dict(parameters)


def make_trainer(
    splits: Table,
    settings: config.Predictor,
    *,
    horizon_tokens: int,
    seed: int,
    threads: int = 1,
    evidence: pl.DataFrame | None = None,
) -> Trainer:
    """A trainer for these splits; arguments as the attributes of `Trainer`.

    Raises:
        LeakageError: a prompt is in two splits.
    """
    known = read_splits(splits)
    return Trainer(known, settings, horizon_tokens, seed, threads, LeakageCheck(known), evidence)


def _level_and_spread(data: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column; 0 and 1 of a probe that no request has."""
    known = ~np.isnan(data).all(axis=0)
    means, scales = np.zeros(data.shape[1]), np.ones(data.shape[1])
    means[known] = np.nanmean(data[:, known], axis=0)
    scales[known] = np.nanstd(data[:, known], axis=0)
    return means, np.where(scales > 0, scales, 1.0)


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


def _class_weight(rows: Rows, layout: _Layout) -> float:
    _, labels = _expand(rows, layout)
    return float(np.clip((~labels).sum() / max(labels.sum(), 1), 1.0, MAX_CLASS_WEIGHT))


def _expand(rows: Rows, layout: _Layout) -> tuple[Bools, Bools]:
    """Which (row, stretch) pairs are at risk, flattened, and the event of those at risk."""
    target, bins = layout.target, layout.bins
    if not bins:
        return np.ones(len(rows.features), np.bool_), outcome(rows, target)
    steps = rows.keys[f"steps_to_{target}"].fill_null(np.iinfo(np.int32).max).to_numpy()
    edges = np.round(np.linspace(0, layout.horizon_tokens, bins + 1))
    distance = np.maximum(steps, 0)[:, None]
    at_risk = distance >= edges[None, :-1]
    event = at_risk & (distance < edges[None, 1:])
    return at_risk.ravel(), event.ravel()[at_risk.ravel()]


def _matrix(
    rows: Rows, layout: _Layout, weight: float, reference: xgboost.QuantileDMatrix | None
) -> xgboost.QuantileDMatrix:
    at_risk, labels = _expand(rows, layout)
    weights = np.where(labels, weight, 1.0)

    def data(start: int, stop: int) -> Features:
        part = rows.features[start:stop][:, layout.columns]
        if not layout.bins:
            return part
        return lead_rows(part, layout.bins)[at_risk[start * layout.bins : stop * layout.bins]]

    ends = np.cumsum(at_risk.reshape(-1, max(layout.bins, 1)).sum(axis=1))
    return quantile_matrix(data, ends, labels, weights / weights.mean(), reference)


def _folds(rows: Rows, target: str, folds: int) -> dict[str, int]:
    """Fold of each prompt; harmed prompts are distributed evenly over the folds."""
    harmed = set(rows.keys.filter(outcome(rows, target))["prompt_id"])
    others = set(rows.keys["prompt_id"]) - harmed
    if len(harmed) < 2 * folds:
        raise Refusal(f"{len(harmed)} harmed train prompts; {folds} folds need {2 * folds}")
    dealt = hash_order(harmed, "fold") + hash_order(others, "fold")
    return {prompt: index % folds for index, prompt in enumerate(dealt)}

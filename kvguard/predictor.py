"""A hazard predictor: one JSON file that turns the features of a token into a probability.

`Predictor.predict` is what a decode loop calls: it selects its own columns, runs the booster in
place on one thread and applies the calibration map. Nothing is pickled: the file holds XGBoost's
own JSON, or the coefficients of a linear score, and everything that is needed to trace its origin.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xgboost
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.special import expit

from kvguard import schema
from kvguard.config import digest
from kvguard.evidence import no_evidence
from kvguard.gru import Gru, answer_lengths
from kvguard.probe_scale import PROBE_COLUMNS, ProbeScale

Floats = NDArray[np.float64]
Features = NDArray[np.float32]

FORMAT = 1
"""Version of the file's own layout."""

_REMEMBERED = 1024  # requests whose ranks a `PressPredictor` keeps

RULES = "rules"
"""What `KVGuard(predictor=...)` takes instead of a path to use `rules_predictor`."""


class PredictorError(ValueError):
    """A predictor file that cannot be used; the message says what it has and what is accepted."""


class CalibrationMap(BaseModel):
    """From an uncalibrated log-odds to a probability.

    ``platt``: sigmoid(slope x + intercept). ``isotonic``: linear between (x, y), flat outside.
    ``none``: sigmoid(x).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["platt", "isotonic", "none"] = "none"
    slope: float = 1.0
    intercept: float = 0.0
    x: list[float] = []
    y: list[float] = []
    note: str | None = Field(default=None, description="why the method differs from the config's")

    def apply(self, log_odds: Floats) -> Floats:
        """Probabilities (n,) from log-odds (n,)."""
        if self.method == "isotonic":
            return np.interp(log_odds, self.x, self.y)
        return np.asarray(expit(self.slope * log_odds + self.intercept), dtype=np.float64)


class Predictor(BaseModel):
    """One hazard model for one target; make it with `kvguard.train` or `load_predictor`.

    Attributes:
        kind: ``xgboost`` (a token by its features), ``sequence`` (a GRU over the answer up to the
            token); or the scores that are trained beside it: ``logistic`` (all its
            features), ``entropy``, ``mean_entropy`` and ``position`` (one feature), ``gate`` (the
            cache's probes; a probability that the request is harmed); or ``rules`` (not trained).
        target: the failure that it forecasts, one of `schema.TARGETS`.
        formulation: ``windowed`` (is the onset within the horizon?) or ``discrete_time`` (a hazard
            per stretch of the horizon, and the survival over all of them).
        horizon_tokens: how far ahead "within the horizon" reaches.
        feature_names: the columns that it reads, names of `schema.COLUMN_NAMES`.
        feature_version: of the features that it was trained on.
        model: the booster, the GRU's weights or the coefficients.
        calibration: from log-odds to probability.
        probe_scale: puts the probes on the press's own scale before anything reads them; None: they
            are read as they are.
        provenance: data, seeds, parameters and library versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: int = FORMAT
    kind: Literal[
        "xgboost", "sequence", "logistic", "entropy", "mean_entropy", "position", "gate", "rules"
    ]
    target: str
    formulation: Literal["windowed", "discrete_time"] = "windowed"
    horizon_tokens: int = Field(ge=1)
    feature_names: tuple[str, ...] = Field(min_length=1)
    feature_version: int
    model: dict[str, Any]
    calibration: CalibrationMap = CalibrationMap()
    probe_scale: ProbeScale | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _weights_fit(self) -> "Predictor":
        if self.gru is not None and self.gru.width != len(self.feature_names):
            raise ValueError(
                f"model: weights for {self.gru.width} inputs, but {len(self.feature_names)} "
                "feature_names"
            )
        return self

    def predict(self, features: Features, press: str | ArrayLike = "") -> NDArray[np.float32]:
        """Calibrated probability that the onset lies within the horizon, one per row.

        Args:
            features: (n, features) float32 in the order of `schema.FEATURE_NAMES`, or of
                `schema.COLUMN_NAMES`; NaN: missing. Without evidence no check has been made.
                Of the kind ``sequence``: answers, or their beginnings, one after the other, each
                from its first token (`gru.answer_lengths`).
            press: of the requests, one name for all or (n,); read by ``probe_scale`` alone. Under a
                press without a reference the probes count as missing.

        Returns:
            (n,) float32 in [0, 1]; higher is riskier.

        Raises:
            ValueError: another number of columns; or, of the kind ``sequence``, answers that begin
                late or lack a token.
        """
        return self.calibration.apply(self.log_odds(features, press)).astype(np.float32)

    def predict_scaled(self, features: Features) -> NDArray[np.float32]:
        """`predict` of features whose probes `probe_scale` has already put on their scale."""
        log_odds = self._score(self.widened(features)) if len(features) else np.zeros(0)
        return self.calibration.apply(log_odds).astype(np.float32)

    def log_odds(self, features: Features, press: str | ArrayLike = "") -> Floats:
        """Uncalibrated log-odds (n,), class weights undone; arguments as in `predict`."""
        widths = (len(schema.FEATURE_NAMES), len(schema.COLUMN_NAMES))
        if features.ndim != 2 or features.shape[1] not in widths:
            raise ValueError(
                f"features have shape (n, {len(schema.FEATURE_NAMES)}), in the order of "
                f"schema.FEATURE_NAMES; got {features.shape}"
            )
        if len(features) == 0:
            return np.zeros(0)
        if self.probe_scale is not None:
            features = self.probe_scale.scale(features, press)
        return self._score(self.widened(features))

    @property
    def reads_evidence(self) -> bool:
        """Whether it reads `schema.EVIDENCE_NAMES`."""
        return bool(self.columns.max() >= len(schema.FEATURE_NAMES))

    def widened(self, features: Features) -> Features:
        """Features with evidence behind them where it is read: none, unless they have it."""
        if not self.reads_evidence or features.shape[1] > len(schema.FEATURE_NAMES):
            return features
        return np.concatenate([features, no_evidence(len(features))], axis=1)

    def content(self) -> dict[str, Any]:
        """What its file holds; a scale only where there is one, as in files from before it."""
        without = {"probe_scale"} if self.probe_scale is None else None
        return self.model_dump(mode="json", exclude=without)

    @cached_property
    def gru(self) -> Gru | None:
        """What a predictor of the kind ``sequence`` runs over an answer; None: another kind."""
        return Gru(self.model) if self.kind == "sequence" else None

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """(features it reads,) their places in `schema.COLUMN_NAMES`."""
        return np.array([schema.COLUMN_NAMES.index(name) for name in self.feature_names])

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the predictor's content."""
        return digest(self.content())

    def __getstate__(self) -> dict[Any, Any]:
        """What was computed from the fields is computed again where it is unpickled."""
        state = super().__getstate__()
        made = ("_score", "gru")
        fields = {key: value for key, value in state["__dict__"].items() if key not in made}
        return state | {"__dict__": fields}

    @cached_property
    def _score(self) -> Callable[[Features], Floats]:
        columns, gru = self.columns, self.gru
        if self.kind == "rules":
            return lambda features: _rules_log_odds(features[:, columns])
        if gru is not None:
            return lambda features: gru.predict(features[:, columns], answer_lengths(features))
        if self.kind != "xgboost":
            return _linear_score(self.model, columns)
        return _booster_score(self.model, columns)


class PressPredictor:
    """A predictor that knows its press, as a guard has it: what it scores is of that press.

    The ranks of a request's probes are computed once and remembered: a decode loop asks for the
    same request again and again.
    """

    def __init__(self, predictor: Predictor, press: str) -> None:
        self.predictor, self.press = predictor, press
        self.feature_version = predictor.feature_version
        self._ranks: dict[bytes, NDArray[np.float32]] = {}

    def predict(self, features: Features) -> NDArray[np.float32]:
        """`Predictor.predict` under its press."""
        return self.predictor.predict_scaled(self._scaled(features))

    def inputs(self, features: Features) -> Features:
        """The columns (n, features it reads) of the predictor, probes on their scale."""
        return self.predictor.widened(self._scaled(features))[:, self.predictor.columns]

    def _scaled(self, features: Features) -> Features:
        scale = self.predictor.probe_scale
        if scale is None:
            return features
        probes = features[:, PROBE_COLUMNS]
        keys = [row.tobytes() for row in probes]
        unknown = [index for index, key in enumerate(keys) if key not in self._ranks]
        if unknown:
            if len(self._ranks) > _REMEMBERED:
                self._ranks.clear()
                unknown = list(range(len(keys)))
            ranks = scale.ranks(probes[unknown], self.press)
            self._ranks |= {keys[index]: rank for index, rank in zip(unknown, ranks, strict=True)}
        scaled = features.copy()
        scaled[:, PROBE_COLUMNS] = [self._ranks[key] for key in keys]
        return scaled


Model = TypeVar("Model")


def for_press(model: Model, press: str) -> Model | PressPredictor:
    """A model for the requests of one press: as it is, unless it has a scale or a state to keep.

    Args:
        model: any hazard model, or None.
        press: its name in the configuration, or its class.
    """
    if isinstance(model, Predictor) and (model.probe_scale is not None or model.gru is not None):
        return PressPredictor(model, press)
    return model


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write a predictor as JSON, all or nothing."""
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(predictor.content(), separators=(",", ":")))


def save_refusal(target: str, reason: str, path: str | Path) -> None:
    """Write a file that says why there is no predictor for a target; `load_predictor` raises it."""
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"target": target, "refused": reason}))


def load_predictor(path: str | Path) -> Predictor:
    """Read a predictor that `save_predictor` wrote.

    Raises:
        FileNotFoundError: names the path and the command that would make it.
        PredictorError: it was trained for other features or another feature version (names both),
            training had refused the target, or the file is not a predictor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no predictor at {path}; `kvguard train` makes it, or pass predictor={RULES!r}"
        )
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise PredictorError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and "refused" in content:
        raise PredictorError(
            f"{path} holds no predictor for target {content.get('target')!r}: "
            f"{content['refused']}; pass predictor={RULES!r} to go without one"
        )
    return parse_predictor(content, str(path))


def parse_predictor(content: object, source: str) -> Predictor:
    """Check a predictor's JSON content; ``source`` names it in errors.

    Raises:
        PredictorError: as in `load_predictor`.
    """
    if not isinstance(content, Mapping):
        raise PredictorError(f"{source}: a predictor is a mapping, got {type(content).__name__}")
    version = content.get("feature_version")
    if version != schema.FEATURE_VERSION:
        raise PredictorError(
            f"{source} was trained on feature version {version!r}, this package computes feature "
            f"version {schema.FEATURE_VERSION}: train it again"
        )
    names = content.get("feature_names")
    unknown = [name for name in names or () if name not in schema.COLUMN_NAMES]
    if unknown:
        raise PredictorError(
            f"{source} reads the features {unknown}, which this package does not compute; it "
            f"computes {list(schema.FEATURE_NAMES)}"
        )
    if content.get("target") not in schema.TARGETS:
        raise PredictorError(
            f"{source} forecasts {content.get('target')!r}; known targets: {list(schema.TARGETS)}"
        )
    try:
        return Predictor.model_validate(content)
    except ValidationError as error:
        raise PredictorError(f"{source} is not a predictor of this package:\n{error}") from None


RULES_FEATURES = ("repetition_sum", "entropy_mean_8")
RULES_HORIZON_TOKENS = 32


def rules_predictor(target: str = "any") -> Predictor:
    """A risk from two rules, for a guard without a trained predictor.

    The risk is that of either of two alarms, 1 - (1 - a)(1 - b): a is
    one half where 12 of the last 32 tokens end an n-gram that was there before, b where the mean
    entropy over 8 tokens is 4 nats. It is a score in [0, 1], not a calibrated probability.
    """
    return Predictor(
        kind="rules",
        target=target,
        horizon_tokens=RULES_HORIZON_TOKENS,
        feature_names=RULES_FEATURES,
        feature_version=schema.FEATURE_VERSION,
        model={},
    )


def _rules_log_odds(columns: Features) -> Floats:
    repetition, entropy = np.nan_to_num(columns.astype(np.float64)).T
    repeats = expit(0.5 * (repetition - 12))
    confused = expit(2.0 * (entropy - 4))
    risk = np.clip(1 - (1 - repeats) * (1 - confused), 1e-12, 1 - 1e-12)
    return np.asarray(np.log(risk) - np.log1p(-risk), dtype=np.float64)


def _linear_score(
    model: Mapping[str, Any], columns: NDArray[np.int64]
) -> Callable[[Features], Floats]:
    """intercept + sum of coefficient x standardised feature; a missing value counts as the mean."""
    means, scales, coefficients = (
        np.asarray(model[name], dtype=np.float64) for name in ("means", "scales", "coefficients")
    )
    intercept = float(model["intercept"])

    def score(features: Features) -> Floats:
        standardised = np.nan_to_num((features[:, columns] - means) / scales)
        return np.asarray(standardised @ coefficients + intercept, dtype=np.float64)

    return score


def _booster_score(
    model: Mapping[str, Any], columns: NDArray[np.int64]
) -> Callable[[Features], Floats]:
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(json.dumps(model["booster"]).encode()))
    booster.set_param({"nthread": 1})
    log_weight, bins = float(np.log(model["class_weight"])), int(model["lead_bins"])

    def margin(rows: Features) -> Floats:
        raw = booster.inplace_predict(rows, predict_type="margin", validate_features=False)
        return raw.astype(np.float64) - log_weight

    def windowed(features: Features) -> Floats:
        return margin(features[:, columns])

    def survival(features: Features) -> Floats:
        return survival_log_odds(margin(lead_rows(features[:, columns], bins)).reshape(-1, bins))

    score = survival if bins else windowed
    score(np.zeros((1, len(schema.COLUMN_NAMES)), np.float32))  # the first call is slow
    return score


def lead_rows(features: Features, bins: int) -> Features:
    """Each row once per stretch of the horizon, the stretch's number appended: (n bins, d + 1)."""
    leads = np.tile(np.arange(bins, dtype=np.float32), len(features))
    return np.column_stack([np.repeat(features, bins, axis=0), leads])


def survival_log_odds(margins: Floats) -> Floats:
    """Log-odds (n,) of an event in any stretch, from each stretch's hazard log-odds (n, bins).

    The risk is 1 - prod(1 - h); in logarithms, so that neither end loses digits.
    """
    log_survival = -np.logaddexp(0, margins).sum(axis=1)
    return np.asarray(np.log(-np.expm1(log_survival)) - log_survival, dtype=np.float64)

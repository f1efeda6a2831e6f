"""P: the probability that an unchecked draft holds harm, from how sure it is and from its prefill.

A logistic model of two numbers, fitted on the finished answers of prompts that fit probabilities
and nothing else (`splits.calibration_parts`):

- the rejections that are expected of the draft since its last clean check
  (`check_timing.rejection_rate` of its tokens, times the row's factor), on a log scale;
- the log-odds that the gate gives the request at prefill (`rival_settings.gate_scores`).

Where a request has no probes a second fit, of the first number alone, takes its place. Both numbers
carry over to what is asked while decoding: drafts that begin behind a clean check, and drafts that
have not ended (docs/decisions.jsonl).
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from kvguard import schema
from kvguard.check_timing import rejection_rate
from kvguard.guard_report import GuardError

if TYPE_CHECKING:
    from kvguard.predictor import Predictor

FloatArray = NDArray[np.float64]

LEAST_REJECTIONS = 0.01
"""Added to the expected rejections, so that their logarithm is finite."""

LEAST_PROBABILITY = 1e-4
"""A gate's probability counts as at least this and at most 1 minus this."""

MIN_HARMED = 5
"""Requests of either kind, harmed or not, that a fit takes; with fewer it is `DEFAULT`."""

RIDGE = 1.0
"""Half of the penalty on squared slopes, in log-likelihood of one request."""


class Coefficients(BaseModel):
    """Of one logistic model: of log(expected rejections + 0.01) and of the gate's log-odds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intercept: float
    rejections: float = Field(ge=0)
    gate: float = Field(default=0.0, ge=0)


class HarmModel(BaseModel):
    """What `guard_price` asks for the probability of harm.

    Attributes:
        alone: from the draft alone.
        with_gate: from the draft and the gate's score; None: no gate.
        gate: the content of its predictor's file, which scores the probes of a prefill.
        provenance: prompts that it was fitted on, counts, log loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(default=1, ge=1, le=1)
    alone: Coefficients
    with_gate: Coefficients | None = None
    gate: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What it reads of a prefill."""
        return () if self.gate is None else tuple(self.gate["feature_names"])

    def scorer(
        self, press: ArrayLike, ratio: ArrayLike
    ) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
        """What scores probes (n, probes) with the gate; None: there is no gate.

        Args:
            press: of the requests, one for all or (n,).
            ratio: that the probes are of, likewise.
        """
        if self.gate is None:
            return None
        from kvguard.predictor import parse_predictor
        from kvguard.rival_settings import gate_scores

        gate = parse_predictor(self.gate, "the harm model's gate")
        return partial(gate_scores, gate, press=press, ratio=ratio)

    def predict(self, rejections: FloatArray, gate: FloatArray | None = None) -> FloatArray:
        """(n,) probability of harm, strictly between 0 and 1.

        Args:
            rejections: (n,) expected of each draft, at least 0.
            gate: (n,) the gate's probabilities; NaN or None: the draft alone.
        """
        risk = np.log(np.asarray(rejections, np.float64) + LEAST_REJECTIONS)
        odds = self.alone.intercept + self.alone.rejections * risk
        if gate is not None and self.with_gate is not None:
            known, both = np.isfinite(gate), self.with_gate
            score = log_odds(np.where(known, gate, 0.5))
            with_gate = both.intercept + both.rejections * risk + both.gate * score
            odds = np.where(known, with_gate, odds)
        return np.asarray(1 / (1 + np.exp(-np.clip(odds, -30, 30))))


DEFAULT = HarmModel(
    alone=Coefficients(intercept=0.54, rejections=2.06),
    provenance={"note": "calibration prompts of experiments/silent_harm_2.yaml, all conditions"},
)
"""Without a fit of one's own."""


def log_odds(probability: FloatArray) -> FloatArray:
    """(n,) log-odds of probabilities, kept away from 0 and 1."""
    p = np.clip(np.asarray(probability, np.float64), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return np.asarray(np.log(p) - np.log1p(-p))


def expected_rejections(top1: NDArray[np.floating]) -> float:
    """Rejections that are expected of a whole answer, from the top-1 probability of its tokens.

    The first comes from the prefill's logits, where nothing was evicted.
    """
    return float(rejection_rate(np.asarray(top1)[1:]).sum())


def fit_harm_model(
    tokens: pl.DataFrame,
    outcomes: pl.DataFrame,
    scores: pl.DataFrame | None = None,
    gate: "Predictor | None" = None,
) -> HarmModel:
    """Fit P on finished compressed answers.

    Args:
        tokens: TOKENS of the prompts that may be used, baseline left out.
        outcomes: OUTCOMES of them; requests with an undefined ``harmed`` are left out.
        scores: `schema.TRACE_KEYS` and ``score``, the gate's probabilities.
        gate: what gave them; it goes with the model.

    Returns:
        `DEFAULT` with a note where there are too few harmed requests, or too few others.
    """
    table = (
        tokens.sort(*schema.TRACE_KEYS, "position")
        .group_by(schema.TRACE_KEYS, maintain_order=True)
        .agg("top1_probability")
        .join(outcomes.select(*schema.TRACE_KEYS, "harmed"), on=schema.TRACE_KEYS)
        .filter(pl.col("harmed").is_not_null())
    )
    if scores is None:
        table = table.with_columns(score=pl.lit(None, pl.Float64))
    else:
        own = scores.select(*schema.TRACE_KEYS, pl.col("score").cast(pl.Float64))
        table = table.join(own, on=schema.TRACE_KEYS, how="left")
    harmed = table["harmed"].to_numpy().astype(np.bool_)
    counts = {"requests": len(harmed), "harmed": int(harmed.sum())}
    if min(harmed.sum(), (~harmed).sum()) < MIN_HARMED:
        note = f"fewer than {MIN_HARMED} requests harmed or not harmed: the defaults"
        return DEFAULT.model_copy(
            update={"provenance": DEFAULT.provenance | counts | {"fit": note}}
        )
    risk = np.array([expected_rejections(np.array(top1)) for top1 in table["top1_probability"]])
    risk = np.log(risk + LEAST_REJECTIONS)
    score = table["score"].fill_null(np.nan).to_numpy()
    known = np.isfinite(score)
    prompts = table["prompt_id"].unique().sort().to_list()
    intercept, slopes = _fit_logistic(risk[:, None], harmed)
    with_gate = None
    if gate is not None and min(harmed[known].sum(), (~harmed[known]).sum()) >= MIN_HARMED:
        both = np.column_stack([risk, log_odds(score)])[known]
        at, two = _fit_logistic(both, harmed[known])
        with_gate = Coefficients(intercept=at, rejections=max(two[0], 0), gate=max(two[1], 0))
    model = HarmModel(
        alone=Coefficients(intercept=intercept, rejections=max(slopes[0], 0)),
        with_gate=with_gate,
        gate=None if gate is None or with_gate is None else gate.model_dump(mode="json"),
    )
    chance = model.predict(np.exp(risk) - LEAST_REJECTIONS, score)
    loss = -np.log(np.where(harmed, chance, 1 - chance)).mean()
    origin = counts | {"prompts": prompts, "log_loss": round(float(loss), 4)}
    return model.model_copy(update={"provenance": origin})


def _fit_logistic(inputs: FloatArray, labels: NDArray[np.bool_]) -> tuple[float, list[float]]:
    """Intercept and slopes with a ridge on the slopes, by Newton's method."""
    design = np.column_stack([np.ones(len(inputs)), inputs])
    ridge = np.diag([0.0, *[RIDGE] * inputs.shape[1]])
    weights = np.zeros(design.shape[1])

    def objective(at: FloatArray) -> float:
        odds = design @ at
        return float(np.logaddexp(0, odds).sum() - odds[labels].sum() + at @ ridge @ at / 2)

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        slope = design.T @ (chance - labels) + ridge @ weights
        curve = design.T @ (design * (chance * (1 - chance))[:, None]) + ridge
        step = np.linalg.solve(curve + 1e-9 * np.eye(len(weights)), slope)
        length = 1.0
        while objective(weights - length * step) > objective(weights) and length > 1e-6:
            length /= 2
        weights = weights - length * step
        if np.abs(step).max() < 1e-10:
            break
    return float(weights[0]), [float(weight) for weight in weights[1:]]


def save_harm_model(model: HarmModel, path: str | Path) -> None:
    """Write a model as JSON, all or nothing."""
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(model.model_dump(mode="json")))


def load_harm_model(path: str | Path) -> HarmModel:
    """Read what `save_harm_model` wrote.

    Raises:
        GuardError: no such file, or it holds something else.
    """
    try:
        model = HarmModel.model_validate(json.loads(Path(path).read_text()))
        model.scorer("", 0.0)  # refuses a gate that this package cannot ask
        return model
    except (OSError, ValueError) as error:
        raise GuardError(
            f"harm model: {path} is not one of a run, results/models/harm_model.json: {error}"
        ) from None

"""Operating points of the controller, with a finite-sample, distribution-free certificate.

**Learn-then-Test** (Angelopoulos, Bates, Candès, Jordan and Lei 2021). Each setting (tau_low,
tau_high, k, j) is a null hypothesis "its risk exceeds alpha". A p-value that is valid for any
distribution is computed from the calibration prompts, and a procedure that controls the
family-wise error at delta rejects some of the hypotheses. With probability at least 1 - delta over
the draw of the calibration prompts, *every* setting so certified has a risk of at most alpha, and
the most useful of them may be chosen freely.

**The unit is the prompt.** One prompt is decoded under several conditions, and its requests are not
independent. A prompt's loss is therefore one number in [0, 1]: the share of its harmless requests
that alarm (false alarms), or of its harmful requests that never alarm (missed harm). Prompts
without such a request say nothing and are left out. The certified risk is the mean of that loss
over prompts: the chance that a harmless request alarms, when first a prompt and then one of its
harmless requests is drawn. The p-value is that of Hoeffding and Bentkus, and the exact binomial
tail where every prompt has a single request (one model, press and ratio).

**Missed harm** counts a request whose alarm comes after the onset as caught, because verifying and
rewinding repairs it all the same; only a request that ends without any alarm is missed.

**The family.** The grid is tested as a fixed sequence, ordered by the losses of prompts that the
certificate does not use: train, and the part of calibration that fitted the probabilities. Testing
stops at the first hypothesis that is not rejected, and no correction for the size of the grid is
paid. `mapie.risk_control.BinaryClassificationController` has the same p-values and sequences, but a
row of its input is an independent unit with a 0/1 loss. Shares per prompt do not fit that, so its
parts are used, not the class.

**What it needs.** A predictor fixed before it saw the prompts that certify (they are disjoint from
train and from those that fitted the probabilities), and later requests that resemble theirs. Each
statement, about one risk of the pooled requests or of one group of them, holds on its own with
probability 1 - delta.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import polars as pl
from mapie.risk_control.fwer_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from numpy.typing import ArrayLike, NDArray

from kvguard import config, schema
from kvguard.certificate import (
    Bound,
    Certificate,
    CertificateError,
    CertifiedPoint,
    DriftMonitor,
    Reference,
    Risk,
    load_certificate,
    save_certificate,
)
from kvguard.config import BASELINE, POINT_NAMES, PointName, digest
from kvguard.controller import NEVER, OperatingPoints, first_alarm, grid_points
from kvguard.leakage import LeakageCheck, assert_disjoint, check_trained_on
from kvguard.predictor import Predictor
from kvguard.splits import Table, prompts_of, read_splits, scan_table

__all__ = [
    "Calibration",
    "Certificate",
    "CertificateError",
    "DriftMonitor",
    "calibrate",
    "certify",
    "load_certificate",
    "p_values",
    "prompts_needed",
    "save_certificate",
]

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

REFERENCE_DELTA = 0.025
"""Of each bound on the calibration's alarm rate that the drift monitor starts from."""

_MAX_PROMPTS = 10_000_000


# --- Learn-then-Test -----------------------------------------------------------------------------


def p_values(means: ArrayLike, units: ArrayLike, alpha: float, *, single: bool = False) -> Floats:
    """Super-uniform p-values for "the expected loss exceeds alpha", losses in [0, 1].

    Args:
        means: (G,) mean losses.
        units: (G,) or one number: independent units in each mean.
        alpha: the level that the risk is tested against.
        single: the losses are 0 or 1 by design; then the exact binomial tail applies.

    Returns:
        (G,) p-values; 1 without units.

    Source: Hoeffding-Bentkus p-value, Bates et al. 2021, through MAPIE.
    """
    mean = np.atleast_1d(np.asarray(means, dtype=np.float64))
    count = np.broadcast_to(np.asarray(units, dtype=np.float64), mean.shape).copy()
    known = (count > 0) & np.isfinite(mean)
    values = np.ones(len(mean))
    if known.any():
        # a hair less, so that count x mean does not round up past a whole number of losses
        lowered = np.maximum(mean[known] - 1e-12, 0.0)
        found = compute_hoeffding_bentkus_p_value(lowered, count[known], alpha, binary=single)
        values[known] = np.minimum(found[:, 0], 1.0)
    return values


def certify(values: ArrayLike, order: ArrayLike, delta: float) -> Bools:
    """Which hypotheses a fixed sequence rejects, with family-wise error of at most ``delta``.

    Args:
        values: (G,) p-values.
        order: (G,) indices in the order of testing, chosen without the data behind ``values``.
        delta: bound on the chance that any true hypothesis is rejected.

    Returns:
        (G,) true where the hypothesis is rejected, that is, the setting certified.

    Source: fixed-sequence testing, Bauer 1991, through MAPIE.
    """
    numbers, sequence = np.asarray(values, dtype=np.float64), np.asarray(order)
    certified = np.zeros(len(numbers), dtype=np.bool_)
    certified[sequence[control_fwer(numbers[sequence], delta, "fixed_sequence")]] = True
    return certified


def prompts_needed(observed: float, alpha: float, delta: float, *, single: bool) -> int | None:
    """Prompts at which a risk under alpha could be certified, were ``observed`` their mean loss.

    Returns:
        The smallest such number; None where the observed loss is not under alpha.
    """
    if observed >= alpha:
        return None
    stop = 64
    while stop <= _MAX_PROMPTS:
        counts = np.arange(1, stop)
        values = p_values(np.full(len(counts), observed), counts, alpha, single=single)
        enough = np.flatnonzero(values <= delta)
        if len(enough):
            return int(counts[enough[0]])
        stop *= 4
    return None


def rate_bounds(mean: float, units: int, delta: float, *, single: bool) -> tuple[float, float]:
    """Lower and upper bound on an expected loss in [0, 1], each with probability 1 - delta.

    The levels that the p-value does not exclude: Clopper and Pearson's interval where losses are 0
    or 1, by bisection.
    """

    def upper(observed: float) -> float:
        low, high = observed, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            excluded = p_values(observed, units, min(middle, 1 - 1e-12), single=single)[0] <= delta
            low, high = (low, middle) if excluded else (middle, high)
        return high

    return 1 - upper(1 - mean), upper(mean)


# --- requests ------------------------------------------------------------------------------------


class CalibrationRequests(NamedTuple):
    """Requests as the controller sees them.

    ``keys`` (N rows): `schema.TRACE_KEYS` and ``harmful``; ``alarms`` (G, N): whether each request
    ever enters SAFE under each setting; ``onset_alarms`` (G, N): before its onset.
    """

    keys: pl.DataFrame
    alarms: Bools
    early: Bools

    def take(self, mask: Bools) -> "CalibrationRequests":
        """The requests where ``mask`` is true."""
        return CalibrationRequests(
            self.keys.filter(mask), self.alarms[:, mask], self.early[:, mask]
        )


def simulate_requests(
    predictions: pl.DataFrame, labels: pl.DataFrame, target: str, settings: OperatingPoints
) -> CalibrationRequests:
    """Run the controller over recorded hazards, for every setting.

    Args:
        predictions: `schema.PREDICTIONS` of one target.
        labels: `schema.LABELS` of the same tokens.
        target: whose onset makes a request harmful.
        settings: (G,).
    """
    known = labels.select(*schema.TOKEN_KEYS, f"steps_to_{target}", f"hazard_{target}")
    tokens = predictions.join(known, on=schema.TOKEN_KEYS, how="left").sort(schema.TOKEN_KEYS)
    requests = tokens.group_by(schema.TRACE_KEYS, maintain_order=True).agg(
        length=pl.len(),
        onset=(pl.col(f"steps_to_{target}") + pl.col("position")).first(),
        judged=pl.col(f"hazard_{target}").is_not_null().all(),
    )
    unjudged = requests.filter(~pl.col("judged"))
    if unjudged.height:
        raise ValueError(
            f"target {target!r} was not judged in {unjudged.height} requests, such as "
            f"{unjudged.row(0)[:4]}: it needs the audit"
        )
    lengths = requests["length"].to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    hazard = np.full((len(lengths), int(lengths.max(initial=0))), np.nan, np.float32)
    hazard[rows, np.arange(len(rows)) - starts[rows]] = tokens["hazard"].to_numpy()
    first = first_alarm(hazard, lengths, settings)
    onset = requests["onset"].fill_null(np.iinfo(np.int32).max).to_numpy()
    keys = requests.select(*schema.TRACE_KEYS, harmful=pl.col("onset").is_not_null())
    alarms = first != NEVER
    return CalibrationRequests(keys, alarms, alarms & (first < onset))


class Losses(NamedTuple):
    """Mean losses (G,) over ``prompts`` prompts and ``requests`` requests; NaN without any."""

    means: Floats
    prompts: int
    requests: int


def prompt_losses(requests: CalibrationRequests, risk: Risk) -> Losses:
    """Mean over prompts of the share of their harmless (harmful) requests that (never) alarm."""
    harmful = requests.keys["harmful"].to_numpy()
    counts = harmful if risk == "missed_harm" else ~harmful
    wrong = requests.alarms if risk == "false_alarm" else ~requests.alarms
    return _mean_share(requests.keys["prompt_id"].filter(counts), wrong[:, counts])


def _mean_share(prompts: pl.Series, events: Bools) -> Losses:
    codes = np.unique(prompts.to_numpy(), return_inverse=True)[1]
    if not len(codes):
        return Losses(np.full(len(events), np.nan), 0, 0)
    per_prompt = np.bincount(codes).astype(float)
    weights = 1 / (per_prompt[codes] * len(per_prompt))
    return Losses(events @ weights, len(per_prompt), len(codes))


# --- calibration ---------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """The certificate and its tables."""

    certificate: Certificate
    tables: dict[str, pl.DataFrame]  # certificate, certificate_grid, leakage_check_calibration


class _Tested(NamedTuple):
    """A risk of every setting, tested at one level."""

    losses: Losses
    values: Floats
    certified: Bools
    alpha: float
    delta: float
    risk: Risk
    single: bool

    def bound(self, setting: int) -> Bound:
        observed = float(self.losses.means[setting]) if self.losses.prompts else None
        at_zero = prompts_needed(0.0, self.alpha, self.delta, single=self.single)
        if at_zero is None:
            raise ValueError(f"alpha={self.alpha:g} is too small to be certified")
        return Bound(
            risk=self.risk,
            alpha=self.alpha,
            delta=self.delta,
            prompts=self.losses.prompts,
            requests=self.losses.requests,
            observed=observed,
            p_value=float(self.values[setting]) if self.losses.prompts else None,
            certified=bool(self.certified[setting]),
            prompts_needed_at_zero=at_zero,
            prompts_needed=None
            if observed is None
            else prompts_needed(observed, self.alpha, self.delta, single=self.single),
        )


def calibrate(
    predictor: Predictor,
    predictions: Table,
    labels: Table,
    splits: Table,
    controller: config.Controller,
    certificate: config.CertificateSettings,
) -> Calibration:
    """Choose the operating points on calibration prompts, and certify what can be certified.

    An operating point is the setting that catches most harm among those whose false alarms are
    certified to stay under its target. Where none is, it is the one that catches most among those
    whose observed false alarms do, and its bound says "not certified". A point is never bolder than
    the next. The uncompressed baseline is left out throughout: a guard is only ever put around a
    press.

    Args:
        predictor: the one that made ``predictions``; its probabilities were fitted on other
            calibration prompts than those that certify.
        predictions: `schema.PREDICTIONS`, a frame or its file.
        labels: `schema.LABELS`.
        splits: `schema.SPLITS`.
        controller: the grid and the operating points' targets.
        certificate: alpha, delta and miss_alpha.

    Returns:
        The certificate and the tables ``certificate`` (one row per group of requests, operating
        point and risk), ``certificate_grid`` (one row per setting, pooled) and
        ``leakage_check_calibration``.

    Raises:
        LeakageError: prompts that certify were seen in training.
        ValueError: there are no predictions for the predictor's target.
    """
    known = read_splits(splits)
    leakage = LeakageCheck(known)
    if predictor.kind != "rules":
        check_trained_on(known, predictor.provenance)
    fitted = predictor.provenance.get("probability_prompts", [])
    certifying = sorted(set(prompts_of(known, "calibration")) - set(fitted))
    ordering = sorted({*prompts_of(known, "train"), *fitted})
    assert_disjoint({"certificate": certifying, "training and probabilities": ordering})
    if not certifying:
        raise ValueError("no calibration prompt is left to certify: more prompts are needed")

    settings = grid_points(controller)
    requests = _requests(predictor, predictions, labels, [*certifying, *ordering], settings)
    mine = requests.keys["prompt_id"].is_in(certifying).to_numpy()
    sample, other = requests.take(mine), requests.take(~mine)
    leakage.check("certificate", sample.keys["prompt_id"], predictor.target)

    def test(part: Bools, rest: Bools, risk: Risk, alpha: float) -> _Tested:
        chosen = sample.take(part)
        single = chosen.keys["prompt_id"].is_duplicated().sum() == 0
        losses = prompt_losses(chosen, risk)
        values = p_values(losses.means, losses.prompts, alpha, single=single)
        order = _order(other.take(rest), settings, risk)
        certified = certify(values, order, certificate.delta)
        return _Tested(losses, values, certified, alpha, certificate.delta, risk, single)

    everything = np.ones(len(sample.keys), np.bool_), np.ones(len(other.keys), np.bool_)
    missed = test(*everything, "missed_harm", certificate.miss_alpha)
    headline = test(*everything, "false_alarm", certificate.alpha)
    chosen: dict[PointName, int] = {}
    points: dict[PointName, CertifiedPoint] = {}
    for name in reversed(POINT_NAMES):
        tested = test(*everything, "false_alarm", controller.false_alarm_targets[name])
        chosen[name] = _choose(tested, missed.losses, sample, list(chosen.values()))
        points[name] = CertifiedPoint(
            name=name,
            operating_point=settings.point(chosen[name]),
            false_alarm=tested.bound(chosen[name]),
            missed_harm=missed.bound(chosen[name]),
            references=_references(sample, chosen[name]),
        )
    made = Certificate(
        predictor_digest=predictor.digest,
        target=predictor.target,
        alpha=certificate.alpha,
        delta=certificate.delta,
        certified=bool(headline.certified.any()),
        certified_points=[settings.point(int(i)) for i in np.flatnonzero(headline.certified)],
        headline=headline.bound(_headline_setting(headline)),
        points={name: points[name] for name in POINT_NAMES},
        prompts_certifying=len(certifying),
        prompts_total=len(known),
        prompts_digest=digest(certifying),
    )
    logger.info("%s", made.text)
    tables = {
        "certificate": _group_table(sample, other, controller, certificate, chosen, test),
        "certificate_grid": _grid_table(settings, headline, missed, sample, chosen),
        "leakage_check_calibration": leakage.table(),
    }
    return Calibration(made, tables)


def _requests(
    predictor: Predictor,
    predictions: Table,
    labels: Table,
    prompts: list[str],
    settings: OperatingPoints,
) -> CalibrationRequests:
    wanted = pl.LazyFrame({"prompt_id": prompts}, schema={"prompt_id": pl.String})
    compressed = pl.col("press") != BASELINE
    tokens = (
        scan_table(predictions)
        .filter(pl.col("target") == predictor.target, compressed)
        .join(wanted, on="prompt_id", how="semi")
        .collect()
    )
    if tokens.is_empty():
        raise ValueError(f"no predictions of compressed requests for target {predictor.target!r}")
    known = scan_table(labels).filter(compressed).join(wanted, on="prompt_id", how="semi")
    return simulate_requests(tokens, known.collect(), predictor.target, settings)


def _order(
    requests: CalibrationRequests, settings: OperatingPoints, risk: Risk
) -> NDArray[np.int64]:
    """The grid from the most to the least likely to have a low risk, seen on other prompts."""
    losses = prompt_losses(requests, risk)
    means = losses.means if losses.prompts else np.zeros(len(settings.k))
    alarms = requests.alarms.mean(axis=1) if requests.alarms.shape[1] else means
    careful = (settings.j, -settings.tau_low, -settings.k, -settings.tau_high, alarms)
    sign = 1 if risk == "false_alarm" else -1
    return np.lexsort((*(sign * key for key in careful), means))


def _choose(tested: _Tested, missed: Losses, sample: CalibrationRequests, bolder: list[int]) -> int:
    """The setting that catches most harm among those that keep the false-alarm target.

    It alarms on no more harmless and no more harmful requests than the bolder points do: without
    that, a point that could be certified would often be more careful than one that could not.
    """
    means = tested.losses.means if tested.losses.prompts else np.zeros(len(tested.values))
    allowed = tested.certified if tested.certified.any() else means <= tested.alpha
    if not allowed.any():
        allowed = means == means.min()
    caught = 1 - missed.means if missed.prompts else sample.alarms.mean(axis=1)
    for other in bolder:
        capped = allowed & (means <= means[other]) & (caught <= caught[other])
        allowed = capped if capped.any() else np.arange(len(means)) == other
    candidates = np.flatnonzero(allowed)
    best = np.lexsort((means[candidates], -caught[candidates]))
    return int(candidates[best[0]])


def _headline_setting(tested: _Tested) -> int:
    """A certified setting of the largest observed risk, or the one closest to being certified."""
    if tested.certified.any():
        return int(np.flatnonzero(tested.certified)[np.argmax(tested.values[tested.certified])])
    return int(np.argmin(tested.values))


def _references(sample: CalibrationRequests, setting: int) -> list[Reference]:
    groups: list[tuple[str | None, str | None]] = [(None, None)]
    groups += sample.keys.select("press", "ratio").unique().sort("press", "ratio").rows()
    references = []
    for press, ratio in groups:
        part = sample if press is None else sample.take(_where(sample, press=press, ratio=ratio))
        single = part.keys["prompt_id"].is_duplicated().sum() == 0
        share = _mean_share(part.keys["prompt_id"], part.alarms[setting : setting + 1])
        rate = float(share.means[0])
        lower, upper = rate_bounds(rate, share.prompts, REFERENCE_DELTA, single=single)
        references.append(
            Reference(
                press=press,
                ratio=ratio,
                prompts=share.prompts,
                rate=rate,
                lower=lower,
                upper=upper,
                delta=REFERENCE_DELTA,
            )
        )
    return references


def _where(requests: CalibrationRequests, **values: str | None) -> Bools:
    mask = np.ones(len(requests.keys), np.bool_)
    for name, value in values.items():
        mask &= (requests.keys[name] == value).to_numpy()
    return mask


_GROUPS: dict[str, tuple[str, ...]] = {
    "all": (),
    "model": ("model",),
    "press": ("press",),
    "ratio": ("ratio",),
    "condition": ("model", "press", "ratio"),
}


def _group_table(
    sample: CalibrationRequests,
    other: CalibrationRequests,
    controller: config.Controller,
    certificate: config.CertificateSettings,
    chosen: dict[PointName, int],
    test: Callable[[Bools, Bools, Risk, float], _Tested],
) -> pl.DataFrame:
    """One row per group of requests, operating point and risk; each group is tested anew."""
    rows = []
    for group_by, columns in _GROUPS.items():
        values = sample.keys.select(columns).unique().sort(columns).to_dicts() if columns else [{}]
        for group in values:
            part, rest = _where(sample, **group), _where(other, **group)
            missed = test(part, rest, "missed_harm", certificate.miss_alpha)
            for name, setting in chosen.items():
                alarms = test(part, rest, "false_alarm", controller.false_alarm_targets[name])
                for tested in (alarms, missed):
                    bound = tested.bound(setting)
                    rows.append(
                        {"group_by": group_by, "model": None, "press": None, "ratio": None}
                        | group
                        | {"operating_point": name}
                        | bound.model_dump()
                        | {"points_certified": int(tested.certified.sum()), "text": bound.text}
                    )
    return pl.DataFrame(
        rows,
        schema={
            "group_by": pl.String,
            "model": pl.String,
            "press": pl.String,
            "ratio": pl.String,
            "operating_point": pl.String,
            "risk": pl.String,
            "alpha": pl.Float64,
            "delta": pl.Float64,
            "prompts": pl.Int64,
            "requests": pl.Int64,
            "observed": pl.Float64,
            "p_value": pl.Float64,
            "certified": pl.Boolean,
            "prompts_needed_at_zero": pl.Int64,
            "prompts_needed": pl.Int64,
            "points_certified": pl.Int64,
            "text": pl.String,
        },
    )


def _grid_table(
    settings: OperatingPoints,
    headline: _Tested,
    missed: _Tested,
    sample: CalibrationRequests,
    chosen: dict[PointName, int],
) -> pl.DataFrame:
    names = {setting: name for name, setting in chosen.items()}
    harmful = sample.keys["harmful"].to_numpy()
    before = sample.early[:, harmful].mean(axis=1) if harmful.any() else None
    size = len(settings.k)

    def column(tested: _Tested, values: Floats) -> pl.Series:
        return pl.Series(values if tested.losses.prompts else [None] * size, dtype=pl.Float64)

    return pl.DataFrame(
        {
            "tau_low": settings.tau_low,
            "tau_high": settings.tau_high,
            "k": settings.k,
            "j": settings.j,
            "operating_point": [
                ", ".join(n for n, s in chosen.items() if s == i) if i in names else None
                for i in range(size)
            ],
            "false_alarm_observed": column(headline, headline.losses.means),
            "false_alarm_p_value": column(headline, headline.values),
            "false_alarm_certified": headline.certified,
            "missed_harm_observed": column(missed, missed.losses.means),
            "missed_harm_p_value": column(missed, missed.values),
            "missed_harm_certified": missed.certified,
            "alarmed": sample.alarms.mean(axis=1),
            "caught_before_onset": pl.Series(
                before if before is not None else [None] * size, dtype=pl.Float64
            ),
        },
        schema_overrides={"operating_point": pl.String},
    )

"""Operating points of the controller, with a finite-sample, distribution-free certificate.

**The statement.** For one use (model, press, ratio, task, recovery, see `certificate.Use`) and one
operating point: with probability 1 - delta over the draw of the calibration prompts, at most
``alpha`` of *all* requests are harmed and not repaired, and at most ``alarm_budget`` of them alarm.
Both hold together or the statement is not made, so a guard that never alarms is certified only
where compression itself harms that seldom.

**Learn-then-Test** (see `kvguard.learn_then_test`). The grid of thresholds is one fixed sequence,
ordered by the losses of prompts that the certificate does not use: train, and the part of
calibration that fitted the probabilities. First come the primary hypotheses that those prompts
expect to be rejected, then the secondary ones about them (false alarms among requests that
compression does not harm, missed harm among those that it does), then the rest. Testing stops at
the first hypothesis that is not rejected; one delta covers the sequence, no correction for the size
of the grid is paid, and every point that was certified holds, so the most useful may be chosen.

**The unit** is the prompt, or the template where a task draws prompts from templates. A unit's loss
is the share of its requests that went wrong, a number in [0, 1]. The p-value is that of Hoeffding
and Bentkus, and the exact binomial tail where every unit has a single request.

**Repaired.** A request that alarms and is promoted (or restarted) provably returns the uncompressed
answer, whenever the alarm came; the harm left is that of requests which never alarm. After a
recovery that goes on compressed, harm may follow the last check and no trace records it, so every
request at risk that alarms counts as harmed. Such a statement is marked ``conservative``.

**Thresholds from a price.** A check is due when the harm that is expected exceeds what the check
costs, the tokens that it wastes included. With c the cost of a check in harmed requests and the
hazard h a calibrated probability of a harmful rejection since the last clean check, that is
h > c (SpecDec++, 2405.19715, has the same rule for the length of a draft). An operating point is
such a price; its thresholds minimise harm left + c x alarms on the calibration prompts, over the
grid and the point that the rule itself gives (`controller.price_point`).

**What it needs.** A predictor fixed before it saw the prompts that certify (they are disjoint from
train and from those that fitted the probabilities), and later requests that resemble theirs. Each
use's sequence holds on its own with probability 1 - delta. Further certificates from the same
prompts lower the probability that all hold; the certificate counts them (`calibration_ledger`).
"""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.certificate import (
    Bound,
    Certificate,
    CertifiedPoint,
    Reference,
    Risk,
    Statement,
    Use,
)
from kvguard.config import BASELINE, POINT_NAMES, PointName, digest
from kvguard.controller import NEVER, OperatingPoints, first_alarm, grid_points
from kvguard.harm import at_risk
from kvguard.leakage import LeakageCheck, assert_disjoint, check_trained_on
from kvguard.learn_then_test import Bools, Floats, certify, p_values, prompts_needed, rate_bounds
from kvguard.predictor import Predictor
from kvguard.splits import Table, prompts_of, read_splits, scan_table

logger = logging.getLogger(__name__)

REFERENCE_DELTA = 0.025
"""Of each bound on the calibration's alarm rate that the drift monitor starts from."""

EXACT_RECOVERIES = ("promote", "restart")
"""Recoveries after which a request provably ends as the uncompressed one."""

SCOPE = ("model", "press", "ratio", "task")
"""What a statement is about; each has a sequence of tests of its own."""

Unit = Literal["prompt", "template"]


# --- requests ------------------------------------------------------------------------------------


class CalibrationRequests(NamedTuple):
    """Requests as the controller sees them.

    ``keys`` (N rows): `schema.TRACE_KEYS`, ``task``, ``unit``, ``harmed`` (null: unknown) and
    ``at_risk``; ``alarms`` (G, N): whether each request ever enters SAFE under each operating
    point; ``early`` (G, N): before harm starts.
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
    predictions: pl.DataFrame, outcomes: pl.DataFrame, points: OperatingPoints
) -> CalibrationRequests:
    """Run the controller over recorded hazards, for every operating point.

    Args:
        predictions: `schema.PREDICTIONS` of one target.
        outcomes: TRACE_KEYS, task, unit, harmed, at_risk and harm_onset of the same requests.
        points: (G,).
    """
    tokens = predictions.sort(schema.TOKEN_KEYS)
    requests = (
        tokens.group_by(schema.TRACE_KEYS, maintain_order=True)
        .agg(length=pl.len())
        .join(outcomes, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    )
    lengths = requests["length"].to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    hazard = np.full((len(lengths), int(lengths.max(initial=0))), np.nan, np.float32)
    hazard[rows, np.arange(len(rows)) - starts[rows]] = tokens["hazard"].to_numpy()
    first = first_alarm(hazard, lengths, points)
    onset = requests["harm_onset"].fill_null(np.iinfo(np.int32).max).to_numpy()
    keys = requests.select(*schema.TRACE_KEYS, "task", "unit", "harmed", "at_risk")
    alarms = first != NEVER
    return CalibrationRequests(keys, alarms, alarms & (first < onset))


class Losses(NamedTuple):
    """Mean losses (G,) over ``units`` units and ``requests`` requests; NaN without any."""

    means: Floats
    units: int
    requests: int
    single: bool  # one request a unit: losses are 0 or 1


def unit_losses(requests: CalibrationRequests, risk: Risk, recovery: str) -> Losses:
    """Mean over units of the share of their requests that went wrong.

    Args:
        requests: of one scope, or of several.
        risk: what going wrong is.
        recovery: what an alarm does; decides which harm is repaired.
    """
    harmed = requests.keys["harmed"]
    unknown, hurt = harmed.is_null().to_numpy(), harmed.fill_null(False).to_numpy()
    counts = np.ones(len(hurt), np.bool_)
    if risk == "alarm":
        wrong = requests.alarms
    elif risk == "harm_left" and recovery in EXACT_RECOVERIES:
        wrong = (hurt | unknown) & ~requests.alarms
    elif risk == "harm_left":
        exposed = requests.keys["at_risk"].fill_null(True).to_numpy() | unknown
        wrong = np.where(requests.alarms, exposed, hurt | unknown)
    else:
        counts = ~unknown & (hurt if risk == "missed_harm" else ~hurt)
        wrong = ~requests.alarms if risk == "missed_harm" else requests.alarms
    return _mean_share(requests.keys["unit"].filter(counts), wrong[:, counts])


def _mean_share(units: pl.Series, events: Bools) -> Losses:
    codes = np.unique(units.to_numpy(), return_inverse=True)[1]
    if not len(codes):
        return Losses(np.full(len(events), np.nan), 0, 0, True)
    per_unit = np.bincount(codes).astype(float)
    weights = 1 / (per_unit[codes] * len(per_unit))
    return Losses(events @ weights, len(per_unit), len(codes), bool((per_unit == 1).all()))


# --- one sequence of tests -----------------------------------------------------------------------


class TestSequence(NamedTuple):
    """The tests of one scope and recovery: by risk, losses, p-values and what was rejected (G,)."""

    losses: dict[Risk, Losses]
    values: dict[Risk, Floats]
    certified: dict[Risk, Bools]  # harm_left and alarm jointly: the same array


def run_sequence(
    sample: CalibrationRequests,
    other: CalibrationRequests,
    recovery: str,
    levels: dict[Risk, float],
    delta: float,
) -> TestSequence:
    """Test a whole grid in one fixed sequence with family-wise error of at most ``delta``.

    Args:
        sample: requests of the prompts that certify.
        other: requests of other prompts, which decide the order of the tests.
        recovery: what an alarm does.
        levels: what each risk is tested against.
        delta: of the sequence.
    """
    losses: dict[Risk, Losses] = {risk: unit_losses(sample, risk, recovery) for risk in levels}
    values = {
        risk: p_values(part.means, part.units, levels[risk], single=part.single)
        for risk, part in losses.items()
    }
    # What other prompts let expect, had they been as many as those that certify.
    expected = {}
    for risk, part in losses.items():
        seen = unit_losses(other, risk, recovery).means
        expected[risk] = p_values(seen, part.units, levels[risk], single=part.single)
    size = len(sample.alarms)
    primary = np.maximum(values["harm_left"], values["alarm"])
    hoped = np.maximum(expected["harm_left"], expected["alarm"])
    order = np.lexsort((np.arange(size), hoped))
    first = max(int((hoped <= delta).sum()), 1)
    secondary = np.concatenate([expected["false_alarm"], expected["missed_harm"]])
    related = np.concatenate([order[:first], size + order[:first]])
    related = related[np.lexsort((related, secondary[related]))]
    sequence = np.concatenate([order[:first], size + related, order[first:]])
    tests = np.concatenate([primary, values["false_alarm"], values["missed_harm"]])
    rejected = certify(tests, sequence, delta)
    joint, false_alarm, missed = rejected[:size], rejected[size : 2 * size], rejected[2 * size :]
    return TestSequence(
        losses,
        values,
        {
            "harm_left": joint,
            "alarm": joint,
            "false_alarm": false_alarm,
            "missed_harm": missed,
        },
    )


def _bound(
    tested: TestSequence, risk: Risk, point: int, alpha: float, delta: float, unit: Unit
) -> Bound:
    losses = tested.losses[risk]
    at_zero = prompts_needed(0.0, alpha, delta, single=losses.single)
    if at_zero is None:
        raise ValueError(f"alpha={alpha:g} is too small to be certified")
    observed = float(losses.means[point]) if losses.units else None
    return Bound(
        risk=risk,
        alpha=alpha,
        delta=delta,
        unit=unit,
        units=losses.units,
        requests=losses.requests,
        observed=observed,
        p_value=float(tested.values[risk][point]) if losses.units else None,
        certified=bool(tested.certified[risk][point]),
        units_needed_at_zero=at_zero,
        units_needed=None
        if observed is None
        else prompts_needed(observed, alpha, delta, single=losses.single),
    )


# --- calibration ---------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """The certificate and its tables."""

    certificate: Certificate
    tables: dict[str, pl.DataFrame]  # certificate, certificate_grid, leakage_check_calibration


class PriorUse(NamedTuple):
    """What the ledger says of a certificate's prompts and plan, see `calibration_ledger`."""

    frozen: str = ""
    certificates: int = 1
    frozen_before_prompts: bool = False


def certifying_prompts(predictor: Predictor, splits: pl.DataFrame) -> list[str]:
    """Calibration prompts that did not fit the predictor's probabilities, sorted."""
    fitted = predictor.provenance.get("probability_prompts", [])
    return sorted(set(prompts_of(splits, "calibration")) - set(fitted))


def calibrate(
    predictor: Predictor,
    predictions: Table,
    outcomes: Table,
    splits: Table,
    *,
    controller: config.Controller,
    certificate: config.CertificateSettings,
    uses: Sequence[Use] | None = None,
    prior_use: PriorUse | None = None,
) -> Calibration:
    """Choose the operating points on calibration prompts, and certify what can be certified.

    The library side of `kvguard calibrate`: after a retrain, call it with the new predictor's
    predictions and save what it returns beside the predictor. The uncompressed baseline is left out
    throughout: a guard only ever wraps a press.

    Args:
        predictor: the one that made ``predictions``; its probabilities were fitted on other
            calibration prompts than those that certify.
        predictions: `schema.PREDICTIONS`, a frame or its file.
        outcomes: `schema.OUTCOMES` with the baseline's rows.
        splits: `schema.SPLITS`.
        controller: the grid and the operating points' prices.
        certificate: the levels, delta and the recoveries.
        uses: what statements are bound to; those that no request belongs to are passed over. None:
            every (model, press, ratio, task) of the requests, the rest unrecorded.
        prior_use: earlier certificates from these prompts, and whether the plan came first.

    Returns:
        The certificate and the tables ``certificate`` (one row per use, operating point and risk),
        ``certificate_grid`` (one row per point of the grid, all requests pooled) and
        ``leakage_check_calibration``.

    Raises:
        LeakageError: prompts that certify were seen in training.
        ValueError: there are no predictions for the predictor's target, or harm was not judged.
    """
    known = read_splits(splits)
    check = LeakageCheck(known)
    if predictor.kind != "rules":
        check_trained_on(known, predictor.provenance)
    certifying = certifying_prompts(predictor, known)
    fitted = predictor.provenance.get("probability_prompts", [])
    ordering = sorted({*prompts_of(known, "train"), *fitted})
    assert_disjoint({"certificate": certifying, "training and probabilities": ordering})
    if not certifying:
        raise ValueError("no calibration prompt is left to certify: more prompts are needed")

    points = grid_points(controller)
    prompts = [*certifying, *ordering]
    requests = _requests(predictor, predictions, outcomes, known, prompts, points)
    mine = requests.keys["prompt_id"].is_in(certifying).to_numpy()
    sample, other = requests.take(mine), requests.take(~mine)
    check.check("certificate", sample.keys["prompt_id"], predictor.target)
    if uses is None:
        uses = _plain_uses(sample.keys, certificate.recoveries)

    levels: dict[Risk, float] = {
        "harm_left": certificate.alpha,
        "alarm": certificate.alarm_budget,
        "false_alarm": certificate.false_alarm_alpha,
        "missed_harm": certificate.miss_alpha,
    }
    tested: list[tuple[Use, TestSequence]] = []
    for use in uses:
        scope = {name: getattr(use, name) for name in SCOPE}
        part, rest = sample.take(_where(sample, scope)), other.take(_where(other, scope))
        if part.keys.height:
            sequence = run_sequence(part, rest, use.recovery, levels, certificate.delta)
            tested.append((use, sequence))
    chosen = choose_points(sample, controller, [sequence for _, sequence in tested])
    templated = set(known.filter(pl.col("template").is_not_null())["task"])
    statements = [
        _statement(use, sequence, name, point, levels, certificate.delta, templated)
        for use, sequence in tested
        for name, point in chosen.items()
    ]
    prior_use = prior_use or PriorUse()
    made = Certificate(
        predictor_digest=predictor.digest,
        target=predictor.target,
        delta=certificate.delta,
        looks=prior_use.certificates,
        frozen=prior_use.frozen,
        frozen_before_prompts=prior_use.frozen_before_prompts,
        points={
            name: CertifiedPoint(
                name=name,
                operating_point=points.point(point),
                price=controller.prices[name],
                references=_references(sample, point),
            )
            for name, point in chosen.items()
        },
        statements=statements,
        prompts_certifying=len(certifying),
        prompts_total=len(known),
        prompts_digest=digest(certifying),
    )
    logger.info("%s", made.text)
    tables = {
        "certificate": _statement_table(statements),
        "certificate_grid": _grid_table(points, sample, chosen, tested),
        "leakage_check_calibration": check.table(),
    }
    return Calibration(made, tables)


def _requests(
    predictor: Predictor,
    predictions: Table,
    outcomes: Table,
    splits: pl.DataFrame,
    prompts: list[str],
    points: OperatingPoints,
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
    judged = scan_table(outcomes).collect()
    judged = judged.with_columns(at_risk=at_risk(judged)).filter(compressed)
    if judged["harmed"].is_null().all():
        raise ValueError(
            "outcomes: harm was judged in no request; the uncompressed runs are needed"
        )
    units = splits.select(
        "prompt_id", unit=pl.coalesce(pl.concat_str("task", pl.lit("/"), "template"), "prompt_id")
    )
    judged = judged.join(units, on="prompt_id", how="inner").select(
        *schema.TRACE_KEYS, "task", "unit", "harmed", "at_risk", "harm_onset"
    )
    return simulate_requests(tokens, judged, points)


def _plain_uses(keys: pl.DataFrame, recoveries: Sequence[str]) -> list[Use]:
    """A use for every scope and recovery, of which nothing else was recorded."""
    return [
        Use(
            model_digest=None,
            press_class="",
            phase="",
            max_new_tokens=0,
            check_every_tokens=0,
            recovery=recovery,
            **scope,
        )
        for scope in keys.select(SCOPE).unique().sort(SCOPE).to_dicts()
        for recovery in recoveries
    ]


def choose_points(
    sample: CalibrationRequests, controller: config.Controller, tested: list[TestSequence]
) -> dict[PointName, int]:
    """The point of the grid with the least harm left + price x alarms, for each price.

    Among points that are certified somewhere, where any is. Harm left is harm without an alarm:
    what the recovery does afterwards is the recovery's business.
    """
    harm = unit_losses(sample, "harm_left", "promote").means
    alarms = unit_losses(sample, "alarm", "promote").means
    allowed = np.zeros(len(harm), np.bool_)
    for sequence in tested:
        allowed |= sequence.certified["harm_left"]
    candidates = np.flatnonzero(allowed) if allowed.any() else np.arange(len(harm))
    chosen: dict[PointName, int] = {}
    for name in POINT_NAMES:
        cost = harm[candidates] + controller.prices[name] * alarms[candidates]
        chosen[name] = int(candidates[np.lexsort((alarms[candidates], np.round(cost, 12)))[0]])
    return chosen


def _statement(
    use: Use,
    tested: TestSequence,
    name: PointName,
    point: int,
    levels: dict[Risk, float],
    delta: float,
    templated: set[str],
) -> Statement:
    unit: Unit = "template" if use.task in templated else "prompt"
    bounds = {risk: _bound(tested, risk, point, levels[risk], delta, unit) for risk in levels}
    return Statement(
        use=use,
        operating_point=name,
        harm_left=bounds["harm_left"],
        alarms=bounds["alarm"],
        false_alarm=bounds["false_alarm"],
        missed_harm=bounds["missed_harm"],
        conservative=use.recovery not in EXACT_RECOVERIES,
    )


def _references(sample: CalibrationRequests, point: int) -> list[Reference]:
    groups: list[tuple[str | None, str | None]] = [(None, None)]
    groups += sample.keys.select("press", "ratio").unique().sort("press", "ratio").rows()
    references = []
    for press, ratio in groups:
        scope = {} if press is None else {"press": press, "ratio": ratio}
        part = sample.take(_where(sample, scope))
        share = _mean_share(part.keys["unit"], part.alarms[point : point + 1])
        rate = float(share.means[0])
        lower, upper = rate_bounds(rate, share.units, REFERENCE_DELTA, single=share.single)
        references.append(
            Reference(
                press=press,
                ratio=ratio,
                prompts=share.units,
                rate=rate,
                lower=lower,
                upper=upper,
                delta=REFERENCE_DELTA,
            )
        )
    return references


def _where(requests: CalibrationRequests, values: dict[str, str | None]) -> Bools:
    mask = np.ones(len(requests.keys), np.bool_)
    for name, value in values.items():
        mask &= (requests.keys[name] == value).to_numpy()
    return mask


def _statement_table(statements: Sequence[Statement]) -> pl.DataFrame:
    """One row per use, operating point and risk."""
    rows = []
    for one in statements:
        for bound in (one.harm_left, one.alarms, one.false_alarm, one.missed_harm):
            rows.append(
                one.use.model_dump(exclude={"press_settings"})
                | {"operating_point": one.operating_point, "conservative": one.conservative}
                | bound.model_dump()
                | {"primary": bound.risk in ("harm_left", "alarm"), "text": bound.text}
            )
    texts = ("model", "model_digest", "press", "press_class", "phase", "ratio", "task")
    schema_: dict[str, type[pl.DataType]] = dict.fromkeys(
        (*texts, "decoding", "recovery"), pl.String
    )
    schema_ |= {"max_new_tokens": pl.Int64, "check_every_tokens": pl.Int64}
    schema_ |= {"operating_point": pl.String, "conservative": pl.Boolean, "risk": pl.String}
    schema_ |= {"primary": pl.Boolean, "alpha": pl.Float64, "delta": pl.Float64, "unit": pl.String}
    schema_ |= {"units": pl.Int64, "requests": pl.Int64, "observed": pl.Float64}
    schema_ |= {"p_value": pl.Float64, "certified": pl.Boolean, "units_needed_at_zero": pl.Int64}
    schema_ |= {"units_needed": pl.Int64, "text": pl.String}
    return pl.DataFrame(rows, schema=schema_)


def _grid_table(
    points: OperatingPoints,
    sample: CalibrationRequests,
    chosen: dict[PointName, int],
    tested: list[tuple[Use, TestSequence]],
) -> pl.DataFrame:
    """The grid on the calibration prompts, all requests pooled."""
    size = len(points.k)
    harmed = sample.keys["harmed"].fill_null(False).to_numpy()
    early = sample.early[:, harmed].mean(axis=1) if harmed.any() else np.full(size, np.nan)
    columns: dict[str, Floats | Bools | NDArray[np.int64]] = {
        f"{risk}_observed": unit_losses(sample, risk, "promote").means
        for risk in ("harm_left", "alarm", "false_alarm", "missed_harm")
    }
    uses = np.zeros(size, np.int64)
    for _, sequence in tested:
        uses += sequence.certified["harm_left"]
    names = [", ".join(n for n, at in chosen.items() if at == i) or None for i in range(size)]
    return pl.DataFrame(
        {name: getattr(points, name) for name in OperatingPoints._fields}
        | {"operating_point": names}
        | columns
        | {"uses_certified": uses, "caught_before_onset": early},
        schema_overrides={"operating_point": pl.String},
    ).with_columns(pl.selectors.float().fill_nan(None))

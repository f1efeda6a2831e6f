"""The certificate: valid by simulation, exact where it can be checked by hand, honest otherwise."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy import stats

from kvguard import config, schema
from kvguard.calibration import (
    CalibrationRequests,
    calibrate,
    run_sequence,
    unit_losses,
)
from kvguard.calibration_ledger import record_certificate, record_plan
from kvguard.certificate import (
    Certificate,
    CertificateError,
    CertifiedPoint,
    Reference,
    Risk,
    load_certificate,
    save_certificate,
)
from kvguard.config import OperatingPoint
from kvguard.controller import Mode, initial_state, stack_points, step
from kvguard.drift import DriftMonitor
from kvguard.leakage import LeakageError
from kvguard.learn_then_test import certify, p_values, prompts_needed, rate_bounds
from kvguard.predictor import Predictor, rules_predictor
from kvguard.splits import split_prompts

CONDITIONS = (("snapkv", "0.500"), ("snapkv", "0.750"), ("knorm", "0.500"))


# --- p-values, sequences, numbers of prompts -----------------------------------------------------


def test_p_value_of_single_requests_is_the_binomial_tail() -> None:
    losses = np.arange(0, 49)
    got = p_values(losses / 49, 49, 0.2, single=True)
    hoeffding = [math.exp(-49 * stats.entropy([k / 49, 1 - k / 49], [0.2, 0.8])) for k in losses]
    tail = stats.binom.cdf(losses, 49, 0.2)
    expected = np.where(losses / 49 < 0.2, np.minimum(tail, hoeffding), tail)
    assert got == pytest.approx(expected, abs=1e-9)


def test_p_value_of_shares_is_hoeffding_and_bentkus() -> None:
    for mean, units, alpha in ((0.05, 30, 0.2), (0.013, 80, 0.1), (0.3, 12, 0.5)):
        divergence = mean * math.log(mean / alpha) + (1 - mean) * math.log((1 - mean) / (1 - alpha))
        bentkus = math.e * stats.binom.cdf(math.ceil(units * mean), units, alpha)
        expected = min(math.exp(-units * divergence), bentkus)
        assert p_values(mean, units, alpha)[0] == pytest.approx(expected, rel=1e-6)
    assert p_values([0.5, np.nan], [20, 0], 0.2).tolist() == [1.0, 1.0]


def test_a_fixed_sequence_stops_at_the_first_failure() -> None:
    values = np.array([0.2, 0.01, 0.05, 0.001])
    assert certify(values, [3, 1, 2, 0], 0.1).tolist() == [False, True, True, True]
    assert certify(values, [3, 0, 1, 2], 0.1).tolist() == [False, False, False, True]
    assert not certify(values, [0, 1, 2, 3], 0.1).any()


@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.1), (0.2, 0.1), (0.3, 0.05)])
def test_prompts_needed_without_any_loss(alpha: float, delta: float) -> None:
    """(1 - alpha)^n <= delta."""
    expected = math.ceil(math.log(delta) / math.log(1 - alpha))
    assert prompts_needed(0.0, alpha, delta, single=True) == expected
    assert prompts_needed(0.0, alpha, delta, single=False) == expected


def test_prompts_needed_is_the_first_number_that_certifies() -> None:
    needed = prompts_needed(0.1, 0.2, 0.1, single=False)
    assert needed is not None
    values = p_values(np.full(needed, 0.1), np.arange(1, needed + 1), 0.2)
    assert (values[:-1] > 0.1).all()
    assert values[-1] <= 0.1
    assert prompts_needed(0.2, 0.2, 0.1, single=False) is None


def test_rate_bounds_of_single_requests_are_clopper_and_pearsons() -> None:
    expected = stats.binomtest(3, 20).proportion_ci(confidence_level=0.95, method="exact")
    low, high = rate_bounds(3 / 20, 20, 0.025, single=True)
    # the p-value is the smaller of two valid ones, so its bounds may only be tighter
    assert low == pytest.approx(expected.low, abs=0.02)
    assert low >= expected.low - 1e-6
    assert high == pytest.approx(expected.high, abs=0.02)
    assert high <= expected.high + 1e-6


def _requests(
    units: list[str], harmed: list[bool | None], alarms: NDArray[np.bool_]
) -> CalibrationRequests:
    keys = pl.DataFrame(
        {"unit": units, "harmed": harmed, "at_risk": [one is not False for one in harmed]},
        schema={"unit": pl.String, "harmed": pl.Boolean, "at_risk": pl.Boolean},
    )
    return CalibrationRequests(keys, alarms, alarms)


def test_losses_are_shares_of_a_units_requests() -> None:
    alarms = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=np.bool_)
    requests = _requests(list("aaabbc"), [False, False, True, False, True, True], alarms)
    expected: dict[Risk, list[float]] = {
        "false_alarm": [(1 / 2 + 1) / 2, 0],
        "missed_harm": [(1 + 0 + 1) / 3, 1],
        "alarm": [(1 / 3 + 1 + 0) / 3, 0],
        "harm_left": [(1 / 3 + 0 + 1) / 3, (1 / 3 + 1 / 2 + 1) / 3],
    }
    for risk, means in expected.items():
        assert unit_losses(requests, risk, "promote").means == pytest.approx(means), risk
    assert unit_losses(requests, "false_alarm", "promote")[1:3] == (2, 3)


def test_what_no_trace_proves_counts_as_harm() -> None:
    alarms = np.array([[1, 1, 0, 0]], dtype=np.bool_)
    requests = _requests(list("abcd"), [True, False, True, None], alarms)
    # promoted: harm without an alarm, and the request of which nothing is known
    assert unit_losses(requests, "harm_left", "promote").means == pytest.approx([2 / 4])
    # going on compressed: the alarmed one at risk as well; b is not at risk
    assert unit_losses(requests, "harm_left", "continue").means == pytest.approx([3 / 4])


# --- validity by simulation ----------------------------------------------------------------------

DELTA, HARM = 0.1, 0.5
LEVELS: dict[Risk, float] = {
    "harm_left": 0.35,
    "alarm": 0.65,
    "false_alarm": 0.6,
    "missed_harm": 0.3,
}
GRID = stack_points(
    OperatingPoint(tau_low=min(0.3, tau), tau_high=tau, k=1, j=8)
    for tau in (0.99, 0.9, 0.8, 0.71, 0.66, 0.6, 0.54, 0.48, 0.42, 0.36, 0.34, 0.2)
)
TRUE: dict[Risk, NDArray[np.float64]] = {
    "harm_left": HARM * GRID.tau_high,
    "alarm": 1 - GRID.tau_high,
    "false_alarm": 1 - GRID.tau_high,
    "missed_harm": GRID.tau_high,
}
"""Risks of requests whose hazard is constant and uniform, independent of planted harm."""


def _drawn(rng: np.random.Generator, prompts: int, shared: float) -> CalibrationRequests:
    """Prompts with three requests each; with probability ``shared`` one has its prompt's luck."""
    shape = (prompts, 3)

    def uniform() -> NDArray[np.float64]:
        return np.where(rng.random(shape) < shared, rng.random((prompts, 1)), rng.random(shape))

    level, harmed = uniform().ravel(), (uniform() < HARM).ravel()
    keys = pl.DataFrame(
        {"unit": np.repeat(np.arange(prompts), 3), "harmed": harmed, "at_risk": True}
    )
    alarms = level > GRID.tau_high[:, None]
    return CalibrationRequests(keys, alarms, alarms)


@pytest.mark.matrix
@pytest.mark.parametrize(("shared", "prompts"), [(0.0, 150), (1.0, 200)])
def test_a_sequence_errs_in_at_most_delta_of_1000_repetitions(shared: float, prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    other = _drawn(rng, 100, shared)
    false_primary = (TRUE["harm_left"] > LEVELS["harm_left"]) | (TRUE["alarm"] > LEVELS["alarm"])
    wrong = some = secondary = 0
    for _ in range(1000):
        tested = run_sequence(_drawn(rng, prompts, shared), other, "promote", LEVELS, DELTA)
        certified = tested.certified
        errs = (certified["harm_left"] & false_primary).any()
        for risk in ("false_alarm", "missed_harm"):
            errs |= (certified[risk] & (TRUE[risk] > LEVELS[risk])).any()
            secondary += bool(certified[risk].any())
        wrong += bool(errs)
        some += bool(certified["harm_left"].any())
    assert wrong <= stats.binom.ppf(0.999, 1000, DELTA)
    assert some >= 250, "a test that certifies nothing would pass for nothing"


def test_counting_requests_as_units_would_not_be_valid() -> None:
    """The control: the same test fails where requests of a prompt are taken for independent."""
    rng = np.random.default_rng(4)
    order = np.argsort(TRUE["harm_left"], kind="stable")
    at_bound = LEVELS | {"harm_left": float(TRUE["harm_left"][4])}
    wrong = 0
    for _ in range(1000):
        drawn = _drawn(rng, 40, 1.0)
        apart = drawn._replace(keys=drawn.keys.with_columns(unit=pl.int_range(pl.len())))
        losses = unit_losses(apart, "harm_left", "promote")
        values = p_values(losses.means, losses.units, at_bound["harm_left"], single=True)
        certified = certify(values, order, DELTA)
        wrong += bool((certified & (TRUE["harm_left"] >= at_bound["harm_left"])).any())
    assert wrong > stats.binom.ppf(0.999, 1000, DELTA)


# --- calibrate, from tables ----------------------------------------------------------------------

Tables = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]


def _tables(prompts: int, seed: int = 0, harm_rate: float = 0.3) -> Tables:
    """Predictions, outcomes and splits; harmed requests have a hazard that rises to their onset."""
    rng = np.random.default_rng(seed)
    ids = [f"{index:016x}" for index in range(prompts)]
    splits = split_prompts(ids, config.Splits(train=0.3, calibration=0.5, test=0.2), seed)
    predictions, outcomes = [], []
    for prompt, (press, ratio) in product(ids, (("none", "0.000"), *CONDITIONS)):
        length = int(rng.integers(12, 30))
        position = np.arange(length)
        harmed = press != "none" and rng.random() < harm_rate
        onset = int(rng.integers(8, length)) if harmed else None
        hazard = rng.beta(1, 12, size=length)
        if onset is not None:
            hazard += 0.9 * np.exp(-((position - onset) ** 2) / 40)
        keys = {"model": "m", "press": press, "ratio": ratio, "prompt_id": prompt}
        frame = pl.DataFrame({"position": position, "hazard": np.clip(hazard, 0, 1)})
        frame = frame.with_columns(pl.lit(value).alias(name) for name, value in keys.items())
        predictions.append(frame.with_columns(target=pl.lit("any")))
        outcomes.append(
            keys
            | {"task": "", "harmed": harmed, "harm_onset": onset, "baseline_right": True}
            | {"catastrophe": False}
        )
    joined = pl.concat(predictions).join(splits, on="prompt_id")
    return (
        schema.check(schema.conform(joined, schema.PREDICTIONS), schema.PREDICTIONS, "predictions"),
        pl.DataFrame(outcomes, schema_overrides={"harm_onset": pl.Int32}),
        splits,
    )


@pytest.fixture(scope="module")
def tables() -> Tables:
    return _tables(120)


SETTINGS = config.CertificateSettings(alarm_budget=0.6)


def certified(tables: Tables, predictor: Predictor | None = None) -> Certificate:
    made = calibrate(
        predictor or rules_predictor(),
        *tables,
        controller=config.Controller(),
        certificate=SETTINGS,
    )
    return made.certificate


def test_lower_prices_alarm_more_and_leave_less_harm(tables: Tables) -> None:
    certificate = certified(tables)
    assert certificate.certified
    rates = [certificate.points[name].references[0].rate for name in config.POINT_NAMES]
    assert rates == sorted(rates)
    promoted = [one for one in certificate.statements if one.use.recovery == "promote"]
    assert len(promoted) == 9  # three presses and ratios, three points
    for one in promoted:
        assert one.certified == one.alarms.certified
        if one.certified:
            assert one.harm_left.observed is not None
            assert one.harm_left.observed <= 0.2
            assert one.harm_left.p_value is not None
            assert one.harm_left.p_value <= certificate.delta
    assert "at most 20% of requests are harmed and not repaired" in certificate.text


def test_observed_risks_are_those_of_the_state_machine(tables: Tables) -> None:
    """Each request replayed token by token, and the shares computed by hand."""
    predictions, outcomes, splits = tables
    certificate = certified(tables)
    point = certificate.points["balanced"].operating_point
    statement = certificate.statements_about("balanced", press="knorm", recovery="promote")[0]
    calibration = splits.filter(pl.col("split") == "calibration")["prompt_id"].to_list()
    alarmed: dict[str, bool] = {}
    chosen = predictions.filter(
        pl.col("prompt_id").is_in(calibration), pl.col("press") == "knorm"
    ).sort(schema.TOKEN_KEYS)
    for keys, request in chosen.group_by(schema.TRACE_KEYS):
        state, alarm = initial_state(1), False
        for hazard in request["hazard"]:
            state = step(state, np.array([hazard]), point)
            alarm |= bool(state.mode[0] == Mode.SAFE)
        alarmed[str(keys[3])] = alarm
    harmed = dict(outcomes.filter(press="knorm").select("prompt_id", "harmed").iter_rows())
    left = [harmed[prompt] and not alarm for prompt, alarm in alarmed.items()]
    assert statement.harm_left.observed == pytest.approx(np.mean(left))
    assert statement.alarms.observed == pytest.approx(np.mean(list(alarmed.values())))
    false = [alarm for prompt, alarm in alarmed.items() if not harmed[prompt]]
    assert statement.false_alarm.observed == pytest.approx(np.mean(false))
    assert statement.false_alarm.units == len(false)


def test_a_recovery_that_goes_on_compressed_is_judged_conservatively(tables: Tables) -> None:
    certificate = certified(tables)
    exact = certificate.statements_about("aggressive", press="knorm", recovery="promote")[0]
    other = certificate.statements_about("aggressive", press="knorm", recovery="continue")[0]
    assert (exact.conservative, other.conservative) == (False, True)
    assert exact.harm_left.observed is not None
    assert other.harm_left.observed is not None
    assert exact.harm_left.observed < other.harm_left.observed
    assert "count as harmed" in other.text


def test_a_certificate_speaks_of_one_use(tables: Tables) -> None:
    certificate = certified(tables)
    certificate.statements_about("balanced", press="knorm", ratio="0.500", recovery="promote")
    with pytest.raises(
        CertificateError, match=r"ratio='0\.900' \(certified on '0\.500', '0\.750'\)"
    ):
        certificate.statements_about("balanced", press="snapkv", ratio="0.900", recovery="promote")
    with pytest.raises(CertificateError, match="recovery='tolerant'"):
        certificate.statements_about("balanced", press="snapkv", ratio="0.500", recovery="tolerant")


def test_too_few_prompts_are_refused_with_a_number() -> None:
    certificate = certified(_tables(8))
    assert not certificate.certified
    bound = certificate.statements[0].harm_left
    assert bound.units_needed_at_zero == 11  # (1 - 0.2)^n <= 0.1
    assert f"at least 11 such prompts, {11 - bound.units} more" in certificate.text
    assert "0 of 18 primary statements are certified" in certificate.text
    assert certificate.operating_point("balanced").tau_high > 0


def test_without_harm_the_missed_share_is_undefined() -> None:
    certificate = certified(_tables(40, harm_rate=0.0))
    for statement in certificate.statements:
        bound = statement.missed_harm
        assert (bound.observed, bound.p_value, bound.certified) == (None, None, False)
    assert "no such request was seen" in certificate.statements[0].text


def test_templates_are_the_units_where_a_task_has_them(tables: Tables) -> None:
    predictions, outcomes, splits = tables
    grouped = splits.with_columns(task=pl.lit(""), template=pl.col("prompt_id").str.slice(-1))
    made = certified((predictions, outcomes, grouped))
    bound = made.statements[0].harm_left
    assert bound.unit == "template"
    assert bound.units <= 16 < bound.requests


def test_a_predictor_of_other_splits_is_refused(tables: Tables) -> None:
    trained = Predictor.model_validate(
        rules_predictor().model_dump() | {"kind": "entropy", "provenance": {"splits_digest": "0"}}
    )
    with pytest.raises(LeakageError, match="trained on splits 0"):
        certified(tables, trained)


def test_prompts_that_fitted_probabilities_do_not_certify(tables: Tables) -> None:
    calibration = tables[2].filter(pl.col("split") == "calibration")["prompt_id"].to_list()
    used = rules_predictor().model_copy(
        update={"provenance": {"probability_prompts": calibration[:20]}}
    )
    assert certified(tables, used).prompts_certifying == len(calibration) - 20


def test_a_damaged_line_of_the_ledger_is_named(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    record_plan(ledger, "plan a", prompts_exist=False)
    ledger.write_text(ledger.read_text() + '{"event": "certif')
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line 2, is damaged"):
        record_certificate(ledger, "plan a", "predictor", ["p"])


def test_the_ledger_counts_looks_and_knows_what_came_first(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    record_plan(ledger, "plan a", prompts_exist=False)
    first = record_certificate(ledger, "plan a", "predictor", ["p", "q"])
    assert (first.certificates, first.frozen_before_prompts) == (1, True)
    assert record_certificate(ledger, "plan a", "predictor", ["p", "q"]) == first  # a rerun
    record_plan(ledger, "plan b", prompts_exist=True)
    second = record_certificate(ledger, "plan b", "predictor", ["q", "r"])
    assert (second.certificates, second.frozen_before_prompts) == (2, False)
    assert record_certificate(ledger, "plan b", "predictor", ["s"]).certificates == 1
    record_plan(ledger, "plan a", prompts_exist=True)
    assert record_certificate(ledger, "plan a", "other", ["p"]).frozen_before_prompts


# --- the file ------------------------------------------------------------------------------------


def _certificate(prompts: int = 200, rate: float = 0.1, upper: float = 0.15) -> Certificate:
    reference = Reference(
        press=None, ratio=None, prompts=prompts, rate=rate, lower=0.06, upper=upper, delta=0.025
    )
    return Certificate(
        predictor_digest=rules_predictor().digest,
        target="any",
        delta=0.1,
        looks=3,
        frozen="0" * 16,
        frozen_before_prompts=False,
        points={
            "balanced": CertifiedPoint(
                name="balanced",
                operating_point=OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=8),
                price=0.2,
                references=[reference],
            )
        },
        statements=[],
        prompts_certifying=prompts,
        prompts_total=4 * prompts,
        prompts_digest="0" * 16,
    )


def test_a_certificate_survives_its_file(tmp_path: Path, tables: Tables) -> None:
    certificate = certified(tables)
    save_certificate(certificate, tmp_path / "certificate.json")
    loaded = load_certificate(tmp_path / "certificate.json")
    assert loaded == certificate
    assert loaded.text == certificate.text
    with pytest.raises(CertificateError, match="no operating point 'bold'; known: conserv"):
        loaded.operating_point("bold")


def test_looks_are_paid_for() -> None:
    certificate = _certificate()
    assert certificate.confidence == pytest.approx(0.7)
    assert "used for 3 certificates; all of them hold together with probability at least 70%" in (
        certificate.text
    )
    assert "read it as exploratory" in certificate.text


def test_unusable_files_say_why(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    with pytest.raises(FileNotFoundError, match="no certificate at"):
        load_certificate(path)
    path.write_text("{")
    with pytest.raises(CertificateError, match="is not JSON"):
        load_certificate(path)
    path.write_text('{"format": 99}')
    with pytest.raises(CertificateError, match="not a certificate of format 2"):
        load_certificate(path)


def test_a_certificate_belongs_to_one_predictor() -> None:
    certificate = _certificate()
    certificate.check_predictor(rules_predictor())
    other = rules_predictor().model_copy(update={"horizon_tokens": 8})
    with pytest.raises(CertificateError, match=f"{certificate.predictor_digest}.*{other.digest}"):
        certificate.check_predictor(other)


# --- drift ---------------------------------------------------------------------------------------


def test_the_monitors_evidence_is_a_martingale() -> None:
    """At the bound itself, the expected e-value after six requests is exactly 1."""
    for side, null in (("_more", 0.15), ("_fewer", 0.06)):
        expected = 0.0
        for sequence in product([False, True], repeat=6):
            monitor = DriftMonitor(_certificate())
            monitor.update(sequence)
            alarms = sum(sequence)
            probability = null**alarms * (1 - null) ** (6 - alarms)
            expected += probability * math.exp(getattr(monitor, side).log_value)
        assert expected == pytest.approx(1)


def test_the_monitor_seldom_warns_at_the_bound_and_soon_beyond_it() -> None:
    rng = np.random.default_rng(5)

    def warned(rate: float, runs: int, requests: int) -> list[str | None]:
        found = []
        for _ in range(runs):
            monitor = DriftMonitor(_certificate(), level=0.05)
            found.append(monitor.update(rng.random(requests) < rate))
        return found

    null = sum(drift is not None for drift in warned(0.15, 200, 300))
    assert null <= stats.binom.ppf(0.999, 200, 0.05)
    assert warned(0.4, 10, 100).count("more") >= 9
    assert warned(0.0, 10, 200).count("fewer") >= 9


def test_the_monitor_says_what_it_knows() -> None:
    monitor = DriftMonitor(_certificate())
    assert monitor.e_value == 1
    assert "no request yet" in monitor.text
    monitor.update(True)
    assert "1 of 1 requests alarmed; calibration allows 6.0% to 15.0%" in monitor.text
    monitor.update([True] * 20)
    assert monitor.drifted == "more"
    assert "the certificate no longer applies" in monitor.text
    with pytest.raises(CertificateError, match="no reference for"):
        DriftMonitor(_certificate(), press="snapkv", ratio="0.500")

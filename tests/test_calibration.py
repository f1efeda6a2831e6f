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
    certify,
    p_values,
    prompt_losses,
    prompts_needed,
    rate_bounds,
)
from kvguard.certificate import (
    Bound,
    Certificate,
    CertificateError,
    CertifiedPoint,
    DriftMonitor,
    Reference,
    load_certificate,
    save_certificate,
)
from kvguard.controller import (
    NEVER,
    Mode,
    OperatingPoint,
    first_alarm,
    initial_state,
    stack_points,
    step,
)
from kvguard.leakage import LeakageError
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


def test_prompt_losses_average_shares_not_requests() -> None:
    keys = pl.DataFrame(
        {
            "prompt_id": ["a", "a", "a", "b", "b", "c"],
            "harmful": [False, False, True, False, True, True],
        }
    )
    alarms = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=np.bool_)
    requests = CalibrationRequests(keys, alarms, alarms)
    false_alarm = prompt_losses(requests, "false_alarm")
    assert false_alarm.means == pytest.approx([(1 / 2 + 1) / 2, 0])
    assert (false_alarm.prompts, false_alarm.requests) == (2, 3)
    missed = prompt_losses(requests, "missed_harm")
    assert missed.means == pytest.approx([(1 + 0 + 1) / 3, 1])
    assert (missed.prompts, missed.requests) == (3, 3)


# --- validity by simulation ----------------------------------------------------------------------

ALPHA, DELTA = 0.2, 0.1
GRID = stack_points(
    OperatingPoint(tau_low=min(0.3, tau), tau_high=tau, k=k, j=8)
    for tau, k in product((0.95, 0.9, 0.85, 0.81, 0.79, 0.75, 0.6), (1, 2))
)
TRUE_RISK = 1 - GRID.tau_high
"""A request's hazard is constant and uniform, so it alarms when it lies above tau_high."""


def _simulated(
    repetitions: int, prompts: int, shared: float, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Alarms (G, repetitions, prompts, 3) and harm (repetitions, prompts, 3) of whole traces.

    With probability ``shared`` a request has its prompt's hazard, else one of its own.
    """
    rng = np.random.default_rng(seed)
    shape = (repetitions, prompts, len(CONDITIONS))
    own, prompt = rng.random(shape), rng.random((repetitions, prompts, 1))
    level = np.where(rng.random(shape) < shared, prompt, own)
    harmful = rng.random(shape) < 0.3
    lengths = rng.integers(4, 12, size=level.size)
    traces = np.repeat(level.reshape(-1, 1).astype(np.float32), 12, axis=1)
    alarms = first_alarm(traces, lengths, GRID) != NEVER
    return alarms.reshape(len(GRID.k), *shape), harmful


def _failures(alarms: NDArray[np.bool_], harmful: NDArray[np.bool_], units: str) -> tuple[int, int]:
    """Repetitions in which a setting above alpha was certified, and in which any was."""
    order = np.argsort(TRUE_RISK, kind="stable")
    prompts = [f"p{index}" for index in range(harmful.shape[1]) for _ in CONDITIONS]
    wrong = some = 0
    for repetition in range(harmful.shape[0]):
        own = alarms[:, repetition].reshape(len(GRID.k), -1)
        ids = prompts if units == "prompt" else [str(index) for index in range(len(prompts))]
        keys = pl.DataFrame({"prompt_id": ids, "harmful": harmful[repetition].ravel()})
        losses = prompt_losses(CalibrationRequests(keys, own, own), "false_alarm")
        values = p_values(losses.means, losses.prompts, ALPHA, single=units != "prompt")
        certified = certify(values, order, DELTA)
        wrong += bool((certified & (TRUE_RISK > ALPHA)).any())
        some += bool(certified.any())
    return wrong, some


@pytest.mark.parametrize(("shared", "prompts"), [(0.0, 25), (0.6, 25), (1.0, 40)])
def test_the_bound_fails_in_at_most_delta_of_1000_repetitions(shared: float, prompts: int) -> None:
    alarms, harmful = _simulated(1000, prompts, shared, seed=int(10 * shared))
    wrong, some = _failures(alarms, harmful, "prompt")
    assert wrong <= stats.binom.ppf(0.999, 1000, DELTA)
    assert some >= 250, "a test that certifies nothing would pass for nothing"


def test_counting_requests_as_units_would_not_be_valid() -> None:
    """The control: the same test fails where requests of a prompt are taken for independent."""
    alarms, harmful = _simulated(1000, 40, 1.0, seed=10)
    wrong, _ = _failures(alarms, harmful, "request")
    assert wrong > stats.binom.ppf(0.999, 1000, DELTA)


# --- calibrate, from tables ----------------------------------------------------------------------


def _tables(
    prompts: int, seed: int = 0, harm_rate: float = 0.3
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Predictions, labels and splits; harmful requests have a hazard that rises to their onset."""
    rng = np.random.default_rng(seed)
    ids = [f"{index:016x}" for index in range(prompts)]
    splits = split_prompts(ids, config.Splits(train=0.3, calibration=0.5, test=0.2), seed)
    predictions, labels = [], []
    for prompt, (press, ratio) in product(ids, (("none", "0.000"), *CONDITIONS)):
        length = int(rng.integers(12, 30))
        position = np.arange(length)
        onset = int(rng.integers(8, length)) if rng.random() < harm_rate else None
        hazard = rng.beta(1, 12, size=length)
        if onset is not None:
            hazard += 0.9 * np.exp(-((position - onset) ** 2) / 40)
        keys = {"model": "m", "press": press, "ratio": ratio, "prompt_id": prompt}
        frame = pl.DataFrame({"position": position, "hazard": np.clip(hazard, 0, 1)})
        frame = frame.with_columns(pl.lit(value).alias(name) for name, value in keys.items())
        predictions.append(frame.with_columns(target=pl.lit("any")))
        steps = pl.lit(None, pl.Int32) if onset is None else onset - pl.col("position")
        label = frame.with_columns(steps_to_any=steps.cast(pl.Int32))
        for target in schema.TARGETS:
            label = label.with_columns(
                pl.col("steps_to_any").alias(f"steps_to_{target}"),
                pl.col("steps_to_any").is_between(0, 31).fill_null(False).alias(f"hazard_{target}"),
                (pl.col("steps_to_any") <= 0).fill_null(False).alias(f"post_onset_{target}"),
            )
        labels.append(label)
    joined = pl.concat(predictions).join(splits, on="prompt_id")
    return (
        schema.check(schema.conform(joined, schema.PREDICTIONS), schema.PREDICTIONS, "predictions"),
        schema.conform(pl.concat(labels), schema.LABELS),
        splits,
    )


@pytest.fixture(scope="module")
def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    return _tables(120)


def test_operating_points_keep_their_targets(
    tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
) -> None:
    made = calibrate(rules_predictor(), *tables, config.Controller(), config.CertificateSettings())
    certificate = made.certificate
    assert certificate.certified
    points = certificate.points
    for name, target in config.Controller().false_alarm_targets.items():
        bound = points[name].false_alarm
        assert bound.certified
        assert bound.alpha == target
        assert bound.observed is not None
        assert bound.observed <= target
        assert bound.p_value is not None
        assert bound.p_value <= certificate.delta
    caught = [points[name].missed_harm.observed for name in ("conservative", "aggressive")]
    assert caught[1] <= caught[0], "more alarms never miss more harm"
    assert isinstance(certificate.operating_point("balanced"), OperatingPoint)
    assert "with probability at least 90%, at most 15% of harmless requests alarm" in (
        certificate.text
    )


def test_observed_risks_are_those_of_the_state_machine(
    tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
) -> None:
    """Each request replayed token by token, its prompt's share and the mean computed by hand."""
    predictions, labels, splits = tables
    made = calibrate(rules_predictor(), *tables, config.Controller(), config.CertificateSettings())
    point = made.certificate.points["balanced"]
    calibration = splits.filter(pl.col("split") == "calibration")["prompt_id"].to_list()
    harmless: dict[str, list[bool]] = {}
    missed: dict[str, list[bool]] = {}
    tokens = predictions.join(labels, on=schema.TOKEN_KEYS).sort(schema.TOKEN_KEYS)
    chosen = tokens.filter(pl.col("prompt_id").is_in(calibration), pl.col("press") != "none")
    for keys, request in chosen.group_by(schema.TRACE_KEYS):
        state, alarmed = initial_state(1), False
        for hazard in request["hazard"]:
            state = step(state, np.array([hazard]), point.operating_point)
            alarmed |= bool(state.mode[0] == Mode.SAFE)
        if request["steps_to_any"].null_count() == len(request):
            harmless.setdefault(str(keys[3]), []).append(alarmed)
        else:
            missed.setdefault(str(keys[3]), []).append(not alarmed)
    assert point.false_alarm.observed == pytest.approx(
        np.mean([np.mean(shares) for shares in harmless.values()])
    )
    assert point.false_alarm.prompts == len(harmless)
    assert point.missed_harm.observed == pytest.approx(
        np.mean([np.mean(shares) for shares in missed.values()])
    )


def test_groups_cover_presses_ratios_and_conditions(
    tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
) -> None:
    made = calibrate(rules_predictor(), *tables, config.Controller(), config.CertificateSettings())
    table = made.tables["certificate"]
    groups = table.filter(risk="false_alarm", operating_point="balanced")
    counts = dict(groups.group_by("group_by").len().rows())
    assert counts == {"all": 1, "model": 1, "press": 2, "ratio": 2, "condition": 3}
    assert "none" not in groups["press"].to_list()
    pooled = groups.filter(group_by="all").row(0, named=True)
    bound = made.certificate.points["balanced"].false_alarm
    assert pooled["p_value"] == bound.p_value
    grid = made.tables["certificate_grid"]
    assert grid["false_alarm_certified"].sum() == len(made.certificate.certified_points)
    assert made.tables["leakage_check_calibration"]["split"].to_list() == ["calibration"]


def test_too_few_prompts_are_refused_with_a_number() -> None:
    made = calibrate(
        rules_predictor(), *_tables(8), config.Controller(), config.CertificateSettings()
    )
    certificate = made.certificate
    assert not certificate.certified
    assert certificate.certified_points == []
    for point in certificate.points.values():
        assert not point.false_alarm.certified
    # (1 - 0.05)^n <= 0.1 takes 45 prompts
    bound = certificate.points["conservative"].false_alarm
    assert bound.prompts_needed_at_zero == 45
    assert f"at least 45 such prompts, {45 - bound.prompts} more" in certificate.text
    assert "No setting of the grid is certified" in certificate.text
    assert "Of the run's 8 prompts 4 certify" in certificate.text
    assert certificate.operating_point("balanced").tau_high > 0


def test_without_harm_the_missed_share_is_undefined() -> None:
    made = calibrate(
        rules_predictor(),
        *_tables(40, harm_rate=0.0),
        config.Controller(),
        config.CertificateSettings(),
    )
    bound = made.certificate.points["balanced"].missed_harm
    assert (bound.observed, bound.p_value, bound.certified) == (None, None, False)
    assert made.tables["certificate_grid"]["missed_harm_observed"].null_count() == len(
        made.tables["certificate_grid"]
    )
    assert "no such request was seen" in made.certificate.text


def test_a_predictor_of_other_splits_is_refused(
    tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
) -> None:
    predictions, labels, splits = tables
    trained = Predictor.model_validate(
        rules_predictor().model_dump() | {"kind": "entropy", "provenance": {"splits_digest": "0"}}
    )
    with pytest.raises(LeakageError, match="trained on splits 0"):
        calibrate(
            trained, predictions, labels, splits, config.Controller(), config.CertificateSettings()
        )


def test_prompts_that_fitted_probabilities_do_not_certify(
    tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame],
) -> None:
    predictions, labels, splits = tables
    calibration = splits.filter(pl.col("split") == "calibration")["prompt_id"].to_list()
    used = rules_predictor().model_copy(
        update={"provenance": {"probability_prompts": calibration[:20]}}
    )
    made = calibrate(
        used, predictions, labels, splits, config.Controller(), config.CertificateSettings()
    )
    check = made.tables["leakage_check_calibration"].row(0, named=True)
    assert check["prompts"] == len(calibration) - 20


# --- the file ------------------------------------------------------------------------------------


def _certificate(prompts: int = 200, rate: float = 0.1, upper: float = 0.15) -> Certificate:
    bound = Bound(
        risk="false_alarm",
        alpha=0.2,
        delta=0.1,
        prompts=prompts,
        requests=prompts,
        observed=rate,
        p_value=0.01,
        certified=True,
        prompts_needed_at_zero=11,
        prompts_needed=40,
    )
    setting = OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=8)
    reference = Reference(
        press=None, ratio=None, prompts=prompts, rate=rate, lower=0.06, upper=upper, delta=0.025
    )
    return Certificate(
        predictor_digest=rules_predictor().digest,
        target="any",
        alpha=0.2,
        delta=0.1,
        certified=True,
        certified_points=[setting],
        headline=bound,
        points={
            "balanced": CertifiedPoint(
                name="balanced",
                operating_point=setting,
                false_alarm=bound,
                missed_harm=bound.model_copy(update={"risk": "missed_harm"}),
                references=[reference],
            )
        },
        prompts_certifying=prompts,
        prompts_total=4 * prompts,
        prompts_digest="0" * 16,
    )


def test_a_certificate_survives_its_file(tmp_path: Path) -> None:
    certificate = _certificate()
    save_certificate(certificate, tmp_path / "certificate.json")
    loaded = load_certificate(tmp_path / "certificate.json")
    assert loaded == certificate
    assert loaded.text == certificate.text
    with pytest.raises(CertificateError, match="no operating point 'bold'; known: balanced"):
        loaded.operating_point("bold")


def test_unusable_files_say_why(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    with pytest.raises(FileNotFoundError, match="no certificate at"):
        load_certificate(path)
    path.write_text("{")
    with pytest.raises(CertificateError, match="is not JSON"):
        load_certificate(path)
    path.write_text('{"format": 99}')
    with pytest.raises(CertificateError, match="not a certificate of format 1"):
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

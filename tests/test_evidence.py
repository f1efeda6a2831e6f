"""Evidence of checks: supposed on traces as it comes live, read by predictors, of live checks."""

from typing import Any

import kvpress
import numpy as np
import planted
import polars as pl
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from test_engine import ragged_requests
from transformers import PreTrainedModel

from kvguard import config, schema
from kvguard.ablation import _evidence_rows
from kvguard.config import OperatingPoint, Splits
from kvguard.evidence import EvidenceState, no_evidence
from kvguard.features import FEATURE_SETS
from kvguard.guard import KVGuard
from kvguard.hazards import HazardState
from kvguard.predictor import Predictor, parse_predictor
from kvguard.requests import Request
from kvguard.rows import Rows
from kvguard.sampling import Decoding
from kvguard.splits import split_prompts
from kvguard.supposed_checks import SCHEDULES, rows_with_evidence, suppose_checks
from kvguard.train import predict_tokens, train_predictors
from kvguard.trainer import make_trainer
from kvguard.variants import load_study

MARGIN = 1e-4


def _tokens(lengths: list[int], seed: int, rate: float = 0.1) -> pl.DataFrame:
    """Audited traces; a share of tokens is rejected."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, length in enumerate(lengths):
        gap = np.where(rng.random(length) < rate, 1.0, 0.0)
        parts.append(
            pl.DataFrame(
                {
                    "model": ["m"] * length,
                    "press": ["snapkv"] * length,
                    "ratio": ["0.500"] * length,
                    "prompt_id": [f"{number:016x}"] * length,
                    "position": np.arange(length, dtype=np.int32),
                    "llr": rng.normal(size=length).astype(np.float32),
                    "audit_gap": gap.astype(np.float32),
                }
            )
        )
    return pl.concat(parts)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@examples(40)
def test_supposed_checks_say_what_live_ones_would(
    lengths: list[int], every: int, seed: int
) -> None:
    """Bit for bit; and from the first check that would cut there is nothing to learn."""
    tokens = _tokens(lengths, seed)
    found = suppose_checks(tokens, check_every_tokens=every, margin_nats=MARGIN, seed=seed)
    assert found.select(schema.TOKEN_KEYS).equals(tokens.select(schema.TOKEN_KEYS))
    state = EvidenceState(2)
    row = np.array([1])
    for keys, trace in tokens.group_by(schema.TRACE_KEYS, maintain_order=True):
        mine = found.filter(pl.col("prompt_id") == keys[3])
        values = mine.select(schema.EVIDENCE_NAMES).to_numpy()
        llr, gap = trace["llr"].to_numpy(), trace["audit_gap"].to_numpy()
        fits = []
        for steps in SCHEDULES:
            state.reset(1)
            live, clean, checked = [], [], 0
            for position in range(len(trace)):
                due = position - position % (every * steps)
                if due > checked:
                    state.checked(1, due, llr[checked:due], rejected=False)
                    checked = due
                live.append(state.values(row, np.array([[position]]))[0, 0])
                clean.append(bool((gap[:checked] <= MARGIN).all()))
            fits.append(
                np.array_equal(np.array(live), values, equal_nan=True)
                and clean == mine["supposed"].to_list()
            )
        assert any(fits), "one of the schedules explains what was supposed"


def test_a_check_counts_what_it_says() -> None:
    state = EvidenceState(3)
    rows = np.array([0, 2])
    nothing = state.values(rows, np.array([[0, 1], [4, 5]]))
    assert np.array_equal(nothing.reshape(4, 5), no_evidence(4), equal_nan=True)
    state.checked(2, 3, np.array([0.5, -0.25, 1.0], np.float32), rejected=False)
    state.checked(2, 5, np.array([0.25, 0.0], np.float32), rejected=True)
    values = dict(
        zip(schema.EVIDENCE_NAMES, state.values(rows, np.array([[0], [6]]))[1, 0], strict=True)
    )
    assert values == {
        "rejections": 1,
        "verified_llr_last": 0,
        "verified_llr_max": 1,
        "verified_llr_mean": pytest.approx(0.3),
        "tokens_since_check": 2,
    }
    state.move(2, 0)
    state.reset(2)
    again = state.values(rows, np.array([[6], [6]]))
    assert again[0, 0, 0] == 1
    assert np.array_equal(again[1], no_evidence(1), equal_nan=True)
    state.checked(2, 0, np.zeros(0, np.float32), rejected=True)  # the first token was rejected
    first = state.values(np.array([2]), np.array([[0]]))[0, 0]
    assert first[0] == 1
    assert np.isnan(first[1:4]).all()
    assert first[4] == 1


# --- predictors ----------------------------------------------------------------------------------

SETTINGS = config.Predictor(
    targets=["harm"],
    feature_set="with_evidence",
    search_trials=0,
    max_rounds=40,
    bootstrap_samples=20,
)


@pytest.fixture(scope="module")
def run() -> planted.Planted:
    return planted.planted_harm(prompts=60, seed=0, shift=0.0)


@pytest.fixture(scope="module")
def splits(run: planted.Planted) -> pl.DataFrame:
    return split_prompts(run.features["prompt_id"].unique(), Splits(), 0)


@pytest.fixture(scope="module")
def evidence(run: planted.Planted) -> pl.DataFrame:
    """Only the accepted tokens' log-likelihood ratios tell which request will be harmed."""
    rng = np.random.default_rng(1)
    harmed = run.labels["steps_to_harm"].is_not_null().to_numpy()
    tokens = run.features.select(schema.TOKEN_KEYS).with_columns(
        llr=pl.Series((rng.normal(size=len(harmed)) + 1.5 * harmed).astype(np.float32)),
        audit_gap=pl.lit(0.0, pl.Float32),
    )
    return suppose_checks(tokens, check_every_tokens=4, margin_nats=MARGIN, seed=0)


def _trainer(splits: pl.DataFrame, evidence: pl.DataFrame | None) -> Any:
    horizon = planted.HORIZON_TOKENS
    return make_trainer(splits, SETTINGS, horizon_tokens=horizon, seed=0, evidence=evidence)


def test_evidence_is_learned_where_it_tells_and_absent_where_nothing_was_checked(
    run: planted.Planted, splits: pl.DataFrame, evidence: pl.DataFrame
) -> None:
    models = train_predictors(run.features, run.labels, _trainer(splits, evidence))
    model = models.predictors["harm"]
    assert model.reads_evidence
    assert set(model.feature_names) == set(FEATURE_SETS["with_evidence"])
    assert parse_predictor(model.content(), "a test").digest == model.digest
    matrix = run.features.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32)
    unchecked = np.concatenate([matrix, no_evidence(len(matrix))], axis=1)
    offline = predict_tokens({"harm": model}, run.features, splits)["hazard"].to_numpy()
    assert np.array_equal(model.predict(unchecked, "snapkv"), offline)
    alarming, calm = unchecked[:200].copy(), unchecked[:200].copy()
    llr = [schema.COLUMN_NAMES.index(f"verified_llr_{name}") for name in ("last", "max", "mean")]
    alarming[:, llr], calm[:, llr] = 3.0, -1.0
    since = schema.COLUMN_NAMES.index("tokens_since_check")
    alarming[:, since] = calm[:, since] = 2.0
    assert model.predict(alarming).mean() > model.predict(calm).mean() + 0.1

    refused = train_predictors(run.features, run.labels, _trainer(splits, None))
    assert "no audited tokens were given" in refused.refusals["harm"]


def test_the_ablation_compares_evidence_on_the_tokens_that_have_it(
    run: planted.Planted, splits: pl.DataFrame, evidence: pl.DataFrame
) -> None:
    study = load_study(run.features, run.labels, _trainer(splits, evidence))
    rows = [row | {"value": value.value} for row, value in _evidence_rows(study, "harm")]
    without, with_it = (row for row in rows if row["metric"] == "request")
    assert (without["feature_set"], with_it["feature_set"]) == ("without_evidence", "with_evidence")
    assert without["tokens"] == with_it["tokens"] > 0
    assert "difference" not in without
    assert with_it["difference"] == pytest.approx(with_it["value"] - without["value"])
    assert with_it["difference"] > 0.2


def test_rows_keep_their_order_and_lose_what_a_check_would_have_cut() -> None:
    tokens = _tokens([9, 9], seed=3, rate=0.0)
    gap = tokens["audit_gap"].to_numpy().copy()
    gap[2] = 1.0  # the first trace's third token
    evidence = suppose_checks(
        tokens.with_columns(audit_gap=pl.Series(gap)), check_every_tokens=1, margin_nats=0, seed=0
    )
    keys = tokens.select(schema.TOKEN_KEYS)
    features = np.arange(18 * len(schema.FEATURE_NAMES), dtype=np.float32).reshape(18, -1)
    kept = rows_with_evidence(Rows(keys, features), evidence)
    assert kept.features.shape[1] == len(schema.COLUMN_NAMES)
    first = kept.keys.filter(pl.col("prompt_id") == "0" * 16)["position"].to_list()
    assert first == list(range(len(first)))
    assert len(first) in (3, 4)  # up to the first check behind the rejected token: 3, 4 or 4 tokens
    assert (kept.keys["prompt_id"] == f"{1:016x}").sum() == 9
    width = len(schema.FEATURE_NAMES)
    assert np.array_equal(kept.features[-9:, :width], features[-9:])


# --- the guard -----------------------------------------------------------------------------------


def test_a_guard_takes_in_its_own_checks(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a predictor with evidence is given is what the reports say of the checks."""
    names = ("entropy", *schema.EVIDENCE_NAMES)
    model = Predictor(
        kind="logistic",
        target="harm",
        horizon_tokens=8,
        feature_names=names,
        feature_version=schema.FEATURE_VERSION,
        model={
            "means": [0.0] * len(names),
            "scales": [1.0] * len(names),
            "coefficients": [0.0] * len(names),
            "intercept": 3.0,
        },
    )
    given: dict[int, np.ndarray] = {}
    original = HazardState.predict

    def note(self: HazardState, rows: Any, features: np.ndarray, counts: Any) -> np.ndarray:
        position = np.rint(features[0, :, schema.FEATURE_NAMES.index("relative_position")] * 20)
        for at, one in zip(position.astype(int), features[0], strict=True):
            given[int(at)] = one[len(schema.FEATURE_NAMES) :]
        return original(self, rows, features, counts)

    monkeypatch.setattr(HazardState, "predict", note)
    request = Request("0", ragged_requests(tiny_llama.config.vocab_size)[1].prompt_ids, 0)
    point = OperatingPoint(tau_low=0.4, tau_high=0.6, k=1, j=2)
    guard = KVGuard(
        kvpress.KnormPress(0.6), predictor=model, operating_point=point, check_every_tokens=4
    )
    guard.run(tiny_llama, [request], Decoding(20))
    report = guard.report[0]
    assert report.checks >= 2
    assert np.array_equal(given[0], no_evidence(1)[0], equal_nan=True)
    last = given[max(given)]
    seen = dict(zip(schema.EVIDENCE_NAMES, last.tolist(), strict=True))
    assert 0 < seen["rejections"] <= len(report.rewound_to)
    assert 0 <= seen["tokens_since_check"] <= 20
    assert seen["verified_llr_last"] <= seen["verified_llr_max"]
    assert seen["verified_llr_mean"] <= seen["verified_llr_max"]

"""The recurrent predictor: planted truth, streaming with refills and cuts, files, the guard."""

import json
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import planted
import polars as pl
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_engine import ragged_requests
from transformers import PreTrainedModel

from kvguard import config, schema
from kvguard.config import OperatingPoint, SequenceSettings, Splits
from kvguard.evaluate_predictor import evaluate_predictors
from kvguard.features import SEQUENCE_FEATURES, FeatureState
from kvguard.gru import Gru, RowStates, answer_lengths
from kvguard.guard import KVGuard
from kvguard.hazards import HazardState
from kvguard.predictor import (
    CalibrationMap,
    Predictor,
    PredictorError,
    PressPredictor,
    for_press,
    load_predictor,
    parse_predictor,
    save_predictor,
)
from kvguard.probe_scale import fit_probe_scale
from kvguard.requests import Request
from kvguard.sampling import Decoding
from kvguard.sequence_predictor import fit_gru, watched_prompts
from kvguard.splits import split_prompts
from kvguard.train import Models, load_models, predict_tokens, save_models, train_predictors
from kvguard.trainer import make_trainer

WIDTH = 3
QUICK = SequenceSettings(hidden=8, learning_rate=0.02, dropout=0.0, batch=32)
LIMIT = 40


def _answers(seed: int, count: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Harm is two tokens of high entropy in a row: no single token and no mean tells it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 16, size=count)
    harmed = rng.random(count) < 0.5
    rows = []
    for length, bad in zip(lengths, harmed, strict=True):
        entropy = rng.normal(scale=0.3, size=length)
        spots = np.array([2, 3]) if bad else np.array([1, 6])
        entropy[spots] += 2
        rows.append(np.column_stack([entropy, rng.normal(size=length), np.arange(length) / 16]))
    data = np.concatenate(rows).astype(np.float32)
    data[0, 1] = np.nan
    watched = watched_prompts([f"p{i // 2}" for i in range(count)], 0.25, seed)
    return data, lengths.astype(np.int64), harmed, watched


@pytest.fixture(scope="module")
def fitted() -> Gru:
    data, lengths, harmed, watched = _answers(0)
    return fit_gru(data, lengths, np.repeat(harmed, lengths), watched, seed=1, settings=QUICK)[0]


def test_it_learns_what_only_the_order_tells(fitted: Gru) -> None:
    data, lengths, harmed, _ = _answers(7)
    scores = fitted.predict(data, lengths)
    last = np.cumsum(lengths) - 1
    assert roc_auc_score(harmed, scores[last]) > 0.9
    mean = np.add.reduceat(data[:, 0], last - lengths + 1) / lengths
    assert abs(roc_auc_score(harmed, mean) - 0.5) < 0.15, "the mean entropy tells little"


def test_the_recurrence_is_torchs(fitted: Gru) -> None:
    gru = torch.nn.GRU(WIDTH, QUICK.hidden, batch_first=True)
    own = fitted.weights
    with torch.no_grad():
        for name, key in (
            ("weight_ih_l0", "input"),
            ("weight_hh_l0", "hidden"),
            ("bias_ih_l0", "input_bias"),
            ("bias_hh_l0", "hidden_bias"),
        ):
            getattr(gru, name).copy_(torch.from_numpy(own[key]))
        data, lengths, _, _ = _answers(9, count=1)
        values = np.nan_to_num((data - own["means"]) / own["scales"]).astype(np.float32)
        states = gru(torch.from_numpy(values)[None])[0][0].numpy()
    expected = states @ own["head"] + own["head_bias"]
    assert fitted.predict(data, lengths) == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_weights_and_leaves_torch_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    few = QUICK.model_copy(update={"max_epochs": 2})
    data, lengths, harmed, watched = _answers(1, 40)
    labels = np.repeat(harmed, lengths)
    one, two, other = (
        fit_gru(data, lengths, labels, watched, seed=seed, settings=few)[0] for seed in (3, 3, 4)
    )
    assert torch.equal(torch.rand(3), expected)
    for name in one.weights:
        assert np.array_equal(one.weights[name], two.weights[name]), name
    assert not np.array_equal(one.weights["input"], other.weights["input"])


def test_what_cannot_be_fitted_or_scored_is_named(fitted: Gru) -> None:
    data, lengths, _, watched = _answers(3, 10)
    with pytest.raises(ValueError, match=r"of .* tokens are positive and"):
        fit_gru(data, lengths, np.ones(len(data), np.bool_), watched)
    with pytest.raises(ValueError, match=r"one row a\s+token"):
        fitted.predict(data[:, :2], lengths)
    weights = dict(fitted.weights)
    for name, wrong, said in (
        ("head", np.zeros(7), "input has shape"),
        ("hidden", np.full_like(weights["hidden"], np.inf), "hidden holds values"),
        ("scales", np.zeros(WIDTH), "scales must be positive"),
    ):
        with pytest.raises(ValueError, match=said):
            Gru(weights | {name: wrong})
    weights.pop("head")
    with pytest.raises(ValueError, match=r"\['head'\] are missing"):
        Gru(weights)


# --- a batch in which rows end, move, are cut and refilled ---------------------------------------


class _Row:
    """What one row of the batch has had, for the comparison with whole answers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.probes = rng.random(len(schema.PROBE_NAMES)).astype(np.float32)
        self.signals = np.zeros((0, len(schema.SIGNALS)), np.float32)
        self.tokens = np.zeros(0, np.int64)
        self.judged = 0

    def grow(self, rng: np.random.Generator, count: int) -> None:
        more = rng.normal(size=(count, len(schema.SIGNALS))).astype(np.float32)
        more[rng.random(more.shape) < 0.05] = np.nan
        self.signals = np.concatenate([self.signals, more])
        self.tokens = np.concatenate([self.tokens, rng.integers(0, 5, count)])

    def cut(self, length: int) -> None:
        self.signals, self.tokens = self.signals[:length], self.tokens[:length]
        self.judged = length

    def whole(self, predictor: Predictor) -> np.ndarray:
        """Hazards of the whole answer, by the way that tables go."""
        state = FeatureState(1, LIMIT, 0.5, self.probes)
        count = len(self.tokens)
        features = state.advance(
            np.array([0]), self.signals[None], self.tokens[None], np.array([0])
        )[0]
        assert features.shape == (count, len(schema.FEATURE_NAMES))
        return predictor.predict(features, "snapkv")


def _random_predictor(seed: int) -> Predictor:
    rng = np.random.default_rng(seed)
    size, width = 5, len(SEQUENCE_FEATURES)
    unit = Gru(
        {
            "input": rng.normal(size=(3 * size, width)),
            "hidden": rng.normal(size=(3 * size, size)),
            "input_bias": rng.normal(size=3 * size),
            "hidden_bias": rng.normal(size=3 * size),
            "head": rng.normal(size=size),
            "head_bias": rng.normal(),
            "means": rng.normal(size=width),
            "scales": 0.5 + rng.random(width),
        }
    )
    probes = rng.random((30, len(schema.PROBE_NAMES))).astype(np.float32)
    return Predictor(
        kind="sequence",
        target="harm",
        horizon_tokens=32,
        feature_names=SEQUENCE_FEATURES,
        feature_version=schema.FEATURE_VERSION,
        model=unit.to_json(),
        calibration=CalibrationMap(method="platt", slope=0.7, intercept=-0.2),
        probe_scale=fit_probe_scale(probes, ["snapkv"] * len(probes)),
    )


PREDICTOR = _random_predictor(0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@examples(25)
def test_a_batch_with_refills_and_cuts_says_what_whole_answers_say(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    state = HazardState(for_press(PREDICTOR, "snapkv"), rows, LIMIT, 0.5)
    batch = [_Row(rng) for _ in range(rows)]
    for row, one in enumerate(batch):
        state.reset(row, 0.5, LIMIT, one.probes)
    for _ in range(25):
        event = rng.random()
        row = int(rng.integers(rows))
        if event < 0.1:  # another request takes the row
            batch[row] = _Row(rng)
            state.reset(row, 0.5, LIMIT, batch[row].probes)
        elif event < 0.2 and rows > 1:  # the request goes on in another row
            other = (row + 1) % rows
            state.move(row, other)
            batch[other] = batch[row]
            batch[row] = _Row(rng)
            state.reset(row, 0.5, LIMIT, batch[row].probes)
        elif event < 0.4:  # a check cuts; what it keeps may reach past what was judged
            unseen = int(rng.integers(3)) if event < 0.25 else 0
            batch[row].grow(rng, min(unseen, LIMIT - len(batch[row].tokens)))
            kept = int(rng.integers(len(batch[row].tokens) + 1))
            batch[row].cut(kept)
            state.replace(row, batch[row].signals, batch[row].tokens, ratio=0.25)
            state.replace(row, batch[row].signals, batch[row].tokens, ratio=0.5)
        else:  # some rows are judged, some tokens each
            counts = np.array(
                [min(int(rng.integers(4)), LIMIT - len(one.tokens)) for one in batch], np.int64
            )
            due = np.flatnonzero(counts)
            if not len(due):
                continue
            for index in due:
                batch[index].grow(rng, int(counts[index]))
            signals = np.zeros((rows, LIMIT, len(schema.SIGNALS)), np.float32)
            history = np.zeros((rows, LIMIT), np.int64)
            for index, one in enumerate(batch):
                signals[index, : len(one.tokens)] = one.signals
                history[index, : len(one.tokens)] = one.tokens
            seen = np.array([batch[index].judged for index in due], np.int64)
            features = state.features(due, seen, counts[due], signals, history)
            hazards = state.predict(due, features, counts[due])
            for place, index in enumerate(due):
                one = batch[index]
                expected = one.whole(PREDICTOR)[one.judged :]
                assert np.array_equal(hazards[place, : counts[index]], expected)
                assert np.isnan(hazards[place, counts[index] :]).all()
                one.judged = len(one.tokens)


@given(st.integers(0, 2**32 - 1))
@examples(30)
def test_a_cut_row_has_the_state_of_its_kept_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unit = PREDICTOR.gru
    assert unit is not None
    first, kept, second = int(rng.integers(1, 90)), 0, int(rng.integers(1, 9))
    kept = int(rng.integers(first + 1))
    drafted = rng.normal(size=(first, unit.width))
    after = rng.normal(size=(second, unit.width))
    states = RowStates(unit, 2)
    one = np.array([1])
    states.advance(one, drafted[None], np.array([first]))
    states.cut(1, kept)
    found = states.advance(one, after[None], np.array([second]))[0]
    answer = np.concatenate([drafted[:kept], after])
    whole = unit.predict(answer, np.array([kept + second]))
    assert np.array_equal(found, whole[kept:])


def test_answers_are_told_apart_by_their_positions_and_gaps_are_refused() -> None:
    def table(*positions: list[int]) -> np.ndarray:
        flat = np.concatenate([np.array(part) / LIMIT for part in positions])
        features = np.zeros((len(flat), len(schema.FEATURE_NAMES)), np.float32)
        features[:, schema.FEATURE_NAMES.index("relative_position")] = flat
        return features

    whole = table([0, 1, 2, 3], [0], [0, 1])
    assert answer_lengths(whole).tolist() == [4, 1, 2]
    assert answer_lengths(whole[:0]).tolist() == []
    with pytest.raises(ValueError, match=r"first row has relative_position 0\.025"):
        PREDICTOR.predict(whole[1:])
    with pytest.raises(ValueError, match="row 2 is not the token after row 1"):
        PREDICTOR.predict(table([0, 1, 3, 4]))


# --- the pipeline --------------------------------------------------------------------------------

SETTINGS = config.Predictor(
    kind="sequence",
    compare_kinds=True,
    targets=["harm"],
    search_trials=0,
    max_rounds=20,
    bootstrap_samples=20,
    sequence=SequenceSettings(max_epochs=4, learning_rate=0.02),
)


@pytest.fixture(scope="module")
def run() -> planted.Planted:
    return planted.planted_harm(prompts=80, seed=0, shift=1.0)


@pytest.fixture(scope="module")
def splits(run: planted.Planted) -> pl.DataFrame:
    return split_prompts(run.features["prompt_id"].unique(), Splits(), 0)


@pytest.fixture(scope="module")
def trained(run: planted.Planted, splits: pl.DataFrame) -> Models:
    trainer = make_trainer(splits, SETTINGS, horizon_tokens=planted.HORIZON_TOKENS, seed=0)
    return train_predictors(run.features, run.labels, trainer)


def test_the_configured_kind_is_the_default_and_the_other_stands_beside_it(
    run: planted.Planted, splits: pl.DataFrame, trained: Models, tmp_path: Path
) -> None:
    model = trained.predictors["harm"]
    assert (model.kind, model.horizon_tokens) == ("sequence", planted.HORIZON_TOKENS)
    assert model.calibration.method == "platt"
    assert model.provenance["probability_prompts"]
    assert set(model.feature_names) == set(SEQUENCE_FEATURES)
    table = trained.tables["training"].filter(status="trained")
    kinds = dict(table.select("predictor", "kind").rows())
    assert (kinds["hazard"], kinds["boosted"]) == ("sequence", "xgboost")
    stages = trained.tables["leakage_check"]
    assert stages["foreign_prompts"].sum() == 0
    assert "hazard harm" in stages.filter(stage="early_stopping")["purpose"].to_list()

    save_models(trained, tmp_path)
    loaded = load_models(tmp_path)
    assert loaded.predictors["harm"].digest == model.digest
    again = load_predictor(tmp_path / "hazard_predictor.json")
    offline = predict_tokens({"harm": model}, run.features, splits)
    assert offline.equals(predict_tokens({"harm": again}, run.features, splits))

    tables = evaluate_predictors(
        loaded, run.features, run.labels, splits, run.outcomes, SETTINGS, seed=0
    )
    pooled = tables["harm_metrics"].filter(
        pl.col("press").is_null() & pl.col("task").is_null(),
        metric="request_any_time",
        compared_with="mean_entropy",
    )
    scores = dict(pooled.select("predictor", "value").rows())
    assert {"hazard", "boosted", "clock_repetition", "mean_entropy"} <= set(scores)
    assert scores["hazard"] > 0.8, "one standard deviation of every token's entropy"
    assert scores["hazard"] > scores["clock_repetition"] + 0.2


def test_a_trained_sequence_says_the_same_token_by_token(
    run: planted.Planted, splits: pl.DataFrame, trained: Models
) -> None:
    model = trained.predictors["harm"]
    one = run.features.filter(pl.col("press") == "knorm")
    one = one.filter(pl.col("prompt_id") == one["prompt_id"][0])
    matrix = one.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32)
    offline = predict_tokens({"harm": model}, one, splits)["hazard"].to_numpy()
    bound = for_press(model, "KnormPress")
    assert isinstance(bound, PressPredictor)
    assert model.gru is not None
    states = RowStates(model.gru, 1)
    odds = [
        states.advance(np.array([0]), bound.inputs(row[None])[None], np.array([1]))[0, 0]
        for row in matrix
    ]
    assert np.array_equal(model.calibration.apply(np.array(odds)).astype(np.float32), offline)


def test_probabilities_of_a_sequence_are_calibrated_as_the_trees_are(
    run: planted.Planted, splits: pl.DataFrame, trained: Models
) -> None:
    """Mean hazard against the share of positives, on test tokens before the onset."""
    from kvguard.rows import load_rows

    rows = load_rows(run.features, run.labels, splits, "test")
    used = rows.take(rows.before_onset("harm") & rows.compressed())
    label = used.label("harm")
    for model in (trained.predictors["harm"], trained.baselines["boosted"]["harm"]):
        hazard = model.predict(used.features, used.press)
        assert hazard.mean() == pytest.approx(label.mean(), abs=0.08)


def test_files_come_back_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_predictor(PREDICTOR, path)
    again = load_predictor(path)
    assert again == PREDICTOR
    content: dict[str, Any] = json.loads(path.read_text())
    for change, said in (
        ({"feature_version": schema.FEATURE_VERSION + 1}, "computes feature version"),
        ({"feature_names": ["entropy"]}, r"weights for .* inputs, but 1"),
        ({"model": content["model"] | {"head": [1.0]}}, "input has shape"),
        ({"model": {}}, "are missing"),
    ):
        with pytest.raises(PredictorError, match=said):
            parse_predictor(content | change, "a test")


# --- the guard -----------------------------------------------------------------------------------


@pytest.fixture
def hazards_seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every hazard that a `HazardState` gives."""
    seen: list[np.ndarray] = []
    original = HazardState.predict

    def note(self: HazardState, *arguments: Any) -> np.ndarray:
        found = original(self, *arguments)
        seen.append(found)
        return found

    monkeypatch.setattr(HazardState, "predict", note)
    return seen


@pytest.mark.parametrize("every", [1, 4])
def test_a_guard_reads_the_hazards_that_the_tables_hold(
    tiny_llama: PreTrainedModel, hazards_seen: list[np.ndarray], tmp_path: Path, every: int
) -> None:
    """One request with checks that cut: what is kept has the hazards of the finished answer."""
    request = Request("0", ragged_requests(tiny_llama.config.vocab_size)[0].prompt_ids, 0)
    tokens = 24
    path = tmp_path / "hazard_predictor.json"
    save_predictor(PREDICTOR, path)
    middle = OperatingPoint(tau_low=0.3, tau_high=0.5, k=1, j=2)
    guard = KVGuard(
        kvpress.SnapKVPress(0.5, window_size=4),
        predictor=path,
        operating_point=middle,
        check_every_tokens=every,
    )
    guard.save(tmp_path / "guard")
    guard = KVGuard.load(tmp_path / "guard")
    assert guard.predictor == PREDICTOR
    done = guard.run(tiny_llama, [request], Decoding(tokens))[0]
    assert guard.report[0].rewound_to, "a check took place"
    state = FeatureState(1, tokens, 0.5, done.probes)
    ids = np.array(done.token_ids)
    features = state.advance(np.array([0]), done.signals[None], ids[None], np.array([0]))[0]
    expected = PREDICTOR.predict(features, "SnapKVPress")
    last = hazards_seen[-1][0]
    assert np.array_equal(last, expected[len(expected) - len(last) :])

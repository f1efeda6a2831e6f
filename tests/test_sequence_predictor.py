"""The recurrent predictor: planted truth, streaming, files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.metrics import roc_auc_score

from kvguard import schema
from kvguard.predictor import PredictorError
from kvguard.sequence_predictor import (
    SequencePredictor,
    SequenceSettings,
    fit_sequence_predictor,
    load_sequence_predictor,
    save_sequence_predictor,
)

NAMES = ("entropy", "chosen_logprob", "relative_position")
QUICK = SequenceSettings(hidden=8, learning_rate=0.02, dropout=0.0, batch=32)


def _answers(seed: int, count: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
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
    return data, lengths.astype(np.int64), harmed, [f"p{i // 2}" for i in range(count)]


@pytest.fixture(scope="module")
def fitted() -> SequencePredictor:
    return fit_sequence_predictor(*_answers(0), NAMES, seed=1, settings=QUICK)


def test_it_learns_what_only_the_order_tells(fitted: SequencePredictor) -> None:
    data, lengths, harmed, _ = _answers(7)
    scores = fitted.predict(data, lengths)
    last = np.cumsum(lengths) - 1
    assert roc_auc_score(harmed, scores[last]) > 0.9
    mean = np.add.reduceat(data[:, 0], last - lengths + 1) / lengths
    assert abs(roc_auc_score(harmed, mean) - 0.5) < 0.15, "the mean entropy tells little"


def test_token_by_token_it_says_the_same(fitted: SequencePredictor) -> None:
    data, lengths, _, _ = _answers(8, count=6)
    whole = fitted.predict(data, lengths)
    at = 0
    for length in lengths:
        state = fitted.start(1)
        for position in range(length):
            state, odds = fitted.advance(state, data[at + position][None])
            assert odds[0] == whole[at + position]
        at += length


def test_the_recurrence_is_torchs(fitted: SequencePredictor) -> None:
    gru = torch.nn.GRU(len(NAMES), QUICK.hidden, batch_first=True)
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
        values = np.nan_to_num((data - own["means"]) / own["scales"])
        states = gru(torch.from_numpy(values).float()[None])[0][0].numpy()
    expected = states @ own["head"] + own["head_bias"]
    assert fitted.predict(data, lengths) == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_weights_and_leaves_torch_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = QUICK.model_copy(update={"max_epochs": 2})
    one, two = (
        fit_sequence_predictor(*_answers(1, 40), NAMES, seed=3, settings=settings) for _ in range(2)
    )
    assert torch.equal(torch.rand(3), expected)
    for name in one.weights:
        assert np.array_equal(one.weights[name], two.weights[name]), name
    other = fit_sequence_predictor(*_answers(1, 40), NAMES, seed=4, settings=settings)
    assert not np.array_equal(one.weights["input"], other.weights["input"])


def test_files_come_back_and_are_checked(fitted: SequencePredictor, tmp_path: Path) -> None:
    path = tmp_path / "gru.safetensors"
    with pytest.raises(FileNotFoundError, match=r"gru\.safetensors"):
        load_sequence_predictor(path)
    save_sequence_predictor(fitted, path)
    again = load_sequence_predictor(path)
    data, lengths, _, _ = _answers(2, 10)
    assert np.array_equal(again.predict(data, lengths), fitted.predict(data, lengths))
    assert again.provenance == fitted.provenance

    beside = path.with_suffix(".json")
    content = json.loads(beside.read_text())
    beside.write_text(json.dumps(content | {"feature_version": schema.FEATURE_VERSION + 1}))
    with pytest.raises(PredictorError, match=f"computes feature version {schema.FEATURE_VERSION}"):
        load_sequence_predictor(path)
    beside.write_text(json.dumps(content | {"feature_names": ["entropy"]}))
    with pytest.raises(PredictorError, match="input has shape"):
        load_sequence_predictor(path)
    beside.write_text(json.dumps(content))
    weights = dict(load_file(path))
    weights.pop("head")
    save_file(weights, path)
    with pytest.raises(PredictorError, match=r"lacks the weights \['head'\]"):
        load_sequence_predictor(path)


def test_what_cannot_be_fitted_or_scored_is_named(fitted: SequencePredictor) -> None:
    data, lengths, harmed, prompts = _answers(3, 10)
    with pytest.raises(ValueError, match="10 of 10 answers"):
        fit_sequence_predictor(data, lengths, np.ones_like(harmed), prompts, NAMES)
    with pytest.raises(ValueError, match=r"one row a\s+token"):
        fitted.predict(data[:, :2], lengths)

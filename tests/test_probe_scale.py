"""Probes on their press's own scale: ranks, and the same numbers offline and live."""

import json
import logging

import numpy as np
import planted
import polars as pl
import pytest
from pydantic import ValidationError

from kvguard import config, probe_scale, schema
from kvguard.features import FeatureState
from kvguard.predictor import for_press, load_predictor, parse_predictor, save_predictor
from kvguard.probe_scale import MAX_VALUES, PROBE_COLUMNS, ProbeScale, fit_probe_scale
from kvguard.rival_settings import gate_scores
from kvguard.rows import load_rows
from kvguard.splits import split_prompts
from kvguard.train import predict_tokens
from kvguard.trainer import Trainer, make_trainer

WIDTH = len(schema.PROBE_NAMES)


def _probes(rng: np.random.Generator, count: int, level: float) -> np.ndarray:
    return (level * (1 + rng.random((count, WIDTH)))).astype(np.float32)


def test_a_rank_is_the_share_of_reference_values_below() -> None:
    rng = np.random.default_rng(0)
    probes = np.concatenate([_probes(rng, 40, 1), _probes(rng, 60, 1000)])
    probes[:, 3] = np.round(probes[:, 3])  # ties
    presses = np.array(["snapkv"] * 40 + ["streaming_llm"] * 60)
    scale = fit_probe_scale(probes, presses)
    fresh = np.concatenate([probes[:5], probes[50:55]])
    names = np.array(["snapkv"] * 5 + ["streaming_llm"] * 5)
    ranked = scale.ranks(fresh, names)
    for row, name in enumerate(names):
        own = probes[presses == name]
        for column in range(WIDTH):
            below = (own[:, column] < fresh[row, column]).mean()
            ties = (own[:, column] == fresh[row, column]).mean()
            assert ranked[row, column] == pytest.approx(below + ties / 2)
    # two presses whose raw values never overlap fill the same range
    both = scale.ranks(probes, presses)
    assert both[:40].mean() == pytest.approx(0.5)
    assert both[40:].mean() == pytest.approx(0.5)
    assert np.array_equal(scale.ranks(fresh[5:], "StreamingLLMPress"), ranked[5:])


def test_unknown_presses_and_probes_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(1)
    probes = _probes(rng, 20, 1)
    probes[:, 0] = np.nan
    scale = fit_probe_scale(probes, ["knorm"] * 20)
    assert np.isnan(scale.ranks(probes, "knorm")[:, 0]).all()
    assert not np.isnan(scale.ranks(probes, "knorm")[:, 1:]).any()
    with caplog.at_level(logging.WARNING, probe_scale.__name__):
        for _ in range(2):
            assert np.isnan(scale.ranks(probes, "press_of_a_test")).all()
        assert np.isnan(scale.ranks(probes, config.BASELINE)).all()
    assert len(caplog.records) == 1
    assert "press_of_a_test" in caplog.text
    assert "knorm" in caplog.text


def test_many_requests_leave_quantiles() -> None:
    values = np.random.default_rng(2).permutation(10 * MAX_VALUES).astype(np.float32)
    scale = fit_probe_scale(np.repeat(values[:, None], WIDTH, 1), ["a"] * len(values))
    own = scale.ranks(np.repeat(values[:, None], WIDTH, 1), "a")[:, 0]
    assert np.abs(own - (values + 0.5) / len(values)).max() <= 1 / MAX_VALUES


def test_a_scale_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="must ascend"):
        ProbeScale(presses={"a": {"evicted_mass_mean": [2.0, 1.0]}})
    with pytest.raises(ValidationError, match="unknown probe 'mass'"):
        ProbeScale(presses={"a": {"mass": [1.0]}})


def _planted(seed: int) -> tuple[planted.Planted, pl.DataFrame]:
    """Harm that a probe tells, at another level under each press."""
    run = planted.planted_harm(60, seed=seed, shift=0.0)
    harmed = run.labels.group_by(schema.TRACE_KEYS).agg(
        harmed=pl.col("steps_to_harm").is_not_null().first()
    )
    rng = np.random.default_rng(seed)
    harmed = harmed.sort(schema.TRACE_KEYS).with_columns(
        mass=pl.Series(rng.normal(size=len(harmed))) + 1.5 * pl.col("harmed")
    )
    level = pl.when(pl.col("press") == "knorm").then(1000.0).otherwise(0.0)
    features = (
        run.features.join(harmed, on=schema.TRACE_KEYS, how="left", maintain_order="left")
        .with_columns(evicted_mass_mean=(pl.col("mass") + level).cast(pl.Float32))
        .with_columns(  # a probe belongs to the request
            pl.col(name).first().over(schema.TRACE_KEYS) for name in schema.PROBE_NAMES
        )
        .select(list(schema.FEATURES))
    )
    splits = split_prompts(run.features["prompt_id"].unique(), config.Splits(), 0)
    return run._replace(features=features), splits


@pytest.fixture(scope="module")
def study() -> tuple[planted.Planted, pl.DataFrame, Trainer]:
    run, splits = _planted(3)
    settings = config.Predictor(
        targets=["harm"], search_trials=0, max_rounds=20, feature_set="normalised"
    )
    return run, splits, make_trainer(splits, settings, horizon_tokens=8, seed=0)


def test_offline_and_live_give_the_same_bits(
    study: tuple[planted.Planted, pl.DataFrame, Trainer], tmp_path: object
) -> None:
    run, splits, trainer = study
    train = load_rows(run.features, run.labels, splits, "train")
    names = trainer.settings.feature_set
    assert names == "normalised"
    fitted = trainer.fit(train, "harm", schema.FEATURE_NAMES, "a test")
    assert fitted.probe_scale is not None
    assert set(fitted.probe_scale.presses) == {"snapkv", "knorm"}
    path = tmp_path / "hazard.json"  # type: ignore[operator]
    save_predictor(fitted, path)
    loaded = load_predictor(path)
    assert loaded.digest == fitted.digest
    offline = predict_tokens({"harm": fitted}, run.features, splits)
    keyed = run.features.join(offline, on=schema.TOKEN_KEYS, how="inner", maintain_order="left")
    for (press,), part in keyed.group_by("press", maintain_order=True):
        bound = for_press(loaded, str(press))
        matrix = part.select(schema.FEATURE_NAMES).to_numpy().astype(np.float32)
        one_by_one = np.concatenate([bound.predict(row[None]) for row in matrix[:40]])
        assert np.array_equal(one_by_one, part["hazard"].to_numpy()[:40]), press
    # what the live feature state hands on are the raw probes: the scale is applied behind it
    probes = train.features[:1, PROBE_COLUMNS]
    state = FeatureState(1, 8, 0.5, probes)
    signals = np.zeros((1, 1, len(schema.SIGNALS)), np.float32)
    row = state.advance(np.array([0]), signals, np.array([[7]]), np.array([0]))[0]
    assert np.array_equal(row[:, PROBE_COLUMNS], probes)
    assert loaded.predict(row, "knorm") != loaded.predict(row, "nothing known")


def test_ranks_let_one_gate_serve_presses_of_other_levels(
    study: tuple[planted.Planted, pl.DataFrame, Trainer],
) -> None:
    run, splits, trainer = study
    train = load_rows(run.features, run.labels, splits, "train")
    gate = trainer.fit_baseline(train, "harm", "gate", ())
    assert gate.probe_scale is not None
    test = load_rows(run.features, run.labels, splits, ["test", "calibration"][0])
    first = test.take((test.keys["position"] == 0).to_numpy() & test.compressed())
    probes = first.features[:, PROBE_COLUMNS]
    scores = gate_scores(gate, probes, first.press)
    harmed = first.keys["steps_to_harm"].is_not_null().to_numpy()
    for press in ("snapkv", "knorm"):
        inside = first.press == press
        assert scores[inside & harmed].mean() > scores[inside & ~harmed].mean() + 0.1, press
    one = gate_scores(gate, probes[:1], first.press[0])
    assert one[0] == scores[0]


def test_predictors_without_a_scale_keep_their_file_and_digest() -> None:
    run, splits = _planted(4)
    settings = config.Predictor(targets=["harm"], search_trials=0, max_rounds=5)
    trainer = make_trainer(splits, settings, horizon_tokens=8, seed=0)
    train = load_rows(run.features, run.labels, splits, "train")
    fitted = trainer.fit(train, "harm", schema.FEATURE_NAMES, "a test")
    content = fitted.content()
    assert "probe_scale" not in content
    assert config.digest(content) == fitted.digest
    again = parse_predictor(json.loads(json.dumps(content)), "a test")
    assert again.digest == fitted.digest
    assert for_press(again, "knorm") is again

"""Matrices on disk and in blocks: the same numbers as in memory and at once."""

from pathlib import Path

import numpy as np
import planted
import polars as pl
import pytest
import xgboost

from kvguard import config, row_batches, schema
from kvguard.probe_scale import PROBE_COLUMNS, fit_probe_scale
from kvguard.row_batches import new_matrix, quantile_matrix, read_matrix, taken
from kvguard.rows import load_rows
from kvguard.splits import split_prompts
from kvguard.trainer import make_trainer

SETTINGS = config.Predictor(targets=["looping"], search_trials=0, max_rounds=20)


@pytest.fixture(scope="module")
def run() -> planted.Planted:
    return planted.planted_hazard(prompts=80, seed=0)


@pytest.fixture(scope="module")
def splits(run: planted.Planted) -> pl.DataFrame:
    return split_prompts(run.features["prompt_id"].unique(), config.Splits(), 0)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as large."""
    monkeypatch.setattr(row_batches, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(row_batches, "BLOCK_ROWS", 500)


def test_a_large_matrix_lies_in_a_file_without_a_name(
    tight: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    matrix = new_matrix(1000, 3)
    matrix[:] = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    assert isinstance(matrix, np.memmap)
    assert matrix.sum() == pytest.approx(2999 * 3000 / 2)
    assert not any(tmp_path.iterdir())
    assert not isinstance(new_matrix(5, 3), np.memmap)


@pytest.mark.usefixtures("tight")
def test_rows_are_taken_in_order() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3000, 4)).astype(np.float32)
    mask = rng.random(3000) < 0.4
    np.testing.assert_array_equal(taken(matrix, mask), matrix[mask])
    assert taken(matrix, np.zeros(3000, np.bool_)).shape == (0, 4)


@pytest.mark.usefixtures("tight")
def test_a_file_is_read_to_the_rows_that_are_wanted(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(2000, 3)).astype(np.float32)
    frame = pl.DataFrame(table, schema=["a", "b", "c"]).with_columns(
        c=pl.when(pl.int_range(pl.len()) % 7 > 0).then("c")
    )
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=300)
    wanted = rng.permutation(2000)[:900]
    places = np.full(2000, -1, np.int64)
    places[wanted] = np.arange(900)
    expected = frame[wanted].select("c", "a").to_numpy()
    np.testing.assert_array_equal(read_matrix(tmp_path / "t.parquet", ["c", "a"], places), expected)


@pytest.mark.usefixtures("tight")
def test_rows_of_a_file_are_those_of_the_table(
    run: planted.Planted, splits: pl.DataFrame, tmp_path: Path
) -> None:
    run.features.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "f.parquet")
    run.labels.write_parquet(tmp_path / "l.parquet")
    whole = load_rows(run.features, run.labels, splits, "train")
    blocks = load_rows(tmp_path / "f.parquet", tmp_path / "l.parquet", splits, "train")
    assert isinstance(blocks.features, np.memmap)
    np.testing.assert_array_equal(blocks.features, whole.features)
    assert blocks.keys.equals(whole.keys)


@pytest.mark.usefixtures("tight")
def test_probes_are_scaled_in_blocks_as_at_once(
    run: planted.Planted, splits: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_rows(run.features, run.labels, splits, "train")
    features = rows.features.copy()
    features[:, PROBE_COLUMNS] = np.random.default_rng(2).normal(
        size=(len(features), len(schema.PROBE_NAMES))
    )
    rows = rows._replace(features=features)
    scale = fit_probe_scale(features[::7, PROBE_COLUMNS], rows.press[::7])
    whole = scale.scale(features, rows.press)
    monkeypatch.setattr("kvguard.rows.BLOCK_ROWS", 700)
    scaled = rows.scaled(scale)
    assert isinstance(scaled.features, np.memmap)
    np.testing.assert_array_equal(scaled.features, whole)
    np.testing.assert_array_equal(rows.features, features)


@pytest.mark.parametrize("formulation", ["windowed", "discrete_time"])
def test_a_predictor_fitted_in_blocks_says_the_same(
    formulation: str,
    run: planted.Planted,
    splits: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bins of blocks may lie a little differently: hazards agree closely, not bit for bit."""
    rows = load_rows(run.features, run.labels, splits, "train")
    test = load_rows(run.features, run.labels, splits, "test")
    names = list(schema.FEATURE_NAMES[:12])
    fitted = []
    for block_rows in (1 << 19, 700):
        monkeypatch.setattr(row_batches, "BLOCK_ROWS", block_rows)
        trainer = make_trainer(splits, SETTINGS, horizon_tokens=planted.HORIZON_TOKENS, seed=0)
        predictor = trainer.fit(
            rows,
            "looping",
            names,
            "test",
            formulation=formulation,  # type: ignore[arg-type]
        )
        fitted.append(predictor.log_odds(test.features))
    assert np.corrcoef(*fitted)[0, 1] > 0.98


def test_blocks_bin_few_values_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a feature has fewer values than there are bins no sketch is needed: equal trees."""
    rng = np.random.default_rng(2)
    data = rng.integers(0, 50, (4000, 3)).astype(np.float32)
    labels = data[:, 0] + rng.normal(size=4000) > 25
    weights = np.ones(4000)
    ends = np.arange(1, 4001)
    trees = []
    for block_rows in (1 << 19, 300):
        monkeypatch.setattr(row_batches, "BLOCK_ROWS", block_rows)
        matrix = quantile_matrix(lambda a, b: data[a:b], ends, labels, weights, None)
        booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, matrix, 5)
        trees.append(booster.get_dump())
    assert trees[0] == trees[1]

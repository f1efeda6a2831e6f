import numpy as np
import polars as pl
import pytest
from synthetic import make_run

from kvguard import schema
from kvguard.files import digest_path

FRAME = pl.DataFrame(
    {
        "prompt_id": ["a", "b"],
        "split": ["train", "test"],
        "task": ["sums", "sums"],
        "template": ["x", None],
    }
).select(list(schema.SPLITS))


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "folder" / "splits.parquet"
    schema.write_table(FRAME.select(reversed(FRAME.columns)), path, schema.SPLITS)
    assert schema.read_table(path, schema.SPLITS).equals(FRAME)  # in the schema's order
    assert set(path.parent.iterdir()) == {path, digest_path(path)}


def test_a_wrong_table_is_refused_with_every_problem_and_not_written(tmp_path):
    wrong = pl.DataFrame({"prompt_id": [1], "spilt": ["train"]})
    path = tmp_path / "splits.parquet"
    with pytest.raises(schema.SchemaError) as error:
        schema.write_table(wrong, path, schema.SPLITS)
    message = str(error.value)
    assert "table 'splits'" in message
    assert "'split' is missing" in message
    assert "'spilt' is not expected" in message
    assert "'prompt_id' has type Int64, expected String" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_schema_is_refused_on_reading(tmp_path):
    FRAME.drop("split").write_parquet(tmp_path / "splits.parquet")
    with pytest.raises(schema.SchemaError, match="'split' is missing"):
        schema.read_table(tmp_path / "splits.parquet", schema.SPLITS)


def test_a_missing_table_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"snakemake .*splits\.parquet"):
        schema.read_table(tmp_path / "splits.parquet")


def test_a_folder_that_looks_like_a_key_adds_no_column(tmp_path):
    path = tmp_path / "ratio=0.500" / "splits.parquet"
    schema.write_table(FRAME, path, schema.SPLITS)
    assert schema.read_table(path).columns == FRAME.columns


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def fail_half_way():
        with schema.atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with schema.atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert set(tmp_path.iterdir()) == {path, digest_path(path)}


def test_conform_casts_drops_and_orders_but_invents_nothing():
    frame = pl.DataFrame({"b": [1], "extra": [2], "a": [3]})
    result = schema.conform(frame, {"a": pl.Float32(), "b": pl.Int8(), "c": pl.String()})
    assert result.schema == pl.Schema({"a": pl.Float32(), "b": pl.Int8()})


@pytest.mark.parametrize("table", ["prompts", "traces", "tokens", "outcomes"])
def test_synthetic_runs_keep_to_the_schemas(table):
    run = make_run(6)
    schema.check(getattr(run, table), getattr(schema, table.upper()), table)


def test_there_are_28_signals_44_features_of_tokens_and_the_probes():
    assert len(schema.SIGNALS) == 28
    assert len(schema.BASE_SIGNALS) == 29
    assert (
        len(set(schema.FEATURE_NAMES)) == len(schema.FEATURE_NAMES) == 44 + len(schema.PROBE_NAMES)
    )


def test_offsets_say_where_each_trace_starts():
    keys = {"model": "m", "press": "p", "ratio": "0.500"}
    rows = [("b", 0), ("b", 1), ("a", 0), ("c", 0), ("c", 1), ("c", 2)]
    tokens = pl.DataFrame(
        [keys | {"prompt_id": prompt, "position": position} for prompt, position in rows]
    )
    ordered, offsets = schema.order_by_trace(tokens)
    assert ordered.equals(tokens)  # already in order: left alone
    assert offsets.tolist() == [0, 2, 3, 6]
    shuffled, offsets = schema.order_by_trace(tokens[[3, 1, 5, 2, 0, 4]])
    assert shuffled["prompt_id"].to_list() == ["a", "b", "b", "c", "c", "c"]
    assert shuffled["position"].to_list() == [0, 0, 1, 0, 1, 2]
    assert offsets.tolist() == [0, 1, 3, 6]
    empty, offsets = schema.order_by_trace(tokens.clear())
    assert (empty.height, offsets.tolist()) == (0, [0])


@pytest.mark.parametrize("positions", [[1, 2], [0, 2], [0, 0], [0, 1, 1]])
def test_a_gap_or_a_double_in_a_trace_is_named(positions):
    tokens = pl.DataFrame({"position": positions}).with_columns(
        pl.lit(value).alias(name)
        for name, value in {"model": "m", "press": "p", "ratio": "0.5", "prompt_id": "abc"}.items()
    )
    with pytest.raises(ValueError, match="abc"):
        schema.order_by_trace(tokens)


def test_ten_thousand_traces_keep_their_rows_together():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 10_000)
    tokens = pl.DataFrame(
        {
            "model": "m",
            "press": "p",
            "ratio": "0.500",
            "prompt_id": np.repeat([f"{i:05d}" for i in range(len(lengths))], lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
        }
    )
    _, offsets = schema.order_by_trace(tokens.sample(fraction=1, shuffle=True, seed=0))
    assert np.array_equal(np.diff(offsets), lengths)


def test_a_column_of_later_versions_is_null_in_older_files(tmp_path):
    old = pl.DataFrame(schema=schema.RUNS).drop("start_ratio")
    schema.write_table(old, tmp_path / "runs.parquet")
    read = schema.read_table(tmp_path / "runs.parquet", schema.RUNS)
    assert read.columns == list(schema.RUNS)
    with pytest.raises(schema.SchemaError, match="'alarmed' is missing"):
        schema.check(old.drop("alarmed"), schema.RUNS, "runs")

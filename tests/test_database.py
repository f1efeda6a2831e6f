import duckdb
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from statsmodels.stats.proportion import proportion_confint
from synthetic import RunFiles, SyntheticRun, make_run, write_run

from kvguard import schema
from kvguard.database import (
    FAILURE_KINDS,
    METRICS,
    VIEWS,
    analyze,
    build_database,
    condition_summary,
    read_view,
)


def build(files: RunFiles, name: str = "kvguard.duckdb"):
    target = files.results / name
    build_database(target, files.prompts, files.traces, files.tokens, files.outcomes)
    return target


@pytest.fixture(scope="module")
def run() -> SyntheticRun:
    return make_run(24, seed=11, error_rate=0.1)


@pytest.fixture(scope="module")
def files(run, tmp_path_factory) -> RunFiles:
    return write_run(run, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def database(files):
    return build(files)


def same_rows(left: pl.DataFrame, right: pl.DataFrame) -> None:
    keys = [key for key in schema.TOKEN_KEYS if key in left.columns]
    assert_frame_equal(left.sort(keys), right.sort(keys))


def test_tables_hold_every_row_and_type(database, run):
    for name in ("traces", "tokens", "outcomes"):
        same_rows(read_view(database, name), getattr(run, name))
    assert_frame_equal(read_view(database, "prompts"), run.prompts, check_row_order=False)


def test_the_file_stands_alone_and_any_client_reads_it(database, tmp_path):
    copy = tmp_path / "elsewhere.duckdb"
    copy.write_bytes(database.read_bytes())
    with duckdb.connect(copy, read_only=True) as connection:
        for view in VIEWS:
            assert connection.table(view).columns


def test_shares_and_wilson_intervals_of_each_condition(database, run):
    summary = condition_summary(database)
    assert summary["press"].to_list() == ["none", "snapkv", "snapkv"]  # the baseline first
    for row in summary.iter_rows(named=True):
        of_condition = (pl.col("press") == row["press"]) & (pl.col("ratio") == row["ratio"])
        outcomes = run.outcomes.filter(of_condition)
        traces = run.traces.filter(of_condition)
        ok = traces.filter(pl.col("status") == "ok")
        assert (row["requests"], row["errors"]) == (ok.height, traces.height - ok.height)
        assert row["mean_generated_tokens"] == pytest.approx(ok["generated_tokens"].mean())
        for metric, source in METRICS.items():
            values = outcomes[source.removeprefix("NOT ").strip('"')].drop_nulls()
            values = ~values if source.startswith("NOT ") else values
            count = int(values.sum())
            low, high = proportion_confint(count, len(values), method="wilson")
            assert row[metric] == pytest.approx(count / len(values))
            assert row[f"{metric}_low"] == pytest.approx(low, abs=1e-12)
            assert row[f"{metric}_high"] == pytest.approx(high, abs=1e-12)
    assert summary["errors"].sum() > 0


def test_kinds_of_failure_are_the_same_shares_one_kind_a_row(database, run):
    kinds = read_view(database, "failure_kinds")
    assert kinds.height == 3 * len(FAILURE_KINDS)
    row = kinds.filter((pl.col("kind") == "wrong_answer") & (pl.col("ratio") == "0.750"))
    outcomes = run.outcomes.filter(pl.col("ratio") == "0.750").drop_nulls("right")
    assert row["failed"].item() == (~outcomes["right"]).sum()
    assert row["requests"].item() == outcomes.height
    summary = condition_summary(database)
    loops = kinds.filter(pl.col("kind") == "looping")
    assert loops["share"].to_list() == summary["looping"].to_list()


def test_harm_and_rescues_are_counted_apart(database, run):
    harm = read_view(database, "harm")
    assert harm["press"].to_list() == ["snapkv", "snapkv"]
    for row in harm.iter_rows(named=True):
        known = run.outcomes.filter(ratio=row["ratio"]).drop_nulls("harmed")
        assert row["requests"] == len(known)
        assert row["baseline_right"] == known["baseline_right"].sum()
        for name in ("harmed", "rescued", "silent_harm"):
            assert row[name] == pytest.approx(known[name].mean())
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        difference = (row["harmed_requests"] - row["rescued_requests"]) / row["requests"]
        assert row["excess_error"] == pytest.approx(difference)


def test_excess_is_paired_with_the_same_prompt_uncompressed(database, run):
    excess = read_view(database, "excess")
    assert excess["press"].to_list() == ["snapkv", "snapkv"]
    rows = {(row["ratio"], row["prompt_id"]): row for row in run.outcomes.to_dicts()}
    for row in excess.iter_rows(named=True):
        counts = {"cfr": [0, 0, 0, 0], "error": [0, 0, 0, 0]}
        pairs = 0
        for (ratio, prompt_id), outcome in rows.items():
            other = rows["0.000", prompt_id]
            if ratio != row["ratio"] or None in (outcome["right"], other["right"]):
                continue
            pairs += 1
            for name, failed, unfailed in (
                ("cfr", outcome["catastrophe"], other["catastrophe"]),
                ("error", not outcome["right"], not other["right"]),
            ):
                counts[name][2 * (not failed) + (not unfailed)] += 1
        assert row["prompts"] == pairs < 24
        for name, (both, compressed, uncompressed, neither) in counts.items():
            assert both + compressed + uncompressed + neither == pairs
            assert row[f"{name}_both"] == both
            assert row[f"{name}_only_compressed"] == compressed
            assert row[f"{name}_only_uncompressed"] == uncompressed
            assert row[f"{name}_neither"] == neither
            assert row[f"excess_{name}"] == pytest.approx((compressed - uncompressed) / pairs)
            assert row[f"excess_{name}_low"] <= row[f"excess_{name}"] <= row[f"excess_{name}_high"]


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe (1998), method 10
        ((1, 1, 7, 12), -0.507, -0.026),  # airway responsiveness, Bentur et al. (2009)
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. (2000), Statistics with Confidence
    ],
)
def test_the_paired_interval_gives_published_examples(database, counts, low, high):
    with duckdb.connect(database, read_only=True) as connection:
        query = f"SELECT paired_low{counts}, paired_high{counts}"
        found = connection.execute(query).fetchone()
    assert found == pytest.approx((low, high), abs=6e-4)


def test_compression_is_what_left_the_cache(database):
    check = read_view(database, "compression_check")
    assert check["nominal_share"].to_list() == [0.0, 0.5, 0.75]
    assert check["removed_share"].to_list() == pytest.approx([0.0, 0.5, 0.75], abs=1e-3)
    assert check["cache_bytes_before"].dtype == pl.Int64


def test_errors_are_listed_and_counted_apart(database, run):
    errors = read_view(database, "errors")
    expected = run.traces.filter(pl.col("status") == "error")
    assert sorted(errors["prompt_id"]) == sorted(expected["prompt_id"])
    assert all("too short" in error for error in errors["error"])


def test_onsets_are_quartiles_by_kind(database, run):
    onsets = read_view(database, "onsets")
    for row in onsets.iter_rows(named=True):
        column = "first_rejected" if row["kind"] == "rejected_token" else f"{row['kind']}_onset"
        own = (pl.col("press") == row["press"]) & (pl.col("ratio") == row["ratio"])
        values = run.outcomes.filter(own)[column].drop_nulls()
        assert row["failed"] == len(values)
        assert row["onset_median"] == pytest.approx(values.median())
        assert row["onset_quarter"] == pytest.approx(values.quantile(0.25, "linear"))


def test_analyze_has_a_row_for_each_condition_and_no_excess_for_the_baseline(database):
    table = analyze(database)
    assert table["ratio"].to_list() == ["0.000", "0.500", "0.750"]
    assert table["excess_cfr"].to_list()[0] is None
    undefined = table[1:].null_count().row(0, named=True)
    assert set(undefined.values()) == {0}


def test_a_run_of_errors_alone_has_undefined_shares(tmp_path):
    run = make_run(2, conditions=[("snapkv", "0.500")], error_rate=1.0)
    errors = run.traces.with_columns(
        status=pl.lit("error"), stop_reason=None, text=None, generated_tokens=None
    )
    nothing = run.outcomes.with_columns(
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in schema.OUTCOMES.items()
        if name not in schema.TRACE_KEYS
    )
    broken = SyntheticRun(
        run.prompts, schema.conform(errors, schema.TRACES), run.tokens.clear(), nothing
    )
    database = build(write_run(broken, tmp_path))
    summary = condition_summary(database)
    assert (summary["requests"].item(), summary["errors"].item()) == (0, 2)
    assert summary.select("cfr", "cfr_low", "accuracy", "accuracy_high").row(0) == (None,) * 4
    assert read_view(database, "excess").height == 0


def test_splits_are_loaded_when_given(files, run, tmp_path):
    splits = run.prompts.select("prompt_id", "task", "template", split=pl.lit("test"))
    schema.write_table(splits, tmp_path / "splits.parquet", schema.SPLITS)
    target = tmp_path / "kvguard.duckdb"
    build_database(
        target,
        files.prompts,
        files.traces,
        files.tokens,
        files.outcomes,
        tmp_path / "splits.parquet",
    )
    assert_frame_equal(read_view(target, "splits"), splits, check_row_order=False)


def test_what_file_names_say_does_not_matter(run, files, tmp_path):
    moved = []
    for index, path in enumerate(files.traces):
        other = tmp_path / "model=liar" / "ratio=0.125" / f"press={index}.parquet"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
        moved.append(other)
    target = tmp_path / "kvguard.duckdb"
    build_database(target, files.prompts, moved, files.tokens, files.outcomes)
    same_rows(read_view(target, "traces"), run.traces)


def refused(files, match, error=ValueError, **changes):
    files = files._replace(**changes)
    target = files.results / "refused.duckdb"
    before = sorted(files.results.iterdir())
    with pytest.raises(error, match=match):
        build(files, target.name)
    assert sorted(files.results.iterdir()) == before  # neither half a file nor a leftover


def test_tables_that_contradict_each_other_are_refused(run, files, tmp_path):
    refused(files, "'traces'.*more than once", traces=[*files.traces, files.traces[0]])
    refused(files, "'tokens'.*more than once", tokens=[*files.tokens, files.tokens[-1]])
    refused(files, "'tokens'.*not in table 'traces'", traces=files.traces[1:])
    fewer = tmp_path / "outcomes.parquet"
    schema.write_table(run.outcomes[1:], fewer, schema.OUTCOMES)
    refused(files, "'traces'.*not in table 'outcomes'", outcomes=fewer)


def test_a_file_of_another_schema_is_refused(run, files, tmp_path):
    other = tmp_path / "outcomes.parquet"
    run.outcomes.drop("looping").write_parquet(other)
    refused(files, "'outcomes'.*'looping' is missing", schema.SchemaError, outcomes=other)


def test_an_older_database_survives_a_failed_build(files, tmp_path):
    target = tmp_path / "kvguard.duckdb"
    build_database(target, files.prompts, files.traces, files.tokens, files.outcomes)
    before = target.read_bytes()
    with pytest.raises(ValueError, match="more than once"):
        build_database(target, files.prompts, files.traces * 2, files.tokens, files.outcomes)
    assert target.read_bytes() == before


def test_a_missing_database_or_view_is_named(database, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"snakemake .*nowhere\.duckdb"):
        analyze(tmp_path / "nowhere.duckdb")
    with pytest.raises(ValueError, match=r"no table or view 'exces'.*excess"):
        read_view(database, "exces")

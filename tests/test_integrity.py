"""Integrity checks: a whole run passes, and every kind of damage is named."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from synthetic import SyntheticRun, make_run

from kvguard import files, schema
from kvguard.config import Config, parse_config
from kvguard.database import DatabaseLocked, build_database, read_view
from kvguard.files import DamagedFile, check_inputs, content_digest, digest_path, record_origin
from kvguard.integrity import (
    CHECKS,
    Check,
    discard_damaged,
    expected_shards,
    verify_results,
)
from kvguard.labeling import label_tokens
from kvguard.progress import PLAN, write_plan
from kvguard.provenance import manifest
from kvguard.splits import split_prompts

PROMPTS = 12
SHARD = 6

ORIGIN = {
    "rule": "generate",
    "wildcards": {"model": "tiny"},
    "seed": 0,
    "code": "0123456789abcdef",
    "data": {},
    "kvguard": "0.1",
    "python": "3.11.4",
    "packages": {"torch": "2.10.0", "polars": "2.0.0"},
    "device": "cpu",
    "dtype": "float32",
}
"""Beside every file of the fixture, as if one rule had written them all."""


@pytest.fixture(scope="module")
def run() -> SyntheticRun:
    return make_run(num_prompts=PROMPTS, shard_size=SHARD, error_rate=0.05)


def make_config() -> Config:
    return parse_config(
        {
            "name": "integrity",
            "models": [
                {
                    "name": "tiny",
                    "source": "hub",
                    "repository": "owner/tiny",
                    "revision": "0" * 40,
                }
            ],
            "tasks": [{"kind": "gsm_symbolic", "num_prompts": PROMPTS}],
            "presses": [{"name": "snapkv", "class": "SnapKVPress", "ratios": [0.5, 0.75]}],
            "generation": {"max_new_tokens": 64, "shard_size": SHARD},
        }
    )


@pytest.fixture
def results(tmp_path: Path, whole_run: Path) -> Iterator[Path]:
    """A folder of this test's own that holds all that `verify_results` reads."""
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    record_origin(ORIGIN)
    yield tmp_path
    record_origin({})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, run: SyntheticRun) -> Path:
    """What `results` copies."""
    folder = tmp_path_factory.mktemp("whole_run")
    config = make_config()
    record_origin(ORIGIN)
    for shard in expected_shards(config):
        rows = (
            (pl.col("press") == shard.press)
            & (pl.col("ratio") == shard.ratio)
            & (pl.col("shard") == shard.shard)
        )
        traces = run.traces.filter(rows)
        tokens = run.tokens.join(traces, on=schema.TRACE_KEYS, how="semi", maintain_order="left")
        schema.write_table(traces, shard.path(folder, "traces"), schema.TRACES)
        schema.write_table(tokens, shard.path(folder, "tokens"), schema.TOKENS)
    schema.write_table(run.prompts, folder / "prompts/prompts.parquet", schema.PROMPTS)
    schema.write_table(run.outcomes, folder / "outcomes.parquet", schema.OUTCOMES)
    splits = split_prompts(run.prompts["prompt_id"], config.splits, 0)
    schema.write_table(splits, folder / "splits.parquet", schema.SPLITS)
    labels = label_tokens(run.tokens.select(schema.TOKEN_KEYS), run.outcomes, config.labels)
    schema.write_table(labels, folder / "labels.parquet", schema.LABELS)
    keys = run.tokens.select(schema.TOKEN_KEYS)
    features = keys.with_columns(
        pl.lit(0.0, pl.Float32).alias(name) for name in schema.FEATURE_NAMES
    )
    schema.write_table(features, folder / "features.parquet", schema.FEATURES)
    predictions = keys.join(
        splits.select("prompt_id", "split"), on="prompt_id", maintain_order="left"
    ).with_columns(target=pl.lit("any"), hazard=pl.lit(0.25, pl.Float32))
    schema.write_table(predictions, folder / "predictions.parquet", schema.PREDICTIONS)
    none = pl.DataFrame(schema=schema.RUNS)
    schema.write_table(none, folder / "simulation.parquet", schema.RUNS)
    test = splits.filter(pl.col("split") == "test").select("prompt_id")
    runs = pl.concat([none, test], how="diagonal")
    for ratio in ("0.500", "0.750"):
        for policy in config.live.policies:
            path = folder / "live/tiny/snapkv" / ratio / policy / "00.parquet"
            schema.write_table(runs, path, schema.RUNS)
    checkpoint = folder / "checkpoints/tiny"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    files = manifest([checkpoint / "model.safetensors"], checkpoint)
    record = {"files": {name: entry["sha256"] for name, entry in files.items()}}
    (checkpoint / "kvguard_model.json").write_text(json.dumps(record))
    shards = expected_shards(config)
    build_database(
        folder / "kvguard.duckdb",
        folder / "prompts/prompts.parquet",
        [shard.path(folder, "traces") for shard in shards],
        [shard.path(folder, "tokens") for shard in shards],
        folder / "outcomes.parquet",
        folder / "splits.parquet",
    )
    tables = manifest(folder.rglob("*.parquet"), folder)
    (folder / "manifest.json").write_text(json.dumps(tables))
    record_origin({})
    return folder


def failed(results: Path) -> dict[str, list[str]]:
    checks = verify_results(make_config(), results)
    return {check.name: check.problems for check in checks if check.problems}


def shard_path(results: Path, table: str, press: str = "snapkv", ratio: str = "0.750") -> Path:
    return results / table / "tiny" / press / ratio / "01.parquet"


def damage(path: Path, frame: pl.DataFrame) -> None:
    frame.write_parquet(path)


def test_a_whole_run_passes_every_check(results: Path) -> None:
    checks = verify_results(make_config(), results)
    assert [check.name for check in checks] == list(CHECKS)
    assert [problem for check in checks for problem in check.problems] == []
    assert all(check.examined > 0 for check in checks)


def test_a_missing_shard_is_named(results: Path) -> None:
    shard_path(results, "tokens").unlink()
    problems = failed(results)
    assert problems["schemas"] == ["tokens/tiny/snapkv/0.750/01.parquet: no such file"]
    assert "tokens/tiny/snapkv/0.750/01.parquet: no such file" in problems["result hashes"]


def test_a_missing_column_is_named(results: Path) -> None:
    path = shard_path(results, "tokens")
    damage(path, pl.read_parquet(path).drop("entropy"))
    assert "entropy" in failed(results)["schemas"][0]


def test_missing_prompts_and_tokens_are_counted(results: Path) -> None:
    traces, tokens = shard_path(results, "traces"), shard_path(results, "tokens")
    damage(traces, pl.read_parquet(traces).head(SHARD - 2))
    damage(tokens, pl.read_parquet(tokens).head(-3))
    problems = failed(results)
    assert (
        f"traces/tiny/snapkv/0.750/01.parquet: {SHARD - 2} rows, expected {SHARD}"
        in (problems["row counts"])
    )
    assert any(text.startswith("tokens/tiny/snapkv") for text in problems["row counts"])
    assert problems["keys"] == ["tiny/snapkv/0.750: 2 prompts have no row, 0 are unknown"]


def test_rows_of_another_condition_and_double_rows_are_found(results: Path) -> None:
    path = shard_path(results, "traces")
    other = pl.read_parquet(shard_path(results, "traces", ratio="0.500"))
    own = pl.read_parquet(path)
    damage(path, pl.concat([own.head(SHARD - 2), own.head(1), other.head(1)]))
    problems = failed(results)["keys"]
    assert any("1 rows belong elsewhere" in text for text in problems)
    assert any("1 rows are there twice" in text for text in problems)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_undefined_signals_are_found(results: Path, value: float | None) -> None:
    path = shard_path(results, "tokens")
    wrong = pl.when(pl.int_range(pl.len()) == 5).then(pl.lit(value, pl.Float32))
    damage(
        path,
        pl.read_parquet(path).with_columns(
            wrong.otherwise("top_logprob_07").alias("top_logprob_07")
        ),
    )
    (problem,) = failed(results)["finite signals"]
    assert "tokens/tiny/snapkv/0.750/01.parquet" in problem
    assert "top_logprob_07: 1" in problem


def test_signals_that_contradict_each_other_are_found(results: Path) -> None:
    path = shard_path(results, "tokens")
    damage(path, pl.read_parquet(path).with_columns(llr=pl.col("llr") + 0.5))
    (problem,) = failed(results)["consistent signals"]
    assert "llr = chosen_logprob - audit_logprob" in problem


def test_compression_that_did_not_happen_is_found(results: Path) -> None:
    path = shard_path(results, "traces")
    damage(path, pl.read_parquet(path).with_columns(cache_bytes_after="cache_bytes_before"))
    (problem,) = failed(results)["compression happened"]
    assert "had not 0.750" in problem
    assert "0.000" in problem


def test_a_compressed_baseline_is_found(results: Path) -> None:
    path = shard_path(results, "traces", "none", "0.000")
    half = (pl.col("cache_bytes_before") // 2).alias("cache_bytes_after")
    damage(path, pl.read_parquet(path).with_columns(half))
    assert "had not 0.000" in failed(results)["compression happened"][0]


def test_a_shard_in_which_everything_failed_is_found(results: Path) -> None:
    path = shard_path(results, "traces")
    every = pl.read_parquet(path).with_columns(
        status=pl.lit("error"), error=pl.lit("CUDA out of memory")
    )
    damage(path, every)
    (problem,) = failed(results)["failed prompts"]
    assert "CUDA out of memory" in problem


def test_a_prompt_in_two_splits_and_an_empty_split_are_found(results: Path) -> None:
    path = results / "splits.parquet"
    splits = pl.read_parquet(path)
    leaked = splits.filter(pl.col("split") == "test").with_columns(split=pl.lit("train"))
    damage(path, pl.concat([splits.filter(pl.col("split") != "calibration"), leaked]))
    problems = failed(results)["splits"]
    assert problems == [
        f"splits.parquet: {leaked.height} prompts are in two splits",
        "splits.parquet: no prompt in calibration",
    ]


def test_a_hazard_that_is_no_probability_is_found(results: Path) -> None:
    path = results / "predictions.parquet"
    odd = pl.when(pl.int_range(pl.len()) < 3).then(pl.lit(1.5)).otherwise(pl.lit(float("nan")))
    some = pl.when(pl.int_range(pl.len()) < 5).then(odd).otherwise("hazard").cast(pl.Float32)
    damage(path, pl.read_parquet(path).with_columns(hazard=some))
    assert failed(results)["hazards"] == ["predictions.parquet: 5 hazards of any outside [0, 1]"]


def test_a_policy_that_ran_on_other_prompts_is_found(results: Path) -> None:
    policy = make_config().live.policies[-1]
    path = results / f"live/tiny/snapkv/0.750/{policy}/00.parquet"
    damage(path, pl.read_parquet(path).head(-1))
    assert failed(results)["live runs"] == [
        f"live/tiny/snapkv/0.750/{policy}: 1 prompts are missing or not of the test split"
    ]


def test_changed_weights_and_tables_are_found(results: Path) -> None:
    (results / "checkpoints/tiny/model.safetensors").write_bytes(b"other weights")
    path = results / "outcomes.parquet"
    damage(path, pl.read_parquet(path).with_columns(right=pl.lit(True)))
    problems = failed(results)
    assert "the content of model.safetensors changed" in problems["model hashes"][0]
    assert problems["result hashes"][0].startswith("outcomes.parquet: its content changed")


def test_a_broken_file_is_a_problem_and_not_a_crash(results: Path) -> None:
    shard_path(results, "traces").write_bytes(b"not parquet")
    checks: list[Check] = verify_results(make_config(), results)
    assert len(checks) == len(CHECKS)
    assert any("traces/tiny/snapkv/0.750/01.parquet" in p for p in failed(results)["schemas"])


def test_an_unfinished_run_says_so(results: Path) -> None:
    (results / "manifest.json").unlink()
    assert failed(results)["result hashes"] == [
        "manifest.json: no such file; the run has not finished"
    ]


# --- damage --------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1 << 3
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def forget_digest(path: Path) -> None:
    """As for a run of a version that recorded none."""
    digest_path(path).unlink()


def test_the_command_that_removes_a_damaged_file_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "my runs; $HOME 'x'"
    folder.mkdir()
    for path, options in ((folder / "tokens.parquet", []), (folder, ["-r"])):
        told = re.search(r"`(rm [^`]*)`", str(DamagedFile(path, "too short")))
        assert told is not None
        assert shlex.split(told[1]) == ["rm", *options, str(path)]


@pytest.mark.parametrize("known", [True, False], ids=["digest known", "no digest"])
@pytest.mark.parametrize("harm", [cut, make_noise])
def test_a_damaged_database_does_not_pass(results: Path, harm, known: bool) -> None:
    path = results / "kvguard.duckdb"
    harm(path)
    if not known:
        forget_digest(path)
    (problem,) = failed(results)["database"]
    assert f"{path} is damaged" in problem
    assert f"`rm {path}`" in problem
    with pytest.raises(DamagedFile, match="made anew"):
        read_view(path, "condition_summary")


def test_a_flipped_bit_in_the_database_does_not_pass(results: Path) -> None:
    path = results / "kvguard.duckdb"
    flip_a_bit(path)
    assert "is damaged" in failed(results)["database"][0]


def test_a_locked_database_is_not_called_damaged(results: Path) -> None:
    path = results / "kvguard.duckdb"
    hold = f"import duckdb, time; c = duckdb.connect({str(path)!r}); print(1, flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", hold + "time.sleep(60)"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert "open for writing in another process" in failed(results)["database"][0]
            with pytest.raises(DatabaseLocked, match=str(other.pid)):
                read_view(path, "condition_summary")
        finally:
            other.kill()
    assert failed(results) == {}


def test_a_database_without_all_rows_is_found(results: Path) -> None:
    shards = expected_shards(make_config())[:2]
    traces = [shard.path(results, "traces") for shard in shards]
    outcomes = pl.read_parquet(results / "outcomes.parquet")
    half = outcomes.join(pl.read_parquet(traces), on=schema.TRACE_KEYS, how="semi")
    half.write_parquet(results / "half.parquet")
    build_database(
        results / "kvguard.duckdb",
        results / "prompts/prompts.parquet",
        traces,
        [shard.path(results, "tokens") for shard in shards],
        results / "half.parquet",
        results / "splits.parquet",
    )
    assert "rows of traces, the run's tables have" in failed(results)["database"][0]


EVERY_TABLE = (
    "prompts/prompts.parquet",
    "traces/tiny/snapkv/0.750/01.parquet",
    "tokens/tiny/none/0.000/00.parquet",
    "outcomes.parquet",
    "splits.parquet",
    "labels.parquet",
    "features.parquet",
    "predictions.parquet",
    "simulation.parquet",
)
QUICK = [("outcomes.parquet", cut), *((name, flip_a_bit) for name in EVERY_TABLE[1:3])]
"""Of the damaged tables those of `make test-quick`."""


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        pytest.param(name, harm, marks=() if (name, harm) in QUICK else pytest.mark.matrix)
        for name in EVERY_TABLE
        for harm in (flip_a_bit, cut, make_noise)
    ],
)
def test_a_damaged_table_is_named_and_discarded_alone(results: Path, name: str, harm) -> None:
    path = results / name
    before = {file for file in results.rglob("*") if file.is_file()}
    harm(path)
    (problem,) = failed(results)["written files"]
    assert f"{path} is damaged" in problem
    with pytest.raises(DamagedFile, match="made anew"):
        schema.read_table(path)
    assert discard_damaged(make_config(), results) == [path, results / "manifest.json"]
    after = {file for file in results.rglob("*") if file.is_file()}
    assert before - after == {path, digest_path(path), results / "manifest.json"}


def test_a_changed_model_is_discarded_whole(results: Path) -> None:
    weights = results / "checkpoints/tiny/model.safetensors"
    flip_a_bit(weights)
    (problem,) = failed(results)["model hashes"]
    assert f"{weights.parent} is damaged: the content of model.safetensors changed" in problem
    assert f"`rm -r {weights.parent}`" in problem
    assert discard_damaged(make_config(), results) == [weights.parent, results / "manifest.json"]
    assert not weights.parent.exists()


def test_a_folder_in_the_place_of_a_file_is_found_by_its_reader_and_discarded(
    results: Path,
) -> None:
    path = results / "traces/tiny/snapkv/0.750/01.parquet"
    path.unlink()
    path.mkdir()
    (path / "note.txt").write_text("a folder of somebody")
    (problem,) = failed(results)["written files"]
    assert f"{path} is damaged: a folder is in the place" in problem
    with pytest.raises(DamagedFile, match="`rm -r "):
        check_inputs([path])
    assert discard_damaged(make_config(), results) == [path, results / "manifest.json"]


def test_a_file_that_no_job_wrote_has_no_origin_and_is_whole(results: Path) -> None:
    record_origin({})
    write_plan(results, [], "digest of a configuration")
    assert files.origin_of(results / PLAN) == {}
    checks = verify_results(make_config(), results)
    assert not [problem for each in checks for problem in each.problems if "plan.json" in problem]


def test_a_record_of_noise_hides_no_other_damage(results: Path) -> None:
    noisy, broken = results / "labels.parquet", results / "traces/tiny/none/0.000/00.parquet"
    digest_path(noisy).write_bytes(bytes(range(256)))
    flip_a_bit(broken)
    problems = failed(results)["written files"]
    assert [any(str(path) in problem for problem in problems) for path in (noisy, broken)]
    assert len(problems) == 2
    assert discard_damaged(make_config(), results) == [noisy, broken, results / "manifest.json"]


def test_a_file_that_may_not_be_read_is_named_and_stays(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, broken = results / "labels.parquet", results / "traces/tiny/none/0.000/00.parquet"
    flip_a_bit(broken)

    def refuse(path: Path) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return digest_of(path)

    digest_of = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", refuse)
    problems = failed(results)["written files"]
    assert [
        problem for problem in problems if "Permission denied" in problem and str(closed) in problem
    ]
    assert discard_damaged(make_config(), results) == [broken, results / "manifest.json"]
    assert closed.exists()


def test_half_written_files_are_found_and_discarded(results: Path) -> None:
    leftover = results / "traces/tiny/.00.parquet.abc.part"
    leftover.write_bytes(b"half")
    assert "half written" in failed(results)["written files"][0]
    assert discard_damaged(make_config(), results) == [leftover]
    assert failed(results) == {}


def test_a_file_of_the_future_is_found(results: Path) -> None:
    path = results / "outcomes.parquet"
    os.utime(path, (time.time() + 7200, time.time() + 7200))
    written = path.read_bytes()
    (problem,) = failed(results)["written files"]
    assert f"{path}: its time is 7," in problem
    assert discard_damaged(make_config(), results) == []
    assert failed(results) == {}
    assert path.read_bytes() == written


def test_a_file_deleted_by_hand_is_missed(results: Path) -> None:
    (results / "outcomes.parquet").unlink()
    assert "no such file" in failed(results)["written files"][0]
    assert discard_damaged(make_config(), results) == [results / "manifest.json"]


# --- what made a file ----------------------------------------------------------------------------


def change_origin(path: Path, **fields: object) -> None:
    """As if another job had written the file."""
    digest, origin = digest_path(path).read_text().splitlines()
    changed = json.loads(origin) | fields
    digest_path(path).write_text(f"{digest}\n{json.dumps(changed)}\n")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"code": "f" * 16}, f"has {'f' * 16}, most have {ORIGIN['code']}"),
        ({"device": "cuda:0 (NVIDIA H200)"}, "has cuda:0 (NVIDIA H200), most have cpu"),
        ({"dtype": "bfloat16"}, "has bfloat16, most have float32"),
        (
            {"packages": {"torch": "2.9.0", "polars": "2.0.0"}},
            "has {'torch': '2.9.0'}, most have {'torch': '2.10.0'}",
        ),
    ],
)
def test_a_shard_that_was_made_otherwise_is_named(
    results: Path, fields: dict[str, object], shown: str
) -> None:
    change_origin(shard_path(results, "tokens"), **fields)
    (problem,) = failed(results)["origins"]
    assert problem.startswith(f"generate: {next(iter(fields))}: 1 of ")
    assert problem.endswith(f"tokens/tiny/snapkv/0.750/01.parquet {shown}")


def test_a_table_of_other_inputs_is_named(results: Path) -> None:
    labels, outcomes = results / "labels.parquet", results / "outcomes.parquet"
    change_origin(labels, data={"outcomes.parquet": content_digest(outcomes)})
    assert failed(results) == {}
    frame = pl.read_parquet(outcomes)
    schema.write_table(frame.with_columns(right=~pl.col("right")), outcomes, schema.OUTCOMES)
    assert failed(results)["origins"] == ["labels.parquet: made from another outcomes.parquet"]


def test_a_shard_made_again_with_other_timings_is_the_same_input(results: Path) -> None:
    labels, traces = results / "labels.parquet", shard_path(results, "traces")
    name = traces.relative_to(results).as_posix()
    change_origin(labels, data={name: content_digest(traces)})
    slower = pl.col("decode_seconds") + 1
    frame = pl.read_parquet(traces).with_columns(slower)
    schema.write_table(frame, traces, schema.TRACES)
    assert "origins" not in failed(results)


def test_another_seed_is_named(results: Path) -> None:
    change_origin(results / "splits.parquet", seed=7)
    assert failed(results)["origins"] == [
        "splits.parquet: made with seed 7, the configuration has 0"
    ]

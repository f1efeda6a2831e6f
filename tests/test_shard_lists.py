"""Lists of shards: what stands for them, what is made again where one is lost."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from synthetic import make_run
from test_blocks import block, writing

from kvguard import joblog, schema
from kvguard.blocks import Named, run_shards
from kvguard.config import ConfigError, parse_config
from kvguard.files import MANIFEST, atomic_path, digest_path, origin_of, record_origin
from kvguard.shard_lists import (
    LostShard,
    changed_lists,
    changed_shards,
    list_name,
    listed_shards,
    with_listed,
    write_shard_list,
)

pytestmark = pytest.mark.unit

FOLDERS = ("none/0.000", "snapkv/0.500")


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[list[Path]]:
    """Four shards of traces, two of each condition, as jobs of the pipeline write them."""
    record_origin({"rule": "generate"})
    traces = make_run(num_prompts=6, shard_size=3).traces
    paths = []
    for condition in FOLDERS:
        press, ratio = condition.split("/")
        for shard in range(2):
            rows = traces.filter(press=press, ratio=ratio, shard=shard)
            assert rows.height == 3
            paths.append(tmp_path / "traces/tiny" / condition / f"{shard:02d}.parquet")
            schema.write_table(rows, paths[-1], schema.TRACES)
    yield paths
    record_origin({})


@pytest.fixture
def listed(tmp_path: Path, shards: list[Path]) -> Path:
    target = tmp_path / list_name("traces", "000")
    write_shard_list(shards, target)
    return target


def change(path: Path, column: pl.Expr) -> None:
    schema.write_table(schema.read_table(path).with_columns(column), path, schema.TRACES)


def test_a_list_stands_for_its_shards(listed: Path, shards: list[Path]) -> None:
    assert listed_shards(listed) == shards
    assert with_listed([str(listed), "other.parquet"]) == [*map(str, shards), "other.parquet"]
    assert with_listed(str(listed)) == list(map(str, shards))
    assert with_listed("other.parquet") == "other.parquet"
    assert with_listed(["other.parquet"]) == ["other.parquet"]


def test_other_timings_give_the_same_list_and_other_values_another(
    listed: Path, shards: list[Path]
) -> None:
    before = listed.read_text()
    change(shards[2], pl.col("decode_seconds") + 1)
    write_shard_list(shards, listed)
    assert listed.read_text() == before
    change(shards[2], pl.col("generated_tokens") + 1)
    assert changed_shards(listed) == ["traces/tiny/snapkv/0.500/00.parquet"]
    write_shard_list(shards, listed)
    assert listed.read_text() != before
    assert changed_shards(listed) == []


def test_a_record_of_noise_and_a_lost_shard_are_changes_and_no_crash(
    listed: Path, shards: list[Path]
) -> None:
    digest_path(shards[0]).write_bytes(bytes(range(256)))
    shards[3].unlink()
    gone = ["traces/tiny/none/0.000/00.parquet", "traces/tiny/snapkv/0.500/01.parquet"]
    assert changed_shards(listed) == gone
    assert list(changed_lists(listed.parents[2])) == [
        f"{list_name('traces', '000')}: lists other values of {gone[0]} and 1 more"
    ]
    assert list(changed_lists(listed.parents[2], counted=[])) == []


def test_a_lost_shard_is_named_with_what_heals_it(listed: Path, shards: list[Path]) -> None:
    shards[3].unlink()
    with pytest.raises(LostShard, match=r"snapkv/0.500/01.parquet is missing.*Run again"):
        listed_shards(listed)


def test_a_job_reads_the_shards_of_its_lists_and_the_lists_are_what_it_is_made_from(
    tmp_path: Path, listed: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = block(tmp_path, 1)
    job.wildcards = Named({})
    job.input = Named({"traces": [str(listed)], "prompts": str(tmp_path / "prompts.txt")})
    monkeypatch.setattr(joblog, "start_log", lambda: job)
    read = joblog.start_job().input
    assert read.traces == list(map(str, shards))
    assert read["prompts"] == str(tmp_path / "prompts.txt")
    assert set(read) == {*map(str, shards), str(listed), str(tmp_path / "prompts.txt")}
    with atomic_path(tmp_path / "table.txt") as temporary:
        temporary.write_text("made from them")
    assert set(origin_of(tmp_path / "table.txt")["data"]) == {
        list_name("traces", "000"),
        "prompts.txt",
    }
    shutil.copy(shards[1], shards[0])
    with pytest.raises(ValueError, match=r"none/0.000/00.parquet is damaged"):
        joblog.start_job()


def test_a_listed_block_makes_what_is_lost_or_damaged_and_lists_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made, broken = block(tmp_path, 4), [], {"01"}
    target = tmp_path / list_name("runs", "003")
    job.rule = "generate_block_each"
    job.wildcards, job.input = Named({"block": "003"}), Named({})
    job.output = Named({"runs": str(target)})
    monkeypatch.setattr(joblog, "start_log", lambda: job)

    run = writing(made, broken)
    with pytest.raises(RuntimeError, match=r"1 of 4 shards failed: 01 \(2 of 4\)"):
        run_shards(run)
    assert made == ["00", "02", "03"]
    assert not target.exists(), "a list names whole blocks"
    broken.clear()
    run_shards(run)
    assert made == ["00", "02", "03", "01"], "only the one that failed"
    assert listed_shards(target) == [tmp_path / f"{number:02d}" for number in range(4)]
    assert origin_of(target)["rule"] == "generate_block_each"
    assert not list(tmp_path.rglob("*.kept")), "Snakemake removes no shard, so no second names"
    manifest = tmp_path / MANIFEST
    manifest.write_text("{}")
    run_shards(run)
    assert manifest.exists(), "nothing was made"
    (tmp_path / "02").unlink()
    (tmp_path / "03").write_text("noise")
    run_shards(run)
    assert made[4:] == ["02", "03"]
    assert not manifest.exists(), "its digests are of other bytes"
    job.params.shards["params"] = {"model": {"which": [0, 0, 0, 1], "values": [{}, {"dtype": "x"}]}}
    made.clear()
    run_shards(run)
    assert "03" in made, "its parameters changed"
    record_origin({})


def test_lists_are_for_jobs_of_several_shards() -> None:
    with pytest.raises(ConfigError, match=r"list_shards: true.*above 1, got 1"):
        parse_config(
            {
                "name": "x",
                "models": [],
                "tasks": [],
                "presses": [],
                "jobs": {"list_shards": True},
            }
        )

"""Several shards a job: which lie together, and what an interrupted or damaged block keeps."""

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvguard import joblog
from kvguard.blocks import (
    Named,
    block_name,
    cut,
    keep,
    kept_path,
    pack,
    rule_of_block,
    run_shards,
    take_back,
    unpack,
)
from kvguard.files import atomic_path, digest_path, record_origin

pytestmark = pytest.mark.unit

ORIGIN: dict[str, Any] = {
    **{"rule": "generate", "wildcards": {"shard": "00"}, "parameters": "p", "code": "c"},
    **{"seed": 0, "data": {"prompts/prompts.parquet": "d"}, "kvguard": "1", "python": "3.11"},
    **{"packages": {"torch": "2"}, "dtype": "float32", "device": "cpu", "configuration": "x"},
}


def written(path: Path, text: str = "content", origin: dict[str, Any] = ORIGIN) -> Path:
    """A file as a job leaves it, and its second name."""
    record_origin(origin)
    with atomic_path(path, values="v") as temporary:
        temporary.write_text(text)
    record_origin({})
    keep([path])
    return path


@given(st.lists(st.tuples(st.integers(0, 2), st.integers())), st.integers(1, 5))
def test_blocks_hold_every_shard_once_and_never_mix_models(
    shards: list[tuple[int, int]], size: int
) -> None:
    blocks = list(cut(shards, size, lambda shard: shard[0]))
    assert [shard for block in blocks for shard in block] == shards
    assert all(1 <= len(block) <= size and len({m for m, _ in block}) == 1 for block in blocks)
    for one, other in pairwise(blocks):
        assert len(one) == size or one[0][0] != other[0][0], "full, or the next model begins"


PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


@given(st.lists(st.fixed_dictionaries({"a": PLAIN, "b": PLAIN})))
def test_packed_rows_are_the_same_rows(rows: list[dict[str, Any]]) -> None:
    assert unpack(json.loads(json.dumps(pack(rows)))) == rows


def test_a_value_that_all_shards_share_is_recorded_once() -> None:
    packed = pack([{"experiment": {"seed": 0}, "shard": n} for n in range(50)])
    assert packed["experiment"] == {"which": [0] * 50, "values": [{"seed": 0}]}


def test_a_block_is_named_after_its_rule() -> None:
    assert rule_of_block(block_name("run_live", 1234)) == "run_live"
    assert rule_of_block("build_database") == "build_database"


def test_a_kept_shard_comes_back_without_being_made(tmp_path: Path) -> None:
    files = [written(tmp_path / "traces.parquet"), written(tmp_path / "tokens.parquet")]
    assert files[0].samefile(kept_path(files[0])), "no room for a second copy"
    record = digest_path(files[0]).read_text()
    for path in files:
        path.unlink()
        digest_path(path).unlink()
    assert take_back(files, ORIGIN | {"configuration": "another press more", "device": "cuda"})
    assert [path.read_text() for path in files] == ["content", "content"]
    assert digest_path(files[0]).read_text() == record
    assert take_back(files, ORIGIN), "names that are both there"
    assert not list(tmp_path.glob("*.part*")) + list(tmp_path.glob(".*.part*"))


def lose_one(files: list[Path]) -> None:
    kept_path(files[1]).unlink()


def damage_in_place(files: list[Path]) -> None:
    """Both names show it: they are one file."""
    with files[0].open("r+") as file:
        file.write("damage")


def lose_the_record(files: list[Path]) -> None:
    digest_path(kept_path(files[0])).unlink()


def damage_the_record(files: list[Path]) -> None:
    record = digest_path(kept_path(files[0]))
    record.write_text(record.read_text()[:-20])


@pytest.mark.parametrize(
    "harm",
    [lose_one, damage_in_place, lose_the_record, damage_the_record],
    ids=lambda h: h.__name__,
)
def test_a_lost_or_damaged_one_is_made_again(tmp_path: Path, harm: Any) -> None:
    files = [written(tmp_path / "traces.parquet"), written(tmp_path / "tokens.parquet")]
    harm(files)
    files[0].unlink()
    assert not take_back(files, ORIGIN)
    assert not files[0].exists()


@pytest.mark.parametrize("changed", ["parameters", "code", "data", "packages", "wildcards"])
def test_one_that_was_made_otherwise_is_made_again(tmp_path: Path, changed: str) -> None:
    files = [written(tmp_path / "traces.parquet")]
    assert not take_back(files, ORIGIN | {changed: "another"})


def test_where_there_are_no_hard_links_a_shard_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = written(tmp_path / "traces.parquet")
    path.unlink()
    assert take_back([path], ORIGIN)
    assert path.read_text() == "content"


def block(folder: Path, count: int) -> SimpleNamespace:
    """What Snakemake gives the script of a block of so many shards."""
    rows = [{"shard": f"{number:02d}"} for number in range(count)]
    (folder / "prompts.txt").write_text("prompts")
    return SimpleNamespace(
        rule="generate_block_003",
        log=[str(folder / "block.log")],
        config={"results_dir": str(folder)},
        output=Named({}),
        params=Named(
            {
                "shards": {
                    "wildcards": pack(rows),
                    "input": pack([{"prompts": str(folder / "prompts.txt")}] * count),
                    "output": pack([{"runs": str(folder / row["shard"])} for row in rows]),
                    "params": pack([{"model": {"dtype": "float32"}, "press": None}] * count),
                },
                "library": "c",
            },
            parameters=True,
        ),
    )


def writing(made: list[str], broken: set[str]) -> Callable[[Any], None]:
    """What a rule's script does with a shard: writes it and notes it in ``made``, or fails."""

    def run(shard: Any) -> None:
        assert shard.rule == "generate"
        if shard.wildcards.shard in broken:
            raise ValueError("no such luck")
        made.append(shard.wildcards.shard)
        with atomic_path(shard.output.runs) as temporary:
            temporary.write_text(shard.wildcards.shard)

    return run


def test_a_block_makes_what_is_not_finished_and_a_failed_shard_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made, broken = block(tmp_path, 4), [], {"01"}
    monkeypatch.setattr(joblog, "start_log", lambda: job)

    write = writing(made, broken)

    def run(shard: Any) -> None:
        assert shard.params.press is None
        write(shard)

    with pytest.raises(RuntimeError, match=r"1 of 4 shards failed: 01 \(2 of 4\)"):
        run_shards(run)
    assert made == ["00", "02", "03"]
    for name in made:
        (tmp_path / name).unlink()  # as Snakemake does before it starts the job again
    broken.clear()
    run_shards(run)
    assert made == ["00", "02", "03", "01"], "only the one that failed"
    assert [(tmp_path / f"{n:02d}").read_text() for n in range(4)] == ["00", "01", "02", "03"]
    record_origin({})

"""What a run says of itself: its summary, how far it is, how fast, how long it will take."""

import os
import time
from pathlib import Path

import polars as pl
import pytest

from kvguard.progress import (
    PlannedJob,
    duration,
    read_plan,
    run_summary,
    stage_pace,
    write_plan,
)
from kvguard.workflow import StageStatus


def job(rule: str, state: str, *outputs: str, **wildcards: str) -> PlannedJob:
    return PlannedJob(rule, wildcards, outputs, [f"logs/{rule}.log"], state)  # type: ignore[arg-type]


def test_a_summary_says_what_ran_what_was_reused_and_where_failures_log() -> None:
    jobs = [
        job("prepare_model", "reused", model="tiny"),
        job("generate", "ran", shard="00"),
        job("generate", "ran", shard="01"),
        job("generate", "failed", press="knorm", shard="02"),
        job("detect_outcomes", "left"),
    ]
    assert run_summary(jobs) == [
        "2 ran: generate 2",
        "1 reused, already there: prepare_model 1",
        "1 failed: generate 1",
        "1 not started: detect_outcomes 1",
        "failed: generate press=knorm shard=02; its log: logs/generate.log",
    ]
    assert run_summary([]) == []


def test_a_plan_is_done_by_the_files_that_are_there(tmp_path: Path) -> None:
    old, new, half, other = (str(tmp_path / name) for name in ("old", "new", "half", "other"))
    Path(old).write_text("")
    past = time.time() - 3600
    os.utime(old, (past, past))
    write_plan(
        tmp_path,
        [
            job("prepare_model", "reused", old),
            job("generate", "left", new),
            job("generate", "left", half, other),
            job("generate", "left", old),  # there, but of before: it has to be made again
        ],
        "digest",
    )
    Path(new).write_text("")
    Path(half).write_text("")
    plan = read_plan(tmp_path, "digest")
    assert plan is not None
    assert plan.stages == [StageStatus("prepare_model", 1, 0), StageStatus("generate", 1, 2)]
    assert abs(plan.started - time.time()) < 60
    assert read_plan(tmp_path, "another configuration") is None
    assert read_plan(tmp_path / "nowhere", "digest") is None


def ended(folder: Path, shard: int, seconds: float, at: float, tokens: int) -> None:
    """A job of `generate` that ended at a time, with its record and its tokens."""
    record = folder / "benchmarks" / "generate" / "m" / f"{shard:02d}.tsv"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"s\th:m:s\n{seconds}\t0:00:10\n")
    os.utime(record, (at, at))
    table = folder / "tokens" / "m" / f"{shard:02d}.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"position": range(tokens)}).write_parquet(table)


def test_pace_comes_from_the_latest_jobs(tmp_path: Path) -> None:
    """By hand: four jobs of 10 s, two at a time, in 20 s; 100 tokens each."""
    for shard, at in enumerate((1010.0, 1010.0, 1020.0, 1020.0)):
        ended(tmp_path, shard, 10.0, at, tokens=100)
    pace = stage_pace(tmp_path, "generate")
    assert pace is not None
    assert pace.seconds_per_job == pytest.approx(10)
    assert pace.at_once == pytest.approx(2)
    assert pace.tokens_per_second == pytest.approx(20)
    assert pace.seconds_left(6) == pytest.approx(30)


def test_an_unfinished_record_is_left_out(tmp_path: Path) -> None:
    ended(tmp_path, 0, 10.0, 1010.0, tokens=5)
    (tmp_path / "benchmarks" / "generate" / "m" / "01.tsv").write_text("s\th:m")
    (tmp_path / "tokens" / "m" / "00.parquet").unlink()
    pace = stage_pace(tmp_path, "generate")
    assert pace is not None
    assert (pace.seconds_per_job, pace.at_once, pace.tokens_per_second) == (10.0, 1.0, None)
    assert stage_pace(tmp_path, "run_live") is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min"), (7_200, "2 h"), (187_200, "2 d 4 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said

"""Kills, damage and repetition: a run ends as if nothing had happened, or says what is wrong.

One uninterrupted run of the tiny experiment is what everything is compared with.
``KVGUARD_TEST_KILLS`` is how often the second run is killed: 5 by default, 20 for the full form.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_experiment import RESULTS, command, environment, make_experiment, run

KILLS = int(os.environ.get("KVGUARD_TEST_KILLS", "5"))

TARGETS = (f"{RESULTS}/findings.md", f"{RESULTS}/kvguard.duckdb", f"{RESULTS}/provenance.json")
"""Every table and every live run; figures and report are left out to save time."""

RESUME = ("--rerun-incomplete",)
"""What the shipped profiles and docs/cluster.md add to a run that is resumed."""

TIMINGS = re.compile(r"seconds|(^|_)time(_|$)|allocator_bytes")
"""Columns that no two runs share."""


def comparable(path: Path) -> pl.DataFrame:
    """A table without its timings, in a fixed order of rows."""
    frame = pl.read_parquet(path, hive_partitioning=False)
    timed = [name for name in frame.columns if TIMINGS.search(name)]
    frame = frame.drop(timed)
    for name, kind in frame.schema.items():
        if kind == pl.String and name in ("metric", "cost", "quantity"):
            frame = frame.filter(~pl.col(name).fill_null("").str.contains(TIMINGS.pattern))
    flat = [name for name, kind in frame.schema.items() if not kind.is_nested()]
    return frame.sort(flat) if flat else frame


def files(results: Path) -> set[str]:
    """Names of all files below a results folder."""
    return {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}


def assert_same_results(one: Path, other: Path) -> None:
    """The same files, and the same values in every table and every JSON file of a model."""
    assert files(one) == files(other)
    for name in sorted(files(one)):
        if name.endswith(".parquet"):
            left, right = comparable(one / name), comparable(other / name)
            try:
                assert_frame_equal(left, right, check_exact=True)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        elif name.startswith(("models/", "prompts/")) and name.endswith(".json"):
            assert (one / name).read_text() == (other / name).read_text(), name


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment before any run: both runs are copies, with the same code."""
    return make_experiment(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def uninterrupted(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    run(folder, *TARGETS)
    return folder


def finished(log: Path) -> list[str]:
    """First output of each job that Snakemake reported as done, in that order."""
    text = log.read_text() if log.exists() else ""
    outputs: dict[str, str] = {}
    done = []
    for line in text.splitlines():
        if match := re.match(r"    output: ([^,\s]+)", line):
            output = match[1]
        elif match := re.match(r"    jobid: (\d+)", line):
            outputs[match[1]] = output
        elif match := re.match(r"Finished jobid: (\d+) ", line):
            done.append(outputs[match[1]])
    return done


def start(folder: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(
            command(*TARGETS, *RESUME),
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(running: subprocess.Popen[str]) -> None:
    """SIGKILL to Snakemake and every process that it started."""
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    pristine: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(pristine, folder)
    chance = random.Random(0)
    jobs = len(finished_benchmarks(uninterrupted))
    done: list[str] = []
    written: dict[str, int] = {}
    kills = 0
    for session in range(KILLS + 1):
        log = tmp_path / f"session{session}.log"
        if session:
            run(folder, *TARGETS, "--unlock")
        running = start(folder, log)
        if session < KILLS:
            more = chance.randint(0, round(1.5 * jobs / KILLS))
            while running.poll() is None and len(finished(log)) < more:
                time.sleep(0.05)
            end = time.monotonic() + chance.uniform(0, 6)
            while running.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if running.poll() is None:
                kill(running)
                kills += 1
        assert running.wait() in (0, -signal.SIGKILL), log.read_text()
        for output in finished(log):
            assert output not in done, f"{output} was finished and is computed again"
            done.append(output)
            written[output] = (folder / output).stat().st_mtime_ns
    assert kills >= KILLS // 2, "the run was over before it could be killed"
    assert {output: (folder / output).stat().st_mtime_ns for output in written} == written
    assert not list(folder.rglob("*.part*")), "no temporary file is left"
    assert_same_results(uninterrupted / RESULTS, folder / RESULTS)


def finished_benchmarks(folder: Path) -> list[Path]:
    """One file for each job of a finished run."""
    return list((folder / RESULTS / "benchmarks").rglob("*.tsv"))

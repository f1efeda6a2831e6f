"""How far a run is: jobs done and left, how fast, what failed and where its log is.

Snakemake knows its plan while it runs. `write_plan` keeps it beside the logs when a run starts, so
that asking how far it is takes no second plan, and `run_summary` says at the end what became of it.
"""

import csv
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from kvguard.config import Config, digest
from kvguard.files import atomic_path
from kvguard.workflow import StageStatus

PLAN = "logs/plan.json"
"""Below the results folder: what the last run set out to do."""

LATEST = 20
"""Jobs from which the pace of a stage is taken."""

State = Literal["ran", "reused", "failed", "left"]

_WORDS: dict[State, str] = {
    "ran": "ran",
    "reused": "reused, already there",
    "failed": "failed",
    "left": "not started",
}


class PlannedJob(NamedTuple):
    """One job of a run.

    Attributes:
        rule: its rule.
        wildcards: their names and values.
        outputs: files that it writes.
        logs: where it logs.
        state: ``reused``: its results were there and fresh; ``left``: to be done, not done.
    """

    rule: str
    wildcards: Mapping[str, str]
    outputs: Sequence[str]
    logs: Sequence[str]
    state: State


class Pace(NamedTuple):
    """How fast the latest jobs of a stage were.

    Attributes:
        seconds_per_job: mean.
        at_once: jobs that ran side by side, on average, at least 1.
        tokens_per_second: of all of them together; None where the stage makes no tokens.
    """

    seconds_per_job: float
    at_once: float
    tokens_per_second: float | None

    def seconds_left(self, jobs: int) -> float:
        """Time that so many more jobs take."""
        return jobs * self.seconds_per_job / self.at_once


class Plan(NamedTuple):
    """What a run set out to do, and how far that is."""

    started: float
    stages: list[StageStatus]


def run_summary(jobs: Iterable[PlannedJob]) -> list[str]:
    """Lines that say what a run did: what ran, what was reused, what failed and where it logs."""
    by_state: dict[State, dict[str, int]] = {state: {} for state in _WORDS}
    failures = []
    for job in jobs:
        counts = by_state[job.state]
        counts[job.rule] = counts.get(job.rule, 0) + 1
        if job.state == "failed":
            named = " ".join(f"{name}={value}" for name, value in job.wildcards.items())
            where = f"; its log: {', '.join(job.logs)}" if job.logs else ""
            failures.append(f"failed: {job.rule} {named}".rstrip() + where)
    lines = []
    for state, words in _WORDS.items():
        counts = by_state[state]
        if counts:
            listed = ", ".join(f"{rule} {count}" for rule, count in counts.items())
            lines.append(f"{sum(counts.values())} {words}: {listed}")
    return lines + failures


def plan_digest(experiment: Config) -> str:
    """What `write_plan` records of a configuration: all of it but what its jobs ask of a machine,
    as in the ``config.json`` of the results."""
    return digest(experiment.model_dump(mode="json", by_alias=True, exclude={"jobs"}))


def write_plan(results_dir: str | Path, jobs: Iterable[PlannedJob], config_digest: str) -> None:
    """Keep what a run is about to do, for `read_plan`.

    Args:
        results_dir: of the run.
        jobs: all of them, as planned.
        config_digest: `plan_digest` of the configuration.
    """
    listed: dict[str, list[list[object]]] = {}
    for job in jobs:
        listed.setdefault(job.rule, []).append([job.state != "reused", *job.outputs])
    with atomic_path(Path(results_dir) / PLAN) as temporary:
        temporary.write_text(
            json.dumps({"config": config_digest, "started": time.time(), "jobs": listed})
        )


def read_plan(results_dir: str | Path, config_digest: str) -> Plan | None:
    """How far the run is that `write_plan` described, by the files that are there now.

    A job is done when all its files are there, and written since the run started where it had to
    run.

    Returns:
        None where no run was recorded, or one of another configuration.
    """
    path = Path(results_dir) / PLAN
    try:
        recorded = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if recorded.get("config") != config_digest:
        return None
    started: float = recorded["started"]
    stages = []
    for rule, jobs in recorded["jobs"].items():
        done = sum(_is_done(outputs, started if due else None) for due, *outputs in jobs)
        stages.append(StageStatus(rule, done, len(jobs) - done))
    return Plan(started, stages)


def _is_done(outputs: Iterable[str], since: float | None) -> bool:
    try:
        times = [Path(path).stat().st_mtime for path in outputs]
    except FileNotFoundError:
        return False
    return since is None or min(times) >= since - 1  # some file systems count whole seconds


def stage_pace(results_dir: str | Path, rule: str) -> Pace | None:
    """How fast the latest `LATEST` jobs of a rule were, from Snakemake's records of each job.

    Returns:
        None where none has ended.
    """
    folder = Path(results_dir) / "benchmarks"
    single = folder / f"{rule}.tsv"
    files = [single] if single.is_file() else list((folder / rule).rglob("*.tsv"))
    ended = sorted(((path.stat().st_mtime, path) for path in files), reverse=True)[:LATEST]
    timed = [(at, path, seconds) for at, path in ended if (seconds := _seconds(path)) is not None]
    if not timed:
        return None
    work = sum(seconds for _, _, seconds in timed)
    span = max(at for at, _, _ in timed) - min(at - seconds for at, _, seconds in timed)
    at_once = max(work / max(span, 1e-3), 1.0)
    tokens = None
    if rule == "generate":
        shards = [path.relative_to(folder / rule).with_suffix(".parquet") for _, path, _ in timed]
        tokens = _rows(Path(results_dir) / "tokens" / shard for shard in shards)
    return Pace(
        work / len(timed), at_once, None if tokens is None else tokens / max(work, 1e-3) * at_once
    )


def _seconds(path: Path) -> float | None:
    """Wall time of a job that ended; None where the record is not whole."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return float(rows[-1]["s"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _rows(paths: Iterable[Path]) -> int | None:
    """Rows of Parquet files by their footers; None where one is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(int(pq.read_metadata(path).num_rows) for path in paths)
    except (OSError, pa.ArrowException):
        return None


def duration(seconds: float) -> str:
    """A time as people say it: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"

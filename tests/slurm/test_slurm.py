"""The workflow on a real scheduler: arrays, GPUs, retries, limits, interruptions, the whole run.

What happened is read from the scheduler's own records. The jobs of ``workflow/Snakefile`` keep a
journal of when they start and end, so that computing anything twice is seen.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_experiment
import yaml
from one_node import OneNode, Record, Unavailable, install, stop_leftover, wait_until

from kvguard.config import load_config
from kvguard.integrity import verify_results

pytestmark = pytest.mark.timeout(3600)  # of the whole test, on a busy machine

FAULTS = Path(__file__).parent / "workflow/Snakefile"

SLURM = (
    *("--executor", "slurm", "--jobs", "8", "--latency-wait", "10"),
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "8"),
)
"""The cluster has no accounting database, so jobs are followed by ``squeue``."""

PATIENCE = 1800
"""Seconds after which a test gives up waiting for the scheduler; on an idle machine it waits 30."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[OneNode]:
    """The running cluster; where it cannot be installed or started the tests are skipped."""
    try:
        install()
        stop_leftover()
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")
    # Not below pytest's own folder: every user must be able to reach munge's socket.
    with tempfile.TemporaryDirectory(prefix="kvguard-slurm-") as folder:
        started = OneNode(Path(folder))
        try:
            started.start()
        except Unavailable as reason:
            pytest.skip(str(reason))
        try:
            yield started
        finally:
            started.stop()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start Snakemake on the misbehaving jobs, in ``folder``, its output in ``output.txt``."""
    command = [sys.executable, "-m", "snakemake", *arguments, "--snakefile", str(FAULTS)]
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*command, "--nocolor", *SLURM],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(folder: Path, *arguments: str) -> str:
    """As `start`, to the end, which must be good; the output."""
    status = start(folder, *arguments).wait()
    output = (folder / "output.txt").read_text()
    assert status == 0, output
    return output


def journal(folder: Path) -> Counter[str]:
    """How often each shard started and ended."""
    path = folder / "journal.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(" ".join(line.split()[:2]) for line in lines)


def new_records(cluster: OneNode, before: list[Record]) -> list[Record]:
    wait_until(lambda: not cluster.queue(), PATIENCE, "jobs are left in the queue")
    return cluster.records()[len(before) :]


def of_rule(records: list[Record], rule: str) -> list[Record]:
    return [record for record in records if record.comment.startswith(f"rule_{rule}")]


def test_an_array_shares_one_gpu(cluster: OneNode, tmp_path: Path) -> None:
    before = cluster.records()
    run(tmp_path, "sweep", "--slurm-array-jobs", "shard", "--config", "gpu=1", "shards=3")
    tasks = new_records(cluster, before)
    assert len(tasks) == 3
    assert all(task.state == "COMPLETED" and task.gpus == 1 for task in tasks)
    assert len({task.array.split("_")[0] for task in tasks if task.array}) == 1, "one sbatch"
    lines = (tmp_path / "journal.txt").read_text().split("\n")[:-1]
    begun = [line.split()[0] for line in lines if "starts" in line]
    assert all(line.endswith(" 0") for line in lines if "starts" in line), "CUDA_VISIBLE_DEVICES"
    order = [" ".join(line.split()[:2]) for line in lines]
    assert order == [f"{shard} {what}" for shard in begun for what in ("starts", "ends")]


@pytest.fixture(scope="module")
def faults(
    cluster: OneNode, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Record], str]:
    """A job that needs more memory, one that is too slow, one that is cancelled, side by side."""
    folder = tmp_path_factory.mktemp("faults")
    before = cluster.records()
    targets = ("greedy.txt", "slow.txt", "cancelled.txt")
    running = start(folder, *targets, "--keep-going")

    def written() -> bool:
        return (folder / "cancelled.txt").exists()

    wait_until(written, PATIENCE, "the job that is to be cancelled does not start")
    (number,) = (
        job
        for job, state in cluster.queue().items()
        if cluster.describe(job)["Comment"].startswith("rule_cancelled")
    )
    subprocess.run(["scancel", number], check=True)
    assert running.wait() == 1
    return folder, new_records(cluster, before), (folder / "output.txt").read_text()


def test_a_failed_job_is_retried_with_more_memory(
    faults: tuple[Path, list[Record], str],
) -> None:
    folder, records, _ = faults
    attempts = [(job.state, job.memory_mb) for job in of_rule(records, "greedy")]
    assert attempts == [("FAILED", 200), ("COMPLETED", 400)]
    assert (folder / "greedy.txt").read_text().strip() == "400M"


def test_a_job_past_its_limit_is_retried_with_more_time(
    faults: tuple[Path, list[Record], str],
) -> None:
    folder, records, _ = faults
    attempts = [(job.state, job.limit_minutes) for job in of_rule(records, "slow")]
    assert attempts == [("TIMEOUT", 1), ("COMPLETED", 10)]
    assert (folder / "slow.txt").read_text() == "done\n"


def test_a_cancelled_job_leaves_no_half_output_and_is_named(
    faults: tuple[Path, list[Record], str],
) -> None:
    folder, records, output = faults
    (job,) = of_rule(records, "cancelled")
    assert job.state == "CANCELLED"
    assert not (folder / "cancelled.txt").exists()
    assert f"SLURM-job '{job.job}' failed, SLURM status is: 'CANCELLED'" in output


def completed(records: list[Record], rule: str) -> list[str]:
    """Wildcards of the rule's jobs that the scheduler recorded as completed."""
    jobs = [job for job in of_rule(records, rule) if job.state == "COMPLETED"]
    return [job.comment.removeprefix(f"rule_{rule}_wildcards_") for job in jobs]


def one_done_one_running(cluster: OneNode, before: list[Record], folder: Path) -> None:
    """Wait until the scheduler has recorded a shard's end while another one computes."""

    def so() -> bool:
        done = completed(cluster.records()[len(before) :], "shard")
        counts = journal(folder)
        computing = {line.split()[0] for line in counts if line.endswith("starts")} - {
            line.split()[0] for line in counts if line.endswith("ends")
        }
        return bool(done and computing)

    wait_until(so, PATIENCE, "no shard ended while another one computed")


def test_an_interrupted_sweep_cancels_its_jobs_and_resumes(
    cluster: OneNode, tmp_path: Path
) -> None:
    before = cluster.records()
    sweep = ("sweep", "--rerun-incomplete", "--config", "seconds=5", "shards=4")
    running = start(tmp_path, *sweep)
    one_done_one_running(cluster, before, tmp_path)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait() != 0
    stopped = new_records(cluster, before)
    assert "CANCELLED" in {job.state for job in stopped}
    finished = completed(stopped, "shard")
    run(tmp_path, *sweep)
    assert all(journal(tmp_path)[f"{shard} starts"] == 1 for shard in finished)
    resumed = cluster.records()[len(before) + len(stopped) :]
    assert sorted([*finished, *completed(resumed, "shard")]) == ["00", "01", "02", "03"]


def test_jobs_outlive_a_killed_snakemake_and_nothing_is_computed_twice(
    cluster: OneNode, tmp_path: Path
) -> None:
    before = cluster.records()
    sweep = ("sweep", "--rerun-incomplete", "--config", "seconds=5", "shards=4")
    running = start(tmp_path, *sweep)
    one_done_one_running(cluster, before, tmp_path)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert cluster.queue(), "the scheduler goes on without Snakemake"
    orphans = new_records(cluster, before)
    assert {job.state for job in orphans} == {"COMPLETED"}
    run(tmp_path, *sweep[:1], "--unlock", *sweep[2:])
    run(tmp_path, *sweep)
    counts = journal(tmp_path)
    assert set(counts.values()) == {1}, "every shard started once and ended once"
    assert len(counts) == 2 * 4
    assert len(cluster.records()) == len(before) + 4, "the resumed sweep submitted nothing"


TINY_ON_SLURM = {
    "tasks": [tiny_experiment.EXPERIMENT["tasks"][0] | {"num_prompts": 8}],
    "presses": [tiny_experiment.EXPERIMENT["presses"][0] | {"ratios": [0.75]}],
    "generation": {"shard_size": 8},
    "live": {"policies": ["none", "guard"], "certify_prices": []},
    "jobs": {"model": {"partition": "gpu", "gpu": 1}},
}
"""As few jobs as show the point: each starts Snakemake twice and imports the libraries."""

MODEL_JOBS = {"prepare_model": 1, "generate": 2, "find_harm_onsets": 1, "run_live": 2}
"""Of `TINY_ON_SLURM`: one shard of two conditions, one live shard of two policies."""

TARGETS = [f"{tiny_experiment.RESULTS}/{name}" for name in ("findings.md", "figures/harm.png")]
"""Every table and one figure: a figure more is one more script in the same submission."""


def test_the_tiny_experiment_runs_through_the_shipped_profile(
    cluster: OneNode, tmp_path: Path
) -> None:
    """Arrays, single jobs and groups; the submitting Snakemake is killed once, and resumed."""
    before = cluster.records()
    folder = tiny_experiment.make_experiment(tmp_path)
    (folder / "slurm.yaml").write_text(yaml.safe_dump(TINY_ON_SLURM))
    command = [sys.executable, "-m", "snakemake", "--nocolor", "--configfile", "slurm.yaml"]
    command += ["--workflow-profile", "profiles/slurm", *SLURM, "--cores", "2"]
    command += ["--slurm-array-jobs", "generate, run_live"]
    output = folder / "output.txt"

    def begin(*arguments: str) -> subprocess.Popen[str]:
        with output.open("a") as file:
            return subprocess.Popen(
                [*command, *arguments, "--", *TARGETS],
                cwd=folder,
                env=tiny_experiment.environment(folder),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    running = begin()

    def generating() -> bool:
        assert running.poll() is None, output.read_text()
        return bool(of_rule(cluster.records()[len(before) :], "generate"))

    wait_until(generating, PATIENCE, "no shard was generated")
    running.kill()
    running.wait()
    killed = new_records(cluster, before)
    assert len(of_rule(killed, "generate")) == MODEL_JOBS["generate"]
    assert begin("--unlock").wait() == 0, output.read_text()
    assert begin().wait() == 0, output.read_text()

    records = new_records(cluster, before)
    assert {job.state for job in records} == {"COMPLETED"}
    assert {rule: len(of_rule(records, rule)) for rule in MODEL_JOBS} == MODEL_JOBS
    for rule in MODEL_JOBS:
        jobs = of_rule(records, rule)
        arrays = {job.array.split("_")[0] for job in jobs if job.array}
        assert all(job.gpus == 1 for job in jobs)
        assert len(arrays) == (1 if rule in ("generate", "run_live") else 0), f"{rule}: one sbatch"
    tables = [job for job in records if not any(of_rule([job], rule) for rule in MODEL_JOBS)]
    tables = [job for job in tables if not of_rule([job], "prepare_prompts")]
    assert len(tables) == 2, "all of what follows generation, all of what follows the live runs"
    assert all(job.gpus == 0 for job in tables)
    results = folder / tiny_experiment.RESULTS
    assert all((folder / target).exists() for target in TARGETS)
    checks = verify_results(load_config(results / "config.json", check_files=False), results)
    problems = [problem for check in checks for problem in check.problems]
    assert problems == ["manifest.json: no such file; the run has not finished"]

"""Kills, damage and repetition: a run ends as if nothing had happened, or says what is wrong.

One uninterrupted run of the tiny experiment is what everything is compared with.
``KVGUARD_TEST_KILLS`` is how often the second run is killed: 5 by default, 20 for the full form.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from polars.testing import assert_frame_equal
from same_results import assert_same_results, comparable, files
from small_disk import small_disk
from source_run import finish
from tiny_experiment import RESULTS, command, environment, make_experiment, run

from kvguard.config import load_config
from kvguard.files import file_sha256, origin_of
from kvguard.integrity import verify_results

KILLS = int(os.environ.get("KVGUARD_TEST_KILLS", "5"))

TARGETS = (f"{RESULTS}/findings.md", f"{RESULTS}/kvguard.duckdb", f"{RESULTS}/provenance.json")
"""Every table and every live run; figures and report are left out to save time."""

RESUME = ("--rerun-incomplete",)
"""What the shipped profiles and docs/cluster.md add to a run that is resumed."""


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_second_run_takes_the_models_of_the_first(uninterrupted: Path, tmp_path: Path) -> None:
    """On fresh prompts: nothing is trained, all is whole, and says where the models come from."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    finish(tmp_path / RESULTS)
    over = {
        "name": "second",
        "seed": 1,
        "results_dir": "second",
        "predictor": {"trained_by": RESULTS},
        "splits": {"train": 0, "calibration": 0.5, "test": 0.5},
        "live": {"policies": ["none", "guard", "guard_price", "gate", "always_safe", "offload"]},
    }
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(over))
    files = ("config.yaml", "second.yaml")
    before = {path: file_sha256(path) for path in (tmp_path / RESULTS).rglob("*.json")}
    run(tmp_path, "all", "--configfile", *files)
    assert before == {path: file_sha256(path) for path in before}, "the first run is only read"
    results = tmp_path / "second"
    assert not any((results / f"{name}.parquet").exists() for name in ("features", "predictions"))
    assert [path.name for path in (results / "traces/tiny").iterdir()] == ["none"]
    for name in ("hazard_predictor", "certificate", "harm_model", "baselines"):
        paths = [tmp_path / folder / f"models/{name}.json" for folder in (RESULTS, "second")]
        assert len(set(map(file_sha256, paths))) == 1, name
    text = (results / "findings.md").read_text()
    assert "come from the run `tiny`" in text
    assert "none of them is a prompt of this run" in text
    listed = json.loads((results / "manifest.json").read_text())
    assert {"models/origin.json", "models/harm_model.json"} <= set(listed)
    checks = verify_results(load_config(results / "config.json", check_files=False), results)
    assert [problem for check in checks for problem in check.problems] == []


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_configuration_gives_the_same_tables(
    pristine: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    run(tmp_path, *TARGETS)
    assert_same_results(uninterrupted / RESULTS, tmp_path / RESULTS)


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with figures, viewer, report and manifest."""
    folder = tmp_path_factory.mktemp("complete")
    shutil.copytree(uninterrupted, folder, dirs_exist_ok=True)
    run(folder)
    return folder


@pytest.fixture
def broken(complete: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    folder = tmp_path / "broken"
    shutil.copytree(complete, folder, symlinks=True)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1 << 3
    path.write_bytes(content)


def make_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def set_forward(path: Path) -> None:
    """As if it had been written before the clock was set back by an hour."""
    os.utime(path, (time.time() + 3600, time.time() + 3600))


def verify(folder: Path, *arguments: str) -> str | None:
    """What ``kvguard verify`` says; None when nothing is wrong."""
    command = [sys.executable, "-c", "from kvguard.cli import app; app()", "verify", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    assert (done.returncode == 0) == ("nothing is wrong" in done.stdout), done.stdout
    return None if done.returncode == 0 else done.stdout


def jobs_of(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Jobs that Snakemake ran, by rule."""
    text = done.stdout + done.stderr
    table = re.search(r"^Job stats:\njob .*\n-+ .*\n((?:\S+ +\d+\n)+)", text, re.MULTILINE)
    rules = dict(line.split() for line in table[1].splitlines()) if table else {}
    return {rule: int(count) for rule, count in rules.items() if rule not in ("total", "all")}


def whole(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of each file of the results, without logs and benchmarks."""
    results = folder / RESULTS
    names = {name for name in files(results) if not name.startswith(("logs", "benchmarks"))}
    names = {name for name in names if not name.endswith((".sha256", ".snakemake_timestamp"))}
    return {n: ((results / n).stat().st_mtime_ns, file_sha256(results / n)) for n in names}


SHARD = "tiny/snapkv/0.750/01.parquet"

HARM = {
    f"traces/{SHARD}": cut,
    "tokens/tiny/none/0.000/00.parquet": flip_a_bit,
    "harm_onsets/tiny/snapkv/0.500/00.parquet": make_noise,
    "live/tiny/snapkv/0.750/guard/00.parquet": flip_a_bit,
    "prompts/prompts.parquet": flip_a_bit,
    "outcomes.parquet": cut,
    "splits.parquet": make_noise,
    "labels.parquet": Path.unlink,
    "features.parquet": flip_a_bit,
    "predictions.parquet": cut,
    "simulation.parquet": set_forward,
    "models/hazard_predictor.json": flip_a_bit,
    "models/certificate.json": cut,
    "checkpoints/tiny/model.safetensors": flip_a_bit,
    "kvguard.duckdb": make_noise,
    "tables/policies.parquet": flip_a_bit,
    "tables/policies.csv": cut,
    "timeline.parquet": cut,
    "viewer.html": flip_a_bit,
    "findings.md": cut,
    "report.html": Path.unlink,
    "manifest.json": cut,
}
"""A file of every stage, and what happens to it; every figure is added below."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_result_says_what_made_it(complete: Path) -> None:
    results = complete / RESULTS
    named = {f"{name}.parquet" for name in ("outcomes", "labels", "features", "predictions")}
    listed = set(json.loads((results / "manifest.json").read_text()))
    assert {*named, "viewer.html", "findings.md", "report.html", "kvguard.duckdb"} <= listed
    assert any(name.startswith("figures/") for name in listed)
    for name in listed:
        if name.startswith("checkpoints/"):
            continue  # a prepared model's record says it itself
        origin = origin_of(results / name)
        assert origin, f"{name} does not say what made it"
        assert origin["seed"] == 0
        assert origin["device"] == "cpu"
        assert origin["packages"]["torch"] == metadata.version("torch")
        assert origin["rule"] == "record_run" or len(origin["code"]) == 16, name
    trace = origin_of(results / f"traces/{SHARD}")
    assert trace["dtype"] == "float32"
    assert trace["wildcards"]["shard"] == "01"
    outcomes = origin_of(results / "outcomes.parquet")
    assert outcomes["data"][f"traces/{SHARD}"] == trace["values"]
    assert verify(complete) is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_damaged_file_is_named_and_discarded(broken: Path) -> None:
    results = broken / RESULTS
    figures = sorted((results / "figures").iterdir())
    assert figures
    harm = HARM | {f"figures/{path.name}": cut for path in figures if path.suffix == ".png"}
    before = whole(broken)
    for name, damage in harm.items():
        damage(results / name)
    config = load_config(results / "config.json", check_files=False)
    found = {problem for check in verify_results(config, results) for problem in check.problems}
    unnamed = [
        name
        for name in harm
        if not any(name.removesuffix("/model.safetensors") in problem for problem in found)
    ]
    assert unnamed == []
    assert verify(broken, "--discard") is not None, "a run without its files is not whole"
    lost = {name for name in before if not (results / name).exists()}
    model = {name for name in before if name.startswith("checkpoints/tiny/")}
    kept = {name for name, damage in harm.items() if damage is set_forward}
    assert lost == {*harm, *model} - kept


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_shard_is_named_by_its_reader_and_made_anew_alone(
    complete: Path, broken: Path
) -> None:
    """Healed file by file as docs/cluster.md says; all else keeps what it was."""
    results = broken / RESULTS
    trace, live = f"traces/{SHARD}", "live/tiny/snapkv/0.750/guard/00.parquet"
    cut(results / trace)
    failed = run(broken, "--forcerun", "detect_outcomes", check=False)
    assert failed.returncode != 0
    assert f"{RESULTS}/{trace} is damaged" in failed.stdout + failed.stderr
    shutil.rmtree(broken)
    shutil.copytree(complete, broken, symlinks=True)
    before = whole(broken)
    for name, damage, rule in (
        (trace, cut, "generate"),
        (live, flip_a_bit, "run_live"),
        ("checkpoints/tiny/model.safetensors", flip_a_bit, "prepare_model"),
    ):
        damage(results / name)
        verify(broken, "--discard")
        target = f"{RESULTS}/{name.removesuffix('/model.safetensors')}"
        assert jobs_of(run(broken, target)) == {rule: 1}
        run(broken, "--touch")
    assert jobs_of(run(broken)) == {"write_manifest": 1}
    assert verify(broken) is None
    after = whole(broken)
    remade = {trace, f"tokens/{SHARD}", live}
    changed = {name for name in before if before[name][1] != after[name][1]}
    assert changed <= {*remade, "manifest.json"}, "timings differ, nothing else does"
    for name in remade:
        assert_frame_equal(comparable(complete / RESULTS / name), comparable(results / name))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_command_makes_a_damaged_file_and_what_depends_on_it(broken: Path) -> None:
    results = broken / RESULTS
    before = whole(broken)
    for name in ("kvguard.duckdb", "live/tiny/snapkv/0.750/none/01.parquet"):
        cut(results / name)
    min((results / "figures").glob("*.pdf")).unlink()
    verify(broken, "--discard")
    jobs = jobs_of(run(broken))
    assert (jobs["run_live"], jobs["build_database"]) == (1, 1)
    assert not {"generate", "find_harm_onsets", "train_predictor", "calibrate_controller"} & set(
        jobs
    )
    assert verify(broken) is None
    after = whole(broken)
    untouched = {name for name in before if before[name][0] == after[name][0]}
    assert {name for name in before if name.startswith(("traces", "tokens", "models"))} <= untouched
    assert jobs_of(run(broken)) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_full_disk_names_the_shard_and_the_rest_is_kept(broken: Path) -> None:
    """The folder of one shard becomes a file system of 16 KiB."""
    results = broken / RESULTS
    shard, tokens = results / f"traces/{SHARD}", results / f"tokens/{SHARD}"
    before = whole(broken)
    tokens.unlink()
    with small_disk(tokens.parent, "16k"):
        failed = run(broken, str(tokens.relative_to(broken)), check=False)
        text = failed.stdout + failed.stderr
        assert failed.returncode != 0
        assert "No space left" in text
        assert f"while writing {RESULTS}/tokens/{SHARD}" in text
        assert [path.name for path in tokens.parent.iterdir()] == []
    done = run(broken, str(tokens.relative_to(broken)))
    assert jobs_of(done) == {"generate": 1}
    after = whole(broken)
    assert {name for name in before if before[name] != after[name]} == {
        str(path.relative_to(results)) for path in (shard, tokens)
    }

"""How the workflow grows: the time of a plan by its jobs, memory and time of a stage by its rows.

    python benchmarks/scale.py                                # 2 and 20 million token rows
    python benchmarks/scale.py --rows 200000 2000000
    python benchmarks/scale.py --only plan

Writes results/bench/scale.json after every measurement, so that a run that is cut off keeps what it
has. Every measurement is a process of its own, whose peak memory and processor time are its own.

- ``plans``: a dry run of Snakemake (``snakemake -n --quiet``) on experiments/paper.yaml and on an
  overlay with 10,000 shards of generation, 16 a job with ``jobs.list_shards`` and as jobs of their
  own, and ``kvguard status`` on a results folder that holds the record of a plan of 10,000
  generation jobs, half of them done; beside them ``floor``, as many jobs of one rule in a Snakefile
  of their own: what Snakemake needs before anything of this workflow;
- ``stages``: database, labels, features, training, the rivals' settings and the simulation on the
  tables of `synthetic_sweep.make_sweep`, by the scripts that the workflow runs. ``peak_rss_bytes``
  is the process's, what is resident of memory-mapped temporary files included, which the system
  takes back when it needs the memory; ``peak_own_bytes`` is without those, seen five times a
  second (Linux);
- ``growth``: of each stage, seconds and memory of the largest size over those of the smallest,
  beside the ratio of their rows. A stage is linear where ``seconds_ratio`` is not above
  ``rows_ratio``.

Training fits one target (`--targets`) at the configured depth and rate, for `--max-rounds` rounds
without an early stop, so that sizes compare; its time goes with the rounds. Every further target
costs as much again, a trial of a search one fit a fold. No size is started that would, by the time
of the one before, end after `--minutes`.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import measuring
import polars as pl
from synthetic_sweep import Sweep, make_sweep

from kvguard import schema
from kvguard.config import Config, Labels, OperatingPoint, Predictor, load_config
from kvguard.evaluate_controller import Frames, simulate_model
from kvguard.predictor import load_predictor
from kvguard.progress import PlannedJob, plan_digest, write_plan
from kvguard.rival_settings import load_gate, load_rivals
from kvguard.splits import prompts_of, read_splits
from kvguard.trainer import make_trainer
from kvguard.workflow import snakemake_command, workflow_folder

TARGET = measuring.FOLDER / "scale.json"
FLOOR = """
names = [f"{number:05d}" for number in range(JOBS)]

rule all:
    input: "table.parquet"

rule read:
    input: expand("{table}/{name}.parquet", table=["traces", "tokens"], name=names)
    output: "table.parquet"
    shell: "true"

rule prompts:
    output: "prompts.parquet"
    shell: "true"

rule generate:
    input: "prompts.parquet"
    output: "traces/{name}.parquet", "tokens/{name}.parquet"
    log: "logs/{name}.log"
    benchmark: "benchmarks/{name}.tsv"
    threads: 1
    resources: mem_mb=lambda wildcards, attempt: 1000 * attempt, runtime=60, gpu=1
    params: settings=lambda wildcards: {"seed": 0}, place=lambda wildcards: int(wildcards.name)
    script: "generate.py"
"""
"""Jobs with two files, a log, a record, parameters and resources, and one that reads all files."""

GENERATION_JOBS = 10_000
SHARDS_PER_JOB = 16
ROUNDS = 50
POINT = OperatingPoint(tau_low=0.1, tau_high=0.3, k=2, j=8)


# --- stages --------------------------------------------------------------------------------------


def _script(name: str) -> ModuleType:
    path = workflow_folder() / "workflow_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Settings(NamedTuple):
    targets: list[str]
    max_rounds: int
    threads: int


def _build_database(sweep: Sweep, settings: _Settings) -> None:
    tables = {"prompts": sweep.prompts, "outcomes": sweep.outcomes, "splits": sweep.splits}
    target = sweep.folder / "database.duckdb"
    _script("build_database").main(tables, sweep.traces, sweep.tokens, target)


def _label_traces(sweep: Sweep, settings: _Settings) -> None:
    target = sweep.folder / "labels.parquet"
    _script("label_traces").main(sweep.tokens, sweep.outcomes, Labels(), target)


def _build_features(sweep: Sweep, settings: _Settings) -> None:
    target = sweep.folder / "features.parquet"
    _script("build_features").main(sweep.tokens, sweep.traces, target)


def _train_predictor(sweep: Sweep, settings: _Settings) -> None:
    rounds = settings.max_rounds
    fitted = Predictor.model_validate(
        {
            "targets": settings.targets,
            "search_trials": 0,
            "max_rounds": rounds,
            "early_stopping_rounds": rounds,
        }
    )
    horizon = Labels().horizon_tokens
    trainer = make_trainer(
        sweep.splits, fitted, horizon_tokens=horizon, seed=0, threads=settings.threads
    )
    names = ("training", "search_trials", "leakage_check")
    _script("train_predictor").main(
        sweep.folder / "features.parquet",
        sweep.folder / "labels.parquet",
        trainer,
        "",
        sweep.folder / "models",
        sweep.folder / "predictions.parquet",
        {name: sweep.folder / "tables" / f"{name}.parquet" for name in names},
    )


def _fit_rivals(sweep: Sweep, settings: _Settings) -> None:
    models = sweep.folder / "models"
    _script("fit_rivals").main(
        sweep.traces,
        sweep.tokens,
        sweep.outcomes,
        sweep.splits,
        models / "baselines.json",
        models / "rivals.json",
    )


def _simulate_controller(sweep: Sweep, settings: _Settings) -> None:
    """As the workflow's script, without its certificate and its checkpoint's tokenizer."""
    models = sweep.folder / "models"
    wanted = pl.col("prompt_id").is_in(prompts_of(read_splits(sweep.splits), "test"))
    sources = (sweep.traces, sweep.tokens, sweep.outcomes, sweep.folder / "predictions.parquet")
    frames = Frames(
        *(pl.scan_parquet(s, hive_partitioning=False).filter(wanted).collect() for s in sources)
    )
    runs = simulate_model(
        frames,
        schema.read_table(sweep.prompts, schema.PROMPTS),
        _experiment(),
        POINT,
        lambda ids: " ".join(map(str, ids)),
        load_rivals(models / "rivals.json"),
        load_gate(models / "baselines.json"),
        target=load_predictor(models / "hazard_predictor.json").target,
    )
    schema.write_table(runs, sweep.folder / "simulation.parquet", schema.RUNS)


def _experiment() -> Config:
    return load_config(workflow_folder() / "config.yaml")


STAGES: dict[str, Callable[[Sweep, _Settings], None]] = {
    "build_database": _build_database,
    "label_traces": _label_traces,
    "build_features": _build_features,
    "train_predictor": _train_predictor,
    "fit_rivals": _fit_rivals,
    "simulate_controller": _simulate_controller,
}


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _peak_bytes() -> int:
    """Peak resident memory of this process since its program started.

    Not getrusage's: that of a new process starts at its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return kilobyte * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _own_bytes(process: int | None) -> int:
    """Resident memory of a process that no file backs; 0 where the system does not say it."""
    status = Path(f"/proc/{process}/status")
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except OSError:  # no such system, or the process has ended
        return 0
    return 1024 * int(lines["RssAnon"].split()[0]) if "RssAnon" in lines else 0


def _child(stage: str, sweep: Sweep, settings: _Settings, report: Any) -> None:
    """Run one stage and send seconds, processor seconds and peak memory; not what imports take."""
    started, before = time.perf_counter(), _cpu_seconds(resource.RUSAGE_SELF)
    STAGES[stage](sweep, settings)
    seconds = time.perf_counter() - started
    report.send((seconds, _cpu_seconds(resource.RUSAGE_SELF) - before, _peak_bytes()))


def measure_stage(stage: str, sweep: Sweep, settings: _Settings) -> dict[str, Any]:
    """One stage in a fresh process.

    Raises:
        RuntimeError: the process ended without a result; its exit code is named.
    """
    fresh = multiprocessing.get_context("spawn")
    receiver, sender = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_child, args=(stage, sweep, settings, sender))
    process.start()
    sender.close()
    own = 0
    while not receiver.poll(0.2):
        own = max(own, _own_bytes(process.pid))
    try:
        seconds, cpu, peak = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{stage} ended with exit code {process.exitcode}") from None
    process.join()
    return {
        "stage": stage,
        "rows": sweep.rows,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "us_per_row": round(1e6 * seconds / sweep.rows, 3),
        "peak_rss_bytes": peak,
        "peak_own_bytes": own or None,
    }


def growth(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each stage's largest size over its smallest: rows, seconds, memory."""
    grown = []
    for name in dict.fromkeys(entry["stage"] for entry in stages):
        sizes = sorted((e for e in stages if e["stage"] == name), key=lambda e: e["rows"])
        small, large = sizes[0], sizes[-1]
        if small["rows"] == large["rows"]:
            continue
        ratios = {
            f"{key}_ratio": round(large[field] / small[field], 2)
            for key, field in (
                ("rows", "rows"),
                ("seconds", "seconds"),
                ("cpu", "cpu_seconds"),
                ("peak_rss", "peak_rss_bytes"),
            )
        }
        grown.append({"stage": name} | ratios)
    return grown


# --- plans ---------------------------------------------------------------------------------------


def large_overlay(layers: Sequence[Path], jobs: int, shards_per_job: int = 1) -> dict[str, Any]:
    """An overlay of the paper's plan with at least that many shards of generation.

    With several shards a job the plan goes by lists of them.
    """
    experiment = load_config(*layers)
    shards = -(-jobs // (len(experiment.models) * len(experiment.conditions)))
    task = experiment.tasks[0].model_dump(mode="json") | {"num_prompts": 10 * shards}
    planned = {"shards_per_job": shards_per_job, "list_shards": shards_per_job > 1}
    return {"tasks": [task], "generation": {"shard_size": 10}, "jobs": planned}


def _timed(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Wall and processor seconds of a command and its children.

    Raises:
        RuntimeError: it fails; what it printed is named.
    """
    before = _cpu_seconds(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    cpu = _cpu_seconds(resource.RUSAGE_CHILDREN) - before
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def record_half_done(experiment: Config, folder: Path) -> int:
    """Record a plan of generation jobs in the run's results, with every second one done.

    Args:
        experiment: the configuration.
        folder: where its results folder is.

    Returns:
        Jobs in the plan.
    """
    names = {
        (model.name, press, ratio, f"{shard:02d}"): shard % 2 == 0
        for model in experiment.models
        for press, ratio in experiment.conditions
        for shard in range(len(experiment.shards))
    }
    results = Path(experiment.results_dir)
    outputs = {
        name: [f"{results / table / Path(*name)}.parquet" for table in ("traces", "tokens")]
        for name in names
    }
    jobs = [
        PlannedJob(
            "generate",
            dict(zip(("model", "press", "ratio", "shard"), name, strict=True)),
            outputs[name],
            [],
            "left",
        )
        for name in names
    ]
    write_plan(folder / results, jobs, plan_digest(experiment))
    for name in (name for name, done in names.items() if done):
        record = folder / f"{results / 'benchmarks/generate' / Path(*name)}.tsv"
        for path in [record, *(folder / output for output in outputs[name])]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("s\tmax_rss\n1.0\t1.0\n" if path == record else "")
    return len(jobs)


def measure_plans(add: Callable[[dict[str, Any]], None], jobs: int) -> None:
    """Times of a dry run of the paper's plan and of a large one, and of its status."""
    paper = [workflow_folder() / name for name in ("config.yaml", "experiments/paper.yaml")]
    with tempfile.TemporaryDirectory(prefix="kvguard-") as name:
        folder = Path(name)
        plans = [paper]
        for size in (SHARDS_PER_JOB, 1):
            overlay = folder / f"large_{size}.yaml"
            overlay.write_text(json.dumps(large_overlay(paper, jobs, size)))  # JSON is YAML
            plans.append([*paper, overlay])
        for layers in plans:
            experiment = load_config(*layers)
            shards = len(experiment.models) * len(experiment.conditions) * len(experiment.shards)
            options = ("-n", "--cores", "1", "--quiet", "--nolock")
            found = _timed(snakemake_command(layers, "paper", *options), folder)
            size = experiment.jobs.shards_per_job
            plan = {"generation_shards": shards, "shards_per_job": size}
            add({"command": "snakemake -n --quiet"} | plan | found)
        bare = folder / "floor"
        bare.mkdir()
        (bare / "Snakefile").write_text(f"JOBS = {shards}\n{FLOOR}")
        (bare / "generate.py").write_text("")
        command = [sys.executable, "-m", "snakemake", *options]
        plan = {"generation_shards": shards, "shards_per_job": 1}
        add({"command": "floor"} | plan | _timed(command, bare))
        shards = record_half_done(experiment, folder)
        program = "from kvguard.cli import app; app()"
        command = [sys.executable, "-c", program, "status"]
        command += [part for layer in layers[1:] for part in ("--config", str(layer))]
        found = _timed(command, folder)
        add({"command": "kvguard status", "generation_shards": shards, "shards_per_job": 1} | found)


# --- the benchmark -------------------------------------------------------------------------------


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--only", choices=("plan", "tables"))
    parser.add_argument("--jobs", type=int, default=GENERATION_JOBS, help="of the large plan")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--targets", nargs="+", choices=schema.TARGETS, default=["harm"])
    parser.add_argument("--max-rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1, help="of XGBoost")
    parser.add_argument("--minutes", type=float, default=120, help="of all sizes together")
    parser.add_argument("--folder", type=Path, help="for the tables; default: a temporary one")
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()

    result: dict[str, Any] = {
        "machine": measuring.machine() | {"polars_threads": pl.thread_pool_size()},
        "targets": arguments.targets,
        "max_rounds": arguments.max_rounds,
        "xgboost_threads": arguments.threads,
        "prompts": {},
        "plans": [],
        "stages": [],
        "growth": [],
    }
    if arguments.only and arguments.target.is_file():  # the other half stays
        earlier = json.loads(arguments.target.read_text())
        plan = arguments.only == "plan"
        anew = {"machine", "plans"} if plan else set(result) - {"plans"}
        result |= {name: entry for name, entry in earlier.items() if name not in anew}

    def add(kind: str, entry: dict[str, Any]) -> None:
        result[kind].append(entry)
        result["growth"] = growth(result["stages"])
        measuring.write(arguments.target, result)
        measuring.say(", ".join(f"{name} {value}" for name, value in entry.items()))

    if arguments.only != "tables":
        measure_plans(lambda entry: add("plans", entry), arguments.jobs)
    if arguments.only == "plan":
        return
    settings = _Settings(arguments.targets, arguments.max_rounds, arguments.threads)
    began, longest, previous = time.perf_counter(), 0.0, 0
    for rows in sorted(arguments.rows):
        started = time.perf_counter()
        expected = longest * rows / previous if previous else 0.0
        if started - began + expected > 60 * arguments.minutes:
            measuring.say(f"{rows:,} rows are left out: the minutes are over")
            break
        folder = Path(tempfile.mkdtemp(prefix="kvguard-scale-", dir=arguments.folder))
        try:
            sweep = make_sweep(folder, rows)
            result["prompts"][str(sweep.rows)] = pl.read_parquet(sweep.prompts).height
            for stage in arguments.stages:
                add("stages", measure_stage(stage, sweep, settings))
        finally:
            shutil.rmtree(folder)
        longest, previous = time.perf_counter() - started, rows


if __name__ == "__main__":
    main()

"""On paper: what the sweep of experiments/paper.yaml needs on one GPU and on 64.

    python benchmarks/sweep.py

Arithmetic, not a measurement: nothing here was run on a GPU. The counts are those of the
configuration; the shapes and rates are those of `scaling`; what else goes in is in `ASSUMED`. Of a
shard with n answers of L tokens behind prompts of P tokens, decoded B at a time,

    step    = max(launches, (weights + B * (P + L / 2) * entry) / HBM rate)
    decode  = (n * L / B + max_new_tokens) * step      the last rows drain for at most an answer
    prefill = n * P * 2 * parameters / FLOP rate
    audit   = n * (P + L) * 2 * parameters / FLOP rate
    start   = imports + weights / min(client rate, file system's rate / GPUs)

The caches are counted uncompressed and the audit as if it read the prompt again: upper bounds. A
job makes ``shards_a_job`` shards (``jobs.shards_per_job``) with one start; a phase has
ceil(jobs / GPUs) waves. Harm is looked for by bisection, ceil(log2 L) rounds of one batch
with L / 2 new tokens. A live policy may decode everything twice. Where results/bench/scale.json is
there, its time a row says how long the tables take, and the fits of all targets and of the search.
Writes results/bench/sweep.json.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from scaling import EFFICIENCY, ENTRY, FLOPS, FLOPS_EFFICIENCY, HBM_RATE, ITEM, PARAMETERS

from kvguard.config import Config, load_config
from kvguard.schema import atomic_path
from kvguard.workflow import PAPER_CONFIG, workflow_folder

TARGET = Path("results/bench/sweep.json")
MEASURED = Path("results/bench/scale.json")
WEIGHTS = PARAMETERS * ITEM
CASES = ((1, 1, 1), (1, 1, 16), (1, 64, 1), (137, 64, 1), (137, 64, 60))
"""Times the prompts of the configuration, GPUs, shards a job; 137 times are 8,768 shards."""
ANSWER_TOKENS = (200, 512)
"""Mean length: of a short chain of thought, and of answers that all run to the limit."""

ASSUMED = {
    "prompt_tokens": 600,  # three examples and a question
    "launch_ms_a_step": 20.0,  # 2,000 kernels of 10 µs each, started one by one
    "harmed_share": 0.2,  # of compressed answers
    "live_decodings": 2,  # a draft, and its replacement
    "import_seconds": 10.0,  # 8 s were seen on a CPU; a CUDA context comes on top
    "client_bytes_per_second": 2e9,  # one job reading weights
    "file_system_bytes_per_second": 10e9,  # all jobs together
    "cpu_threads_speedup": 8,  # of XGBoost on 16 threads
}


class Phase(NamedTuple):
    """Shards of one kind: how many, and seconds of work of each, start-up left out.

    ``loads`` are the ways in which a model is loaded (models, attention): no job mixes two.
    """

    name: str
    jobs: int
    seconds: float
    loads: int = 1

    def blocks(self, shards: int) -> int:
        """Jobs when each makes so many shards."""
        return self.loads * math.ceil(self.jobs / self.loads / shards)


def step_seconds(rows: int, tokens: float) -> float:
    """One decoding step of so many rows that hold so many tokens each."""
    reading = (WEIGHTS + rows * tokens * ENTRY) / (HBM_RATE * EFFICIENCY)
    return max(1e-3 * ASSUMED["launch_ms_a_step"], reading)


def pass_seconds(tokens: float) -> float:
    """A pass over many tokens at once, bound by arithmetic."""
    return tokens * 2 * PARAMETERS / (FLOPS * FLOPS_EFFICIENCY)


def phases(experiment: Config, answer_tokens: int, times: int = 1) -> list[Phase]:
    """The phases on GPUs of a sweep with so many times the configuration's shards."""
    prompt, limit = ASSUMED["prompt_tokens"], experiment.generation.max_new_tokens
    batch = experiment.generation.batch_size
    if not isinstance(batch, int):
        raise ValueError(f"generation.batch_size: a number is needed here, got {batch!r}")
    step = step_seconds(batch, prompt + answer_tokens / 2)
    models, shards = len(experiment.models), len(experiment.shards)

    def decode(answers: float) -> float:
        drafting = (answers * answer_tokens / batch + limit) * step
        return drafting + pass_seconds(answers * prompt)

    prompts = sum(task.num_prompts for task in experiment.tasks)
    answers = prompts / shards
    audit = pass_seconds(answers * (prompt + answer_tokens))
    compressed = len(experiment.conditions) - 1
    harmed = ASSUMED["harmed_share"] * answers
    rounds = math.ceil(math.log2(answer_tokens))
    search = rounds * (
        math.ceil(harmed / batch) * answer_tokens / 2 * step
        + pass_seconds(harmed * (prompt + answer_tokens / 2))
    )
    live_shards = len(experiment.live_shards)
    tested = experiment.splits.test * prompts / live_shards
    live = ASSUMED["live_decodings"] * decode(tested)
    live_jobs = models * len(experiment.live_conditions) * len(experiment.live.policies)
    loads = models * len({press.attention for press in experiment.presses})
    generated = models * len(experiment.conditions) * shards
    found = (
        ("generation", generated, decode(answers) + audit),
        ("harm onsets", models * compressed * shards, search),
        ("live policies", live_jobs * live_shards, live),
    )
    return [Phase(name, times * jobs, seconds, loads) for name, jobs, seconds in found]


def start_seconds(gpus: int) -> float:
    """From the start of a job to its first token, with all GPUs starting at once."""
    shared = ASSUMED["file_system_bytes_per_second"] / gpus
    return ASSUMED["import_seconds"] + WEIGHTS / min(ASSUMED["client_bytes_per_second"], shared)


def on_gpus(found: list[Phase], gpus: int, shards: int = 1) -> dict[str, Any]:
    """Hours of the phases one after the other, and where they go, with so many shards a job."""
    start = start_seconds(gpus)
    minutes = {}
    for phase in found:
        blocks = phase.blocks(shards)
        mean = start + phase.seconds * phase.jobs / blocks
        minutes[f"{phase.name} minutes"] = math.ceil(blocks / gpus) * mean / 60
    jobs = sum(phase.blocks(shards) for phase in found)
    work = sum(phase.jobs * phase.seconds for phase in found)
    return {
        **minutes,
        "hours": sum(minutes.values()) / 60,
        "gpu_hours": (work + jobs * start) / 3600,
        "start_s": start,
        "start_share": jobs * start / (work + jobs * start),
    }


def on_cpu(experiment: Config, answer_tokens: int) -> dict[str, Any]:
    """Minutes of the tables and of all fits, from what `scale` measured a row; None: not known."""
    prompts = sum(task.num_prompts for task in experiment.tasks)
    rows = len(experiment.models) * len(experiment.conditions) * prompts * answer_tokens
    unknown: dict[str, Any] = {"token_rows": rows, "tables_minutes": None, "fits_minutes": None}
    if not MEASURED.is_file():
        return unknown
    measured = json.loads(MEASURED.read_text())
    largest = max((stage["rows"] for stage in measured["stages"]), default=0)
    cost = {s["stage"]: s["us_per_row"] for s in measured["stages"] if s["rows"] == largest}
    if "train_predictor" not in cost:
        return unknown
    settings = experiment.predictor
    # the benchmark fits twice for each of its targets: to choose the rounds, and to keep
    one = cost.pop("train_predictor") * rows / 1e6 / (2 * len(measured["targets"]))
    one *= settings.max_rounds / measured["max_rounds"]
    fits = 2 * len(settings.targets) + settings.search_trials * settings.search_folds
    return {
        "token_rows": rows,
        "tables_minutes": sum(cost.values()) * rows / 1e6 / 60,
        "fits_minutes": fits * one / ASSUMED["cpu_threads_speedup"] / 60,
    }


def main() -> None:
    """Do the arithmetic and write it."""
    layers = [workflow_folder() / name for name in ("config.yaml", PAPER_CONFIG)]
    experiment = load_config(*layers)
    table: list[dict[str, Any]] = []
    jobs: list[dict[str, Any]] = []
    cpu: list[dict[str, Any]] = []
    for answer_tokens in ANSWER_TOKENS:
        found = phases(experiment, answer_tokens)
        for phase in found:
            entry = {"phase": phase.name, "jobs": phase.jobs, "work_s_a_job": phase.seconds}
            jobs.append({"answer_tokens": answer_tokens, **entry})
        for times, gpus, shards in CASES:
            found = phases(experiment, answer_tokens, times)
            entry = {"answer_tokens": answer_tokens, "shards": found[0].jobs}
            entry |= {"gpus": gpus, "shards_a_job": shards}
            table.append(entry | on_gpus(found, gpus, shards))
        cpu.append({"answer_tokens": answer_tokens, **on_cpu(experiment, answer_tokens)})
    result = {"assumed": ASSUMED, "jobs": jobs, "sweep": table, "tables": cpu}
    with atomic_path(TARGET) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

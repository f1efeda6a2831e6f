"""Where the time of a decoding step goes.

    python benchmarks/profile_decode.py [--steps 64] [--threads 2]

SmolLM2 in float32, snapkv at 0.500, gsm_symbolic or GSM8K prompts, batch 1 and 32. Each step takes
the next tokens with their signals (`Session.choose`) and runs the model once (`Session.advance`).
Steps are timed first without, then under torch.profiler; an operator's time is its own (the
operators that it calls count for themselves), on the thread that calls it. The slots grow every 64
entries, so 64 steps hold one growth. Categories of a profiled step, which add up to 1:

- ``matrix_products``: linear and all that it calls: projections, feed-forward, vocabulary;
- ``attention``: bmm, matmul and softmax of the model: scores and mixed values (and the rotary
  angles, one tiny product a step);
- ``cache_and_copies``: index_put_, copy_, cat, clone, index, zeros and fills of the model: writing
  the new entry, masks, rotary halves, layout changes;
- ``other_operators``: every other operator of the model: norms, activations, sums, views;
- ``choice_and_signals``: all of `choose`, operators and Python;
- ``overhead``: the step's seconds less all of these: Python, the dispatcher, the profiler itself.

Writes results/bench/profile_decode.json: per batch size the shares, the step without and with the
profiler in milliseconds, and the operators that take most.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from generation import PRESS, load_embedded, load_experiment
from torch.profiler import ProfilerActivity, profile, record_function

from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.models import LoadedModel
from kvguard.presses import build_press
from kvguard.prompts import load_task
from kvguard.sampling import Decoding

TARGET = Path("results/bench/profile_decode.json")
BATCHES = (1, 32)
CHOICE, PASS = "kvguard::choose", "kvguard::advance"
WARM_UP = 5
MOST = 8
"""Operators listed for each batch size."""

CATEGORIES = {
    "matrix_products": "linear mm addmm mv addmv",
    "attention": "bmm baddbmm matmul softmax _softmax",
    "cache_and_copies": (
        "index_put_ _index_put_impl_ index copy_ cat clone contiguous fill_ zero_ zeros "
        "masked_fill_ masked_fill to _to_copy"
    ),
}
CATEGORY_OF = {f"aten::{op}": name for name, ops in CATEGORIES.items() for op in ops.split()}


def one_step(session: Session) -> float:
    """Seconds of one step; its two halves carry names that the profiler sees."""
    started = time.perf_counter()
    with record_function(CHOICE):
        session.choose()
    with record_function(PASS):
        session.advance()
    return time.perf_counter() - started


def category(event: Any) -> str:
    """What an operator's own time counts for."""
    caller = event
    while caller is not None:
        if caller.name == CHOICE:
            return "choice_and_signals"
        if caller.name == "aten::linear":
            return "matrix_products"
        caller = caller.cpu_parent
    return CATEGORY_OF.get(event.name, "other_operators")


def profile_batch(
    model: LoadedModel, ready: Prepared, rows: int, steps: int
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One batch size: its shares, and the operators that take most."""
    decoding = Decoding(WARM_UP + 2 * steps)  # without end tokens: the batch stays whole
    session = Session(
        model.model, decoding, press=build_press(PRESS, "0.500"), rows=rows, prefix=ready.prefix
    )
    for request in ready.requests[:rows]:
        failed = session.admit(request)
        if failed is not None:
            raise RuntimeError(failed.error)
    for _ in range(WARM_UP):
        one_step(session)
    alone = [one_step(session) for _ in range(steps)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        watched = [one_step(session) for _ in range(steps)]
    spent: Counter[str] = Counter()  # microseconds
    calls: Counter[tuple[str, str]] = Counter()
    by_operator: Counter[tuple[str, str]] = Counter()
    for event in profiler.events() or ():
        if event.name == CHOICE:
            spent["choice_and_signals"] += event.cpu_time_total
        elif event.name.startswith("aten::"):
            kind = category(event)
            if kind != "choice_and_signals":
                spent[kind] += event.self_cpu_time_total
            by_operator[event.name, kind] += event.self_cpu_time_total
            calls[event.name, kind] += 1
    total = sum(watched) * 1e6
    names = (*CATEGORIES, "other_operators", "choice_and_signals")
    shares = {f"{name}_share": spent[name] / total for name in names}
    summary = {
        "batch": rows,
        "step_ms": statistics.median(alone) * 1e3,
        "profiled_step_ms": statistics.median(watched) * 1e3,
        **shares,
        "overhead_share": 1 - sum(shares.values()),
    }
    operators: list[dict[str, object]] = [
        {
            "batch": rows,
            "operator": name,
            "category": kind.replace("_", " "),
            "calls_a_step": calls[name, kind] / steps,
            "own_ms_a_step": microseconds / steps / 1e3,
            "share": microseconds / total,
        }
        for (name, kind), microseconds in by_operator.most_common(MOST)
    ]
    return summary, operators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(max(BATCHES), WARM_UP + 2 * arguments.steps)
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    model = load_embedded(experiment)
    ready = prepare_requests(model, prompts, examples, experiment)
    measured = [profile_batch(model, ready, rows, arguments.steps) for rows in BATCHES]
    result = {
        "task": experiment.tasks[0].name,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "batches": [summary for summary, _ in measured],
        "operators": [operator for _, operators in measured for operator in operators],
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

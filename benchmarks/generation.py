"""The engine against one prompt at a time with ``model.generate``: same tokens, signals and audit.

    python benchmarks/generation.py [--prompts 32] [--max-new-tokens 160] [--gsm8k FOLDER]

Both sides do everything that the experiment needs of a prompt: prefill under the press, greedy
decoding, all signals of every token, the audit by the uncompressed model: the engine's reads the
prompts' parked entries, several answers in one pass, the other's is one pass over prompt and
answer. 2 threads, SmolLM2 in float32, snapkv at 0.500, 3 few-shot turns; GSM8K prompts where its
files are given, else gsm_symbolic. Both alternate in one process: a round is a fixed reference
workload, an engine run of all prompts and a sequential run of one part of them; the parts of all
rounds together are all prompts. Writes results/bench/generation.json after every round, one entry
per task; an entry of another task that is there stays. Per task:

- ``speedup``: sequential seconds over the median of the engine runs; higher is better, goal 12 on
  GSM8K, 7 on gsm_symbolic. Where rounds are missing (`--minutes`), the sequential seconds of the
  prompts that were run, by generated tokens, stand for all;
- ``speedup_spread``: the same over the slowest and over the fastest engine run;
- ``engine_spread``: slowest over fastest engine run, less 1; ``reference_spread``: the same of the
  reference workload; ``engine_spread_in_references``: of engine seconds in units of the references
  before and after them: what is left when the machine's part is taken out;
- ``tokens_identical``: share of prompts whose tokens are the same on both sides;
- ``engine_tokens_per_second``, ``sequential_tokens_per_second``: generated tokens over all seconds;
- ``prefill_seconds``, ``decode_seconds``, ``audit_seconds``: parts of the last engine run;
- ``peak_rss_bytes``: of the process, both sides;
- ``steps``: milliseconds of a full batch's decoding step early and late in the answers, and what
  signals take of it at batch 1 and 32;
- ``scaling``: seconds and memory of a shard ten times as large, batch size unchanged;
- ``bfloat16``: the same comparison of tokens in bfloat16, on fewer prompts.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from measuring import FOLDER, Rounds, machine, reference_seconds, say, spread, write

from kvguard.audit import audit_tokens, teacher_forced
from kvguard.checkpoints import prepare_model
from kvguard.config import Config, Press, load_config
from kvguard.engine import Session, generate
from kvguard.experiment import Prepared, audit_completions, prepare_requests
from kvguard.models import LoadedModel, load_model
from kvguard.presses import build_press
from kvguard.prompts import Example, Prompt, load_task
from kvguard.requests import Completion, Request
from kvguard.sampling import Decoding
from kvguard.signals import extract_signals

T = TypeVar("T")
TARGET = FOLDER / "generation.json"
PRESS = Press.model_validate(
    {"name": "snapkv", "class": "SnapKVPress", "kwargs": {"window_size": 16}, "ratios": ["0.500"]}
)


def load_experiment(prompts: int, max_new_tokens: int, gsm8k: Path | None = None) -> Config:
    """GSM8K from a folder with test.jsonl and train.jsonl, else gsm_symbolic."""
    generation = {"max_new_tokens": max_new_tokens, "batch_size": 32, "shard_size": prompts}
    task: dict[str, Any] = {"kind": "gsm_symbolic", "num_prompts": prompts}
    if gsm8k is not None:
        files = {"test_path": str(gsm8k / "test.jsonl"), "train_path": str(gsm8k / "train.jsonl")}
        task |= {"kind": "gsm8k", **files}
    return load_config("config.yaml", overrides={"generation": generation, "tasks": [task]})


def resized(experiment: Config, prompts: int) -> Config:
    """The experiment's first task alone, with so many prompts."""
    task = experiment.tasks[0].model_copy(update={"num_prompts": prompts, "max_new_tokens": None})
    return experiment.model_copy(update={"tasks": [task]})


def load_embedded(experiment: Config, dtype: str = "float32") -> LoadedModel:
    """The embedded model, prepared on first use."""
    spec = experiment.models[0]
    folder = Path("results/checkpoints") / spec.name
    if not (folder / "config.json").is_file():
        prepare_model(spec, folder)
    return load_model(folder, dtype=dtype, device="cpu", attention="sdpa")


def run_engine(model: LoadedModel, ready: Prepared) -> tuple[dict[str, Completion], float]:
    """All requests through the engine, audited; completions and seconds spent on audits."""
    session = Session(
        model.model,
        ready.decoding,
        press=build_press(PRESS, "0.500"),
        rows=ready.rows,
        prefix=ready.prefix,
        cold="host",
    )
    done: dict[str, Completion] = {}
    audit_seconds = 0.0
    finished = generate(session, ready.requests)
    for completion, _, seconds in audit_completions(model, finished, ready):
        audit_seconds += seconds
        done[completion.request.key] = completion
    return done, audit_seconds


def run_sequential(
    model: LoadedModel, requests: Sequence[Request], decoding: Decoding
) -> dict[str, list[int]]:
    """One prompt at a time, as kvpress's own pipeline works: generated tokens by request."""
    answers = {}
    for request in requests:
        ids = torch.tensor([list(request.prompt_ids)])
        with torch.inference_mode(), build_press(PRESS, "0.500")(model.model):
            generator: Any = model.model
            output = generator.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
                eos_token_id=list(decoding.end_token_ids),
                pad_token_id=decoding.end_token_ids[0],
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[0, ids.shape[1] :]
        extract_signals(torch.cat(output.logits), tokens)
        audit_tokens(model.model, request.prompt_ids, tokens.tolist(), decoding=decoding)
        answers[request.key] = tokens.tolist()
    return answers


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def compare(
    model: LoadedModel,
    prompts: list[Prompt],
    examples: list[Example],
    experiment: Config,
    rounds: Rounds,
    parts: int,
    save: Callable[[dict[str, object]], None],
) -> dict[str, object]:
    """The main comparison: in each round an engine run and a part of the sequential run."""

    def engine() -> tuple[dict[str, Completion], float]:
        return run_engine(model, prepare_requests(model, prompts, examples, experiment))

    ready = prepare_requests(model, prompts, examples, experiment)
    teacher_forced(model.model, ready.requests[0].prompt_ids, [])  # warm up
    seconds: list[float] = []
    sequential: list[float] = []
    references = [reference_seconds()]
    answers: dict[str, list[int]] = {}
    result: dict[str, object] = {}
    for number in rounds:
        (done, audit_seconds), spent = timed(engine)
        seconds.append(spent)
        references.append(reference_seconds())
        say(f"engine run {number}: {spent:.1f} s, reference {references[-1]:.3f} s")
        part = ready.requests[number::parts]
        found, spent = timed(lambda p=part: run_sequential(model, p, ready.decoding))  # type: ignore[misc]
        sequential.append(spent)
        answers |= found
        say(f"sequential, {len(part)} prompts: {spent:.1f} s")
        tokens = sum(len(completion.token_ids) for completion in done.values())
        compared = sum(map(len, answers.values()))
        here = sum(len(done[key].token_ids) for key in answers)
        engine_seconds = statistics.median(seconds)
        sequential_seconds = sum(sequential) * tokens / here
        units = [
            spent / statistics.mean(references[at : at + 2]) for at, spent in enumerate(seconds)
        ]
        same = [done[key].token_ids == answer for key, answer in answers.items()]
        result = {
            "prompts": len(prompts),
            "prompts_run_sequentially": len(answers),
            "generated_tokens": tokens,
            "speedup": sequential_seconds / engine_seconds,
            "speedup_spread": [
                sequential_seconds / max(seconds),
                sequential_seconds / min(seconds),
            ],
            "tokens_identical": sum(same) / len(same),
            "engine_seconds": list(seconds),
            "sequential_seconds": list(sequential),
            "engine_spread": spread(seconds),
            "reference_spread": spread(references),
            "engine_spread_in_references": spread(units),
            "engine_tokens_per_second": tokens / engine_seconds,
            "sequential_tokens_per_second": compared / sum(sequential),
            "prefill_seconds": sum(completion.prefill_seconds for completion in done.values()),
            "decode_seconds": sum(completion.decode_seconds for completion in done.values()),
            "audit_seconds": audit_seconds,
        }
        save(result)
    return result


def step_times(model: LoadedModel, ready: Prepared, rows: int) -> dict[str, float]:
    """Milliseconds of one decoding step of ``rows`` rows: early, late, and the signals' part."""
    endless = Decoding(ready.decoding.max_new_tokens)
    session = Session(
        model.model,
        endless,
        press=build_press(PRESS, "0.500"),
        rows=rows,
        prefix=ready.prefix,
    )
    for request in ready.requests[:rows]:
        session.admit(request)
    seconds = []
    for _ in range(endless.max_new_tokens - 1):
        session.choose()
        _, spent = timed(session.advance)
        seconds.append(spent)
    logits = session.logits[:rows]
    chosen = logits.argmax(dim=1)
    signals = [timed(lambda: extract_signals(logits, chosen))[1] for _ in range(50)]
    tenth = len(seconds) // 10
    early = statistics.median(seconds[tenth : 2 * tenth])
    late = statistics.median(seconds[-tenth:])
    spent = statistics.median(signals)
    return {
        "step_ms_early": early * 1e3,
        "step_ms_late": late * 1e3,
        "signals_ms": spent * 1e3,
        "signals_share": spent / (early + spent),
    }


def scaling(model: LoadedModel, experiment: Config, small: int = 8) -> dict[str, float]:
    """A shard of ``small`` prompts and one ten times as large, ``small`` rows a batch."""
    figures: dict[str, float] = {}
    seconds = {}
    for count in (small, 10 * small):
        generation = experiment.generation.model_copy(
            update={"max_new_tokens": 16, "batch_size": small}
        )
        sized = resized(experiment.model_copy(update={"generation": generation}), count)
        prompts, examples = load_task(sized.tasks[0], sized.seed)
        _, seconds[count] = timed(
            lambda p=prompts, e=examples, s=sized: run_engine(  # type: ignore[misc]
                model, prepare_requests(model, p, e, s)
            )
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures[f"peak_rss_bytes_{count}"] = peak
    figures["time_ratio"] = seconds[10 * small] / seconds[small]
    return figures


def in_bfloat16(
    experiment: Config, prompts: list[Prompt], examples: list[Example]
) -> dict[str, object]:
    """Tokens of engine and sequential run in bfloat16: how often, and from where, they differ."""
    model = load_embedded(experiment, "bfloat16")
    ready = prepare_requests(model, prompts, examples, experiment)
    done, _ = run_engine(model, ready)
    answers = run_sequential(model, ready.requests, ready.decoding)
    same = [done[key].token_ids == answer for key, answer in answers.items()]
    firsts = [
        next(i for i, (a, b) in enumerate(zip(done[key].token_ids, answer, strict=False)) if a != b)
        for key, answer in answers.items()
        if done[key].token_ids[: len(answer)] != answer[: len(done[key].token_ids)]
    ]
    return {
        "prompts": len(prompts),
        "tokens_identical": sum(same) / len(same),
        "median_first_difference": statistics.median(firsts) if firsts else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--parts", type=int, help="more than rounds: some are not run sequentially")
    parser.add_argument("--gsm8k", type=Path, help="folder with test.jsonl and train.jsonl")
    parser.add_argument("--only-compare", action="store_true", help="leave the other parts out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30, help="of the comparison")
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.prompts, arguments.max_new_tokens, arguments.gsm8k)
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    model = load_embedded(experiment)
    before = machine()

    def save(result: dict[str, object]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
        mine = {**result, "peak_rss_bytes": peak, "machine": before}
        write(arguments.output, {**whole, experiment.tasks[0].name: mine})

    rounds = Rounds(arguments.runs, arguments.minutes)
    parts = arguments.parts or arguments.runs
    result = compare(model, prompts, examples, experiment, rounds, parts, save)
    if not arguments.only_compare:
        ready = prepare_requests(model, prompts, examples, experiment)
        result["steps"] = {str(rows): step_times(model, ready, rows) for rows in (1, 32)}
        save(result)
        result["scaling"] = scaling(model, experiment)
        save(result)
        result["bfloat16"] = in_bfloat16(experiment, prompts[:8], examples)
        save(result)
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()

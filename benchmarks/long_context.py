"""Long prompts: lossless decoding and the guard beside never compressing, same engine, same batch.

    python benchmarks/long_context.py [--tokens 4096] [--requests 8] [--max-new-tokens 128]

SmolLM2 in float32, snapkv at 0.750, 2 threads. The requests are word problems behind one long
context of worked examples, which is prefilled once for all of them; every row has a cache of its
own. End tokens are off, so that every policy makes as many tokens. Writes
results/bench/long_context.json:

- ``policies``: per policy device byte-steps of all requests, the batch's peak, host byte-steps and
  bytes moved, decoding seconds (checks included, prefill not) and tokens per second, checks,
  tokens wasted, and the share of requests with the uncompressed tokens;
- ``ratios``: per policy ``device_byte_steps`` (goals: lossless 0.5, guard 0.4) and
  ``tokens_per_second`` (goals: 1.0, 1.3) over those of ``always_safe``, never compressing;
- ``acceptance``: by press, ratio, context and horizon m of lossless decoding, the share of drafted
  tokens that a check accepts, tokens per check, and ``tokens_per_rejection``, how many the
  compressed cache drafts until one is rejected.
"""

import argparse
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generation import load_embedded

from kvguard.config import Config, Live, Press, load_config
from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.guard import RULES_POINTS
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_report import RowReport
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import rules_predictor
from kvguard.presses import build_press
from kvguard.prompts import format_prompt, load_task
from kvguard.requests import Completion
from kvguard.sampling import Decoding

TARGET = Path("results/bench/long_context.json")
PRESSES = {
    "snapkv": {"class": "SnapKVPress", "kwargs": {"window_size": 16}},
    "knorm": {"class": "KnormPress", "kwargs": {}},
    "streaming_llm": {"class": "StreamingLLMPress", "kwargs": {}},
    "expected_attention": {"class": "ExpectedAttentionPress", "kwargs": {}},
}
Run = tuple[list[Completion], list[RowReport]]


def prepare(
    model: LoadedModel, experiment: Config, tokens: int, requests: int, new_tokens: int
) -> Prepared:
    """Requests whose prompts have at most, and nearly, so many tokens; their context is shared."""
    task = experiment.tasks[0].model_copy(
        update={"num_prompts": requests, "max_new_tokens": None, "few_shot": tokens // 60}
    )
    prompts, examples = load_task(task, experiment.seed)

    def longest(count: int) -> int:
        turns = examples[:count]
        return max(
            len(format_prompt(model.tokenizer, prompt.question, turns)) for prompt in prompts
        )

    count = 1
    while count < len(examples) and longest(count + 1) <= tokens:
        count += 1
    generation = experiment.generation.model_copy(
        update={"max_new_tokens": new_tokens, "batch_size": requests}
    )
    sized = experiment.model_copy(update={"tasks": [task], "generation": generation})
    ready = prepare_requests(model, prompts, examples[:count], sized)
    return ready._replace(decoding=Decoding(new_tokens))


def press_of(name: str) -> Press:
    """A press of the table above."""
    return Press.model_validate({"name": name, "ratios": ["0.500"], **PRESSES[name]})


def run(
    model: LoadedModel, ready: Prepared, policy: str, press: str, ratio: str, every: int
) -> Run:
    """All requests in one batch under a policy, in the requests' order."""
    decoding = ready.decoding
    checks = policy not in ("none", "always_safe")
    session = Session(
        model.model,
        decoding,
        press=build_press(press_of(press), ratio),
        rows=ready.rows,
        prefix=ready.prefix,
        cold="host" if checks else "none",
    )
    decider = make_policy(
        policy,
        ready.rows,
        max_new_tokens=decoding.max_new_tokens,
        live=Live(lossless_tokens=every),
        controller=RULES_POINTS["balanced"],
        check_every_tokens=8,
    )
    observer = GuardObserver(
        session,
        decider,
        predictor=rules_predictor(),
        ratio=float(ratio),
        check_every_tokens=8,
        released=None,
    )
    done = {
        completion.request.key: (completion, report)
        for completion, report in guarded(session, ready.requests, observer)
    }
    pairs = [done[request.key] for request in ready.requests]
    failed = [completion.error for completion, _ in pairs if completion.error is not None]
    if failed:
        raise RuntimeError(f"{policy} {press} {ratio}: {failed[0]}")
    return [completion for completion, _ in pairs], [report for _, report in pairs]


def costs(completions: Sequence[Completion], truth: Sequence[Completion]) -> dict[str, float]:
    """What a policy cost, all requests together."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    seconds = sum(completion.decode_seconds for completion in completions)
    same = [one.token_ids == other.token_ids for one, other in zip(completions, truth, strict=True)]
    return {
        "device_byte_steps": sum(completion.device_byte_steps for completion in completions),
        "device_bytes_peak": max(completion.device_bytes_peak for completion in completions),
        "host_byte_steps": sum(completion.host_byte_steps for completion in completions),
        "bytes_moved": sum(completion.bytes_moved for completion in completions),
        "prefill_seconds": sum(completion.prefill_seconds for completion in completions),
        "decode_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "checks": sum(completion.checks for completion in completions),
        "tokens_wasted": sum(completion.tokens_wasted for completion in completions),
        "tokens_identical": sum(same) / len(same),
    }


def acceptance(reports: Sequence[RowReport]) -> dict[str, float | None]:
    """How far drafts get: from the lengths at which checks came, and what each kept."""
    accepted = drafted = rejections = checks = 0
    for report in reports:
        before = 0
        for at, kept in zip(report.alarm_steps, report.rewound_to, strict=True):
            drafted += at - before
            accepted += kept - before
            rejections += kept < at
            checks += 1
            before = kept
    return {
        "accepted_share": accepted / drafted if drafted else None,
        "tokens_per_check": accepted / checks if checks else None,
        "tokens_per_rejection": accepted / rejections if rejections else None,
        "checks": checks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ratio", default="0.750")
    parser.add_argument("--every", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--presses", nargs="*", default=list(PRESSES))
    parser.add_argument("--ratios", nargs="*", default=["0.500", "0.750"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_config("config.yaml")
    model = load_embedded(experiment)
    size = (arguments.requests, arguments.max_new_tokens)
    ready = prepare(model, experiment, arguments.tokens, *size)
    result: dict[str, Any] = {
        "prompt_tokens": [len(request.prompt_ids) for request in ready.requests],
        "max_new_tokens": arguments.max_new_tokens,
        "press": "snapkv",
        "ratio": arguments.ratio,
        "policies": {},
        "ratios": {},
        "acceptance": [],
    }

    def note(reports: Sequence[RowReport], press: str, ratio: str, tokens: int, m: int) -> None:
        keys = {"press": press, "ratio": ratio, "prompt_tokens": tokens, "m": m}
        result["acceptance"].append(keys | acceptance(reports))

    plans = [("always_safe", 0), ("none", 0), ("guard", 0)]
    plans += [("lossless", every) for every in arguments.every]
    truth: list[Completion] = []
    for policy, every in plans:
        done, reports = run(model, ready, policy, "snapkv", arguments.ratio, every or 1)
        truth = truth or done
        name = f"lossless_{every}" if every else policy
        result["policies"][name] = costs(done, truth)
        if every:
            note(reports, "snapkv", arguments.ratio, arguments.tokens, every)
        print(name, json.dumps(result["policies"][name]), flush=True)
    baseline = result["policies"]["always_safe"]
    for name, values in result["policies"].items():
        result["ratios"][name] = {
            column: values[column] / baseline[column]
            for column in ("device_byte_steps", "device_bytes_peak", "tokens_per_second")
        }
    for tokens in arguments.contexts:
        few = prepare(model, experiment, tokens, 4, arguments.max_new_tokens // 2)
        for press in arguments.presses:
            for ratio in arguments.ratios:
                _, reports = run(model, few, "lossless", press, ratio, 16)
                note(reports, press, ratio, tokens, 16)
                print(json.dumps(result["acceptance"][-1]), flush=True)
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()

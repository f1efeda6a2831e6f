"""Long prompts: lossless decoding and the guard beside never compressing, same engine, same batch.

    python benchmarks/long_context.py [--tokens 4096] [--requests 8] [--max-new-tokens 128]
        [--rounds 3] [--minutes 20] [--alone] [--policies always_safe lossless_auto_bus]

SmolLM2 in float32, snapkv at 0.750, 2 threads. The requests are word problems behind one long
context of worked examples, which is prefilled once for all of them; every row has a cache of its
own. With ``--alone`` each request's context is prefilled, parked and read as its own. End tokens
are off, so that every policy makes as many tokens. All policies run in turn in one process, round
by round; seconds are medians over the rounds. Writes results/bench/long_context.json after every
policy:

- ``policies``: per policy device byte-steps of all requests, the batch's peak, host byte-steps and
  bytes moved, decoding seconds (checks included, prefill not) and tokens per second, checks,
  tokens wasted, and the share of requests with the uncompressed tokens; ``lossless_16`` checks
  every 16 tokens, ``lossless_auto`` when the draft is no longer worth going on with, at the prices
  of this machine or (``_bus``) as if device memory were ``--bus-ratio`` times as fast as the bus;
  ``guard_price_bus`` checks what is worth it at the default price of harm and without probes;
- ``ratios``: per policy ``device_byte_steps`` (goals: lossless 0.5, guard 0.4) and
  ``tokens_per_second`` (goals: 1.0, 1.3) over those of ``always_safe``, never compressing; of the
  latter also each round's own, slowest first (``tokens_per_second_rounds``). ``bus_traffic_ratio``:
  bytes moved over those of offloading (`costs.offload_traffic`), where every row reads its own
  whole cache; ``bus_traffic_shared_ratio``: over those of an offloading that reads the shared
  context once a step for all rows, as checks do.

How far drafts get is another script's: acceptance.py.
"""

import argparse
import json
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generation import load_embedded, load_experiment
from measuring import FOLDER, Rounds, machine, say, write

from kvguard.config import Config, Live, Press
from kvguard.costs import offload_traffic
from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_predictor import RULES_POINTS
from kvguard.guard_report import RowReport
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import rules_predictor
from kvguard.presses import build_press
from kvguard.prompts import format_prompt, load_task
from kvguard.requests import Completion
from kvguard.sampling import Decoding

TARGET = FOLDER / "long_context.json"
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
    model: LoadedModel,
    ready: Prepared,
    policy: str,
    press: str,
    ratio: str,
    every: int,
    bus_ratio: float | None = None,
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
        bus_ratio=bus_ratio,
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


def offloading(
    model: LoadedModel, ready: Prepared, truth: Sequence[Completion]
) -> dict[str, float]:
    """Bytes that offloading the uncompressed cache would move for the same answers."""
    settings = model.model.config
    heads = settings.num_key_value_heads * settings.hidden_size // settings.num_attention_heads
    entry = 2 * settings.num_hidden_layers * heads * model.model.dtype.itemsize
    prompts = [len(completion.request.prompt_ids) for completion in truth]
    steps = [len(completion.token_ids) - 1 for completion in truth]
    alone = sum(
        offload_traffic(float(prompt), float(count), float(prompt * entry))
        for prompt, count in zip(prompts, steps, strict=True)
    )
    shared = 0 if ready.prefix is None else len(ready.prefix.token_ids)
    spared = shared * entry * (sum(steps) - max(steps))
    return {"bytes_moved": alone, "bytes_moved_shared": alone - spared}


def middle(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each cost; bytes, checks and tokens are the same in every round."""
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}


def ratios(
    rounds: dict[str, list[dict[str, float]]], offloaded: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Every policy's costs over those of never compressing, its bytes over offloading's."""
    medians = {name: middle(runs) for name, runs in rounds.items()}
    full = medians["always_safe"]
    found: dict[str, dict[str, Any]] = {}
    for name, values in medians.items():
        columns = ("device_byte_steps", "device_bytes_peak", "tokens_per_second")
        each = [
            one["tokens_per_second"] / other["tokens_per_second"]
            for one, other in zip(rounds[name], rounds["always_safe"], strict=False)
        ]
        found[name] = {
            **{f"{column}_ratio": values[column] / full[column] for column in columns},
            "tokens_per_second_ratio_rounds": sorted(each),
            "bus_traffic_ratio": values["bytes_moved"] / offloaded["bytes_moved"],
            "bus_traffic_shared_ratio": values["bytes_moved"] / offloaded["bytes_moved_shared"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ratio", default="0.750")
    parser.add_argument("--every", type=int, nargs="*", default=[16], help="lossless horizons")
    parser.add_argument("--bus-ratio", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="the context is each request's own")
    parser.add_argument("--policies", nargs="+", help="of those below, always_safe among them")
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.requests, arguments.max_new_tokens)
    model = load_embedded(experiment)
    size = (arguments.requests, arguments.max_new_tokens)
    ready = prepare(model, experiment, arguments.tokens, *size)
    if arguments.alone:
        ready = ready._replace(prefix=None)
    result: dict[str, Any] = {
        "prompt_tokens": [len(request.prompt_ids) for request in ready.requests],
        "max_new_tokens": arguments.max_new_tokens,
        "press": "snapkv",
        "ratio": arguments.ratio,
        "bus_ratio": arguments.bus_ratio,
        "machine": machine(),
    }
    plans = [("always_safe", "always_safe", 0, None), ("guard", "guard", 0, None)]
    plans += [(f"lossless_{every}", "lossless", every, None) for every in arguments.every]
    plans += [("lossless_auto", "lossless_auto", 0, None), ("none", "none", 0, None)]
    plans += [
        (f"{policy}_bus", policy, 0, arguments.bus_ratio)
        for policy in ("lossless_auto", "guard_price")
    ]
    plans = [plan for plan in plans if plan[0] in (arguments.policies or [plan[0]])]
    truth: list[Completion] = []
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in Rounds(arguments.rounds, arguments.minutes):
        for name, policy, every, bus in plans:
            done, _ = run(model, ready, policy, "snapkv", arguments.ratio, every or 1, bus)
            truth = truth or done
            rounds.setdefault(name, []).append(costs(done, truth))
            newest = rounds[name][-1]
            say(
                f"round {number} {name}: decoding {newest['decode_seconds']:.1f} s, "
                f"{newest['checks']:.0f} checks"
            )
            result["rounds"] = len(rounds["always_safe"])
            result["policies"] = {key: middle(runs) for key, runs in rounds.items()}
            offloaded = offloading(model, ready, truth)
            result["ratios"] = ratios(rounds, offloaded)
            result["offloading"] = offloaded
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result["peak_rss_bytes"] = peak
            write(arguments.output, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()

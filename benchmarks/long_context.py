"""Long prompts: lossless decoding and the guard beside never compressing, same engine, same batch.

    python benchmarks/long_context.py [--tokens 4096] [--requests 8] [--max-new-tokens 128]
        [--rounds 3] [--minutes 20] [--shared] [--policies always_safe lossless_auto_bus]

SmolLM2 in float32, snapkv at 0.750, 2 threads. The requests are word problems behind one long
context of worked examples. It is prefilled once; then every row holds, parks and reads it as a
context of its own. With ``--shared`` it stays one context: all rows refer to one copy of it and the
press works on what follows it (`kvguard.shared_prefix`), it is parked once, and a check reads it
once for all its rows. End tokens are off, so that every policy makes as many tokens. All policies
run in turn in one process, round by round; seconds are medians over the rounds. Writes
results/bench/long_context.json, or long_context_shared.json, after every policy:

- ``policies``: per policy device byte-steps of all requests, the batch's peak, host byte-steps and
  bytes moved, decoding seconds (checks included, prefill not) and tokens per second, checks,
  tokens wasted, and the share of requests with the uncompressed tokens; ``lossless_16`` checks
  every 16 tokens, ``lossless_auto`` when the draft is no longer worth going on with, at the prices
  of this machine or (``_bus``) as if device memory were ``--bus-ratio`` times as fast as the bus;
  ``guard_price`` checks what is worth it at the default price of harm, ``guard_price_10`` at a
  tenth of it, without probes. With ``--shared`` also, as ``..._whole``, policies whose press works
  on the whole prompt while rows with the full cache still share, and ``always_safe_copies``, which
  never compresses and holds a copy of the context in every row;
- ``ratios``: per policy ``device_byte_steps`` (goals: lossless 0.5, guard 0.4) and
  ``tokens_per_second`` (goals: 1.0, 1.3) over those of ``always_safe``, never compressing; of the
  latter also each round's own, slowest first (``tokens_per_second_rounds``). ``bus_traffic_ratio``:
  bytes moved over those of offloading (`costs.offload_traffic`), which with ``--shared`` reads the
  shared context once a step for all rows, as checks do.

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

from kvguard.cold_cache import ColdRow, ColdStore
from kvguard.config import Config, Live, Press
from kvguard.config_policies import Sharing
from kvguard.costs import offload_traffic
from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.guard_observer import GuardObserver, guarded
from kvguard.guard_predictor import RULES_POINTS
from kvguard.guard_report import RowReport
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import rules_predictor
from kvguard.prefill import Prefix, layer_tensors
from kvguard.presses import build_press
from kvguard.prompts import format_prompt, load_task
from kvguard.requests import Completion
from kvguard.sampling import Decoding

TARGETS = {False: FOLDER / "long_context.json", True: FOLDER / "long_context_shared.json"}
PRICES = (10.0,)
"""Of harm, beside the default of `guard_price`."""
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


class OwnContexts(ColdStore):
    """Parks a reused prefix again in every row, as if it were the row's own."""

    def row(self, prefix: Prefix | None, tokens: int) -> ColdRow:
        """Room for a prompt, the prefix in it."""
        count = 0 if prefix is None else len(prefix.token_ids)
        prompt = self.allocate(count + tokens)
        prompt.tokens = count + tokens
        for layer, pair in enumerate([] if prefix is None else layer_tensors(prefix.cache)):
            for kind, entries in enumerate(pair):
                self.copy_out(prompt.entries[layer, kind, :count], entries[0].transpose(0, 1))
        return OwnContext(self, None, prompt)


class OwnContext(ColdRow):
    """A row of `OwnContexts`."""

    def park(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy out what follows the prefix, which is there."""
        start = self.prompt.tokens - keys.shape[1]
        for kind, entries in enumerate((keys, values)):
            self.store.copy_out(self.prompt.entries[layer, kind, start:], entries.transpose(0, 1))


def run(
    model: LoadedModel,
    ready: Prepared,
    policy: str,
    press: str,
    ratio: str,
    every: int,
    bus_ratio: float | None = None,
    *,
    shared: bool = True,
    sharing: Sharing = "none",
    harm_price: float | None = None,
) -> Run:
    """All requests in one batch under a policy, in the requests' order.

    Args:
        model: a loaded model.
        ready: the requests.
        policy: see `config.POLICY_NAMES`.
        press: one of `PRESSES`.
        ratio: its ratio.
        every: tokens between checks of ``lossless``.
        bus_ratio: see `checks.check_prices`.
        shared: the parked context is one; otherwise every row parks and reads its own.
        sharing: which rows refer to one copy of it.
        harm_price: of ``guard_price``; None: its default.
    """
    decoding = ready.decoding
    checks = policy not in ("none", "always_safe")
    session = Session(
        model.model,
        decoding,
        press=build_press(press_of(press), ratio),
        rows=ready.rows,
        prefix=ready.prefix,
        cold="host" if checks else "none",
        sharing=sharing,
    )
    if session.store is not None and not shared:
        loaded = model.model
        session.store = OwnContexts(loaded.config, device=loaded.device, dtype=loaded.dtype)
    live = Live(lossless_tokens=every)
    if harm_price is not None:
        live = live.model_copy(update={"harm_price": harm_price})
    decider = make_policy(
        policy,
        ready.rows,
        max_new_tokens=decoding.max_new_tokens,
        live=live,
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
        "decode_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "checks": sum(completion.checks for completion in completions),
        "tokens_wasted": sum(completion.tokens_wasted for completion in completions),
        "tokens_identical": sum(same) / len(same),
    }


def offloading(model: LoadedModel, prefix_tokens: int, truth: Sequence[Completion]) -> float:
    """Bytes that offloading the uncompressed cache would move for the same answers.

    Args:
        model: a loaded model.
        prefix_tokens: what the prompts share, read once a step; 0: each has its own.
        truth: the uncompressed answers.
    """
    settings = model.model.config
    heads = settings.num_key_value_heads * settings.hidden_size // settings.num_attention_heads
    entry = 2 * settings.num_hidden_layers * heads * model.model.dtype.itemsize
    prompts = [len(completion.request.prompt_ids) for completion in truth]
    steps = [len(completion.token_ids) - 1 for completion in truth]
    alone = sum(
        offload_traffic(float(prompt), float(count), float(prompt * entry))
        for prompt, count in zip(prompts, steps, strict=True)
    )
    return float(alone - prefix_tokens * entry * (sum(steps) - max(steps)))


def middle(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each cost; bytes, checks and tokens are the same in every round."""
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}


def ratios(
    rounds: dict[str, list[dict[str, float]]], offloaded: float
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
            "bus_traffic_ratio": values["bytes_moved"] / offloaded,
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
    parser.add_argument("--shared", action="store_true", help="the context stays one for all")
    parser.add_argument("--policies", nargs="+", help="of those above, always_safe among them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared, bus = arguments.shared, arguments.bus_ratio
    output = arguments.output or TARGETS[shared]
    experiment = load_experiment(arguments.requests, arguments.max_new_tokens)
    model = load_embedded(experiment)
    size = (arguments.requests, arguments.max_new_tokens)
    ready = prepare(model, experiment, arguments.tokens, *size)
    assert ready.prefix is not None
    result: dict[str, Any] = {
        "prompt_tokens": [len(request.prompt_ids) for request in ready.requests],
        "shared_tokens": len(ready.prefix.token_ids) if shared else 0,
        "max_new_tokens": arguments.max_new_tokens,
        "press": "snapkv",
        "ratio": arguments.ratio,
        "bus_ratio": bus,
        "machine": machine(),
    }
    plans: dict[str, dict[str, Any]] = {"always_safe": {"policy": "always_safe"}}
    if shared:
        plans["always_safe_copies"] = {"policy": "always_safe", "sharing": "none"}
    plans["guard"] = {"policy": "guard"}
    plans |= {
        f"lossless_{every}": {"policy": "lossless", "every": every} for every in arguments.every
    }
    plans |= {"lossless_auto": {"policy": "lossless_auto"}, "none": {"policy": "none"}}
    plans["guard_price"] = {"policy": "guard_price"}
    plans |= {
        f"guard_price_{price:g}": {"policy": "guard_price", "harm_price": price} for price in PRICES
    }
    plans |= {
        f"{policy}_bus": {"policy": policy, "bus_ratio": bus}
        for policy in ("lossless_auto", "guard_price")
    }
    if shared:
        plans |= {
            f"{policy}_whole": {"policy": policy, "sharing": "full"}
            for policy in ("none", "lossless_auto", "guard_price")
        }
    plans = {
        name: {"every": 1, "shared": shared, "sharing": "all" if shared else "none"} | plan
        for name, plan in plans.items()
        if name in (arguments.policies or [name])
    }
    truth: list[Completion] = []
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in Rounds(arguments.rounds, arguments.minutes):
        for name, plan in plans.items():
            done, _ = run(model, ready, press="snapkv", ratio=arguments.ratio, **plan)
            truth = truth or done
            rounds.setdefault(name, []).append(costs(done, truth))
            newest = rounds[name][-1]
            say(
                f"round {number} {name}: decoding {newest['decode_seconds']:.1f} s, "
                f"{newest['checks']:.0f} checks"
            )
            result["rounds"] = len(rounds["always_safe"])
            result["policies"] = {key: middle(runs) for key, runs in rounds.items()}
            offloaded = offloading(model, result["shared_tokens"], truth)
            result["ratios"] = ratios(rounds, offloaded)
            result["offloading_bytes_moved"] = offloaded
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result["peak_rss_bytes"] = peak
            write(output, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()

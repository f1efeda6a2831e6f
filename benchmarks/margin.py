"""How far apart ties and rejections lie: what the margin of a verification must separate.

    python benchmarks/margin.py [--prompts 16] [--max-new-tokens 96] [--threads 2]

A drafted token is rejected where its audit gap (nats below the uncompressed model's best token, one
teacher-forced pass) exceeds ``margin_nats``. Two kinds of gaps are measured on SmolLM2, greedy, in
float32 and bfloat16:

- ``own_answers``: the uncompressed model's own tokens, decoded step by step in one batch. In exact
  arithmetic every gap is 0; what is left is rounding: another order of summation in a batch than
  in one pass. ``rejected``: gaps above the default margin, false alarms of a verification.
  ``..._logprob_difference_nats``: of a token's log-probability between the two, largest and mean:
  the size of that rounding whether or not it turns a choice;
- ``divergences``: answers under snapkv at 0.500, at the first token that differs from the
  uncompressed batch's: a difference that verification should reject. ``below_largest_own``: gaps
  that do not stand out from rounding; ``missed``: gaps within the default margin;
  ``found_there``: share of the diverged requests whose first rejected token is this one.

A margin between the largest own gap and the smallest gap of a divergence separates the two; where
they overlap, a tie may be resolved either way and the guarantee of a rewind is up to ties.
Writes results/bench/margin.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from generation import PRESS, load_embedded, load_experiment

from kvguard.audit import Audit, audit_tokens, first_rejected
from kvguard.config import Config
from kvguard.engine import Session, generate
from kvguard.experiment import Prepared, prepare_requests
from kvguard.models import LoadedModel
from kvguard.presses import build_press
from kvguard.prompts import load_task
from kvguard.requests import Completion
from kvguard.signals import SIGNAL_INDEX

TARGET = Path("results/bench/margin.json")
DTYPES = ("float32", "bfloat16")


def decode(model: LoadedModel, ready: Prepared, compressed: bool) -> dict[str, Completion]:
    """All requests in one batch, by request."""
    session = Session(
        model.model,
        ready.decoding,
        press=build_press(PRESS, "0.500") if compressed else None,
        rows=len(ready.requests),
        prefix=ready.prefix,
    )
    done = {completion.request.key: completion for completion in generate(session, ready.requests)}
    for completion in done.values():
        if completion.error is not None:
            raise RuntimeError(completion.error)
    return done


def judge(model: LoadedModel, ready: Prepared, completion: Completion) -> Audit:
    """The uncompressed model's audit of one answer."""
    return audit_tokens(
        model.model,
        completion.request.prompt_ids,
        completion.token_ids,
        decoding=ready.decoding,
        prefix=ready.prefix,
    )


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first token that differs; None where one is a prefix of the other."""
    shared = min(len(left), len(right))
    different = np.flatnonzero(np.array(left[:shared]) != np.array(right[:shared]))
    return int(different[0]) if len(different) else None


def measure(
    experiment: Config, dtype: str, margin_nats: float
) -> tuple[dict[str, object], dict[str, object]]:
    """Own gaps and gaps at divergences in one dtype."""
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    model = load_embedded(experiment, dtype)
    ready = prepare_requests(model, prompts, examples, experiment)
    own = decode(model, ready, compressed=False)
    audits = {key: judge(model, ready, completion) for key, completion in own.items()}
    gaps = np.concatenate([audit.gap for audit in audits.values()])
    column = SIGNAL_INDEX["chosen_logprob"]
    rounding = np.abs(
        np.concatenate([own[key].signals[:, column] - audits[key].logprob for key in own])
    )
    largest = float(gaps.max())
    at_divergence = []
    found = []
    for key, completion in decode(model, ready, compressed=True).items():
        place = first_difference(completion.token_ids, own[key].token_ids)
        if place is not None:
            audit = judge(model, ready, completion)
            at_divergence.append(float(audit.gap[place]))
            found.append(first_rejected(audit.gap, margin_nats) == place)
    diverged = np.array(at_divergence)
    return (
        {
            "dtype": dtype,
            "tokens": len(gaps),
            "largest_gap_nats": largest,
            "gap_nats_p999": float(np.quantile(gaps, 0.999)),
            "largest_logprob_difference_nats": float(rounding.max()),
            "mean_logprob_difference_nats": float(rounding.mean()),
            "above_zero": int((gaps > 0).sum()),
            "rejected": int((gaps > margin_nats).sum()),
        },
        {
            "dtype": dtype,
            "requests": len(own),
            "diverged": len(diverged),
            "smallest_gap_nats": float(diverged.min()) if len(diverged) else None,
            "median_gap_nats": float(np.median(diverged)) if len(diverged) else None,
            "below_largest_own": int((diverged <= largest).sum()),
            "missed": int((diverged <= margin_nats).sum()),
            "found_there_share": float(np.mean(found)) if found else None,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.prompts, arguments.max_new_tokens)
    margin_nats = experiment.guard.margin_nats
    measured = [measure(experiment, dtype, margin_nats) for dtype in DTYPES]
    result = {
        "task": experiment.tasks[0].name,
        "prompts": arguments.prompts,
        "max_new_tokens": arguments.max_new_tokens,
        "default_margin_nats": margin_nats,
        "own_answers": [own for own, _ in measured],
        "divergences": [divergences for _, divergences in measured],
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What the guard costs per decoding step without a check; a check is measured by check.py.

    python benchmarks/guard.py [--predictor results/models/hazard_predictor.json]

SmolLM2 in float32, snapkv at 0.500, 2 threads. A step's guard work is everything beyond the model's
pass and the argmax: signals, features, predictor, controller, bookkeeping. It is timed in the same
loop as the pass, step by step. The guard decides every ``check_every_tokens`` tokens, so a step's
cost is the mean over the steps from one decision to the next; percentiles are over these.
Writes results/bench/guard.json:

- ``overhead``: per batch size with the default ``check_every_tokens``, microseconds of guard work a
  step (``p50_us``, ``p99_us``), the unguarded step (``step_us``), ``share_p50`` and ``share_p99``
  of it, goals 0.01 and 0.03, and the longest single step's work (``longest_step_us``, median over
  decisions);
- ``overhead_every_token``: the same where the guard decides at every token;
- ``parts``: per batch size, mean microseconds a step of signals (at batch 32 with the choice of the
  token, beyond the argmax alone), features, predictor, controller, choosing beyond the argmax
  (history, end tokens) and the rest of watching, in a session of its own with a clock around each.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from generation import PRESS, load_embedded, load_experiment

from kvguard import engine, logits_buffers
from kvguard.config import GuardSettings, OperatingPoint
from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.guard_observer import GuardObserver, HazardModel
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import load_predictor, rules_predictor
from kvguard.presses import build_press
from kvguard.prompts import load_task
from kvguard.sampling import Decoding
from kvguard.signals import extract_signals, peaks

TARGET = Path("results/bench/guard.json")
NEVER = OperatingPoint(tau_low=0.999998, tau_high=0.999999, k=1000, j=1)
STEPS = 168
WARM_UP = 8
SESSIONS = {1: 5, 32: 3}
"""Sessions timed per batch size: the 99th percentile needs more decisions than one session has."""


def start(
    model: LoadedModel, ready: Prepared, rows: int, predictor: HazardModel, every: int
) -> tuple[Session, GuardObserver]:
    """A session of ``rows`` admitted rows under a guard that never alarms."""
    decoding = Decoding(STEPS + 1)
    session = Session(
        model.model, decoding, press=build_press(PRESS, "0.500"), rows=rows, prefix=ready.prefix
    )
    policy = make_policy("guard_promote", rows, max_new_tokens=STEPS + 1, controller=NEVER)
    observer = GuardObserver(
        session, policy, predictor=predictor, ratio=0.5, check_every_tokens=every
    )
    for request in ready.requests[:rows]:
        session.admit(request)
        observer.admitted(session, session.active - 1)
    return session, observer


class Timing(NamedTuple):
    """Seconds of each step of one session."""

    guard: list[float]
    bare: list[float]
    choose: list[float]  # those of `guard` that `Session.choose` took
    argmax: list[float]  # of the logits alone, a part of `bare`


def time_steps(session: Session, observer: GuardObserver) -> Timing:
    """Decode to the end, guard work and model's pass in turn; the argmax counts as the model's."""
    timing = Timing([], [], [], [])
    rows = session.active
    for _ in range(STEPS):
        began = time.perf_counter()
        peaks(session.logits[:rows])[1].cpu()
        argmax_seconds = time.perf_counter() - began
        began = time.perf_counter()
        step = session.choose()
        chosen = time.perf_counter()
        observer.observe(session, step)
        ended = time.perf_counter()
        session.advance()
        timing.bare.append(time.perf_counter() - ended + argmax_seconds)
        timing.guard.append(ended - began - argmax_seconds)
        timing.choose.append(chosen - began - argmax_seconds)
        timing.argmax.append(argmax_seconds)
    return timing


def overhead(
    model: LoadedModel, ready: Prepared, rows: int, predictor: HazardModel, every: int
) -> dict[str, float]:
    """Guard work of a step against the step without it."""
    spent, bare = [], []
    for _ in range(SESSIONS[rows]):
        timing = time_steps(*start(model, ready, rows, predictor, every))
        spent.append(np.array(timing.guard[WARM_UP:]).reshape(-1, every))  # a row per decision
        bare += timing.bare[WARM_UP:]
    step_seconds = statistics.median(bare)
    intervals = np.concatenate(spent)
    p50, p99 = np.percentile(intervals.mean(axis=1), [50, 99])
    return {
        "check_every_tokens": every,
        "longest_step_us": float(np.median(intervals.max(axis=1))) * 1e6,
        "p50_us": p50 * 1e6,
        "p99_us": p99 * 1e6,
        "step_us": step_seconds * 1e6,
        "share_p50": p50 / step_seconds,
        "share_p99": p99 / step_seconds,
    }


class Clock:
    """Adds up the seconds that functions take, by a name for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: object, function: str, part: str) -> None:
        """Replace an attribute by one that is timed."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + taken

        setattr(owner, function, timed)


class Plugged:
    """A predictor as a plain object, whose method can be replaced."""

    def __init__(self, predictor: HazardModel) -> None:
        self.feature_version = predictor.feature_version
        self.predict = predictor.predict


def parts(
    model: LoadedModel, ready: Prepared, rows: int, predictor: HazardModel, every: int
) -> dict[str, float]:
    """Where the guard's time goes, mean microseconds a step."""
    clock, plugged = Clock(), Plugged(predictor)
    clock.around(plugged, "predict", "predictor_us")
    extract = extract_signals
    deferred = rows * 2 <= logits_buffers.DEFERRED_ROWS  # signals of several steps in one call
    try:
        session, observer = start(model, ready, rows, plugged, every)
        if deferred:
            clock.around(session, "compute_pending_signals", "signals_us")
        else:
            clock.around(engine, "extract_signals", "signals_us")
        clock.around(observer.features, "advance", "features_us")
        clock.around(observer.policy, "rests", "controller_us")
        clock.around(observer.policy, "step", "controller_us")
        timing = time_steps(session, observer)
    finally:
        setattr(engine, "extract_signals", extract)  # noqa: B010
    found = {part: seconds / STEPS * 1e6 for part, seconds in clock.seconds.items()}
    total, choosing = sum(timing.guard) / STEPS * 1e6, sum(timing.choose) / STEPS * 1e6
    if not deferred:  # the signals find the argmax on their way
        found["signals_us"] -= sum(timing.argmax) / STEPS * 1e6
        choosing -= found["signals_us"]
    found["choosing_us"] = choosing
    found["watching_us"] = total - sum(found.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path("results/models/hazard_predictor.json")
    parser.add_argument("--predictor", type=Path, default=default)
    path = parser.parse_args().predictor
    torch.set_num_threads(2)
    predictor: HazardModel = load_predictor(path) if path.is_file() else rules_predictor()
    experiment = load_experiment(32, STEPS)
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    model = load_embedded(experiment)
    ready = prepare_requests(model, prompts, examples, experiment)
    result: dict[str, object] = {
        "predictor": str(path) if path.is_file() else "rules",
    }
    for name, every in (
        ("overhead", GuardSettings().check_every_tokens),
        ("overhead_every_token", 1),
    ):
        result[name] = {str(n): overhead(model, ready, n, predictor, every) for n in (1, 32)}
    every = GuardSettings().check_every_tokens
    result["parts"] = {str(n): parts(model, ready, n, predictor, every) for n in (1, 32)}
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

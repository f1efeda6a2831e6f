"""What the guard costs per decoding step without a check; a check is measured by check.py.

    python benchmarks/guard.py [--predictor results/models/hazard_predictor.json] [--sessions 5 3]

SmolLM2 in float32, snapkv at 0.500, 2 threads. A step's guard work is everything beyond the model's
pass and the argmax: signals, features, predictor, controller, bookkeeping. It is timed in the same
loop as the pass, step by step. The guard decides every ``check_every_tokens`` tokens, so a step's
cost is the mean over the steps from one decision to the next; percentiles are over these. Without
a predictor file 200 trees of depth 6 over all features are fitted to random numbers: what they say
is nothing, what they cost is what trained ones do. Sessions of batch 1 and 32 alternate. Writes
results/bench/guard.json after every part:

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
import xgboost
from generation import PRESS, load_embedded, load_experiment
from measuring import FOLDER, machine, say, write
from numpy.typing import NDArray

from kvguard import engine, logits_buffers
from kvguard.config import GuardSettings, OperatingPoint
from kvguard.engine import Session
from kvguard.experiment import Prepared, prepare_requests
from kvguard.guard_observer import GuardObserver, HazardModel
from kvguard.models import LoadedModel
from kvguard.policy_factory import make_policy
from kvguard.predictor import Predictor, load_predictor
from kvguard.presses import build_press
from kvguard.prompts import load_task
from kvguard.sampling import Decoding
from kvguard.schema import FEATURE_NAMES, FEATURE_VERSION
from kvguard.signals import extract_signals, peaks

TARGET = FOLDER / "guard.json"
NEVER = OperatingPoint(tau_low=0.999998, tau_high=0.999999, k=1000, j=1)
STEPS = 168
"""Of a session; the first `WARM_UP` are not counted, the others are whole decisions."""
WARM_UP = 8
TREES, DEPTH = 200, 6


def random_predictor() -> Predictor:
    """As many trees as a trained predictor has, over all features, fitted to random numbers."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(20_000, len(FEATURE_NAMES))).astype(np.float32)
    data = xgboost.DMatrix(features, label=draw.random(len(features)) < 0.1)
    given = {"objective": "binary:logistic", "max_depth": DEPTH, "min_child_weight": 0}
    booster = xgboost.train({**given, "tree_method": "hist", "seed": 0}, data, TREES)
    return Predictor(
        kind="xgboost",
        target="harm",
        horizon_tokens=32,
        feature_names=FEATURE_NAMES,
        feature_version=FEATURE_VERSION,
        model={
            "booster": json.loads(booster.save_raw("json")),
            "class_weight": 1.0,
            "lead_bins": 0,
        },
    )


def start(
    model: LoadedModel, ready: Prepared, rows: int, predictor: HazardModel, every: int, steps: int
) -> tuple[Session, GuardObserver]:
    """A session of ``rows`` admitted rows under a guard that never alarms."""
    decoding = Decoding(steps + 1)
    session = Session(
        model.model,
        decoding,
        press=build_press(PRESS, "0.500"),
        rows=rows,
        prefix=ready.prefix,
        cold="host",
    )
    policy = make_policy("guard", rows, max_new_tokens=steps + 1, controller=NEVER)
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


def time_steps(session: Session, observer: GuardObserver, steps: int) -> Timing:
    """Decode to the end, guard work and model's pass in turn; the argmax counts as the model's."""
    timing = Timing([], [], [], [])
    rows = session.active
    for _ in range(steps):
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


class Overhead:
    """Guard work of steps against the steps without it, over several sessions."""

    def __init__(self, rows: int, every: int) -> None:
        self.rows, self.every = rows, every
        self.spent: list[NDArray[np.float64]] = []
        self.bare: list[float] = []

    def session(
        self, model: LoadedModel, ready: Prepared, predictor: HazardModel, steps: int
    ) -> None:
        """Time one more session."""
        started = start(model, ready, self.rows, predictor, self.every, steps)
        timing = time_steps(*started, steps)
        # a row per decision
        self.spent.append(np.array(timing.guard[WARM_UP:]).reshape(-1, self.every))
        self.bare += timing.bare[WARM_UP:]

    def result(self) -> dict[str, float]:
        """Medians and percentiles over all sessions so far."""
        step_seconds = statistics.median(self.bare)
        intervals = np.concatenate(self.spent)
        p50, p99 = np.percentile(intervals.mean(axis=1), [50, 99])
        return {
            "check_every_tokens": self.every,
            "sessions": len(self.spent),
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
    model: LoadedModel, ready: Prepared, rows: int, predictor: HazardModel, every: int, steps: int
) -> dict[str, float]:
    """Where the guard's time goes, mean microseconds a step."""
    clock, plugged = Clock(), Plugged(predictor)
    clock.around(plugged, "predict", "predictor_us")
    extract = extract_signals
    deferred = rows * 2 <= logits_buffers.DEFERRED_ROWS  # signals of several steps in one call
    try:
        session, observer = start(model, ready, rows, plugged, every, steps)
        if deferred:
            clock.around(session, "compute_pending_signals", "signals_us")
        else:
            clock.around(engine, "extract_signals", "signals_us")
        assert observer.hazards is not None
        clock.around(observer.hazards, "features", "features_us")
        clock.around(observer.policy, "rests", "controller_us")
        clock.around(observer.policy, "step", "controller_us")
        timing = time_steps(session, observer, steps)
    finally:
        setattr(engine, "extract_signals", extract)  # noqa: B010
    found = {part: seconds / steps * 1e6 for part, seconds in clock.seconds.items()}
    total, choosing = sum(timing.guard) / steps * 1e6, sum(timing.choose) / steps * 1e6
    if not deferred:  # the signals find the argmax on their way
        found["signals_us"] -= sum(timing.argmax) / steps * 1e6
        choosing -= found["signals_us"]
    found["choosing_us"] = choosing
    found["watching_us"] = total - sum(found.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path("results/models/hazard_predictor.json")
    parser.add_argument("--predictor", type=Path, default=default)
    parser.add_argument(
        "--sessions",
        type=int,
        nargs=2,
        default=[5, 3],
        metavar=("ONE", "MANY"),
        help="of batch 1 and 32: the 99th percentile needs more decisions than a session has",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=STEPS, help="a multiple of the guard's 8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = given.predictor
    predictor: HazardModel = load_predictor(path) if path.is_file() else random_predictor()
    experiment = load_experiment(given.batch, given.steps)
    prompts, examples = load_task(experiment.tasks[0], experiment.seed)
    model = load_embedded(experiment)
    ready = prepare_requests(model, prompts, examples, experiment)
    trained = "hazard_predictor.json of this run" if path.is_file() else "none"
    result: dict[str, object] = {
        "predictor": f"{TREES} trees of depth {DEPTH}" if trained == "none" else trained,
        "features": len(FEATURE_NAMES),
        "machine": machine(),
    }
    default_every = GuardSettings().check_every_tokens
    sessions = {1: given.sessions[0], given.batch: given.sessions[1]}
    for name, every in (("overhead", default_every), ("overhead_every_token", 1)):
        measured = {rows: Overhead(rows, every) for rows in sessions}
        for number in range(max(sessions.values())):
            for rows, one in measured.items():
                if number < sessions[rows]:
                    one.session(model, ready, predictor, given.steps)
                    share = one.result()["share_p50"]
                    say(f"{name}, batch {rows}, session {number}: {100 * share:.2f} %")
        result[name] = {str(rows): one.result() for rows, one in measured.items()}
        write(given.output, result)
    result["parts"] = {
        str(rows): parts(model, ready, rows, predictor, default_every, given.steps)
        for rows in sessions
    }
    write(given.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""How long the offline simulation takes: 200 controller settings over 10,000 requests.

Two numbers: ``seconds`` for the alarms of the whole grid, ``table_seconds`` for the table of
benefit and cost made of them, bootstrap intervals included. Writes results/bench/simulation.json.
The requests are synthetic: what is measured is arithmetic.

    python benchmarks/simulation.py --settings 200 --requests 10000 --tokens 512
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard.config import BASELINE, OperatingPoint, Tolerance
from kvguard.controller import (
    NEVER,
    OperatingPoints,
    first_alarm,
    initial_state,
    stack_points,
    step,
)
from kvguard.evaluate_controller import simulate_points
from kvguard.stored_requests import NOWHERE, StoredRequests


def make_settings(count: int) -> OperatingPoints:
    """``count`` different settings, spread over the grid that calibration searches."""
    lows = np.linspace(0.05, 0.5, -(-count // 20))
    points = [
        OperatingPoint(tau_low=float(low), tau_high=float(low + rise), k=k, j=j)
        for low, rise, k, j in product(lows, (0.0, 0.1, 0.2, 0.3, 0.4), (1, 2), (8, 16))
    ]
    return stack_points(points[:count])


def make_hazards(
    requests: int, tokens: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Hazards (requests, tokens) that drift like a predictor's, and lengths (requests,)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 16, tokens + 1, requests)
    hazard = rng.beta(1.0, 6.0, (requests, tokens)).astype(np.float32)
    rise = rng.integers(0, 2 * tokens, requests)  # half of the requests never turn risky
    risky = np.arange(tokens) >= rise[:, None]
    return np.where(risky, np.sqrt(hazard), hazard), lengths


def check(
    hazard: NDArray[np.float32],
    lengths: NDArray[np.int64],
    settings: OperatingPoints,
    requests: int,
) -> bool:
    """Whether the grid agrees with advancing one setting and one request at a time."""
    found = first_alarm(hazard[:requests], lengths[:requests], settings)
    for index in range(0, len(settings.k), 17):
        point = settings.point(index)
        for row in range(requests):
            state, alarm = initial_state(1), NEVER
            for position in range(int(lengths[row])):
                state = step(state, hazard[row, position], point)
                if state.mode[0] == 2:
                    alarm = position
                    break
            if alarm != found[index, row]:
                return False
    return True


def make_requests(
    hazard: NDArray[np.float32], lengths: NDArray[np.int64], seed: int
) -> StoredRequests:
    """Requests with those hazards: ten conditions and their baseline, the same prompts in each."""
    rng = np.random.default_rng(seed)
    count, conditions = len(lengths), 11
    prompt, condition = np.arange(count) // conditions, np.arange(count) % conditions
    compressed = condition > 0
    prompt_tokens = 100 + prompt % 50
    before, after = 1024 * prompt_tokens, 1024 * np.where(compressed, 40, prompt_tokens)
    differs = np.where(compressed, rng.integers(0, lengths), NOWHERE).astype(np.int32)
    baseline = np.arange(count) - condition
    failed = rng.random(count) < 0.4
    table = pl.DataFrame(
        {
            "model": "synthetic",
            "press": np.where(compressed, "press", BASELINE),
            "ratio": np.char.mod("0.%03d", 90 * condition),
            "prompt_id": np.char.mod("%d", prompt),
            "prompt_tokens": prompt_tokens,
            "generated_tokens": lengths,
            "cache_bytes_before": before,
            "cache_bytes_after": after,
            "kv_kept_bytes_mean": after + 512.0 * lengths,
            "kv_masked_bytes_mean": 0.0,
            "device_byte_steps": ((after + 512 * lengths) * (lengths - 1)).astype(np.int64),
            "catastrophe": failed,
            "onset": np.where(failed, lengths // 2, 0),
            "right": rng.random(count) < 0.5,
            "agrees": rng.random(count) < 0.7,
            "answer": np.char.mod("%d", rng.integers(0, 3, count)),
            "looping": failed,
            "non_termination": False,
        }
    )
    nothing = np.zeros((0, 28), np.float32)
    return StoredRequests(
        table,
        table.head(0),
        np.zeros((count, 0), np.int32),
        nothing,
        np.zeros(count, np.int64),
        hazard,
        lengths.astype(np.int32),
        baseline,
        differs,
        differs,
        differs,
        differs,
        Tolerance(),
        cold=True,
    )


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--target", type=Path, default=Path("results/bench/simulation.json"))
    arguments = parser.parse_args()

    settings = make_settings(arguments.settings)
    hazard, lengths = make_hazards(arguments.requests, arguments.tokens, seed=0)
    agrees = check(hazard, lengths, settings, requests=3)
    seconds = []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        alarms = first_alarm(hazard, lengths, settings)
        seconds.append(time.perf_counter() - started)
    requests = make_requests(hazard, lengths, seed=0)
    started = time.perf_counter()
    table = simulate_points(requests, settings, bootstrap_samples=500)
    table_seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobyte = 1 if sys.platform == "darwin" else 1024
    result = {
        "settings": len(settings.k),
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "seconds": round(float(np.median(seconds)), 3),
        "seconds_of_each_repeat": [round(second, 3) for second in seconds],
        "setting_token_updates_per_second": round(
            len(settings.k) * int(lengths.sum()) / float(np.median(seconds))
        ),
        "share_alarmed": round(float((alarms != NEVER).mean()), 4),
        "agrees_with_one_at_a_time": agrees,
        "result_bytes": alarms.nbytes,
        "table_seconds": round(table_seconds, 3),
        "table_rows": table.height,
        "peak_rss_bytes": peak * kilobyte,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    arguments.target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

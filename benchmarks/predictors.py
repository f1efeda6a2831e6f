"""What a hazard costs: the booster alone, behind a press's scale, and a step of the GRU.

    python benchmarks/predictors.py

times each for batches of 1, 8 and 32 rows, in turn, and writes results/bench/predictors.json:
``seconds`` by score and batch, median and 99th percentile of one call, and ``cpu_seconds``, the
processor's mean over all calls, which a busy machine changes less. The models are fitted on random
numbers: what they say does not matter, their size does (68 features, 100 trees of depth 4; a GRU of
16 units over 49 inputs).
"""

import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import xgboost
from measuring import FOLDER, machine, say, write

from kvguard import schema
from kvguard.predictor import Predictor, for_press
from kvguard.probe_scale import fit_probe_scale
from kvguard.sequence_predictor import (
    SEQUENCE_SIGNALS,
    SequenceSettings,
    fit_sequence_predictor,
)

BATCHES = (1, 8, 32)
CALLS = 300
TARGET = FOLDER / "predictors.json"


def make_predictor(rng: np.random.Generator) -> Predictor:
    """A booster on all features, with a scale for one press."""
    data = rng.normal(size=(4000, len(schema.FEATURE_NAMES))).astype(np.float32)
    labels = data[:, 0] + rng.normal(size=len(data)) > 0
    options = {"objective": "binary:logistic", "max_depth": 4, "nthread": 1}
    booster = xgboost.train(options, xgboost.QuantileDMatrix(data, labels, nthread=1), 100)
    probes = rng.random((160, len(schema.PROBE_NAMES))).astype(np.float32)
    return Predictor(
        kind="xgboost",
        target="harm",
        horizon_tokens=32,
        feature_names=schema.FEATURE_NAMES,
        feature_version=schema.FEATURE_VERSION,
        model={
            "booster": json.loads(booster.save_raw("json")),
            "class_weight": 1.0,
            "lead_bins": 0,
        },
        probe_scale=fit_probe_scale(probes, ["snapkv"] * len(probes)),
    )


def time_calls(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call."""
    call()
    seconds = np.empty(CALLS)
    began = time.process_time()
    for number in range(CALLS):
        started = time.perf_counter()
        call()
        seconds[number] = time.perf_counter() - started
    cpu = (time.process_time() - began) / CALLS
    return {
        "p50": float(np.median(seconds)),
        "p99": float(np.quantile(seconds, 0.99)),
        "cpu_seconds": cpu,
    }


def main() -> None:
    """Measure and write the file."""
    rng = np.random.default_rng(0)
    scaled = make_predictor(rng)
    plain = scaled.model_copy(update={"probe_scale": None})
    pressed = for_press(scaled, "snapkv")
    names = (*SEQUENCE_SIGNALS, *schema.PROBE_NAMES)
    lengths = np.full(40, 12)
    inputs = rng.normal(size=(480, len(names)))
    harmed = np.arange(40) % 2 == 0
    gru = fit_sequence_predictor(
        inputs,
        lengths,
        harmed,
        [f"p{number}" for number in range(40)],
        names,
        settings=SequenceSettings(max_epochs=1),
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        features = rng.normal(size=(batch, len(schema.FEATURE_NAMES))).astype(np.float32)
        step, state = rng.normal(size=(batch, len(names))), gru.start(batch)
        calls: dict[str, Callable[[], object]] = {
            "booster": partial(plain.predict, features),
            "booster behind the press's scale": partial(pressed.predict, features),
            "gru": partial(gru.advance, state, step),
        }
        for name, call in calls.items():
            found.setdefault(name, {})[str(batch)] = time_calls(call)
            say(f"batch {batch}, {name}: {1e6 * found[name][str(batch)]['cpu_seconds']:.0f} us")
    write(TARGET, {"machine": machine(), "seconds": found})


if __name__ == "__main__":
    main()

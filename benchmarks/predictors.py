"""What a hazard costs: boosted trees, and a sequence predictor, behind a press's scale.

    python benchmarks/predictors.py

times the hazards of the next 1 and the next 8 tokens of 1, 8 and 32 rows, as a guard asks for them,
the kinds in turn, and writes results/bench/predictors.json: ``seconds`` by predictor and ``rows x
tokens``, median and 99th percentile of one call, and ``cpu_seconds``, the processor's mean over all
calls, which a busy machine changes less; ``ratio``, the sequence's median over the trees'. The
models are made of random numbers: what they say does not matter, their size does (68 features, 100
trees of depth 4; a GRU of 16 units over 49 inputs).
"""

import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import xgboost
from measuring import FOLDER, machine, say, write

from kvguard import schema
from kvguard.features import SEQUENCE_FEATURES
from kvguard.gru import Gru
from kvguard.hazards import HazardState
from kvguard.predictor import Predictor, for_press
from kvguard.probe_scale import fit_probe_scale

BATCHES = (1, 8, 32)
TOKENS = (1, 8)
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


def make_sequence(rng: np.random.Generator, scaled: Predictor) -> Predictor:
    """A GRU of the size that training gives it, with the same scale."""
    size, width = 16, len(SEQUENCE_FEATURES)
    unit = Gru(
        {
            "input": rng.normal(size=(3 * size, width)),
            "hidden": rng.normal(size=(3 * size, size)),
            "input_bias": rng.normal(size=3 * size),
            "hidden_bias": rng.normal(size=3 * size),
            "head": rng.normal(size=size),
            "head_bias": 0.0,
            "means": np.zeros(width),
            "scales": np.ones(width),
        }
    )
    return Predictor(
        kind="sequence",
        target="harm",
        horizon_tokens=32,
        feature_names=SEQUENCE_FEATURES,
        feature_version=schema.FEATURE_VERSION,
        model=unit.to_json(),
        probe_scale=scaled.probe_scale,
    )


def call_of(predictor: Predictor, features: np.ndarray) -> Callable[[], object]:
    """What a guard calls for the next tokens (rows, tokens, features) of a full batch."""
    rows, tokens = features.shape[:2]
    state = HazardState(for_press(predictor, "snapkv"), rows, 1_000_000, 0.5)
    every, counts = np.arange(rows), np.full(rows, tokens)

    def call() -> object:
        found = state.predict(every, features, counts)
        for row in every.tolist():  # so that no state grows with the number of calls
            state.reset(row, 0.5, 1_000_000)
        return found

    return call if predictor.kind == "sequence" else partial(state.predict, every, features, counts)


def time_calls(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Seconds of one call of each, the calls in turn."""
    seconds = {name: np.empty(CALLS) for name in calls}
    cpu = dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()
    for number in range(CALLS):
        for name, call in calls.items():
            began, started = time.process_time(), time.perf_counter()
            call()
            seconds[name][number] = time.perf_counter() - started
            cpu[name] += (time.process_time() - began) / CALLS
    return {
        name: {
            "p50": float(np.median(each)),
            "p99": float(np.quantile(each, 0.99)),
            "cpu_seconds": cpu[name],
        }
        for name, each in seconds.items()
    }


def main() -> None:
    """Measure and write the file."""
    rng = np.random.default_rng(0)
    scaled = make_predictor(rng)
    sequence = make_sequence(rng, scaled)
    kinds = {
        "boosted, raw probes": scaled.model_copy(update={"probe_scale": None}),
        "boosted": scaled,
        "sequence": sequence,
    }
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in kinds}
    ratio: dict[str, float] = {}
    for rows in BATCHES:
        for tokens in TOKENS:
            shape = (rows, tokens, len(schema.FEATURE_NAMES))
            features = rng.normal(size=shape).astype(np.float32)
            probes = [schema.FEATURE_NAMES.index(name) for name in schema.PROBE_NAMES]
            features[..., probes] = features[:, :1, probes]  # those of the request
            size = f"{rows} x {tokens}"
            timed = time_calls({name: call_of(model, features) for name, model in kinds.items()})
            for name, seconds in timed.items():
                found[name][size] = seconds
                say(f"{size}, {name}: {1e6 * seconds['cpu_seconds']:.0f} us of processor time")
            ratio[size] = timed["sequence"]["p50"] / timed["boosted"]["p50"]
            say(f"{size}: sequence takes {ratio[size]:.2f} of boosted, median of calls in turn")
    write(TARGET, {"machine": machine(), "seconds": found, "ratio": ratio})


if __name__ == "__main__":
    main()

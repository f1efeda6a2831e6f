"""How often 95 % intervals over few prompts hold what they promise.

    python benchmarks/intervals.py [studies]

simulates studies (400 by default) in which scores and labels are independent, both with strong
effects of prompt and request, so that the AUROC of every study is 0.5 in truth. It writes
results/bench/intervals.json: per number of prompts the share of studies whose interval covers 0.5,
for the percentile bootstrap (``percentile``) and for `kvguard.metrics.bootstrap_interval`
(``used``), and the median width of the latter. Higher is better up to 0.95; far above is wasteful.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvguard import schema
from kvguard.metrics import Measured, Sample, auroc, resample_weights

REQUESTS, TOKENS, HAZARD_TOKENS, SAMPLES = 6, 60, 20, 500
PROMPTS = (6, 12, 25)
TARGET = Path("results/bench/intervals.json")


def simulate_study(rng: np.random.Generator, prompts: int) -> Measured:
    """AUROC of scores that know nothing; harm is more frequent on some prompts than on others."""
    rate = rng.random(prompts) * 0.6
    harmed = rng.random((prompts, REQUESTS)) < rate[:, None]
    start = rng.integers(0, TOKENS - HAZARD_TOKENS, harmed.shape)[..., None]
    position = np.arange(TOKENS)
    inside = (position >= start) & (position < start + HAZARD_TOKENS)
    labels = (inside & harmed[..., None]).ravel()
    effects = rng.normal(size=(prompts, 1, 1)) + rng.normal(size=(prompts, REQUESTS, 1))
    scores = (effects + rng.normal(size=(prompts, REQUESTS, TOKENS))).ravel()
    codes = np.repeat(np.arange(prompts), REQUESTS * TOKENS)
    weights = resample_weights(prompts, SAMPLES, int(rng.integers(2**31)))
    return auroc(Sample(scores, labels, codes, weights))


def measure_coverage(prompts: int, studies: int) -> dict[str, Any]:
    """Share of studies whose interval covers 0.5, among those whose interval is defined."""
    rng = np.random.default_rng(prompts)
    covered: list[tuple[bool, bool]] = []
    widths: list[float] = []
    while len(covered) < studies:
        measured = simulate_study(rng, prompts)
        low, high = measured.interval()
        if low is None or high is None:
            continue
        ends = np.nanquantile(measured.replicates, [0.025, 0.975])
        covered.append((bool(ends[0] <= 0.5 <= ends[1]), low <= 0.5 <= high))
        widths.append(high - low)
    percentile, used = np.mean(covered, axis=0)
    return {
        "percentile": round(float(percentile), 4),
        "used": round(float(used), 4),
        "width_median": round(float(np.median(widths)), 4),
    }


def main(studies: int) -> None:
    """Measure every number of prompts and write the result."""
    result: dict[str, Any] = {"nominal": 0.95, "studies": studies}
    for prompts in PROMPTS:
        result[f"prompts_{prompts}"] = measure_coverage(prompts, studies)
    with schema.atomic_path(TARGET) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)

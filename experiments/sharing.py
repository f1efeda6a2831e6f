"""What 008 says beyond the runs' tables: the same policies with sharing and with copies.

Live test requests of two runs on the same prompts and conditions, all conditions together. Of each
policy the harmed shares of both and their difference, sharing less copies, with 95 % intervals, a
bootstrap over prompts; device byte-steps over those of the full KV cache with copies, of both, with
their difference; peak and bytes moved. Writes results/bench/sharing.json.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from price_costs import live_runs
from ranking import run

POLICIES = ("none", "guard_price", "lossless_auto", "shared_prefix", "always_safe")


def by_prompt(runs: pl.DataFrame, policy: str) -> pl.DataFrame:
    """A policy's sums of each prompt over its conditions; a request without an answer is harmed."""
    return (
        runs.filter(policy=policy)
        .group_by("prompt_id")
        .agg(
            pl.col("harmed").fill_null(True).cast(pl.Float64).mean(),
            pl.col("device_byte_steps", "bytes_moved", "checks").cast(pl.Float64).sum(),
            pl.col("device_bytes_peak").max(),
        )
        .sort("prompt_id")
    )


def interval(values: NDArray[np.float64]) -> list[float]:
    """Value and 95 % ends of what the bootstrap drew; the first is the value itself."""
    ends = np.quantile(values[1:], [0.025, 0.975])
    return [round(float(value), 4) for value in (values[0], *ends)]


def study(folder: Path, draws: int, copies: Path) -> dict[str, object]:
    """Both runs beside each other."""
    runs = {"sharing": live_runs(folder), "copies": live_runs(copies)}
    full = by_prompt(runs["copies"], "always_safe")
    count = full.height
    chosen = np.random.default_rng(0).integers(0, count, (draws, count))
    chosen = np.concatenate([np.arange(count)[None], chosen])  # the sample itself, then the draws
    whole = full["device_byte_steps"].to_numpy()[chosen].sum(axis=1)
    found: dict[str, object] = {"prompts": count}
    for policy in POLICIES:
        harmed, spent, others = {}, {}, {}
        for name, table in runs.items():
            part = by_prompt(table, policy)
            assert part["prompt_id"].equals(full["prompt_id"])
            harmed[name] = part["harmed"].to_numpy()[chosen].mean(axis=1)
            spent[name] = part["device_byte_steps"].to_numpy()[chosen].sum(axis=1) / whole
            others[name] = {
                "bytes_moved": int(part["bytes_moved"].sum()),
                "checks": int(part["checks"].sum()),
                "device_bytes_peak": int(part["device_bytes_peak"].to_numpy().max()),
                "harmed_requests": int(table.filter(policy=policy)["harmed"].fill_null(True).sum()),
                "requests": table.filter(policy=policy).height,
            }
        found[policy] = {
            "harmed": {name: interval(values) for name, values in harmed.items()},
            "harmed_difference": interval(harmed["sharing"] - harmed["copies"]),
            "byte_steps": {name: interval(values) for name, values in spent.items()},
            "byte_steps_difference": interval(spent["sharing"] - spent["copies"]),
            **others,
        }
    shared = by_prompt(runs["sharing"], "shared_prefix")["device_byte_steps"].to_numpy()
    rival = shared[chosen].sum(axis=1) / whole
    found["byte_steps_less_shared_prefix"] = {
        policy: interval(
            by_prompt(runs["sharing"], policy)["device_byte_steps"].to_numpy()[chosen].sum(axis=1)
            / whole
            - rival
        )
        for policy in ("guard_price", "lossless_auto", "none")
    }
    return found


if __name__ == "__main__":
    run(__doc__, "results/silent_harm_4_sharing", "sharing", study, copies="results/silent_harm_4")

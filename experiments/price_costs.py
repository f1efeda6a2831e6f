"""What 005 and 006 say of the live policies beyond the run's tables: quotients, agreement, price.

Live test requests of a run, all conditions together. Quotients of sums with 95 % intervals, a
bootstrap over prompts; harm with a one-sided lower bound for the mean over prompts
(`kvguard.learn_then_test.rate_bounds`), and of each condition; drafted tokens that a policy costs:
decode steps + 5 a check + 100 a harmed answer. Writes results/bench/price_costs.json.
"""

from pathlib import Path

import numpy as np
import polars as pl
from ranking import run

from kvguard.learn_then_test import rate_bounds

CHECK_TOKENS, HARM_TOKENS, DELTA = 5, 100, 0.05
PAIRS = (
    ("guard_price", "lossless_auto"),
    ("guard_price", "offload"),
    ("lossless_auto", "offload"),
)


def live_runs(folder: Path) -> pl.DataFrame:
    """Every live request of a run, sorted, so that policies lie row by row beside each other."""
    files = sorted(folder.glob("live/**/*.parquet"))
    tables = [pl.read_parquet(file, hive_partitioning=False) for file in files]
    return pl.concat(tables, how="diagonal_relaxed").sort("policy", "press", "ratio", "prompt_id")


def quotient(one: pl.DataFrame, other: pl.DataFrame, column: str, draws: int) -> list[float]:
    """Sum of a column over that of another policy, and the ends of its interval."""
    sums = [
        table.group_by("prompt_id").agg(pl.col(column).cast(pl.Float64).sum()).sort("prompt_id")
        for table in (one, other)
    ]
    assert sums[0]["prompt_id"].equals(sums[1]["prompt_id"])
    first, second = (table[column].to_numpy() for table in sums)
    chosen = np.random.default_rng(0).integers(0, len(first), (draws, len(first)))
    drawn = first[chosen].sum(axis=1) / second[chosen].sum(axis=1)
    ends = np.quantile(drawn, [0.025, 0.975])
    return [round(float(value), 3) for value in (first.sum() / second.sum(), *ends)]


def harm(table: pl.DataFrame) -> dict[str, float | int]:
    """Harmed requests, their mean over prompts, and its lower bound."""
    prompts = table.group_by("prompt_id").agg(pl.col("harmed").fill_null(True).mean())
    mean = float(prompts["harmed"].to_numpy().mean())
    single = table.height == prompts.height
    lower, _ = rate_bounds(mean, prompts.height, DELTA, single=single)
    harmed = int(table["harmed"].fill_null(True).sum())
    return {"harmed": harmed, "mean": round(mean, 4), "lower_bound": round(lower, 4)}


def study(folder: Path, draws: int) -> dict[str, object]:
    """Quotients, agreement and price."""
    runs = live_runs(folder)
    of = {str(name): table for (name,), table in runs.group_by("policy")}
    price = of["guard_price"]
    conditions = price.group_by("press", maintain_order=True)
    tokens = {
        name: int(table["decode_steps"].sum())
        + CHECK_TOKENS * int(table["checks"].sum())
        + HARM_TOKENS * int(table["harmed"].sum())
        for name, table in of.items()
        if name != "offload"
    }
    return {
        "bytes_moved": {
            f"{one} / {other}": quotient(of[one], of[other], "bytes_moved", draws)
            for one, other in PAIRS
        },
        "bytes_moved_by_task": {
            str(task): quotient(part, of["lossless_auto"].filter(task=task), "bytes_moved", draws)
            for (task,), part in price.group_by("task", maintain_order=True)
        },
        "harm": {"all": harm(price)} | {str(press): harm(part) for (press,), part in conditions},
        "drafted_tokens": tokens,
        "sums": {
            name: {
                column: int(table[column].sum())
                for column in ("harmed", "decode_steps", "checks", "tokens_wasted", "bytes_moved")
            }
            for name, table in of.items()
        },
    }


if __name__ == "__main__":
    run(__doc__, "results/silent_harm_3", "price_costs", study)

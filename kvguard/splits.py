"""Splits by prompt: which prompts train, calibrate and test.

Fitting, early stopping and search see train prompts only. The calibration prompts are divided once
more by `calibration_parts`: one part fits the map from scores to probabilities, the other is kept
for the certificate, which is only valid for a predictor that was fixed before it saw them. Test
prompts are read by evaluation alone. `kvguard.leakage` checks that.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from kvguard import config, schema
from kvguard.config import digest

Table = pl.DataFrame | str | Path
"""A table, or the Parquet file that holds it."""


def split_prompts(prompt_ids: Iterable[str], splits: config.Splits, seed: int) -> pl.DataFrame:
    """Assign every prompt to train, calibration or test.

    Prompts are ordered by a hash of their id and the seed, and that order is cut at the shares
    (largest remainders, so that they are exact to one prompt). The order of ``prompt_ids`` and
    repetitions in it make no difference.

    Returns:
        `schema.SPLITS`, sorted by prompt.

    Raises:
        ValueError: a split would be empty; says how many prompts are needed.
    """
    unique = sorted(set(prompt_ids))
    shares = [getattr(splits, name) for name in schema.SPLIT_NAMES]
    counts = _largest_remainders(len(unique), shares)
    if min(counts) == 0:
        needed = len(unique) + 1
        while min(_largest_remainders(needed, shares)) == 0:
            needed += 1
        raise ValueError(
            f"{len(unique)} prompts cannot fill splits of {shares}: at least {needed} prompts are "
            f"needed so that none of {', '.join(schema.SPLIT_NAMES)} is empty"
        )
    ordered = hash_order(unique, str(seed))
    names = [
        name for name, count in zip(schema.SPLIT_NAMES, counts, strict=True) for _ in range(count)
    ]
    frame = pl.DataFrame({"prompt_id": ordered, "split": names}, schema=schema.SPLITS)
    return frame.sort("prompt_id")


def calibration_parts(
    splits: pl.DataFrame, probability_share: float
) -> tuple[list[str], list[str]]:
    """Divide the calibration prompts: those that fit probabilities, those kept to certify.

    By a hash of the ids alone, so every caller gets the same parts. Each part has at least one
    prompt; a single calibration prompt certifies, and the probabilities stay uncalibrated.
    """
    ids = prompts_of(splits, "calibration")
    ordered = hash_order(ids, "probability")
    count = min(max(round(probability_share * len(ids)), 1), len(ids) - 1)
    return sorted(ordered[:count]), sorted(ordered[count:])


def _largest_remainders(total: int, shares: Sequence[float]) -> list[int]:
    exact = [round(total * share, 9) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def splits_digest(splits: pl.DataFrame) -> str:
    """First 16 hex digits of a SHA-256 over who is in which split; row order does not matter."""
    return digest(splits.select("prompt_id", "split").sort("prompt_id").rows())


def hash_order(ids: Iterable[str], salt: str) -> list[str]:
    """Ids in an order that depends on nothing but the ids and the salt."""
    return sorted(ids, key=lambda item: hashlib.sha256(f"{salt}:{item}".encode()).hexdigest())


def prompts_of(splits: pl.DataFrame, split: str) -> list[str]:
    """Prompt ids of one split, sorted."""
    return splits.filter(pl.col("split") == split)["prompt_id"].sort().to_list()


def scan_table(table: Table) -> pl.LazyFrame:
    """A lazy view of a frame or a Parquet file."""
    if isinstance(table, pl.DataFrame):
        return table.lazy()
    return pl.scan_parquet(table, hive_partitioning=False)


def read_splits(splits: Table) -> pl.DataFrame:
    """The splits table, from a frame or a file."""
    if isinstance(splits, pl.DataFrame):
        return schema.check(splits, schema.SPLITS, "splits")
    return schema.read_table(splits, schema.SPLITS)

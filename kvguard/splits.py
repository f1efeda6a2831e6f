"""Splits by prompt: which prompts train, calibrate and test.

Fitting, early stopping and search see train prompts only. The calibration prompts are divided once
more by `calibration_parts`: one part fits the map from scores to probabilities, the other is kept
for the certificate, which is only valid for a predictor that was fixed before it saw them. Test
prompts are read by evaluation alone. `kvguard.leakage` checks that.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from kvguard import config, schema
from kvguard.config import digest

Table = pl.DataFrame | str | Path
"""A table, or the Parquet file that holds it."""


def split_prompts(
    prompts: pl.DataFrame | Iterable[str], splits: config.Splits, seed: int
) -> pl.DataFrame:
    """Assign every prompt to train, calibration or test, each task by the same shares.

    Units are ordered by a hash of their id and the seed, and that order is cut at the shares
    (largest remainders). A unit is a prompt, or all prompts of a template: so shares are exact to
    one prompt where there are no templates. The order of rows and repetitions make no difference.

    Args:
        prompts: with ``prompt_id``, ``task`` and ``template``, as `schema.PROMPTS`; or ids alone.
        splits: the shares.
        seed: another seed splits otherwise.

    Returns:
        `schema.SPLITS`, sorted by prompt.

    Raises:
        ValueError: a split of a task would be empty; says how many prompts are needed.
    """
    if not isinstance(prompts, pl.DataFrame):
        prompts = pl.DataFrame({"prompt_id": list(prompts)}, schema={"prompt_id": pl.String})
        prompts = prompts.with_columns(
            task=pl.lit(None, pl.String), template=pl.lit(None, pl.String)
        )
    prompts = prompts.select("prompt_id", "task", "template").unique("prompt_id").sort("prompt_id")
    if prompts.is_empty():
        check_split_sizes("", 0, splits)
    parts = prompts.partition_by("task")
    frame = pl.concat(_split_task(part, splits, seed) for part in parts)
    return schema.check(frame.sort("prompt_id"), schema.SPLITS, "splits")


def _split_task(prompts: pl.DataFrame, splits: config.Splits, seed: int) -> pl.DataFrame:
    """The prompts of one task with their splits."""
    task = prompts["task"][0]
    check_split_sizes(task or "", prompts.height, splits)
    shares = [getattr(splits, name) for name in schema.SPLIT_NAMES]
    bounds = np.cumsum(_largest_remainders(prompts.height, shares))
    unit = prompts.select(unit=_UNIT)["unit"]
    sizes = dict(unit.value_counts().iter_rows())
    ordered = hash_order(sizes, str(seed))
    counts = np.array([sizes[name] for name in ordered])
    middle = np.cumsum(counts) - counts / 2  # a unit goes where its middle prompt lies
    places = np.searchsorted(bounds, middle)
    names = {name: schema.SPLIT_NAMES[place] for name, place in zip(ordered, places, strict=True)}
    frame = prompts.with_columns(split=unit.replace_strict(names, return_dtype=pl.String))
    missing = set(splits.names) - set(frame["split"])
    if missing:
        raise ValueError(
            f"task {task!r}: {len(sizes)} templates of {prompts.height} prompts leave "
            f"{', '.join(sorted(missing))} empty; raise num_prompts"
        )
    return frame


def check_split_sizes(task: str, num_prompts: int, splits: config.Splits) -> None:
    """Check that every split with a share gets a prompt of the task.

    Raises:
        ValueError: says how many prompts are needed.
    """
    shares = [getattr(splits, name) for name in splits.names]
    needed = num_prompts
    while min(_largest_remainders(needed, shares)) == 0:
        needed += 1
    if needed > num_prompts:
        raise ValueError(
            f"{f'tasks.{task}.num_prompts: ' if task else ''}{num_prompts} prompts cannot fill "
            f"splits of {shares}: at least {needed} prompts are needed so that none of "
            f"{', '.join(splits.names)} is empty"
        )


_UNIT = pl.coalesce(pl.format("{}: {}", pl.col("task").fill_null(""), "template"), "prompt_id")
"""What is split, resampled and certified as one: a template where there is one, else a prompt."""


def unit_names(splits: pl.DataFrame) -> pl.DataFrame:
    """``prompt_id`` and ``unit``, what counts as independent, of every prompt of a splits table."""
    return splits.select("prompt_id", unit=_UNIT)


def calibration_parts(
    splits: pl.DataFrame, probability_share: float
) -> tuple[list[str], list[str]]:
    """Divide the calibration prompts: those that fit probabilities, those kept to certify.

    By a hash of the ids alone, so every caller gets the same parts; prompts of one template stay
    together, and the tasks are divided alike. Each part has at least one prompt; a single
    calibration prompt certifies, and the probabilities stay uncalibrated. With a share of 0, of a
    run that fits nothing (`config.Config.probability_share`), all certify.
    """
    known = splits.filter(pl.col("split") == "calibration").with_columns(unit=_UNIT)
    places: dict[str, float] = {}  # of each unit in its own task's order, so that tasks interleave
    for part in known.partition_by("task"):
        ordered = hash_order(part["unit"].unique(), "probability")
        places |= {unit: (index + 0.5) / len(ordered) for index, unit in enumerate(ordered)}
    units = sorted(places, key=lambda unit: places[unit])
    count = min(max(round(probability_share * len(units)), 1), len(units) - 1)
    if probability_share == 0:
        count = 0
    fits = known["unit"].is_in(units[: max(count, 0)])
    return (
        known.filter(fits)["prompt_id"].sort().to_list(),
        known.filter(~fits)["prompt_id"].sort().to_list(),
    )


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

"""Splits by prompt, and the check that nothing leaks between them.

Fitting, early stopping and search see train prompts only. The calibration prompts are divided once
more by `calibration_parts`: one part fits the map from scores to probabilities, the other is kept
for the certificate, which is only valid for a predictor that was fixed before it saw them. Test
prompts are read by evaluation alone. `SplitGuard` checks each matrix when it is made, and a foreign
prompt in it ends the run.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kvguard import config, schema
from kvguard.config import digest

Table = pl.DataFrame | str | Path
"""A table, or the Parquet file that holds it."""

STAGES = {
    "fit": "train",
    "early_stopping": "train",
    "search": "train",
    "out_of_fold": "train",
    "probability_calibration": "calibration",
    "importance": "calibration",
    "thresholds": "calibration",
    "certificate": "calibration",
    "evaluate": "test",
}
"""Which split each stage may see. Features are not selected from data: the config names the set."""


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


class LeakageError(RuntimeError):
    """A prompt is where it must not be: in another split's matrix, or in two splits."""


def assert_disjoint(groups: Mapping[str, Iterable[str]]) -> None:
    """Check that no prompt is in two of the named groups.

    Raises:
        LeakageError: names the two groups and a prompt that both hold.
    """
    seen: dict[str, str] = {}
    for name, prompts in groups.items():
        for prompt in set(prompts):
            if prompt in seen:
                raise LeakageError(f"prompt {prompt} is in {seen[prompt]!r} and in {name!r}")
            seen[prompt] = name


class SplitGuard:
    """Checks that each stage sees prompts of its own split only, and keeps a record.

    Raises:
        LeakageError: a prompt is listed twice, or a split has an unknown name.
    """

    def __init__(self, splits: pl.DataFrame) -> None:
        twice = splits.filter(pl.col("prompt_id").is_duplicated())
        if twice.height:
            raise LeakageError(f"splits: prompt {twice['prompt_id'][0]} is listed more than once")
        unknown = set(splits["split"]) - set(schema.SPLIT_NAMES)
        if unknown:
            raise LeakageError(f"splits: unknown {sorted(unknown)}; known: {schema.SPLIT_NAMES}")
        self.splits = splits
        self._split_of = dict(zip(splits["prompt_id"], splits["split"], strict=True))
        self._records: list[dict[str, Any]] = []

    def check(self, stage: str, prompts: pl.Series | Sequence[str], purpose: str = "") -> None:
        """Check the prompts of one matrix, given for each of its rows.

        Args:
            stage: a key of `STAGES`, which says the split that it may see.
            prompts: the prompt of every row.
            purpose: what the matrix is for, kept in the record.

        Raises:
            LeakageError: names the stage, the foreign prompt and the split that it belongs to.
        """
        allowed = STAGES[stage]
        rows = pl.Series("prompt_id", prompts, dtype=pl.String)
        unique = rows.unique().sort().to_list()
        foreign = [prompt for prompt in unique if self._split_of.get(prompt) != allowed]
        if foreign:
            origin = self._split_of.get(foreign[0], "no split at all")
            raise LeakageError(
                f"{stage} ({purpose or 'no purpose given'}) may see {allowed} prompts only, but "
                f"its matrix holds {len(foreign)} others, such as {foreign[0]} of {origin}"
            )
        self._records.append(
            {
                "stage": stage,
                "purpose": purpose,
                "split": allowed,
                "rows": len(rows),
                "prompts": len(unique),
                "prompts_digest": digest(unique),
                "foreign_prompts": len(foreign),
            }
        )

    def table(self) -> pl.DataFrame:
        """One row per checked matrix: stage, purpose, split, rows, prompts and their digest."""
        return pl.DataFrame(
            self._records,
            schema={
                "stage": pl.String,
                "purpose": pl.String,
                "split": pl.String,
                "rows": pl.Int64,
                "prompts": pl.Int64,
                "prompts_digest": pl.String,
                "foreign_prompts": pl.Int64,
            },
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


def check_trained_on(splits: pl.DataFrame, provenance: Mapping[str, Any]) -> None:
    """Check that a predictor was trained on these very splits.

    Raises:
        LeakageError: it was trained on others, and may have seen any of these prompts.
    """
    expected, got = splits_digest(splits), provenance.get("splits_digest")
    if got != expected:
        raise LeakageError(
            f"the predictor was trained on splits {got}, these are {expected}: it may have seen "
            "their prompts; train it again"
        )


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

"""The check that no prompt of one split reaches what another split is for.

`LeakageCheck` is told the prompts of every matrix when it is made; a foreign prompt in it ends the
run, and the record of all matrices is a table of the run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from kvguard import schema
from kvguard.config import digest
from kvguard.splits import splits_digest

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


class LeakageCheck:
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

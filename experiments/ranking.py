"""What the studies of rankings beside the overlays share: mean AUROC, and how each is run."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard.metrics import Measured, Sample, auroc_within, resample_weights
from kvguard.schema import atomic_path

Codes = NDArray[np.int64]


def codes(table: pl.DataFrame, *columns: str) -> Codes:
    """(n,) one number from 0 for each combination of values."""
    ranks = table.select(pl.struct(columns).rank("dense")).to_series()
    return ranks.to_numpy().astype(np.int64) - 1


class Ranking:
    """Mean AUROC over groups, every score of a table on the same resampled prompts.

    Args:
        table: one row a thing to rank, with ``prompt_id``.
        groups: columns whose combinations count alike.
        within: columns inside a group, pairs of equal values alone are compared.
        draws: bootstrap samples of prompts.
    """

    def __init__(
        self, table: pl.DataFrame, groups: tuple[str, ...], within: tuple[str, ...], draws: int
    ) -> None:
        self.table, self.prompts = table, codes(table, "prompt_id")
        self.groups, self.within = codes(table, *groups), codes(table, *groups, *within)
        self.weights = resample_weights(int(self.prompts.max()) + 1, draws, seed=0)

    def auroc(self, score: str, label: str) -> Measured:
        """Of one score, over the groups that hold both kinds of the label."""
        sample = Sample(
            self.table[score].cast(pl.Float64).to_numpy(),
            self.table[label].to_numpy().astype(np.bool_),
            self.prompts,
            self.weights,
        )
        masks = [self.groups == group for group in np.unique(self.groups)]
        each = [auroc_within(sample.take(mask), self.within[mask]) for mask in masks]
        values = [one.value for one in each if one.value is not None]
        if not values:
            return Measured(None, np.full(len(self.weights), np.nan), 0)
        drawn = np.array([one.replicates for one in each if one.value is not None])
        known = np.isfinite(drawn)
        mean = np.where(known, drawn, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        return Measured(float(np.mean(values)), mean, sample.units)


def rounded(measured: Measured, digits: int = 4) -> dict[str, object]:
    """Value and interval as they are printed."""
    ends = [None if end is None else round(end, digits) for end in measured.interval()]
    value = None if measured.value is None else round(measured.value, digits)
    return {"value": value, "interval": ends}


def run(
    description: str | None,
    results: str,
    name: str,
    study: Callable[..., dict[str, object]],
    **others: str,
) -> None:
    """The command line of a study: measure, print, write ``results/bench/<name>.json``.

    Args:
        description: of the study.
        results: its results folder, unless told otherwise.
        name: of the file.
        study: from results folder and bootstrap samples to what was found.
        others: further results folders, which it gets by name; each is an option, ``--NAME-dir``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results-dir", type=Path, default=Path(results))
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(f"results/bench/{name}.json"))
    for other, path in others.items():
        parser.add_argument(f"--{other}-dir", type=Path, default=Path(path))
    given = parser.parse_args()
    folders = {other: getattr(given, f"{other}_dir") for other in others}
    for folder in (given.results_dir, *folders.values()):
        if not (folder / "outcomes.parquet").is_file():
            print(f"{folder} holds no run: nothing is measured")
            return
    found = json.dumps(study(given.results_dir, given.draws, **folders), indent=1)
    with atomic_path(given.out) as temporary:
        temporary.write_text(found)
    print(found)

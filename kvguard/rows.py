"""Tokens of some prompts, with features and labels: what is fitted and what is measured."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.config import BASELINE
from kvguard.gru import answer_lengths
from kvguard.predictor import Features
from kvguard.probe_scale import ProbeScale
from kvguard.row_batches import BLOCK_ROWS, new_matrix, read_matrix, taken
from kvguard.splits import Table, prompts_of, scan_table

Bools = NDArray[np.bool_]

LABEL_KINDS = ("steps_to", "hazard", "post_onset")
"""Columns of `schema.LABELS` that each target has."""


class Rows(NamedTuple):
    """Tokens of one split: ``keys`` holds `schema.LABELS` and ``task``, ``features`` (n, features)
    float32."""

    keys: pl.DataFrame
    features: Features

    def take(self, mask: Bools) -> "Rows":
        """The rows where ``mask`` is true."""
        return Rows(self.keys.filter(mask), taken(self.features, mask))

    def compact(self) -> "Rows":
        """The same rows, texts as categories: four bytes each instead of sixteen and more."""
        return self._replace(keys=self.keys.cast({pl.String: pl.Categorical}))

    def about(self, target: str) -> "Rows":
        """The same rows without the labels of other targets."""
        others = set(schema.TARGETS) - {target}
        names = [f"{kind}_{other}" for kind in LABEL_KINDS for other in others]
        return self._replace(keys=self.keys.drop(names, strict=False))

    def scaled(self, scale: ProbeScale) -> "Rows":
        """The same rows, probes as ranks under their press; on disk as `taken` does."""
        matrix = new_matrix(*self.features.shape)
        for start in range(0, len(matrix), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            features = self.features[block]
            matrix[block] = scale.scale(features, Rows(self.keys[block], features).press)
        return self._replace(features=matrix)

    @property
    def press(self) -> NDArray[np.str_]:
        """(n,) the press of each token's request."""
        return self.keys["press"].to_numpy().astype(np.str_)

    def label(self, target: str) -> Bools:
        """Whether the onset lies within the horizon; a token that nobody judged counts as no."""
        return as_bools(self.keys[f"hazard_{target}"])

    def before_onset(self, target: str) -> Bools:
        """Tokens that were judged and come before the target's onset."""
        return as_bools(~self.keys[f"post_onset_{target}"])

    def first_tokens(self, target: str) -> Bools:
        """The first token of each compressed request that was judged: one row a request."""
        judged = as_bools(self.keys[f"hazard_{target}"].is_not_null()) & self.compressed()
        return judged & as_bools(self.keys["position"] == 0)

    def compressed(self) -> Bools:
        """Tokens of compressed requests; the uncompressed baseline is an easy negative."""
        return as_bools(self.keys["press"] != BASELINE)


def load_rows(
    features: Table, labels: Table, splits: pl.DataFrame, split: str | Iterable[str]
) -> Rows:
    """Features and labels of one split's tokens, sorted by `schema.TOKEN_KEYS`.

    From files only the rows of the split are read, and the features a block at a time; a large
    matrix lies in a temporary file (`row_batches`).

    Args:
        features: `schema.FEATURES`.
        labels: `schema.LABELS`.
        splits: `schema.SPLITS`.
        split: a split's name, or prompt ids.

    Raises:
        ValueError: a token has features but no label, or there are no tokens.
    """
    ids = prompts_of(splits, split) if isinstance(split, str) else sorted(split)
    chosen = pl.LazyFrame({"prompt_id": ids}, schema={"prompt_id": pl.String})
    places = scan_table(features).select(schema.TOKEN_KEYS).with_row_index("row")
    left, right = (
        table.join(chosen, on="prompt_id", how="semi") for table in (places, scan_table(labels))
    )
    lengths = [part.select(pl.len()).collect().item() for part in (left, right)]
    joined = left.join(right, on=schema.TOKEN_KEYS, how="inner").sort(schema.TOKEN_KEYS).collect()
    if joined.is_empty():
        raise ValueError(f"no tokens of the {split if isinstance(split, str) else ids} prompts")
    if lengths != [len(joined)] * 2:
        raise ValueError(
            f"features and labels do not belong together: {lengths[0]} and {lengths[1]} tokens, "
            f"{len(joined)} in both"
        )
    rows = joined["row"].to_numpy()
    if isinstance(features, pl.DataFrame):
        matrix = features[rows].select(schema.FEATURE_NAMES).to_numpy()
        matrix = matrix.astype(np.float32, order="C")
    else:
        target = np.full(scan_table(features).select(pl.len()).collect().item(), -1, np.int64)
        target[rows] = np.arange(len(rows))
        matrix = read_matrix(features, list(schema.FEATURE_NAMES), target)
    tasks = splits.select("prompt_id", "task")
    keys = joined.select(list(schema.LABELS))
    return Rows(keys.join(tasks, on="prompt_id", how="left", maintain_order="left"), matrix)


def eligible(rows: Rows, target: str, settings: config.Predictor) -> Bools:
    """Rows that may be fitted: judged, before the onset unless the config says otherwise."""
    judged = as_bools(rows.keys[f"hazard_{target}"].is_not_null())
    usable = judged if settings.include_post_onset else rows.before_onset(target)
    return usable if settings.include_baseline else usable & rows.compressed()


def outcome(rows: Rows, target: str) -> Bools:
    """What a fit learns: the hazard label; tokens after the onset, where kept, count as hazard."""
    return rows.label(target) | as_bools(rows.keys[f"post_onset_{target}"])


def as_bools(column: pl.Series) -> Bools:
    return np.asarray(column.fill_null(False).to_numpy(), dtype=np.bool_)


def share_of_answers(rows: Rows, tokens: int) -> Rows:
    """Every answer; where they have more tokens than that, every second, third and so on."""
    every = -(-len(rows.features) // tokens)
    if every <= 1:
        return rows
    lengths = answer_lengths(rows.features)
    return rows.take(np.repeat(np.arange(len(lengths)) % every == 0, lengths))

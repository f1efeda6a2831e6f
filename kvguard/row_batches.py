"""Feature matrices that may be larger than memory: read, cut and fitted a block at a time.

A large matrix lies in a temporary file that is mapped into memory: the system keeps of it what fits
and no program sees a difference. A small one is an ordinary array.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import xgboost
from numpy.typing import NDArray

from kvguard.predictor import Features

IN_MEMORY_BYTES = 1 << 30
"""Size up to which a matrix is an ordinary array."""

BLOCK_ROWS = 1 << 19
"""Rows that are read, copied or given to XGBoost at a time."""


def new_matrix(rows: int, columns: int) -> Features:
    """An uninitialised (rows, columns) float32 matrix, in a temporary file where it is large.

    The file has no name and goes with the matrix; TMPDIR says where it is.
    """
    if 4 * rows * columns <= IN_MEMORY_BYTES:
        return np.empty((rows, columns), np.float32)
    with tempfile.TemporaryFile(prefix="kvguard-") as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, columns))


def read_matrix(path: str | Path, names: list[str], places: NDArray[np.int64]) -> Features:
    """Columns of a Parquet file as a matrix, rows where they are wanted.

    Args:
        path: of a file with those columns, float32; null becomes NaN.
        names: the columns, in their order.
        places: for each row of the file its row in the matrix, -1 for none; every row of the
            matrix is named once.

    Returns:
        (wanted rows, names) float32.
    """
    matrix = new_matrix(int((places >= 0).sum()), len(names))
    at = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(min(BLOCK_ROWS, 1 << 17), columns=names):
            target = places[at : at + batch.num_rows]
            at += batch.num_rows
            wanted = target >= 0
            if wanted.any():
                block = pl.DataFrame(batch).select(names).to_numpy()
                matrix[target[wanted]] = block[wanted]
    return matrix


def taken(features: Features, mask: NDArray[np.bool_]) -> Features:
    """The rows where ``mask`` is true, in order; a copy, on disk where it is large."""
    picked = np.flatnonzero(mask)
    matrix = new_matrix(len(picked), features.shape[1])
    for start in range(0, len(picked), BLOCK_ROWS):
        rows = picked[start : start + BLOCK_ROWS]
        matrix[start : start + len(rows)] = features[rows]
    return matrix


def quantile_matrix(
    data: Callable[[int, int], Features],
    ends: NDArray[np.int64],
    labels: NDArray[np.bool_],
    weights: NDArray[np.float64],
    reference: xgboost.QuantileDMatrix | None,
) -> xgboost.QuantileDMatrix:
    """XGBoost's binned matrix (one byte a value), made of blocks.

    With at most `BLOCK_ROWS` rows it is that of one array. With more, the bins' bounds come from a
    sketch over the blocks, which may place them a little differently than one over all rows.

    Args:
        data: ``data(start, stop)`` gives what rows ``start`` to ``stop`` are in the matrix: one
            row each, or as many as ``ends`` says.
        ends: (rows,) how many rows of the matrix the rows up to each make.
        labels: of the matrix's rows.
        weights: of the matrix's rows.
        reference: a matrix whose bins to use, as for data that stops the training.
    """
    if len(ends) <= BLOCK_ROWS:
        return xgboost.QuantileDMatrix(
            data(0, len(ends)), labels, weight=weights, ref=reference, nthread=1
        )
    blocks = _Blocks(data, ends, labels, weights)
    return xgboost.QuantileDMatrix(blocks, ref=reference, nthread=1)


class _Blocks(xgboost.DataIter):
    """What XGBoost reads, twice: once for the bins, once for the values."""

    def __init__(
        self,
        data: Callable[[int, int], Features],
        ends: NDArray[np.int64],
        labels: NDArray[np.bool_],
        weights: NDArray[np.float64],
    ) -> None:
        self.data, self.ends, self.labels, self.weights = data, ends, labels, weights
        self.start = 0
        super().__init__()

    def next(self, input_data: Callable[..., None]) -> bool:
        if self.start >= len(self.ends):
            return False
        stop = min(self.start + BLOCK_ROWS, len(self.ends))
        first = self.ends[self.start - 1] if self.start else 0
        inside = slice(int(first), int(self.ends[stop - 1]))
        input_data(
            data=self.data(self.start, stop),
            label=self.labels[inside],
            weight=self.weights[inside],
        )
        self.start = stop
        return True

    def reset(self) -> None:
        self.start = 0

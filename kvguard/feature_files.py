"""Features of a whole run, from token files into one file, in bounded memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kvguard import schema
from kvguard.features import ROLLED, derived_columns

SIGNAL_NAMES = tuple(schema.SIGNALS)


def build_features(
    token_paths: Sequence[str | Path],
    trace_paths: Sequence[str | Path],
    target: str | Path,
    *,
    chunk_rows: int = 65_536,
) -> None:
    """Compute the features of many token files into one file, a piece at a time.

    Memory holds a few pieces of ``chunk_rows`` rows (or of one trace, if that is longer), whatever
    the sizes of the files. One piece is read and one computed while one is written.

    Args:
        token_paths: Parquet files of `schema.TOKENS`, each trace's rows together and in order.
        trace_paths: Parquet files of `schema.TRACES`, of all their traces.
        target: the file to write (`schema.FEATURES`), rows in the order of ``token_paths``.
        chunk_rows: about how many rows to hold at a time.

    Raises:
        ValueError: as `compute_features`; nothing is written.
    """
    columns = [*schema.TRACE_KEYS, "max_new_tokens", *schema.PROBE_NAMES]
    traces = pl.concat(
        pl.read_parquet(Path(path), columns=columns, hive_partitioning=False)
        for path in trace_paths
    )
    with (
        schema.atomic_path(target) as temporary,
        pq.ParquetWriter(
            temporary,
            _FEATURES,
            compression="zstd",
            compression_level=-1,  # of random digits, 1 saves a tenth and costs half as much again
            use_dictionary=list(schema.TRACE_KEYS),
            write_statistics=list(schema.TOKEN_KEYS),
            store_schema=False,  # the keys are plain text to whoever reads them
        ) as writer,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as computer,
    ):
        pieces = _pieces(token_paths, chunk_rows)
        reading = reader.submit(next, pieces, None)
        computing: deque[Future[pa.Table]] = deque()
        while (piece := reading.result()) is not None:
            reading = reader.submit(next, pieces, None)
            computing.append(computer.submit(_compute_piece, piece, traces))
            if len(computing) == 2:
                writer.write_table(computing.popleft().result())
        while computing:
            writer.write_table(computing.popleft().result())


# Text keys repeat for hundreds of rows: they stay codes from file to file. Arrays cross between
# NumPy and Arrow by way of Polars: Arrow's own conversions import pandas, a quarter of a second.
_KEY_FIELDS = [
    *((name, pa.dictionary(pa.int32(), pa.string())) for name in schema.TRACE_KEYS),
    ("position", pa.int32()),
]
_PIECE = pa.schema(
    [*_KEY_FIELDS, ("token_id", pa.int32()), *((name, pa.float32()) for name in SIGNAL_NAMES)]
)
_FEATURES = pa.schema([*_KEY_FIELDS, *((name, pa.float32()) for name in schema.FEATURE_NAMES)])


def _compute_piece(piece: pa.Table, traces: pl.DataFrame) -> pa.Table:
    """`compute_features` from `_PIECE` to `_FEATURES`; what does not change is not copied."""
    text = {name: piece[name].combine_chunks() for name in schema.TRACE_KEYS}
    codes = {name: pl.Series(column.indices) for name, column in text.items()}
    numbers = pl.DataFrame(piece.select(["position", "token_id", *ROLLED, "top5_probability"]))
    offsets = schema.trace_offsets(numbers.select("position").with_columns(**codes))
    if offsets is None:
        named = pl.DataFrame(piece).with_columns(pl.col(schema.TRACE_KEYS).cast(pl.String))
        return _compute_piece(schema.order_by_trace(named)[0].to_arrow().cast(_PIECE), traces)
    # A name for each trace, and again as codes: those of the file may count many other traces.
    starts = pl.Series(offsets[:-1]).to_arrow()
    names = {name: column.take(starts).cast(pa.string()) for name, column in text.items()}
    trace = pl.Series(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))).to_arrow()
    derived = derived_columns(numbers, offsets, pl.DataFrame(names), traces)
    return pa.Table.from_arrays(
        [
            *(column.dictionary_encode().take(trace) for column in names.values()),
            piece["position"],
            *(piece[name] for name in SIGNAL_NAMES),
            *(column.to_arrow() for column in derived),
        ],
        schema=_FEATURES,
    )


def _pieces(paths: Sequence[str | Path], chunk_rows: int) -> Iterator[pa.Table]:
    """`_PIECE` rows of many files in order, in pieces of about ``chunk_rows``, between traces."""
    held: list[pa.Table] = []
    for path in paths:
        with pq.ParquetFile(path, read_dictionary=list(schema.TRACE_KEYS)) as file:
            for batch in file.iter_batches(chunk_rows, columns=_PIECE.names, use_threads=False):
                held.append(pa.Table.from_batches([batch]).select(_PIECE.names).cast(_PIECE))
                if sum(rows.num_rows for rows in held) < chunk_rows:
                    continue
                rows = pa.concat_tables(held)
                starts = (pl.Series(rows["position"]) == 0).arg_true()
                cut = starts[-1] if len(starts) else 0
                if cut:
                    yield rows[:cut]
                held = [rows[cut:]]
    if held:
        yield pa.concat_tables(held)

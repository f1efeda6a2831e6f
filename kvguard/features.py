"""Features of a token: its signals, their last few values, repetition, position and ratio.

One set of kernels serves both uses, and their results agree bit for bit. `compute_features` and
`build_features` lay whole traces end to end; `FeatureState` carries what a kernel needs of the past
and takes the next token of each row of a batch. Sums are float64, added in one fixed order, and
cast to float32 at the end.

- ``repeated_ngram`` is 1 where the 4 tokens that end here also stand, as a whole, somewhere earlier
  within the last 128 generated tokens; the two may overlap. ``repetition_sum`` adds it up over the
  last 32 tokens.
- ``*_mean_8`` and ``*_std_8`` (population standard deviation) are over the last 8 tokens, or over
  as many as there are. An undefined value (``entropy_delta`` of the first token) is left out; where
  none is left the feature is null in tables and NaN in arrays.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from kvguard import schema

ROLLING_TOKENS = 8
NGRAM_TOKENS = 4
NGRAM_WINDOW_TOKENS = 128
REPETITION_TOKENS = 32

ROLLED = ("entropy", "top1_probability", "alternatives_entropy", "entropy_delta")
"""Signals whose rolling mean and standard deviation are features."""

_REPETITION = ("repeated_ngram", "repetition_sum")
_NO_RATIO = tuple(name for name in schema.FEATURE_NAMES if name != "compression_ratio")
_NO_REPETITION = tuple(name for name in _NO_RATIO if name not in _REPETITION)

FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "full": schema.FEATURE_NAMES,
    "no_ratio": _NO_RATIO,
    "no_repetition": _NO_REPETITION,
    "logit_only": tuple(name for name in _NO_REPETITION if name != "relative_position"),
}
"""Named ablation sets; each one drops what the one before it drops, and more."""

_SIGNALS = tuple(schema.SIGNALS)
_ROLLED_COLUMNS = np.array([_SIGNALS.index(name) for name in ROLLED])
_PAST = ROLLING_TOKENS - 1
_LANES = 3 * len(ROLLED)  # value, square, 1 where defined
_NGRAM_PAST = NGRAM_TOKENS - 1
_LAGS = NGRAM_WINDOW_TOKENS - NGRAM_TOKENS  # how far back an earlier n-gram may end
_HASH_TAIL, _HASH_HEAD = -7046029254386353131, -4658895280553007687  # odd: they mix all bits
_ABSENT = -1  # stands for an n-gram that would begin before the first token
_DERIVED = schema.FEATURE_NAMES[len(_SIGNALS) :]
_BLOCK_ROWS = 8192  # kernels work on pieces that stay in a core's cache
_FLAG = len(_SIGNALS)
_STATISTICS = slice(_FLAG + 1, _FLAG + 1 + 2 * len(ROLLED))
_SUM, _POSITION, _RATIO = range(_STATISTICS.stop, len(schema.FEATURE_NAMES))


def compute_features(tokens: pl.DataFrame, traces: pl.DataFrame) -> pl.DataFrame:
    """Compute the features of every token of a table.

    Args:
        tokens: at least the columns `schema.TOKEN_KEYS`, ``token_id`` and `schema.SIGNALS`, of
            whole traces.
        traces: at least `schema.TRACE_KEYS` and ``max_new_tokens``, of all those traces.

    Returns:
        `schema.FEATURES`, trace by trace in order of position; null where undefined.

    Raises:
        ValueError: a trace's positions do not count 0, 1, 2, ..., or its ``max_new_tokens`` is not
            known or smaller than its number of tokens.
    """
    tokens, offsets = schema.order_by_trace(tokens.select(_TOKEN_COLUMNS))
    keys = tokens[offsets[:-1]].select(schema.TRACE_KEYS)
    derived = _derived_columns(tokens, offsets, keys, traces)
    frame = tokens.select(
        *schema.TOKEN_KEYS, *(pl.col(name).cast(pl.Float32) for name in _SIGNALS)
    ).hstack(derived)
    return schema.check(frame, schema.FEATURES, "features")


_TOKEN_COLUMNS = (*schema.TOKEN_KEYS, "token_id", *_SIGNALS)


def _derived_columns(
    tokens: pl.DataFrame, offsets: NDArray[np.int64], keys: pl.DataFrame, traces: pl.DataFrame
) -> list[pl.Series]:
    """The 12 features that are not signals, of tokens in trace order.

    Args:
        tokens: ``position``, ``token_id`` and the signals `ROLLED`.
        offsets: (traces + 1,) where each trace begins.
        keys: `schema.TRACE_KEYS` of each of them.
        traces: as `compute_features`.
    """
    limits = keys.join(
        traces.select(*schema.TRACE_KEYS, "max_new_tokens"),
        on=schema.TRACE_KEYS,
        how="left",
        maintain_order="left",
    )
    lengths = np.diff(offsets)
    wrong = limits.filter(
        pl.col("max_new_tokens").is_null() | (pl.col("max_new_tokens") < pl.Series(lengths))
    )
    if wrong.height:
        row = wrong.row(0, named=True)
        raise ValueError(f"max_new_tokens must be at least a trace's number of tokens, got {row}")
    rolled = [tokens[name].to_numpy() for name in ROLLED]
    token_ids = tokens["token_id"].to_numpy().astype(np.int64)
    derived = np.empty((len(_DERIVED), tokens.height), dtype=np.float32)
    for first, last in _blocks(offsets):
        rows = slice(int(offsets[first]), int(offsets[last]))
        _derive_block(
            np.stack([column[rows] for column in rolled]),
            token_ids[rows],
            lengths[first:last],
            derived[:, rows],
        )
    position = tokens["position"].to_numpy()
    derived[_POSITION - _FLAG] = position / np.repeat(limits["max_new_tokens"].to_numpy(), lengths)
    derived[_RATIO - _FLAG] = np.repeat(keys["ratio"].cast(pl.Float64).to_numpy(), lengths)
    return [
        pl.Series(name, column, nan_to_null=True)
        for name, column in zip(_DERIVED, derived, strict=True)
    ]


def _blocks(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of whole traces of about `_BLOCK_ROWS` rows each."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK_ROWS, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _derive_block(
    rolled: NDArray[np.float32],
    token_ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    derived: NDArray[np.float32],
) -> None:
    """Fill ``derived`` (12, n) but for position and ratio, for whole traces end to end.

    Args:
        rolled: (4, n) the signals `ROLLED`, NaN where undefined.
        token_ids: (n,).
        lengths: (traces,) their numbers of tokens; none is 0.
        derived: (12, n), filled in place.
    """
    first = np.cumsum(lengths) - lengths
    statistics = derived[_STATISTICS.start - _FLAG : _STATISTICS.stop - _FLAG]
    # Column by column in memory, and as if all rows were one trace; then what reached too far back.
    lanes = _rolling_lanes(rolled.T)
    statistics[:, _PAST:] = _rolling_statistics(lanes).T
    ahead = np.arange(_PAST)[:, None]
    inside = ahead < lengths
    at = np.where(inside, first + ahead, 0)
    early = np.zeros((2 * _PAST, len(lengths), _LANES))
    early[_PAST:] = lanes[at]
    statistics[:, at[inside]] = _rolling_statistics(early)[inside].T

    rows = np.arange(len(token_ids))
    start = np.repeat(first, lengths)
    repeated = _repeated_in(token_ids, rows - start)
    total = np.concatenate([[0], np.cumsum(repeated)])
    derived[0] = repeated
    derived[_SUM - _FLAG] = total[1:] - total[np.maximum(rows + 1 - REPETITION_TOKENS, start)]


def _rolling_lanes(rolled: NDArray[np.float32]) -> NDArray[np.float64]:
    """(..., 4) values -> (..., 12): values, squares, ones; all 0 where a value is undefined."""
    defined = ~np.isnan(rolled)
    values = np.where(defined, rolled, np.float32(0)).astype(np.float64)
    return np.concatenate([values, values * values, defined], axis=-1)


def _rolling_statistics(lanes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean and standard deviation over 8 tokens: (7 + t, ..., 12) -> (t, ..., 8).

    The sums run over axis 0 as a tree: of 2, of 4, of 8. Squares of float32 are exact in float64,
    so that a constant signal has a deviation of exactly 0.
    """
    sums = lanes[1:] + lanes[:-1]
    sums = sums[2:] + sums[:-2]
    sums = sums[4:] + sums[:-4]
    signals = len(ROLLED)
    count = sums[..., 2 * signals :]
    count = np.where(count > 0, count, np.nan)
    mean = sums[..., :signals] / count
    variance = sums[..., signals : 2 * signals] / count - mean * mean
    statistics = np.empty_like(mean, shape=(*mean.shape[:-1], 2 * signals))  # in its memory order
    statistics[..., 0::2] = mean
    statistics[..., 1::2] = np.sqrt(np.maximum(variance, 0))
    return statistics


def _ngrams(
    token_ids: NDArray[np.int64], position: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of tokens, and the n-gram that ends at each token as two pairs: (pairs, tails, heads).

    A pair is two token ids in one integer, so that equal integers are equal tokens.
    """
    pairs = np.full(len(token_ids), _ABSENT)
    pairs[1:] = token_ids[:-1] << 32 | token_ids[1:]
    heads = np.full(len(token_ids), _ABSENT)
    heads[2:] = pairs[:-2]
    return pairs, np.where(position >= _NGRAM_PAST, pairs, _ABSENT), heads


def _repeated_in(token_ids: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether the n-gram that ends here stands earlier in its trace, within the window."""
    _, tails, heads = _ngrams(token_ids, position)
    mixed = tails * _HASH_TAIL + heads * _HASH_HEAD
    # Sorted by hash and row, an n-gram comes right after its last occurrence.
    row_bits = len(mixed).bit_length()
    order = np.sort(mixed << row_bits | np.arange(len(mixed)))
    follows = np.flatnonzero((order[1:] ^ order[:-1]) >> row_bits == 0)
    row = order[1:][follows] & ((1 << row_bits) - 1)
    last = order[:-1][follows] & ((1 << row_bits) - 1)
    if (tails[row] == tails[last]).all() and (heads[row] == heads[last]).all():
        repeated = np.zeros(len(mixed), dtype=np.bool_)
        repeated[row] = row - last <= np.minimum(position[row] - _NGRAM_PAST, _LAGS)
        return repeated
    # Different n-grams with one hash: very rare, so that the search may take its time.
    short = (mixed >> 32).astype(np.int32)
    before = np.full(_LAGS, _ABSENT)
    return _repeated(
        tails,
        heads,
        sliding_window_view(np.concatenate([before, tails[:-1]]), _LAGS),
        sliding_window_view(np.concatenate([before, heads[:-1]]), _LAGS),
        position - _NGRAM_PAST,
        # Half as wide, and alike for few different n-grams: the search reads these.
        sliding_window_view(np.concatenate([before.astype(np.int32), short[:-1]]), _LAGS)
        == short[:, None],
    )


def _repeated(
    tails: NDArray[np.int64],
    heads: NDArray[np.int64],
    earlier_tails: NDArray[np.int64],
    earlier_heads: NDArray[np.int64],
    reach: NDArray[np.int64],
    same: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """(n,) whether an n-gram is among the `_LAGS` earlier ones.

    Args:
        tails, heads: (n,) the n-gram in two pairs.
        earlier_tails, earlier_heads: (n, 124) those before it, `_ABSENT` where there is none.
        reach: (n,) how many of the last ones belong to the same trace.
        same: (n, 124) True at least where both pairs are equal.
    """
    repeated = np.asarray(same.any(axis=1))
    rows = np.flatnonzero(repeated)
    if len(rows):  # few candidates are left: look at the rest only there
        whole = same[rows] & (earlier_heads[rows] == heads[rows, None])
        whole &= earlier_tails[rows] == tails[rows, None]
        whole &= np.arange(_LAGS, 0, -1) <= reach[rows, None]
        repeated[rows] = whole.any(axis=1)
    return repeated


class FeatureState:
    """What the features of the next token need of the past, for each row of a batch.

    Args:
        rows: size of the batch.
        max_new_tokens: (rows,) or one for all.
        ratio: (rows,) or one for all: compression ratio, in [0, 1).
    """

    def __init__(self, rows: int, max_new_tokens: ArrayLike, ratio: ArrayLike) -> None:
        self._limit = np.empty(rows, dtype=np.int64)
        self._limit[:] = max_new_tokens
        self._ratio = np.empty(rows, dtype=np.float32)
        self._ratio[:] = ratio
        self._position = np.zeros(rows, dtype=np.int64)
        # What came before, newest last; `_ABSENT` and 0 stand for tokens that there are not.
        self._lanes = np.zeros((_PAST, rows, _LANES))
        self._last = np.full(rows, _ABSENT)  # token
        self._pairs = np.full((rows, 2), _ABSENT)
        self._tails = np.full((rows, _LAGS), _ABSENT)
        self._heads = np.full((rows, _LAGS), _ABSENT)
        self._flags = np.zeros((rows, REPETITION_TOKENS - 1), dtype=np.bool_)

    def advance(
        self,
        rows: NDArray[np.integer[Any]],
        signals: NDArray[np.float32],
        token_ids: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
    ) -> NDArray[np.float32]:
        """Take the next t tokens of each of some rows and return their features.

        Args:
            rows: (n,) rows of the batch, each at most once.
            signals: (n, t, 28) in the order of `schema.SIGNALS`, NaN where undefined.
            token_ids: (n, t) the tokens.
            positions: (n,) how many tokens each row had before.

        Returns:
            (n, t, 40) in the order of `schema.FEATURE_NAMES`.

        Raises:
            ValueError: a position does not follow the row's last one.
        """
        expected = self._position[rows]
        if (expected != positions).any():
            raise ValueError(f"positions must be {expected.tolist()}, got {positions.tolist()}")
        count = token_ids.shape[1]
        features = np.empty((len(rows), count, len(schema.FEATURE_NAMES)), dtype=np.float32)
        features[..., :_FLAG] = signals

        new_lanes = _rolling_lanes(signals[..., _ROLLED_COLUMNS]).swapaxes(0, 1)
        lanes = np.concatenate([self._lanes[:, rows], new_lanes])
        self._lanes[:, rows] = lanes[count:]
        features[..., _STATISTICS] = _rolling_statistics(lanes).swapaxes(0, 1)

        tokens = np.concatenate([self._last[rows, None], token_ids], axis=1)
        pairs = np.concatenate([self._pairs[rows], tokens[:, :-1] << 32 | tokens[:, 1:]], axis=1)
        self._last[rows], self._pairs[rows] = tokens[:, -1], pairs[:, count:]
        heads, tails = pairs[:, :count], pairs[:, 2:]
        repeated = self._repeated(rows, np.where(heads >= 0, tails, _ABSENT), heads)
        flags = np.concatenate([self._flags[rows], repeated], axis=1)
        self._flags[rows] = flags[:, count:]

        features[..., _FLAG] = repeated
        total = flags.cumsum(axis=1)
        features[..., _SUM] = total[:, REPETITION_TOKENS - 1 :]
        features[:, 1:, _SUM] -= total[:, : count - 1]
        at = expected[:, None] + np.arange(count)
        features[..., _POSITION] = at / self._limit[rows, None]
        features[..., _RATIO] = self._ratio[rows, None]
        self._position[rows] = expected + count
        return features

    def _repeated(
        self,
        rows: NDArray[np.integer[Any]],
        tails: NDArray[np.int64],
        heads: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """(n, t) whether the n-grams that end at new tokens stand earlier; they are remembered."""
        tails = np.concatenate([self._tails[rows], tails], axis=1)  # (n, 124 + t)
        heads = np.concatenate([self._heads[rows], heads], axis=1)
        new = slice(_LAGS, None)
        self._tails[rows], self._heads[rows] = tails[:, -_LAGS:], heads[:, -_LAGS:]
        same = sliding_window_view(tails[:, :-1], _LAGS, axis=1) == tails[:, new, None]
        same &= tails[:, new, None] != _ABSENT
        if same.any():  # two pairs rarely agree in one and differ in the other
            same &= sliding_window_view(heads[:, :-1], _LAGS, axis=1) == heads[:, new, None]
        return np.asarray(same.any(axis=2))

    def move(self, source: int, target: int) -> None:
        """Let the request in row ``source`` go on in row ``target``, whose past is lost."""
        states: tuple[NDArray[Any], ...] = (self._limit, self._ratio, self._position)
        for state in states + self._tokens_seen():
            state[target] = state[source]
        self._lanes[:, target] = self._lanes[:, source]

    def reset(self, row: int, ratio: float, max_new_tokens: int) -> None:
        """Forget a row's past: a new request begins there."""
        self._limit[row] = max_new_tokens
        self._ratio[row] = ratio
        self._position[row] = 0
        self._lanes[:, row] = 0
        for state in self._tokens_seen():
            state[row] = _ABSENT
        self._flags[row] = False

    def _tokens_seen(self) -> tuple[NDArray[Any], ...]:
        return self._last, self._pairs, self._tails, self._heads, self._flags

    def replace(
        self,
        row: int,
        signals: NDArray[np.float32],
        token_ids: NDArray[np.integer[Any]],
        ratio: float | None = None,
    ) -> None:
        """Put another past in a row's place, as after a rewind.

        Args:
            row: the row of the batch.
            signals: (t, 28) of all its tokens so far, NaN where undefined.
            token_ids: (t,) those tokens.
            ratio: the row's compression ratio from here on; None: as before.

        Raises:
            ValueError: signals and tokens of different length.
        """
        length = len(token_ids)
        if len(signals) != length:
            raise ValueError(f"signals of {len(signals)} tokens, but {length} token ids")
        self.reset(row, self._ratio[row] if ratio is None else ratio, int(self._limit[row]))
        self._position[row] = length
        if not length:
            return
        lanes = _rolling_lanes(signals[-_PAST:, _ROLLED_COLUMNS])
        self._lanes[_PAST - len(lanes) :, row] = lanes
        # The last 31 flags look back 127 tokens each; what lies further back is forgotten anyway.
        kept = np.asarray(token_ids, dtype=np.int64)[-(REPETITION_TOKENS + NGRAM_WINDOW_TOKENS) :]
        position = np.arange(len(kept))
        pairs, tails, heads = _ngrams(kept, position)
        self._last[row] = kept[-1]
        self._pairs[row, -min(2, length) :] = pairs[-2:]
        for state, values in ((self._tails, tails), (self._heads, heads)):
            state[row, -min(_LAGS, length) :] = values[-_LAGS:]
        flags = _repeated_in(kept, position)[1 - REPETITION_TOKENS :]
        self._flags[row, len(self._flags[row]) - len(flags) :] = flags


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
    columns = [*schema.TRACE_KEYS, "max_new_tokens"]
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
    [*_KEY_FIELDS, ("token_id", pa.int32()), *((name, pa.float32()) for name in _SIGNALS)]
)
_FEATURES = pa.schema([*_KEY_FIELDS, *((name, pa.float32()) for name in schema.FEATURE_NAMES)])


def _compute_piece(piece: pa.Table, traces: pl.DataFrame) -> pa.Table:
    """`compute_features` from `_PIECE` to `_FEATURES`; what does not change is not copied."""
    text = {name: piece[name].combine_chunks() for name in schema.TRACE_KEYS}
    codes = {name: pl.Series(column.indices) for name, column in text.items()}
    numbers = pl.DataFrame(piece.select(["position", "token_id", *ROLLED]))
    offsets = schema.trace_offsets(numbers.select("position").with_columns(**codes))
    if offsets is None:
        named = pl.DataFrame(piece).with_columns(pl.col(schema.TRACE_KEYS).cast(pl.String))
        return _compute_piece(schema.order_by_trace(named)[0].to_arrow().cast(_PIECE), traces)
    # A name for each trace, and again as codes: those of the file may count many other traces.
    starts = pl.Series(offsets[:-1]).to_arrow()
    names = {name: column.take(starts).cast(pa.string()) for name, column in text.items()}
    trace = pl.Series(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))).to_arrow()
    derived = _derived_columns(numbers, offsets, pl.DataFrame(names), traces)
    return pa.Table.from_arrays(
        [
            *(column.dictionary_encode().take(trace) for column in names.values()),
            piece["position"],
            *(piece[name] for name in _SIGNALS),
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

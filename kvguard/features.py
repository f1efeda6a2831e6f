"""Features of a token: its signals, their last few values, repetition, position and ratio.

The same kernels serve tables and streaming, and the results agree bit for bit. `compute_features`
and `feature_files.build_features` process concatenated traces; `FeatureState` stores what a kernel
needs of earlier tokens and processes the next tokens of each row of a batch. Sums are float64,
added in one fixed order, and cast to float32 at the end.

- ``repeated_ngram`` is 1 where the 4-gram that ends here also occurs earlier within the last 128
  generated tokens; the two occurrences may overlap. ``repetition_sum`` is its sum over the last 32
  tokens.
- ``entropy_mean``, ``entropy_max``, ``top1_probability_mean`` and ``runner_up_probability_mean``
  (top-5 minus top-1) are over all tokens of the request so far. They are summed in units of 2^-32,
  so that the order of summation makes no difference.
- The probes of `schema.PROBE_NAMES` are measured once, at prefill, and are the same for all tokens.
- ``*_mean_8`` and ``*_std_8`` (population standard deviation) are over the last 8 tokens, or over
  as many as there are. An undefined value (``entropy_delta`` of the first token) is left out; where
  none is left the feature is null in tables and NaN in arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
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
_WITH_PROBES = tuple(name for name in schema.FEATURE_NAMES if name != "compression_ratio")
_NO_RATIO = tuple(name for name in _WITH_PROBES if name not in schema.PROBE_NAMES)
_NO_REPETITION = tuple(name for name in _NO_RATIO if name not in _REPETITION)

SEQUENCE_SIGNALS: tuple[str, ...] = (
    *("entropy", "alternatives_entropy", "chosen_logprob", "entropy_delta", "relative_position"),
    *(f"top_logprob_{rank:02d}" for rank in range(schema.TOP_LOGPROBS)),
)
SEQUENCE_FEATURES = (*SEQUENCE_SIGNALS, *schema.PROBE_NAMES)
"""What a sequence predictor reads: of each token alone, for it makes its own of earlier ones."""

FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "full": schema.FEATURE_NAMES,
    "with_probes": _WITH_PROBES,
    "normalised": _WITH_PROBES,
    "no_ratio": _NO_RATIO,
    "no_repetition": _NO_REPETITION,
    "logit_only": tuple(name for name in _NO_REPETITION if name != "relative_position"),
    "entropy_only": ("entropy", "entropy_mean_8", "entropy_std_8", "entropy_mean", "entropy_max"),
    "clock_repetition": (*_REPETITION, "relative_position"),
    "probes_only": schema.PROBE_NAMES,
    "with_evidence": (*_NO_RATIO, *schema.EVIDENCE_NAMES),
}
"""Named ablation sets. From ``full`` to ``logit_only`` each one drops what the one before it drops,
and more: the ratio, the probes, repetition, position. ``clock_repetition`` is what a clock and a
loop detector know. ``normalised`` reads the columns of ``with_probes``, the probes as ranks under
their press (`probe_scale`). ``with_evidence`` adds to ``no_ratio`` what checks have said of the
request (`evidence`)."""


def without_evidence(names: Sequence[str]) -> tuple[str, ...]:
    """The names that every token has: a search and scores beside the trees go without evidence."""
    return tuple(name for name in names if name not in schema.EVIDENCE_NAMES)


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
_SUM, _POSITION, _RATIO = range(_STATISTICS.stop, _STATISTICS.stop + 3)
_SO_FAR = slice(_RATIO + 1, _RATIO + 5)
_PROBES = slice(_SO_FAR.stop, len(schema.FEATURE_NAMES))
_FIXED_POINT = 2.0**32
_FIXED_LIMIT = 2**39  # above any signal in these units
_SO_FAR_COLUMNS = np.array(
    [_SIGNALS.index(name) for name in ("entropy", "top1_probability", "top5_probability")]
)


def compute_features(tokens: pl.DataFrame, traces: pl.DataFrame) -> pl.DataFrame:
    """Compute the features of every token of a table.

    Args:
        tokens: at least the columns `schema.TOKEN_KEYS`, ``token_id`` and `schema.SIGNALS`, of
            whole traces.
        traces: at least `schema.TRACE_KEYS` and ``max_new_tokens``, of all those traces; probes
            that it does not have are null.

    Returns:
        `schema.FEATURES`, trace by trace in order of position; null where undefined.

    Raises:
        ValueError: a trace's positions do not count 0, 1, 2, ..., or its ``max_new_tokens`` is not
            known or smaller than its number of tokens.
    """
    tokens, offsets = schema.order_by_trace(tokens.select(_TOKEN_COLUMNS))
    keys = tokens[offsets[:-1]].select(schema.TRACE_KEYS)
    derived = derived_columns(tokens, offsets, keys, traces)
    frame = tokens.select(
        *schema.TOKEN_KEYS, *(pl.col(name).cast(pl.Float32) for name in _SIGNALS)
    ).hstack(derived)
    return schema.check(frame, schema.FEATURES, "features")


_TOKEN_COLUMNS = (*schema.TOKEN_KEYS, "token_id", *_SIGNALS)


def derived_columns(
    tokens: pl.DataFrame, offsets: NDArray[np.int64], keys: pl.DataFrame, traces: pl.DataFrame
) -> list[pl.Series]:
    """The features that are not signals, of tokens in trace order.

    Args:
        tokens: ``position``, ``token_id``, the signals `ROLLED` and ``top5_probability``.
        offsets: (traces + 1,) where each trace begins.
        keys: `schema.TRACE_KEYS` of each of them.
        traces: as `compute_features`.
    """
    known = traces.select(
        *schema.TRACE_KEYS,
        "max_new_tokens",
        *(
            pl.col(name) if name in traces.columns else pl.lit(None, pl.Float32).alias(name)
            for name in schema.PROBE_NAMES
        ),
    )
    limits = keys.join(
        known,
        on=schema.TRACE_KEYS,
        how="left",
        maintain_order="left",
    )
    lengths = np.diff(offsets)
    wrong = limits.filter(
        pl.col("max_new_tokens").is_null() | (pl.col("max_new_tokens") < pl.Series(lengths))
    )
    if wrong.height:
        row = wrong.select(*schema.TRACE_KEYS, "max_new_tokens").row(0, named=True)
        raise ValueError(f"max_new_tokens must be at least a trace's number of tokens, got {row}")
    rolled = [tokens[name].to_numpy() for name in ROLLED]
    so_far = [tokens[_SIGNALS[column]].to_numpy() for column in _SO_FAR_COLUMNS]
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
        derived[_SO_FAR.start - _FLAG : _SO_FAR.stop - _FLAG, rows] = _so_far_block(
            np.stack([column[rows] for column in so_far]), lengths[first:last]
        )
    position = tokens["position"].to_numpy()
    derived[_POSITION - _FLAG] = position / np.repeat(limits["max_new_tokens"].to_numpy(), lengths)
    derived[_RATIO - _FLAG] = np.repeat(keys["ratio"].cast(pl.Float64).to_numpy(), lengths)
    probes = limits.select(schema.PROBE_NAMES).to_numpy().astype(np.float32)
    derived[_PROBES.start - _FLAG :] = np.repeat(probes, lengths, axis=0).T
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
    """Fill rolling statistics and repetition in ``derived``, for whole traces end to end.

    Args:
        rolled: (4, n) the signals `ROLLED`, NaN where undefined.
        token_ids: (n,).
        lengths: (traces,) their numbers of tokens; none is 0.
        derived: (features that are not signals, n), filled in place.
    """
    first = np.cumsum(lengths) - lengths
    statistics = derived[_STATISTICS.start - _FLAG : _STATISTICS.stop - _FLAG]
    # As if all rows were one trace; then each one's first 7 tokens, whose window crossed its start.
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


def _fixed_point(signals: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(3, ...) entropy, top-1 and top-5 probability -> what is summed, and 1 where it is defined.

    Returns:
        (3, ...) entropy, top-1 probability and top-5 minus top-1, in units of 2^-32.
    """
    values = signals.astype(np.float64)
    values = np.stack([values[0], values[1], values[2] - values[1]])
    defined = ~np.isnan(values)
    units = np.rint(np.where(defined, values, 0.0) * _FIXED_POINT)
    return units.clip(1 - _FIXED_LIMIT, _FIXED_LIMIT - 1).astype(np.int64), defined.astype(np.int64)


def _so_far(
    totals: NDArray[np.int64], counts: NDArray[np.int64], largest: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sums and counts (3, ...) and the largest entropy (...) -> the four features (4, ...)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, totals / _FIXED_POINT / counts, np.nan)
    highest = np.where(counts[0] > 0, largest / _FIXED_POINT, np.nan)
    return np.stack([means[0], highest, means[1], means[2]])


def _so_far_block(signals: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """The four features over all tokens so far, (3, n) -> (4, n), for whole traces end to end."""
    units, defined = _fixed_point(signals)
    first = np.cumsum(lengths) - lengths
    totals, counts = (_cumulative(part, first, lengths) for part in (units, defined))
    # one running maximum for all traces: each one's values lie above all those of the one before
    level = np.repeat(np.arange(len(lengths)), lengths) * (2 * _FIXED_LIMIT)
    entropy = np.where(defined[0] > 0, units[0], -_FIXED_LIMIT)
    return _so_far(totals, counts, np.maximum.accumulate(entropy + level) - level)


def _cumulative(
    values: NDArray[np.int64], first: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Cumulative sums (k, n) that begin again at each trace; integers, hence exact."""
    total = np.cumsum(values, axis=1)
    before = np.where(first > 0, total[:, first - 1], 0)
    return np.asarray(total - np.repeat(before, lengths, axis=1))


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
    """(n,) whether the n-gram that ends here occurs earlier in its trace, within the window."""
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
    if len(rows):  # few candidates are left: compare the rest only there
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
        probes: (rows, probes) or one for all, in the order of `schema.PROBE_NAMES`; None: unknown.
    """

    def __init__(
        self,
        rows: int,
        max_new_tokens: ArrayLike,
        ratio: ArrayLike,
        probes: ArrayLike | None = None,
    ) -> None:
        self._limit = np.empty(rows, dtype=np.int64)
        self._limit[:] = max_new_tokens
        self._ratio = np.empty(rows, dtype=np.float32)
        self._ratio[:] = ratio
        self._probes = np.empty((rows, len(schema.PROBE_NAMES)), dtype=np.float32)
        self._probes[:] = np.nan if probes is None else probes
        self._position = np.zeros(rows, dtype=np.int64)
        # Over all tokens so far: sums and counts of `_fixed_point`, and the largest entropy.
        self._totals = np.zeros((rows, 3), dtype=np.int64)
        self._counts = np.zeros((rows, 3), dtype=np.int64)
        self._largest = np.full(rows, -_FIXED_LIMIT)
        # The tokens so far, newest last; `_ABSENT` and 0 pad before the first token.
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
            (n, t, features) in the order of `schema.FEATURE_NAMES`.

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
        features[..., _PROBES] = self._probes[rows, None]
        self._position[rows] = expected + count

        units, defined = _fixed_point(np.moveaxis(signals[..., _SO_FAR_COLUMNS], -1, 0))
        totals = self._totals[rows].T[..., None] + units.cumsum(axis=2)
        counts = self._counts[rows].T[..., None] + defined.cumsum(axis=2)
        entropy = np.where(defined[0] > 0, units[0], -_FIXED_LIMIT)
        largest = np.maximum.accumulate(
            np.concatenate([self._largest[rows, None], entropy], axis=1), axis=1
        )[:, 1:]
        self._totals[rows], self._counts[rows] = totals[..., -1].T, counts[..., -1].T
        self._largest[rows] = largest[:, -1]
        features[..., _SO_FAR] = np.moveaxis(_so_far(totals, counts, largest), 0, -1)
        return features

    def _repeated(
        self,
        rows: NDArray[np.integer[Any]],
        tails: NDArray[np.int64],
        heads: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """(n, t) whether the n-grams that end at new tokens occur earlier; they are then stored."""
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
        states: tuple[NDArray[Any], ...] = (self._limit, self._ratio, self._position, self._probes)
        for state in (*states, *self._tokens_seen(), self._totals, self._counts, self._largest):
            state[target] = state[source]
        self._lanes[:, target] = self._lanes[:, source]

    def reset(
        self,
        row: int,
        ratio: float,
        max_new_tokens: int,
        probes: NDArray[np.float32] | None = None,
    ) -> None:
        """Forget a row's past: a new request begins there, with its probes where there are any."""
        self._limit[row] = max_new_tokens
        self._probes[row] = np.nan if probes is None else probes
        self._totals[row] = self._counts[row] = 0
        self._largest[row] = -_FIXED_LIMIT
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
        kept_ratio = self._ratio[row] if ratio is None else ratio
        self.reset(row, kept_ratio, int(self._limit[row]), self._probes[row].copy())
        self._position[row] = length
        if not length:
            return
        units, defined = _fixed_point(signals[:, _SO_FAR_COLUMNS].T)
        self._totals[row], self._counts[row] = units.sum(axis=1), defined.sum(axis=1)
        self._largest[row] = np.where(defined[0] > 0, units[0], -_FIXED_LIMIT).max()
        lanes = _rolling_lanes(signals[-_PAST:, _ROLLED_COLUMNS])
        self._lanes[_PAST - len(lanes) :, row] = lanes
        # The last 31 flags depend on 127 earlier tokens each; anything further back has no effect.
        kept = np.asarray(token_ids, dtype=np.int64)[-(REPETITION_TOKENS + NGRAM_WINDOW_TOKENS) :]
        position = np.arange(len(kept))
        pairs, tails, heads = _ngrams(kept, position)
        self._last[row] = kept[-1]
        self._pairs[row, -min(2, length) :] = pairs[-2:]
        for state, values in ((self._tails, tails), (self._heads, heads)):
            state[row, -min(_LAGS, length) :] = values[-_LAGS:]
        flags = _repeated_in(kept, position)[1 - REPETITION_TOKENS :]
        self._flags[row, len(self._flags[row]) - len(flags) :] = flags

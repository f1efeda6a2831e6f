"""A gated recurrent unit over an answer's tokens: one step, whole answers, rows of a batch.

The recurrence is that of `torch.nn.GRU` (Cho et al. 2014) with a linear head, in NumPy, float64,
so that tables and the decode loop run the same code. A score is rounded to `DECIMALS`: batches of
different sizes may differ in the last bits of a product, and so does a state, but no score.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from kvguard import schema

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOWEST = -20.0
"""Nats; a smaller log-probability counts as this."""

DECIMALS = 5
"""Of a score, which is a log-odds."""

WEIGHTS = ("input", "hidden", "input_bias", "hidden_bias", "head", "head_bias", "means", "scales")
"""Names of a unit's arrays."""

_FIRST_TOKENS = 64  # tokens that `RowStates` has room for before it grows
_POSITION = schema.FEATURE_NAMES.index("relative_position")


class Gru:
    """A unit with a linear head, as `sequence_predictor.fit_gru` makes it.

    Attributes:
        weights: ``input`` (3 h, f) and ``hidden`` (3 h, h) hold the rows of the reset gate, the
            update gate and the candidate; ``input_bias`` and ``hidden_bias`` (3 h,); ``head`` (h,)
            and ``head_bias`` (); ``means`` and ``scales`` (f,) of the inputs.

    Raises:
        ValueError: an array is missing, of another shape or not finite; names it.
    """

    def __init__(self, weights: Mapping[str, ArrayLike]) -> None:
        missing = [name for name in WEIGHTS if name not in weights]
        if missing:
            raise ValueError(f"the weights {missing} are missing")
        self.weights = {name: np.asarray(weights[name], np.float64) for name in WEIGHTS}
        size, width = len(self.weights["head"].ravel()), len(self.weights["means"].ravel())
        shapes: dict[str, tuple[int, ...]] = {
            "input": (3 * size, width),
            "hidden": (3 * size, size),
            "input_bias": (3 * size,),
            "hidden_bias": (3 * size,),
            "head": (size,),
            "head_bias": (),
            "means": (width,),
            "scales": (width,),
        }
        for name, shape in shapes.items():
            array = self.weights[name]
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, not {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite")
        if not (self.weights["scales"] > 0).all():
            raise ValueError("scales must be positive")
        self.size, self.width = size, width

    def to_json(self) -> dict[str, Any]:
        """The weights as lists of numbers."""
        return {name: array.tolist() for name, array in self.weights.items()}

    def start(self, rows: int) -> Floats:
        """The state (rows, h) before the first token."""
        return np.zeros((rows, self.size))

    def project(self, inputs: NDArray[Any]) -> Floats:
        """What the gates get of inputs (..., f), NaN: missing, counts as the mean: (..., 3 h)."""
        own = self.weights
        return (
            np.asarray(standardised(inputs, own["means"], own["scales"]) @ own["input"].T)
            + (own["input_bias"])
        )

    def step(self, state: Floats, projected: Floats) -> Floats:
        """The state (n, h) after one more token of each row, from `project` (n, 3 h)."""
        size = self.size
        from_state = state @ self.weights["hidden"].T + self.weights["hidden_bias"]
        gates = expit(projected[:, : 2 * size] + from_state[:, : 2 * size])
        reset, update = gates[:, :size], gates[:, size:]
        new = np.tanh(projected[:, 2 * size :] + reset * from_state[:, 2 * size :])
        return np.asarray(new + update * (state - new), np.float64)

    def score(self, state: Floats) -> Floats:
        """Log-odds (...) of states (..., h); higher is riskier."""
        return np.round(state @ self.weights["head"] + self.weights["head_bias"], DECIMALS)

    def predict(self, inputs: NDArray[Any], lengths: Ints) -> Floats:
        """Log-odds of every token of whole answers: (tokens,).

        Args:
            inputs: (tokens, f) answer after answer.
            lengths: (answers,) tokens of each; they sum to ``tokens``.

        Raises:
            ValueError: another number of columns or of tokens.
        """
        if inputs.ndim != 2 or inputs.shape != (int(lengths.sum()), self.width):
            raise ValueError(
                f"inputs have shape ({int(lengths.sum())}, {self.width}): one row a token; got "
                f"{inputs.shape}"
            )
        order = np.argsort(-lengths, kind="stable")  # those that go on come first
        starts = (np.cumsum(lengths) - lengths)[order]
        going = np.searchsorted(-lengths[order], -np.arange(int(lengths.max(initial=0))))
        scores = np.empty(len(inputs))
        state = self.start(len(lengths))
        for position, count in enumerate(going):
            at = starts[:count] + position
            state = self.step(state[:count], self.project(inputs[at]))
            scores[at] = self.score(state)
        return scores


def standardised(inputs: NDArray[Any], means: Floats, scales: Floats) -> Floats:
    """Standard deviations from the mean; a missing value counts as the mean."""
    return np.asarray(np.nan_to_num((clipped(inputs) - means) / scales), np.float64)


def clipped(inputs: NDArray[Any]) -> Floats:
    """Inputs with log-probabilities of at least `LOWEST`."""
    return np.asarray(np.maximum(np.asarray(inputs, np.float64), LOWEST), np.float64)


def answer_lengths(features: NDArray[np.float32]) -> Ints:
    """Tokens of each answer in a table of features: the relative position says where one begins.

    Args:
        features: (n, features) in the order of `schema.FEATURE_NAMES`: answers, or their
            beginnings, one after the other, each from its first token and without a gap.

    Returns:
        (answers,) they sum to n.

    Raises:
        ValueError: an answer begins late, or a token of it is missing.
    """
    relative = features[:, _POSITION].astype(np.float64)
    starts = np.flatnonzero(relative == 0)
    if not len(relative):
        return np.zeros(0, np.int64)
    if not len(starts) or starts[0] != 0:
        raise ValueError(
            "a sequence predictor needs answers from their first token: the first row has "
            f"relative_position {relative[0]:g}, not 0"
        )
    lengths = np.diff(np.append(starts, len(relative)))
    unit = np.repeat(relative[np.minimum(starts + 1, len(relative) - 1)], lengths)
    counted = np.arange(len(relative)) - np.repeat(starts, lengths)
    wrong = np.flatnonzero((counted > 1) & ~(np.abs(relative - counted * unit) < unit / 2))
    if len(wrong):
        raise ValueError(
            "a sequence predictor needs every token of an answer, in order: row "
            f"{wrong[0]} is not the token after row {wrong[0] - 1}"
        )
    return lengths


class RowStates:
    """The state after every token of each row of a batch, so that a row can be cut at any token.

    Args:
        gru: the unit.
        rows: size of the batch.

    Attributes:
        lengths: (rows,) tokens that each row has had.
    """

    def __init__(self, gru: Gru, rows: int) -> None:
        self.gru = gru
        self.lengths = np.zeros(rows, np.int64)
        self._states = np.zeros((rows, 1 + _FIRST_TOKENS, gru.size))  # 0: before the first token

    def advance(
        self, rows: NDArray[np.integer[Any]], inputs: NDArray[Any], counts: NDArray[np.integer[Any]]
    ) -> Floats:
        """Take the next tokens of some rows.

        Args:
            rows: (n,) each at most once.
            inputs: (n, t, f), NaN: missing.
            counts: (n,) how many of the t tokens each row has.

        Returns:
            (n, t) log-odds; undefined from ``counts`` on.
        """
        before = self.lengths[rows]
        needed = int((before + counts).max(initial=0)) + 1
        if needed > self._states.shape[1]:
            grown = np.zeros((len(self._states), 2 * needed, self.gru.size))
            grown[:, : self._states.shape[1]] = self._states
            self._states = grown
        projected = self.gru.project(inputs)
        for ahead in range(inputs.shape[1]):
            going = np.flatnonzero(counts > ahead)
            row, at = rows[going], before[going] + ahead
            state = self.gru.step(self._states[row, at], projected[going, ahead])
            self._states[row, at + 1] = state
        self.lengths[rows] = before + counts
        after = before[:, None] + 1 + np.minimum(np.arange(inputs.shape[1]), counts[:, None] - 1)
        return self.gru.score(self._states[rows[:, None], np.maximum(after, 0)])

    def cut(self, row: int, length: int) -> None:
        """Let a row have had its first ``length`` tokens alone; at most as many as it has had."""
        self.lengths[row] = min(length, int(self.lengths[row]))

    def move(self, source: int, target: int) -> None:
        """Let the request in row ``source`` go on in row ``target``, whose past is lost."""
        self.lengths[target] = self.lengths[source]
        self._states[target] = self._states[source]

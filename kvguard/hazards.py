"""Hazards of the next tokens of each row of a batch: features, and what a predictor makes of them.

A predictor that judges every token by its features needs no memory; one that reads an answer as a
sequence has a state for each row. `HazardState` hides the difference from the decode loop.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard.evidence import EvidenceState
from kvguard.features import FeatureState
from kvguard.gru import RowStates
from kvguard.predictor import Predictor, PressPredictor, for_press
from kvguard.schema import COLUMN_NAMES, FEATURE_NAMES

Features = NDArray[np.float32]


class HazardModel(Protocol):
    """What the guard asks of a predictor."""

    feature_version: int

    def predict(self, features: Features) -> NDArray[np.float32]:
        """Hazard in [0, 1] of each row of (n, features) in schema.FEATURE_NAMES order."""


class HazardState:
    """What the hazards of the next tokens need of the past, for each row of a batch.

    Args:
        model: the predictor.
        rows: size of the batch.
        max_new_tokens: of every request, unless `reset` says otherwise.
        ratio: compression ratio, likewise.
    """

    def __init__(
        self, model: HazardModel, rows: int, max_new_tokens: ArrayLike, ratio: ArrayLike
    ) -> None:
        bound = for_press(model, "") if isinstance(model, Predictor) else model
        self.model = model
        self._features = FeatureState(rows, max_new_tokens, ratio)
        own = bound.predictor if isinstance(bound, PressPredictor) else bound
        reads = isinstance(own, Predictor) and own.reads_evidence
        self._evidence = EvidenceState(rows) if reads else None
        self._sequence: PressPredictor | None = None
        self._states: RowStates | None = None
        if isinstance(bound, PressPredictor) and bound.predictor.gru is not None:
            self._sequence, self._states = bound, RowStates(bound.predictor.gru, rows)

    def reset(
        self, row: int, ratio: float, max_new_tokens: int, probes: Features | None = None
    ) -> None:
        """Forget a row's past: a new request begins there, with its probes where there are any."""
        self._features.reset(row, ratio, max_new_tokens, probes)
        if self._states is not None:
            self._states.cut(row, 0)
        if self._evidence is not None:
            self._evidence.reset(row)

    def move(self, source: int, target: int) -> None:
        """Let the request in row ``source`` go on in row ``target``, whose past is lost."""
        self._features.move(source, target)
        if self._states is not None:
            self._states.move(source, target)
        if self._evidence is not None:
            self._evidence.move(source, target)

    def checked(self, row: int, kept: int, llr: NDArray[np.float32], *, rejected: bool) -> None:
        """Take in what a check has said of a row; arguments as `EvidenceState.checked`."""
        if self._evidence is not None:
            self._evidence.checked(row, kept, llr, rejected)

    def replace(
        self,
        row: int,
        signals: NDArray[np.float32],
        token_ids: NDArray[np.integer[Any]],
        ratio: float | None = None,
    ) -> None:
        """Put another past in a row's place: the first tokens of what it has had.

        Arguments as `FeatureState.replace`. Tokens that no call of `predict` has seen, as after an
        error, are taken in here.
        """
        states = self._states
        if states is None:
            self._features.replace(row, signals, token_ids, ratio)
            return
        had, count = int(states.lengths[row]), len(token_ids)
        if count > had:
            self._features.replace(row, signals[:had], token_ids[:had], ratio)
            one = np.array([row])
            new = self._features.advance(
                one, signals[None, had:], token_ids[None, had:], np.array([had])
            )
            self.predict(one, new, np.array([count - had]))
        else:
            self._features.replace(row, signals, token_ids, ratio)
            states.cut(row, count)

    def features(
        self,
        rows: NDArray[np.intp],
        seen: NDArray[np.int64],
        counts: NDArray[np.int64],
        signals: NDArray[np.float32],
        history: NDArray[np.integer[Any]],
    ) -> Features:
        """Take the next tokens of some rows.

        Args:
            rows: (n,) rows of the batch, each at most once.
            seen: (n,) how many tokens each has had.
            counts: (n,) how many it has more, at least 1.
            signals: (rows of the batch, tokens, 28) of all tokens.
            history: (rows of the batch, tokens) ids of all tokens.

        Returns:
            (n, most tokens, features); zeros from a row's ``counts`` on. Evidence of checks stands
            behind the features where the predictor reads it.
        """
        width = len(FEATURE_NAMES)
        wanted = width if self._evidence is None else len(COLUMN_NAMES)
        found = np.zeros((len(rows), int(counts.max()), wanted), np.float32)
        for count in set(counts.tolist()):  # mostly one: rows in step with each other
            index = np.flatnonzero(counts == count)
            row, at = rows[index], seen[index, None] + np.arange(count)
            found[index, :count, :width] = self._features.advance(
                row, signals[row[:, None], at], history[row[:, None], at], at[:, 0]
            )
            if self._evidence is not None:
                found[index, :count, width:] = self._evidence.values(row, at)
        return found

    def predict(
        self, rows: NDArray[np.intp], features: Features, counts: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Hazards of the tokens whose features the last call of `features` gave.

        Returns:
            (n, most tokens); NaN, no evidence for the controller, where a row has no such token.
        """
        present = np.arange(features.shape[1]) < counts[:, None]
        hazard = np.full(present.shape, np.nan, np.float32)
        if self._sequence is None or self._states is None:
            hazard[present] = self.model.predict(features[present])
            return hazard
        sequence = self._sequence
        own = sequence.inputs(features[present])
        inputs = np.zeros((*present.shape, own.shape[1]), np.float32)
        inputs[present] = own
        odds = self._states.advance(rows, inputs, counts)
        hazard[present] = sequence.predictor.calibration.apply(odds[present])
        return hazard

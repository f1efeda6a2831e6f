"""Evidence of checks: what the uncompressed model has said of a request's tokens so far.

A guarded request is checked now and then; how surprising its accepted tokens were to the
uncompressed model, and how long ago that was, are features of the next tokens. `EvidenceState`
takes in checks as they happen; `supposed_checks` derives evidence for stored traces, which were
never checked. Sums are in units of 2^-32 nats, so that the order of summation makes no difference
and the two agree bit for bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvguard import schema

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

UNITS = 2.0**32
LIMIT_NATS = 128.0
"""Beyond it a log-likelihood ratio says nothing more."""
NEVER = -1
"""In place of the number of checked tokens: no check yet."""


class EvidenceState:
    """What checks have said of each row of a batch.

    Args:
        rows: size of the batch.
    """

    def __init__(self, rows: int) -> None:
        self._rejections = np.zeros(rows, np.int64)
        self._checked = np.full(rows, NEVER)  # tokens that had been kept at the last check
        self._count = np.zeros(rows, np.int64)
        self._total = np.zeros(rows, np.int64)
        self._largest = np.zeros(rows, np.int64)
        self._last = np.zeros(rows, np.int64)

    def reset(self, row: int) -> None:
        """Forget a row's checks: a new request begins there."""
        for state in self._states():
            state[row] = 0
        self._checked[row] = NEVER

    def move(self, source: int, target: int) -> None:
        """Let the request in row ``source`` go on in row ``target``."""
        for state in (*self._states(), self._checked):
            state[target] = state[source]

    def checked(self, row: int, kept: int, llr: Floats, rejected: bool) -> None:
        """Take in a check.

        Args:
            row: which.
            kept: tokens that it leaves.
            llr: (n,) compressed minus uncompressed log-probability, nats, of the tokens that it
                accepted and no earlier check had.
            rejected: whether it rejected one.
        """
        units = fixed_point(llr)
        if len(units):
            largest = int(units.max())
            self._largest[row] = max(largest, self._largest[row]) if self._count[row] else largest
            self._total[row] += units.sum()
            self._count[row] += len(units)
            self._last[row] = units[-1]
        self._checked[row] = kept
        self._rejections[row] += rejected

    def values(self, rows: NDArray[np.integer[Any]], positions: Ints) -> Floats:
        """Evidence (n, t, 5) of tokens at ``positions`` (n, t), in order of `EVIDENCE_NAMES`."""
        rejections, last, largest, total, count, checked = (
            state[rows][:, None]
            for state in (
                self._rejections,
                self._last,
                self._largest,
                self._total,
                self._count,
                self._checked,
            )
        )
        return evidence_values(rejections, last, largest, total, count, checked, positions)

    def _states(self) -> tuple[Ints, ...]:
        return self._rejections, self._count, self._total, self._largest, self._last


def fixed_point(llr: Floats) -> Ints:
    """Nats in the units of the sums; undefined counts as 0."""
    nats = np.nan_to_num(llr.astype(np.float64), nan=0.0).clip(-LIMIT_NATS, LIMIT_NATS)
    return np.rint(nats * UNITS).astype(np.int64)


def evidence_values(
    rejections: Ints,
    last: Ints,
    largest: Ints,
    total: Ints,
    count: Ints,
    checked: Ints,
    positions: Ints,
) -> Floats:
    """The five columns, appended as a last axis; NaN where no check, or none of a token, was."""
    known = count > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / UNITS / count
    since = np.where(checked >= 0, np.maximum(positions + 1 - checked, 0), np.nan)
    columns = (
        np.asarray(rejections, np.float64),
        np.where(known, last / UNITS, np.nan),
        np.where(known, largest / UNITS, np.nan),
        np.where(known, mean, np.nan),
        since,
    )
    return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)


def no_evidence(count: int) -> Floats:
    """Evidence (count, 5) before any check: what a stored trace has."""
    nothing = np.full((count, len(schema.EVIDENCE_NAMES)), np.nan, np.float32)
    nothing[:, schema.EVIDENCE_NAMES.index("rejections")] = 0
    return nothing

"""The three-mode state machine that turns hazards into alarms; one implementation for all callers.

The live guard advances it token by token for the rows of a batch, calibration and the offline
simulation advance it for a grid of operating points at once. All of them call `step`.

**Rules.** A hazard is *risky* when it lies above the threshold that the mode watches, and *calm*
when it is at most ``tau_low``. Two counters hold the tokens in a row that were risky or calm.

=======  ==========================  ==================  ======================  ===============
mode     risky                       k risky in a row    calm                    j calm in a row
=======  ==========================  ==================  ======================  ===============
NORMAL   hazard > ``tau_low``        -> ALERT            (not counted)           stays
ALERT    hazard > ``tau_high``       -> SAFE             hazard <= ``tau_low``   -> NORMAL
SAFE     (not counted)               stays               hazard <= ``tau_low``   -> ALERT
=======  ==========================  ==================  ======================  ===============

- A token moves the mode by one at most, and **every transition sets both counters to 0**: a mode is
  left only on evidence seen in it. SAFE is therefore reached after 2 k tokens at the earliest.
- A token that is not risky sets the risky counter to 0, one that is not calm the calm counter; in
  ALERT a hazard between the thresholds does both.
- **A hazard that is NaN is no evidence**: the token changes neither the mode nor a counter. A
  predictor that fails therefore never calms the controller, and padding never moves it. "In a row"
  means in a row among the tokens that have a hazard.

An operating point with a lower ``tau_low``, a lower ``tau_high``, a smaller k or a larger j, all
else equal, reaches SAFE no later (each of them only widens the stretches spent in ALERT or the runs
in them).
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard import config
from kvguard.config import OperatingPoint

NEVER = -1
"""The position that `first_alarm` gives to a request that never reaches SAFE."""

_ROWS_PER_BLOCK = 512  # with 200 points, one block's state stays in a core's own cache

IntArray = NDArray[np.int32]


class Mode(IntEnum):
    """What the guard does with a request."""

    NORMAL = 0  # decode with the compressed cache
    ALERT = 1  # the same, but hold tokens back from the stream
    SAFE = 2  # decode with a cache at the safe ratio


class OperatingPoints(NamedTuple):
    """Many operating points, arrays of one shape; `step` takes them in place of a config."""

    tau_low: NDArray[np.float64]
    tau_high: NDArray[np.float64]
    k: NDArray[np.int16]
    j: NDArray[np.int16]

    def point(self, index: int) -> OperatingPoint:
        """The operating point at ``index`` of one-dimensional arrays."""
        return OperatingPoint(
            tau_low=float(self.tau_low[index]),
            tau_high=float(self.tau_high[index]),
            k=int(self.k[index]),
            j=int(self.j[index]),
        )


class ControllerState(NamedTuple):
    """Mode and counters of any number of requests (and points), arrays of one shape."""

    mode: NDArray[np.int8]
    risky: NDArray[np.int16]  # tokens in a row above the threshold that the mode watches
    calm: NDArray[np.int16]  # tokens in a row at or below tau_low, counted in ALERT and SAFE


def initial_state(shape: int | Sequence[int], mode: Mode = Mode.NORMAL) -> ControllerState:
    """Fresh state of that shape: everything in ``mode``, counters at 0."""
    return ControllerState(
        np.full(shape, mode, np.int8), np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    )


def stack_points(points: Iterable[OperatingPoint]) -> OperatingPoints:
    """G operating points as arrays (G,)."""
    listed = list(points)
    return OperatingPoints(
        np.array([point.tau_low for point in listed], np.float64),
        np.array([point.tau_high for point in listed], np.float64),
        np.array([point.k for point in listed], np.int16),
        np.array([point.j for point in listed], np.int16),
    )


def price_point(price: float, k: int = 1, j: int = 8) -> OperatingPoint:
    """The thresholds that a price asks for, where the hazard is a probability of harm.

    A check is due (SAFE) where the expected harm, the hazard, exceeds what a check costs in harmed
    requests, expected waste included. ALERT starts at half of it: the hazard may double before the
    next token is examined.

    >>> price_point(0.2)
    OperatingPoint(tau_low=0.1, tau_high=0.2, k=1, j=8)
    """
    return OperatingPoint(tau_low=price / 2, tau_high=price, k=k, j=j)


def grid_points(controller: config.Controller) -> OperatingPoints:
    """The grid (G,): every combination with ``tau_low`` <= ``tau_high``, then the prices' own."""
    return stack_points(
        [
            *(
                OperatingPoint(tau_low=tau_low, tau_high=tau_high, k=k, j=j)
                for tau_low, tau_high, k, j in product(
                    controller.tau_low, controller.tau_high, controller.k, controller.j
                )
                if tau_low <= tau_high
            ),
            *(price_point(price) for price in controller.prices.values()),
        ]
    )


def step(
    state: ControllerState, hazard: ArrayLike, points: OperatingPoint | OperatingPoints
) -> ControllerState:
    """Advance the state machine by one token; the rules are in the module's docstring.

    Shapes broadcast: state (G, N), hazard (N,) and points (G, 1) run G points over N requests;
    state (N,), hazard (N,) and one config run one batch.

    Args:
        state: state before the token; not modified.
        hazard: probability that a failure begins within the horizon; NaN is no evidence. Compared
            with the thresholds in float32, so that a scalar and an array of points agree.
        points: one operating point, or arrays of them.
    """
    tau_low = np.asarray(points.tau_low, np.float32)
    tau_high = np.asarray(points.tau_high, np.float32)
    hazard = np.asarray(hazard, np.float32)
    mode = state.mode
    normal, safe = mode == Mode.NORMAL, mode == Mode.SAFE

    is_risky = np.where(normal, hazard > tau_low, hazard > tau_high) & ~safe
    is_calm = (hazard <= tau_low) & ~normal
    risky = (state.risky + np.int16(1)) * is_risky
    calm = (state.calm + np.int16(1)) * is_calm
    unseen = np.isnan(hazard)
    if unseen.any():
        risky = np.where(unseen, state.risky, risky)
        calm = np.where(unseen, state.calm, calm)

    rises, falls = risky >= points.k, calm >= points.j  # never both: one of the counters is 0
    stays = ~(rises | falls)
    return ControllerState(
        mode + rises.view(np.int8) - falls.view(np.int8), risky * stays, calm * stays
    )


def at_rest(
    state: ControllerState, hazard: NDArray[np.float32], points: OperatingPoint
) -> NDArray[np.bool_]:
    """(n,) where `step` over several tokens would stay in NORMAL and end with both counters at 0.

    The usual case of a quiet request, decided by one comparison instead of a step for each token.

    Args:
        state: (n,) before the tokens.
        hazard: (n, t); NaN is no evidence.
        points: one operating point.
    """
    tau_low = np.float32(points.tau_low)
    calm, risky = (hazard <= tau_low).any(axis=1), (hazard > tau_low).any(axis=1)
    return np.asarray((state.mode == Mode.NORMAL) & calm & ~risky)


def first_alarm(
    hazard: NDArray[np.float32], lengths: ArrayLike, points: OperatingPoints
) -> IntArray:
    """Where each request first enters SAFE, for many points at once.

    Calls `step` on blocks of requests of similar length; memory beyond the result is a few small
    blocks, whatever the number of requests.

    Args:
        hazard: (N, T), one row a request; NaN is no evidence, entries past the length are ignored.
        lengths: (N,) tokens that each request has, at most T.
        points: (G,).

    Returns:
        (G, N) int32: 0-based position of the token at which SAFE is entered; `NEVER` where it is
        not. The request has then generated position + 1 tokens.

    Raises:
        ValueError: shapes that do not fit, or a length outside 0..T.
    """
    hazard = np.asarray(hazard, np.float32)
    lengths = np.asarray(lengths)
    if hazard.ndim != 2 or lengths.shape != hazard.shape[:1]:
        raise ValueError(
            f"hazard is (N, T) and lengths (N,), got shapes {hazard.shape} and {lengths.shape}"
        )
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= hazard.shape[1]):
        raise ValueError(
            f"lengths lie in 0..{hazard.shape[1]}, got {lengths.min()}..{lengths.max()}"
        )
    columns = OperatingPoints(
        points.tau_low[:, None],
        points.tau_high[:, None],
        points.k[:, None],
        points.j[:, None],
    )
    alarms = np.full((len(columns.k), len(hazard)), NEVER, np.int32)
    longest_first = np.argsort(-lengths, kind="stable")
    for start in range(0, len(hazard), _ROWS_PER_BLOCK):
        rows = longest_first[start : start + _ROWS_PER_BLOCK]
        alarms[:, rows] = _first_alarm_block(hazard[rows], lengths[rows], columns)
    return alarms


def _first_alarm_block(
    hazard: NDArray[np.float32], lengths: NDArray[np.int64], points: OperatingPoints
) -> IntArray:
    """`first_alarm` of a block of requests, points (G, 1)."""
    steps = int(lengths.max())
    seen = np.arange(steps)[:, None] < lengths
    by_step = np.where(seen, hazard[:, :steps].T, np.float32(np.nan))
    shape = (len(points.k), len(lengths))
    state, alarms = initial_state(shape), np.full(shape, NEVER, np.int32)
    for position in range(steps):
        state = step(state, by_step[position], points)
        alarms[(state.mode == Mode.SAFE) & (alarms == NEVER)] = position
    return alarms


def state_rows(state: ControllerState, rows: NDArray[np.integer]) -> ControllerState:
    """A copy of the state of some rows; the first axis is the row."""
    return ControllerState(state.mode[rows], state.risky[rows], state.calm[rows])


def set_state_rows(
    state: ControllerState, rows: NDArray[np.integer], values: ControllerState
) -> None:
    """Write the state of some rows in place; the first axis is the row."""
    state.mode[rows] = values.mode
    state.risky[rows] = values.risky
    state.calm[rows] = values.calm

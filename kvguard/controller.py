"""The three-mode state machine that turns hazards into alarms; one implementation for all callers.

The live guard advances it token by token for the rows of a batch, calibration and the offline
simulation advance it for a grid of settings at once. All of them call `step`.

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

A setting with a lower ``tau_low``, a lower ``tau_high``, a smaller k or a larger j, all else equal,
reaches SAFE no later (each of them only widens the stretches spent in ALERT or the runs in them).
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import product
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from kvguard import config

NEVER = -1
"""The position that `first_alarm` gives to a request that never reaches SAFE."""

_ROWS_PER_BLOCK = 512  # with 200 settings, one block's state stays in a core's own cache

IntArray = NDArray[np.int32]

Run = Annotated[int, Field(ge=1, le=int(np.iinfo(np.int16).max))]


class Mode(IntEnum):
    """What the guard does with a request."""

    NORMAL = 0  # decode with the compressed cache
    ALERT = 1  # the same, but hold tokens back from the stream
    SAFE = 2  # decode with a cache at the safe ratio


class ControllerConfig(config.OperatingPoint):
    """One setting of the controller: 0 < ``tau_low`` <= ``tau_high`` < 1, k and j at least 1.

    >>> ControllerConfig(tau_low=0.2, tau_high=0.5, k=2, j=8)
    ControllerConfig(tau_low=0.2, tau_high=0.5, k=2, j=8)
    """

    k: Run = Field(description="tokens in a row above a threshold before the mode rises")
    j: Run = Field(description="calm tokens in a row before the mode falls")


class Settings(NamedTuple):
    """Many controller settings, arrays of one shape; `step` takes them in place of a config."""

    tau_low: NDArray[np.float64]
    tau_high: NDArray[np.float64]
    k: NDArray[np.int16]
    j: NDArray[np.int16]

    def setting(self, index: int) -> ControllerConfig:
        """The setting at ``index`` of one-dimensional settings."""
        return ControllerConfig(
            tau_low=float(self.tau_low[index]),
            tau_high=float(self.tau_high[index]),
            k=int(self.k[index]),
            j=int(self.j[index]),
        )


class ControllerState(NamedTuple):
    """Mode and counters of any number of requests (and settings), arrays of one shape."""

    mode: NDArray[np.int8]
    risky: NDArray[np.int16]  # tokens in a row above the threshold that the mode watches
    calm: NDArray[np.int16]  # tokens in a row at or below tau_low, counted in ALERT and SAFE


def initial_state(shape: int | Sequence[int], mode: Mode = Mode.NORMAL) -> ControllerState:
    """Fresh state of that shape: everything in ``mode``, counters at 0."""
    return ControllerState(
        np.full(shape, mode, np.int8), np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    )


def stack_settings(settings: Iterable[config.OperatingPoint]) -> Settings:
    """Settings (G,) from G controller configs."""
    points = list(settings)
    return Settings(
        np.array([point.tau_low for point in points], np.float64),
        np.array([point.tau_high for point in points], np.float64),
        np.array([point.k for point in points], np.int16),
        np.array([point.j for point in points], np.int16),
    )


def settings_grid(controller: config.Controller) -> Settings:
    """Settings (G,): every combination in the config with ``tau_low`` <= ``tau_high``."""
    return stack_settings(
        ControllerConfig(tau_low=tau_low, tau_high=tau_high, k=k, j=j)
        for tau_low, tau_high, k, j in product(
            controller.tau_low, controller.tau_high, controller.k, controller.j
        )
        if tau_low <= tau_high
    )


def step(
    state: ControllerState, hazard: ArrayLike, settings: config.OperatingPoint | Settings
) -> ControllerState:
    """Advance the state machine by one token; the rules are in the module's docstring.

    Shapes broadcast: state (G, N), hazard (N,) and settings (G, 1) run G settings over N requests;
    state (N,), hazard (N,) and one config run one batch.

    Args:
        state: state before the token; not modified.
        hazard: probability that a failure begins within the horizon; NaN is no evidence. Compared
            with the thresholds in float32, so that a scalar and an array of settings agree.
        settings: one setting, or arrays of them.
    """
    tau_low = np.asarray(settings.tau_low, np.float32)
    tau_high = np.asarray(settings.tau_high, np.float32)
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

    rises, falls = risky >= settings.k, calm >= settings.j  # never both: one of the counters is 0
    stays = ~(rises | falls)
    return ControllerState(
        mode + rises.view(np.int8) - falls.view(np.int8), risky * stays, calm * stays
    )


def at_rest(
    state: ControllerState, hazard: NDArray[np.float32], settings: config.OperatingPoint
) -> NDArray[np.bool_]:
    """(n,) where `step` over several tokens would stay in NORMAL and end with both counters at 0.

    The usual case of a quiet request, told from one comparison instead of a step for each token.

    Args:
        state: (n,) before the tokens.
        hazard: (n, t); NaN is no evidence.
        settings: one setting.
    """
    tau_low = np.float32(settings.tau_low)
    calm, risky = (hazard <= tau_low).any(axis=1), (hazard > tau_low).any(axis=1)
    return np.asarray((state.mode == Mode.NORMAL) & calm & ~risky)


def first_alarm(hazard: NDArray[np.float32], lengths: ArrayLike, settings: Settings) -> IntArray:
    """Where each request first enters SAFE, for many settings at once.

    Calls `step` on blocks of requests of similar length; memory beyond the result is a few small
    blocks, whatever the number of requests.

    Args:
        hazard: (N, T), one row a request; NaN is no evidence, entries past the length are ignored.
        lengths: (N,) tokens that each request has, at most T.
        settings: (G,) settings.

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
    columns = Settings(
        settings.tau_low[:, None],
        settings.tau_high[:, None],
        settings.k[:, None],
        settings.j[:, None],
    )
    alarms = np.full((len(columns.k), len(hazard)), NEVER, np.int32)
    longest_first = np.argsort(-lengths, kind="stable")
    for start in range(0, len(hazard), _ROWS_PER_BLOCK):
        rows = longest_first[start : start + _ROWS_PER_BLOCK]
        alarms[:, rows] = _first_alarm_block(hazard[rows], lengths[rows], columns)
    return alarms


def _first_alarm_block(
    hazard: NDArray[np.float32], lengths: NDArray[np.int64], settings: Settings
) -> IntArray:
    """`first_alarm` of a block of requests, settings (G, 1)."""
    steps = int(lengths.max())
    seen = np.arange(steps)[:, None] < lengths
    by_step = np.where(seen, hazard[:, :steps].T, np.float32(np.nan))
    shape = (len(settings.k), len(lengths))
    state, alarms = initial_state(shape), np.full(shape, NEVER, np.int32)
    for position in range(steps):
        state = step(state, by_step[position], settings)
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

"""The guard's policies and their rivals, one interface: signals of a batch in, actions out.

A policy watches the tokens that a batch has just produced and says, per row, what to do next. It
knows nothing of models and caches: the live guard carries the actions out, the offline simulation
works out what they would have cost. Rows are slots of the batch; `Policy.reset` clears a slot when
another request takes it.

The calling order, live and offline alike: ``reset`` when a request enters a slot; ``step`` with
every token it generates, the last one too; ``finish`` once, for a request that has ended (by an end
token or by length) and for which ``step`` has just answered CONTINUE. When ``step`` or ``finish``
answers REWIND, RECOMPUTE or RESTART for a request that has ended, the request may go on.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvguard import config
from kvguard.controller import (
    ControllerConfig,
    Mode,
    initial_state,
    set_state_rows,
    state_rows,
    step,
)
from kvguard.schema import SIGNALS

ENTROPY = list(SIGNALS).index("entropy")
"""Column of `Observation.signals` that holds the entropy in nats."""

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class Action(IntEnum):
    """What happens to a row before its next token."""

    CONTINUE = 0
    REWIND = 1
    """Verify with the uncompressed model, cut at the first rejected token, go on at the safe ratio.

    Which token is rejected first is `Policy.recovery_cut`'s business."""
    RECOMPUTE = 2
    """Prefill prompt and generated tokens at the safe ratio; every token is kept."""
    RESTART = 3
    """Prefill the prompt at the safe ratio; every generated token is dropped."""
    RELAX = 4
    """Stop compressing from here on; what was evicted stays evicted, nothing is recomputed."""
    STOP = 5
    """End the request with the tokens it has."""
    PRUNE = 6
    """Drop the newest `Decision.amount` cache entries; tokens and positions stay as they are.

    The token that was just generated has no entry yet and is fed next, as always."""
    REFRESH = 7
    """Prefill prompt and generated tokens under the press (which compresses); tokens are kept."""


ALARMS = (Action.REWIND, Action.RECOMPUTE, Action.RESTART, Action.RELAX, Action.STOP, Action.PRUNE)
"""Actions that count as an alarm in the RUNS table; REFRESH is routine."""


def is_alarm(actions: NDArray[np.int8]) -> BoolArray:
    """Which actions count as an alarm; any shape."""
    return np.isin(actions, ALARMS)


class Observation(NamedTuple):
    """What n rows of the batch have just produced; all arrays are on the host."""

    rows: NDArray[np.intp]  # (n,) slots
    positions: IntArray  # (n,) 0-based position of the token in the answer
    token_ids: IntArray  # (n,)
    signals: FloatArray  # (n, 28) in the order of schema.SIGNALS
    hazard: FloatArray | None  # (n,) NaN: no evidence; None: the policy does not need it
    history: IntArray  # (n, T) the answer's tokens so far, this one included; padded with -1
    first_divergence: FloatArray | None = None
    """(n,) Kullback-Leibler divergence (nats) of the first logits without compression from those
    with it, where it was measured; NaN or None where it was not. Read at position 0 alone."""


class Decision(NamedTuple):
    """What to do with the n rows of an observation."""

    actions: NDArray[np.int8]  # (n,) Action
    amount: IntArray  # (n,) cache entries to drop, 0 unless PRUNE
    modes: NDArray[np.int8]  # (n,) controller.Mode after this token


class Policy:
    """Compression alone: never acts. Base of all policies, and the policy ``none``."""

    starts_safe: bool = False
    """Requests are prefilled at the safe ratio."""
    needs_hazard: bool = False
    """`Observation.hazard` must be given."""
    recovery_cut: Literal["exact", "tolerant"] = "exact"
    """Where REWIND cuts: the first rejected token, or the first sign of harm."""
    safe_after: Literal["stay", "resume"] = "stay"
    """Whether the policy still wants to see rows in SAFE, to compress them again."""
    press_ratio: str | None = None
    """Run the press at this ratio instead of the condition's; None: the condition's own."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.modes = np.full(rows, Mode.SAFE if self.starts_safe else Mode.NORMAL, np.int8)

    def reset(self, row: int, seed: int) -> None:
        """Forget what was in ``row``; ``seed`` is the new request's own (the trace's seed)."""
        self.modes[row] = Mode.SAFE if self.starts_safe else Mode.NORMAL

    def step(self, observation: Observation) -> Decision:
        """Look at one new token per row and decide."""
        return self._decide(observation, Action.CONTINUE)

    def finish(self, observation: Observation) -> Decision:
        """Look at rows that have ended, at their last token, and decide."""
        return self._decide(observation, Action.CONTINUE)

    def _decide(
        self,
        observation: Observation,
        action: Action,
        where: BoolArray | None = None,
        amount: IntArray | None = None,
    ) -> Decision:
        """``action`` where ``where`` holds (default: everywhere), CONTINUE elsewhere."""
        rows = observation.rows
        actions = np.full(len(rows), action, np.int8)
        if where is not None:
            actions[~where] = Action.CONTINUE
        if amount is None:
            amount = np.zeros(len(rows), np.int32)
        return Decision(actions, amount, self.modes[rows])

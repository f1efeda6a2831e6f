"""The guard's policies and their rivals, one interface: signals of a batch in, actions out.

A policy watches the tokens that a batch has just produced and says, per row, what to do next. It
knows nothing of models and caches: the live guard carries the actions out, the offline simulation
computes what they would have cost. Rows are slots of the batch.

The calling order, live and offline alike (`next_decision` says when): ``reset`` when a request
enters a slot, ``move`` when it changes its slot; ``step`` with every token it generates, the last
one too; ``finish`` for a request that has ended (by an end token or by length) and for which
``step`` has just returned CONTINUE. ``rests`` may advance rows over several tokens at once instead.
A request that has ended may go on after REWIND, CHECK, COMMIT or RESTART; every other action is
ignored then.

The rivals are in `kvguard.rivals`; `kvguard.policy_factory` builds a policy from its name.
"""

from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard.config import OperatingPoint
from kvguard.controller import (
    ControllerState,
    Mode,
    at_rest,
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
    """Check with the uncompressed model, cut at the first rejected token, go on at the safe ratio.

    Which token is rejected first is `Policy.recovery_cut`'s business."""
    CHECK = 2
    """Check and cut as REWIND, and go on compressed.

    The accepted tokens' verified entries take the place of the drafted ones; no press runs."""
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
    COMMIT = 8
    """Check: as REWIND where a token is rejected; otherwise go on with the row's cache as it is."""


ALARMS = (
    Action.REWIND,
    Action.CHECK,
    Action.COMMIT,
    Action.RESTART,
    Action.RELAX,
    Action.STOP,
    Action.PRUNE,
)
"""Actions that count as an alarm in the RUNS table; REFRESH is routine."""

AFTER_END = (Action.REWIND, Action.CHECK, Action.COMMIT, Action.RESTART)
"""Actions that mean something to a request that has ended."""

CHECKS = (Action.REWIND, Action.CHECK, Action.COMMIT)
"""Actions that begin with a check by the uncompressed model."""


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
    history: IntArray | None
    """(n, T) the answer's tokens so far, this one included, padded with -1; None: not needed."""
    probe: FloatArray | None = None
    """(n,) what the request's prefill says of its risk, higher is worse; None: nothing."""

    def take(self, rows: NDArray[np.bool_]) -> "Observation":
        """Those of the rows where the mask holds."""
        return Observation(
            *(None if column is None else column[rows] for column in self)  # type: ignore[arg-type]
        )


class Decision(NamedTuple):
    """What to do with the n rows of an observation."""

    actions: NDArray[np.int8]  # (n,) Action
    amount: IntArray  # (n,) cache entries to drop, 0 unless PRUNE
    modes: NDArray[np.int8]  # (n,) controller.Mode after this token

    def replace_rows(self, rows: NDArray[np.bool_], part: "Decision") -> None:
        """Write another decision over the rows where the mask holds."""
        self.actions[rows], self.amount[rows] = part.actions, part.amount
        self.modes[rows] = part.modes


class Policy:
    """Compression alone: never acts. Base of all policies; as it is, ``none`` and ``constant``.

    ``constant`` spends the guard's device byte-steps on a milder ratio, the same for every request.
    It is the same policy under another `press_ratio`, which the caller computes.
    """

    starts_safe: bool = False
    """Requests are prefilled at the safe ratio."""
    needs_hazard: bool = False
    """`Observation.hazard` must be given."""
    needs_history: bool = False
    """`Observation.history` must be given."""
    decides_first_token: bool = False
    """The policy decides at the first token without waiting, see `next_decision`."""
    recovery_cut: Literal["exact", "tolerant"] = "exact"
    """Where REWIND cuts: the first rejected token, or the first sign of harm."""
    safe_after: Literal["stay", "resume"] = "stay"
    """Whether the policy still wants to see rows in SAFE: they go on compressed, under checks."""
    chooses_ratio: bool = False
    """Its requests start at a ratio of their own, chosen at prefill (`kvguard.ladder`)."""
    checks: bool = False
    """Some of its actions begin with a check, so its rows are parked outside device memory."""
    checks_everything: bool = False
    """No token of an answer is left unchecked, so the answer is the uncompressed one."""
    fresh_checks: bool = False
    """A check prefills prompt and draft again, whatever full cache is still there."""
    press_ratio: str | None = None
    """Run the press at this ratio instead of the condition's; None: the condition's own."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.modes = np.full(rows, Mode.SAFE if self.starts_safe else Mode.NORMAL, np.int8)
        self.row_state: list[NDArray[Any]] = [self.modes]  # every array whose first axis is the row

    def reset(self, row: int, seed: int) -> None:
        """Forget what was in ``row``; ``seed`` is the new request's own (the trace's seed)."""
        self.modes[row] = Mode.SAFE if self.starts_safe else Mode.NORMAL

    def move(self, source: int, target: int) -> None:
        """Let the request in slot ``source`` go on in slot ``target``, whose own is gone."""
        for state in self.row_state:
            state[target] = state[source]

    def enter_safe_mode(self, row: int) -> None:
        """The request in ``row`` was put into SAFE by its caller, who carried out the recovery."""
        self.modes[row] = Mode.SAFE

    def checked(self, row: int, kept: int) -> None:
        """A check of ``row`` has been carried out; its first ``kept`` tokens stay."""

    def promotes(self, row: int) -> bool:
        """Whether a row that has just been checked should go on with its full cache."""
        return False

    def set_promoted(self, row: int) -> None:
        """The request in ``row`` has got its full cache back, as `promotes` asked."""

    def due(
        self, rows: NDArray[np.intp], tokens: NDArray[np.int64], every: int
    ) -> NDArray[np.int64]:
        """Length of each row when the policy sees its next token.

        Args:
            rows: (n,).
            tokens: (n,) that they have now.
            every: as in `next_decision`.
        """
        return next_decision(self, tokens + 1, every)

    def step(self, observation: Observation) -> Decision:
        """Decide for one new token per row."""
        return self._decide(observation, Action.CONTINUE)

    def finish(self, observation: Observation) -> Decision:
        """Decide for rows that have ended, at their last token."""
        return self._decide(observation, Action.CONTINUE)

    def rests(self, rows: NDArray[np.intp], hazard: FloatArray) -> BoolArray:
        """Fast path for several tokens at once: mask (n,) of rows already advanced.

        Args:
            rows: (n,).
            hazard: (n, t) of the rows' next tokens, padded with NaN at the end.

        Returns:
            True: none of the tokens calls for an action, and the row's state is what `step` for
            each of them gives. False: the state is unchanged; call `step` per token.
        """
        return np.zeros(len(rows), np.bool_)

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


def next_decision(policy: Policy, tokens: ArrayLike, every: int) -> NDArray[np.int64]:
    """Length of the row when the policy sees a token, unless the row ends earlier.

    A policy decides when a row's number of tokens is a multiple of ``every``, and when the row
    ends. It then judges all tokens since its last decision, and acts at that length.

    Args:
        policy: one with `decides_first_token` is shown the first token at once.
        tokens: any shape; the token's number, counted from 1.
        every: tokens between two decisions, at least 1.

    >>> next_decision(Policy("none", 1), [1, 8, 9], every=8)
    array([ 8,  8, 16])
    """
    tokens = np.asarray(tokens, np.int64)
    multiple = -(-tokens // every) * every
    return np.where((tokens <= 1) & policy.decides_first_token, tokens, multiple)


class Guard(Policy):
    """The guard: the hazard drives the three-mode controller, SAFE carries out the recovery.

    The recovery is the only thing in which the ``guard*`` policies differ:

    - ``guard`` checks: the uncompressed model reads the draft in one pass, what it rejects is cut
      with everything behind it, and decoding goes on compressed. While the controller stays in SAFE
      every ``check_every_tokens`` tokens and the end are checked, too. Verifying a draft in one
      pass is speculative decoding (2211.17192); a compressed cache as the draft is TriForce
      (2404.11912) and VeriCache (2605.17613), which check at a fixed horizon.
    - ``guard_recompute`` is the same by fresh prefills, where no full cache is kept anywhere.
    - ``guard_promote`` checks once and goes on with the full cache, so that the request ends as if
      it had never been compressed.
    - ``guard_tolerant`` is ``guard_promote`` that cuts at the first sign of harm instead of the
      first difference; ``guard_restart`` keeps no token.
    - ``guard_relax_only`` only stops compressing: what evictors that change their budget as they go
      do (CONF-KV, 2605.24786, sets it by confidence, with a compressor of its own).
    """

    needs_hazard = True

    def __init__(
        self,
        name: str,
        rows: int,
        controller: OperatingPoint,
        action: Action,
        recovery_cut: Literal["exact", "tolerant"] = "exact",
        fresh_checks: bool = False,
        check_every_tokens: int = 1,
    ) -> None:
        super().__init__(name, rows)
        self.controller = controller
        self.action = action
        self.recovery_cut = recovery_cut
        self.safe_after = "resume" if action == Action.CHECK else "stay"
        self.fresh_checks = fresh_checks
        self.checks = action in CHECKS
        self.check_every_tokens = check_every_tokens
        self.state = initial_state(rows)
        self.modes = self.state.mode  # one array: the controller's mode is the policy's
        self.unchecked = np.zeros(rows, np.bool_)  # in SAFE, with tokens behind the last check
        self.row_state = [*self.state, self.unchecked]

    def reset(self, row: int, seed: int) -> None:
        """Start the row's controller afresh."""
        set_state_rows(self.state, np.array([row]), initial_state(1))
        self.unchecked[row] = False

    def enter_safe_mode(self, row: int) -> None:
        """Enter SAFE with its counters at 0, without an action."""
        set_state_rows(self.state, np.array([row]), initial_state(1, Mode.SAFE))
        self.unchecked[row] = False

    def rests(self, rows: NDArray[np.intp], hazard: FloatArray) -> BoolArray:
        """Rows that stay in NORMAL."""
        rest = at_rest(state_rows(self.state, rows), hazard, self.controller)
        set_state_rows(self.state, rows[rest], initial_state(int(rest.sum())))
        return rest

    def step(self, observation: Observation) -> Decision:
        """Advance the controller of each row by the token's hazard.

        Raises:
            ValueError: the observation has no hazard.
        """
        if observation.hazard is None:
            raise ValueError(f"policy {self.name!r} needs Observation.hazard, got None")
        rows = observation.rows
        before = state_rows(self.state, rows)
        after = step(before, observation.hazard, self.controller)
        stays = self.safe_after == "stay"
        if stays:
            after = _where(before.mode == Mode.SAFE, before, after)
        set_state_rows(self.state, rows, after)

        alarm = (after.mode == Mode.SAFE) & (before.mode != Mode.SAFE)
        if not stays:
            in_turn = (observation.positions + 1) % self.check_every_tokens == 0
            alarm |= (before.mode == Mode.SAFE) & in_turn  # the turn in which it calms down, too
            self.unchecked[rows] = (self.unchecked[rows] | (before.mode == Mode.SAFE)) & ~alarm
        return self._decide(observation, self.action, alarm)

    def finish(self, observation: Observation) -> Decision:
        """Check what a request in SAFE generated since its last check."""
        alarm = self.unchecked[observation.rows].copy()
        self.unchecked[observation.rows] = False
        return self._decide(observation, self.action, alarm)


def _where(mask: BoolArray, chosen: ControllerState, other: ControllerState) -> ControllerState:
    return ControllerState(
        np.where(mask, chosen.mode, other.mode),
        np.where(mask, chosen.risky, other.risky),
        np.where(mask, chosen.calm, other.calm),
    )

"""The guard's policies and their rivals, one interface: signals of a batch in, actions out.

A policy watches the tokens that a batch has just produced and says, per row, what to do next. It
knows nothing of models and caches: the live guard carries the actions out, the offline simulation
works out what they would have cost. Rows are slots of the batch.

The calling order, live and offline alike (`look_at` says when): ``reset`` when a request enters a
slot, ``move`` when it changes its slot; ``step`` with every token it generates, the last one too;
``finish`` for a request that has ended (by an end token or by length) and for which ``step`` has
just answered CONTINUE. Rows that ``rests`` names need no ``step`` for those tokens. A request that
has ended may go on after REWIND or RESTART; RECOMPUTE changes nothing then, and every other action
is ignored.

Sources are cited by arXiv number. A rival is here to be measured under the guard's conditions (any
press, single requests, token by token), so each docstring says what of the original is left out.
"""

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard import config
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
    history: IntArray | None
    """(n, T) the answer's tokens so far, this one included, padded with -1; None: not needed."""


class Decision(NamedTuple):
    """What to do with the n rows of an observation."""

    actions: NDArray[np.int8]  # (n,) Action
    amount: IntArray  # (n,) cache entries to drop, 0 unless PRUNE
    modes: NDArray[np.int8]  # (n,) controller.Mode after this token


class Policy:
    """Compression alone: never acts. Base of all policies; as it is, ``none`` and ``constant``.

    ``constant`` is the plainest rival: spend the guard's mean memory on a milder ratio, always. It
    is the same policy under another `press_ratio`, which the caller works out.
    """

    starts_safe: bool = False
    """Requests are prefilled at the safe ratio."""
    needs_hazard: bool = False
    """`Observation.hazard` must be given."""
    needs_history: bool = False
    """`Observation.history` must be given."""
    looks_first: bool = False
    """The first token is looked at as soon as it is there, see `look_at`."""
    recovery_cut: Literal["exact", "tolerant"] = "exact"
    """Where REWIND cuts: the first rejected token, or the first sign of harm."""
    safe_after: Literal["stay", "resume"] = "stay"
    """Whether the policy still wants to see rows in SAFE, to compress them again."""
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

    def settle(self, row: int) -> None:
        """The request in ``row`` was put into SAFE by its caller, who carried out the recovery."""
        self.modes[row] = Mode.SAFE

    def step(self, observation: Observation) -> Decision:
        """Look at one new token per row and decide."""
        return self._decide(observation, Action.CONTINUE)

    def finish(self, observation: Observation) -> Decision:
        """Look at rows that have ended, at their last token, and decide."""
        return self._decide(observation, Action.CONTINUE)

    def rests(self, rows: NDArray[np.intp], hazard: FloatArray) -> BoolArray:
        """Which rows (n,) have taken their next tokens' hazards (n, t) without acting.

        NaN stands behind a row's last token. Those rows are as `step` would have left them; the
        others have taken nothing, and are to be shown each token.
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


def look_at(policy: Policy, tokens: ArrayLike, every: int) -> NDArray[np.int64]:
    """When a policy sees a token: how many tokens the row has by then, if it goes on.

    Rows are looked at when the number of their tokens is a multiple of ``every``, and when they
    end. What a policy does about a token happens at that look.

    Args:
        policy: one with `looks_first` is shown the first token at once.
        tokens: any shape; the token's number, counted from 1.
        every: tokens between two looks, at least 1.

    >>> look_at(Policy("none", 1), [1, 8, 9], every=8)
    array([ 8,  8, 16])
    """
    tokens = np.asarray(tokens, np.int64)
    look = -(-tokens // every) * every
    return np.where((tokens <= 1) & policy.looks_first, tokens, look)


class AlwaysSafe(Policy):
    """The ceiling: every request runs at the safe ratio from its first token; nothing is saved."""

    starts_safe = True


class OneAlarm(Policy, ABC):
    """Base of the policies that act once a request, then leave it in SAFE."""

    action: Action

    @abstractmethod
    def fires(self, observation: Observation) -> BoolArray:
        """(n,) where the trigger sees its sign in this token, whatever the row's mode."""

    def step(self, observation: Observation) -> Decision:
        """Advance the trigger, and act where it fires for the first time."""
        alarm = self.fires(observation) & (self.modes[observation.rows] != Mode.SAFE)
        self.modes[observation.rows[alarm]] = Mode.SAFE
        return self._decide(observation, self.action, alarm)


class Guard(Policy):
    """The guard: the hazard drives the three-mode controller, SAFE carries out the recovery.

    The recovery is the only thing in which the ``guard_*`` policies differ:

    - ``guard_rewind`` verifies, cuts at the first token that the uncompressed model rejects, and
      stays at the safe ratio. Verification of a draft by one pass is speculative decoding
      (2211.17192); a compressed cache as the draft is TriForce (2404.11912), which keeps the full
      cache and verifies every few tokens. Here the full cache is not kept, and only requests that
      the predictor singles out are verified.
    - ``guard_rewind_tolerant`` cuts at the first sign of harm instead of the first difference.
    - ``guard_rewind_resume`` compresses again (REFRESH) when the controller is back in NORMAL, that
      is after twice j calm tokens.
    - ``guard_recompute`` keeps every token, ``guard_restart`` none.
    - ``guard_relax_only`` only stops compressing: what evictors that change their budget as they go
      do (CONF-KV, 2605.24786, sets it by confidence, with a compressor of its own).
    - ``guard_gate`` is ``guard_rewind`` that may also start a request in SAFE: at position 0, when
      the hazard of the first token exceeds tau_high. The first logits come from the prefill, which
      attends to the whole prompt before the press evicts, so they say what the prompt is like; what
      compression did to it shows from the second token on.
    """

    needs_hazard = True

    def __init__(
        self,
        name: str,
        rows: int,
        controller: config.OperatingPoint,
        action: Action,
        recovery_cut: Literal["exact", "tolerant"] = "exact",
        safe_after: Literal["stay", "resume"] = "stay",
        gate: bool = False,
    ) -> None:
        super().__init__(name, rows)
        self.controller = controller
        self.action = action
        self.recovery_cut = recovery_cut
        self.safe_after = safe_after
        self.gate = self.looks_first = gate
        self.state = initial_state(rows)
        self.modes = self.state.mode  # one array: the controller's mode is the policy's
        self.compressed = np.ones(rows, np.bool_)
        self.row_state = [*self.state, self.compressed]

    def reset(self, row: int, seed: int) -> None:
        """Start the row's controller afresh."""
        set_state_rows(self.state, np.array([row]), initial_state(1))
        self.compressed[row] = True

    def settle(self, row: int) -> None:
        """Enter SAFE with its counters at 0, without an action."""
        set_state_rows(self.state, np.array([row]), initial_state(1, Mode.SAFE))
        self.compressed[row] = False

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
        if self.gate:
            gated = (observation.positions == 0) & (
                observation.hazard > np.float32(self.controller.tau_high)
            )
            after = _where(gated, initial_state(len(rows), Mode.SAFE), after)
        if self.safe_after == "stay":
            after = _where(before.mode == Mode.SAFE, before, after)
        set_state_rows(self.state, rows, after)

        alarm = (after.mode == Mode.SAFE) & self.compressed[rows]
        resume = (after.mode == Mode.NORMAL) & ~self.compressed[rows]
        self.compressed[rows] ^= alarm | resume
        decision = self._decide(observation, self.action, alarm)
        decision.actions[resume] = Action.REFRESH
        return decision


def _where(mask: BoolArray, chosen: ControllerState, other: ControllerState) -> ControllerState:
    return ControllerState(
        np.where(mask, chosen.mode, other.mode),
        np.where(mask, chosen.risky, other.risky),
        np.where(mask, chosen.calm, other.calm),
    )


class VerifyAll(Policy):
    """Check every request once, at its end: exact, and the most expensive.

    Speculative decoding (2211.17192) with the whole answer as one draft; TriForce (2404.11912)
    verifies every few tokens instead, which needs the full cache kept beside the compressed one.
    """

    def finish(self, observation: Observation) -> Decision:
        """Verify what has not been verified."""
        alarm = self.modes[observation.rows] != Mode.SAFE
        self.modes[observation.rows] = Mode.SAFE
        return self._decide(observation, Action.REWIND, alarm)


class RandomAlarm(OneAlarm):
    """The control: the guard's recovery and alarm rate, with an alarm that knows nothing.

    Each request is drawn with probability ``rate``; a drawn one alarms at a step drawn uniformly
    from 0 .. ``max_new_tokens`` - 1, or at its end where it ends sooner, so that the rate holds
    whatever the lengths. The draw depends on the request's seed alone: the same live and offline.
    """

    action = Action.REWIND

    def __init__(self, name: str, rows: int, rate: ArrayLike, max_new_tokens: int) -> None:
        super().__init__(name, rows)
        self.rate = np.broadcast_to(np.asarray(rate, np.float64), (rows,))
        self.max_new_tokens = max_new_tokens
        self.alarm_at = np.full(rows, np.iinfo(np.int32).max, np.int32)
        self.row_state.append(self.alarm_at)

    def reset(self, row: int, seed: int) -> None:
        """Draw whether the new request alarms, and when."""
        super().reset(row, seed)
        draws = np.random.default_rng([seed % 2**64, _RANDOM_ALARM_STREAM])
        drawn, position = draws.random() < self.rate[row], draws.integers(self.max_new_tokens)
        self.alarm_at[row] = position if drawn else np.iinfo(np.int32).max

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the drawn step is reached."""
        return observation.positions >= self.alarm_at[observation.rows]

    def finish(self, observation: Observation) -> Decision:
        """Alarm where the drawn step lies beyond the request's end."""
        rows = observation.rows
        alarm = (self.alarm_at[rows] < self.max_new_tokens) & (self.modes[rows] != Mode.SAFE)
        self.modes[rows[alarm]] = Mode.SAFE
        return self._decide(observation, self.action, alarm)


class EntropyAlarm(OneAlarm):
    """Entropy above a bound for some tokens in a row, the obvious sign of a confused model.

    The recovery is the guard's own (rewind), so that the trigger alone is compared. A token whose
    entropy is NaN ends the run.
    """

    action = Action.REWIND

    def __init__(self, name: str, rows: int, nats: float, tokens: int) -> None:
        super().__init__(name, rows)
        self.nats, self.tokens = nats, tokens
        self.run = np.zeros(rows, np.int32)
        self.row_state.append(self.run)

    def reset(self, row: int, seed: int) -> None:
        """Start the row's run at 0."""
        super().reset(row, seed)
        self.run[row] = 0

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the run is long enough."""
        above = observation.signals[:, ENTROPY] > self.nats
        run = np.where(above, self.run[observation.rows] + 1, 0)
        self.run[observation.rows] = run
        return run >= self.tokens


class Ergo(OneAlarm):
    """ERGO (2510.14077): a sharp rise of the mean entropy resets the context.

    The original compares whole turns of a conversation and, on a rise above a threshold, has the
    model rewrite the user's messages into one prompt. Here one request is one turn: consecutive,
    non-overlapping windows take the place of turns, and the reset is RESTART: the prompt stands as
    it is, the answer is generated afresh at the safe ratio. Nothing is rewritten.
    """

    action = Action.RESTART

    def __init__(self, name: str, rows: int, delta_nats: float, window_tokens: int) -> None:
        super().__init__(name, rows)
        self.delta_nats, self.window_tokens = delta_nats, window_tokens
        self.total = np.zeros(rows, np.float64)
        self.previous_mean = np.full(rows, np.nan)
        self.row_state += [self.total, self.previous_mean]

    def reset(self, row: int, seed: int) -> None:
        """Forget the row's windows."""
        super().reset(row, seed)
        self.total[row] = 0
        self.previous_mean[row] = np.nan

    def fires(self, observation: Observation) -> BoolArray:
        """Whether a window has just ended whose mean is that much above the last one's."""
        rows = observation.rows
        self.total[rows] += observation.signals[:, ENTROPY]
        ends = (observation.positions + 1) % self.window_tokens == 0
        mean = self.total[rows] / self.window_tokens
        rises: BoolArray = ends & (mean - self.previous_mean[rows] > self.delta_nats)
        self.previous_mean[rows[ends]] = mean[ends]
        self.total[rows[ends]] = 0
        return rises


class PeriodicRefresh(Policy):
    """RefreshKV (2411.05787): look at the full context every n tokens.

    The original keeps the full cache and alternates attention over all of it with attention over a
    small part, which each full step selects anew. A press evicts for good, so the full look is
    REFRESH here: prompt and answer so far are prefilled again under the press, which attends to
    everything while it prefills and then selects anew. Memory is the press's, time is not.
    """

    def __init__(self, name: str, rows: int, every_tokens: int) -> None:
        super().__init__(name, rows)
        self.every_tokens = every_tokens

    def step(self, observation: Observation) -> Decision:
        """Refresh after every n-th token of the answer."""
        due = (observation.positions + 1) % self.every_tokens == 0
        return self._decide(observation, Action.REFRESH, due)


class RepetitionRuns:
    """For each row and each period p, how many tokens in a row equal the token p before.

    The tail of a row is `copies` copies of a pattern of p tokens exactly when its run for p is at
    least p (copies - 1): vLLM's ``repetition_detection`` (``max_pattern_size``, ``min_count``)
    without going over the tail again for every token. One condition is added: the copies cover at
    least ``cover_tokens``, or a round number such as 1,000,000 would count as a loop.
    """

    def __init__(self, rows: int, max_pattern_tokens: int, copies: int, cover_tokens: int) -> None:
        self.periods = np.arange(1, max_pattern_tokens + 1)
        self.needed = np.maximum(self.periods * (copies - 1), cover_tokens - self.periods)
        self.runs = np.zeros((rows, max_pattern_tokens), np.int32)

    def reset(self, rows: NDArray[np.integer] | int) -> None:
        """Forget the runs of these rows."""
        self.runs[rows] = 0

    def tail(self, observation: Observation) -> IntArray:
        """(n,) tokens of the repetitive tail that this token completes; 0 where there is none."""
        rows, history = observation.rows, observation.history
        assert history is not None
        back = observation.positions[:, None] - self.periods  # (n, P)
        before = np.take_along_axis(history, np.maximum(back, 0), axis=1)
        same = (back >= 0) & (before == observation.token_ids[:, None])
        runs = np.where(same, self.runs[rows] + 1, 0)
        self.runs[rows] = runs
        repeats = runs >= self.needed
        shortest = np.argmax(repeats, axis=1)
        lengths = runs[np.arange(len(rows)), shortest] + self.periods[shortest]
        return np.where(repeats.any(axis=1), lengths, 0).astype(np.int32)


class NgramStop(OneAlarm):
    """vLLM's ``repetition_detection``: an exact repetition at the tail ends the request.

    Saves tokens, repairs nothing. The copies need also cover some tokens (`RepetitionRuns`).
    """

    action = Action.STOP
    needs_history = True

    def __init__(self, name: str, rows: int, runs: RepetitionRuns) -> None:
        super().__init__(name, rows)
        self.runs = runs
        self.row_state.append(runs.runs)

    def reset(self, row: int, seed: int) -> None:
        """Forget the row's repetitions."""
        super().reset(row, seed)
        self.runs.reset(row)

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the answer ends in a repetition."""
        return self.runs.tail(observation) > 0


class LoopGuard(Policy):
    """LoopGuard (2604.10044): when a loop starts, take its repetitive tail out of the cache.

    The original watches lexical diversity, redundancy, confidence and novelty over a window and,
    after a debounced trigger, rebuilds the cache within a budget: a short prefix, a sparse sample
    of the long-range context, no repetitive tail. Here the trigger is the exact repetition of
    `NgramStop`, and PRUNE removes all cached copies of the pattern; the rest of the cache stays as
    the press left it, and the tokens stay in the answer. After a prune the detector starts afresh,
    so that a loop that forms again is pruned again. No tokens of the loop are taken back.
    """

    needs_history = True

    def __init__(self, name: str, rows: int, runs: RepetitionRuns) -> None:
        super().__init__(name, rows)
        self.runs = runs
        self.pruned_at = np.zeros(rows, np.int32)  # newest token at the last prune
        self.row_state += [runs.runs, self.pruned_at]

    def reset(self, row: int, seed: int) -> None:
        """Forget the row's repetitions and prunes."""
        super().reset(row, seed)
        self.runs.reset(row)
        self.pruned_at[row] = 0

    def step(self, observation: Observation) -> Decision:
        """Prune where a loop has formed since the last prune."""
        rows, positions = observation.rows, observation.positions
        tail = self.runs.tail(observation)
        prune = tail > 0
        cached = np.minimum(tail - 1, positions - self.pruned_at[rows])  # the newest has no entry
        self.runs.reset(rows[prune])
        self.pruned_at[rows[prune]] = positions[prune]
        amount = np.where(prune, cached, 0).astype(np.int32)
        return self._decide(observation, Action.PRUNE, prune, amount)


_RANDOM_ALARM_STREAM = 0x5EED
"""Sets the random policy's draws apart from every other use of a request's seed."""

GUARDS: dict[str, tuple[Action, Literal["exact", "tolerant"], Literal["stay", "resume"]]] = {
    "guard_relax_only": (Action.RELAX, "exact", "stay"),
    "guard_recompute": (Action.RECOMPUTE, "exact", "stay"),
    "guard_restart": (Action.RESTART, "exact", "stay"),
    "guard_rewind": (Action.REWIND, "exact", "stay"),
    "guard_rewind_tolerant": (Action.REWIND, "tolerant", "stay"),
    "guard_rewind_resume": (Action.REWIND, "exact", "resume"),
    "guard_gate": (Action.REWIND, "exact", "stay"),
}
"""The guard's policies: what an alarm does, where REWIND cuts, and what follows SAFE."""


def make_policy(
    name: str,
    rows: int,
    *,
    max_new_tokens: int,
    live: config.Live | None = None,
    controller: config.OperatingPoint | None = None,
    alarm_rate: float | NDArray[np.float64] | None = None,
    press_ratio: str | None = None,
) -> Policy:
    """Build the policy of that name for a batch of ``rows`` slots.

    Args:
        name: one of config.POLICY_NAMES.
        rows: slots of the batch.
        max_new_tokens: the longest answer.
        live: parameters of the rivals; None takes the defaults.
        controller: the guard's thresholds; the ``guard_*`` policies need it.
        alarm_rate: share of requests that ``random`` alarms, when ``live.random_rate`` is
            "matched": the guard's own rate, one for all or one per row.
        press_ratio: the ratio of ``constant``.

    Raises:
        ValueError: an unknown name, or an argument that this policy needs is missing or wrong.
    """
    live = live or config.Live()
    if name not in config.POLICY_NAMES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(config.POLICY_NAMES)}")
    if name in GUARDS:
        if controller is None:
            raise ValueError(f"policy {name!r} needs a controller setting (controller=)")
        action, cut, after = GUARDS[name]
        return Guard(name, rows, controller, action, cut, after, gate=name == "guard_gate")
    if name == "random":
        rate = alarm_rate if live.random_rate == "matched" else live.random_rate
        if rate is None or not np.all((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)):
            raise ValueError(f"policy 'random' needs an alarm rate in [0, 1], got {rate!r}")
        return RandomAlarm(name, rows, rate, max_new_tokens)
    if name in ("ngram_stop", "loopguard"):
        runs = RepetitionRuns(
            rows, live.loop_pattern_tokens, live.loop_copies, live.loop_cover_tokens
        )
        return NgramStop(name, rows, runs) if name == "ngram_stop" else LoopGuard(name, rows, runs)
    if name == "entropy":
        return EntropyAlarm(name, rows, live.entropy_nats, live.entropy_tokens)
    if name == "ergo":
        return Ergo(name, rows, live.ergo_delta_nats, live.ergo_window_tokens)
    if name == "periodic_refresh":
        return PeriodicRefresh(name, rows, live.refresh_tokens)
    if name == "verify_all":
        return VerifyAll(name, rows)
    if name == "always_safe":
        return AlwaysSafe(name, rows)
    policy = Policy(name, rows)
    if name == "constant":
        if press_ratio is None:
            raise ValueError("policy 'constant' needs the ratio at which it runs (press_ratio=)")
        policy.press_ratio = config.ratio_text(press_ratio)
    return policy

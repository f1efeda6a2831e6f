"""The guard's rivals: policies triggered by something simpler than a predicted hazard.

Sources are cited by arXiv number. Rivals run under the guard's conditions (any press, single
requests, token by token); each docstring says what of the original is left out.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard.controller import Mode
from kvguard.policies import (
    ENTROPY,
    Action,
    BoolArray,
    Decision,
    IntArray,
    Observation,
    Policy,
)

_RANDOM_ALARM_STREAM = 0x5EED
"""Sets the random policy's draws apart from every other use of a request's seed."""


class AlwaysSafe(Policy):
    """The ceiling: every request runs at the safe ratio from its first token; nothing is saved."""

    starts_safe = True


class Offload(AlwaysSafe):
    """Never compresses either, and keeps the cache in host memory: the rival in device memory.

    **Counted, not carried out**: the request is decoded with its cache on the device, token for
    token as `AlwaysSafe`, and its costs are replaced by those of `costs.offload_costs`, from the
    prompt's tokens and bytes, the decode steps, the allocated byte-steps and the model's number
    of layers. Its seconds are null. It stands for the offloaded cache of transformers
    (``DynamicCache(offloading=True)``, ``cache_implementation="offloaded"``; ``OffloadedCache`` in
    earlier versions): two layers are on the device, every layer comes over the bus once a token.
    There each layer also goes back whole, nearly doubling the traffic; here only the new token's
    entries do, which any careful implementation would do, and which favours this rival.
    """


class SharedPrefix(AlwaysSafe):
    """Never compresses either, and holds what the prompts begin with once for all rows.

    The rival in device memory wherever prompts share a context, few-shot turns or a system prompt;
    where they share nothing it is `AlwaysSafe`. See `kvguard.shared_prefix`.
    """


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


class VerifyAll(Policy):
    """Check every request once, at its end: exact, and the most expensive.

    Speculative decoding (2211.17192) with the whole answer as one draft; TriForce (2404.11912)
    verifies every few tokens instead, which needs the full cache kept beside the compressed one.
    """

    checks = True

    def finish(self, observation: Observation) -> Decision:
        """Check what has not been checked."""
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
    checks = True

    def __init__(self, name: str, rows: int, rate: ArrayLike, max_new_tokens: ArrayLike) -> None:
        super().__init__(name, rows)
        self.rate = np.broadcast_to(np.asarray(rate, np.float64), (rows,))
        self.max_new_tokens = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (rows,)).copy()
        self.alarm_at = np.full(rows, np.iinfo(np.int32).max, np.int32)
        self.row_state += [self.alarm_at, self.max_new_tokens]

    def reset(self, row: int, seed: int) -> None:
        """Draw whether the new request alarms, and when."""
        super().reset(row, seed)
        draws = np.random.default_rng([seed % 2**64, _RANDOM_ALARM_STREAM])
        drawn, position = draws.random() < self.rate[row], draws.integers(self.max_new_tokens[row])
        self.alarm_at[row] = position if drawn else np.iinfo(np.int32).max

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the drawn step is reached."""
        return observation.positions >= self.alarm_at[observation.rows]

    def finish(self, observation: Observation) -> Decision:
        """Alarm where the drawn step lies beyond the request's end."""
        rows = observation.rows
        alarm = (self.alarm_at[rows] < self.max_new_tokens[rows]) & (self.modes[rows] != Mode.SAFE)
        self.modes[rows[alarm]] = Mode.SAFE
        return self._decide(observation, self.action, alarm)


class EntropyAlarm(OneAlarm):
    """Entropy above a bound for some tokens in a row, the obvious sign of a confused model.

    The recovery is the guard's own (rewind), so that the trigger alone is compared. A token whose
    entropy is NaN ends the run.
    """

    action = Action.REWIND
    checks = True

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
    """RefreshKV (2411.05787): attend to the full context every n tokens.

    The original keeps the full cache and alternates attention over all of it with attention over a
    small part, which each full step selects anew. A press evicts for good, so the full step is
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


class VerifyOnFailure(Policy):
    """Check a request once, at its end, if it loops or ran out of tokens: what anyone can see.

    No false alarm by definition; blind to fluent, finished, wrong answers. A loop is the exact
    repetition of `NgramStop`, anywhere in the answer.
    """

    needs_history = True

    checks = True

    def __init__(
        self, name: str, rows: int, runs: RepetitionRuns, max_new_tokens: ArrayLike
    ) -> None:
        super().__init__(name, rows)
        self.runs = runs
        self.max_new_tokens = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (rows,)).copy()
        self.looped = np.zeros(rows, np.bool_)
        self.row_state += [runs.runs, self.looped, self.max_new_tokens]

    def reset(self, row: int, seed: int) -> None:
        """Forget the row's repetitions."""
        super().reset(row, seed)
        self.runs.reset(row)
        self.looped[row] = False

    def step(self, observation: Observation) -> Decision:
        """Note whether the answer repeats itself."""
        self.looped[observation.rows] |= self.runs.tail(observation) > 0
        return self._decide(observation, Action.CONTINUE)

    def finish(self, observation: Observation) -> Decision:
        """Check the requests that failed visibly."""
        rows = observation.rows
        failed = self.looped[rows] | (observation.positions + 1 >= self.max_new_tokens[rows])
        alarm = failed & (self.modes[rows] != Mode.SAFE)
        self.modes[rows[alarm]] = Mode.SAFE
        return self._decide(observation, Action.REWIND, alarm)


class ClockOrLoop(OneAlarm):
    """Alarm at a fixed number of tokens, or at a loop: what a predictor must beat.

    The number is chosen on train prompts (`rival_settings.fit_rivals`).
    """

    action = Action.REWIND
    checks = True
    needs_history = True

    def __init__(self, name: str, rows: int, runs: RepetitionRuns, clock_tokens: ArrayLike) -> None:
        super().__init__(name, rows)
        self.runs = runs
        self.clock_tokens = np.broadcast_to(np.asarray(clock_tokens, np.int32), (rows,)).copy()
        self.row_state += [runs.runs, self.clock_tokens]

    def reset(self, row: int, seed: int) -> None:
        """Forget the row's repetitions."""
        super().reset(row, seed)
        self.runs.reset(row)

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the answer is that long, or ends in a repetition."""
        late = observation.positions + 1 >= self.clock_tokens[observation.rows]
        return np.asarray(late | (self.runs.tail(observation) > 0))


class Probation(Policy):
    """Keep both caches for some tokens, check once, then commit to one of them.

    A rejected token promotes the request to the full cache; otherwise it goes on with the
    compressed one and the other is dropped. A request that ends sooner is checked at its end.
    """

    checks = True

    def __init__(self, name: str, rows: int, tokens: int) -> None:
        super().__init__(name, rows)
        self.tokens = tokens
        self.committed = np.zeros(rows, np.bool_)
        self.row_state.append(self.committed)

    def reset(self, row: int, seed: int) -> None:
        """Put the row on probation."""
        super().reset(row, seed)
        self.committed[row] = False

    def step(self, observation: Observation) -> Decision:
        """Check when the probation is over."""
        rows = observation.rows
        due = (observation.positions + 1 >= self.tokens) & self._open(rows)
        self.committed[rows[due]] = True
        return self._decide(observation, Action.COMMIT, due)

    def finish(self, observation: Observation) -> Decision:
        """Check a request that ended while on probation."""
        due = self._open(observation.rows)
        self.committed[observation.rows] = True
        return self._decide(observation, Action.COMMIT, due)

    def _open(self, rows: NDArray[np.intp]) -> BoolArray:
        return np.asarray(~self.committed[rows] & (self.modes[rows] != Mode.SAFE))


class Gate(OneAlarm):
    """Decide at prefill: requests whose score exceeds a threshold decode on the full cache.

    The score is `Observation.probe`, what the prefill says about the evicted entries. Where there
    is none it is the entropy of the first token: the first logits come from the prefill, which
    attends to the whole prompt before the press evicts, so they say what the prompt is like.
    """

    action = Action.REWIND
    checks = True

    def __init__(self, name: str, rows: int, threshold: ArrayLike) -> None:
        super().__init__(name, rows)
        self.threshold = np.broadcast_to(np.asarray(threshold, np.float32), (rows,)).copy()
        self.row_state.append(self.threshold)

    def fires(self, observation: Observation) -> BoolArray:
        """Whether the first token's score is above the threshold; NaN never is."""
        score = observation.signals[:, ENTROPY]
        if observation.probe is not None:
            score = observation.probe
        risky: BoolArray = (observation.positions == 0) & (score > self.threshold[observation.rows])
        return risky


class Ladder(Policy):
    """Start each request at the heaviest ratio of the press whose predicted harm is small.

    The choice is made at prefill, before anything is evicted (`kvguard.ladder`), so the policy
    relaxes only what it need not recover; afterwards it never acts. Adaptive budgets from what a
    press removes: CompilerKV (2602.08686), which compiles a table of budgets per head and layer.

    Args:
        name: of the policy.
        rows: slots of the batch.
        threshold: a ratio is taken where the probability of harm is below it; one for all requests
            or one for each.
    """

    chooses_ratio = True

    def __init__(self, name: str, rows: int, threshold: ArrayLike) -> None:
        super().__init__(name, rows)
        self.threshold = np.broadcast_to(np.asarray(threshold, np.float64), (rows,)).copy()
        self.row_state.append(self.threshold)


def choose_rung(risk: NDArray[np.floating], threshold: ArrayLike) -> NDArray[np.int64]:
    """The rung of a ladder that each request starts at: the first whose risk is small.

    Args:
        risk: (n, ratios) probability of harm, heaviest ratio first; NaN counts as too high.
        threshold: a ratio is taken where the risk is below it; of all requests or (n,).

    Returns:
        (n,) number of the ratio; the number of ratios, the full cache, where none is.

    >>> choose_rung(np.array([[0.5, 0.1], [0.5, 0.4]]), 0.2)
    array([1, 2])
    """
    fine = risk.astype(np.float64) < np.asarray(threshold, np.float64).reshape(-1, 1)
    chosen = np.where(fine.any(axis=1), fine.argmax(axis=1), risk.shape[1])
    return np.asarray(chosen, np.int64)


class Lossless(Policy):
    """Check every m tokens and at the end, and go on compressed: VeriCache's rule (2605.17613).

    Every answer is the uncompressed one, whatever the press; the horizon is fixed, nothing is
    predicted. The m tokens count from the last check's cut.
    """

    checks = checks_everything = True

    def __init__(self, name: str, rows: int, every_tokens: int) -> None:
        super().__init__(name, rows)
        self.every_tokens = every_tokens
        self.start = np.zeros(rows, np.int64)  # tokens that the last check kept
        self.row_state.append(self.start)

    def reset(self, row: int, seed: int) -> None:
        """Nothing of the new request has been checked."""
        super().reset(row, seed)
        self.start[row] = 0

    def checked(self, row: int, kept: int) -> None:
        """Count the next draft from here."""
        self.start[row] = kept

    def due(
        self, rows: NDArray[np.intp], tokens: NDArray[np.int64], every: int
    ) -> NDArray[np.int64]:
        """When the draft is long enough."""
        return np.maximum(self.start[rows] + self.every_tokens, tokens + 1)

    def step(self, observation: Observation) -> Decision:
        """Check when as many tokens as the horizon are unchecked."""
        return self._check(observation, self.every_tokens)

    def finish(self, observation: Observation) -> Decision:
        """Check what is unchecked."""
        return self._check(observation, 1)

    def _check(self, observation: Observation, least: int) -> Decision:
        rows, tokens = observation.rows, observation.positions + 1
        due = tokens - self.start[rows] >= least
        self.start[rows[due]] = tokens[due]
        return self._decide(observation, Action.CHECK, due)

"""The guard as an observer of the engine's decoding loop: it watches, checks, recovers.

`GuardObserver` runs any policy over a session; `KVGuard` and the live experiment run theirs through
it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from kvpress import BasePress
from numpy.typing import NDArray
from pydantic import BaseModel

from kvguard.audit import Audit, audit_tokens, first_rejected
from kvguard.config import Tolerance
from kvguard.controller import Mode
from kvguard.engine import Completion, Request, Session, Step, generate, synchronize
from kvguard.features import FeatureState
from kvguard.policies import (
    AFTER_END,
    Action,
    Decision,
    Observation,
    Policy,
    is_alarm,
    look_at,
)
from kvguard.prefill import Prefilled, cache_bytes, prefill
from kvguard.presses import fresh, phases, with_ratio
from kvguard.schema import FEATURE_NAMES
from kvguard.signals import SIGNAL_INDEX

logger = logging.getLogger(__name__)

NEVER_DUE = np.iinfo(np.int64).max
"""`GuardObserver.due_at` of a row that is not looked at any more."""

RECOVERABLE = (AssertionError, IndexError, RuntimeError, ValueError)
"""What a recovery or a press may raise, out of memory included, at the cost of its own row only."""

Stopping = Callable[[str, list[int], torch.Tensor], bool]
"""Key, generated tokens, raw logits of the last one; True ends the request."""


class HazardModel(Protocol):
    """What the guard asks of a predictor."""

    feature_version: int

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hazard in [0, 1] of each row of (n, features) in schema.FEATURE_NAMES order."""


class GuardError(ValueError):
    """The guard cannot do what was asked; the message says what it can."""


class RowReport(BaseModel):
    """What the guard did with one request; counts of tokens and bytes are this request's alone.

    Attributes:
        modes: (position, mode) whenever the mode changed; position counts generated tokens from 0.
        alarm_steps: generated tokens in the row when each alarm came.
        rewound_to: tokens kept by each rewind or restart.
        unrecoverable: recoveries that reached behind tokens which had been streamed already.
        tokens_wasted: generated, then dropped.
        tokens_prefilled: of prompts, verifying passes and recoveries; a shared prefix counts.
        decode_steps: single-token passes, those of dropped tokens included.
        kv_bytes_mean: bytes that the row's entries take, hidden ones too, mean over its decode
            steps; None without a step. Padding belongs to the batch and is left out.
        kv_bytes_peak: the largest of them, and of the caches that verifying passes held.
        kv_padding_bytes_mean: what the batch held empty for the row, so that its rows are equally
            long: a long row, such as a rewound one, makes padding in the others.
        seconds: of this request's prefill, recoveries and share of the decoding and watching.
        stop_reason: "eos", "length" or "stopped"; None on error.
        notes: what went wrong and was survived.
        error: why the request failed, None if it did not.
    """

    key: str
    modes: list[tuple[int, str]] = []
    alarm_steps: list[int] = []
    rewound_to: list[int] = []
    unrecoverable: int = 0
    tokens_wasted: int = 0
    tokens_prefilled: int = 0
    decode_steps: int = 0
    kv_bytes_mean: float | None = None
    kv_bytes_peak: int | None = None
    kv_padding_bytes_mean: float | None = None
    seconds: float = 0.0
    stop_reason: str | None = None
    notes: list[str] = []
    error: str | None = None


class GuardObserver:
    """Runs a policy over a session: an observer of the engine's decoding loop.

    Rows are independent: what happens to one changes nothing in another.

    Args:
        session: the engine's; its press is the one that the policy guards.
        policy: decides; one row of state per row of the session.
        predictor: gives hazards where the policy needs them.
        ratio: the press's compression ratio, a feature of the predictor.
        safe_ratio: fraction removed in SAFE; 0 is the uncompressed model. Above 0 the press runs at
            it, at prefill and while decoding; `PressError` for a press that has no ratio to set.
        margin_nats: a drafted token this close to the best one counts as a tie, not a rejection.
        tolerance: where a tolerant policy cuts.
        check_every_tokens: a policy that needs hazards looks at its rows every so many tokens, and
            at their last one; it then sees all tokens since, one by one. See `policies.look_at`.
        holdback_tokens: a token is released once this many have followed it, when its row is looked
            at.
        released: called with a request's key and tokens that will never be taken back unless an
            alarm reaches behind them (`RowReport.unrecoverable` counts those).
        stopping: called after every token with a request's key, its generated tokens and the raw
            logits (1, vocabulary) that the token came from; True ends the request.
    """

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        predictor: HazardModel | None = None,
        ratio: float = 0.0,
        safe_ratio: float = 0.0,
        margin_nats: float = 1e-4,
        tolerance: Tolerance | None = None,
        check_every_tokens: int = 1,
        holdback_tokens: int = 16,
        released: Callable[[str, list[int]], None] | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        if policy.needs_hazard and predictor is None:
            raise GuardError(f"policy {policy.name!r} needs a predictor, got None")
        self.policy, self.predictor = policy, predictor
        self.ratio, self.safe_ratio = ratio, safe_ratio
        compresses = safe_ratio > 0 and session.press is not None
        self.safe_press = with_ratio(session.press, safe_ratio) if compresses else None
        if policy.starts_safe:
            session.admission_press = self.safe_press
        self.margin_nats, self.tolerance = margin_nats, tolerance or Tolerance()
        self.check_every_tokens = check_every_tokens if policy.needs_hazard else 1
        self.holdback_tokens, self.released, self.stopping = holdback_tokens, released, stopping
        self.reports: dict[str, RowReport] = {}
        rows = session.slots.rows
        self.features = (
            FeatureState(rows, session.decoding.max_new_tokens, ratio)
            if policy.needs_hazard
            else None
        )
        self.modes: NDArray[np.int8] = np.zeros(rows, np.int8)
        self.seen: NDArray[np.int64] = np.zeros(rows, np.int64)  # tokens that the policy has seen
        self.streamed: NDArray[np.int64] = np.zeros(rows, np.int64)
        self.due_at: NDArray[np.int64] = np.zeros(rows, np.int64)  # tokens at the next look
        self._idle_steps = 0  # how many steps no row is due in, unless it ends

    # --- the engine's calls ---

    def admitted(self, session: Session, row: int) -> None:
        """Start a row's policy, features and report."""
        request = session.rows[row].completion.request
        self.policy.reset(row, request.seed)
        if self.features is not None:
            self.features.reset(row, self.ratio, int(session.limits[row]))
        self.modes[row] = self.policy.modes[row]
        self.seen[row] = self.streamed[row] = 0
        report = RowReport(key=request.key, modes=[(0, Mode(self.modes[row]).name)])
        self.reports[request.key] = report
        self._schedule(session, [row])
        self._idle_steps = 0

    def moved(self, session: Session, source: int, target: int) -> None:
        """Follow the engine: the request in ``source`` is now in ``target``."""
        if source == target:
            return
        self.policy.move(source, target)
        if self.features is not None:
            self.features.move(source, target)
        self.modes[target] = self.modes[source]
        self.seen[target] = self.seen[source]
        self.due_at[target] = self.due_at[source]
        self.streamed[target] = self.streamed[source]

    def observe(self, session: Session, step: Step) -> None:
        """Let the policy look at the rows whose turn it is and carry out what it decides."""
        if self._idle_steps and not any(row.ended for row in session.rows):
            self._idle_steps -= 1
        else:
            self._observe(session, step)

    @torch.inference_mode()
    def _observe(self, session: Session, step: Step) -> None:
        started = time.perf_counter()
        broken = [i for i, row in enumerate(session.rows) if row.completion.error is not None]
        if self.stopping is not None:
            for row in range(session.active):
                key = session.rows[row].completion.request.key
                if row not in broken and self.stopping(
                    key, session.tokens(row), session.logits[row : row + 1]
                ):
                    session.stop(row)
        lengths, due_at = session.lengths[: session.active], self.due_at[: session.active]
        ended = np.array([row.ended for row in session.rows])
        due = (lengths >= due_at) | (ended & (due_at != NEVER_DUE))
        due[broken] = False
        rows = np.flatnonzero(due)
        actions = self._look(session, rows) if len(rows) else []
        share = (time.perf_counter() - started) / session.active
        for state in session.rows:
            state.completion.decode_seconds += share
        for row in broken:
            self._mend(session, row, int(step.positions[row]))
        for row, action, amount in actions:
            self._act(session, row, action, amount)
        done = [*broken, *rows.tolist()]
        self.seen[done] = session.lengths[done]
        self._schedule(session, done)
        if self.released is not None:
            settled = np.flatnonzero(self.modes[: session.active] == Mode.SAFE)
            for row in sorted({*done, *settled}):
                self._release(session, int(row))
        elif self.stopping is None:
            self._idle_steps = int((due_at - lengths).min()) - 1

    def _schedule(self, session: Session, rows: list[int]) -> None:
        """When these rows are looked at next; those that the policy leaves in SAFE never."""
        due = look_at(self.policy, session.lengths[rows] + 1, self.check_every_tokens)
        if self.policy.needs_hazard and self.policy.safe_after == "stay":
            due[self.modes[rows] == Mode.SAFE] = NEVER_DUE
        self.due_at[rows] = due

    def _set_mode(self, session: Session, row: int, mode: int, position: int) -> None:
        self.modes[row] = mode
        self._report(session, row).modes.append((int(position), Mode(mode).name))

    # --- between the policy and the engine ---

    def _look(self, session: Session, rows: NDArray[np.intp]) -> list[tuple[int, Action, int]]:
        """Show the policy every token of these rows that it has not seen, until it acts.

        Returns:
            Row, action and `Decision.amount` wherever the policy acts.
        """
        session.settle_signals()
        seen, counts = self.seen[rows], session.lengths[rows] - self.seen[rows]
        hazard = self._hazard(session, rows, seen, counts)
        ended = np.array([session.rows[row].ended for row in rows])
        going = np.ones(len(rows), np.bool_)
        if hazard is not None:
            going = ended.copy()  # those are asked to finish, too
            going[~ended] = ~self.policy.rests(rows[~ended], hazard[~ended])
        actions: list[tuple[int, Action, int]] = []
        for ahead in range(int(counts.max())):
            index = np.flatnonzero(going & (counts > ahead))
            if not len(index):
                break
            observation = self._observation(session, rows[index], seen[index] + ahead)
            if hazard is not None:
                observation = observation._replace(hazard=hazard[index, ahead])
            decision = self.policy.step(observation)
            last = ended[index] & (counts[index] == ahead + 1)
            quiet = last & (decision.actions == Action.CONTINUE)
            if quiet.any():
                decision = _overlay(decision, quiet, self.policy.finish(_rows(observation, quiet)))
            for i in _where(decision.modes != self.modes[observation.rows]):
                row, position = int(observation.rows[i]), observation.positions[i]
                self._set_mode(session, row, decision.modes[i], position)
            for i in _where(decision.actions != Action.CONTINUE):
                action = Action(decision.actions[i])
                actions.append((int(observation.rows[i]), action, int(decision.amount[i])))
                going[index[i]] = False
        return actions

    def _observation(
        self, session: Session, rows: NDArray[np.intp], positions: NDArray[np.int64]
    ) -> Observation:
        """One token of each of some rows."""
        return Observation(
            rows=rows,
            positions=positions.astype(np.int32),
            token_ids=session.history[rows, positions],
            signals=session.signals[rows, positions],
            hazard=None,
            history=session.history[rows] if self.policy.needs_history else None,
        )

    def _hazard(
        self,
        session: Session,
        rows: NDArray[np.intp],
        seen: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> NDArray[np.float32] | None:
        """(rows, most tokens) hazards; None if the policy needs none.

        NaN, which neither alarms nor calms, stands where there is no such token and where the
        predictor fails.
        """
        if self.features is None:
            return None
        assert self.predictor is not None
        longest = int(counts.max())
        hazard = np.full((len(rows), longest), np.nan, np.float32)
        features = np.empty((*hazard.shape, len(FEATURE_NAMES)), np.float32)
        for count in set(counts.tolist()):  # mostly one: rows in step with each other
            index = np.flatnonzero(counts == count)
            row, at = rows[index], seen[index, None] + np.arange(count)
            features[index, :count] = self.features.advance(
                row, session.signals[row[:, None], at], session.history[row[:, None], at], at[:, 0]
            )
        present = np.arange(longest) < counts[:, None]
        try:
            hazard[present] = self.predictor.predict(features[present])
        except Exception as error:  # any predictor may be plugged in; the requests must go on
            logger.exception("the predictor failed; these tokens have no hazard")
            note = f"predictor failed: {type(error).__name__}: {error}"
            for row in rows:
                notes = self._report(session, int(row)).notes
                if note not in notes:
                    notes.append(note)
        return hazard

    def _report(self, session: Session, row: int) -> RowReport:
        return self.reports[session.rows[row].completion.request.key]

    def _act(self, session: Session, row: int, action: Action, amount: int) -> None:
        """Carry out one action; what fails is noted, and the row goes on as it was."""
        report = self._report(session, row)
        state = session.rows[row]
        had = int(session.lengths[row])
        if state.ended and action not in AFTER_END:
            return
        if is_alarm(np.array([action], np.int8))[0]:
            report.alarm_steps.append(had)
        started = time.perf_counter()
        try:
            if action in (Action.REWIND, Action.CHECK, Action.COMMIT):
                self._rewind(session, row, session.tokens(row), action)
            elif action == Action.RESTART:
                self._prefill_again(session, row, 0, self.safe_press)
                self._record(row, 0, True, report)
            elif action == Action.REFRESH:
                self._prefill_again(session, row, had, session.press)
            elif action == Action.RELAX:
                session.compress_while_decoding(row, None)
            elif action == Action.STOP:
                session.stop(row)
            elif action == Action.PRUNE:
                session.slots.drop_tail(row, amount)
        except RECOVERABLE as error:
            self._survive(
                session, report, f"{action.name} failed, the row goes on as it was", error
            )
        synchronize(session.model.device)
        state.completion.decode_seconds += time.perf_counter() - started

    def _survive(
        self, session: Session, report: RowReport, what: str, error: BaseException
    ) -> None:
        """Note a failure that costs its own row something and the others nothing."""
        if isinstance(error, torch.OutOfMemoryError) and session.model.device.type == "cuda":
            torch.cuda.empty_cache()
        report.notes.append(f"{what}: {type(error).__name__}: {error}")
        logger.warning("request %s: %s: %s", report.key, what, error)

    def _mend(self, session: Session, row: int, position: int) -> None:
        """A row broke (logits not finite, a press failed): verify and go on uncompressed.

        A row that is in SAFE already has nothing better to fall back on and ends with its error.
        """
        completion = session.rows[row].completion
        if self.modes[row] == Mode.SAFE:
            return
        report = self._report(session, row)
        broken, completion.error = completion.error, None
        report.alarm_steps.append(position + 1)
        try:
            self._rewind(session, row, session.tokens(row)[:position], always=True)
        except RECOVERABLE as error:
            completion.error = broken
            self._survive(session, report, "the uncompressed model could not take over", error)
            return
        report.notes.append(f"{broken}; verified, and went on without compression")
        self.policy.settle(row)
        self._set_mode(session, row, Mode.SAFE, position)

    def _rewind(
        self,
        session: Session,
        row: int,
        tokens: list[int],
        action: Action = Action.REWIND,
        *,
        always: bool = False,
    ) -> None:
        """Check tokens in one pass, keep those before the cut, continue from there.

        REWIND goes on at the safe ratio, CHECK under the press, COMMIT as REWIND where a token is
        rejected and as if nothing had happened where none is. With ``always`` the cache is replaced
        even if nothing is cut from a request that has ended.
        """
        completion = session.rows[row].completion
        request = completion.request
        audit = audit_tokens(
            session.model,
            request.prompt_ids,
            tokens,
            decoding=session.decoding,
            seed=request.seed,
            prefix=session.prefix,
        )
        completion.tokens_prefilled += len(request.prompt_ids) + len(tokens)
        report = self._report(session, row)
        held = cache_bytes(audit.scored.cache)
        report.kv_bytes_peak = max(report.kv_bytes_peak or 0, held)
        cut = self._cut(session, row, audit)
        kept = len(tokens) if cut is None else cut
        accepted = cut is None and (session.rows[row].ended or action == Action.COMMIT)
        if accepted and not always:
            report.rewound_to.append(kept)
            return
        if action == Action.CHECK:
            self._prefill_again(session, row, kept, session.press)
        elif self.safe_press is not None:
            self._prefill_again(session, row, kept, self.safe_press)
        else:
            logits = session.model.lm_head(audit.scored.hidden[kept : kept + 1])
            audit.scored.cache.crop(len(request.prompt_ids) + kept)
            ready = Prefilled(audit.scored.cache, None, logits, held, held, 0)
            self._put(session, row, kept, ready, None)
        if action == Action.COMMIT:  # the policy learns here that the row is on the full cache
            self.policy.settle(row)
            self._set_mode(session, row, Mode.SAFE, len(tokens) - 1)
        self._record(row, kept, cut is not None, report)

    def _cut(self, session: Session, row: int, audit: Audit) -> int | None:
        """How many tokens stay; None: all of them."""
        if self.policy.recovery_cut == "exact":
            return first_rejected(audit.gap, self.margin_nats)
        count = len(audit.logprob)
        chosen = session.signals[row, :count, SIGNAL_INDEX["chosen_logprob"]]
        return harmful_token(chosen - audit.logprob, audit.logprob, self.tolerance)

    def _prefill_again(
        self, session: Session, row: int, kept: int, press: BasePress | None
    ) -> None:
        """A fresh cache of the prompt and the first ``kept`` tokens, under a press or none."""
        completion = session.rows[row].completion
        request = completion.request
        ready = prefill(
            session.model,
            [*request.prompt_ids, *session.tokens(row)[:kept]],
            fresh(phases(press).prefill),
            prefix=session.prefix,
            seed=request.seed,
        )
        completion.tokens_prefilled += len(request.prompt_ids) + kept
        report = self._report(session, row)
        report.kv_bytes_peak = max(report.kv_bytes_peak or 0, ready.bytes_after)
        self._put(session, row, kept, ready, press)

    def _put(
        self,
        session: Session,
        row: int,
        kept: int,
        ready: Prefilled,
        press: BasePress | None,
    ) -> None:
        """Continue a row from a fresh cache, under a press or none."""
        session.rewind(row, kept, ready)
        session.compress_while_decoding(row, press)
        if self.features is not None:
            tokens = np.array(session.tokens(row), np.int32)
            ratio = self.ratio if press is session.press else self.safe_ratio
            self.features.replace(row, session.signals[row, :kept], tokens, ratio=ratio)

    def _record(self, row: int, kept: int, cut: bool, report: RowReport) -> None:
        """Note what a recovery kept, and whether streamed tokens were among those it took back."""
        report.rewound_to.append(kept)
        if cut and kept < self.streamed[row]:
            report.unrecoverable += 1

    # --- streaming ---

    def _release(self, session: Session, row: int) -> None:
        """Hand out tokens that have aged enough; in ALERT none, at the end all."""
        assert self.released is not None
        start, ready = int(self.streamed[row]), int(session.lengths[row])
        if not session.rows[row].ended and self.modes[row] != Mode.SAFE:
            ready = start if self.modes[row] == Mode.ALERT else ready - self.holdback_tokens
        if ready > start:
            tokens = session.history[row, start:ready].tolist()
            self.released(session.rows[row].completion.request.key, tokens)
            self.streamed[row] = ready

    def close(self, completion: Completion) -> RowReport:
        """Complete and return the report of a finished request."""
        key = completion.request.key
        report = self.reports.setdefault(key, RowReport(key=key))
        report.tokens_wasted = completion.tokens_wasted
        report.tokens_prefilled = completion.tokens_prefilled
        report.decode_steps = completion.decode_steps
        report.seconds = completion.prefill_seconds + completion.decode_seconds
        report.stop_reason, report.error = completion.stop_reason, completion.error
        allocated = completion.kv_bytes[:, :2].sum(
            axis=1
        )  # kept and masked; padding is the batch's
        if len(allocated):
            report.kv_bytes_mean = float(allocated.mean())
            report.kv_padding_bytes_mean = float(completion.kv_bytes[:, 2].mean())
            report.kv_bytes_peak = max(report.kv_bytes_peak or 0, int(allocated.max()))
        return report


def harmful_token(
    llr: NDArray[np.float32], logprob: NDArray[np.float32], tolerance: Tolerance
) -> int | None:
    """First token at which a draft shows harm, not mere difference.

    Args:
        llr: (n,) compressed minus uncompressed log-probability of each token, nats.
        logprob: (n,) uncompressed log-probability, nats.
        tolerance: what counts as harm.

    Returns:
        The start of the first harmful window, or the first token that the uncompressed model finds
        implausible, whichever comes first; None without either.
    """
    found = [int(index) for index in np.flatnonzero(logprob < tolerance.token_logprob)[:1]]
    window = tolerance.window_tokens
    if len(llr) >= window:
        means = np.lib.stride_tricks.sliding_window_view(llr, window).mean(axis=1)
        found += [int(index) for index in np.flatnonzero(means >= tolerance.window_llr)[:1]]
    return min(found, default=None)


def _where(mask: NDArray[np.bool_]) -> list[int]:
    """Row numbers at which a mask holds."""
    return [int(row) for row in np.flatnonzero(mask)]


def _rows(observation: Observation, mask: NDArray[np.bool_]) -> Observation:
    """An observation of some of its rows."""
    return Observation(
        *(None if column is None else column[mask] for column in observation)  # type: ignore[arg-type]
    )


def _overlay(decision: Decision, mask: NDArray[np.bool_], part: Decision) -> Decision:
    """A decision with some of its rows replaced."""
    decision.actions[mask] = part.actions
    decision.amount[mask] = part.amount
    decision.modes[mask] = part.modes
    return decision


def guarded(
    session: Session, requests: Iterable[Request], watch: GuardObserver
) -> Iterator[tuple[Completion, RowReport]]:
    """Decode requests under a guard; completions come as they finish, each with its report."""
    for completion in generate(session, requests, watch):
        yield completion, watch.close(completion)

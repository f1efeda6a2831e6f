"""The guard as an observer of the engine's decoding loop: hazards, checks, recoveries.

`GuardObserver` runs any policy over a session, for `KVGuard` and the live experiment.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from kvpress import BasePress
from numpy.typing import NDArray

from kvguard.audit import Check, first_rejected, harmful_token
from kvguard.check_timing import LosslessAuto
from kvguard.checks import RECOVERABLE, check_prices, free_memory, run_checks
from kvguard.config import BASELINE_RATIO, Tolerance
from kvguard.controller import Mode
from kvguard.engine import Session, Step, generate
from kvguard.guard_report import GuardError, RowReport, complete_report
from kvguard.hazards import HazardModel as HazardModel
from kvguard.hazards import HazardState
from kvguard.ladder import charge_replays, relaxed
from kvguard.models import synchronize
from kvguard.policies import AFTER_END, CHECKS, Action, Observation, Policy, is_alarm
from kvguard.prefill import prefill
from kvguard.presses import fresh, phases, with_ratio
from kvguard.requests import Completion, Request
from kvguard.signals import SIGNAL_INDEX

logger = logging.getLogger(__name__)

NEVER_DUE = np.iinfo(np.int64).max
"""`GuardObserver.due_at` of a row that needs no further decision."""

Stopping = Callable[[str, list[int], torch.Tensor], bool]
"""Key, generated tokens, raw logits of the last one; True ends the request."""


ProbeScore = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(n, probes) of prefills in the order of schema.PROBE_NAMES to (n,) scores, higher is riskier."""


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
        check_every_tokens: a policy that needs hazards decides every so many tokens of a row, and
            at its last one; it then judges all tokens since, in order
            (`policies.next_decision`). Other policies decide at every token.
        holdback_tokens: a token is released once this many have followed it or a check has accepted
            it; in ALERT and SAFE, and by a policy that promises the uncompressed answer, accepted
            ones alone.
        released: called with a request's key and released tokens.
        final: released tokens stay, whatever a check says of them, so that what is returned is what
            was released; `RowReport.unrecoverable` counts checks that rejected some. False only
            counts.
        stopping: called after every token with a request's key, its generated tokens and the raw
            logits (1, vocabulary) that the token came from; True ends the request.
        probe_score: gives `Observation.probe`, in a session that measures probes; None: nothing.
        bus_ratio: of what checks cost, see `checks.check_prices`.
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
        final: bool = True,
        stopping: Stopping | None = None,
        probe_score: ProbeScore | None = None,
        bus_ratio: float | None = None,
    ) -> None:
        if holdback_tokens < 0:
            raise GuardError(f"holdback_tokens is at least 0, got {holdback_tokens}")
        if not margin_nats >= 0:
            raise GuardError(f"margin_nats is at least 0, got {margin_nats}")
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
        self.final = final and released is not None
        self.reports: dict[str, RowReport] = {}
        rows = session.slots.rows
        self.hazards = (
            HazardState(predictor, rows, session.decoding.max_new_tokens, ratio)
            if policy.needs_hazard and predictor is not None
            else None
        )
        self.modes: NDArray[np.int8] = np.zeros(rows, np.int8)
        self.seen: NDArray[np.int64] = np.zeros(rows, np.int64)  # tokens that the policy has seen
        self.streamed: NDArray[np.int64] = np.zeros(rows, np.int64)
        self.probe_score, self.bus_ratio = probe_score, bus_ratio
        self.probe: NDArray[np.float32] = np.full(rows, np.nan, np.float32)
        self.unscored: set[str] = set()  # requests whose probes are not complete or not looked at
        self.due_at: NDArray[np.int64] = np.zeros(rows, np.int64)  # length at the next decision
        self._idle_steps = 0  # steps in which no row is due unless it ends

    # --- the engine's calls ---

    def admitted(self, session: Session, row: int) -> None:
        """Start a row's policy, features and report."""
        completion = session.rows[row].completion
        request = completion.request
        self.policy.reset(row, request.seed)
        if self.hazards is not None:
            limit = int(session.limits[row])
            self.hazards.reset(row, self.ratio, limit, completion.probes)
        if completion.start_ratio == BASELINE_RATIO:
            self.policy.enter_safe_mode(row)
        charge_replays(session, row)
        self.modes[row] = self.policy.modes[row]
        self.seen[row] = self.streamed[row] = 0
        self.probe[row] = np.nan
        if self.probe_score is not None and completion.probes is not None:
            self.unscored.add(request.key)
            self._score_probes(session)
        report = RowReport(key=request.key, modes=[(0, Mode(self.modes[row]).name)])
        report.start_ratio, report.notes = completion.start_ratio, list(completion.notes)
        report.alarm_steps += [0] if relaxed(session, completion) else []
        self.reports[request.key] = report
        self._schedule(session, [row])
        self._idle_steps = 0

    def _score_probes(self, session: Session) -> None:
        """Score the prefills whose probes have become complete."""
        for number, row in enumerate(session.rows if self.unscored else []):
            key, probes = row.completion.request.key, row.completion.probes
            if key in self.unscored and row.replay is None and self.probe_score is not None:
                self.unscored.discard(key)
                self.probe[number] = self.probe_score(np.asarray(probes)[None])[0]

    def moved(self, session: Session, source: int, target: int) -> None:
        """Follow the engine: the request in ``source`` is now in ``target``."""
        if source == target:
            return
        self.policy.move(source, target)
        if self.hazards is not None:
            self.hazards.move(source, target)
        self.modes[target] = self.modes[source]
        self.seen[target] = self.seen[source]
        self.due_at[target] = self.due_at[source]
        self.streamed[target] = self.streamed[source]
        self.probe[target] = self.probe[source]

    def observe(self, session: Session, step: Step) -> None:
        """Let the policy decide for the rows that are due, and carry its actions out."""
        if self._idle_steps and not any(row.ended for row in session.rows):
            self._idle_steps -= 1
        else:
            self._observe(session, step)

    @torch.inference_mode()
    def _observe(self, session: Session, step: Step) -> None:
        started = time.perf_counter()
        self._score_probes(session)
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
        if isinstance(self.policy, LosslessAuto):
            self.policy.set_prices(check_prices(session, self.bus_ratio))
        actions = self._decide(session, rows) if len(rows) else []
        share = (time.perf_counter() - started) / session.active
        for state in session.rows:
            state.completion.decode_seconds += share
        for row in broken:
            self._recover_broken(session, row, int(step.positions[row]))
        checks = {row: action for row, action, _ in actions if action in CHECKS}
        for row, action, amount in actions:
            if action not in CHECKS:
                self._act(session, row, action, amount)
        for row in self._unreleased(session, rows):
            checks.setdefault(row, Action.CHECK)
        if checks and isinstance(self.policy, LosslessAuto):
            others = [i for i in range(session.active) if i not in checks and i not in broken]
            checks |= dict.fromkeys(self.policy.share_pass(len(checks), others), Action.CHECK)
        if checks:
            self._check(session, checks)
        done = [*broken, *rows.tolist()]
        self.seen[done] = session.lengths[done]
        self._schedule(session, done)
        if self.released is not None:
            for row in range(session.active):
                self._release(session, row)
        elif self.stopping is None:
            self._idle_steps = int((due_at - lengths).min()) - 1

    def _schedule(self, session: Session, rows: list[int]) -> None:
        """When the policy sees these rows next; those that it leaves in SAFE never."""
        index = np.array(rows, np.intp)
        due = self.policy.due(index, session.lengths[index], self.check_every_tokens)
        if self.policy.needs_hazard and self.policy.safe_after == "stay":
            due[self.modes[index] == Mode.SAFE] = NEVER_DUE
        self.due_at[index] = due

    def _set_mode(self, session: Session, row: int, mode: int, position: int) -> None:
        self.modes[row] = mode
        self._report(session, row).modes.append((int(position), Mode(mode).name))

    # --- between the policy and the engine ---

    def _decide(self, session: Session, rows: NDArray[np.intp]) -> list[tuple[int, Action, int]]:
        """Show the policy every token of these rows that it has not seen, until it acts.

        Returns:
            Row, action and `Decision.amount` wherever the policy acts.
        """
        session.compute_pending_signals()
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
                decision.replace_rows(quiet, self.policy.finish(observation.take(quiet)))
            for i in np.flatnonzero(decision.modes != self.modes[observation.rows]):
                row, position = int(observation.rows[i]), observation.positions[i]
                self._set_mode(session, row, decision.modes[i], position)
            for i in np.flatnonzero(decision.actions != Action.CONTINUE):
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
            probe=None if self.probe_score is None else self.probe[rows],
        )

    def _hazard(
        self,
        session: Session,
        rows: NDArray[np.intp],
        seen: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> NDArray[np.float32] | None:
        """(rows, most tokens) hazards; None if the policy needs none.

        NaN (no evidence for the controller) where there is no such token or the predictor fails.
        """
        if self.hazards is None:
            return None
        features = self.hazards.features(rows, seen, counts, session.signals, session.history)
        try:
            hazard = self.hazards.predict(rows, features, counts)
        except Exception as error:  # any predictor may be plugged in; the requests must go on
            logger.exception("the predictor failed; these tokens have no hazard")
            hazard = np.full(features.shape[:2], np.nan, np.float32)
            note = f"predictor failed: {type(error).__name__}: {error}"
            for row in rows:
                notes = self._report(session, int(row)).notes
                if note not in notes:
                    notes.append(note)
        return hazard

    def _report(self, session: Session, row: int) -> RowReport:
        return self.reports[session.rows[row].completion.request.key]

    def _act(self, session: Session, row: int, action: Action, amount: int) -> None:
        """Carry out one action that needs no check; a row whose action fails goes on as it was."""
        report = self._report(session, row)
        state = session.rows[row]
        had = int(session.lengths[row])
        if state.ended and action not in AFTER_END:
            return
        if is_alarm(np.array([action], np.int8))[0]:
            report.alarm_steps.append(had)
        started = time.perf_counter()
        try:
            if action == Action.RESTART:
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
        free_memory(session.model.device, error)
        report.notes.append(f"{what}: {type(error).__name__}: {error}")
        logger.warning("request %s: %s: %s", report.key, what, error)

    # --- checks ---

    def _check(self, session: Session, actions: dict[int, Action]) -> None:
        """Check rows with the uncompressed model in one pass, and recover each as its action says.

        A row whose check fails goes on as it was; a policy that promises the uncompressed answer
        ends it with an error, if it was to end here.
        """
        started = time.perf_counter()
        for row, action in actions.items():
            if is_alarm(np.array([action], np.int8))[0]:
                self._report(session, row).alarm_steps.append(int(session.lengths[row]))
        exact = [row for row in actions if session.rows[row].exact]
        for row in exact:  # uncompressed: its tokens are the uncompressed model's own
            self.policy.checked(row, int(session.lengths[row]))
            self._record(row, int(session.lengths[row]), False, self._report(session, row))
        checks = self._run_checks(
            session, {row: session.tokens(row) for row in actions if row not in exact}
        )
        for row, check in checks.items():
            report, state = self._report(session, row), session.rows[row]
            action = actions[row]
            try:
                if isinstance(check, Exception):
                    raise check
                self._resolve(session, row, action, check)
            except RECOVERABLE as error:
                self._survive(
                    session, report, f"{action.name} failed, the row goes on as it was", error
                )
                self.policy.checked(row, state.checked)
                if self.policy.checks_everything and state.ended:
                    state.completion.error = f"the answer could not be checked: {error}"
        synchronize(session.model.device)
        share = (time.perf_counter() - started) / max(1, len(actions))
        for row in actions:
            session.rows[row].completion.decode_seconds += share

    def _run_checks(
        self, session: Session, tokens: dict[int, list[int]]
    ) -> dict[int, Check | Exception]:
        """The checks of some rows' tokens, with what was survived noted in their reports."""
        checks = run_checks(session, tokens, fresh=self.policy.fresh_checks)
        for row, note in checks.notes.items():
            self._report(session, row).notes.append(note)
        for row, check in checks.found.items():
            if not isinstance(check, Exception) and check.cache is not None:
                report = self._report(session, row)
                report.kv_bytes_peak = max(report.kv_bytes_peak or 0, check.device_bytes)
        return checks.found

    def _resolve(self, session: Session, row: int, action: Action, check: Check) -> None:
        """Cut a row at the first token that its check rejects; go on as the action says."""
        state, report = session.rows[row], self._report(session, row)
        count = int(session.lengths[row])
        kept = self._kept(session, row, check, count)
        cut = kept < count
        new = slice(max(state.checked - check.start, 0), max(kept - check.start, 0))
        self.policy.checked(row, kept)
        if not cut and state.ended:
            state.checked = kept
        elif action == Action.CHECK and self.safe_press is None and self.policy.promotes(row):
            session.promote(row, kept, check)
            self.policy.set_promoted(row)
            self._set_mode(session, row, self.policy.modes[row], max(kept - 1, 0))
        elif action == Action.CHECK:
            if not session.accept(row, kept, check):
                session.park(row, kept, check)
                self._prefill_again(session, row, kept, session.press)
            self._replace_features(session, row, cut, self.ratio)
        elif action == Action.COMMIT and not cut:
            session.park(row, kept, check)
        elif self.safe_press is not None:
            session.park(row, kept, check)
            self._prefill_again(session, row, kept, self.safe_press)
        else:
            session.promote(row, kept, check)
            self._replace_features(session, row, True, self.safe_ratio)
        if action == Action.COMMIT and cut:  # the policy learns here that a token was rejected
            self.policy.enter_safe_mode(row)
            self._set_mode(session, row, Mode.SAFE, count - 1)
        if self.hazards is not None:
            llr = self._llr(session, row, check)[new]
            self.hazards.checked(row, kept, llr, rejected=cut)
        self._record(row, kept, cut, report)

    def _kept(self, session: Session, row: int, check: Check, count: int) -> int:
        """How many of ``count`` tokens stay: those before the first that the check rejects.

        Tokens that were accepted before stay accepted, and so do, where they are final, those that
        have been streamed: a rejected one among them is noted.
        """
        cut = self._first_cut(session, row, check)
        kept = count if cut is None else max(cut, session.rows[row].checked)
        if self.final and kept < self.streamed[row]:
            report = self._report(session, row)
            report.unrecoverable += 1
            final = int(self.streamed[row])
            note = (
                f"token {kept} is rejected, but {final} tokens were streamed and stay; a larger "
                "holdback_tokens or policy='lossless' streams later"
            )
            report.notes.append(note)
            logger.warning("request %s: %s", report.key, note)
            return final
        return kept

    def _first_cut(self, session: Session, row: int, check: Check) -> int | None:
        """The first token that the policy rejects; None: it accepts all."""
        audit = check.audit
        if self.policy.recovery_cut == "exact":
            found = first_rejected(audit.gap, self.margin_nats)
        else:
            llr = self._llr(session, row, check)
            found = harmful_token(llr, audit.logprob, self.tolerance)
        return None if found is None else check.start + found

    def _llr(self, session: Session, row: int, check: Check) -> NDArray[np.float32]:
        """Compressed minus uncompressed log-probability of each token that a check judged."""
        logprob = check.audit.logprob
        part = slice(check.start, check.start + len(logprob))
        return np.asarray(session.signals[row, part, SIGNAL_INDEX["chosen_logprob"]] - logprob)

    def _recover_broken(self, session: Session, row: int, position: int) -> None:
        """A row broke (logits not finite, a press failed): check and go on uncompressed.

        A row that is uncompressed already has nothing better to fall back on and ends with its
        error.
        """
        state = session.rows[row]
        completion = state.completion
        if state.exact or self.modes[row] == Mode.SAFE:
            return
        report = self._report(session, row)
        broken, completion.error = completion.error, None
        report.alarm_steps.append(position + 1)
        state.stop_reason = None
        tokens = session.tokens(row)[:position]
        try:
            if tokens:
                check = self._run_checks(session, {row: tokens})[row]
                if isinstance(check, Exception):
                    raise check
                kept = self._kept(session, row, check, position)
                session.promote(row, kept, check)
            else:
                kept = 0
                self._prefill_again(session, row, 0, None)
        except RECOVERABLE as error:
            completion.error = broken
            self._survive(session, report, "the uncompressed model could not take over", error)
            return
        report.notes.append(f"{broken}; checked, and went on without compression")
        self.policy.enter_safe_mode(row)
        self._set_mode(session, row, Mode.SAFE, position)
        self._replace_features(session, row, True, self.safe_ratio)
        self._record(row, kept, kept < position, report)

    def _prefill_again(
        self, session: Session, row: int, kept: int, press: BasePress | None
    ) -> None:
        """A fresh cache of the prompt and the first ``kept`` tokens, under a press or none."""
        state = session.rows[row]
        request = state.completion.request
        ready = prefill(
            session.model,
            [*request.prompt_ids, *session.tokens(row)[:kept]],
            fresh(phases(press).prefill),
            prefix=session.prefix,
            seed=request.seed,
        )
        state.completion.tokens_prefilled += len(request.prompt_ids) + kept
        report = self._report(session, row)
        report.kv_bytes_peak = max(report.kv_bytes_peak or 0, ready.bytes_after)
        session.meter.extra_pass({row: ready.bytes_after})
        session.replace_cache(row, kept, ready, whole=not phases(press).compresses)
        session.compress_while_decoding(row, press)
        if kept == 0 and state.checked > 0:
            state.checked = 0
            state.cold = None if state.cold is None else state.cold.prompt_only()
        state.exact = press is None and state.checked >= kept
        ratio = self.ratio if press is session.press else self.safe_ratio
        self._replace_features(session, row, True, ratio)

    def _replace_features(self, session: Session, row: int, changed: bool, ratio: float) -> None:
        """Compute the features of a row afresh from the tokens that it has kept."""
        if self.hazards is None or not changed:
            return
        tokens = np.array(session.tokens(row), np.int32)
        session.compute_pending_signals()
        self.hazards.replace(row, session.signals[row, : len(tokens)], tokens, ratio=ratio)

    def _record(self, row: int, kept: int, cut: bool, report: RowReport) -> None:
        """Note what a recovery kept, and whether streamed tokens were among those it took back."""
        report.rewound_to.append(kept)
        if cut and kept < self.streamed[row]:
            report.unrecoverable += 1

    # --- streaming ---

    def _release(self, session: Session, row: int) -> None:
        """Hand out the tokens that stay: checked ones, in NORMAL those that have aged enough."""
        assert self.released is not None
        start, end = int(self.streamed[row]), self._releasable(session, row)
        if end > start:
            tokens = session.history[row, start:end].tolist()
            self.released(session.rows[row].completion.request.key, tokens)
            self.streamed[row] = end

    def _releasable(self, session: Session, row: int) -> int:
        """How many of a row's tokens may be released."""
        state, count = session.rows[row], int(session.lengths[row])
        if state.ended or state.exact:
            return count
        if self.policy.checks_everything or self.modes[row] != Mode.NORMAL:
            return state.checked
        aged = min(count - self.holdback_tokens, int(self.seen[row]))
        return max(state.checked, aged)

    def _unreleased(self, session: Session, rows: NDArray[np.intp]) -> list[int]:
        """Rows that end, not in NORMAL, with tokens that are neither checked nor released."""
        if not (self.final and self.policy.checks):
            return []
        return [
            int(row)
            for row in rows
            if session.rows[row].stop_reason is not None
            and session.rows[row].completion.error is None
            and not session.rows[row].exact
            and self.modes[row] != Mode.NORMAL
            and max(session.rows[row].checked, self.streamed[row]) < session.lengths[row]
        ]

    def close(self, completion: Completion) -> RowReport:
        """Complete and return the report of a finished request."""
        key = completion.request.key
        report = self.reports.setdefault(key, RowReport(key=key))
        complete_report(report, completion)
        return report


def guarded(
    session: Session, requests: Iterable[Request], watch: GuardObserver
) -> Iterator[tuple[Completion, RowReport]]:
    """Decode requests under a guard; completions come as they finish, each with its report."""
    for completion in generate(session, requests, watch):
        yield completion, watch.close(completion)

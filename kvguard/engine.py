"""Decode many requests together, each from its own compressed cache.

Every prompt is prefilled alone (`prefill`). The compressed caches are then stored in `Slots` and
decode as one batch (continuous batching): finished rows leave and waiting requests take their
places.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from kvpress import BasePress
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kvguard.audit import Check
from kvguard.cold_cache import REFUSALS, ColdKind, ColdStore, attention_of
from kvguard.config_policies import Sharing
from kvguard.costs import CostMeter
from kvguard.decode_compression import DecodeState, compressing
from kvguard.ladder import RatioLadder
from kvguard.logits_buffers import LogitsBuffers
from kvguard.models import check_architecture, position_limit, synchronize
from kvguard.prefill import (
    Prefilled,
    Prefix,
    attention_layers,
    cache_bytes,
    is_pressed,
    matching_prefix,
    prefill,
)
from kvguard.presses import Phases, PressError, fresh, phases
from kvguard.probes import CacheProbe
from kvguard.replays import ReplayAt, step_with_riders
from kvguard.requests import Completion, Request, Row, check_request
from kvguard.sampling import Decoding, token_scores
from kvguard.shared_prefix import behind, compress_behind
from kvguard.signals import SIGNAL_INDEX, SIGNAL_NAMES, extract_signals, peaks
from kvguard.slots import ATTENTION_NAME, Slots


class Step(NamedTuple):
    """One token of every active row, before it is fed back.

    Attributes:
        positions: (rows,) index of the token among the generated ones.
        tokens: (rows,) the token.
    """

    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]


class Observer(Protocol):
    """Watches a session and may act on its rows between two steps (the guard does)."""

    def admitted(self, session: "Session", row: int) -> None:
        """A request has entered a row."""

    def observe(self, session: "Session", step: Step) -> None:
        """Every active row has a new token; ``session.rows`` says which end here."""

    def moved(self, session: "Session", source: int, target: int) -> None:
        """A row has left: the last row took its number (source == target: it was the last)."""


class Session:
    """Rows that decode together.

    ``admission_press`` compresses the prompts of requests that enter; it is the session's press
    unless a guard starts its requests in SAFE.

    ``generate`` drives it; an `Observer` may cut, stop or relax rows between two steps. Arrays have
    one entry a row; rows ``0 .. active - 1`` are in use. ``signals`` is (rows, tokens, 28); those
    of a small batch's newest tokens are missing until `compute_pending_signals`.

    Args:
        model: in eval mode.
        decoding: how tokens are chosen.
        press: compresses each request's cache.
        rows: decoded together.
        prefix: what the prompts share, prefilled.
        probes: whether every prefill measures what its press removes.
        replay: where the replay among the probes is run (`replays.ReplayAt`); one that rides in a
            step completes the completion's probes there.
        marked: tokens that carry facts, see `probes.marked_tokens`.
        cold: where the entries go that the press evicts, so that a check can read them: "host"
            memory, "disk", or "none": then a check recomputes them.
        cold_folder: for "disk"; None takes the system's folder of temporary files.
        falls_back: a prompt that the press refuses, one shorter than its window, is not compressed;
            otherwise its request fails.
        ladder: chooses each request's ratio at its prefill, from its probes.
        sharing: which rows refer to the prefix's own entries, see `config_policies.Sharing`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoding: Decoding,
        *,
        press: BasePress | None = None,
        rows: int,
        prefix: Prefix | None = None,
        probes: bool = False,
        replay: ReplayAt = "prefill",
        marked: NDArray[np.bool_] | None = None,
        cold: ColdKind | Literal["none"] = "none",
        cold_folder: Path | None = None,
        falls_back: bool = False,
        ladder: RatioLadder | None = None,
        sharing: Sharing = "none",
    ) -> None:
        check_architecture(model.config)
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise PressError("the model is spread over several devices; load it on one")
        if any(is_pressed(layer) for layer in attention_layers(model)):
            raise PressError(
                "a press is already applied to the model; leave its `with press(model)` block, the "
                "engine applies the press itself"
            )
        self.model, self.decoding, self.press, self.prefix = model, decoding, press, prefix
        self.admission_press = press
        self.probes, self.replay, self.marked = probes, replay, marked
        self.phases: Phases = phases(press)
        if self.phases.decode is not None and model.config._attn_implementation == "eager":
            raise PressError("compression while decoding needs sdpa attention, got 'eager'")
        self.falls_back, self.ladder = falls_back, ladder
        self.store: ColdStore | None = None
        if cold != "none":
            self.store = ColdStore(
                model.config, device=model.device, dtype=model.dtype, kind=cold, folder=cold_folder
            )
        self.sharing = sharing
        held = None if sharing == "none" else prefix
        self.slots = Slots(model.config, rows, device=model.device, dtype=model.dtype, prefix=held)
        self.rows: list[Row] = []
        self.meter = CostMeter(self.slots, self.rows)
        shape = (rows, decoding.max_new_tokens)
        self.history: NDArray[np.int32] = np.full(shape, -1, dtype=np.int32)
        self.signals: NDArray[np.float32] = np.zeros((*shape, len(SIGNAL_NAMES)), np.float32)
        self.lengths: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)  # generated tokens
        self.prompt_lengths: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.limits: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.seeds: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.first_positions: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self._buffers = LogitsBuffers(
            rows, model.config.vocab_size, device=model.device, dtype=model.dtype
        )

    @property
    def active(self) -> int:
        """Rows in use."""
        return self.slots.active

    @property
    def logits(self) -> torch.Tensor:
        """(rows, vocabulary) raw logits of each row's next token, then of the one just chosen."""
        return self._buffers.current

    @property
    def free(self) -> int:
        """Rows that could be admitted."""
        return self.slots.rows - self.slots.active

    @torch.inference_mode()
    def admit(self, request: Request) -> Completion | None:
        """Prefill a request into a free row.

        Returns:
            None, or the finished completion of a request that failed.
        """
        completion = Completion(request)
        started = time.perf_counter()
        most = self.decoding.max_new_tokens
        limit = most if request.max_new_tokens is None else request.max_new_tokens
        try:
            check_request(
                request.prompt_ids,
                limit,
                most=most,
                vocabulary=self.model.config.vocab_size,
                positions=position_limit(self.model.config),
            )
            split, ready = self._prefill(request, completion)
        except (AssertionError, IndexError, ValueError, RuntimeError) as error:
            completion.error = f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError):
                completion.error += (
                    f"; {self.active} rows were decoding: a smaller batch needs less"
                )
            return completion
        row = self.active
        completion.cache_bytes_before = ready.bytes_before
        completion.cache_bytes_after = ready.bytes_after
        completion.tokens_prefilled += len(request.prompt_ids)
        completion.probes = ready.probes
        held = self.slots.prefix.tokens if matching_prefix(self.prefix, request.prompt_ids) else 0
        try:
            shares = held > 0 and (ready.keeps_prefix or not split.compresses)
            own = behind(ready.cache, held if shares else 0)
            self.slots.insert(row, own, ready.masked, shares=shares)
        except torch.OutOfMemoryError as error:
            completion.error = f"{type(error).__name__}: {error}; a smaller batch needs less"
            return completion
        self.logits[row] = ready.logits[0]
        if ready.refusal is not None:
            completion.notes.append(f"not parked, checks recompute: {ready.refusal}")
        if ready.cold is not None:
            completion.bytes_moved += ready.cold.prompt.nbytes
        self.rows.append(
            Row(
                completion,
                self._decode_state(split, request.seed),
                exact=not split.compresses,
                cold=ready.cold,
                held=held,
                replay=ready.replay,
            )
        )
        self.lengths[row] = 0
        self.prompt_lengths[row] = len(request.prompt_ids)
        self.limits[row] = limit
        self.seeds[row] = request.seed
        self.first_positions[row] = request.first_position
        self.history[row] = -1
        synchronize(self.model.device)
        completion.prefill_seconds = time.perf_counter() - started
        return None

    def _prefill(self, request: Request, completion: Completion) -> tuple[Phases, Prefilled]:
        """Prefill a request; under the press, or without where the press refuses its prompt."""
        split = phases(self.admission_press)
        probe = None
        if self.probes:
            probe = CacheProbe(self.model, request.prompt_ids, self.marked, self.replay)
        try:
            if self.ladder is not None:
                return self.ladder.start(self, request, completion)
            press = fresh(split.prefill)
            own = self.sharing == "all" and split.decode is None
            if own and matching_prefix(self.prefix, request.prompt_ids):
                press = compress_behind(press, self.slots.prefix.tokens)
            return split, prefill(
                self.model,
                request.prompt_ids,
                press,
                prefix=self.prefix,
                seed=request.seed,
                probe=probe,
                store=self.store if split.compresses else None,
            )
        except (AssertionError, IndexError, ValueError) as error:
            if split.prefill is None or not self.falls_back:
                raise
            completion.notes.append(
                f"the press refuses the prompt, its cache is not compressed: "
                f"{type(error).__name__}: {error}"
            )
        ready = prefill(self.model, request.prompt_ids, prefix=self.prefix, seed=request.seed)
        return Phases(None, None), ready

    def _decode_state(self, split: Phases, seed: int) -> DecodeState | None:
        if split.decode is None:
            return None
        return DecodeState(self.model, self.slots, split.decode, seed)

    def choose(self) -> Step:
        """Take the next token of every active row from its logits.

        Its signals are computed now, or, in a small batch, together with those of later steps
        (`logits_buffers`). `compute_pending_signals` completes them.
        """
        started = time.perf_counter()
        active = self.active
        rows = np.arange(active)
        logits = self.logits[:active]
        positions = self.lengths[:active].copy()
        chosen = None  # greedy: the argmax falls out of the signals
        if not self.decoding.takes_argmax:
            seeds = self._on_device(self.seeds[:active])
            before = None
            if self.decoding.processors:
                before = [self._on_device(np.array(self.ids(row))) for row in range(active)]
            noisy = self._on_device(positions + self.first_positions[:active])
            scores = token_scores(logits, seeds, noisy, self.decoding, before)
            chosen = peaks(scores)[1]
        if self._buffers.defer:
            peak, best = peaks(logits)
            tokens = (best if chosen is None else chosen).cpu().numpy()
            finite = np.isfinite(peak.float().cpu().numpy())
            self._buffers.add(positions, tokens)
        else:
            table, chosen = extract_signals(logits, chosen, self._previous_entropy())
            signals = table.cpu().numpy()
            tokens = chosen.cpu().numpy()
            finite = np.isfinite(signals[:, 0])
            self.signals[rows, positions] = signals
        self.history[rows, positions] = tokens
        self.lengths[:active] += 1
        full = self.lengths[:active] >= self.limits[:active]
        ends = [token in self.decoding.end_token_ids for token in tokens.tolist()]
        for row, state in enumerate(self.rows):
            if ends[row] or full[row] or not finite[row]:
                state.stop_reason = "eos" if ends[row] else "length"
            if not finite[row]:
                where = f"token {positions[row]}"
                state.completion.error = f"FloatingPointError: non-finite logits at {where}"
        self._charge(started)
        return Step(positions, tokens)

    @torch.inference_mode()
    def compute_pending_signals(self) -> None:
        """Compute the signals of every token that has none yet."""
        self._buffers.compute_signals(self.signals)

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed every active row's last token to the model: one decoding step of the batch."""
        active = self.active
        if active == 0:
            return
        if self._buffers.full:
            self.compute_pending_signals()
        self._buffers.next()
        if all(row.sits_out for row in self.rows):  # nothing to compute
            self._take_pending()
            return
        started = time.perf_counter()
        last = np.maximum(self.lengths[:active] - 1, 0)  # any will do for a row that has no token
        fed = self.history[np.arange(active), last].astype(np.int64)
        tokens = self._on_device(np.maximum(fed, 0))
        positions = self._on_device(self.prompt_lengths[:active] + last)
        riders = {i: row.replay for i, row in enumerate(self.rows) if row.replay is not None}
        transient: dict[int, int] = {}
        self.slots.begin_step()
        for number, row in enumerate(self.rows):
            if row.decode is not None and not row.sits_out:
                row.decode.begin(int(self.prompt_lengths[number] + last[number]) + 1)
        with ExitStack() as stack:
            stack.enter_context(attention_of(self.model, ATTENTION_NAME))
            if any(row.decode is not None for row in self.rows):
                stack.enter_context(compressing(self.model, self.rows))
            shared = {"past_key_values": self.slots, "use_cache": True, "kvguard_slots": self.slots}
            if riders:
                transient = step_with_riders(self, tokens, positions, riders, shared)
            else:
                output = self.model(
                    input_ids=tokens[:, None],
                    position_ids=positions[:, None],
                    cache_position=positions[:1],
                    **shared,
                )
                self.logits[:active] = output.logits[:, -1]
        self.slots.end_step()
        step_bytes = zip(*self.meter.extra_pass(transient), strict=True)
        for number, (row, taken) in enumerate(zip(self.rows, step_bytes, strict=True)):
            if row.sits_out:
                self.slots.drop_tail(number, 1)
            else:
                row.kv_bytes.append(taken)
                row.completion.decode_steps += 1
        self._take_pending()
        self._charge(started)

    @torch.inference_mode()
    def replace_cache(self, row: int, kept: int, ready: Prefilled, *, whole: bool) -> None:
        """Give a row a new cache, and forget the generated tokens behind the first ``kept``.

        The row's next token comes from the given logits: it sits out the next pass of the batch.

        Args:
            row: which.
            kept: generated tokens that stay.
            ready: cache of exactly prompt and kept tokens, and the logits after them.
            whole: nothing is compressed in it, nor will be.
        """
        held = self.rows[row].held if whole else 0
        self._replace(row, kept, ready._replace(cache=behind(ready.cache, held)), held > 0)

    def _replace(self, row: int, kept: int, ready: Prefilled, shares: bool) -> None:
        """`replace_cache` with a cache of what follows the prefix that the row shares."""
        self.compute_pending_signals()
        self.slots.insert(row, ready.cache, ready.masked, shares=shares)
        self._cut(row, kept)
        self.rows[row].replay = None  # of a cache that is gone
        self.rows[row].pending = ready.logits[0]

    def _cut(self, row: int, kept: int) -> None:
        """Forget the generated tokens behind the first ``kept``; what is pending is set after."""
        state = self.rows[row]
        state.completion.tokens_wasted += int(self.lengths[row]) - kept
        state.pending = state.pending_hidden = state.stop_reason = None
        self.lengths[row] = kept
        self.history[row, kept:] = -1

    def _take_pending(self) -> None:
        """Rows that have sat out a pass: their next token comes from what they brought."""
        hidden = [row.pending_hidden for row in self.rows if row.pending_hidden is not None]
        made = iter(self.model.lm_head(torch.stack(hidden)) if hidden else ())
        for number, row in enumerate(self.rows):
            if row.sits_out:
                self.logits[number] = next(made) if row.pending is None else row.pending
                row.pending = row.pending_hidden = None

    @torch.inference_mode()
    def accept(self, row: int, kept: int, check: Check) -> bool:
        """Keep the generated tokens that a check has accepted, and decode on compressed.

        Their verified entries take the place of the drafted ones, those of rejected tokens go, and
        the row's next token comes from the check's logits. No press runs. The verified entries are
        parked, so that the next check starts behind them.

        Args:
            row: which.
            kept: generated tokens that stay, at least as many as had been checked.
            check: of this row's tokens so far.

        Returns:
            False, with nothing changed, where the press has compressed since a rejected token was
            fed, so that its entry cannot be separated from the others.
        """
        state, count = self.rows[row], int(self.lengths[row])
        if kept == count and state.ended:
            state.checked = kept
            return True
        fed = count - 1  # the newest token has no entry yet
        start = max(check.start, state.checked, fed - int(self.slots.appended[row]))
        if kept < start:
            return False
        assert check.entries is not None
        first, last = start - check.start, kept - check.start
        self.compute_pending_signals()
        verified = check.entries[:, :, :, first:last]
        verified = verified.to(self.slots.device)  # back, where they left it while the check ran
        state.completion.bytes_moved += check.off_device * verified.nbytes
        self.slots.replace_tail(row, fed - start, verified)
        if state.decode is not None:
            assert check.inputs is not None
            state.decode.replace_tail(fed - start, check.inputs, first, last)
        self.park(row, kept, check)
        self._cut(row, kept)
        state.pending_hidden = check.hidden[last].clone()  # the check's other states may go
        return True

    def park(self, row: int, kept: int, check: Check) -> None:
        """Note that a row's first ``kept`` tokens are checked; park their entries.

        Args:
            row: which.
            kept: generated tokens that the check has accepted.
            check: of this row's tokens so far, which has run all of those.
        """
        state = self.rows[row]
        state.checked = kept
        if state.cold is None:
            return
        assert check.entries is not None
        first, last = state.cold.tokens - check.start, kept - check.start
        try:
            state.cold.append(check.entries[:, :, :, first:last], check.hidden[last].clone())
            if not check.off_device:  # else the check has counted them
                state.completion.bytes_moved += (last - first) * state.cold.store.bytes_per_token
        except REFUSALS as error:
            state.cold = None
            state.completion.notes.append(
                f"no room to park on, checks recompute: {type(error).__name__}: {error}"
            )

    @torch.inference_mode()
    def promote(self, row: int, kept: int, check: Check) -> None:
        """Keep the generated tokens that a check has accepted; go on with the uncompressed cache.

        Args:
            row: which.
            kept: generated tokens that stay.
            check: of this row's tokens so far.
        """
        state, count = self.rows[row], kept - check.start
        if check.cache is not None:
            check.cache.crop(len(state.completion.request.prompt_ids) + kept)
            cache = behind(check.cache, state.held)
        else:
            assert state.cold is not None
            extra = None if check.entries is None else check.entries[:, :, :, :count]
            cache = state.cold.load(extra, behind=state.held)
            here = 0 if extra is None or check.off_device else extra.nbytes
            state.completion.bytes_moved += cache_bytes(cache) - here
        logits = self.model.lm_head(check.hidden[count : count + 1])
        size = cache_bytes(cache)
        self._replace(row, kept, Prefilled(cache, None, logits, size, size, 0), state.held > 0)
        self.meter.note_peak(size)  # it was there twice
        state.decode, state.exact, state.cold, state.checked = None, True, None, kept

    def compress_while_decoding(self, row: int, press: BasePress | None) -> None:
        """Start a row's decode-phase compression afresh under a press; without that phase: stop."""
        state = self.rows[row]
        state.decode = self._decode_state(phases(press), state.completion.request.seed)

    def stop(self, row: int) -> None:
        """End a row after its last token."""
        self.rows[row].stop_reason = self.rows[row].stop_reason or "stopped"

    def tokens(self, row: int) -> list[int]:
        """A row's generated tokens so far."""
        return [int(token) for token in self.history[row, : self.lengths[row]]]

    def ids(self, row: int) -> list[int]:
        """A row's prompt and generated tokens."""
        return [*self.rows[row].completion.request.prompt_ids, *self.tokens(row)]

    @torch.inference_mode()
    def finish(self, row: int) -> Completion:
        """Take a row out of the batch; the last row moves into its place."""
        self.compute_pending_signals()
        state = self.rows[row]
        completion = state.completion
        count = int(self.lengths[row])
        completion.token_ids = self.tokens(row)
        completion.signals = self.signals[row, :count].copy()
        completion.stop_reason = None if completion.error else state.stop_reason
        completion.cold = state.cold
        completion.kv_bytes = np.array(state.kv_bytes, dtype=np.int64).reshape(-1, 3)
        last = self.slots.remove(row)
        self.rows[row] = self.rows[last]
        self.rows.pop()
        for array in (
            self.history,
            self.signals,
            self.lengths,
            self.prompt_lengths,
            self.limits,
            self.seeds,
            self.first_positions,
        ):
            array[row] = array[last]
        self.logits[row] = self.logits[last]
        return completion

    def _previous_entropy(self) -> torch.Tensor:
        rows = np.arange(self.active)
        before = self.lengths[: self.active] - 1
        entropy = self.signals[rows, before, SIGNAL_INDEX["entropy"]]
        return self._on_device(np.where(before >= 0, entropy, np.nan).astype(np.float32))

    def _on_device(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.model.device)

    def _charge(self, started: float) -> None:
        share = (time.perf_counter() - started) / self.active
        for row in self.rows:
            row.completion.decode_seconds += share


def generate(
    session: Session, requests: Iterable[Request], observer: Observer | None = None
) -> Iterator[Completion]:
    """Decode requests, keeping the session's rows full; completions come as they finish.

    Args:
        session: empty.
        requests: taken one by one as rows become free.
        observer: may act on rows between steps.

    Yields:
        One completion per request, in order of finishing. A request that fails is a completion
        with ``error`` set; the others go on.
    """
    waiting = iter(requests)
    exhausted = False
    while True:
        while session.free and not exhausted:
            request = next(waiting, None)
            if request is None:
                exhausted = True
                break
            failed = session.admit(request)
            if failed is not None:
                yield failed
            elif observer is not None:
                observer.admitted(session, session.active - 1)
        if session.active == 0:
            return
        step = session.choose()
        if observer is not None:
            observer.observe(session, step)
        for row in reversed(range(session.active)):
            if session.rows[row].ended:
                last = session.active - 1
                yield session.finish(row)
                if observer is not None:
                    observer.moved(session, last, row)
        session.advance()

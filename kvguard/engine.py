"""Decode many requests together, each from its own compressed cache.

Every prompt is prefilled alone (`prefill`). The compressed caches are then stored in `Slots` and
decode as one batch (continuous batching): finished rows leave and waiting requests take their
places.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from kvpress import BasePress
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kvguard.audit import Check
from kvguard.cold_cache import REFUSALS, ColdKind, ColdRow, ColdStore, attention_of
from kvguard.costs import CostMeter
from kvguard.decode_compression import DecodeState
from kvguard.models import check_architecture, position_limit
from kvguard.prefill import Prefilled, Prefix, attention_layers, cache_bytes, is_pressed, prefill
from kvguard.presses import Phases, PressError, fresh, phases
from kvguard.probes import CacheProbe
from kvguard.sampling import Decoding, token_scores
from kvguard.signals import SIGNAL_INDEX, SIGNAL_NAMES, extract_signals, peaks
from kvguard.slots import ATTENTION_NAME, Slots

DEFERRED_ROWS = 16
"""Rows of logits that a small batch keeps before it computes their signals, all at once."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        key: names the request in results.
        prompt_ids: the whole prompt, shared prefix included.
        seed: of this request's sampling noise and of presses that draw random numbers.
        max_new_tokens: None takes the decoding's.
        first_position: of the first new token among the generated ones, where the prompt already
            holds some of them: sampling noise goes on from there.
    """

    key: str
    prompt_ids: Sequence[int]
    seed: int = 0
    max_new_tokens: int | None = None
    first_position: int = 0


@dataclass
class Completion:
    """What became of a request.

    Attributes:
        token_ids: generated tokens, the end token included.
        signals: (tokens, 28) float32, columns `signals.SIGNAL_NAMES`.
        stop_reason: "eos", "length" or "stopped" (an observer ended it); None on error.
        error: None, or why the request failed.
        cache_bytes_before: of the prompt's cache before compression.
        cache_bytes_after: of the prompt's cache after it, hidden entries left out.
        kv_bytes: (decode steps, 3) kept, masked and padding bytes at each step.
        prefill_seconds: for this request alone.
        decode_seconds: its share of each step of the batch.
        tokens_prefilled: tokens of prefill-shaped passes; a shared prefix counts for every request.
        decode_steps: single-token passes, those of dropped tokens included.
        tokens_wasted: generated, then dropped by an observer.
        device_byte_steps: its share of the allocated bytes, summed over passes; see `CostMeter`.
        device_bytes_peak: of the batch's caches, over the passes that it was part of.
        host_byte_steps: bytes of its cold cache, summed over the same passes.
        checks: how often an observer had tokens checked.
        bytes_moved: of entries parked outside device memory, and brought back for checks.
        notes: what went wrong and was survived.
        cold: the uncompressed entries outside device memory; None where there are none.
        probes: what the prefill measured, (24,) `schema.PROBE_NAMES`; None where not asked for.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    signals: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, len(SIGNAL_NAMES)), np.float32)
    )
    stop_reason: str | None = None
    error: str | None = None
    cache_bytes_before: int = 0
    cache_bytes_after: int = 0
    kv_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens_prefilled: int = 0
    decode_steps: int = 0
    tokens_wasted: int = 0
    device_byte_steps: int = 0
    device_bytes_peak: int = 0
    host_byte_steps: int = 0
    checks: int = 0
    bytes_moved: int = 0
    notes: list[str] = field(default_factory=list)
    cold: ColdRow | None = None
    probes: NDArray[np.float32] | None = None


def batch_size_for(
    model: PreTrainedModel, tokens_per_row: int, *, share: float = 0.5, limit: int = 256
) -> int:
    """How many rows fit in the memory that is free now.

    Args:
        model: its config says what an entry takes.
        tokens_per_row: longest prompt plus the new tokens, uncompressed.
        share: of the free memory to plan with.
        limit: never more than this.
    """
    slots = Slots(model.config, 0, device=model.device, dtype=model.dtype)
    row: int = slots.bytes_per_entry * slots.layers * tokens_per_row
    row += 6 * 4 * model.config.vocab_size  # logits and what the signals make of them
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return max(1, min(limit, int(free * share) // row))


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


@dataclass
class Row:
    """What belongs to one row besides the arrays: moves with it.

    Attributes:
        exact: the cache is uncompressed and always was, or is again: nothing is left to check.
        checked: generated tokens that the uncompressed model has accepted.
        pending: logits of a row that has been cut, which sits out the next pass.
        cold: its uncompressed entries outside device memory.
    """

    completion: Completion
    decode: DecodeState | None
    exact: bool = False
    checked: int = 0
    stop_reason: str | None = None
    pending: torch.Tensor | None = None
    cold: ColdRow | None = None
    kv_bytes: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the row leaves the batch after this step."""
        return self.stop_reason is not None or self.completion.error is not None


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
        marked: tokens that carry facts, see `probes.marked_tokens`.
        cold: where the entries go that the press evicts, so that a check can read them: "host"
            memory, "disk", or "none": then a check recomputes them.
        cold_folder: for "disk"; None takes the system's folder of temporary files.
        falls_back: a prompt that the press refuses, one shorter than its window, is not compressed;
            otherwise its request fails.
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
        marked: NDArray[np.bool_] | None = None,
        cold: ColdKind | Literal["none"] = "none",
        cold_folder: Path | None = None,
        falls_back: bool = False,
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
        self.probes, self.marked = probes, marked
        self.phases: Phases = phases(press)
        if self.phases.decode is not None and model.config._attn_implementation == "eager":
            raise PressError("compression while decoding needs sdpa attention, got 'eager'")
        self.falls_back = falls_back
        self.store: ColdStore | None = None
        if cold != "none":
            self.store = ColdStore(
                model.config, device=model.device, dtype=model.dtype, kind=cold, folder=cold_folder
            )
        self.slots = Slots(model.config, rows, device=model.device, dtype=model.dtype)
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
        # A small batch keeps the logits of several steps, each on a page of its own, and computes
        # their signals together.
        pages = max(1, DEFERRED_ROWS // max(1, rows))
        self._pages = torch.zeros(
            (pages, rows, model.config.vocab_size), dtype=model.dtype, device=model.device
        )
        self._page = 0
        self._deferred: list[tuple[int, Step]] = []  # pages whose tokens have no signals yet

    @property
    def active(self) -> int:
        """Rows in use."""
        return self.slots.active

    @property
    def logits(self) -> torch.Tensor:
        """(rows, vocabulary) raw logits of each row's next token, then of the one just chosen."""
        return self._pages[self._page]

    @property
    def free(self) -> int:
        """Rows that could be admitted."""
        return self.slots.rows - self.slots.active

    def _probe(self, request: Request) -> CacheProbe:
        return CacheProbe(self.model, request.prompt_ids, self.marked)

    @torch.inference_mode()
    def admit(self, request: Request) -> Completion | None:
        """Prefill a request into a free row.

        Returns:
            None, or the finished completion of a request that failed.
        """
        completion = Completion(request)
        started = time.perf_counter()
        limit = request.max_new_tokens
        if limit is None:
            limit = self.decoding.max_new_tokens
        longest = position_limit(self.model.config)
        total = len(request.prompt_ids) + limit
        try:
            if not request.prompt_ids:
                raise ValueError("the prompt is empty; at least one token is needed")
            if not 1 <= limit <= self.decoding.max_new_tokens:
                raise ValueError(
                    f"max_new_tokens of a request lies in 1..{self.decoding.max_new_tokens}, the "
                    f"session's own, got {limit}"
                )
            if max(request.prompt_ids) >= self.model.config.vocab_size:
                raise ValueError(
                    f"token {max(request.prompt_ids)} of the prompt is not in the model's "
                    f"vocabulary of {self.model.config.vocab_size}"
                )
            if total > longest:
                raise ValueError(
                    f"prompt of {len(request.prompt_ids)} and {limit} new tokens exceed the "
                    f"model's {longest} positions"
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
        completion.tokens_prefilled = len(request.prompt_ids)
        completion.probes = ready.probes
        try:
            self.slots.insert(row, ready.cache, ready.masked)
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
                exact=split == Phases(None, None),
                cold=ready.cold,
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
        compresses = split != Phases(None, None)
        try:
            return split, prefill(
                self.model,
                request.prompt_ids,
                fresh(split.prefill),
                prefix=self.prefix,
                seed=request.seed,
                probe=self._probe(request) if self.probes else None,
                store=self.store if compresses else None,
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

        Its signals are computed now, or, in a small batch, together with those of later steps: most
        of what they cost there is the price of the calls. `compute_pending_signals` completes them.
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
        if len(self._pages) > 1:
            peak, best = peaks(logits)
            tokens = (best if chosen is None else chosen).cpu().numpy()
            finite = np.isfinite(peak.float().cpu().numpy())
            step = Step(positions, tokens)
            self._deferred.append((self._page, step))
        else:
            table, chosen = extract_signals(logits, chosen, self._previous_entropy())
            signals = table.cpu().numpy()
            tokens = chosen.cpu().numpy()
            finite = np.isfinite(signals[:, 0])
            self.signals[rows, positions] = signals
            step = Step(positions, tokens)
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
        return step

    def _turn_page(self) -> None:
        """Let the next logits go where none are waiting for their signals."""
        if len(self._deferred) == len(self._pages):
            self.compute_pending_signals()
        self._page = (self._page + 1) % len(self._pages) if self._deferred else 0

    def _deferred_logits(self) -> torch.Tensor:
        """(rows, vocabulary) of all tokens that have no signals yet, in the order of `_deferred`.

        The pages themselves, without a copy, where they are consecutive and full.
        """
        pages = [page for page, _ in self._deferred]
        full = all(len(step.tokens) == self.slots.rows for _, step in self._deferred)
        if full and pages == list(range(pages[0], pages[0] + len(pages))):
            return self._pages[pages[0] : pages[-1] + 1].flatten(0, 1)
        return torch.cat([self._pages[page, : len(step.tokens)] for page, step in self._deferred])

    @torch.inference_mode()
    def compute_pending_signals(self) -> None:
        """Compute the signals of every token that has none yet."""
        if not self._deferred:
            return
        steps = [step for _, step in self._deferred]
        rows = np.concatenate([np.arange(len(step.tokens)) for step in steps])
        positions = np.concatenate([step.positions for step in steps])
        chosen = np.concatenate([step.tokens for step in steps])
        table = extract_signals(self._deferred_logits(), self._on_device(chosen)).table
        signals = table.cpu().numpy()
        self._deferred.clear()
        entropy, delta = SIGNAL_INDEX["entropy"], SIGNAL_INDEX["entropy_delta"]
        self.signals[rows, positions] = signals
        before = np.maximum(positions - 1, 0)
        previous = np.where(positions > 0, self.signals[rows, before, entropy], np.nan)
        self.signals[rows, positions, delta] = signals[:, entropy] - previous

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed every active row's last token to the model: one decoding step of the batch."""
        active = self.active
        if active == 0:
            return
        self._turn_page()
        if all(row.pending is not None for row in self.rows):  # nothing to compute
            for number, row in enumerate(self.rows):
                self._take_pending(number, row)
            return
        started = time.perf_counter()
        last = np.maximum(
            self.lengths[:active] - 1, 0
        )  # of a row without tokens: its logits are pending, any will do
        fed = self.history[np.arange(active), last].astype(np.int64)
        tokens = self._on_device(np.maximum(fed, 0))
        positions = self._on_device(self.prompt_lengths[:active] + last)
        self.slots.begin_step()
        for number, row in enumerate(self.rows):
            if row.decode is not None and row.pending is None:
                row.decode.begin(int(self.prompt_lengths[number] + last[number]) + 1)
        with ExitStack() as stack:
            stack.enter_context(attention_of(self.model, ATTENTION_NAME))
            if any(row.decode is not None for row in self.rows):
                stack.enter_context(self._decode_compression())
            output = self.model(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                cache_position=positions[:1],
                past_key_values=self.slots,
                use_cache=True,
                kvguard_slots=self.slots,
            )
        self.logits[:active] = output.logits[:, -1]
        self.slots.end_step()
        held_bytes = zip(*self.meter.step(), strict=True)
        for number, (row, held) in enumerate(zip(self.rows, held_bytes, strict=True)):
            if row.pending is not None:
                self.slots.drop_tail(number, 1)
                self._take_pending(number, row)
            else:
                row.kv_bytes.append(held)
                row.completion.decode_steps += 1
        self._charge(started)

    @torch.inference_mode()
    def replace_cache(
        self,
        row: int,
        kept: int,
        ready: Prefilled,
    ) -> None:
        """Give a row a new cache, and forget the generated tokens behind the first ``kept``.

        The row's next token comes from the given logits: it sits out the next pass of the batch.

        Args:
            row: which.
            kept: generated tokens that stay.
            ready: cache of exactly prompt and kept tokens, and the logits after them.
        """
        self.compute_pending_signals()
        self.slots.insert(row, ready.cache, ready.masked)
        self._cut(row, kept, ready.logits[0])

    def _cut(self, row: int, kept: int, logits: torch.Tensor) -> None:
        """Forget the generated tokens behind the first ``kept``; go on from the given logits."""
        state = self.rows[row]
        state.completion.tokens_wasted += int(self.lengths[row]) - kept
        state.pending = logits
        state.stop_reason = None
        self.lengths[row] = kept
        self.history[row, kept:] = -1

    def _take_pending(self, number: int, row: Row) -> None:
        """A row has sat out a pass: its next token comes from the logits that it brought."""
        assert row.pending is not None
        self.logits[number] = row.pending
        row.pending = None

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
            fed, so that its entry cannot be told from the others.
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
        self.slots.replace_tail(row, fed - start, check.entries[:, :, :, first:last])
        if state.decode is not None:
            assert check.inputs is not None
            state.decode.replace_tail(fed - start, check.inputs, first, last)
        self.park(row, kept, check)
        self._cut(row, kept, self.model.lm_head(check.hidden[last : last + 1])[0])
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
        prompt = len(state.completion.request.prompt_ids)
        if check.cache is not None:
            cache = check.cache
            cache.crop(prompt + kept)
        else:
            assert state.cold is not None
            extra = None if check.entries is None else check.entries[:, :, :, :count]
            cache = state.cold.load(extra)
            state.completion.bytes_moved += cache_bytes(cache)
        logits = self.model.lm_head(check.hidden[count : count + 1])
        size = cache_bytes(cache)
        self.replace_cache(row, kept, Prefilled(cache, None, logits, size, size, 0))
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

    @contextmanager
    def _decode_compression(self) -> Iterator[None]:
        """Hooks that let each row's own press see its own slice after each attention layer."""

        def compress(layer: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
            for number, row in enumerate(self.rows):
                if row.decode is not None and row.pending is None:
                    row.decode.after_layer(number, layer, kwargs)
                    row.completion.error = row.completion.error or row.decode.error
            return output

        with ExitStack() as stack:
            for layer in attention_layers(self.model):
                layer.rotary_emb = self.model.model.rotary_emb
                handle = layer.register_forward_hook(compress, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that seconds are charged to whom they belong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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

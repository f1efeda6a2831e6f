"""Decode many requests together, each from its own compressed cache.

Every prompt is prefilled alone (`prefill`). The compressed caches then sit in `Slots` and decode as
one batch; finished rows leave and waiting requests take their place.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from kvpress import BasePress, CompressionRatioDecodingPress
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kvguard.costs import CostMeter
from kvguard.models import check_architecture, position_limit
from kvguard.prefill import Prefilled, Prefix, attention_layers, is_pressed, prefill
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
        probes: what the prefill measured, (25,) `schema.PROBE_NAMES`; None where not asked for.
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
    """What belongs to one row besides the arrays: moves with it."""

    completion: Completion
    decode: "DecodeState | None"
    stop_reason: str | None = None
    held: torch.Tensor | None = None  # logits of a rewound row, which sits out the next pass
    kv_bytes: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the row leaves the batch after this step."""
        return self.stop_reason is not None or self.completion.error is not None


class Session:
    """Rows that decode together.

    ``admission_press`` compresses the prompts of requests that enter; it is the session's press
    unless a guard starts its requests in SAFE.

    ``generate`` drives it; an `Observer` may rewind, stop or relax rows between two steps.
    Arrays have one entry a row; rows ``0 .. active - 1`` are in use. ``signals`` is (rows, tokens,
    28); those of a small batch's newest tokens are missing until `settle_signals`. With ``probes``
    every prefill measures what its press removes; ``marked`` are tokens that carry facts, see
    `probes.marked_tokens`.
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
            split = phases(self.admission_press)
            ready = prefill(
                self.model,
                request.prompt_ids,
                fresh(split.prefill),
                prefix=self.prefix,
                seed=request.seed,
                probe=self._probe(request) if self.probes else None,
            )
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
        decode = None
        if split.decode is not None:
            decode = DecodeState(self, split.decode, completion)
        self.rows.append(Row(completion, decode))
        self.lengths[row] = 0
        self.prompt_lengths[row] = len(request.prompt_ids)
        self.limits[row] = limit
        self.seeds[row] = request.seed
        self.first_positions[row] = request.first_position
        self.history[row] = -1
        synchronize(self.model.device)
        completion.prefill_seconds = time.perf_counter() - started
        return None

    def choose(self) -> Step:
        """Take the next token of every active row from its logits.

        Its signals are computed now, or, in a small batch, together with those of later steps: most
        of what they cost there is the price of the calls. `settle_signals` completes them.
        """
        started = time.perf_counter()
        active = self.active
        rows = np.arange(active)
        logits = self.logits[:active]
        positions = self.lengths[:active].copy()
        chosen = None  # greedy: the argmax falls out of the signals
        if self.decoding.do_sample:
            seeds = self._on_device(self.seeds[:active])
            noisy = self._on_device(positions + self.first_positions[:active])
            scores = token_scores(logits, seeds, noisy, self.decoding)
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
            self.settle_signals()
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
    def settle_signals(self) -> None:
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
        if all(row.held is not None for row in self.rows):  # nothing to compute
            for number, row in enumerate(self.rows):
                self._release_held(number, row)
            return
        started = time.perf_counter()
        last = np.maximum(
            self.lengths[:active] - 1, 0
        )  # of a row without tokens: held, any will do
        fed = self.history[np.arange(active), last].astype(np.int64)
        tokens = self._on_device(np.maximum(fed, 0))
        positions = self._on_device(self.prompt_lengths[:active] + last)
        self.slots.begin_step()
        for number, row in enumerate(self.rows):
            if row.decode is not None and row.held is None:
                row.decode.begin(int(self.prompt_lengths[number] + last[number]) + 1)
        with ExitStack() as stack:
            stack.enter_context(_attention(self.model, ATTENTION_NAME))
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
            if row.held is not None:
                self.slots.drop_tail(number, 1)
                self._release_held(number, row)
            else:
                row.kv_bytes.append(held)
                row.completion.decode_steps += 1
        self._charge(started)

    @torch.inference_mode()
    def rewind(
        self,
        row: int,
        kept: int,
        ready: Prefilled,
        *,
        signals: NDArray[np.float32] | None = None,
    ) -> None:
        """Give a row a new cache, and forget the generated tokens behind the first ``kept``.

        The row's next token comes from the given logits: it sits out the next pass of the batch.

        Args:
            row: which.
            kept: generated tokens that stay.
            ready: cache of exactly prompt and kept tokens, and the logits after them.
            signals: (kept, 28) that replace the kept tokens' stored signals.
        """
        self.settle_signals()
        dropped = int(self.lengths[row]) - kept
        self.rows[row].completion.tokens_wasted += dropped
        self.slots.insert(row, ready.cache, ready.masked)
        self.rows[row].held = ready.logits[0]
        self.lengths[row] = kept
        self.history[row, kept:] = -1
        if signals is not None:
            self.signals[row, :kept] = signals
        self.rows[row].stop_reason = None

    def _release_held(self, number: int, row: Row) -> None:
        """A rewound row has sat out a pass: its next token comes from the logits it brought."""
        assert row.held is not None
        self.logits[number] = row.held
        row.held = None

    def compress_while_decoding(self, row: int, press: BasePress | None) -> None:
        """Start a row's decode-phase compression afresh under a press; without that phase: stop."""
        state = self.rows[row]
        decode = phases(press).decode
        state.decode = None if decode is None else DecodeState(self, decode, state.completion)

    def stop(self, row: int) -> None:
        """End a row after its last token."""
        self.rows[row].stop_reason = self.rows[row].stop_reason or "stopped"

    def tokens(self, row: int) -> list[int]:
        """A row's generated tokens so far."""
        return [int(token) for token in self.history[row, : self.lengths[row]]]

    @torch.inference_mode()
    def finish(self, row: int) -> Completion:
        """Take a row out of the batch; the last row moves into its place."""
        self.settle_signals()
        state = self.rows[row]
        completion = state.completion
        count = int(self.lengths[row])
        completion.token_ids = self.tokens(row)
        completion.signals = self.signals[row, :count].copy()
        completion.stop_reason = None if completion.error else state.stop_reason
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
                if row.decode is not None and row.held is None:
                    row.decode.after_layer(number, layer, kwargs)
            return output

        with ExitStack() as stack:
            for layer in attention_layers(self.model):
                layer.rotary_emb = self.model.model.rotary_emb
                handle = layer.register_forward_hook(compress, with_kwargs=True)
                stack.callback(handle.remove)
            yield


class DecodeState:
    """One row's compression while decoding: kvpress's DecodingPress, on that row alone.

    It counts steps and keeps hidden states per layer as the press's own hook does for a batch of
    one, and calls the press's ``compress`` on the row's unpadded slice. A press that fails there
    ends its own row with an error.
    """

    def __init__(self, session: Session, press: BasePress, completion: Completion) -> None:
        self.slots, self.completion = session.slots, completion
        copied: Any = fresh(press)
        self.press = copied
        self.press.post_init_from_model(session.model)
        self.steps = self.seen = 0
        self.due = False
        self.hidden: list[list[torch.Tensor]] = [[] for _ in range(self.slots.layers)]

    def begin(self, seen: int) -> None:
        """A step starts; with its token the row has seen ``seen`` tokens, the prompt's too."""
        self.seen = seen
        self.steps += 1
        if isinstance(self.press, CompressionRatioDecodingPress):
            target = max(1, int(seen * (1 - self.press.target_compression_ratio)))
        else:
            target = self.press.target_size
        self.due = self.steps >= self.press.compression_interval or target <= 1
        if self.due:
            self.steps = 0

    def after_layer(self, row: int, layer: Any, kwargs: dict[str, Any]) -> None:
        """Record the row's hidden state; compress its slice of this layer when it is due."""
        if self.completion.error is not None:
            return
        number: int = layer.layer_idx
        own = _row_arguments(kwargs, row)
        buffer = self.hidden[number]
        buffer.append(own["hidden_states"])
        if self.due:
            keys, values = self.slots.entries(number, row)
            device = keys.device
            try:
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    seed = self.completion.request.seed
                    torch.manual_seed((seed * 1_000_003 + self.seen * 1_009 + number) % 2**63)
                    keys, values = self.press.compress(
                        layer, torch.cat(buffer, dim=1), keys, values, None, own
                    )
                self.slots.write(number, row, keys[0].clone(), values[0].clone())
            except (AssertionError, IndexError, RuntimeError, ValueError) as error:
                name = type(self.press.base_press).__name__
                self.completion.error = f"{name} while decoding: {type(error).__name__}: {error}"
            buffer.clear()
        size = self.press.hidden_states_buffer_size
        del buffer[: max(len(buffer) - size, 0)]


def _row_arguments(kwargs: dict[str, Any], row: int) -> dict[str, Any]:
    """An attention layer's keyword arguments as a batch of this row alone would see them."""
    one = slice(row, row + 1)
    cos, sin = kwargs["position_embeddings"]
    return kwargs | {
        "hidden_states": kwargs["hidden_states"][one],
        "position_embeddings": (cos[one], sin[one]),
        "position_ids": kwargs["position_ids"][one],
        "cache_position": kwargs["position_ids"][row],
        "attention_mask": None,
    }


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that seconds are charged to whom they belong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another attention implementation."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


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

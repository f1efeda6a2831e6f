"""One request of a batch: what is asked, what it holds while it decodes, what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kvguard.cold_cache import ColdRow
from kvguard.decode_compression import DecodeState
from kvguard.replays import Replay
from kvguard.signals import SIGNAL_NAMES


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
        bytes_moved: of entries parked outside device memory, read there by passes, and written
            back; counted where the device is the host as if it were not. A prefix that prompts
            share is parked once for all and in nobody's count.
        notes: what went wrong and was survived.
        cold: the uncompressed entries outside device memory; None where there are none.
        probes: what the prefill measured, (24,) `schema.PROBE_NAMES`; None where not asked for.
        start_ratio: at which a ladder let it start; None: no ladder was asked (`kvguard.ladder`).
        replays: bytes of each cache that a ladder replayed the prompt's last tokens over.
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
    start_ratio: str | None = None
    replays: list[int] = field(default_factory=list)


@dataclass
class Row:
    """What belongs to one row besides the arrays: moves with it.

    Attributes:
        exact: the cache is uncompressed and always was, or is again: nothing is left to check.
        checked: generated tokens that the uncompressed model has accepted.
        pending: logits of a row that has been cut, which sits out the next pass.
        pending_hidden: the same before ``lm_head``, (hidden size,): rows cut together share a call.
        cold: its uncompressed entries outside device memory.
        held: first tokens of its full cache that the session's shared prefix holds for it.
        replay: of its probes, which rides in the next decoding step.
    """

    completion: Completion
    decode: DecodeState | None
    exact: bool = False
    checked: int = 0
    stop_reason: str | None = None
    pending: torch.Tensor | None = None
    pending_hidden: torch.Tensor | None = None
    cold: ColdRow | None = None
    held: int = 0
    replay: Replay | None = None
    kv_bytes: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def sits_out(self) -> bool:
        """Whether the row's next token does not come from the next pass."""
        return self.pending is not None or self.pending_hidden is not None

    @property
    def ended(self) -> bool:
        """Whether the row leaves the batch after this step."""
        return self.stop_reason is not None or self.completion.error is not None


def check_request(
    prompt_ids: Sequence[int], limit: int, *, most: int, vocabulary: int, positions: int
) -> None:
    """Refuse a request that a session cannot decode.

    Args:
        prompt_ids: its prompt.
        limit: its new tokens.
        most: new tokens in the session.
        vocabulary: of the model.
        positions: of the model.

    Raises:
        ValueError: says what is wrong and what is accepted.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty; at least one token is needed")
    if not 1 <= limit <= most:
        raise ValueError(
            f"max_new_tokens of a request lies in 1..{most}, the session's limit, got {limit}"
        )
    if max(prompt_ids) >= vocabulary:
        raise ValueError(
            f"token {max(prompt_ids)} of the prompt is not in the model's vocabulary of "
            f"{vocabulary}"
        )
    if len(prompt_ids) + limit > positions:
        raise ValueError(
            f"prompt of {len(prompt_ids)} and {limit} new tokens exceed the model's {positions} "
            "positions"
        )

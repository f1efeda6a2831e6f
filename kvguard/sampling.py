"""Which token comes next: one rule for greedy decoding and for sampling.

The next token is the argmax of a *score*. Greedy: the score is the logit. Sampling: the logit over
the temperature, restricted to the top-p nucleus, plus Gumbel noise (the Gumbel-max trick). The
noise is a hash of (seed, position, token), so it depends on neither the batch, the device nor the
history: two models that decode the same request with the same seed share their randomness. A draft
of one can then be checked against the other exactly: a drafted token is right iff the other model,
with the same noise, would have taken it (drafter-invariant coupling: Daliri, Musco, Suresh,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from kvguard.signals import largest

_CHUNK_ON_HOST = 1 << 16
"""Scores computed at once: few enough to stay in a CPU's cache."""

_CHUNK_ELSEWHERE = 1 << 24

_NUCLEUS_TOKENS = 64
"""How many of the most likely tokens `nucleus` sorts first."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when a request ends.

    Attributes:
        max_new_tokens: a request that reaches it ends with reason "length".
        end_token_ids: any of them ends a request with reason "eos"; it is part of the output.
        do_sample: False takes the argmax of the raw logits.
        temperature: > 0, divides the logits when sampling.
        top_k: sample among the k most probable tokens; 0: among all. Applied before top_p.
        top_p: in (0, 1], mass of the nucleus when sampling.
        min_p: in [0, 1], least probability relative to the most probable token's when sampling.
        min_new_tokens: no end token is chosen before as many tokens.
        processors: applied to the logits of each row alone, greedy or sampling, first of all; each
            a deterministic function of the tokens before, so that a check can repeat it.
    """

    max_new_tokens: int
    end_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0
    processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return not (self.do_sample or self.processors or self.min_new_tokens)


def token_scores(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    decoding: Decoding,
    before: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scores whose argmax is the next token.

    A few rows are worked on at a time, so that an audit of many positions takes little more memory
    than the scores themselves.

    Args:
        logits: (rows, vocabulary), raw, any float type.
        seeds: (rows,) int64, one per request.
        positions: (rows,) int64, 0-based index of the token to choose among the generated ones.
        decoding: greedy or sampling.
        before: per row the ids of all tokens before, the prompt's too; for ``processors``.

    Returns:
        (rows, vocabulary) float32; -inf outside the nucleus. Greedy returns the logits.
    """
    logits = _processed(logits, positions, decoding, before)
    if not decoding.do_sample:
        return logits.float()
    rows, vocabulary = logits.shape
    device = logits.device
    keys = _keys(seeds, positions)
    tokens = _token_hashes(vocabulary, device)
    scores = torch.empty(rows, vocabulary, device=device)
    chunk = max(1, (_CHUNK_ON_HOST if _on_host(device) else _CHUNK_ELSEWHERE) // vocabulary)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        scaled = logits[part].float() / decoding.temperature
        first, second = keys[0][part, None], keys[1][part, None]  # (chunk rows, 1)
        kept = _kept(scaled, decoding)
        if kept is None:
            torch.add(scaled, _gumbel(first, second, tokens), out=scores[part])
        elif _on_host(device):  # noise for the few that are kept
            row, token = kept.nonzero(as_tuple=True)
            noise = _gumbel(first[row, 0], second[row, 0], tokens[token])
            scores[part] = -torch.inf
            scores[part][row, token] = scaled[row, token] + noise
        else:  # the number of those would have to come to the host first
            noisy = scaled + _gumbel(first, second, tokens)
            scores[part] = noisy.masked_fill(~kept, -torch.inf)
    return scores


def _processed(
    logits: torch.Tensor,
    positions: torch.Tensor,
    decoding: Decoding,
    before: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    """The logits after the processors; the raw ones stay as they are."""
    if decoding.processors:
        if before is None:
            raise ValueError("logits processors need the tokens before each row, got none")
        rows: list[torch.Tensor] = []
        for index, ids in enumerate(before):
            row: Any = logits[index : index + 1].float().clone()
            for processor in decoding.processors:
                row = processor(ids[None], row)
            rows.append(row)
        logits = torch.cat(rows)
    if decoding.min_new_tokens and decoding.end_token_ids:
        early = (positions < decoding.min_new_tokens)[:, None]
        ends = torch.tensor(decoding.end_token_ids, device=logits.device)
        forbidden = torch.zeros_like(logits[:1], dtype=torch.bool).index_fill(1, ends, True)
        logits = logits.float().masked_fill(early & forbidden, -torch.inf)
    return logits


def _on_host(device: torch.device) -> bool:
    """Whether asking for a value is free; an accelerator would have to be waited for."""
    return device.type == "cpu"


def _kept(scaled: torch.Tensor, decoding: Decoding) -> torch.Tensor | None:
    """Which tokens may be sampled, (rows, vocabulary) bool; None: all of them.

    Equally probable tokens stay or go together, so that no sort order decides.
    """
    kept = None
    if 0 < decoding.top_k < scaled.shape[1]:
        kept = scaled >= largest(scaled, decoding.top_k)[0][:, -1:]
        scaled = scaled.masked_fill(~kept, -torch.inf)
    if decoding.min_p > 0:
        best = scaled.amax(dim=1, keepdim=True)
        likely = scaled >= best + math.log(decoding.min_p)
        kept = likely if kept is None else likely & kept
    if decoding.top_p == 1:
        return kept
    inside = nucleus(scaled, decoding.top_p)
    return inside if kept is None else inside & kept  # impossible ones count where all are needed


def nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most probable tokens whose mass reaches ``top_p``.

    A token is in iff the more probable ones together have less mass than ``top_p``: of tokens that
    tie at the border all are in.

    Args:
        scaled: (rows, vocabulary) logits after the temperature; -inf: impossible.
        top_p: in (0, 1].

    Returns:
        (rows, vocabulary) bool; at least the top token of each row is in.
    """
    probabilities = scaled.softmax(dim=1)
    vocabulary = scaled.shape[1]
    # A few of the most probable tokens usually reach the mass. Away from a CPU, asking whether
    # they do would make the host wait: sort them all.
    count = _NUCLEUS_TOKENS if _on_host(scaled.device) else vocabulary
    while count < vocabulary:
        ordered = largest(probabilities, count)[0]
        mass = ordered.cumsum(dim=1)
        if bool((mass[:, -1] >= top_p).all()):
            break
        count *= 16
    else:
        ordered = probabilities.sort(dim=1, descending=True).values
        mass = ordered.cumsum(dim=1)
    inside = mass - ordered < top_p
    least = ordered.masked_fill(~inside, torch.inf).amin(dim=1, keepdim=True)
    return probabilities >= least


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB
_LOW_A = 0x7FEB352D
_LOW_B = -2073254261  # 0x846CA68B as a signed 32-bit integer


_UNIT = (1 - 2.0**-24) * 2.0**-31
"""Puts 31 bits into (0, 1): the largest, 2^31 after rounding, becomes the float32 below 1."""


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on int64 with wrap-around."""
    state = (state ^ _shift(state, 30)) * _MIX_A
    state = (state ^ _shift(state, 27)) * _MIX_B
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 or int32 (torch's is arithmetic)."""
    width = 8 * state.dtype.itemsize
    return (state >> bits).bitwise_and_((1 << (width - bits)) - 1)


def _keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two int32 halves of a 64-bit hash of seed and position, (rows,) each."""
    stream = _mix(_mix(seeds * _GOLDEN + 1) + (positions + 1) * _GOLDEN)
    return (stream >> 32).int(), ((stream << 32) >> 32).int()


def _scramble(state: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
    """A bijection of int32, in place: lowbias32 (Wellons 2018) with a key between its rounds."""
    state.bitwise_xor_(_shift(state, 16)).mul_(_LOW_A)
    state.bitwise_xor_(_shift(state, 15)).bitwise_xor_(key).mul_(_LOW_B)
    return state.bitwise_xor_(_shift(state, 16))


def _token_hashes(vocabulary: int, device: torch.device) -> torch.Tensor:
    """A different int32 for each token, (vocabulary,)."""
    return _scramble(torch.arange(vocabulary, dtype=torch.int32, device=device), 0)


def _gumbel(first: torch.Tensor, second: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from the halves of the keys and the tokens' hashes, broadcast.

    The noise is -log(-log(1 - v)), v = (n + 1/2) / 2^31, n a hash of 31 bits. Large noise comes
    from a small v, where float32 is finest, and reaches 22.2. A token of probability p wins about
    where v < p: one far above 2^-32 is drawn at its rate, only those below that, at most 4e-5 of
    the mass in a vocabulary of 150,000, come up too rarely. (24 bits of 1 - v, all that float32
    has near 1, would end at 17.3 and put this border at 3e-8: up to 0.4 % of the mass.) The 32-bit
    hashes of a row's tokens all differ, so ties are rarer than by chance.
    """
    bits = _scramble(tokens ^ first, second).bitwise_and_(0x7FFFFFFF)
    v = bits.float().add_(0.5).mul_(_UNIT)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of seed, position and token.

    Integer hashing and float32 only: float64 and unsigned integers are not on every device.

    Args:
        seeds: (rows,) int64.
        positions: (rows,) int64.
        vocabulary: number of tokens.

    Returns:
        (rows, vocabulary) float32 on the device of ``seeds``.
    """
    first, second = _keys(seeds, positions)
    return _gumbel(first[:, None], second[:, None], _token_hashes(vocabulary, seeds.device))

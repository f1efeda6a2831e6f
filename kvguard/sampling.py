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
from dataclasses import dataclass

import torch


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
    """

    max_new_tokens: int
    end_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def token_scores(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, decoding: Decoding
) -> torch.Tensor:
    """Scores whose argmax is the next token.

    Args:
        logits: (rows, vocabulary), raw, any float type.
        seeds: (rows,) int64, one per request.
        positions: (rows,) int64, 0-based index of the token to choose among the generated ones.
        decoding: greedy or sampling.

    Returns:
        (rows, vocabulary) float32; -inf outside the nucleus. Greedy returns the logits.
    """
    logits = logits.float()
    if not decoding.do_sample:
        return logits
    scaled = logits / decoding.temperature
    if 0 < decoding.top_k < scaled.shape[1]:
        least = scaled.topk(decoding.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if decoding.top_p < 1:
        scaled = scaled.masked_fill(~nucleus(scaled, decoding.top_p), -torch.inf)
    return scaled + gumbel_noise(seeds, positions, logits.shape[1])


def nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most probable tokens whose mass reaches ``top_p``.

    Args:
        scaled: (rows, vocabulary) logits after the temperature.
        top_p: in (0, 1].

    Returns:
        (rows, vocabulary) bool; at least the top token of each row is in.
    """
    ordered, order = scaled.sort(dim=1, descending=True)
    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    return torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, order, before < top_p)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on int64 with wrap-around."""
    state = (state ^ _shift(state, 30)) * _MIX_A
    state = (state ^ _shift(state, 27)) * _MIX_B
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of seed, position and token.

    Args:
        seeds: (rows,) int64.
        positions: (rows,) int64.
        vocabulary: number of tokens.

    Returns:
        (rows, vocabulary) float32 on the device of ``seeds``.
    """
    stream = _mix(_mix(seeds * _GOLDEN + 1) + (positions + 1) * _GOLDEN)
    tokens = torch.arange(1, vocabulary + 1, device=seeds.device)
    bits = _shift(_mix(stream[:, None] + tokens * _GOLDEN), 11)  # 53 bits
    uniform = (bits.double() + 0.5) * 2.0**-53
    return (-(-uniform.log()).log()).float()

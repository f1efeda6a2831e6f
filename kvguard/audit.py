"""What the uncompressed model says about tokens that a compressed cache produced.

One teacher-forced pass over prompt and generated tokens judges them all; the guard's verification
and the experiment's audit are this same pass.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvguard.prefill import Prefix, attention_layers, extend_prefix, forget_masks, matching_prefix
from kvguard.sampling import Decoding, token_scores
from kvguard.signals import SIGNAL_INDEX, extract_signals

LM_HEAD_ROWS = 128
"""Positions whose logits are computed at once in a teacher-forced pass."""

GAP_LIMIT = 1e4
"""Nats; stands for the infinite gap of a token outside the nucleus."""


class Scored(NamedTuple):
    """A sequence and the uncompressed model's logits along it.

    Attributes:
        cache: uncompressed, batch of 1, of the whole sequence.
        hidden: (kept positions, hidden size) after the final norm; `lm_head` makes logits of it.
        tokens: how many tokens the model really processed.
    """

    cache: DynamicCache
    hidden: torch.Tensor
    tokens: int


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    generated: Sequence[int],
    *,
    prefix: Prefix | None = None,
) -> Scored:
    """One pass of the uncompressed model over a prompt and what was generated after it.

    Args:
        model: in eval mode.
        prompt_ids: the prompt.
        generated: tokens that follow it.
        prefix: reused where the prompt starts with it.

    Returns:
        ``hidden`` has ``len(generated) + 1`` rows: row i predicts generated token i, the last row
        predicts what comes next.
    """
    whole = [*prompt_ids, *generated]
    eager = model.config._attn_implementation == "eager"
    usable = None if eager else matching_prefix(prefix, prompt_ids)
    reused = 0 if usable is None else len(usable.token_ids)
    forget_masks(attention_layers(model))
    cache = extend_prefix(usable, model)
    positions = torch.arange(reused, len(whole), device=model.device)
    output = model.model(
        input_ids=torch.tensor([whole[reused:]], device=model.device),
        past_key_values=cache,
        use_cache=True,
        cache_position=positions,
        position_ids=positions[None],
    )
    hidden = output.last_hidden_state[0, -(len(generated) + 1) :]
    return Scored(cache, hidden, len(whole) - reused)


def logits_in_chunks(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits (<= 128, vocabulary) of consecutive positions, so that all never exist at once."""
    for start in range(0, len(hidden), LM_HEAD_ROWS):
        yield model.lm_head(hidden[start : start + LM_HEAD_ROWS])


class Audit(NamedTuple):
    """The uncompressed model's judgement of n generated tokens.

    Attributes:
        logprob: (n,) float32, nats, of each token given the same prefix; higher is better.
        gap: (n,) float32, nats >= 0: how far the token's score lies below the best token's. 0: the
            uncompressed model would have taken it too (under sampling: with the same noise).
        is_argmax: (n,) bool, whether the token is the uncompressed model's most probable one.
        scored: the pass: its cache and final hidden states, n + 1 rows.
    """

    logprob: NDArray[np.float32]
    gap: NDArray[np.float32]
    is_argmax: NDArray[np.bool_]
    scored: Scored


@torch.inference_mode()
def audit_tokens(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    generated: Sequence[int],
    *,
    decoding: Decoding,
    seed: int = 0,
    prefix: Prefix | None = None,
) -> Audit:
    """Judge generated tokens in one pass of the uncompressed model.

    Args:
        model: in eval mode.
        prompt_ids: the prompt.
        generated: what followed it.
        decoding: how the tokens were chosen; under sampling the request's noise is replayed.
        seed: the request's.
        prefix: reused where the prompt starts with it.

    Returns:
        Arrays of ``len(generated)``; empty for no tokens.
    """
    scored = teacher_forced(model, prompt_ids, generated, prefix=prefix)
    chosen = torch.tensor(list(generated), dtype=torch.long, device=model.device)
    positions = torch.arange(len(generated), device=model.device)
    seeds = torch.full_like(positions, seed)
    logprobs, gaps, argmaxes = [], [], []
    done = 0
    for logits in logits_in_chunks(model, scored.hidden[:-1]):
        part = slice(done, done + len(logits))
        done += len(logits)
        raw = logits.float()
        own = chosen[part, None]
        logprobs.append(raw.gather(1, own)[:, 0] - raw.logsumexp(dim=1))
        scores = token_scores(raw, seeds[part], positions[part], decoding)
        gaps.append(scores.amax(dim=1) - scores.gather(1, own)[:, 0])
        argmaxes.append(raw.argmax(dim=1) == own[:, 0])
    if not logprobs:
        nothing = np.zeros(0, np.float32)
        return Audit(nothing, nothing, np.zeros(0, bool), scored)
    return Audit(
        torch.cat(logprobs).cpu().numpy(),
        torch.cat(gaps).clamp(max=GAP_LIMIT).cpu().numpy(),
        torch.cat(argmaxes).cpu().numpy(),
        scored,
    )


def first_rejected(gap: NDArray[np.float32], margin: float) -> int | None:
    """Index of the first token that the uncompressed model would not have taken.

    Args:
        gap: (n,) nats, from `Audit`; NaN counts as rejected.
        margin: nats; a smaller gap is a numeric tie, not a rejection.
    """
    rejected = np.flatnonzero(~(gap <= margin))
    return int(rejected[0]) if len(rejected) else None


@torch.inference_mode()
def signals_along(
    model: PreTrainedModel, scored: Scored, generated: Sequence[int]
) -> NDArray[np.float32]:
    """Signals of generated tokens under the uncompressed model, (n, 28) float32.

    They replace a row's stored signals after a rewind, so that features go on from what is kept.

    Args:
        model: in eval mode.
        scored: a teacher-forced pass whose first rows predict ``generated``.
        generated: n tokens.
    """
    chosen = torch.tensor(list(generated), dtype=torch.long, device=model.device)
    tables = []
    done = 0
    for logits in logits_in_chunks(model, scored.hidden[: len(generated)]):
        own = chosen[done : done + len(logits)]
        done += len(logits)
        tables.append(extract_signals(logits, own).table)
    if not tables:
        return np.zeros((0, len(SIGNAL_INDEX)), np.float32)
    table = torch.cat(tables).cpu().numpy()
    entropy = table[:, SIGNAL_INDEX["entropy"]]
    table[1:, SIGNAL_INDEX["entropy_delta"]] = np.diff(entropy)
    return table

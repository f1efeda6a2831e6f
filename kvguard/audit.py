"""What the uncompressed model says about tokens that a compressed cache produced.

A check runs the tokens that have not been checked over the row's cold cache, the checks of several
rows in one pass (`cold_cache.run_drafts`); without a cold cache one teacher-forced pass over prompt
and generated tokens says the same. The guard's checks and the experiment's audit are this; an audit
takes several finished answers at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvguard.cold_cache import ColdRow, Draft, run_drafts
from kvguard.config import Tolerance
from kvguard.prefill import (
    Prefix,
    attention_layers,
    cache_bytes,
    extend_prefix,
    forget_masks,
    layer_tensors,
    matching_prefix,
)
from kvguard.sampling import Decoding, token_scores
from kvguard.signals import log_total, peaks

LM_HEAD_ROWS = 128
"""Positions whose logits are computed at once in a teacher-forced pass, at most."""

GAP_LIMIT = 1e4
"""Nats; stands for the infinite gap of a token outside the nucleus."""


class Scored(NamedTuple):
    """A sequence and the uncompressed model's logits along it.

    Attributes:
        cache: uncompressed, batch of 1, of the whole sequence.
        hidden: (kept positions, hidden size) after the final norm; `lm_head` makes logits of it.
        tokens: how many tokens the model really processed.
        inputs: per layer (1, kept positions - 1, hidden size) what the attention was given at the
            generated tokens; None where not asked.
    """

    cache: DynamicCache
    hidden: torch.Tensor
    tokens: int
    inputs: list[torch.Tensor] | None = None


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    generated: Sequence[int],
    *,
    prefix: Prefix | None = None,
    keep_inputs: bool = False,
) -> Scored:
    """One pass of the uncompressed model over a prompt and what was generated after it.

    Args:
        model: in eval mode.
        prompt_ids: the prompt.
        generated: tokens that follow it.
        prefix: reused where the prompt starts with it.
        keep_inputs: keep what each attention layer was given, for presses that work on it later.

    Returns:
        ``hidden`` has ``len(generated) + 1`` rows: row i predicts generated token i, the last row
        predicts what comes next.
    """
    whole = [*prompt_ids, *generated]
    eager = model.config._attn_implementation == "eager"
    usable = None if eager else matching_prefix(prefix, prompt_ids)
    reused = 0 if usable is None else len(usable.token_ids)
    layers = attention_layers(model)
    forget_masks(layers)
    cache = extend_prefix(usable, model)
    positions = torch.arange(reused, len(whole), device=model.device)
    count = len(generated)
    inputs: list[torch.Tensor] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"][:, len(whole) - reused - count :])

    with ExitStack() as stack:
        if keep_inputs:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        output = model.model(
            input_ids=torch.tensor([whole[reused:]], device=model.device),
            past_key_values=cache,
            use_cache=True,
            cache_position=positions,
            position_ids=positions[None],
        )
    hidden = output.last_hidden_state[0, -(count + 1) :]
    return Scored(cache, hidden, len(whole) - reused, inputs if keep_inputs else None)


def logits_in_chunks(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits (<= 128, vocabulary) of consecutive positions, so that all never exist at once.

    All parts are about as long: the matrix is read for every one, however short.
    """
    parts = -(-len(hidden) // LM_HEAD_ROWS)
    for part in hidden.tensor_split(max(1, parts)):
        yield model.lm_head(part)


class Audit(NamedTuple):
    """The uncompressed model's judgement of n generated tokens.

    Attributes:
        logprob: (n,) float32, nats, of each token given the same prefix; higher is better.
        gap: (n,) float32, nats >= 0: how far the token's score lies below the best token's. 0: the
            uncompressed model would have taken it too (under sampling: with the same noise).
        is_argmax: (n,) bool, whether the token is the uncompressed model's most probable one.
    """

    logprob: NDArray[np.float32]
    gap: NDArray[np.float32]
    is_argmax: NDArray[np.bool_]


class Answer(NamedTuple):
    """A generated answer to judge.

    Attributes:
        prompt_ids: its prompt.
        token_ids: every token generated so far.
        seed: the request's.
        cold: its cold cache, which says how many of the tokens have been checked; or None.
        ended: nothing follows the last token, so its own entry is not needed.
        first_position: noise position of the first token.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    seed: int = 0
    cold: ColdRow | None = None
    ended: bool = False
    first_position: int = 0


class Check(NamedTuple):
    """What the uncompressed model says of an answer from its first unchecked token on.

    Attributes:
        start: number of the first token that was judged; those before it had been checked.
        audit: of the tokens from ``start`` on.
        hidden: after the final norm: row i predicts token ``start + i``; one for each judged token
            and, unless the answer has ended, one for the token that comes next.
        entries: (layers, 2, heads, n, head_dim) of the tokens from ``start`` on, in host memory
            where they were run over a cold cache and there was room; the last token's is missing
            where the answer has ended.
        inputs: per layer (1, n, hidden size) what the attention was given; None where not asked.
        cache: the whole uncompressed cache, where a fresh pass made one.
        tokens_prefilled: tokens that the check had to run.
        bytes_moved: between device and cold cache, this row's share (`cold_cache.Run`).
        off_device: whether the entries have left the device, and are counted in ``bytes_moved``.
        device_bytes: that the check needed for this row: two layers of its cold cache, the tokens
            that it ran among them (`Run.device_bytes`); or the fresh cache.
    """

    start: int
    audit: Audit
    hidden: torch.Tensor
    entries: torch.Tensor | None
    inputs: list[torch.Tensor] | None
    cache: DynamicCache | None
    tokens_prefilled: int
    bytes_moved: int
    off_device: bool
    device_bytes: int


@torch.inference_mode()
def check_answers(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    decoding: Decoding,
    *,
    prefix: Prefix | None = None,
    keep_inputs: bool = False,
) -> list[Check]:
    """Check answers with the uncompressed model: those with a cold cache in one pass.

    Args:
        model: in eval mode.
        answers: each with at least one token that has not been checked.
        decoding: how the tokens were chosen; under sampling each request's noise is replayed.
        prefix: reused where an answer without a cold cache has a prompt that starts with it.
        keep_inputs: keep what each attention layer was given, for presses that work on it later.

    Returns:
        One check an answer, in their order.
    """
    found: dict[int, Check] = {}
    drafts: dict[int, Draft] = {}
    for number, answer in enumerate(answers):
        if answer.cold is None:
            found[number] = _check_afresh(model, answer, decoding, prefix, keep_inputs)
            continue
        tokens = answer.token_ids[answer.cold.tokens : len(answer.token_ids) - answer.ended]
        if tokens:
            drafts[number] = Draft(answer.cold, tokens)
    runs = {}
    if drafts:
        done = run_drafts(model, list(drafts.values()), keep_inputs=keep_inputs)
        runs = dict(zip(drafts, done, strict=True))
    cold = [(number, answer) for number, answer in enumerate(answers) if answer.cold is not None]
    hidden = []
    for number, answer in cold:
        assert answer.cold is not None
        assert answer.cold.hidden is not None
        before = answer.cold.hidden[None].to(model.device)
        run = runs.get(number)
        hidden.append(before if run is None else torch.cat([before, run.hidden]))
    audits = judge(model, hidden, [answer for _, answer in cold], decoding)
    for (number, answer), rows, audit in zip(cold, hidden, audits, strict=True):
        assert answer.cold is not None
        run, count = runs.get(number), 0
        if run is not None:
            count = len(run.hidden)
        found[number] = Check(
            start=answer.cold.tokens,
            audit=audit,
            hidden=rows,
            entries=None if run is None else run.entries,
            inputs=None if run is None else run.inputs,
            cache=None,
            tokens_prefilled=count,
            bytes_moved=0 if run is None else run.bytes_moved,
            off_device=run is not None and run.off_device,
            device_bytes=0 if run is None else run.device_bytes,
        )
    return [found[number] for number in range(len(answers))]


def _check_afresh(
    model: PreTrainedModel,
    answer: Answer,
    decoding: Decoding,
    prefix: Prefix | None,
    keep_inputs: bool,
) -> Check:
    """Check an answer that has no cold cache: a prefill-shaped pass over all of it."""
    scored = teacher_forced(
        model, answer.prompt_ids, answer.token_ids, prefix=prefix, keep_inputs=keep_inputs
    )
    (audit,) = judge(model, [scored.hidden], [answer], decoding)
    count = len(answer.token_ids)
    entries = torch.stack(
        [
            torch.cat([keys, values])[:, :, keys.shape[2] - count :]
            for keys, values in layer_tensors(scored.cache)
        ]
    )
    return Check(
        start=0,
        audit=audit,
        hidden=scored.hidden,
        entries=entries,
        inputs=scored.inputs,
        cache=scored.cache,
        tokens_prefilled=len(answer.prompt_ids) + count,
        bytes_moved=0,
        off_device=False,
        device_bytes=cache_bytes(scored.cache),
    )


@torch.inference_mode()
def audit_tokens(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    generated: Sequence[int],
    *,
    decoding: Decoding,
    seed: int = 0,
    prefix: Prefix | None = None,
    cold: ColdRow | None = None,
) -> Audit:
    """Judge one finished answer: `audit_answers` of it alone."""
    answer = Answer(prompt_ids, generated, seed, cold)
    return audit_answers(model, [answer], decoding, prefix=prefix)[0]


@torch.inference_mode()
def audit_answers(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    decoding: Decoding,
    *,
    prefix: Prefix | None = None,
) -> list[Audit]:
    """Judge finished answers, all of each: those with a cold cache in one pass over the answers.

    Args:
        model: in eval mode.
        answers: what a cold cache holds of an answer is computed again; none of it is kept.
        decoding: how the tokens were chosen; under sampling each request's noise is replayed.
        prefix: reused where an answer without a cold cache has a prompt that starts with it.

    Returns:
        One audit an answer, in their order; of an answer without tokens an empty one.
    """
    whole = [
        answer._replace(cold=None if answer.cold is None else answer.cold.prompt_only(), ended=True)
        for answer in answers
        if len(answer.token_ids)
    ]
    found = iter(check_answers(model, whole, decoding, prefix=prefix))
    nothing = np.zeros(0, np.float32)
    return [
        next(found).audit if len(answer.token_ids) else Audit(nothing, nothing, np.zeros(0, bool))
        for answer in answers
    ]


def judge(
    model: PreTrainedModel,
    hidden: Sequence[torch.Tensor],
    answers: Sequence[Answer],
    decoding: Decoding,
) -> list[Audit]:
    """Judge the last tokens of answers.

    Args:
        model: whose ``lm_head`` makes logits of the hidden states.
        hidden: per answer, rows that predict its tokens from some token on; a row for what comes
            next may follow.
        answers: as many; those with a cold cache are judged from its first unchecked token on.
        decoding: how the tokens were chosen.
    """
    starts = [0 if answer.cold is None else answer.cold.tokens for answer in answers]
    counts = [len(answer.token_ids) - start for answer, start in zip(answers, starts, strict=True)]
    rows = [each[:count] for each, count in zip(hidden, counts, strict=True)]
    device = model.device
    chosen = torch.tensor(
        [token for a, start in zip(answers, starts, strict=True) for token in a.token_ids[start:]],
        dtype=torch.long,
        device=device,
    )
    if not len(chosen):
        nothing = np.zeros(0, np.float32)
        return [Audit(nothing, nothing, np.zeros(0, bool)) for _ in answers]
    firsts = [answer.first_position + start for answer, start in zip(answers, starts, strict=True)]
    positions = torch.cat(
        [torch.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    ).to(device)
    seeds = torch.cat(
        [torch.full((count,), a.seed) for a, count in zip(answers, counts, strict=True)]
    ).to(device)
    before: list[torch.Tensor] | None = None
    if decoding.processors:
        before = []
        for answer, start in zip(answers, starts, strict=True):
            whole = torch.tensor([*answer.prompt_ids, *answer.token_ids], device=device)
            prompt = len(answer.prompt_ids)
            ends = range(prompt + start, prompt + len(answer.token_ids))
            before += [whole[:end] for end in ends]
    logprobs, gaps, argmaxes, done = [], [], [], 0
    for logits in logits_in_chunks(model, torch.cat(rows)):
        part = slice(done, done + len(logits))
        done += len(logits)
        raw = logits.float()
        own = chosen[part, None]
        peak, best = peaks(raw)
        logit = raw.gather(1, own)[:, 0]
        logprobs.append(logit - peak - log_total(raw, peak))
        argmaxes.append(best == own[:, 0])
        if decoding.takes_argmax:
            gaps.append(peak - logit)
            continue
        scores = token_scores(
            raw,
            seeds[part],
            positions[part],
            decoding,
            None if before is None else before[part],
        )
        gaps.append(scores.amax(dim=1) - scores.gather(1, own)[:, 0])
    columns = (
        torch.cat(logprobs).cpu().numpy(),
        torch.cat(gaps).clamp(max=GAP_LIMIT).cpu().numpy(),
        torch.cat(argmaxes).cpu().numpy(),
    )
    edges = np.cumsum(counts)[:-1]
    return [Audit(*each) for each in zip(*(np.split(c, edges) for c in columns), strict=True)]


def first_rejected(gap: NDArray[np.float32], margin: float) -> int | None:
    """Index of the first token that the uncompressed model would not have taken.

    Args:
        gap: (n,) nats, from `Audit`; NaN counts as rejected.
        margin: nats; a smaller gap is a numeric tie, not a rejection.
    """
    rejected = np.flatnonzero(~(gap <= margin))
    return int(rejected[0]) if len(rejected) else None


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

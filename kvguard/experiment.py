"""One shard of the experiment: prompts through one (press, ratio), to traces and tokens tables."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from kvguard import config
from kvguard.audit import Answer, Audit, audit_answers
from kvguard.engine import Session, generate
from kvguard.joblog import progress
from kvguard.models import LoadedModel
from kvguard.prefill import Prefix
from kvguard.presses import build_press
from kvguard.probes import marked_tokens
from kvguard.prompts import Example, Prompt, format_prompt
from kvguard.requests import Completion, Request
from kvguard.sampling import Decoding
from kvguard.schema import AUDIT, PROBE_NAMES, TOKENS, TRACES, check, conform
from kvguard.shared_prefix import common_prefix
from kvguard.signals import SIGNAL_NAMES
from kvguard.slots import batch_size_for

logger = logging.getLogger(__name__)

AUDIT_TOKENS = 512
"""Finished answers are audited in one pass as soon as they have so many tokens together."""

AUDIT_PARKED_BYTES = 256 * 2**20
"""Or as soon as so many bytes are parked for them: cold caches stay until the audit."""

AuditColumns = dict[str, NDArray[Any]]
"""audit_logprob, audit_is_argmax and audit_gap, (tokens,) each."""


class ShardError(RuntimeError):
    """Every prompt of a shard failed; the message holds the first prompt's error."""


class RunResult(NamedTuple):
    """What one shard generated.

    Attributes:
        traces: one row a prompt (TRACES), in the prompts' order.
        tokens: one row a token (TOKENS); none for a prompt that failed.
    """

    traces: pl.DataFrame
    tokens: pl.DataFrame


class Judged(NamedTuple):
    """A completion and its audit.

    Attributes:
        completion: without a cold cache.
        audit: columns of a table; None: not audited, or the request failed.
        audit_seconds: the answer's share of the pass that audited it, by tokens.
    """

    completion: Completion
    audit: AuditColumns | None
    audit_seconds: float


class Prepared(NamedTuple):
    """Prompts ready to decode.

    Attributes:
        requests: one a prompt, its key is the prompt id.
        prefix: what they share, prefilled; None where nothing is shared or sharing is off.
        decoding: how tokens are chosen.
        rows: batch size.
    """

    requests: list[Request]
    prefix: Prefix | None
    decoding: Decoding
    rows: int


def request_seed(seed: int, prompt_id: str) -> int:
    """A prompt's own seed: independent of its neighbours, its shard and the batch."""
    return (seed * 1_000_003 + int(prompt_id[:15], 16)) % (1 << 62)


def prepare_requests(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    experiment: config.Config,
) -> Prepared:
    """Tokenise prompts and prefill what they share.

    Args:
        model: a loaded model.
        prompts: at least one, all of one task.
        examples: few-shot examples of that task.
        experiment: the whole configuration.
    """
    settings = experiment.generation
    decoding = Decoding(
        max_new_tokens=experiment.max_new_tokens(prompts[0].task),
        end_token_ids=model.end_token_ids,
        do_sample=settings.do_sample,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    token_ids = [format_prompt(model.tokenizer, prompt.question, examples) for prompt in prompts]
    requests = [
        Request(prompt.prompt_id, ids, request_seed(experiment.seed, prompt.prompt_id))
        for prompt, ids in zip(prompts, token_ids, strict=True)
    ]
    prefix = common_prefix(model.model, token_ids, 1) if settings.share_prefix else None
    rows = settings.batch_size
    if rows == "auto":
        longest = max(map(len, token_ids)) + decoding.max_new_tokens
        rows = batch_size_for(model.model, longest)
    return Prepared(requests, prefix, decoding, min(rows, len(requests)))


def run_shard(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    *,
    press: config.Press | None,
    ratio: str,
    shard: int,
    experiment: config.Config,
) -> RunResult:
    """Generate and audit one shard.

    Args:
        model: a loaded model.
        prompts: this shard's prompts, all of one task.
        examples: few-shot examples of that task.
        press: None for the uncompressed baseline.
        ratio: "0.000" for the baseline.
        shard: number, stored in the traces.
        experiment: the whole configuration.

    Raises:
        ShardError: every prompt failed.
    """
    ready = prepare_requests(model, prompts, examples, experiment)
    if model.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.model.device)
    probes = press is not None and experiment.generation.probes
    audited = press is not None and experiment.generation.audit
    session = Session(
        model.model,
        ready.decoding,
        press=None if press is None else build_press(press, ratio),
        rows=ready.rows,
        prefix=ready.prefix,
        probes=probes,
        marked=marked_tokens(model.tokenizer, model.model.config.vocab_size) if probes else None,
        cold=experiment.generation.cold if audited else "none",
    )
    name = config.BASELINE if press is None else press.name
    keys = {"model": model.name, "press": name, "ratio": ratio}
    traces: dict[str, dict[str, object]] = {}
    tokens: dict[str, pl.DataFrame] = {}
    with progress(len(prompts), f"{name} {ratio} shard {shard:02d}") as advance:
        generated = generate(session, ready.requests)
        judged: Iterable[Judged] = (Judged(completion, None, 0.0) for completion in generated)
        if audited:
            judged = audit_completions(model, generated, ready)
        for completion, audit, audit_seconds in judged:
            prompt_id = completion.request.key
            if completion.error is None:
                tokens[prompt_id] = tokens_frame(
                    completion, keys | {"prompt_id": prompt_id}, audit, own=press is None
                )
            completion.bytes_moved = completion.host_byte_steps = 0  # of the audit, not the policy
            traces[prompt_id] = trace_row(completion, model, ready.decoding) | {
                **keys,
                "task": prompts[0].task,
                "shard": shard,
                "audit_seconds": audit_seconds,
            }
            advance(1, f"{len(completion.token_ids)} tokens")
    if len(tokens) == 0:
        first = traces[prompts[0].prompt_id]["error"]
        raise ShardError(f"all {len(prompts)} prompts of {name} {ratio} failed; the first: {first}")
    order = [prompt.prompt_id for prompt in prompts]
    frame = pl.DataFrame([traces[prompt_id] for prompt_id in order], schema=TRACES)
    token_frames = [tokens[prompt_id] for prompt_id in order if prompt_id in tokens]
    return RunResult(check(frame, TRACES, "traces"), pl.concat(token_frames))


def audit_completions(
    model: LoadedModel, completions: Iterable[Completion], ready: Prepared
) -> Iterator[Judged]:
    """Audit answers as they finish, several in one pass.

    Such a pass reads all weights and makes the same calls for one short answer as for several.

    Args:
        model: a loaded model.
        completions: with their cold caches, which are dropped when their answer is audited.
        ready: what they were generated from.

    Yields:
        The completions in their order, audited; those of failed requests are not.
    """
    waiting: list[Completion] = []
    tokens = parked = 0
    for completion in completions:
        waiting.append(completion)
        tokens += len(completion.token_ids)
        parked += 0 if completion.cold is None else completion.cold.nbytes
        if tokens >= AUDIT_TOKENS or parked >= AUDIT_PARKED_BYTES:
            yield from _audit_together(model, waiting, ready)
            waiting, tokens, parked = [], 0, 0
    yield from _audit_together(model, waiting, ready)


def _audit_together(
    model: LoadedModel, completions: Sequence[Completion], ready: Prepared
) -> list[Judged]:
    """`audit_completions` of some that have finished."""
    started = time.perf_counter()
    intact = [completion for completion in completions if completion.error is None]
    answers = [
        Answer(each.request.prompt_ids, each.token_ids, each.request.seed, each.cold)
        for each in intact
    ]
    audits = iter(audit_answers(model.model, answers, ready.decoding, prefix=ready.prefix))
    spent = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in intact)
    found = []
    for completion in completions:
        completion.cold = None
        if completion.error is None:
            share = len(completion.token_ids) / max(1, tokens)
            found.append(Judged(completion, _columns(next(audits)), share * spent))
        else:
            found.append(Judged(completion, None, 0.0))
    return found


def _columns(audit: Audit) -> AuditColumns:
    """The columns of TOKENS that an audit fills."""
    return {
        "audit_logprob": audit.logprob,
        "audit_is_argmax": audit.is_argmax,
        "audit_gap": audit.gap,
    }


def tokens_frame(
    completion: Completion,
    keys: dict[str, str],
    audit: AuditColumns | None,
    *,
    own: bool,
) -> pl.DataFrame:
    """TOKENS rows of one completion.

    Args:
        completion: a request that did not fail.
        keys: model, press, ratio and prompt_id.
        audit: audit_logprob, audit_is_argmax and audit_gap, (tokens,) each; None: not audited.
        own: the tokens are the uncompressed model's own, which audits itself.
    """
    count = len(completion.token_ids)
    columns = {name: completion.signals[:, i] for i, name in enumerate(SIGNAL_NAMES)}
    frame = pl.DataFrame(
        {
            "position": np.arange(count, dtype=np.int32),
            "token_id": np.array(completion.token_ids, dtype=np.int32),
            **columns,
        }
    ).with_columns(pl.selectors.float().fill_nan(None))
    if own:
        frame = frame.with_columns(
            audit_logprob="chosen_logprob",
            audit_is_argmax=pl.col("chosen_rank") == 0,
            audit_gap=pl.lit(0.0, pl.Float32),
        )
    elif audit is not None:
        frame = frame.with_columns(**{name: pl.Series(values) for name, values in audit.items()})
    else:
        frame = frame.with_columns(**{name: pl.lit(None) for name in AUDIT if name != "llr"})
    frame = frame.with_columns(
        llr=pl.col("chosen_logprob") - pl.col("audit_logprob"),
        **{name: pl.lit(value) for name, value in keys.items()},
    )
    return check(conform(frame, TOKENS), TOKENS, "tokens")


def finite_or_none(values: NDArray[np.float32]) -> list[float | None]:
    """Numbers for a table: null where undefined."""
    return [float(value) if np.isfinite(value) else None for value in values]


def trace_row(completion: Completion, model: LoadedModel, decoding: Decoding) -> dict[str, object]:
    request = completion.request
    ok = completion.error is None
    held = completion.kv_bytes
    decoded = len(held) > 0
    text = model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    device = model.model.device
    measured = completion.probes
    probes = [None] * len(PROBE_NAMES) if measured is None else finite_or_none(measured)
    return dict(zip(PROBE_NAMES, probes, strict=True)) | {
        "prompt_id": request.key,
        "seed": request.seed,
        "status": "ok" if ok else "error",
        "error": completion.error,
        "prompt_tokens": len(request.prompt_ids),
        "generated_tokens": len(completion.token_ids),
        "max_new_tokens": request.max_new_tokens or decoding.max_new_tokens,
        "stop_reason": completion.stop_reason,
        "text": text if ok else None,
        "cache_bytes_before": completion.cache_bytes_before if ok else None,
        "cache_bytes_after": completion.cache_bytes_after if ok else None,
        "kv_kept_bytes_mean": float(held[:, 0].mean()) if decoded else None,
        "kv_masked_bytes_mean": float(held[:, 1].mean()) if decoded else None,
        "kv_padding_bytes_mean": float(held[:, 2].mean()) if decoded else None,
        "kv_allocated_bytes_peak": int(held.sum(axis=1).max()) if decoded else None,
        "prefill_seconds": completion.prefill_seconds,
        "decode_seconds": completion.decode_seconds,
        "allocator_bytes_peak": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
        "device_byte_steps": completion.device_byte_steps,
        "device_bytes_peak": completion.device_bytes_peak,
        "host_byte_steps": completion.host_byte_steps,
        "bytes_moved": completion.bytes_moved,
        "checks": completion.checks,
        "tokens_prefilled": completion.tokens_prefilled,
        "decode_steps": completion.decode_steps,
        "tokens_wasted": completion.tokens_wasted,
        "seconds": completion.prefill_seconds + completion.decode_seconds,
    }

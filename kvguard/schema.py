"""The Polars schema of every table, checked on write and on read.

Each table is a Parquet file, Zstandard-compressed, written to a temporary name in the target
folder and then renamed, so that a reader never sees half a file. Keys are columns: nothing is
parsed out of a file name. ``ratio`` is text with three decimals: no float is ever compared.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard.files import DamagedFile, check_file
from kvguard.files import atomic_path as atomic_path

TIMINGS = re.compile(r"seconds|(^|_)time(_|$)|allocator_bytes")
"""Columns that no two runs share."""

TOP_LOGPROBS = 20
"""How many of the largest log-probabilities are stored per token."""

TRACE_KEYS = ("model", "press", "ratio", "prompt_id")
"""Columns that identify one generated answer."""

CONDITION = ("model", "press", "ratio")
"""Columns that identify what prompts ran under."""

TOKEN_KEYS = (*TRACE_KEYS, "position")
"""Columns that identify one generated token; ``position`` counts from 0."""

CATASTROPHES = ("looping", "non_termination", "amnesia")
"""The kinds of visible failure; ``catastrophe`` is any of them."""

TARGETS = ("harm", "any", *CATASTROPHES, "divergence")
"""What a hazard predictor can be trained for, the default first. ``harm`` is the onset of harm (see
`harm`), ``any`` the first of the three catastrophes."""

_trace_key_types: dict[str, pl.DataType] = {
    "model": pl.String(),
    "press": pl.String(),
    "ratio": pl.String(),
    "prompt_id": pl.String(),
}
_token_key_types: dict[str, pl.DataType] = _trace_key_types | {"position": pl.Int32()}

SIGNALS: dict[str, pl.DataType] = {
    "entropy": pl.Float32(),  # nats, of the full next-token distribution
    "alternatives_entropy": pl.Float32(),  # nats, after removing the top token and renormalising
    "top1_probability": pl.Float32(),
    "top5_probability": pl.Float32(),
    "mean_logprob": pl.Float32(),  # nats, unweighted mean over the vocabulary
    "entropy_delta": pl.Float32(),  # entropy minus the previous token's; null at position 0
    "chosen_logprob": pl.Float32(),
    "chosen_rank": pl.Int32(),  # 0 = the top token
    **{f"top_logprob_{rank:02d}": pl.Float32() for rank in range(TOP_LOGPROBS)},
}
"""Signals of one token, from raw logits before any processor (28 columns)."""

AUDIT: dict[str, pl.DataType] = {
    "audit_logprob": pl.Float32(),  # of the chosen token, uncompressed model, same prefix
    "audit_is_argmax": pl.Boolean(),
    "audit_gap": pl.Float32(),  # nats: the uncompressed argmax's log-probability minus the chosen's
    "llr": pl.Float32(),  # chosen_logprob - audit_logprob; positive: compression likes it more
}
"""What a teacher-forced pass of the uncompressed model says about each token."""

COSTS: dict[str, pl.DataType] = {
    # Bytes allocated for this request's share of the batch's caches, summed over its model steps;
    # padding, checks and recoveries included. The shares of a batch sum to what it allocates.
    "device_byte_steps": pl.Int64(),
    "device_bytes_peak": pl.Int64(),  # of the whole batch's caches while the request was in it
    "host_byte_steps": pl.Int64(),  # of its cold cache, summed over the same steps
    # Of entries parked off the device, read there by passes, written there and back; on a host as
    # on a device. Files without RUNS.prompt_tokens hold, from a CPU, what was parked alone.
    "bytes_moved": pl.Int64(),
    "tokens_prefilled": pl.Int64(),  # by passes of more than one token; a shared prefix counts
    "decode_steps": pl.Int64(),  # single-token passes, those of dropped tokens included
    "tokens_wasted": pl.Int64(),  # generated, then dropped
    "checks": pl.Int64(),  # passes of the uncompressed model over drafted tokens
    "seconds": pl.Float64(),  # prefill and its share of the batch's steps and checks
}
"""What a request costs, the same columns in every table; null where unknown; lower is better."""

PROMPTS: dict[str, pl.DataType] = {
    "prompt_id": pl.String(),  # unique across tasks
    "task": pl.String(),  # the task's name in the configuration
    "kind": pl.String(),  # what `tasks.verify` goes by
    "template": pl.String(),  # of the prompts drawn from the same one; null: the task has none
    "index": pl.Int32(),
    "question": pl.String(),
    "reference": pl.String(),  # the right answer as people read it; null: there is none
    "spec": pl.String(),  # JSON: what `tasks.verify` needs to judge a text
}

PROBE_NAMES: tuple[str, ...] = (
    "evicted_mass_mean",  # share of the last prompt tokens' attention on evicted entries
    "evicted_mass_max",  # of the head with the largest share
    "evicted_mass_top20",  # mean of the 20 largest heads
    "evicted_mass_std",  # between heads
    "evicted_mass_early",  # mean of the first third of the layers; the other two follow
    "evicted_mass_middle",
    "evicted_mass_late",
    "evicted_content_mass",  # evicted over all attention outside sinks and window
    "evicted_mass_last",  # of the last prompt token's query
    "evicted_everywhere",  # share of tokens that every head of every layer evicts
    "evicted_by_layer",  # share of tokens that every head of a layer evicts, mean over layers
    "evicted_marked",  # share of digits and names evicted, mean over heads and layers
    "evicted_marked_everywhere",  # share of them that every head of every layer evicts
    "key_norm_loss",  # share of the summed key norms that was evicted
    "output_error_mean",  # relative change of the attention output without evicted entries
    "output_error_max",
    "replay_kl_last",  # nats, uncompressed from compressed, after the last prompt token
    "replay_kl_mean",  # over the replayed tokens
    "replay_kl_max",
    "replay_agreement",  # share of replayed tokens whose most likely next token is the same
    "replay_entropy_shift",  # nats, compressed minus uncompressed, after the last prompt token
    "attention_entropy",  # nats, of the last prompt tokens' attention, mean over heads and layers
    "first_entropy",  # nats, of the first new token under the uncompressed model
    "prompt_nll",  # nats per token, of the last prompt tokens
)
"""What `probes.CacheProbe` measures of one request at prefill; larger is riskier,
except for ``replay_agreement``."""

REPLAY_TOKENS = 4
"""Last prompt tokens that the probes run again over the compressed cache."""

PROBES: dict[str, pl.DataType] = {name: pl.Float32() for name in PROBE_NAMES}
"""Columns of TRACES; null where a probe is undefined (see `probes`) or was not asked for."""

TRACES: dict[str, pl.DataType] = (
    _trace_key_types
    | {
        "task": pl.String(),
        "shard": pl.Int32(),
        "seed": pl.Int64(),
        "status": pl.String(),  # "ok" or "error"
        "error": pl.String(),  # null when ok
        "prompt_tokens": pl.Int32(),
        "generated_tokens": pl.Int32(),
        "max_new_tokens": pl.Int32(),
        "stop_reason": pl.String(),  # "eos" or "length"; null on error
        "text": pl.String(),
        "cache_bytes_before": pl.Int64(),  # prompt cache, uncompressed, bytes really allocated
        "cache_bytes_after": pl.Int64(),  # the same cache after the press, masked entries excluded
        "kv_kept_bytes_mean": pl.Float64(),  # mean over the decode steps of this row
        "kv_masked_bytes_mean": pl.Float64(),  # allocated but hidden by a head-wise press
        "kv_padding_bytes_mean": pl.Float64(),  # allocated for this row, holding nothing
        "kv_allocated_bytes_peak": pl.Int64(),
        "prefill_seconds": pl.Float64(),
        "decode_seconds": pl.Float64(),  # this row's share of the batch's decode time
        "audit_seconds": pl.Float64(),
        "allocator_bytes_peak": pl.Int64(),  # of all tensors on the device; null if it does not say
    }
    | COSTS
    | PROBES
)

TOKENS: dict[str, pl.DataType] = _token_key_types | {"token_id": pl.Int32()} | SIGNALS | AUDIT

OUTCOMES: dict[str, pl.DataType] = _trace_key_types | {
    "task": pl.String(),
    "looping": pl.Boolean(),
    "looping_onset": pl.Int32(),
    "non_termination": pl.Boolean(),
    "non_termination_onset": pl.Int32(),
    "amnesia": pl.Boolean(),
    "amnesia_onset": pl.Int32(),
    "divergence": pl.Boolean(),  # a windowed LLR above detection.divergence_llr: quiet failure
    "divergence_onset": pl.Int32(),
    "catastrophe": pl.Boolean(),  # looping, non_termination or amnesia
    "onset": pl.Int32(),  # the earliest of their onsets; null without a catastrophe
    "first_rejected": pl.Int32(),  # first token the uncompressed model would not have chosen
    "max_windowed_llr": pl.Float64(),  # nats per token; null when shorter than a window
    "answer": pl.String(),  # canonical; null when none was found
    "answered": pl.Boolean(),
    "right": pl.Boolean(),  # no answer counts as wrong; null where the task has no right answer
    "agrees": pl.Boolean(),  # with the uncompressed run's final answer; null without that run
    "baseline_right": pl.Boolean(),  # the same of the uncompressed run
    "harmed": pl.Boolean(),  # right uncompressed, wrong now; see `harm`
    "rescued": pl.Boolean(),  # wrong uncompressed, right now
    "silent_harm": pl.Boolean(),  # harmed, ended by itself and does not loop
    "harm_onset": pl.Int32(),  # first token after which the uncompressed model cannot be right
}
"""One row per trace; every outcome is null for a trace whose status is "error"."""

HARM_ONSETS: dict[str, pl.DataType] = _trace_key_types | {"harm_onset": pl.Int32()}
"""One row per compressed trace, see `harm_onsets`; null where there is no harm."""

SPLITS: dict[str, pl.DataType] = {
    "prompt_id": pl.String(),
    "task": pl.String(),
    "template": pl.String(),  # prompts of one template are in one split; null: each by itself
    "split": pl.String(),
}
SPLIT_NAMES = ("train", "calibration", "test")

LABELS: dict[str, pl.DataType] = (
    _token_key_types
    | {f"steps_to_{target}": pl.Int32() for target in TARGETS}  # onset - position; null: no onset
    | {f"hazard_{target}": pl.Boolean() for target in TARGETS}  # 0 <= onset - position < horizon
    | {f"post_onset_{target}": pl.Boolean() for target in TARGETS}  # position >= onset
)

BASE_SIGNALS: tuple[str, ...] = (*SIGNALS, "repeated_ngram")
"""The 29 base signals; ``repeated_ngram`` comes from the token ids, the rest from the logits."""

FEATURE_NAMES: tuple[str, ...] = (
    *BASE_SIGNALS,
    *(
        f"{signal}_{statistic}_8"
        for signal in ("entropy", "top1_probability", "alternatives_entropy", "entropy_delta")
        for statistic in ("mean", "std")
    ),
    "repetition_sum",
    "relative_position",  # position / max_new_tokens, never the final length
    "compression_ratio",
    "entropy_mean",  # over all tokens of the request so far
    "entropy_max",
    "top1_probability_mean",
    "runner_up_probability_mean",  # of the second to fifth choice together
    *PROBE_NAMES,
)
"""The features, in the order in which a predictor expects them; probes are the request's own."""

EVIDENCE_NAMES: tuple[str, ...] = (
    "rejections",  # tokens that checks of this request have rejected so far
    "verified_llr_last",  # nats: `llr` of the newest token that a check has accepted
    "verified_llr_max",  # of all that checks have accepted
    "verified_llr_mean",
    "tokens_since_check",  # generated since the last check, this one included
)
"""Features that exist where a request is checked on the way (`evidence`), behind the others. They
are no columns of FEATURES: a stored trace was never checked."""

COLUMN_NAMES: tuple[str, ...] = (*FEATURE_NAMES, *EVIDENCE_NAMES)
"""What a predictor may read."""

GATE_FEATURES: tuple[str, ...] = (*PROBE_NAMES, "compression_ratio")
"""The features that are known before the first token: what a gate reads."""

FEATURE_VERSION = 2
"""Raise it when any feature's meaning changes: a predictor refuses another version's features."""

FEATURES: dict[str, pl.DataType] = _token_key_types | {name: pl.Float32() for name in FEATURE_NAMES}

PREDICTIONS: dict[str, pl.DataType] = _token_key_types | {
    "split": pl.String(),
    "target": pl.String(),
    "hazard": pl.Float32(),  # calibrated probability that the onset lies within the horizon
}

TIMELINE: dict[str, pl.DataType] = _token_key_types | {
    "token_id": pl.Int32(),
    "token_text": pl.String(),
    "entropy": pl.Float32(),
    "chosen_logprob": pl.Float32(),
    "llr": pl.Float32(),  # null: not audited
    "audit_is_argmax": pl.Boolean(),
    "hazard": pl.Float32(),  # null: no prediction
    "mode": pl.Int8(),  # controller.Mode after the token; null: no prediction in the whole trace
}

RUNS: dict[str, pl.DataType] = _trace_key_types | {
    "task": pl.String(),
    "policy": pl.String(),  # a name of config_policies.POLICIES
    "source": pl.String(),  # "live" or "simulation"
    "shard": pl.Int32(),
    "status": pl.String(),
    "error": pl.String(),
    "stop_reason": pl.String(),  # "eos", "length" or "stopped" (a policy ended the request)
    "text": pl.String(),
    "token_ids": pl.List(pl.Int32()),
    "generated_tokens": pl.Int32(),
    "alarmed": pl.Boolean(),
    "alarm_steps": pl.List(pl.Int32()),  # generated tokens in the row when SAFE was entered
    "rewound_to": pl.List(pl.Int32()),  # tokens kept by each rewind
    "unrecoverable": pl.Int32(),  # rewinds that reached behind the tokens already released
    "answer": pl.String(),
    "right": pl.Boolean(),
    "agrees": pl.Boolean(),
    "baseline_right": pl.Boolean(),
    "harmed": pl.Boolean(),
    "rescued": pl.Boolean(),
    "silent_harm": pl.Boolean(),
    "looping": pl.Boolean(),
    "non_termination": pl.Boolean(),
    "amnesia": pl.Boolean(),  # null where the final tokens were not audited
    "catastrophe": pl.Boolean(),
    "start_ratio": pl.String(),  # that `ladder` chose; null: not asked, or not known
    "prompt_tokens": pl.Int32(),
    "cache_bytes_before": pl.Int64(),  # prompt cache, uncompressed; as in TRACES
    **COSTS,
}
"""One row per (trace, policy): the live experiment and its offline simulation share it."""

CERTIFYING_RUNS: dict[str, pl.DataType] = RUNS | {"harm_price": pl.Float64()}
"""Live runs of ``guard_price`` on prompts that certify prices: each at its price."""

LATER_COLUMNS = ("start_ratio", "prompt_tokens", "cache_bytes_before")
"""Columns that files of earlier versions do not have: null there."""


class SchemaError(ValueError):
    """A table that does not have the columns or types that its schema declares."""


def check(frame: pl.DataFrame, schema: Mapping[str, pl.DataType], table: str) -> pl.DataFrame:
    """Return ``frame`` with the schema's column order, or raise.

    Raises:
        SchemaError: names the table, and each column that is missing, unexpected or mistyped.
    """
    later = [name for name in LATER_COLUMNS if name in schema and name not in frame.columns]
    frame = frame.with_columns(pl.lit(None, schema[name]).alias(name) for name in later)
    problems = [f"column {name!r} is missing" for name in schema if name not in frame.columns]
    problems += [f"column {name!r} is not expected" for name in frame.columns if name not in schema]
    problems += [
        f"column {name!r} has type {frame.schema[name]}, expected {expected}"
        for name, expected in schema.items()
        if name in frame.columns and frame.schema[name] != expected
    ]
    if problems:
        raise SchemaError(f"table {table!r}: " + "; ".join(problems))
    return frame.select(list(schema))


def write_table(
    frame: pl.DataFrame, path: str | Path, schema: Mapping[str, pl.DataType] | None = None
) -> None:
    """Check ``frame`` against ``schema`` and write it as Parquet, all or nothing.

    The digest of the values without timings is recorded beside it: that of two runs is the same.

    Args:
        frame: the table.
        path: target; its folder is made.
        schema: declared columns and types; None writes a derived table as it is.

    Raises:
        SchemaError: the frame does not match; nothing is written.
    """
    path = Path(path)
    if schema is not None:
        frame = check(frame, schema, path.stem)
    with atomic_path(path, values_digest(frame)) as temporary:
        frame.write_parquet(temporary, compression="zstd")


def values_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a table's values, without the columns that no two runs share (`TIMINGS`)."""
    kept = [name for name in frame.columns if not TIMINGS.search(name)]
    buffer = io.BytesIO()  # as Parquet, whose bytes do not depend on how a frame lies in memory
    frame.select(kept).rechunk().write_parquet(buffer, compression="uncompressed")
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def read_table(path: str | Path, schema: Mapping[str, pl.DataType] | None = None) -> pl.DataFrame:
    """Read one Parquet file and check it against ``schema``.

    Raises:
        FileNotFoundError: names the path and the command that would make it.
        DamagedFile: the file is not what was written, or no Parquet; says how to heal it.
        SchemaError: the file does not match.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}; `snakemake {path}` makes it")
    check_file(path)
    try:
        frame = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DamagedFile(path, error) from error
    return frame if schema is None else check(frame, schema, path.stem)


def order_by_trace(tokens: pl.DataFrame) -> tuple[pl.DataFrame, NDArray[np.int64]]:
    """Put token rows trace by trace, in order of position, and say where each trace starts.

    Args:
        tokens: any table with the columns `TOKEN_KEYS`; left as it is when already in order.

    Returns:
        The rows in order, and offsets (traces + 1,): trace i owns rows offsets[i]:offsets[i + 1].

    Raises:
        ValueError: a trace's positions do not count 0, 1, 2, ...; names the trace.
    """
    offsets = trace_offsets(tokens)
    if offsets is None:
        tokens = tokens.sort(TOKEN_KEYS)
        offsets = trace_offsets(tokens)
    if offsets is None:
        gap = tokens.filter(
            pl.col("position") != pl.int_range(pl.len(), dtype=pl.Int32).over(TRACE_KEYS)
        )
        raise ValueError(f"positions of a trace must count 0, 1, 2, ...: {gap.row(0, named=True)}")
    return tokens, offsets


def trace_offsets(tokens: pl.DataFrame) -> NDArray[np.int64] | None:
    """Offsets as `order_by_trace`, or None where rows are out of order.

    The keys may be of any type: codes that are equal where the names are will do.
    """
    changed = pl.any_horizontal(
        pl.col(name).ne_missing(pl.col(name).shift()) for name in TRACE_KEYS
    )
    start = tokens.select(changed.alias("start"))["start"].to_numpy().copy()
    start[:1] = True
    offsets = np.append(np.flatnonzero(start), tokens.height).astype(np.int64)
    expected = np.arange(tokens.height) - np.repeat(offsets[:-1], np.diff(offsets))
    in_order = np.array_equal(tokens["position"].to_numpy(), expected)
    unique = tokens[offsets[:-1]].select(TRACE_KEYS).n_unique() == len(offsets) - 1
    return offsets if in_order and unique else None


def conform(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Cast ``frame``'s columns to the schema's types and put them in its order.

    Columns that the schema does not know are dropped; a missing one raises in `check`.
    """
    present = [pl.col(name).cast(kind) for name, kind in schema.items() if name in frame.columns]
    return frame.select(present)

"""Which generated answers went wrong, how, and at which token: token ids and audit -> outcomes.

Every definition has one kernel that works on many traces laid end to end; `detect_all` gives it
one trace and `detect_outcomes` a whole run. Nothing here needs the model, so that a changed
parameter of `config.Detection` costs no generation.

A definition's details, where more than one reading is possible:

- Occurrences of a loop's window may overlap: one token repeated 22 times holds its 20-token window
  three times, and is a loop. The onset is the earliest second occurrence of any window that occurs
  often enough.
- A windowed log-likelihood ratio (LLR) belongs to a whole window: an answer shorter than the window
  has none, and counts as not amnesic.
- A task whose answers are judged by instructions brings its own check of amnesia; elsewhere it is
  read off the LLR.
- Without an audit, amnesia and divergence are null, and ``catastrophe`` covers looping and
  non-termination alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from kvguard import schema
from kvguard.config import BASELINE, Detection
from kvguard.harm import judge_harm
from kvguard.schema import CATASTROPHES
from kvguard.tasks import INSTRUCTION_KINDS, verify

DETECTION_COLUMNS = (*schema.TOKEN_KEYS, "token_id", "audit_gap", "llr")
"""Columns of the tokens table that `detect_outcomes` reads."""


class Answers(NamedTuple):
    """What a run generated, as far as detection reads it."""

    prompts: pl.DataFrame
    traces: pl.DataFrame
    tokens: pl.DataFrame


def read_answers(
    prompts: str | Path, traces: Sequence[str | Path], tokens: Sequence[str | Path]
) -> Answers:
    """Read the files of a run: prompts, all shards of traces and of tokens."""
    return Answers(
        schema.read_table(prompts, schema.PROMPTS),
        pl.read_parquet(list(map(Path, traces)), hive_partitioning=False),
        pl.read_parquet(
            list(map(Path, tokens)), columns=list(DETECTION_COLUMNS), hive_partitioning=False
        ),
    )


class Detections(BaseModel):
    """What was found in one answer. Onsets count generated tokens from 0; null: none found."""

    model_config = ConfigDict(frozen=True)

    looping: bool
    looping_onset: int | None
    non_termination: bool
    non_termination_onset: int | None
    amnesia: bool | None
    amnesia_onset: int | None
    divergence: bool | None
    divergence_onset: int | None
    catastrophe: bool
    onset: int | None
    first_rejected: int | None
    max_windowed_llr: float | None


def detect_all(
    token_ids: Sequence[int] | NDArray[np.integer[Any]],
    *,
    stop_reason: str,
    max_new_tokens: int,
    llr: ArrayLike | None,
    detection: Detection,
    audit_gap: ArrayLike | None = None,
) -> Detections:
    """Find every kind of failure in one generated answer.

    Args:
        token_ids: (t,) generated token ids.
        stop_reason: "eos" when the answer ended by itself; what runs out or is stopped did not.
        max_new_tokens: the most tokens that the answer could have had.
        llr: (t,) nats, compressed minus uncompressed log-probability of each token; None: no audit.
        detection: thresholds and window lengths.
        audit_gap: (t,) nats by which the uncompressed model prefers its own token; None: no audit.

    Raises:
        ValueError: an audit of another length than the answer.
    """
    tokens = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    found = _detect(
        tokens,
        np.array([0, len(tokens)]),
        np.array([stop_reason != "eos"]),
        np.array([max_new_tokens]),
        _audited(llr, len(tokens), "llr"),
        _audited(audit_gap, len(tokens), "audit_gap"),
        detection,
    )
    return Detections(**found.row(0, named=True))


def detect_outcomes(
    prompts: pl.DataFrame,
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    detection: Detection,
    onsets: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Judge every trace of a run: one row of `schema.OUTCOMES` per row of ``traces``.

    Args:
        prompts: `schema.PROMPTS`, for the reference answers.
        traces: `schema.TRACES`; a trace whose status is "error" gets nulls.
        tokens: at least `DETECTION_COLUMNS` of `schema.TOKENS`, of all those traces.
        detection: thresholds and window lengths.
        onsets: `schema.HARM_ONSETS`; None leaves the onset of harm null.

    Raises:
        ValueError: tokens and traces do not belong together, or a prompt is not known.
    """
    strangers = traces.join(prompts, on="prompt_id", how="anti")
    if strangers.height:
        raise ValueError(f"prompt_id {strangers['prompt_id'][0]!r} is not among the prompts")
    tokens, offsets = schema.order_by_trace(tokens.select(DETECTION_COLUMNS))
    finished, offsets = _match(traces, tokens, offsets)
    found = _detect(
        tokens["token_id"].to_numpy(),
        offsets,
        (finished["stop_reason"] != "eos").to_numpy(),  # a stop cures nothing
        finished["max_new_tokens"].to_numpy(),
        tokens["llr"].cast(pl.Float64).to_numpy(),
        tokens["audit_gap"].cast(pl.Float64).to_numpy(),
        detection,
    )
    judged = (
        finished.select(*schema.TRACE_KEYS)
        .with_columns(*found, *judge_answers(prompts, finished))
        .with_columns(answered=pl.col("answer").is_not_null())
    )
    outcomes = traces.select(*schema.TRACE_KEYS, "task").join(
        judged, on=schema.TRACE_KEYS, how="left", maintain_order="left"
    )
    outcomes = outcomes.with_columns(agrees=agreement(outcomes, outcomes))
    outcomes = outcomes.with_columns(judge_harm(outcomes, outcomes))
    if onsets is None:
        onsets = pl.DataFrame(schema=schema.HARM_ONSETS)
    outcomes = outcomes.join(onsets, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    # a task without right answers: an answer that loops and ends as the uncompressed one
    looped = pl.when(pl.col("right").is_null()).then("looping_onset")
    outcomes = outcomes.with_columns(
        harm_onset=pl.when("harmed").then(pl.coalesce("harm_onset", looped))
    )
    outcomes = judge_instructions(outcomes, prompts)
    return schema.check(schema.conform(outcomes, schema.OUTCOMES), schema.OUTCOMES, "outcomes")


def judge_answers(prompts: pl.DataFrame, texts: pl.DataFrame) -> pl.DataFrame:
    """The answer of each text, and whether it is right, by its task's own verifier.

    Args:
        prompts: `schema.PROMPTS`.
        texts: with ``prompt_id`` and ``text``; a null text is not judged.

    Returns:
        ``answer`` and ``right``, one row per row of ``texts``; ``right`` is null where the task
        has no right answer.
    """
    judged = {
        prompt_id: (kind, spec)
        for prompt_id, kind, spec in prompts.select("prompt_id", "kind", "spec").iter_rows()
    }
    verdicts = [
        (None, None) if text is None else verify(*judged[prompt_id], text)[2:0:-1]
        for prompt_id, text in texts.select("prompt_id", "text").iter_rows()
    ]
    types = {name: schema.OUTCOMES[name] for name in ("answer", "right")}
    return pl.DataFrame(verdicts, schema=types, orient="row")


def judge_instructions(outcomes: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Replace amnesia by the task's own check where a task's answers are judged by instructions.

    There an answer is amnesic where the uncompressed one obeys and this one does not, from the
    violating token on, whatever the log-likelihood ratio says.

    Args:
        outcomes: with ``harmed`` and, where it is known, ``harm_onset``.
        prompts: `schema.PROMPTS`.
    """
    checked = prompts.filter(pl.col("kind").is_in(INSTRUCTION_KINDS))["prompt_id"].to_list()
    own = pl.col("prompt_id").is_in(checked)
    onset = pl.col("harm_onset") if "harm_onset" in outcomes.columns else pl.lit(None, pl.Int32)
    return outcomes.with_columns(
        amnesia=pl.when(own).then("harmed").otherwise("amnesia"),
        amnesia_onset=pl.when(own).then(onset).otherwise("amnesia_onset"),
    ).with_columns(
        catastrophe=pl.when(own)
        .then(pl.any_horizontal(pl.col(CATASTROPHES).fill_null(False)))
        .otherwise("catastrophe"),
        onset=pl.when(own)
        .then(pl.min_horizontal([f"{kind}_onset" for kind in CATASTROPHES]))
        .otherwise("onset"),
    )


def agreement(answers: pl.DataFrame, outcomes: pl.DataFrame) -> pl.Series:
    """Whether each answer is the one that the uncompressed run gave to the same prompt.

    Two runs without an answer agree only if neither looped nor ran out of tokens: silence that
    comes from breaking down is not agreement.

    Args:
        answers: one row per answer, with model, press, prompt_id, answer, looping, non_termination;
            looping is null where there is nothing to compare.
        outcomes: `schema.OUTCOMES`, or any table with those columns that holds the baseline's rows.

    Returns:
        (rows,) Boolean; null where either of the two is missing, true for the baseline's own rows.
    """
    baseline = outcomes.filter(pl.col("press") == BASELINE).select(
        "model",
        "prompt_id",
        baseline_answer="answer",
        baseline_broken=pl.col("looping") | pl.col("non_termination"),
    )
    broken = pl.col("looping") | pl.col("non_termination")
    silent = pl.col("answer").is_null() & pl.col("baseline_answer").is_null()
    return (
        answers.select("model", "press", "prompt_id", "answer", "looping", "non_termination")
        .join(baseline, on=["model", "prompt_id"], how="left", maintain_order="left")
        .select(
            agrees=pl.when(broken.is_null() | pl.col("baseline_broken").is_null())
            .then(None)
            .when(pl.col("press") == BASELINE)
            .then(True)
            .when(silent)
            .then(~broken & ~pl.col("baseline_broken"))
            .otherwise(pl.col("answer").eq_missing(pl.col("baseline_answer")))
        )
        .to_series()
    )


def loop_onsets(
    token_ids: NDArray[np.integer[Any]],
    offsets: NDArray[np.integer[Any]],
    window_tokens: int,
    repeats: int,
) -> NDArray[np.int64]:
    """Find in each trace a window of tokens that occurs at least ``repeats`` times.

    Windows are compared exactly: ranks of windows are paired up to ranks of windows twice as long
    (prefix doubling), so that two windows share a rank only if all their tokens are equal.

    Args:
        token_ids: (n,) ids of all traces, end to end.
        offsets: (traces + 1,) where each trace starts, and n.
        window_tokens: length of a window.
        repeats: occurrences that make a loop; they may overlap.

    Returns:
        (traces,) start of the earliest second occurrence within the trace; -1 without a loop.
    """
    lengths = np.diff(offsets)
    onsets = np.full(len(lengths), -1, dtype=np.int64)
    if len(token_ids) < window_tokens:
        return onsets
    trace = np.repeat(np.arange(len(lengths)), lengths)
    # Tokens of two traces never share a rank, so that no window that crosses a border repeats.
    rank = _rank(trace * (int(token_ids.max()) + 1) + token_ids)
    span = 1
    while span < window_tokens:
        step = min(span, window_tokens - span)
        rank = _rank(rank[:-step] * (int(rank.max()) + 1) + rank[step:])
        span += step
    order = np.argsort(rank, kind="stable")
    count = np.bincount(rank)
    first = np.cumsum(count) - count
    second = order[first[count >= repeats] + 1]
    nearest_last = np.sort(second)[::-1]
    onsets[trace[nearest_last]] = nearest_last - offsets[:-1][trace[nearest_last]]
    return onsets


def windowed_means(values: NDArray[np.floating[Any]], window_tokens: int) -> NDArray[np.float64]:
    """Mean over each run of ``window_tokens`` values; entry i covers i to i + window_tokens - 1.

    Each mean is summed by itself in one fixed order: it does not depend on what lies around it.
    """
    if len(values) < window_tokens:
        return np.empty(0)
    total = np.zeros(len(values) - window_tokens + 1)
    for lag in range(window_tokens):
        total += values[lag : lag + len(total)]
    return total / window_tokens


def _rank(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse: NDArray[np.int64] = np.unique(keys, return_inverse=True)[1]
    return inverse


def _audited(values: ArrayLike | None, length: int, name: str) -> NDArray[np.float64]:
    if values is None:
        return np.full(length, np.nan)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), like token_ids, got {array.shape}")
    return array


def _match(
    traces: pl.DataFrame, tokens: pl.DataFrame, offsets: NDArray[np.int64]
) -> tuple[pl.DataFrame, NDArray[np.int64]]:
    """The traces that are ok, in the order of their tokens, and matching offsets."""
    ok = traces.filter(pl.col("status") == "ok")
    keys = tokens[offsets[:-1]].select(schema.TRACE_KEYS)
    keys = keys.with_columns(pl.Series("token_rows", np.diff(offsets)))
    matched = keys.join(ok, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    if matched["status"].null_count():
        stranger = matched.filter(pl.col("status").is_null()).row(0)[: len(schema.TRACE_KEYS)]
        raise ValueError(f"tokens without a trace whose status is 'ok': {stranger}")
    empty = ok.join(keys, on=schema.TRACE_KEYS, how="anti").with_columns(
        token_rows=pl.lit(0, dtype=pl.Int64)
    )
    matched = pl.concat([matched, empty.select(matched.columns)])
    wrong = matched.filter(pl.col("token_rows").ne_missing(pl.col("generated_tokens")))
    if wrong.height:
        row = wrong.row(0, named=True)
        raise ValueError(
            f"generated_tokens is {row['generated_tokens']}, but there are {row['token_rows']} "
            f"token rows, for {tuple(row[key] for key in schema.TRACE_KEYS)}"
        )
    return matched, np.append(offsets, np.full(empty.height, offsets[-1]))


def _detect(
    token_ids: NDArray[np.integer[Any]],
    offsets: NDArray[np.int64],
    ran_out: NDArray[np.bool_],
    max_new_tokens: NDArray[np.integer[Any]],
    llr: NDArray[np.float64],
    audit_gap: NDArray[np.float64],
    detection: Detection,
) -> pl.DataFrame:
    """All kinds of failure of traces laid end to end: the middle columns of `schema.OUTCOMES`."""
    lengths = np.diff(offsets)
    trace = np.repeat(np.arange(len(lengths)), lengths)
    # The first token at or past the share; 1e-9 keeps 0.7 x 10 at 7.
    proxy = np.ceil(detection.non_termination_onset * max_new_tokens - 1e-9).astype(np.int64)
    proxy = np.maximum(np.minimum(proxy, lengths - 1), 0)
    looping = loop_onsets(token_ids, offsets, detection.loop_window_tokens, detection.loop_repeats)
    unaudited = np.bincount(trace[np.isnan(llr)], minlength=len(lengths)) > 0
    amnesia_means = windowed_means(llr, detection.amnesia_window_tokens)
    divergence_means = windowed_means(llr, detection.divergence_window_tokens)
    found = {
        "looping": looping,
        "non_termination": np.where(ran_out, proxy, -1),
        "amnesia": _first(amnesia_means >= detection.amnesia_llr, offsets, trace),
        "divergence": _first(divergence_means >= detection.divergence_llr, offsets, trace),
    }
    frame = pl.DataFrame(
        {
            f"{kind}_onset": pl.Series(onset, dtype=pl.Int32).replace(-1, None)
            for kind, onset in found.items()
        }
        | {
            "first_rejected": pl.Series(
                _first(audit_gap > detection.rejection_margin_nats, offsets, trace), dtype=pl.Int32
            ).replace(-1, None),
            "max_windowed_llr": pl.Series(_largest(amnesia_means, offsets, trace)).fill_nan(None),
            "audited": ~unaudited,
        }
    )
    return (
        frame.with_columns(pl.col(f"{kind}_onset").is_not_null().alias(kind) for kind in found)
        .with_columns(
            pl.when("audited").then(name).alias(name)
            for name in ("amnesia", "amnesia_onset", "divergence", "divergence_onset")
        )
        .with_columns(
            catastrophe=pl.any_horizontal(pl.col(CATASTROPHES).fill_null(False)),
            onset=pl.min_horizontal([f"{kind}_onset" for kind in CATASTROPHES]),
        )
        .select(list(Detections.model_fields))
    )


def _first(
    found: NDArray[np.bool_], offsets: NDArray[np.int64], trace: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(traces,) the first position at which ``found`` holds in each trace; -1 for none.

    ``found`` may be shorter than the tokens: entry i then speaks of a window that starts at i, and
    counts only where the window ends within the trace.
    """
    window = len(trace) - len(found) + 1
    first = np.full(len(offsets) - 1, -1, dtype=np.int64)
    hits = np.flatnonzero(found)
    hits = hits[hits + window <= offsets[1:][trace[hits]]][::-1]
    first[trace[hits]] = hits - offsets[:-1][trace[hits]]
    return first


def _largest(
    means: NDArray[np.float64], offsets: NDArray[np.int64], trace: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(traces,) the largest windowed mean within each trace; NaN where there is no whole window."""
    window = len(trace) - len(means) + 1
    start = np.arange(len(means))
    inside = start + window <= offsets[1:][trace[: len(means)]]
    largest = np.full(len(offsets) - 1, -np.inf)
    with np.errstate(invalid="ignore"):  # a trace without an audit is NaN, and says so
        np.maximum.at(largest, trace[: len(means)][inside], means[inside])
    return np.where(np.isneginf(largest), np.nan, largest)

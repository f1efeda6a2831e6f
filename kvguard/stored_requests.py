"""Requests that are already on disk, as arrays for the simulation."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.controller import NEVER
from kvguard.schema import TRACE_KEYS

NOWHERE = np.iinfo(np.int32).max
"""A position that no answer reaches."""

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class StoredRequests(NamedTuple):
    """Traces as arrays, longest answer first; N requests of at most T tokens.

    ``table`` has the columns of TRACES and OUTCOMES, and ``token_ids`` as lists.
    """

    table: pl.DataFrame
    failed: pl.DataFrame  # TRACES rows whose status is "error"
    token_ids: IntArray  # (N, T) padded with -1
    signals: NDArray[np.float32]  # (tokens, 28) of all requests, end to end
    offsets: NDArray[np.int64]  # (N,) where each request's signals start
    hazard: NDArray[np.float32]  # (N, T) padded with NaN
    lengths: IntArray  # (N,)
    baseline: NDArray[np.int64]  # (N,) row of the same prompt uncompressed; -1 where there is none
    first_rejected: IntArray  # (N,) where an exact REWIND cuts at the earliest; NOWHERE: nothing
    first_implausible: IntArray  # (N,) where a tolerant one finds a token implausible; or NOWHERE
    first_harmful_window: IntArray  # (N,) where its first harmful window starts; or NOWHERE
    first_difference: IntArray  # (N,) where the tokens leave the uncompressed answer; or NOWHERE;
    # -1 without one
    tolerance: config.Tolerance
    cold: bool  # checks read a cold cache and run the draft alone


def load_requests(
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    outcomes: pl.DataFrame,
    predictions: pl.DataFrame | None = None,
    *,
    target: str = "any",
    guard: config.GuardSettings | None = None,
    prompt_ids: Collection[str] | None = None,
) -> StoredRequests:
    """Arrange a run's tables for simulation.

    Args:
        traces: TRACES of all conditions, the baseline's too.
        tokens: TOKENS of those traces.
        outcomes: OUTCOMES of those traces.
        predictions: PREDICTIONS; None: no hazard, for policies that need none.
        target: the target whose hazard drives the guard.
        guard: its margin decides what is rejected, its tolerance where a tolerant check cuts, its
            cold cache what a check costs; None takes the defaults.
        prompt_ids: keep these prompts alone, e.g. the test split's; None keeps all.

    Raises:
        ValueError: no trace is left, or a trace has no tokens.
    """
    guard = guard or config.GuardSettings()
    if prompt_ids is not None:
        traces = traces.filter(pl.col("prompt_id").is_in(list(prompt_ids)))
    finished = traces.filter(pl.col("status") == "ok")
    if not finished.height:
        raise ValueError("no trace with status 'ok' among the given prompts")
    columns = (*schema.TOKEN_KEYS, "token_id", *schema.SIGNALS, "audit_gap", "audit_logprob", "llr")
    tokens = tokens.select(columns).join(
        finished.select(TRACE_KEYS), on=TRACE_KEYS, how="semi", maintain_order="left"
    )
    tokens, bounds = schema.order_by_trace(tokens)
    table = (
        tokens[bounds[:-1]]
        .select(TRACE_KEYS)
        .join(finished, on=TRACE_KEYS, how="left", maintain_order="left")
        .join(outcomes.drop("task"), on=TRACE_KEYS, how="left", maintain_order="left")
        .with_columns(row=pl.int_range(pl.len()))
    )
    if table.height != finished.height:
        missing = finished.join(table, on=TRACE_KEYS, how="anti").select(TRACE_KEYS).row(0)
        raise ValueError(f"no tokens for the trace {missing}")
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")

    def padded(values: NDArray[Any], fill: Any) -> NDArray[Any]:
        grid = np.full((len(lengths), int(lengths.max())), fill, values.dtype)
        grid[np.arange(grid.shape[1]) < lengths[:, None]] = values
        return grid[order]

    token_ids = padded(tokens["token_id"].to_numpy(), -1)
    gap = padded(tokens["audit_gap"].to_numpy().astype(np.float32), 0)
    audited = tokens["audit_gap"].is_not_null().to_numpy()
    hazard = np.full(tokens.height, np.nan, np.float32)
    if predictions is not None:
        hazard = (
            tokens.select(schema.TOKEN_KEYS)
            .join(
                predictions.filter(pl.col("target") == target),
                on=schema.TOKEN_KEYS,
                how="left",
                maintain_order="left",
            )["hazard"]
            .cast(pl.Float32)
            .to_numpy()
        )
    texts = tokens.group_by(TRACE_KEYS, maintain_order=True).agg(token_ids="token_id")
    table = table.with_columns(texts["token_ids"])[order].with_columns(row=pl.int_range(pl.len()))
    baseline = _baseline_rows(table)
    llr = tokens["llr"].cast(pl.Float32).fill_null(np.nan).to_numpy()
    logprob = padded(tokens["audit_logprob"].to_numpy().astype(np.float32), 0)
    differs = _first_true(token_ids != token_ids[baseline])
    rejected = _first_true(~(gap <= guard.margin_nats))
    rejected = np.where(padded(audited, True).all(axis=1), rejected, differs)
    return StoredRequests(
        table.drop("row"),
        traces.filter(pl.col("status") != "ok"),
        token_ids,
        tokens.select(pl.col(list(schema.SIGNALS)).cast(pl.Float32)).to_numpy(),
        bounds[:-1][order],
        padded(hazard, np.nan),
        lengths[order].astype(np.int32),
        baseline,
        rejected,
        _first_true(logprob < guard.tolerance.token_logprob),
        _first_true(_harmful_windows(padded(llr, np.nan), guard.tolerance)),
        np.where(baseline >= 0, differs, NEVER).astype(np.int32),
        guard.tolerance,
        guard.cold != "none",
    )


def _baseline_rows(table: pl.DataFrame) -> NDArray[np.int64]:
    """(N,) the row of the same model's and prompt's uncompressed trace; -1 where there is none."""
    own = table.filter(pl.col("press") == config.BASELINE).select(
        "model", "prompt_id", baseline="row"
    )
    found = table.join(own, on=["model", "prompt_id"], how="left", maintain_order="left")
    return found["baseline"].fill_null(-1).to_numpy().astype(np.int64)


def _harmful_windows(llr: NDArray[np.float32], tolerance: config.Tolerance) -> BoolArray:
    """(N, T) where a harmful window starts; NaN stands past the end and without an audit."""
    if llr.shape[1] < tolerance.window_tokens:
        return np.zeros(llr.shape, np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(llr, tolerance.window_tokens, axis=1)
    return np.asarray(windows.mean(axis=2) >= tolerance.window_llr)


def _first_true(found: BoolArray) -> IntArray:
    """(N,) the first column that holds in each row; NOWHERE where none does."""
    return np.where(found.any(axis=1), found.argmax(axis=1), NOWHERE).astype(np.int32)


def tied_requests(requests: StoredRequests) -> pl.DataFrame:
    """Keys of requests whose audit and uncompressed tokens disagree on the first difference.

    Either they tie numerically, or the premise of the rewind does not hold for them; a baseline
    that is missing counts too. Simulated outcomes of alarms in them may be null.
    """
    tied = requests.first_rejected != requests.first_difference
    return requests.table.filter(pl.Series(tied)).select(TRACE_KEYS)

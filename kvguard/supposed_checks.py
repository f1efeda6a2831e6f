"""Evidence of checks for stored traces, by supposing that they had been checked on the way.

From the audit of a trace it follows what a check of its first tokens would have said, up to the
first check that would have cut. From there on the trace is not what a guarded request would have
generated: its tokens get no evidence and are left out where a predictor with evidence is fitted or
measured. So what is learned speaks of requests whose checks were clean; `rejections` is 0 in all of
them and no fit can use it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.evidence import LIMIT_NATS, NEVER, UNITS, evidence_values, fixed_point
from kvguard.rows import Rows, as_bools

SCHEDULES = (1, 2, 4)
"""Supposed checks come every so many decisions of the guard; which of them, each request draws."""


def suppose_checks(
    tokens: pl.DataFrame | Sequence[Path],
    *,
    check_every_tokens: int,
    margin_nats: float,
    seed: int,
) -> pl.DataFrame:
    """The evidence that stored traces would have if they had been checked on the way.

    Each request is checked every m tokens, m one of `SCHEDULES` times ``check_every_tokens``, drawn
    by a hash of its keys and the seed.

    Args:
        tokens: `schema.TOKENS`, a frame or its files, with audits; whole traces.
        check_every_tokens: of the guard.
        margin_nats: a token this close to the uncompressed model's best counts as accepted.
        seed: of the draw.

    Returns:
        `schema.TOKEN_KEYS`, `schema.EVIDENCE_NAMES` (NaN: none), and ``supposed``: false where one
        of the checks so far would have cut, or the token was not audited.
    """
    columns = [*schema.TOKEN_KEYS, "llr", "audit_gap"]
    if isinstance(tokens, pl.DataFrame):
        frame = tokens.select(columns)
    else:
        frame = pl.scan_parquet(list(tokens), hive_partitioning=False).select(columns).collect()
    frame, offsets = schema.order_by_trace(frame)
    lengths = np.diff(offsets)
    keys = frame[offsets[:-1]].select(schema.TRACE_KEYS)
    every = np.array(
        [check_every_tokens * _draw(SCHEDULES, seed, row) for row in keys.iter_rows()], np.int64
    )
    start = np.repeat(offsets[:-1], lengths)
    position = np.arange(len(frame)) - start
    checked = position // np.repeat(every, lengths) * np.repeat(every, lengths)
    llr = frame["llr"].to_numpy()
    units = fixed_point(llr)
    running = np.cumsum(units)
    # one running maximum for all traces: each one's values lie above all those of the one before
    level = np.repeat(np.arange(len(lengths)), lengths) * np.int64(4 * LIMIT_NATS * UNITS)
    largest = np.maximum.accumulate(units + level) - level
    gap = frame["audit_gap"].to_numpy()
    failed = np.cumsum(~(gap <= margin_nats))  # as `audit.first_rejected`
    at = start + np.maximum(checked - 1, 0)  # the last token that the last check has seen
    before = np.where(start > 0, start - 1, 0)
    some = checked > 0
    total = running[at] - np.where(start > 0, running[before], 0)
    cut = failed[at] - np.where(start > 0, failed[before], 0)
    evidence = evidence_values(
        np.zeros(len(frame), np.int64),
        units[at],
        largest[at],
        total,
        np.where(some, checked, 0),
        np.where(some, checked, NEVER),
        position,
    )
    audited = ~np.isnan(llr.astype(np.float64))
    return frame.select(schema.TOKEN_KEYS).with_columns(
        *(
            pl.Series(name, column)
            for name, column in zip(schema.EVIDENCE_NAMES, evidence.T, strict=True)
        ),
        supposed=pl.Series(audited & (~some | (cut == 0))),
    )


def evidence_of(
    tokens: Sequence[str | Path], guard: Mapping[str, Any], seed: int
) -> pl.DataFrame | None:
    """`suppose_checks` as a guard with these settings would check; None without tokens.

    Args:
        tokens: files of `schema.TOKENS`.
        guard: `config.GuardSettings` as built-ins.
        seed: of the experiment.
    """
    if not tokens:
        return None
    return suppose_checks(
        [Path(file) for file in tokens],
        check_every_tokens=guard["check_every_tokens"],
        margin_nats=guard["margin_nats"],
        seed=seed,
    )


def _draw(values: Sequence[int], seed: int, keys: tuple[Any, ...]) -> int:
    text = " ".join(map(str, (seed, *keys)))
    return values[int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % len(values)]


def rows_with_evidence(rows: Rows, evidence: pl.DataFrame) -> Rows:
    """The tokens whose supposed checks cut nothing, evidence behind their features.

    Args:
        rows: tokens, (n, features).
        evidence: of `suppose_checks`, for all of their traces.
    """
    found = (
        rows.keys.select(schema.TOKEN_KEYS)
        .cast({pl.Categorical: pl.String})
        .join(evidence, on=schema.TOKEN_KEYS, how="left", maintain_order="left")
    )
    columns = found.select(schema.EVIDENCE_NAMES).to_numpy().astype(np.float32)
    joined = np.concatenate([rows.features, columns], axis=1)
    return Rows(rows.keys, joined).take(as_bools(found["supposed"]))

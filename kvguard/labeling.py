"""Hazard labels: how far each token is from the onset of what a predictor is trained to foresee.

A label speaks of one target of `schema.TARGETS`. ``any`` is the earliest of looping,
non-termination and amnesia. Where a target was never judged (no audit: no amnesia, no divergence)
its labels are null, not false. So are those of ``harm`` where the request was never at risk,
because its uncompressed run is wrong or failed itself, and where its onset was not found.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from kvguard import schema
from kvguard.config import Labels
from kvguard.harm import at_risk

_OUTCOME_OF = {target: target for target in schema.TARGETS} | {
    "any": "catastrophe",
    "harm": "harm_judged",
}
_ONSET_OF = {target: f"{target}_onset" for target in schema.TARGETS} | {"any": "onset"}


def label_tokens(tokens: pl.DataFrame, outcomes: pl.DataFrame, labels: Labels) -> pl.DataFrame:
    """Label every token for every target.

    Args:
        tokens: at least the columns `schema.TOKEN_KEYS`.
        outcomes: `schema.OUTCOMES`, of all traces that the tokens belong to.
        labels: the horizon: a hazard lies at most that many tokens ahead.

    Returns:
        `schema.LABELS`, one row a token in the order of ``tokens``. ``hazard_*`` is true where
        0 <= onset - position < horizon, ``post_onset_*`` where position >= onset.

    Raises:
        ValueError: a token's trace has no outcome.
    """
    keys = tokens.select(schema.TOKEN_KEYS)
    strangers = keys.join(outcomes, on=schema.TRACE_KEYS, how="anti")
    if strangers.height:
        raise ValueError(f"tokens of a trace without an outcome: {strangers.row(0)[:-1]}")
    return schema.check(_label(keys.lazy(), outcomes, labels).collect(), schema.LABELS, "labels")


def build_labels(
    token_paths: Sequence[str | Path],
    outcomes: pl.DataFrame,
    labels: Labels,
    target: str | Path,
) -> None:
    """Label the tokens of many files into one, without holding them in memory.

    Args:
        token_paths: Parquet files of `schema.TOKENS`.
        outcomes: `schema.OUTCOMES`, of all their traces.
        labels: see `label_tokens`.
        target: the file to write (`schema.LABELS`), rows in the order of ``token_paths``.

    Raises:
        ValueError: a token's trace has no outcome; nothing is written.
    """
    files = [Path(path) for path in token_paths]
    tokens = pl.scan_parquet(files, hive_partitioning=False).select(schema.TOKEN_KEYS)
    strangers = tokens.join(outcomes.lazy(), on=schema.TRACE_KEYS, how="anti").head(1).collect()
    if strangers.height:
        raise ValueError(f"tokens of a trace without an outcome: {strangers.row(0)[:-1]}")
    with schema.atomic_path(target) as temporary:
        _label(tokens, outcomes, labels).sink_parquet(temporary, compression="zstd")


def _label(keys: pl.LazyFrame, outcomes: pl.DataFrame, labels: Labels) -> pl.LazyFrame:
    columns = set(_OUTCOME_OF.values()) | set(_ONSET_OF.values())
    # true or false where the onset of harm, or its absence, says something about compression
    judged_harm = pl.col("at_risk") & (pl.col("harmed") == pl.col("harm_onset").is_not_null())
    known = (
        outcomes.lazy()
        .with_columns(at_risk=at_risk(outcomes))
        .with_columns(harm_judged=pl.when(judged_harm).then("harmed"))
        .select(*schema.TRACE_KEYS, *sorted(columns))
    )
    steps = {target: pl.col(_ONSET_OF[target]) - pl.col("position") for target in schema.TARGETS}
    expressions = [pl.col(schema.TOKEN_KEYS)]
    for target, distance in steps.items():
        judged = pl.when(pl.col(_OUTCOME_OF[target]).is_not_null())
        ahead = distance.is_between(0, labels.horizon_tokens, closed="left")
        expressions += [
            distance.alias(f"steps_to_{target}"),
            judged.then(ahead.fill_null(False)).alias(f"hazard_{target}"),
            judged.then((distance <= 0).fill_null(False)).alias(f"post_onset_{target}"),
        ]
    labelled = keys.join(known, on=schema.TRACE_KEYS, how="left", maintain_order="left")
    return labelled.select(expressions).select(list(schema.LABELS))

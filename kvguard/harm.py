"""Harm: what compression broke that the uncompressed model had right.

A request is *harmed* where the uncompressed model's answer is right and this one is wrong. For a
task without right answers it is harmed where the uncompressed run did not fail and this one failed
or gave another final answer. *Rescued* is the reverse: the uncompressed answer is wrong (without
right answers: its run failed) and this one is right (did not fail). Harm is *silent* where the
request ended by itself and does not loop: the finished text does not show the failure.

What goes wrong without compression is not harm, and teaches a predictor nothing about it: a request
whose uncompressed run is wrong or failed is not at risk.
"""

import polars as pl

from kvguard.config import BASELINE

HARM_COLUMNS = ("baseline_right", "harmed", "rescued", "silent_harm")
"""What `judge_harm` says of each answer, beside ``right``."""


def judge_harm(answers: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """Compare each answer with the uncompressed run's answer to the same prompt.

    Args:
        answers: one row per answer, with model, prompt_id, ``right`` (null: the task has no right
            answer, or nobody judged it), ``agrees``, ``looping``, ``non_termination`` and
            ``amnesia``; ``stop_reason`` where a policy may have ended the request.
        outcomes: `schema.OUTCOMES`, or any table with those columns that holds the baseline's rows.

    Returns:
        `HARM_COLUMNS`, Boolean, in the order of ``answers``; null where either run is unknown.
    """
    failed = pl.col("looping") | pl.col("non_termination") | pl.col("amnesia").fill_null(False)
    baseline = outcomes.filter(pl.col("press") == BASELINE).select(
        "model", "prompt_id", baseline_right="right", baseline_failed=failed
    )
    by_itself = ~pl.col("non_termination")
    if "stop_reason" in answers.columns:
        by_itself = pl.col("stop_reason") == "eos"
    judged = pl.col("right").is_not_null() & pl.col("baseline_right").is_not_null()
    harmed = (
        pl.when(judged)
        .then(pl.col("baseline_right") & ~pl.col("right"))
        .otherwise(~pl.col("baseline_failed") & (~pl.col("agrees") | pl.col("failed")))
    )
    rescued = (
        pl.when(judged)
        .then(~pl.col("baseline_right") & pl.col("right"))
        .otherwise(pl.col("baseline_failed") & ~pl.col("failed"))
    )
    # of a task with right answers, one verdict is missing: not a task without them
    known = pl.col("right").is_null() == pl.col("baseline_right").is_null()
    return (
        answers.with_columns(failed=failed, by_itself=by_itself)
        .select("model", "prompt_id", "right", "agrees", "looping", "failed", "by_itself")
        .join(baseline, on=["model", "prompt_id"], how="left", maintain_order="left")
        .with_columns(harmed=pl.when(known).then(harmed), rescued=pl.when(known).then(rescued))
        .with_columns(
            silent_harm=pl.when(pl.col("harmed").is_not_null()).then(
                pl.col("harmed") & pl.col("by_itself") & ~pl.col("looping")
            )
        )
        .select(HARM_COLUMNS)
    )


def at_risk(outcomes: pl.DataFrame) -> pl.Series:
    """Whether each request could be harmed: its uncompressed run is right, or did not fail.

    Args:
        outcomes: `schema.OUTCOMES` with the baseline's rows.

    Returns:
        (rows,) Boolean; null where the uncompressed run is unknown.
    """
    baseline = outcomes.filter(pl.col("press") == BASELINE).select(
        "model", "prompt_id", failed="catastrophe"
    )
    return (
        outcomes.select("model", "prompt_id", "baseline_right")
        .join(baseline, on=["model", "prompt_id"], how="left", maintain_order="left")
        .select(risk=pl.coalesce("baseline_right", ~pl.col("failed")))
        .to_series()
    )

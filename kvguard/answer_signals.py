"""Signals of an answer beyond `features`: levels to compare with, lines, copied words.

For the analysis in `signal_study` alone. They are computed from TOKENS, are no columns of FEATURES
and no predictor of the live guard reads them: some need the task, the question's tokens, or answers
of other prompts.

- ``entropy_excess``, ``entropy_excess_mean``: entropy minus its level in uncompressed answers to
  the same task at the same position, at this token and as a running mean. Past the longest of those
  answers, and for a task without them, undefined.
- ``entropy_line_mean``: mean entropy since the last line break, the break's own token included in
  the line that it ends.
- ``runner_up``, ``runner_up_mean``: probability of the second choice, at this token and as a
  running mean.
- ``entropy_copied_mean``: running mean of the entropy over tokens that stand, behind the same
  token as here, in the question too.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import schema
from kvguard.config import BASELINE

ANSWER_SIGNALS = (
    "entropy_excess",
    "entropy_excess_mean",
    "entropy_line_mean",
    "runner_up",
    "runner_up_mean",
    "entropy_copied_mean",
)

MIN_ANSWERS = 3
"""Uncompressed answers that must reach a position for it to have a level."""

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str], Sequence[int]]


def entropy_levels(tokens: pl.DataFrame) -> pl.DataFrame:
    """Mean entropy of uncompressed answers by task and position.

    Args:
        tokens: ``press``, ``task``, ``position`` and ``entropy`` of the tokens to learn from.

    Returns:
        ``task``, ``position`` and ``entropy_level``; positions that at least `MIN_ANSWERS` of the
        uncompressed answers reach.
    """
    return (
        tokens.filter(pl.col("press") == BASELINE)
        .group_by("task", "position")
        .agg(entropy_level=pl.col("entropy").cast(pl.Float64).mean(), answers=pl.len())
        .filter(pl.col("answers") >= MIN_ANSWERS)
        .select("task", "position", "entropy_level")
        .sort("task", "position")
    )


def answer_signals(tokens: pl.DataFrame, levels: pl.DataFrame) -> NDArray[np.float32]:
    """`ANSWER_SIGNALS` of every token.

    Args:
        tokens: of whole answers, each in order of position: `schema.TOKEN_KEYS`, ``task``,
            ``entropy``, ``top_logprob_01``, and the columns of `mark_tokens`.
        levels: of `entropy_levels`.

    Returns:
        (n, 6) float32 in the order of ``tokens``; NaN where undefined.
    """

    def running(name: str, over: Sequence[str] = schema.TRACE_KEYS) -> pl.Expr:
        value = pl.col(name)
        total = value.fill_null(0).cum_sum().over(over)
        return total / value.is_not_null().cast(pl.Float64).cum_sum().over(over)

    entropy = pl.col("entropy").cast(pl.Float64)
    line = pl.col("line_break").shift(1, fill_value=False).cum_sum().over(schema.TRACE_KEYS)
    found = (
        tokens.join(levels, on=["task", "position"], how="left", maintain_order="left")
        .with_columns(
            entropy=entropy,
            line=line,
            entropy_excess=entropy - pl.col("entropy_level"),
            runner_up=pl.col("top_logprob_01").cast(pl.Float64).exp(),
            copied=pl.when("copied").then(entropy),
        )
        .select(
            "entropy_excess",
            "runner_up",
            entropy_excess_mean=running("entropy_excess"),
            entropy_line_mean=running("entropy", [*schema.TRACE_KEYS, "line"]),
            runner_up_mean=running("runner_up"),
            entropy_copied_mean=running("copied"),
        )
    )
    return found.select(ANSWER_SIGNALS).cast(pl.Float32).fill_null(np.nan).to_numpy()


def mark_tokens(
    tokens: pl.DataFrame, decode: Decode, encode: Encode, questions: Mapping[str, str]
) -> pl.DataFrame:
    """Which tokens hold a line break, and which are copied from the question.

    Args:
        tokens: `schema.TRACE_KEYS` and ``token_id``, each answer in order.
        decode: token ids to text.
        encode: text to token ids, without special tokens.
        questions: by prompt id.

    Returns:
        ``tokens`` with ``line_break`` and ``copied``, Boolean. A token is copied where it and the
        token before it stand next to each other in the question.
    """
    ids = tokens["token_id"].unique().to_list()
    breaks = [token for token in ids if "\n" in decode([token])]
    pairs = []
    for prompt, question in questions.items():
        own = np.asarray(encode(question), dtype=np.int64)
        pairs.append(
            pl.DataFrame(
                {"before": own[:-1], "token_id": own[1:]},
                schema={"before": pl.Int32, "token_id": pl.Int32},
            )
            .unique()
            .with_columns(prompt_id=pl.lit(prompt), copied=pl.lit(True))
        )
    known = pl.concat(pairs) if pairs else None
    marked = tokens.with_columns(
        line_break=pl.col("token_id").is_in(breaks),
        before=pl.col("token_id").shift(1).over(schema.TRACE_KEYS),
    )
    if known is None:
        return marked.drop("before").with_columns(copied=pl.lit(False))
    return (
        marked.join(
            known, on=["prompt_id", "before", "token_id"], how="left", maintain_order="left"
        )
        .with_columns(pl.col("copied").fill_null(False))
        .drop("before")
    )

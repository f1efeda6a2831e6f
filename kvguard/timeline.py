"""Every token of a request with its text, its hazard and the mode of a controller that observes."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config, schema
from kvguard.controller import Mode, initial_state, step
from kvguard.schema import TIMELINE


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def batch_decode(
        self, sequences: list[list[int]], *, skip_special_tokens: bool
    ) -> list[str]: ...


def token_texts(tokenizer: Tokenizer, token_ids: Iterable[int]) -> pl.DataFrame:
    """The text of each distinct token id as it reads inside a sentence, leading space included.

    A token alone may lose its space (SentencePiece does that), so each is decoded behind an anchor
    whose text is then taken off. A token that holds part of a character reads as U+FFFD.

    Returns:
        columns ``token_id`` (Int32) and ``token_text``, one row per distinct id.
    """
    distinct = sorted(set(token_ids))
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    pairs = [anchor, *([*anchor, token] for token in distinct)]
    prefix, *texts = tokenizer.batch_decode(pairs, skip_special_tokens=False)
    return pl.DataFrame(
        {"token_id": distinct, "token_text": [text.removeprefix(prefix) for text in texts]},
        schema={"token_id": pl.Int32, "token_text": pl.String},
    )


def build_timeline(
    tokens: pl.DataFrame,
    texts: pl.DataFrame,
    predictions: pl.DataFrame | None,
    controller: config.OperatingPoint,
    *,
    target: str = "any",
) -> pl.DataFrame:
    """Join each token with its text and hazard, and with the mode that the controller is in.

    The modes are those of a guard that only watches: no token is taken back.

    Args:
        tokens: `schema.TOKENS`.
        texts: `token_texts`.
        predictions: `schema.PREDICTIONS`; None, or no row for a token: no hazard.
        controller: thresholds and counts.
        target: whose predictions are taken.

    Returns:
        a table with the columns of `TIMELINE`, traces in the order of ``tokens``' keys.

    Raises:
        ValueError: a token id has no text.
    """
    ordered, offsets = schema.order_by_trace(tokens)
    frame = ordered.join(texts, on="token_id", how="left", maintain_order="left")
    unknown = frame.filter(pl.col("token_text").is_null())
    if unknown.height:
        raise ValueError(f"texts: no text for token_id {unknown['token_id'][0]}")
    if predictions is None:
        frame = frame.with_columns(hazard=pl.lit(None, pl.Float32))
    else:
        hazards = predictions.filter(pl.col("target") == target)
        frame = frame.join(
            hazards.select(*schema.TOKEN_KEYS, "hazard"),
            on=schema.TOKEN_KEYS,
            how="left",
            maintain_order="left",
        )
    hazard = frame["hazard"].fill_null(np.nan).to_numpy()
    lengths = np.diff(offsets)
    modes = controller_modes(hazard, lengths, controller)
    predicted = pl.col("hazard").is_not_null().any().over(schema.TRACE_KEYS)
    frame = frame.with_columns(mode=pl.Series(modes, dtype=pl.Int8)).with_columns(
        mode=pl.when(predicted).then("mode")
    )
    return schema.check(schema.conform(frame, TIMELINE), TIMELINE, "timeline")


def controller_modes(
    hazard: NDArray[np.float32], lengths: NDArray[np.int64], controller: config.OperatingPoint
) -> NDArray[np.int8]:
    """The controller's mode after each token, traces laid end to end.

    Args:
        hazard: (tokens,) NaN is no evidence.
        lengths: (traces,) tokens of each trace, at least 1; they add up to ``tokens``.
        controller: thresholds and counts.
    """
    inside = np.arange(lengths.max(initial=0)) < lengths[:, None]  # (traces, longest)
    padded = np.full(inside.shape, np.nan, np.float32)
    padded[inside] = hazard
    modes = np.zeros(inside.shape, np.int8)
    state = initial_state(len(lengths))
    for position in range(inside.shape[1]):
        state = step(state, padded[:, position], controller)
        modes[:, position] = state.mode
    return modes[inside]


def choose_example(timeline: pl.DataFrame, outcomes: pl.DataFrame) -> dict[str, str]:
    """The trace keys of the request that best shows a failure and the guard's warning.

    Compressed and catastrophic, with SAFE reached before the onset but behind the first token that
    the uncompressed model rejects, rather looping than merely endless; of those the one whose
    warning comes earliest. Without any catastrophe: the request that the uncompressed model finds
    least plausible. Ties go by the keys, so the choice is repeatable.

    Args:
        timeline: `build_timeline`.
        outcomes: `schema.OUTCOMES`.

    Raises:
        ValueError: no compressed request in both tables.
    """
    alarms = (
        timeline.filter(pl.col("mode") == Mode.SAFE)
        .group_by(schema.TRACE_KEYS)
        .agg(alarm=pl.col("position").min())
    )
    candidates = (
        timeline.select(schema.TRACE_KEYS)
        .unique()
        .join(outcomes, on=schema.TRACE_KEYS)
        .filter(pl.col("press") != config.BASELINE)
        .join(alarms, on=schema.TRACE_KEYS, how="left")
    )
    if candidates.is_empty():
        raise ValueError("no compressed request is in both the timeline and the outcomes")
    lead = pl.col("onset") - pl.col("alarm")
    best = candidates.sort(
        pl.col("catastrophe").fill_null(False),
        (lead > 0).fill_null(False),
        (pl.col("first_rejected") <= pl.col("alarm")).fill_null(False),
        pl.col("looping").fill_null(False),
        lead.fill_null(-(2**30)),
        pl.col("max_windowed_llr").fill_null(-np.inf),
        *schema.TRACE_KEYS,
        descending=True,
    )
    return best.select(schema.TRACE_KEYS).row(0, named=True)

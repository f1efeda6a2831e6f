"""One self-contained HTML page that shows requests token by token: what was written, and why."""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import polars as pl

from kvguard import config, schema
from kvguard.controller import Mode

TEMPLATE = resources.files("kvguard") / "data" / "viewer.html"
"""The page without its data: plain HTML, CSS and JavaScript, nothing from the network."""

PLACEHOLDER = "/*DATA*/"

SIGNALS_SHOWN = ("entropy", "chosen_logprob", "llr", "hazard")
"""Numbers of each token in the page, rounded to three decimals."""


def render_viewer(
    timeline: pl.DataFrame,
    traces: pl.DataFrame,
    outcomes: pl.DataFrame,
    prompts: pl.DataFrame,
    *,
    controller: config.OperatingPoint,
    title: str,
    max_requests: int = 400,
) -> str:
    """The page as one string of HTML with its data inside.

    Args:
        timeline: `timeline.build_timeline`.
        traces: `schema.TRACES`.
        outcomes: `schema.OUTCOMES`.
        prompts: `schema.PROMPTS`.
        controller: whose modes the timeline holds.
        title: heading of the page.
        max_requests: beyond it only the first prompts are kept, each with all its conditions, so
            that an answer can be compared with the uncompressed one; the page says how many.

    Raises:
        ValueError: max_requests is below 1.
    """
    if max_requests < 1:
        raise ValueError(f"max_requests must be at least 1, got {max_requests}")
    template = TEMPLATE.read_text(encoding="utf-8")
    shown = prompts.sort("index", "prompt_id").join(traces, on="prompt_id", how="semi")
    conditions = traces.select("model", "press", "ratio").n_unique()
    kept = shown.head(max(1, max_requests // max(conditions, 1)))
    requests = (
        traces.join(kept, on="prompt_id")
        .join(outcomes.drop("task"), on=schema.TRACE_KEYS, how="left")
        .sort("index", "model", pl.col("press") != config.BASELINE, "press", "ratio")
    )
    timeline = timeline.join(requests, on=schema.TRACE_KEYS, how="semi")
    data = {
        "title": title,
        "prompts_shown": kept.height,
        "prompts": shown.height,
        "controller": controller.model_dump(mode="json"),
        "baseline": config.BASELINE,
        "modes": [mode.name for mode in Mode],
        "signals": list(SIGNALS_SHOWN),
        "texts": timeline["token_text"].unique(maintain_order=True).to_list(),
        "requests": _requests(requests, timeline),
    }
    return template.replace(PLACEHOLDER, _json(data))


def _requests(requests: pl.DataFrame, timeline: pl.DataFrame) -> list[dict[str, Any]]:
    """One entry a request; signals are columns, texts are indices into the page's list."""
    places = timeline.select(pl.col("token_text").unique(maintain_order=True)).with_row_index(
        "text"
    )
    columns = (
        timeline.join(places, on="token_text")
        .sort(schema.TOKEN_KEYS)
        .group_by(schema.TRACE_KEYS)
        .agg(
            pl.col("text", "mode"),
            (~pl.col("audit_is_argmax")).cast(pl.Int8).alias("rejected"),
            *(
                pl.when(pl.col(name).is_finite())
                .then(pl.col(name).cast(pl.Float64).round(3))
                .alias(name)
                for name in SIGNALS_SHOWN
            ),
        )
    )
    fields = [
        *schema.TRACE_KEYS,
        "question",
        "reference",
        "status",
        "error",
        "stop_reason",
        "answer",
        "right",
        "agrees",
        "first_rejected",
        "looping_onset",
        "non_termination_onset",
        "amnesia_onset",
        "divergence_onset",
    ]
    joined = requests.select(fields).join(
        columns, on=schema.TRACE_KEYS, how="left", maintain_order="left"
    )
    return joined.rename({"text": "tokens"}).to_dicts()


def _json(data: object) -> str:
    """JSON that is safe inside a script element: no markup can begin in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escapes: Sequence[tuple[str, str]] = (
        ("<", "\\u003c"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    )
    for character, escape in escapes:
        text = text.replace(character, escape)
    return text

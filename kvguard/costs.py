"""What a request costs: memory of its cache, tokens prefilled, decode steps, tokens thrown away.

**Memory** is what is allocated for a request's entries, those hidden by a head-wise press included,
padding not (it belongs to the batch). A request of n tokens takes n - 1 decode steps: the first
token comes from the prefill, and the step that follows token s leaves s generated tokens in the
cache, s = 1 .. n - 1. The mean is over all decode steps, those of dropped tokens included. The peak
is over the decode steps and the fresh caches of recoveries; the prompt's own prefill, before it is
compressed, is the same for every policy and is left out.

The live guard measures these, the offline simulation computes them from a trace's measurements;
`recovery_cost` is the arithmetic that both agree on.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class Cost(NamedTuple):
    """Costs of requests, arrays of one shape; NaN where undefined or unknown."""

    kv_bytes_mean: FloatArray
    kv_bytes_peak: FloatArray
    prefilled_tokens: FloatArray  # a shared prefix counts for every pass that starts with it
    decode_steps: FloatArray
    wasted_tokens: FloatArray  # generated, then dropped


COSTS = Cost._fields
"""Names of the costs, columns of RUNS; lower is better."""


class Memory(NamedTuple):
    """Bytes of n requests' caches, linear in the generated tokens that they hold; all (n,).

    ``start`` and ``slope`` are NaN where the press also compresses while decoding.
    """

    start: FloatArray  # the prompt's entries under the press, hidden ones included
    slope: FloatArray  # one generated token's entries under the press
    full: FloatArray  # the prompt's entries uncompressed
    entry: FloatArray  # one token's entries uncompressed
    measured_mean: FloatArray  # over the trace's own decode steps; NaN without any

    def rows(self, rows: NDArray[np.integer]) -> "Memory":
        """The memory of some of the requests."""
        return Memory(*(field[rows] for field in self))


def trace_memory(traces: pl.DataFrame) -> Memory:
    """What the caches of traces take, from what was measured.

    Under a press that compresses at prefill alone, the measured mean lies on the line that the
    prompt's compressed bytes and one entry a token give; then that line holds for every step.
    Otherwise (compression while decoding) a trace says nothing about the memory of its parts.

    Args:
        traces: TRACES rows whose status is "ok".
    """
    columns = traces.select(
        pl.col(
            "prompt_tokens",
            "generated_tokens",
            "cache_bytes_before",
            "cache_bytes_after",
            "kv_kept_bytes_mean",
            "kv_masked_bytes_mean",
        ).cast(pl.Float64)
    )
    prompt, generated, full, after, kept, masked = (column.to_numpy() for column in columns)
    entry = full / prompt
    start = after + np.nan_to_num(masked)
    measured = kept + masked
    # 1 .. n - 1 generated tokens in the cache are n / 2 on average.
    linear = np.isnan(measured) | np.isclose(measured, start + entry * generated / 2, rtol=1e-6)
    unknown = np.where(linear, 0, np.nan)
    return Memory(start + unknown, entry + unknown, full, entry, measured)


def draft_cost(memory: Memory, prompt_tokens: ArrayLike, draft: ArrayLike) -> Cost:
    """Cost of requests that end after ``draft`` tokens under the press, without any recovery.

    Args:
        memory: of n requests.
        prompt_tokens: (n,).
        draft: (..., n) tokens generated, at least 1.
    """
    draft = np.asarray(draft, np.float64)
    steps = draft - 1
    some = steps > 0
    return Cost(
        np.where(some, memory.start + memory.slope * draft / 2, np.nan),
        np.where(some, memory.start + memory.slope * steps, np.nan),
        np.broadcast_to(np.asarray(prompt_tokens, np.float64), draft.shape),
        steps,
        np.zeros(draft.shape),
    )


def recovery_cost(
    memory: Memory,
    prompt_tokens: ArrayLike,
    draft: ArrayLike,
    carried: ArrayLike,
    kept: ArrayLike,
    final: ArrayLike,
) -> Cost:
    """Cost of requests that recover once and go on uncompressed.

    Args:
        memory: of n requests.
        prompt_tokens: (n,).
        draft: (..., n) tokens generated under the press when the alarm comes, at least 1.
        carried: (..., n) of those, how many the recovering pass processes after the prompt.
        kept: (..., n) of those, how many stay; the pass also gives the logits of the next token.
        final: (..., n) tokens of the final answer.
    """
    draft, carried, kept, final = (np.asarray(x, np.float64) for x in (draft, carried, kept, final))
    draft_steps, safe_steps = draft - 1, np.maximum(final - kept - 1, 0)
    # Draft steps leave 1 .. draft - 1 generated tokens, safe steps kept + 1 .. final - 1.
    held = draft_steps * memory.start + memory.slope * draft_steps * draft / 2
    held = np.where(draft_steps > 0, held, 0)
    held = held + safe_steps * memory.full + memory.entry * safe_steps * (kept + final) / 2
    steps = draft_steps + safe_steps
    most = np.maximum(carried, np.where(safe_steps > 0, final - 1, 0))
    return Cost(
        np.divide(held, steps, out=np.full(steps.shape, np.nan), where=steps > 0),
        np.maximum(
            np.where(draft_steps > 0, memory.start + memory.slope * draft_steps, 0),
            memory.full + memory.entry * most,
        ),
        2 * np.asarray(prompt_tokens, np.float64) + carried,
        steps,
        draft - kept,
    )

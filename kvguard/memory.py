"""Key-value memory of one request at every decode step, from what the run measured."""

import numpy as np
import polars as pl

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.controller import Mode
from kvguard.costs import trace_memory

SHOWN = ("none", "guard_rewind", "verify_all", "always_safe")
"""Policies whose memory follows from sizes of the prompt's caches: they recover at most once, by a
pass of the uncompressed model, and stay uncompressed."""

MEMORY: dict[str, pl.DataType] = {
    "model": pl.String(),
    "press": pl.String(),
    "ratio": pl.String(),
    "prompt_id": pl.String(),
    "policy": pl.String(),
    "step": pl.Int32(),  # decode steps since the prompt's prefill, from 1
    "kv_bytes": pl.Float64(),  # allocated for the row after the step, padding left out
    "mode": pl.Int8(),  # controller.Mode; null: the policy has none
}


def choose_guarded(runs: pl.DataFrame) -> dict[str, str]:
    """The trace keys of a request that shows a rewind: the median one by when its alarm came.

    Args:
        runs: `schema.RUNS`; the rows of ``guard_rewind`` that rewound exactly once count.

    Raises:
        ValueError: there is none.
    """
    rewound = runs.filter(
        (pl.col("policy") == "guard_rewind")
        & (pl.col("status") == "ok")
        & (pl.col("rewound_to").list.len() == 1)
        & (pl.col("press") != BASELINE)
    ).sort(pl.col("alarm_steps").list.first(), *schema.TRACE_KEYS)
    if rewound.is_empty():
        raise ValueError("no run of 'guard_rewind' rewound exactly once")
    return rewound.select(schema.TRACE_KEYS).row((rewound.height - 1) // 2, named=True)


def memory_steps(trace: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Allocated bytes of one request's cache after each decode step, under each of `SHOWN`.

    A request of n tokens takes n - 1 decode steps: the first token comes from the prefill, and the
    first token after a recovery from the pass that verified. The step after token s leaves s
    generated tokens in the cache (see `kvguard.costs`).

    Args:
        trace: one row of `schema.TRACES`, compressed, with status "ok".
        runs: `schema.RUNS` of the same request, one row per policy; others than `SHOWN`, failed
            ones and those that recovered more than once are left out.

    Returns:
        a table with the columns of `MEMORY`.

    Raises:
        ValueError: not one trace, a run of another request, no run that can be shown, or a press
            that compresses while decoding, so that the cache does not grow by a token a step.
    """
    if trace.height != 1:
        raise ValueError(f"trace: one row is needed, got {trace.height}")
    if runs.join(trace, on=schema.TRACE_KEYS, how="anti").height:
        raise ValueError("runs: a run belongs to another request than the trace")
    memory = trace_memory(trace)
    start, slope, full, entry = (
        float(value[0]) for value in (memory.start, memory.slope, memory.full, memory.entry)
    )
    if not slope > 0:  # NaN: the growth is unknown
        raise ValueError("trace: its cache does not grow linearly; the press compresses decoding")
    shown = runs.filter(
        pl.col("policy").is_in(SHOWN)
        & (pl.col("status") == "ok")
        & (pl.col("rewound_to").list.len() <= 1)
    )
    parts = []
    for run in shown.to_dicts():
        final, rewound = run["generated_tokens"], bool(run["rewound_to"])
        kept = run["rewound_to"][0] if rewound else 0
        drafted = run["alarm_steps"][0] if rewound else final
        draft = 0 if run["policy"] == "always_safe" else drafted  # tokens under the press
        held = np.arange(1, draft)  # generated tokens in the cache, compressed prompt
        safe = np.arange(kept + 1, final) if rewound or draft == 0 else np.arange(0)
        kv_bytes = np.concatenate([start + slope * held, full + entry * safe])
        modes = np.repeat([Mode.NORMAL, Mode.SAFE], [len(held), len(safe)])
        frame = pl.DataFrame({"kv_bytes": kv_bytes}).with_columns(
            pl.lit(run[key]).alias(key) for key in (*schema.TRACE_KEYS, "policy")
        )
        known = run["policy"].startswith("guard")
        parts.append(
            frame.with_columns(
                step=pl.int_range(1, pl.len() + 1),
                mode=pl.Series(modes.astype(np.int8)) if known else pl.lit(None),
            )
        )
    if not parts:
        raise ValueError(f"runs: none of {', '.join(SHOWN)} ran and recovered at most once")
    table = pl.concat([schema.conform(part, MEMORY) for part in parts])
    return schema.check(table, MEMORY, "memory")


def memory_of_rewind(traces: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """`memory_steps` of the request that `choose_guarded` picks; no rows when none can be shown.

    Requests under a press that compresses while decoding are passed over: their growth is unknown.

    Args:
        traces: `schema.TRACES` of the run.
        runs: `schema.RUNS` of the live experiment.
    """
    traces = traces.filter(pl.col("status") == "ok")
    traces = traces.filter(pl.Series(trace_memory(traces).slope > 0))
    runs = runs.join(traces, on=schema.TRACE_KEYS, how="semi")
    try:
        keys = choose_guarded(runs)
    except ValueError:
        return pl.DataFrame(schema=MEMORY)
    wanted = [pl.col(key) == value for key, value in keys.items()]
    return memory_steps(traces.filter(wanted), runs.filter(wanted))

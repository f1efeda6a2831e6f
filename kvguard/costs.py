"""What a request costs: memory of its cache, tokens prefilled, decode steps, tokens thrown away.

**Memory** is device byte-steps: what is allocated for a request, summed over the model's passes.
A request of n tokens takes n - 1 decode steps: the first token comes from the prefill, and the step
that follows token s leaves s generated tokens in the cache, s = 1 .. n - 1. Steps of dropped tokens
count, and so does every check and recovery. The prompt's own prefill, before it is compressed, is
the same for every policy and is left out.

The live guard measures these, the offline simulation computes them from a trace's measurements.
Tokens prefilled, decode steps and dropped tokens then equal those of a live run. The
byte-steps of a request in which a policy acted are a low estimate: padding is taken as
measured in the trace, and what other rows of a live batch add (their checks, during which this row
waits) and the two layers of a cold cache that a check brings to the device are left out.

**Bytes moved** are those of entries between the device and where they are parked: each prompt's
when they are parked, parked ones that a pass reads, new ones that leave the device, verified ones
that come back. They are counted on a host as on a device. What several rows share is read once a
pass and counted in equal parts. A shared prefix is parked once for all and in nobody's count.
Weights are not entries. `offload_traffic` is what a cache that is offloaded as a whole moves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from kvguard import schema
from kvguard.config import BASELINE
from kvguard.controller import Mode

FloatArray = NDArray[np.float64]


class MeteredSlots(Protocol):
    """What `CostMeter` asks of the rows' caches (`slots.Slots`)."""

    @property
    def allocated_bytes(self) -> int: ...

    def take_peak(self) -> int: ...

    def row_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...


class CostMeter:
    """Charges what a batch allocates to its requests, once a pass of the model.

    A pass is a decode step of the batch, a check of some rows' drafts, or a recovery's prefill.
    While it runs, everything stays allocated, the entries of waiting rows as well. A row's
    share of the slots is its own pages, an equal part of the free ones, and, where it refers to a
    shared prefix, an equal part of that (`Slots.row_bytes`); what a pass needs beyond the slots is
    charged to the rows that it is for. So the requests' shares sum to what the batch allocated.
    Host bytes are a row's cold cache and an equal part of a parked prefix that rows share. A
    request's own admission, before its cache is compressed, and the prefilled prefix that
    admissions use are the same under every policy and left out, the latter until rows refer to it.

    Args:
        slots: the caches.
        rows: one per active row, in order, each with a ``completion`` and its ``cold`` entries,
            None where it has none; the session's list, which changes as rows come and go.
    """

    def __init__(self, slots: MeteredSlots, rows: Sequence[Any]) -> None:
        self.slots, self.rows = slots, rows

    def step(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """A decode step has ended.

        Returns:
            `Slots.row_bytes`, as charged.
        """
        return self.extra_pass({})

    def extra_pass(
        self, transient: Mapping[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """A pass of the model that is no decode step.

        Args:
            transient: by row, the device bytes that the pass needed for it beyond the slots: layers
                of a cold cache, a fresh cache.

        Returns:
            `Slots.row_bytes`, as charged.
        """
        kept, masked, padding = self.slots.row_bytes()
        beyond = sum(transient.values())
        peak = max(self.slots.take_peak(), self.slots.allocated_bytes + beyond)
        for number, row in enumerate(self.rows):
            completion = row.completion
            share = int(kept[number] + masked[number] + padding[number])
            completion.device_byte_steps += share + transient.get(number, 0)
            completion.device_bytes_peak = max(completion.device_bytes_peak, peak)
        parked = [row for row in self.rows if row.cold is not None]
        shared = Counter(id(row.cold.prefix) for row in parked)
        for row in parked:
            size = 0 if row.cold.prefix is None else row.cold.prefix.nbytes
            part = size // shared[id(row.cold.prefix)]
            row.completion.host_byte_steps += row.cold.nbytes + part
        return kept, masked, padding

    def note_peak(self, beyond: int) -> None:
        """Between two passes, so many bytes were there beside the slots; all rows were waiting."""
        peak = max(self.slots.take_peak(), self.slots.allocated_bytes + beyond)
        for row in self.rows:
            row.completion.device_bytes_peak = max(row.completion.device_bytes_peak, peak)

    def replays(self, number: int, sizes: Sequence[int]) -> None:
        """A request was admitted after passes over its compressed cache, beyond its prefill.

        Args:
            number: its row.
            sizes: bytes of the cache that each pass read; the other rows waited with all they have.
        """
        for size in sizes:
            own = sum(int(part[number]) for part in self.slots.row_bytes())
            self.extra_pass({number: size - own})


class Cost(NamedTuple):
    """Costs of requests, arrays of one shape; NaN where undefined or unknown."""

    device_byte_steps: FloatArray  # allocated, padding as measured, recovery passes included
    tokens_prefilled: FloatArray  # a shared prefix counts for every pass that starts with it
    decode_steps: FloatArray
    tokens_wasted: FloatArray  # generated, then dropped


COSTS = Cost._fields
"""Names of the costs, columns of RUNS; lower is better."""


Numbers = TypeVar("Numbers", float, FloatArray, pl.Expr)


def offload_traffic(
    prompt_tokens: Numbers, decode_steps: Numbers, prompt_bytes: Numbers
) -> Numbers:
    """Bytes that a request moves whose whole cache is kept off the device and used layer by layer.

    The prompt's entries leave the device after their prefill. Each decode step brings all entries
    there are, and the new token's leave: after step s, prompt and s tokens have crossed.

    Args:
        prompt_tokens: of the request, a shared prefix included.
        decode_steps: of the uncompressed answer.
        prompt_bytes: of the prompt's uncompressed cache.
    """
    entry = prompt_bytes / prompt_tokens
    return entry * (decode_steps + 1) * (prompt_tokens + decode_steps / 2)


class Offloaded(NamedTuple):
    """Costs of the uncompressed answer under `offload_costs`, numbers or arrays of one shape."""

    device_byte_steps: Any
    host_byte_steps: Any
    bytes_moved: Any


def offload_costs(
    device_byte_steps: Numbers,
    prompt_tokens: Numbers,
    decode_steps: Numbers,
    prompt_bytes: Numbers,
    *,
    layers: int,
) -> Offloaded:
    """What requests that ran uncompressed would have cost with their cache offloaded.

    The device holds `OFFLOAD_LAYERS` layers of it, the one at work and the one on its way; the
    host holds all entries, since a step brings them and sends back the new one alone.

    Args:
        device_byte_steps: of the run, with all layers on the device.
        prompt_tokens: see `offload_traffic`, as the next two.
        decode_steps: see there.
        prompt_bytes: see there.
        layers: of the model.
    """
    held = prompt_bytes / prompt_tokens * decode_steps * (prompt_tokens + (decode_steps + 1) / 2)
    return Offloaded(
        device_byte_steps * min(OFFLOAD_LAYERS, layers) / layers,
        held,
        offload_traffic(prompt_tokens, decode_steps, prompt_bytes),
    )


OFFLOAD_LAYERS = 2
"""Layers of an offloaded cache on the device: ``Cache.update`` of transformers sends for the next
layer before it uses one, and lets that one go afterwards (transformers 5.2, `cache_utils`)."""


def offload_row(row: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A request's row of an uncompressed run with the costs of offloading in it.

    Nothing is offloaded, so ``seconds`` are null: transfers would take some that nothing measured.

    Args:
        row: columns of TRACES.
        layers: of the model.
    """
    if row["status"] != "ok":
        return dict(row)
    names = ("device_byte_steps", "prompt_tokens", "decode_steps", "cache_bytes_before")
    values = [float(row[name]) for name in names]
    counted = offload_costs(*values, layers=layers)
    peak = row["device_bytes_peak"] * min(OFFLOAD_LAYERS, layers) // layers
    found = {name: round(value) for name, value in counted._asdict().items()}
    return {**row, **found, "device_bytes_peak": peak, "seconds": None}


class Memory(NamedTuple):
    """Bytes of n requests' caches, linear in the generated tokens that they hold; all (n,).

    ``start`` and ``slope`` are NaN where the press also compresses while decoding.
    """

    start: FloatArray  # the prompt's entries under the press, hidden ones included
    slope: FloatArray  # one generated token's entries under the press
    full: FloatArray  # the prompt's entries uncompressed
    entry: FloatArray  # one token's entries uncompressed
    measured_steps: FloatArray  # the trace's device byte-steps; NaN where they were not counted
    padding: FloatArray  # its allocated bytes over those in use

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
            "device_byte_steps",
        ).cast(pl.Float64)
    )
    prompt, generated, full, after, kept, masked, steps = (column.to_numpy() for column in columns)
    entry = full / prompt
    start = after + np.nan_to_num(masked)
    measured = kept + masked
    # 1 .. n - 1 generated tokens in the cache are n / 2 on average.
    linear = np.isnan(measured) | np.isclose(measured, start + entry * generated / 2, rtol=1e-6)
    unknown = np.where(linear, 0, np.nan)
    used = measured * (generated - 1)
    padding = np.where(generated > 1, steps / np.where(used > 0, used, np.nan), 1)
    return Memory(start + unknown, entry + unknown, full, entry, steps, padding)


def matched_ratio(ratios: ArrayLike, byte_steps: ArrayLike, target: float) -> float:
    """The mildest constant ratio at which a press costs no more than ``target``.

    Between measured ratios the cost is interpolated linearly. A higher ratio need not cost less:
    compressed answers may run on for longer than they save.

    Args:
        ratios: at least one, each once.
        byte_steps: mean device byte-steps per request at each ratio.
        target: device byte-steps per request of the policy to match.

    Returns:
        The lowest ratio whose cost is at most ``target``; the cheapest one where none is.
    """
    order = np.argsort(np.asarray(ratios, np.float64))
    ratio = np.asarray(ratios, np.float64)[order]
    cost = np.asarray(byte_steps, np.float64)[order]
    if not (cost <= target).any():
        return float(ratio[np.argmin(cost)])
    first = int(np.argmax(cost <= target))
    if first == 0:
        return float(ratio[0])
    last, before = ratio[first], ratio[first - 1]
    share = (cost[first - 1] - target) / (cost[first - 1] - cost[first])
    return float(before + share * (last - before))


def draft_cost(memory: Memory, prompt_tokens: ArrayLike, draft: ArrayLike) -> Cost:
    """Cost of requests that end after ``draft`` tokens under the press, without any recovery.

    Args:
        memory: of n requests.
        prompt_tokens: (n,).
        draft: (..., n) tokens generated, at least 1.
    """
    draft = np.asarray(draft, np.float64)
    steps = draft - 1
    return Cost(
        steps * (memory.start + memory.slope * draft / 2) * memory.padding,
        np.broadcast_to(np.asarray(prompt_tokens, np.float64), draft.shape),
        steps,
        np.zeros(draft.shape),
    )


def check_cost(
    memory: Memory,
    prompt_tokens: ArrayLike,
    draft: ArrayLike,
    carried: ArrayLike,
    *,
    ended: ArrayLike,
    cold: bool,
) -> Cost:
    """Cost of one check, or of prefilling the prompt again; arguments as of `recovery_cost`."""
    draft, carried = np.asarray(draft, np.float64), np.asarray(carried, np.float64)
    alone = (carried > 0) & cold
    run = carried - (alone & np.asarray(ended))
    waits = memory.start + memory.slope * (draft - 1)  # the draft's cache stays during the pass
    nothing = np.zeros(draft.shape)
    return Cost(
        waits * memory.padding + np.where(alone, 0, memory.full) + memory.entry * run,
        run + np.where(alone, 0, np.asarray(prompt_tokens, np.float64)),
        nothing,
        nothing,
    )


def recovery_cost(
    memory: Memory,
    prompt_tokens: ArrayLike,
    draft: ArrayLike,
    carried: ArrayLike,
    kept: ArrayLike,
    final: ArrayLike,
    *,
    ended: ArrayLike,
    cold: bool,
) -> Cost:
    """Cost of requests that recover once and go on uncompressed.

    Args:
        memory: of n requests.
        prompt_tokens: (n,).
        draft: (..., n) tokens generated under the press when the alarm comes, at least 1.
        carried: (..., n) of those, how many are checked; 0: the prompt is prefilled again, alone.
        kept: (..., n) of those, how many stay; the pass also gives the logits of the next token.
        final: (..., n) tokens of the final answer.
        ended: (..., n) whether the draft has ended; the last token of one that has needs no entry.
        cold: whether a check runs the draft alone, over a cold cache, or prompt and draft afresh.
    """
    prompt = np.asarray(prompt_tokens, np.float64)
    draft, carried, kept, final = (np.asarray(x, np.float64) for x in (draft, carried, kept, final))
    draft_steps, safe_steps = draft - 1, np.maximum(final - kept - 1, 0)
    # Draft steps leave 1 .. draft - 1 generated tokens, safe steps kept + 1 .. final - 1.
    held = draft_steps * memory.start + memory.slope * draft_steps * draft / 2
    held = np.where(draft_steps > 0, held, 0)
    held = held + safe_steps * memory.full + memory.entry * safe_steps * (kept + final) / 2
    passed = check_cost(memory, prompt, draft, carried, ended=ended, cold=cold)
    return Cost(
        held * memory.padding + passed.device_byte_steps,
        prompt + passed.tokens_prefilled,
        draft_steps + safe_steps,
        draft - kept,
    )


SHOWN = ("none", "guard_promote", "verify_all", "always_safe")
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
    """Trace keys of a typical rewound request: the one with the median alarm step.

    Args:
        runs: `schema.RUNS`; the rows of ``guard_promote`` that rewound exactly once count.

    Raises:
        ValueError: there is none.
    """
    rewound = runs.filter(
        (pl.col("policy") == "guard_promote")
        & (pl.col("status") == "ok")
        & (pl.col("rewound_to").list.len() == 1)
        & (pl.col("press") != BASELINE)
    ).sort(pl.col("alarm_steps").list.first(), *schema.TRACE_KEYS)
    if rewound.is_empty():
        raise ValueError("no run of 'guard_promote' rewound exactly once")
    return rewound.select(schema.TRACE_KEYS).row((rewound.height - 1) // 2, named=True)


def memory_steps(trace: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Allocated bytes of one request's cache after each decode step, under each of `SHOWN`.

    A request of n tokens takes n - 1 decode steps: the first token comes from the prefill, and the
    first token after a recovery from the check's pass. The step after token s leaves s
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

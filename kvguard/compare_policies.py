"""Tables about policies: paired benefit and cost, equal memory, live against simulated.

Everything here works on RUNS tables, whatever their source, so that the live experiment and the
offline simulation are judged by the same functions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config
from kvguard.controller import OperatingPoints
from kvguard.costs import offload_traffic
from kvguard.metrics import bootstrap_interval, exact_reach, resample_weights
from kvguard.schema import CONDITION, COSTS, RUNS, TRACE_KEYS

RELATIVE = "relative_byte_steps"
"""Device byte-steps over those of the full KV cache (``always_safe``) on the same prompts."""

TRAFFIC = "relative_bus_traffic"
"""Bytes moved over those that offloading the full KV cache moves for the same requests."""

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

SHARES = ("harmed", "silent_harm", "rescued", "alarmed", "cfr", "accuracy", "agreement")
"""Measures in [0, 1]; of rescued, accuracy and agreement higher is better, of the others lower."""

DIFFERENCES = ("excess_cfr", "prevented_cfr", "excess_error")
"""Paired measures in [-1, 1]. ``excess_*``: policy minus the uncompressed run of the same prompts,
lower is better. ``prevented_cfr``: compression alone minus policy, higher is better."""


def estimates(
    values: Mapping[str, FloatArray],
    prompts: pl.Series,
    samples: int,
    seed: int,
    *,
    relative_to: Mapping[str, FloatArray] | None = None,
) -> dict[str, pl.Series]:
    """Means of many measures over the same requests, with intervals that resample prompts.

    Args:
        values: by name, (G, n): n requests under each of G settings; NaN entries are left out.
        prompts: (n,) prompt of each request.
        samples: bootstrap samples.
        seed: of the resampling.
        relative_to: by name, (n,): the measure is its sum over this one's sum, not a mean.

    Returns:
        For each name three columns of G rows: the mean, ``_low`` and ``_high`` (95 %); null where
        undefined. A difference of shares that is the same for every prompt has an exact interval,
        see `metrics.exact_reach`.
    """
    unique, codes = np.unique(prompts.to_numpy(), return_inverse=True)
    member = np.zeros((len(codes), len(unique)))
    member[np.arange(len(codes)), codes] = 1
    weights = resample_weights(len(unique), samples, seed)  # (B, P)
    columns: dict[str, pl.Series] = {}
    for name, numbers in values.items():
        known = np.isfinite(numbers)
        units = known * (relative_to or {}).get(name, 1.0)
        sums, counts = np.where(known, numbers, 0) @ member, units @ member  # (G, P)
        bounds = (0.0, 1.0) if name in SHARES or name.endswith("_rate") else None
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums.sum(axis=1) / counts.sum(axis=1)
            replicates = (sums @ weights.T) / (counts @ weights.T)  # (G, B)
        found: list[tuple[float | None, float | None, float | None]] = []
        for mean, drawn, number in zip(means, replicates, (counts > 0).sum(axis=1), strict=True):
            value = float(mean) if np.isfinite(mean) else None
            ends: tuple[float | None, ...] = bootstrap_interval(
                value, drawn, int(number), bounds=bounds
            )
            if name in DIFFERENCES and value is not None and number and np.ptp(drawn) == 0:
                reach = exact_reach(int(number))
                ends = (value - reach, value + reach)
            if name in DIFFERENCES:  # symmetric around the value, cut where nothing can lie
                ends = tuple(None if end is None else min(max(end, -1.0), 1.0) for end in ends)
            found.append((value, *ends))  # type: ignore[arg-type]
        for suffix, column in zip(("", "_low", "_high"), zip(*found, strict=True), strict=True):
            columns[name + suffix] = pl.Series(column, dtype=pl.Float64)
    return columns


def with_references(runs: pl.DataFrame, on: Sequence[str] = TRACE_KEYS) -> pl.DataFrame:
    """Runs beside what their requests cost uncompressed.

    Args:
        runs: RUNS, or what a caller needs of them.
        on: columns that identify a request.

    Returns:
        The runs with ``full_byte_steps``, those of ``always_safe``; ``offloaded_bytes``, see
        `costs.offload_traffic`, from the uncompressed answer of ``always_safe`` or ``offload``; and
        ``traffic``, the bytes moved. Null where unknown: the latter two in files that do not have
        the sizes of a request's prompt, where bytes moved left out what a CPU reads.
    """
    sizes = ("prompt_tokens", "decode_steps", "cache_bytes_before")
    absent = [name for name in (*sizes, "bytes_moved") if name not in runs.columns]
    runs = runs.with_columns(pl.lit(None, RUNS[name]).alias(name) for name in absent)
    full = pl.col("policy") == "always_safe"
    known = runs.filter(full | (pl.col("policy") == "offload"))
    traffic = offload_traffic(*(pl.col(name).cast(pl.Float64) for name in sizes))
    references = known.group_by(on).agg(
        full_byte_steps=pl.col("device_byte_steps").cast(pl.Float64).filter(full).first(),
        offloaded_bytes=traffic.drop_nulls().first(),
    )
    counted = pl.when(pl.col("prompt_tokens").is_not_null()).then("bytes_moved")
    return runs.join(references, on=list(on), how="left", maintain_order="left").with_columns(
        traffic=counted.cast(pl.Float64)
    )


def summarize_runs(
    runs: pl.DataFrame,
    outcomes: pl.DataFrame,
    *,
    exclude: pl.DataFrame | None = None,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """Paired benefit and cost of each policy in each condition, live or simulated.

    Args:
        runs: RUNS of one source, the policy ``none`` among them (else ``prevented_cfr`` is null).
        outcomes: OUTCOMES, for the uncompressed run of each prompt.
        exclude: keys (TRACE_KEYS) of requests to leave out, e.g. `tied_requests`.
        bootstrap_samples: resamples of prompts.
        seed: of the resampling.

    Returns:
        One row per condition and policy: ``requests`` that ran and whose prompt ran uncompressed,
        ``known`` (share of them whose outcome is known), and `SHARES`, `DIFFERENCES`, `COSTS`,
        `RELATIVE` and `TRAFFIC` with intervals. A measure that is unknown for any request is null:
        the known ones are not a fair sample.

    Raises:
        ValueError: no run is left, e.g. because ``outcomes`` lack the uncompressed runs.
    """
    runs = runs.filter(pl.col("status") == "ok")
    if exclude is not None:
        runs = runs.join(exclude, on=TRACE_KEYS, how="anti", maintain_order="left")
    own = (pl.col("press") == config.BASELINE) & pl.col("catastrophe").is_not_null()
    baseline = outcomes.filter(own).select(
        "model", "prompt_id", base_failed="catastrophe", base_right="right"
    )
    alone = runs.filter(pl.col("policy") == "none").select(*TRACE_KEYS, alone="catastrophe")
    paired = (
        with_references(runs)
        .join(baseline, on=["model", "prompt_id"], maintain_order="left")
        .join(alone, on=TRACE_KEYS, how="left", maintain_order="left")
    )
    failed, right = pl.col("catastrophe").cast(pl.Float64), pl.col("right").cast(pl.Float64)
    measured = paired.with_columns(
        alarmed=pl.col("alarmed").cast(pl.Float64),
        cfr=failed,
        accuracy=right,
        agreement=pl.col("agrees").cast(pl.Float64),
        excess_cfr=failed - pl.col("base_failed").cast(pl.Float64),
        prevented_cfr=pl.col("alone").cast(pl.Float64) - failed,
        excess_error=pl.col("base_right").cast(pl.Float64) - right,
        **{name: pl.col(name).cast(pl.Float64) for name in ("harmed", "silent_harm", "rescued")},
        **{name: pl.col(name).cast(pl.Float64) for name in COSTS},
        **_RELATIVES,
    )
    frames = []
    by = (*CONDITION, "policy", "source")
    for key, part in measured.group_by(by, maintain_order=True):
        values, wholes = _relative_values(part, (*SHARES, *DIFFERENCES, *COSTS))
        frames.append(
            pl.DataFrame(
                dict(zip(by, key, strict=True))
                | {
                    "requests": part.height,
                    "known": 1 - part["catastrophe"].null_count() / part.height,
                }
            ).with_columns(
                **estimates(values, part["prompt_id"], bootstrap_samples, seed, relative_to=wholes)
            )
        )
    if not frames:
        raise ValueError("no run with status 'ok' whose prompt also ran uncompressed")
    return pl.concat(frames)


_RELATIVES = {RELATIVE: pl.col("device_byte_steps").cast(pl.Float64), TRAFFIC: pl.col("traffic")}


def _relative_values(
    part: pl.DataFrame, names: Sequence[str]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """`_known_values` with `RELATIVE` and `TRAFFIC`, and what those two are relative to."""
    values, wholes = _known_values(part, (*names, *_RELATIVES)), {}
    for name, column in ((RELATIVE, "full_byte_steps"), (TRAFFIC, "offloaded_bytes")):
        if part[column].null_count():
            values[name] = np.full((1, part.height), np.nan)
        wholes[name] = part[column].fill_null(1.0).to_numpy()
    return values, wholes


def _known_values(part: pl.DataFrame, names: Sequence[str]) -> dict[str, FloatArray]:
    """(1, n) of each column; all NaN where it is unknown for any request.

    A single-token answer has no decode step and no mean over them: that is not unknown.
    """
    decoded = part.filter(pl.col("catastrophe").is_null() | (pl.col("decode_steps") > 0))
    return {
        name: np.full((1, part.height), np.nan)
        if decoded[name].null_count()
        else part[name].cast(pl.Float64).to_numpy()[None]
        for name in names
    }


POOLED = ("harmed", "silent_harm", "rescued", "alarmed")
"""Shares of `pool_conditions`, beside all costs."""


def pool_conditions(
    runs: pl.DataFrame, *, bootstrap_samples: int = 500, seed: int = 0
) -> pl.DataFrame:
    """Harm left and costs of each policy over all compressed conditions, together and by task.

    A prompt that ran under several conditions counts once for each; intervals resample prompts.

    Args:
        runs: RUNS of one or several sources.
        bootstrap_samples: resamples of prompts.
        seed: of the resampling.

    Returns:
        One row per source, ``task`` (null: all tasks) and policy: ``requests``, ``prompts``,
        ``conditions``, and `POOLED`, `COSTS`, `RELATIVE` and `TRAFFIC` with intervals. A measure
        that is unknown for any request is null.
    """
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("press") != config.BASELINE))
    ran = with_references(ran, (*TRACE_KEYS, "source")).with_columns(**_RELATIVES)
    frames = []
    tasks = [None, *ran["task"].unique(maintain_order=True)]
    for task in tasks:
        of_task = ran if task is None else ran.filter(pl.col("task") == task)
        by = ("source", "policy")
        for (source, policy), part in of_task.group_by(by, maintain_order=True):
            values, wholes = _relative_values(part, (*POOLED, *COSTS))
            counted = {
                "source": source,
                "task": task,
                "policy": policy,
                "requests": part.height,
                "prompts": part["prompt_id"].n_unique(),
                "conditions": part.select(CONDITION).n_unique(),
            }
            frames.append(
                pl.DataFrame(counted, schema_overrides={"task": pl.String}).with_columns(
                    **estimates(
                        values, part["prompt_id"], bootstrap_samples, seed, relative_to=wholes
                    )
                )
            )
    if not frames:
        raise ValueError("no run with status 'ok' under a press")
    return pl.concat(frames)


def constant_frontier(table: pl.DataFrame, measured: pl.DataFrame | None = None) -> pl.DataFrame:
    """What a constant ratio of the same press would give at each row's device byte-steps.

    The measured ratios of a press, ratio 0 included, are points (mean device byte-steps, measure)
    under the policy ``none``. Between two neighbouring points the measure is interpolated
    linearly, as if requests were dealt out between the two ratios at random; outside the measured
    range it is null, and so it is beside simulated rows whose policy touched a request: their
    byte-steps are a low estimate (see `kvguard.costs`), which would flatter the policy.

    Args:
        table: rows like those of `summarize_runs`.
        measured: where the points come from: rows with ``none`` for every ratio and the baseline.
            None takes ``table`` itself; a live table borrows them from the simulation's, whose
            ``none`` rows are the measured traces.

    Returns:
        The table with ``constant_harmed``, ``constant_cfr``, ``constant_agreement`` and
        ``constant_accuracy``, of those measures that it has.
    """
    spent, measures = "device_byte_steps", ("harmed", "cfr", "agreement", "accuracy")
    points = table if measured is None else measured
    points = points.filter((pl.col("policy") == "none") & pl.col(spent).is_not_null())
    frames = []
    for (model, press), part in table.with_row_index("order").group_by("model", "press"):
        own = points.filter(
            (pl.col("model") == model) & pl.col("press").is_in([press, config.BASELINE])
        ).sort(spent)
        bytes_ = np.where(_estimated(part), np.nan, part[spent].cast(pl.Float64).to_numpy())
        columns = {}
        for name in (name for name in measures if name in own.columns):
            line = own.drop_nulls(name)
            found = np.full(part.height, np.nan)
            if line.height:
                at, value = line[spent].to_numpy(), line[name].to_numpy()
                found = np.interp(bytes_, at, value, left=np.nan, right=np.nan)
            columns[f"constant_{name}"] = pl.Series(found).fill_nan(None)
        frames.append(part.with_columns(**columns))
    return pl.concat(frames).sort("order").drop("order")


def _estimated(rows: pl.DataFrame) -> BoolArray:
    """(n,) whether a row's device byte-steps are the simulation's estimate."""
    if "source" not in rows.columns:
        return np.zeros(rows.height, np.bool_)
    acts = [pl.col(name).fill_null(1) > 0 for name in ("alarmed", "checks") if name in rows.columns]
    touched = (pl.col("source") == "simulation") & pl.any_horizontal(acts)
    return rows.select(touched.fill_null(True)).to_series().to_numpy()


def pareto(grid: pl.DataFrame, summary: pl.DataFrame) -> pl.DataFrame:
    """The guard's whole grid and every policy in one table, benefit against cost.

    Args:
        grid: from `simulate_points`; its rows are ``guard_promote`` under each setting.
        summary: from `summarize_runs` of the simulation, without the requests that the grid left
            out (``exclude=tied_requests(...)``).

    Returns:
        Both, with `constant_frontier`, and ``efficient``: no other row of the same condition is at
        least as good in excess CFR and in every one of device byte-steps, prefilled tokens and
        decode steps, and better in one of them. Null where any of these is, and for ``offload``,
        which pays in bytes over the bus: those of the others are not simulated.
    """
    rows = grid.with_columns(
        policy=pl.lit("guard_promote"), source=pl.lit("simulation"), known=pl.lit(1.0)
    )
    table = constant_frontier(pl.concat([summary, rows], how="diagonal_relaxed"))
    goals = ("excess_cfr", "device_byte_steps", "tokens_prefilled", "decode_steps")  # all: lower
    frames = []
    for _, part in table.with_row_index("order").group_by(CONDITION):
        values = part.select(pl.col(goals).cast(pl.Float64)).to_numpy().copy()  # (n, 4)
        values[(part["policy"] == "offload").to_numpy()] = np.nan
        no_worse = (values[:, None] <= values[None]).all(axis=2)  # [i, j]: i is no worse than j
        better = (values[:, None] < values[None]).any(axis=2)
        efficient = ~(no_worse & better).any(axis=0)
        undefined = np.isnan(values).any(axis=1)
        flag = (
            pl.Series(efficient)
            .to_frame("efficient")
            .select(pl.when(~pl.Series(undefined)).then("efficient").alias("efficient"))
        )
        frames.append(part.with_columns(flag["efficient"]))
    order = (*CONDITION, "policy", "source", *OperatingPoints._fields)
    return pl.concat(frames).sort("order").select(*order, pl.exclude("order", *order))


def compare_live_simulation(live: pl.DataFrame, simulated: pl.DataFrame) -> pl.DataFrame:
    """Request by request: alarm step and final tokens, live against simulated, and what differs.

    Args:
        live: RUNS with source "live".
        simulated: RUNS with source "simulation".

    Returns:
        One row per (trace, policy) of ``live``: ``alarm_step_live`` and ``_simulated`` (of the
        first alarm; null: none), ``tokens_live`` and ``_simulated``, ``first_difference``
        (position; null: none, or unknown), the difference of every cost (live minus simulated), and
        ``reason``: one of `REASONS`.
    """
    keys = [*TRACE_KEYS, "policy"]
    columns = ("status", "alarm_steps", "token_ids", *COSTS)
    both = (
        live.select(*keys, *columns)
        .join(
            simulated.select(*keys, *columns),
            on=keys,
            how="left",
            suffix="_simulated",
            maintain_order="left",
        )
        .with_columns(
            first_difference=_first_difference("token_ids", "token_ids_simulated"),
            alarm_step_live=pl.col("alarm_steps").list.first(),
            alarm_step_simulated=pl.col("alarm_steps_simulated").list.first(),
        )
    )
    same_alarm = pl.col("alarm_step_live").eq_missing(pl.col("alarm_step_simulated"))
    same_alarm |= pl.col("alarm_steps_simulated").is_null()
    same_tokens = pl.col("token_ids").eq_missing(pl.col("token_ids_simulated"))
    no_alarm = pl.col("alarm_step_live").is_null()
    reason = (
        pl.when(pl.col("status_simulated").is_null())
        .then(pl.lit("not simulated"))
        .when((pl.col("status") != "ok") | (pl.col("status_simulated") != "ok"))
        .then(
            pl.when(pl.col("status") == pl.col("status_simulated"))
            .then(pl.lit("both failed"))
            .otherwise(pl.lit("one failed"))
        )
        .when(~same_alarm)
        .then(pl.lit("alarm step differs"))
        .when(pl.col("token_ids_simulated").is_null())
        .then(pl.lit("outcome unknown offline"))
        .when(same_tokens)
        .then(pl.lit("same"))
        .when(no_alarm)
        .then(pl.lit("draft differs"))
        .otherwise(pl.lit("recovery differs"))
    )
    return both.select(
        *keys,
        "alarm_step_live",
        "alarm_step_simulated",
        tokens_live=pl.col("token_ids").list.len(),
        tokens_simulated=pl.col("token_ids_simulated").list.len(),
        first_difference="first_difference",
        reason=reason,
        **{name: pl.col(name) - pl.col(f"{name}_simulated") for name in COSTS},
    )


REASONS = {
    "same": "same first alarm, where a trace proves it, and same final tokens",
    "outcome unknown offline": "no trace holds what came after the first alarm",
    "alarm step differs": "the hazards differ: another batch, or a draft that differs before",
    "draft differs": "no alarm, yet the compressed answer differs: rounding in another batch",
    "recovery differs": "same alarm, other tokens: a tie within the margin, or rounding",
    "both failed": "an error in both",
    "one failed": "an error in one of them",
    "not simulated": "no simulated run of that trace and policy",
}
"""What `compare_live_simulation` finds, and what explains it."""


def _first_difference(one: str, other: str) -> pl.Expr:
    """Position of the first element in which two list columns differ, null where they do not."""
    return pl.struct(one, other).map_batches(_differing, return_dtype=pl.Int32)


def _differing(pairs: pl.Series) -> pl.Series:
    one, other = (_padded_lists(pairs.struct.field(name)) for name in pairs.struct.fields)
    width = max(one.shape[1], other.shape[1])
    one, other = (
        np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in (one, other)
    )
    differs = one != other
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), -1)
    unknown = pairs.struct.field(pairs.struct.fields[0]).is_null()
    unknown |= pairs.struct.field(pairs.struct.fields[1]).is_null()
    found = pl.Series("at", first, dtype=pl.Int32).replace(-1, None).to_frame()
    return found.select(pl.when(~unknown).then("at"))["at"]


def _padded_lists(lists: pl.Series) -> IntArray:
    """(n, longest) elements of integer lists, padded with -1; a null is an empty list."""
    lengths = lists.list.len().fill_null(0).to_numpy()
    grid = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int32)
    values = lists.filter(pl.Series(lengths > 0)).explode().to_numpy()
    grid[np.arange(grid.shape[1]) < lengths[:, None]] = values
    return grid


def summarize_differences(differences: pl.DataFrame) -> pl.DataFrame:
    """Counts of `compare_live_simulation` by condition, policy and reason, with an explanation."""
    return (
        differences.group_by(*CONDITION, "policy", "reason")
        .agg(requests=pl.len())
        .with_columns(explanation=pl.col("reason").replace_strict(REASONS))
        .sort(*CONDITION, "policy", "requests", descending=[False] * 4 + [True])
    )

"""Tables of the offline simulation: the controller's grid, its operating points, every policy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvguard import config
from kvguard.compare_policies import estimates, pareto, summarize_runs
from kvguard.config import POLICIES
from kvguard.controller import NEVER, OperatingPoints, first_alarm, grid_points, stack_points
from kvguard.costs import COSTS, draft_cost, recovery_cost, trace_memory
from kvguard.detectors import agreement
from kvguard.harm_model import HarmModel
from kvguard.policies import Policy, next_decision
from kvguard.predictor import Predictor
from kvguard.rival_settings import NEVER_RELAX, RivalSetting
from kvguard.schema import CONDITION
from kvguard.simulation import simulate_policies
from kvguard.stored_requests import StoredRequests, load_requests, tied_requests

FloatArray = NDArray[np.float64]

DETECTION = ("false_alarm_rate", "detection_rate", "early_rate", "lead_tokens")
"""Of requests that are harmless under compression alone: the share that alarms. Of those that fail:
the shares that alarm at all and by the onset, and the mean of onset minus alarm where by then."""


def simulate_points(
    requests: StoredRequests,
    settings: OperatingPoints,
    *,
    check_every_tokens: int = 1,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """Benefit and cost of ``guard_promote`` in each condition under each of many settings.

    Requests whose outcome the simulation does not know (`tied_requests`) are left out and counted
    in ``excluded``.

    Args:
        requests: the traces.
        settings: (G,).
        check_every_tokens: tokens of a request between two decisions, see `policies.next_decision`.
        bootstrap_samples: resamples of prompts.
        seed: of the resampling.

    Returns:
        Condition, setting, ``requests``, ``excluded``, the measures of compare_policies, COSTS and
        `DETECTION`, each with ``_low`` and ``_high`` (95 %, prompts resampled); null: undefined.
    """
    usable = requests.first_rejected == requests.first_difference
    table = requests.table.with_columns(
        row=pl.int_range(pl.len()), usable=pl.Series(usable), base=pl.Series(requests.baseline)
    )
    names = pl.DataFrame({name: getattr(settings, name) for name in OperatingPoints._fields}).cast(
        {"k": pl.Int32, "j": pl.Int32}
    )
    frames = []
    compressed = table.filter(pl.col("press") != config.BASELINE)
    for key, part in compressed.group_by(CONDITION, maintain_order=True):
        rows = part.filter("usable")["row"].to_numpy()
        values = _setting_values(requests, settings, rows, check_every_tokens)
        prompts = requests.table["prompt_id"].gather(rows)
        frames.append(
            names.with_columns(
                *(pl.lit(value).alias(name) for name, value in zip(CONDITION, key, strict=True)),
                requests=pl.lit(len(rows)),
                excluded=pl.lit(part.height - len(rows)),
                **estimates(values, prompts, bootstrap_samples, seed),
            )
        )
    if not frames:
        raise ValueError("no compressed request to simulate: only the baseline was given")
    order = [*CONDITION, *OperatingPoints._fields]
    frame = pl.concat(frames)
    return frame.select(*order, pl.exclude(order))


def _setting_values(
    requests: StoredRequests,
    settings: OperatingPoints,
    rows: NDArray[np.integer[Any]],
    check_every_tokens: int,
) -> dict[str, FloatArray]:
    """(G, n) measures of ``guard_promote`` for some rows, NaN where undefined."""
    lengths, base = requests.lengths[rows], requests.baseline[rows]
    alarm = first_alarm(requests.hazard[rows], lengths, settings)  # (G, n)
    alarmed = alarm != NEVER
    length = next_decision(Policy("guard_promote", 0), alarm + 1, check_every_tokens)
    draft = np.where(alarmed, np.minimum(length, lengths), lengths)
    kept = np.minimum(requests.first_rejected[rows], draft)
    memory = trace_memory(requests.table).rows(rows)
    prompts = requests.table["prompt_tokens"].to_numpy()[rows]
    recovery = recovery_cost(
        memory,
        prompts,
        draft,
        draft,
        kept,
        requests.lengths[base],
        ended=draft == lengths,
        cold=requests.cold,
    )
    own = draft_cost(memory, prompts, lengths)._replace(device_byte_steps=memory.measured_steps)
    costs = {name: np.where(alarmed, getattr(recovery, name), getattr(own, name)) for name in COSTS}

    def measure(column: str) -> tuple[FloatArray, FloatArray]:
        """(G, n) under the guard, and (n,) uncompressed."""
        values = requests.table[column].cast(pl.Float64).to_numpy()
        return np.where(alarmed, values[base], values[rows]), values[base]

    failed, base_failed = measure("catastrophe")
    right, base_right = measure("right")
    # An alarmed request ends as the uncompressed one; whether that counts as agreement is asked of
    # the same function as everywhere: silence that comes from breaking down does not.
    returned = requests.table[base].with_columns(requests.table[rows].select("press"))
    agrees = np.where(
        alarmed,
        agreement(returned, requests.table).cast(pl.Float64).to_numpy(),
        requests.table["agrees"].cast(pl.Float64).to_numpy()[rows],
    )
    fails = requests.table["catastrophe"].cast(pl.Float64).to_numpy()[rows]
    onset = requests.table["onset"].cast(pl.Float64).to_numpy()[rows]
    lead = np.where(alarmed & (fails == 1), onset - (draft - 1), np.nan)
    by_onset = np.where(alarmed, onset - (draft - 1) >= 0, False)
    return {
        "alarmed": alarmed.astype(np.float64),
        "cfr": failed,
        "accuracy": right,
        "agreement": agrees,
        "excess_cfr": failed - base_failed,
        "prevented_cfr": fails - failed,
        "excess_error": base_right - right,
        **costs,
        "false_alarm_rate": np.where(fails == 0, alarmed, np.nan),
        "detection_rate": np.where(fails == 1, alarmed, np.nan),
        "early_rate": np.where(fails == 1, by_onset, np.nan),
        "lead_tokens": np.where(lead >= 0, lead, np.nan),
    }


def simulate_controller(
    requests: StoredRequests,
    operating_points: Mapping[str, config.OperatingPoint],
    *,
    check_every_tokens: int = 1,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """`simulate_points` for named operating points; the name is the first column."""
    names = list(operating_points)
    frame = simulate_points(
        requests,
        stack_points(operating_points.values()),
        check_every_tokens=check_every_tokens,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    repeats = frame.height // len(names)
    return frame.select(pl.Series("operating_point", names * repeats), pl.all())


def simulability(runs: pl.DataFrame) -> pl.DataFrame:
    """What the simulation knows of each policy, in words and in counts.

    Args:
        runs: RUNS with source "simulation".

    Returns:
        ``policy``, ``simulability``, ``requests`` (that ran), ``alarmed``, ``known`` (whose outcome
        is) and ``known_among_alarmed``; ``constant`` has no requests, nor has ``guard_price`` at a
        price that waits for its certificate.
    """
    ran = runs.filter((pl.col("status") == "ok") & (pl.col("press") != config.BASELINE))
    known = pl.col("token_ids").is_not_null()
    counts = ran.group_by("policy", maintain_order=True).agg(
        requests=pl.len(),
        alarmed=pl.col("alarmed").sum(),
        known=known.sum(),
        known_among_alarmed=(known & pl.col("alarmed")).sum(),
    )
    words = pl.DataFrame(
        {
            "policy": list(POLICIES),
            "simulability": [entry.simulation for entry in POLICIES.values()],
        }
    )
    return words.join(counts, on="policy", how="left", maintain_order="left").with_columns(
        pl.col("requests", "alarmed", "known", "known_among_alarmed").fill_null(0)
    )


class Frames(NamedTuple):
    """Tables of the same requests: TRACES, TOKENS, OUTCOMES, PREDICTIONS of `kvguard.schema`."""

    traces: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame
    predictions: pl.DataFrame


def simulate_model(
    frames: Frames,
    prompts: pl.DataFrame,
    experiment: config.Config,
    controller: config.OperatingPoint,
    decode: Callable[[Sequence[int]], str],
    rivals: Mapping[tuple[str, str, str], RivalSetting] | None = None,
    gate: Predictor | None = None,
    harm_model: HarmModel | None = None,
    *,
    target: str = "any",
    layers: int | None = None,
) -> pl.DataFrame:
    """Every policy and every oracle on one model's stored requests.

    Args:
        frames: tables of the requests, those of the uncompressed runs among them.
        prompts: `schema.PROMPTS`.
        experiment: the whole configuration.
        controller: drives the guard.
        decode: token ids to text, of that model's tokenizer.
        rivals: what ``clock_or_loop``, ``gate`` and ``ladder`` learned, by condition; None leaves
            them out.
        gate: what ``gate`` and ``ladder`` ask; None: see `simulate_policies`.
        harm_model: what ``guard_price`` asks; None: its default.
        target: of the predictor whose hazard drives the guard: that of its certificate.
        layers: of the model, see `simulate_policies`.

    Returns:
        `schema.RUNS`.
    """
    requests = load_requests(*frames, guard=experiment.guard, target=target)
    fitted = (None, None, None) if rivals is None else _per_request(requests, rivals)
    left_out = ("clock_or_loop", "gate", "ladder") if rivals is None else ()
    return simulate_policies(
        requests,
        [name for name in config.POLICIES if name not in left_out],
        prompts=prompts,
        live=experiment.live,
        detection=experiment.detection,
        controller=controller,
        guard=experiment.guard,
        decode=decode,
        clock_tokens=fitted[0],
        gate_threshold=fitted[1],
        ladder_threshold=fitted[2],
        gate=gate,
        harm_model=harm_model,
        layers=layers,
    )


def _per_request(
    requests: StoredRequests, rivals: Mapping[tuple[str, str, str], RivalSetting]
) -> tuple[NDArray[np.int32], FloatArray, FloatArray]:
    """The rivals' numbers for each request; those of a condition without any never alarm."""
    found = [rivals.get(key) for key in requests.table.select(CONDITION).iter_rows()]
    never = np.iinfo(np.int32).max
    clocks = [never if one is None else one.clock_tokens for one in found]
    gates = [np.inf if one is None else one.gate_threshold for one in found]
    thresholds = [None if one is None else one.ladder_threshold for one in found]
    ladders = [NEVER_RELAX if one is None else one for one in thresholds]
    return np.array(clocks, np.int32), np.array(gates, np.float64), np.array(ladders, np.float64)


def summarize_model(
    frames: Frames,
    runs: pl.DataFrame,
    experiment: config.Config,
    operating_points: Mapping[str, config.OperatingPoint],
    *,
    target: str = "any",
) -> dict[str, pl.DataFrame]:
    """Tables of one model's simulation: the whole grid, the operating points, what is known.

    Args:
        frames: tables of the requests, as `simulate_model` saw them.
        runs: what it returned.
        experiment: the whole configuration.
        operating_points: by name.
        target: as in `simulate_model`.

    Returns:
        ``operating_points``, ``pareto`` and ``simulability``.
    """
    requests = load_requests(*frames, guard=experiment.guard, target=target)
    samples, seed = experiment.predictor.bootstrap_samples, experiment.seed
    every = experiment.guard.check_every_tokens
    grid = simulate_points(
        requests,
        grid_points(experiment.controller),
        check_every_tokens=every,
        bootstrap_samples=samples,
        seed=seed,
    )
    summary = summarize_runs(
        runs,
        frames.outcomes,
        exclude=tied_requests(requests),
        bootstrap_samples=samples,
        seed=seed,
    )
    return {
        "operating_points": simulate_controller(
            requests,
            operating_points,
            check_every_tokens=every,
            bootstrap_samples=samples,
            seed=seed,
        ),
        "pareto": pareto(grid, summary),
        "simulability": simulability(runs),
    }

"""The offline simulation of one run, and what links it to the live experiment."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from kvguard import config, schema
from kvguard.compare_policies import pareto, summarize_runs
from kvguard.controller import settings_grid
from kvguard.evaluate_controller import (
    load_requests,
    simulability,
    simulate_controller,
    simulate_policies,
    simulate_settings,
    tied_requests,
)

KEYS = ("model", "press", "ratio", "policy")

REFERENCE_POLICY = "guard_rewind"
"""The policy whose alarm rate ``random`` matches, and whose mean memory ``constant`` matches."""


class Frames(NamedTuple):
    """Tables of the same requests: TRACES, TOKENS, OUTCOMES, PREDICTIONS of `kvguard.schema`."""

    traces: pl.DataFrame
    tokens: pl.DataFrame
    outcomes: pl.DataFrame
    predictions: pl.DataFrame


class MatchError(ValueError):
    """A rival that has nothing to match."""


def simulate_model(
    frames: Frames,
    prompts: pl.DataFrame,
    experiment: config.Config,
    operating_points: Mapping[str, config.OperatingPoint],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, pl.DataFrame]:
    """Every policy and the whole grid of settings on one model's stored requests.

    Args:
        frames: tables of the requests, those of the uncompressed runs among them.
        prompts: `schema.PROMPTS`.
        experiment: the whole configuration.
        operating_points: by name; ``live.operating_point`` drives the guard.
        decode: token ids to text, of that model's tokenizer.

    Returns:
        ``simulation`` (`schema.RUNS`), ``operating_points``, ``pareto`` and ``simulability``.
    """
    requests = load_requests(*frames, margin_nats=experiment.live.margin_nats)
    runs = simulate_policies(
        requests,
        config.POLICY_NAMES,
        prompts=prompts,
        live=experiment.live,
        detection=experiment.detection,
        controller=operating_points[experiment.live.operating_point],
        safe_ratio=experiment.controller.safe_ratio,
        holdback_tokens=experiment.controller.holdback_tokens,
        decode=decode,
    )
    samples, seed = experiment.predictor.bootstrap_samples, experiment.seed
    grid = simulate_settings(
        requests, settings_grid(experiment.controller), bootstrap_samples=samples, seed=seed
    )
    summary = summarize_runs(
        runs,
        frames.outcomes,
        exclude=tied_requests(requests),
        bootstrap_samples=samples,
        seed=seed,
    )
    return {
        "simulation": runs,
        "operating_points": simulate_controller(
            requests, operating_points, bootstrap_samples=samples, seed=seed
        ),
        "pareto": pareto(grid, summary),
        "simulability": simulability(runs),
    }


def matched_rate(simulated: pl.DataFrame, model: str, press: str, ratio: str) -> float:
    """Share of one condition's requests that the guard alarms in the simulation.

    Raises:
        MatchError: the simulation has no such request.
    """
    alarmed = _condition(simulated, model, press, ratio, REFERENCE_POLICY)["alarmed"]
    if alarmed.is_empty():
        raise MatchError(f"no simulated {REFERENCE_POLICY} requests of {model} {press} {ratio}")
    return float(alarmed.cast(pl.Float64).mean() or 0.0)  # type: ignore[arg-type]


def matched_ratio(simulated: pl.DataFrame, model: str, press: str, ratio: str) -> str:
    """The constant ratio at which the press alone takes as much memory as the guard does.

    Mean KV bytes fall linearly with the ratio, so the ratio lies where the guard's mean lies
    between those of the uncompressed run and of compression alone.

    Returns:
        a ratio with three decimals between "0.000" and the condition's own.

    Raises:
        MatchError: the simulation does not know one of the three means.
    """
    baseline = (model, config.BASELINE, config.BASELINE_RATIO, "none")
    means = [
        _condition(simulated, *keys)["kv_bytes_mean"].mean()
        for keys in (
            baseline,
            (model, press, ratio, "none"),
            (model, press, ratio, REFERENCE_POLICY),
        )
    ]
    if any(mean is None for mean in means) or means[0] == means[1]:
        raise MatchError(
            f"{model} {press} {ratio}: the simulation does not know the guard's memory"
        )
    whole, alone, guarded = (float(mean) for mean in means)  # type: ignore[arg-type]
    share = min(max((whole - guarded) / (whole - alone), 0.0), 1.0)
    return config.ratio_text(round(float(ratio) * share, 3))


def _condition(runs: pl.DataFrame, *values: str) -> pl.DataFrame:
    wanted = [pl.col(key) == value for key, value in zip(KEYS, values, strict=True)]
    return schema.check(runs, schema.RUNS, "simulation").filter(wanted, pl.col("status") == "ok")

"""The offline simulation of one model's part of a run: policies, the grid, the summary."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from kvguard import config
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
        check_every_tokens=experiment.controller.check_every_tokens,
        holdback_tokens=experiment.controller.holdback_tokens,
        decode=decode,
    )
    samples, seed = experiment.predictor.bootstrap_samples, experiment.seed
    grid = simulate_settings(
        requests,
        settings_grid(experiment.controller),
        check_every_tokens=experiment.controller.check_every_tokens,
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
        "simulation": runs,
        "operating_points": simulate_controller(
            requests,
            operating_points,
            check_every_tokens=experiment.controller.check_every_tokens,
            bootstrap_samples=samples,
            seed=seed,
        ),
        "pareto": pareto(grid, summary),
        "simulability": simulability(runs),
    }

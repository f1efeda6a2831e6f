"""Features and labels with a planted truth, for tests of training and evaluation.

`planted_hazard` draws onsets from a hazard that is a known function of two signals, and gives the
true chance of an onset within the horizon. `independent_labels` draws onsets that nothing can tell.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from kvguard import schema

CONDITIONS = (("none", "0.000"), ("snapkv", "0.500"), ("snapkv", "0.750"), ("knorm", "0.500"))
HORIZON_TOKENS = 8
PERSISTENCE, SLOPE, OFFSET = 0.95, 4.0, -7.0


class Planted(NamedTuple):
    """Tables, and ``truth``: the keys of each token with the true chance (null: not defined)."""

    features: pl.DataFrame
    labels: pl.DataFrame
    outcomes: pl.DataFrame
    truth: pl.DataFrame


def planted_hazard(prompts: int, seed: int, tokens: int = 60) -> Planted:
    """Onsets with hazard sigmoid(4 z - 7), z = entropy + top-1 probability (standardised).

    Both signals are autoregressive of order one with the same coefficient, hence so is their sum,
    and the chance of an onset within the horizon depends on z and the tokens left alone. It is
    computed by backward recursion on a grid.
    """
    rng = np.random.default_rng(seed)
    risk = _risk_table(PERSISTENCE, tokens)
    requests = []
    for prompt in range(prompts):
        for press, ratio in CONDITIONS:
            first, second = (_autoregressive(rng, PERSISTENCE, tokens) for _ in range(2))
            z = (first + second) / np.sqrt(2)
            events = np.flatnonzero(rng.random(tokens) < expit(SLOPE * z + OFFSET))
            onset = int(events[0]) if len(events) else None
            left = np.minimum(HORIZON_TOKENS - 1, tokens - 1 - np.arange(tokens))
            truth = risk(z, left)
            signals = {"entropy": first, "top1_probability": second}
            requests.append(
                _request(rng, prompt, press, ratio, tokens, onset, signals, tokens, truth)
            )
    return _collect(requests)


def independent_labels(prompts: int, seed: int, tokens: int = 80) -> Planted:
    """Onsets at a constant hazard, independent of every feature, of position and of length.

    Features differ by prompt and by request, so that prompts are not exchangeable token by token.
    An onset after the request's end still labels the tokens before it: otherwise the last tokens
    would be known to be safe, and the position would foretell something.
    """
    rng = np.random.default_rng(seed)
    requests = []
    for prompt in range(prompts):
        own = rng.normal(size=len(schema.FEATURE_NAMES))
        for press, ratio in CONDITIONS:
            length = int(rng.integers(30, tokens))
            drift = np.cumsum(rng.normal(size=(length, len(own))), axis=0) * 0.2
            levels = own + rng.normal(size=len(own)) + drift
            signals = dict(zip(schema.FEATURE_NAMES, levels.T, strict=True))
            onset = int(rng.geometric(0.025)) - 1
            requests.append(_request(rng, prompt, press, ratio, length, onset, signals, tokens))
    return _collect(requests)


def planted_harm(
    prompts: int, seed: int, shift: float = 0.6, *, onset_at: int | None = None
) -> Planted:
    """Requests harmed by a coin; only the entropy tells, by ``shift`` standard deviations.

    Length, onset and repetition are the same for all. With ``onset_at`` every onset stands at that
    one position: the position then foretells the label of a token, and never which request.
    """
    rng = np.random.default_rng(seed)
    requests = []
    for prompt in range(prompts):
        for press, ratio in CONDITIONS:
            length = int(rng.integers(28, 48))
            harmed = press != "none" and rng.random() < 0.5
            onset = onset_at if onset_at is not None else int(rng.integers(6, length))
            signals = {"entropy": rng.normal(size=length) + shift * harmed}
            requests.append(
                _request(rng, prompt, press, ratio, length, onset if harmed else None, signals, 48)
            )
    return _collect(requests)


def _autoregressive(rng: np.random.Generator, rho: float, tokens: int) -> NDArray[np.float64]:
    steps = rng.normal(size=tokens) * np.sqrt(1 - rho**2)
    steps[0] = rng.normal()
    values = np.empty(tokens)
    values[0] = steps[0]
    for index in range(1, tokens):
        values[index] = rho * values[index - 1] + steps[index]
    return values


Risk = Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]]


def _risk_table(rho: float, tokens: int) -> Risk:
    """Chance of an onset in the next m tokens, as a function of z and m."""
    grid = np.linspace(-5, 5, 201)
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    spread = np.sqrt(1 - rho**2)
    move = np.diff(norm.cdf((edges[None, :] - rho * grid[:, None]) / spread), axis=1)
    survive = 1 - expit(SLOPE * grid + OFFSET)
    survival = [np.ones(len(grid))]
    for _ in range(min(HORIZON_TOKENS, tokens)):
        survival.append(move @ (survive * survival[-1]))
    risks = 1 - np.array(survival)

    def risk(z: NDArray[np.float64], left: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([np.interp(one, grid, risks[m]) for one, m in zip(z, left, strict=True)])

    return risk


class _Request(NamedTuple):
    """One request's columns; every array is (tokens,)."""

    keys: tuple[str, str, str, str]
    values: dict[str, NDArray[np.float64]]
    onset: int | None
    truth: NDArray[np.float64] | None


def _request(
    rng: np.random.Generator,
    prompt: int,
    press: str,
    ratio: str,
    length: int,
    onset: int | None,
    signals: dict[str, NDArray[np.float64]],
    max_new_tokens: int,
    truth: NDArray[np.float64] | None = None,
) -> _Request:
    values = {name: rng.normal(size=length) for name in schema.FEATURE_NAMES} | signals
    values["relative_position"] = np.arange(length) / max_new_tokens
    values["compression_ratio"] = np.full(length, float(ratio))
    return _Request(("m", press, ratio, f"{prompt:016x}"), values, onset, truth)


def _collect(requests: list[_Request]) -> Planted:
    lengths = [len(request.values["entropy"]) for request in requests]
    positions = [np.arange(length) for length in lengths]
    keys = zip(*(request.keys for request in requests), strict=True)
    base = pl.DataFrame(
        {
            name: np.repeat(np.array(column, object), lengths)
            for name, column in zip(schema.TRACE_KEYS, keys, strict=True)
        },
        schema=dict.fromkeys(schema.TRACE_KEYS, pl.String),
    ).with_columns(position=np.concatenate(positions))
    names = requests[0].values
    features = base.with_columns(
        pl.Series(name, np.concatenate([request.values[name] for request in requests]))
        for name in names
    )
    inside = [r.onset is not None and r.onset < n for r, n in zip(requests, lengths, strict=True)]
    steps = np.concatenate(
        [
            np.full(len(position), 10**6) if request.onset is None else request.onset - position
            for request, position in zip(requests, positions, strict=True)
        ]
    )
    known = pl.Series(steps, dtype=pl.Int32).set(~pl.Series(np.repeat(inside, lengths)), None)
    labels = base.with_columns(
        column
        for target in schema.TARGETS
        for column in (
            known.alias(f"steps_to_{target}"),
            pl.Series(f"hazard_{target}", (steps >= 0) & (steps < HORIZON_TOKENS)),
            pl.Series(f"post_onset_{target}", steps <= 0),
        )
    )
    chances = [
        np.full(length, np.nan) if request.truth is None else request.truth
        for request, length in zip(requests, lengths, strict=True)
    ]
    truth = pl.Series("truth", np.concatenate(chances)).fill_nan(None)
    null = {name: pl.lit(None, kind) for name, kind in schema.OUTCOMES.items()}
    empty = [column.alias(name) for name, column in null.items() if name not in schema.TRACE_KEYS]
    traces = base.select(schema.TRACE_KEYS).unique(maintain_order=True)
    return Planted(
        schema.conform(features, schema.FEATURES),
        schema.conform(labels, schema.LABELS),
        traces.with_columns(empty).select(list(schema.OUTCOMES)),
        base.with_columns(truth),
    )

"""Offline simulation: what a policy would have done to requests that are already on disk.

The policies and the controller are the live guard's own; only the model is missing. What a policy
does up to its first intervention follows from the trace. What comes after is *known* in four cases:

1. The policy never intervenes: the trace itself is the result.
2. The answer is generated afresh at a safe ratio of 0 (``guard_restart``, ``ergo``,
   ``always_safe``): the result is the uncompressed trace of the same prompt.
3. The draft is verified by the uncompressed model and cut at the first token that it would not have
   chosen (``guard_rewind``, ``guard_gate``, ``random``, ``entropy``, ``verify_all``). Everything
   kept is the uncompressed answer's prefix and the rest is generated uncompressed, so the result is
   again the uncompressed trace, token for token. The trace's audit says where the cut is.
   Recoveries that cut elsewhere (``guard_rewind_tolerant``) or nowhere (``guard_recompute``) belong
   here for requests whose draft had not left the uncompressed answer when they alarmed.
4. The tokens do not change (``guard_relax_only`` after compression that happened at prefill alone)
   or are a known prefix of the trace's (``ngram_stop``).

Everything else (a loop pruned from the cache, a refreshed or recompressed cache, a continuation of
tokens that the uncompressed model would not have chosen) is a counterfactual that no trace holds:
its outcome is null, and only live runs can fill it in. So whenever a failure counts as prevented
here, the answer that takes its place is one that the guard provably returns, not one that another
request happened to get. `Requests.exact_up_to` says how far the premise of case 3 holds for a
trace: where the audit and the uncompressed tokens disagree (a tie within the numeric margin), the
outcome of an alarm behind that point is null too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from kvguard import config, schema
from kvguard.controller import NEVER, Settings, first_alarm, stack_settings
from kvguard.policies import Action, Observation, Policy, is_alarm, make_policy

NOWHERE = np.iinfo(np.int32).max
"""A position that no answer reaches."""

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


class Requests(NamedTuple):
    """Traces as arrays, longest answer first; N requests of at most T tokens.

    ``table`` has the columns of TRACES and OUTCOMES, and ``token_ids`` as lists.
    """

    table: pl.DataFrame
    failed: pl.DataFrame  # TRACES rows whose status is "error"
    token_ids: IntArray  # (N, T) padded with -1
    signals: NDArray[np.float32]  # (tokens, 28) of all requests, end to end
    offsets: NDArray[np.int64]  # (N,) where each request's signals start
    hazard: NDArray[np.float32]  # (N, T) padded with NaN
    lengths: IntArray  # (N,)
    baseline: NDArray[np.int64]  # (N,) row of the same prompt uncompressed; -1 where there is none
    first_rejected: IntArray  # (N,) where REWIND cuts at the earliest; NOWHERE: nothing is rejected
    exact_up_to: IntArray  # (N,) an alarm after at most that many tokens ends as the baseline


class Replay(NamedTuple):
    """A policy's first intervention in each of N requests."""

    position: IntArray  # (N,) 0-based token at which it comes; -1: never
    action: NDArray[np.int8]  # (N,) Action; CONTINUE where there is none


class Cost(NamedTuple):
    """What requests cost, arrays of one shape; NaN where undefined or unknown."""

    kv_bytes_mean: FloatArray
    kv_bytes_peak: FloatArray
    prefilled_tokens: FloatArray
    decode_steps: FloatArray
    wasted_tokens: FloatArray


def load_requests(
    traces: pl.DataFrame,
    tokens: pl.DataFrame,
    outcomes: pl.DataFrame,
    predictions: pl.DataFrame | None,
    *,
    target: str = "any",
    margin_nats: float = 1e-3,
    do_sample: bool = False,
    prompt_ids: Collection[str] | None = None,
) -> Requests:
    """Arrange a run's tables for simulation."""
    raise NotImplementedError


def replay(policy: Policy, requests: Requests) -> Replay:
    """Run a policy over traces, token by token, until it first intervenes in each."""
    raise NotImplementedError


def simulate_policies(
    requests: Requests,
    policies: Iterable[str],
    *,
    prompts: pl.DataFrame,
    live: config.Live,
    detection: config.Detection,
    controller: config.OperatingPoint | None = None,
    alarm_rate: float | None = None,
    safe_ratio: str = config.BASELINE_RATIO,
    holdback_tokens: int = 16,
    prefix_tokens: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> pl.DataFrame:
    """One RUNS row (source "simulation") per request and policy."""
    raise NotImplementedError


def simulate_settings(
    requests: Requests,
    settings: Settings,
    *,
    prefix_tokens: int = 0,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """Benefit and cost of ``guard_rewind`` for each condition and each of many settings."""
    raise NotImplementedError


def simulate_controller(
    requests: Requests,
    operating_points: Mapping[str, config.OperatingPoint],
    *,
    prefix_tokens: int = 0,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """`simulate_settings` for named operating points, with what they detect and how early."""
    raise NotImplementedError


def pareto(
    grid: pl.DataFrame, runs: pl.DataFrame, *, bootstrap_samples: int = 500, seed: int = 0
) -> pl.DataFrame:
    """The guard's grid and every rival in one table, with the constant ratio of equal memory."""
    raise NotImplementedError


def summarize_runs(
    runs: pl.DataFrame, *, bootstrap_samples: int = 500, seed: int = 0
) -> pl.DataFrame:
    """Paired benefit and cost of each policy in each condition, live or simulated."""
    raise NotImplementedError


def constant_frontier(summary: pl.DataFrame) -> pl.DataFrame:
    """What a constant ratio of the same press gives at each row's mean KV memory."""
    raise NotImplementedError


def simulability(runs: pl.DataFrame) -> pl.DataFrame:
    """Per policy: what of it the simulation knows, in words and in counts."""
    raise NotImplementedError


def compare_live_simulation(live: pl.DataFrame, simulated: pl.DataFrame) -> pl.DataFrame:
    """Request by request: alarm step and final tokens, live against simulated, with the reason."""
    raise NotImplementedError


def summarize_differences(differences: pl.DataFrame) -> pl.DataFrame:
    """Counts of `compare_live_simulation` by condition, policy and reason."""
    raise NotImplementedError


def alarm_rate(requests: Requests, controller: config.OperatingPoint) -> float | None:
    """Share of compressed requests that the controller alarms: the rate of ``random``."""
    raise NotImplementedError

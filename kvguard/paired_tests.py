"""Paired comparisons of two policies (or predictors) on the same prompts.

The exact McNemar test for yes-or-no results, the paired bootstrap for costs, Holm's adjustment for
as many comparisons as a table holds. The unit is the prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.contingency_tables import mcnemar

from kvguard.metrics import bootstrap_interval, resample_weights


class Estimate(NamedTuple):
    """A number with its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> float | None:
    """Exact two-sided McNemar test that two yes-or-no results on the same prompts are as frequent.

    Args:
        first, second: (n,) yes or no, one pair per prompt.

    Returns:
        The p-value; None without pairs. 1 when no pair disagrees.
    """
    first, second = _paired(first, second, np.bool_)
    if len(first) == 0:
        return None
    table = [
        [int((first & second).sum()), int((first & ~second).sum())],
        [int((~first & second).sum()), int((~first & ~second).sum())],
    ]
    if table[0][1] + table[1][0] == 0:
        return 1.0
    return float(mcnemar(table, exact=True).pvalue)


def cluster_bootstrap_mean(
    values: ArrayLike,
    prompts: Sequence[Any] | NDArray[Any],
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean over rows, with an interval that resamples prompts.

    Args:
        values: (n,) one value per row; NaN rows are left out.
        prompts: (n,) the prompt of each row.
        samples: bootstrap samples.
        seed: of the resampling.
        confidence: of the interval.
        bounds: range of the mean, see `bootstrap_interval`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    codes = np.unique(np.asarray(prompts), return_inverse=True)[1]
    if numbers.shape != codes.shape:
        raise ValueError(f"values and prompts differ in length: {numbers.shape}, {codes.shape}")
    known = np.isfinite(numbers)
    if not known.any():
        return Estimate(None, None, None)
    codes = np.unique(codes[known], return_inverse=True)[1]
    clusters = int(codes.max()) + 1
    sums = np.bincount(codes, weights=numbers[known], minlength=clusters)
    counts = np.bincount(codes, minlength=clusters).astype(float)
    weights = resample_weights(clusters, samples, seed)
    value = float(sums.sum() / counts.sum())
    replicates = (weights @ sums) / (weights @ counts)
    return Estimate(value, *bootstrap_interval(value, replicates, clusters, confidence, bounds))


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    prompts: Sequence[Any] | NDArray[Any],
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean difference of paired rows, ``second`` minus ``first``, resampling prompts.

    Args:
        first, second: (n,) values of the same request under two policies; a pair with a NaN is
            left out.
        prompts: (n,) the prompt of each pair.
        samples: bootstrap samples.
        seed: of the resampling.
        confidence: of the interval.

    Returns:
        Undefined without pairs; the interval is undefined when no pair differs.
    """
    first, second = _paired(first, second, np.float64)
    return cluster_bootstrap_mean(
        second - first, prompts, samples=samples, seed=seed, confidence=confidence
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: all adjusted values below alpha hold together at that level.

    Args:
        p_values: of one family of tests; None: undefined, and not part of the family.

    Returns:
        Adjusted p-values in the order given, at most 1.

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    known = sorted((value, at) for at, value in enumerate(p_values) if value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (value, at) in enumerate(known):
        largest = max(largest, min((len(known) - rank) * value, 1.0))
        adjusted[at] = largest
    return adjusted


def _paired(first: ArrayLike, second: ArrayLike, kind: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = np.asarray(first, dtype=kind), np.asarray(second, dtype=kind)
    if one.ndim != 1 or one.shape != two.shape:
        raise ValueError(f"paired values have one length, got shapes {one.shape} and {two.shape}")
    return one, two

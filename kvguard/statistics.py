"""Intervals and paired tests for numbers that come from prompts.

Requests that share a prompt are not independent, and the tokens of a request even less so. Every
interval here treats the prompt as the unit: either there is one value per prompt, or prompts are
resampled whole (cluster bootstrap).

With the few prompts of a small study the percentile bootstrap is too narrow. `bootstrap_interval`
therefore uses the bootstrap for the standard error only, and takes the quantile from Student's t
with one degree of freedom less than there are prompts that carry information.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]

MIN_UNITS = 3
"""Fewer informative prompts than this and an interval is undefined."""


class Interval(NamedTuple):
    """A confidence interval; both ends are None where it is undefined."""

    low: float | None
    high: float | None


class Estimate(NamedTuple):
    """A number with its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


UNDEFINED = Interval(None, None)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share; undefined without trials.

    Source: Wilson (1927), through statsmodels.

    Raises:
        ValueError: successes outside 0..trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes lie in 0..trials={trials}, got {successes}")
    if trials == 0:
        return UNDEFINED
    low, high = proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
    return Interval(float(low), float(high))


def newcombe_paired_interval(
    first: ArrayLike, second: ArrayLike, confidence: float = 0.95
) -> Estimate:
    """Difference of two shares on the same prompts, ``second`` minus ``first``.

    Args:
        first, second: (n,) yes or no, one pair per prompt.
        confidence: of the interval.

    Returns:
        The difference in [-1, 1]; undefined without pairs.

    Raises:
        ValueError: lengths differ.

    Source: Newcombe (1998), Statistics in Medicine 17, method 10: Wilson intervals of the two
    shares, squared and added, with their correlation (continuity-corrected).
    """
    first, second = _paired(first, second, np.bool_)
    n = len(first)
    if n == 0:
        return Estimate(None, None, None)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    low1, high1 = _wilson(both + only_first, n, confidence)
    low2, high2 = _wilson(both + only_second, n, confidence)
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / np.sqrt(margins) if margins else 0.0
    below = _root(p2 - low2, high1 - p1, phi)
    above = _root(high2 - p2, p1 - low1, phi)
    return Estimate(p2 - p1, max(p2 - p1 - below, -1.0), min(p2 - p1 + above, 1.0))


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


def paired_permutation_test(
    first: ArrayLike, second: ArrayLike, *, samples: int = 9999, seed: int = 0
) -> float | None:
    """Two-sided sign-flip test that paired values have equal means.

    Args:
        first, second: (n,) one pair per prompt (average a prompt's requests first).
        samples: random sign patterns; with at most that many patterns all are tried (exact).
        seed: of the random patterns.

    Returns:
        The p-value; None without pairs.
    """
    first, second = _paired(first, second, np.float64)
    if len(first) == 0:
        return None
    if np.all(first == second):
        return 1.0
    result = stats.permutation_test(
        (second - first,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=samples,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def resample_weights(clusters: int, samples: int, seed: int) -> Floats:
    """How often each cluster is drawn in each bootstrap sample: (samples, clusters)."""
    if clusters == 0:
        return np.zeros((samples, 0))
    rng = np.random.default_rng([seed, clusters])
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=samples).astype(float)


def bootstrap_interval(
    value: float | None,
    replicates: ArrayLike,
    units: int,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Interval:
    """Interval from bootstrap replicates: their standard error, Student's t, ``units`` - 1 df.

    Args:
        value: the estimate itself.
        replicates: (B,) the estimate on resampled prompts; NaN where it is undefined.
        units: prompts that carry the information: for a ranking metric the smaller of the number
            of prompts with a positive and with a negative.
        confidence: of the interval.
        bounds: range of the quantity: Wilson's interval for as many trials as would have that
            standard error (Korn and Graubard 1998 for clustered shares); it stays inside. At a
            bound, or when all replicates agree, the bootstrap says nothing, and ``units`` trials
            are assumed. None: symmetric around the value.

    Returns:
        Undefined without a value, with fewer than `MIN_UNITS` units, when under half of the
        replicates are defined, or when an unbounded quantity does not vary at all.
    """
    drawn = np.asarray(replicates, dtype=np.float64)
    drawn = drawn[np.isfinite(drawn)]
    if value is None or units < MIN_UNITS or 2 * len(drawn) < np.size(replicates) or not len(drawn):
        return UNDEFINED
    quantile = _t_quantile(0.5 + confidence / 2, units - 1)
    error = float(drawn.std()) * np.sqrt(units / (units - 1))
    if bounds is None:
        return (
            Interval(value - quantile * error, value + quantile * error) if error > 0 else UNDEFINED
        )
    lower, upper = bounds
    share = min(max((value - lower) / (upper - lower), 0.0), 1.0)
    error /= upper - lower
    spread = share * (1 - share)
    size = spread / error**2 if error > 1e-9 and spread > 1e-12 else float(units)
    widening = quantile**2 / size
    centre = (share + widening / 2) / (1 + widening)
    reach = quantile * np.sqrt(spread / size + widening / (4 * size)) / (1 + widening)
    return Interval(
        float(lower + (upper - lower) * max(centre - reach, 0.0)),
        float(lower + (upper - lower) * min(centre + reach, 1.0)),
    )


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


def family_confidence(rows: int, confidence: float = 0.95) -> float:
    """Confidence each of ``rows`` intervals needs, so that all hold with ``confidence``.

    Bonferroni: valid whatever the dependence between the rows.
    """
    return 1 - (1 - confidence) / max(rows, 1)


def bootstrap_statistic(
    statistic: Callable[[Floats], Floats], clusters: int, *, samples: int, seed: int
) -> tuple[float | None, Floats]:
    """A statistic of cluster weights on the data and on ``samples`` resamples of it.

    Args:
        statistic: maps weights (B, clusters) to values (B,), NaN where undefined.
        clusters: number of prompts.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        The value on the data (None where undefined) and the replicates (samples,).
    """
    value = float(statistic(np.ones((1, clusters)))[0])
    replicates = statistic(resample_weights(clusters, samples, seed))
    return (value if np.isfinite(value) else None), replicates


def _paired(first: ArrayLike, second: ArrayLike, kind: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = np.asarray(first, dtype=kind), np.asarray(second, dtype=kind)
    if one.ndim != 1 or one.shape != two.shape:
        raise ValueError(f"paired values have one length, got shapes {one.shape} and {two.shape}")
    return one, two


@cache
def _t_quantile(level: float, degrees: int) -> float:
    return float(stats.t.ppf(level, degrees))


def _wilson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    low, high = proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def _root(one: float, two: float, phi: float) -> float:
    return float(np.sqrt(max(one**2 - 2 * phi * one * two + two**2, 0.0)))

"""Metrics of tokens and requests, and their intervals over prompts.

Requests that share a prompt are not independent, and the tokens of a request even less so. Every
interval therefore treats the prompt as the unit: prompts are resampled whole (cluster bootstrap).
With the few prompts of a small study the percentile bootstrap is too narrow: `bootstrap_interval`
uses the bootstrap for the standard error only, and takes the quantile from Student's t with one
degree of freedom less than there are prompts that carry information.

A metric is a function of how often each prompt was drawn. Scores are therefore tallied per prompt
and score level once, and all replicates follow from one matrix product. Estimates are exact;
replicates, which only give the standard error, put scores into at most `LEVELS` levels of equal
size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

LEVELS = 1024

INTERVAL_TYPES: dict[str, Any] = dict.fromkeys(
    ("value", "low", "high", "low_pointwise", "high_pointwise"), pl.Float64
)
"""Columns that `with_intervals` adds to a table."""


MIN_UNITS = 3
"""Fewer informative prompts than this and an interval is undefined."""


class Interval(NamedTuple):
    """A confidence interval; both ends are None where it is undefined."""

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


def exact_reach(units: int, confidence: float = 0.95) -> float:
    """The largest share of prompts that can differ when none of ``units`` does.

    Source: Clopper and Pearson (1934): 1 - (error / 2) ** (1 / units).
    """
    return float(1 - ((1 - confidence) / 2) ** (1 / units))


@cache
def _t_quantile(level: float, degrees: int) -> float:
    return float(stats.t.ppf(level, degrees))


class Measured(NamedTuple):
    """A metric with its bootstrap replicates; ``value`` is None where it is undefined.

    ``units`` counts the prompts that carry the information. ``scale`` is the most that one prompt
    can change a difference; None for anything else.
    """

    value: float | None
    replicates: Floats
    units: int
    bounds: tuple[float, float] | None = (0.0, 1.0)
    scale: float | None = None

    def interval(self, confidence: float = 0.95) -> tuple[float | None, float | None]:
        """Its confidence interval over prompts.

        A difference of shares that is the same in every resample has an exact one (`exact_reach`).
        """
        drawn = self.replicates[np.isfinite(self.replicates)]
        still = len(drawn) > 0 and float(np.ptp(drawn)) < 1e-12
        if self.value is not None and self.scale and self.units >= MIN_UNITS and still:
            reach = self.scale * exact_reach(self.units, confidence)
            return self.value - reach, self.value + reach
        return bootstrap_interval(self.value, self.replicates, self.units, confidence, self.bounds)

    def minus(self, other: "Measured") -> "Measured":
        """The paired difference; both must come from the same resamples."""
        if self.value is None or other.value is None:
            return Measured(None, self.replicates, 0, None)
        return Measured(
            self.value - other.value,
            self.replicates - other.replicates,
            min(self.units, other.units),
            None,
            1.0 if self.bounds == other.bounds == (0.0, 1.0) else None,
        )


class Sample(NamedTuple):
    """Things to rank: scores and labels (n,), the prompt code of each, weights (B, prompts)."""

    scores: Floats
    labels: Bools
    prompts: NDArray[np.int64]
    weights: Floats

    def take(self, mask: Bools) -> "Sample":
        """The things where ``mask`` is true."""
        return Sample(self.scores[mask], self.labels[mask], self.prompts[mask], self.weights)

    @property
    def units(self) -> int:
        """The smaller of the numbers of prompts with a positive and with a negative."""
        positives = len(np.unique(self.prompts[self.labels]))
        return min(positives, len(np.unique(self.prompts[~self.labels])))

    @property
    def ranks_something(self) -> bool:
        """Whether both classes are there."""
        return bool(self.labels.any() and not self.labels.all())


def undefined(weights: Floats) -> Measured:
    """A metric without a value."""
    return Measured(None, np.full(len(weights), np.nan), 0)


class Levels(NamedTuple):
    """Positives and negatives at each score level, rising: weights (B, levels), exact (1, all)."""

    positive: Floats
    negative: Floats
    exact_positive: Floats
    exact_negative: Floats


def tally_levels(sample: Sample) -> Levels:
    """Count positives and negatives per score level, in each replicate and in the sample itself."""
    level = np.unique(sample.scores, return_inverse=True)[1]
    count = int(level.max(initial=-1)) + 1
    exact = [
        np.bincount(level[mask], minlength=count).astype(float)[None, :]
        for mask in (sample.labels, ~sample.labels)
    ]
    if count > LEVELS:
        at_or_below = np.cumsum(np.bincount(level))
        level, count = (at_or_below[level] - 1) * LEVELS // len(level), LEVELS
    prompts = sample.weights.shape[1]
    cell = sample.prompts * count + level
    drawn = [
        sample.weights @ np.bincount(cell[mask], minlength=prompts * count).reshape(prompts, count)
        for mask in (sample.labels, ~sample.labels)
    ]
    return Levels(drawn[0], drawn[1], exact[0], exact[1])


def _concordance(positive: Floats, negative: Floats) -> tuple[Floats, Floats]:
    """Concordant pairs (ties count half) and all pairs, per replicate: (B,) each."""
    below = np.cumsum(negative, axis=1) - negative / 2
    return (positive * below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


def auroc(sample: Sample, levels: Levels | None = None) -> Measured:
    """Area under the ROC curve; higher is better, 0.5 is chance. None without both classes."""
    if not sample.ranks_something:
        return undefined(sample.weights)
    levels = levels or tally_levels(sample)
    value = _ratio(*_concordance(levels.exact_positive, levels.exact_negative))
    replicates = _ratio(*_concordance(levels.positive, levels.negative))
    return Measured(float(value[0]), replicates, sample.units)


def auroc_within(sample: Sample, conditions: NDArray[np.int64]) -> Measured:
    """AUROC over pairs of the same condition; conditions weigh by their number of pairs."""
    weights = sample.weights
    concordant, pairs = np.zeros((2, len(weights)))
    value = total = 0.0
    positives: set[int] = set()
    negatives: set[int] = set()
    for condition in np.unique(conditions):
        part = sample.take(conditions == condition)
        if not part.ranks_something:
            continue
        levels = tally_levels(part)
        won, possible = _concordance(levels.exact_positive, levels.exact_negative)
        value, total = value + float(won[0]), total + float(possible[0])
        both = _concordance(levels.positive, levels.negative)
        concordant, pairs = concordant + both[0], pairs + both[1]
        positives |= set(part.prompts[part.labels].tolist())
        negatives |= set(part.prompts[~part.labels].tolist())
    if not total:
        return undefined(weights)
    units = min(len(positives), len(negatives))
    return Measured(value / total, _ratio(concordant, pairs), units)


def pr_auc(sample: Sample, levels: Levels | None = None) -> Measured:
    """Average precision; higher is better, the prevalence is chance. None without both classes."""
    if not sample.ranks_something:
        return undefined(sample.weights)
    levels = levels or tally_levels(sample)
    value = _average_precision(levels.exact_positive, levels.exact_negative)
    replicates = _average_precision(levels.positive, levels.negative)
    return Measured(float(value[0]), replicates, sample.units)


def _average_precision(positive: Floats, negative: Floats) -> Floats:
    positive, negative = positive[:, ::-1], negative[:, ::-1]
    caught, alarms = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
    precision = np.where(alarms > 0, caught / np.maximum(alarms, 1e-300), 0.0)
    return _ratio((positive * precision).sum(axis=1), positive.sum(axis=1))


def share(
    events: NDArray[Any],
    prompts: NDArray[np.int64],
    weights: Floats,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Measured:
    """Mean of ``events`` (n,), with replicates over prompts. None without events."""
    if not len(events):
        return undefined(weights)
    size = weights.shape[1]
    sums = np.bincount(prompts, weights=events.astype(float), minlength=size)
    counts = np.bincount(prompts, minlength=size).astype(float)
    replicates = _ratio(weights @ sums, weights @ counts)
    return Measured(float(events.mean()), replicates, int((counts > 0).sum()), bounds)


def quantile(values: Floats, prompts: NDArray[np.int64], weights: Floats, level: float) -> Measured:
    """A quantile of ``values`` (n,), with replicates over prompts. None without values."""
    if not len(values):
        return undefined(weights)._replace(bounds=None)
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[:, prompts[order]], axis=1)
    total = cumulative[:, -1:]
    index = np.argmax(cumulative >= level * total - 1e-9, axis=1)
    replicates = np.where(total[:, 0] > 0, values[order][index], np.nan)
    value = float(np.quantile(values, level, method="inverted_cdf"))
    return Measured(value, replicates, len(np.unique(prompts)), None)


def matched_auroc(
    running: NDArray[np.floating[Any]],
    onset: NDArray[np.int64],
    lengths: NDArray[np.int64],
    harmed: Bools,
    prompts: NDArray[np.int64],
    weights: Floats,
    first_tokens: int | None = None,
) -> Measured:
    """Chance that a harmed request scores above a harmless one over the same number of tokens.

    The longer a request, the larger its worst run, whatever the predictor knows; and a harmed
    request is cut at its onset. Each (harmed, harmless) pair is therefore compared at the largest
    number of tokens that both have before the harmed one's onset. Ties count half; 0.5 is chance.

    Args:
        running: (n, T) largest score of each request up to each token.
        onset: (n,) of harmed requests; ignored for others.
        lengths: (n,) tokens of each request.
        harmed: (n,).
        prompts: (n,) column of ``weights`` of each request.
        weights: (B, prompts) bootstrap weights.
        first_tokens: compare at no more than so many tokens.

    Returns:
        None without a harmed or without a harmless request.
    """
    if harmed.all() or not harmed.any():
        return undefined(weights)
    size = weights.shape[1]
    concordant, pairs = np.zeros(size * size), np.zeros(size * size)
    others = np.flatnonzero(~harmed)
    for row in np.flatnonzero(harmed):
        tokens = np.minimum(onset[row], lengths[others])
        if first_tokens is not None:
            tokens = np.minimum(tokens, first_tokens)
        last = np.maximum(tokens - 1, 0)
        mine, other = running[row, last], running[others, last]
        wins = np.where(tokens > 0, (mine > other) + 0.5 * (mine == other), 0.5)
        cells = prompts[row] * size + prompts[others]
        concordant += np.bincount(cells, weights=wins, minlength=size * size)
        pairs += np.bincount(cells, minlength=size * size)
    top, bottom = concordant.reshape(size, size), pairs.reshape(size, size)
    replicates = _ratio(
        ((weights @ top) * weights).sum(axis=1), ((weights @ bottom) * weights).sum(axis=1)
    )
    units = min(len(np.unique(prompts[harmed])), len(np.unique(prompts[~harmed])))
    return Measured(float(top.sum() / bottom.sum()), replicates, units)


def recall_on_roc(sample: Sample, false_alarm_rate: float) -> Measured:
    """Recall that the test ROC curve reads at a false-alarm rate; no threshold is carried over.

    It describes the ranking. It is not what a threshold chosen beforehand achieves, see ``recall``.
    """
    if not sample.ranks_something:
        return undefined(sample.weights)

    def read(positive: Floats, negative: Floats) -> Floats:
        caught = np.cumsum(positive[:, ::-1], axis=1)
        false = np.cumsum(negative[:, ::-1], axis=1)
        allowed = false <= false_alarm_rate * false[:, -1:] + 1e-9
        best = np.where(allowed, caught, 0).max(axis=1)
        return np.where(false[:, -1] > 0, _ratio(best, caught[:, -1]), np.nan)

    levels = tally_levels(sample)
    value = float(read(levels.exact_positive, levels.exact_negative)[0])
    return Measured(value, read(levels.positive, levels.negative), sample.units)


def with_intervals(
    rows: Sequence[tuple[dict[str, Any], Measured]],
    family: Callable[[dict[str, Any]], Any],
    is_headline: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> list[dict[str, Any]]:
    """Rows with value, family-wise and pointwise intervals.

    Args:
        rows: descriptions with their measurements.
        family: rows of one value of it hold together with 95 %.
        is_headline: the row that gets half of the family's error; the others share the rest. A
            family without one shares all of it.
    """
    sizes: dict[Any, list[int]] = {}
    for description, measured in rows:
        if measured.interval() != UNDEFINED:
            size = sizes.setdefault(family(description), [0, 0])
            size[int(is_headline(description))] += 1
    finished = []
    for description, measured in rows:
        others, headlines = sizes.get(family(description), [0, 0])
        error = 0.025 if headlines and others else 0.05
        size_here = headlines if is_headline(description) else others
        low, high = measured.interval(1 - error / max(size_here, 1))
        low_pointwise, high_pointwise = measured.interval()
        finished.append(
            description
            | {
                "value": measured.value,
                "low": low,
                "high": high,
                "low_pointwise": low_pointwise,
                "high_pointwise": high_pointwise,
            }
        )
    return finished

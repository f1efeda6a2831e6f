"""Intervals of metrics, against published formulas and brute force."""

import numpy as np
import pytest
from scipy import stats

from kvguard import metrics
from kvguard.metrics import bootstrap_interval, resample_weights, wilson_interval


@pytest.mark.parametrize("successes", [0, 1, 7, 24])
def test_wilson_is_scipys(successes: int) -> None:
    expected = stats.binomtest(successes, 24).proportion_ci(0.95, method="wilson")
    got = wilson_interval(successes, 24)
    assert got == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_trials_is_undefined() -> None:
    assert wilson_interval(0, 0) == (None, None)
    with pytest.raises(ValueError, match=r"successes lie in .*, got 4"):
        wilson_interval(4, 3)


def test_weights_resample_whole_prompts() -> None:
    weights = resample_weights(7, 200, seed=1)
    assert weights.shape == (200, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, resample_weights(7, 200, seed=1))
    assert not np.array_equal(weights, resample_weights(7, 200, seed=2))


def test_bounded_intervals_stay_inside_and_never_collapse() -> None:
    rng = np.random.default_rng(4)
    low, high = bootstrap_interval(0.97, 1 - rng.beta(1, 30, size=500), units=5)
    assert low is not None
    assert high is not None
    assert 0 < low < 0.97 < high < 1
    perfect = bootstrap_interval(1.0, np.ones(500), units=5)
    quantile = stats.t.ppf(0.975, 4)
    assert perfect == pytest.approx((5 / (5 + quantile**2), 1.0))
    assert bootstrap_interval(0.0, np.zeros(500), units=5) == pytest.approx(
        (0.0, 1 - 5 / (5 + quantile**2))
    )


def test_undefined_is_none_not_zero() -> None:
    assert bootstrap_interval(None, np.full(10, np.nan), 10) == (None, None)
    assert bootstrap_interval(0.5, np.full(10, 0.5), metrics.MIN_UNITS - 1) == (None, None)
    mostly_undefined = np.array([0.4, 0.6] + [np.nan] * 8)
    assert bootstrap_interval(0.5, mostly_undefined, 10) == (None, None)

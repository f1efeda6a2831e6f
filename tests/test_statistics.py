"""Intervals and paired tests, against published examples and brute force."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from kvguard import statistics
from kvguard.statistics import (
    bootstrap_interval,
    bootstrap_statistic,
    cluster_bootstrap_mean,
    family_confidence,
    mcnemar_exact,
    newcombe_paired_interval,
    paired_bootstrap,
    paired_permutation_test,
    resample_weights,
    wilson_interval,
)


@pytest.mark.parametrize("successes", [0, 1, 7, 24])
def test_wilson_is_scipys(successes: int) -> None:
    expected = stats.binomtest(successes, 24).proportion_ci(0.95, method="wilson")
    got = wilson_interval(successes, 24)
    assert got == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_trials_is_undefined() -> None:
    assert wilson_interval(0, 0) == (None, None)
    with pytest.raises(ValueError, match=r"successes lie in .*, got 4"):
        wilson_interval(4, 3)


def test_newcombe_reproduces_the_published_example() -> None:
    """Newcombe (1998), the example of 36, 12, 2 and 0 pairs, method 10."""
    counts = [36, 12, 2, 0]
    got = newcombe_paired_interval(np.repeat([1, 0, 1, 0], counts), np.repeat([1, 1, 0, 0], counts))
    assert got == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_newcombe_without_correlation_is_the_unpaired_interval() -> None:
    counts = [6, 6, 4, 4]  # 6 * 4 == 6 * 4: the two shares are uncorrelated
    got = newcombe_paired_interval(np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts))
    expected = confint_proportions_2indep(10, 20, 12, 20, method="newcomb", compare="diff")
    assert got[1:] == pytest.approx(expected)


def test_newcombe_is_antisymmetric_and_undefined_without_pairs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 30)) < 0.4
    forth, back = newcombe_paired_interval(first, second), newcombe_paired_interval(second, first)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    assert newcombe_paired_interval([], []) == (None, None, None)


def test_mcnemar_is_a_fair_coin_on_the_disagreements() -> None:
    first = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0])
    second = np.array([0, 0, 0, 0, 0, 1, 1, 0, 0])
    assert mcnemar_exact(first, second) == pytest.approx(stats.binomtest(1, 6).pvalue)
    assert mcnemar_exact([1, 0], [1, 0]) == 1.0
    assert mcnemar_exact([], []) is None
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact([1], [1, 0])


def test_permutation_test_counts_all_sign_patterns() -> None:
    first = np.array([0.0, 0.2, 0.5, 0.1, 0.9])
    second = np.array([0.4, 0.3, 0.9, 0.0, 1.6])
    difference = second - first
    means = [np.mean(difference * np.array(signs)) for signs in product([1, -1], repeat=5)]
    expected = np.mean(np.abs(means) >= abs(difference.mean()) - 1e-12)
    assert paired_permutation_test(first, second) == pytest.approx(expected)
    assert paired_permutation_test(first, first) == 1.0
    assert paired_permutation_test([], []) is None


def test_weights_resample_whole_prompts() -> None:
    weights = resample_weights(7, 200, seed=1)
    assert weights.shape == (200, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, resample_weights(7, 200, seed=1))
    assert not np.array_equal(weights, resample_weights(7, 200, seed=2))


def test_cluster_bootstrap_sees_that_rows_of_a_prompt_repeat_each_other() -> None:
    """Ten identical rows per prompt carry one prompt's information, not ten."""
    rng = np.random.default_rng(2)
    per_prompt = rng.random(20)
    once = cluster_bootstrap_mean(per_prompt, np.arange(20), samples=4000)
    repeated = cluster_bootstrap_mean(
        np.repeat(per_prompt, 10), np.repeat(np.arange(20), 10), samples=4000
    )
    assert repeated == pytest.approx(once)
    expected = stats.t.interval(0.95, 19, per_prompt.mean(), stats.sem(per_prompt))
    assert once[1:] == pytest.approx(expected, rel=0.06)


def test_paired_bootstrap_leaves_out_unknown_pairs() -> None:
    first = np.array([0.0, 1.0, np.nan, 0.0, 1.0, 0.0])
    second = np.array([1.0, 1.0, 1.0, 1.0, 0.0, np.nan])
    got = paired_bootstrap(first, second, list("aabbcd"))
    assert got.value == pytest.approx((1 + 0 + 1 - 1) / 4)
    assert paired_bootstrap([np.nan], [1.0], ["a"]) == (None, None, None)


def test_interval_covers_the_mean_of_few_prompts() -> None:
    """300 studies of 6 prompts x 8 requests; a percentile bootstrap covers 0.85 to 0.9 of them."""
    rng = np.random.default_rng(3)
    covered = []
    for study in range(300):
        effects = rng.normal(size=6)
        values = np.repeat(effects, 8) + rng.normal(size=48)
        low, high = cluster_bootstrap_mean(
            values, np.repeat(np.arange(6), 8), samples=300, seed=study
        )[1:]
        assert low is not None
        assert high is not None
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= stats.binom.ppf(0.001, 300, 0.95) / 300


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


def test_a_share_without_clusters_has_nearly_wilsons_interval() -> None:
    events = np.zeros(200)
    events[:30] = 1
    got = cluster_bootstrap_mean(events, np.arange(200), samples=20000, bounds=(0, 1))
    expected = stats.binomtest(30, 200).proportion_ci(method="wilson")
    assert got[1:] == pytest.approx((expected.low, expected.high), abs=0.003)


def test_undefined_is_none_not_zero() -> None:
    assert bootstrap_interval(None, np.full(10, np.nan), 10) == (None, None)
    assert bootstrap_interval(0.5, np.full(10, 0.5), statistics.MIN_UNITS - 1) == (None, None)
    mostly_undefined = np.array([0.4, 0.6] + [np.nan] * 8)
    assert bootstrap_interval(0.5, mostly_undefined, 10) == (None, None)


def test_bootstrap_statistic_evaluates_data_and_resamples() -> None:
    sums = np.array([1.0, 2.0, 6.0])
    value, replicates = bootstrap_statistic(
        lambda weights: (weights @ sums) / weights.sum(axis=1), 3, samples=50, seed=0
    )
    assert value == pytest.approx(3.0)
    expected = (resample_weights(3, 50, 0) @ sums) / 3
    assert np.allclose(replicates, expected)


def test_family_confidence_splits_the_error() -> None:
    assert family_confidence(1) == pytest.approx(0.95)
    assert 1 - family_confidence(20) == pytest.approx(0.05 / 20)

"""Paired comparisons against published examples and brute force."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from kvguard.paired_tests import (
    cluster_bootstrap_mean,
    holm,
    mcnemar_exact,
    paired_bootstrap,
)


def test_mcnemar_is_a_fair_coin_on_the_disagreements() -> None:
    first = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0])
    second = np.array([0, 0, 0, 0, 0, 1, 1, 0, 0])
    assert mcnemar_exact(first, second) == pytest.approx(stats.binomtest(1, 6).pvalue)
    assert mcnemar_exact([1, 0], [1, 0]) == 1.0
    assert mcnemar_exact([], []) is None
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact([1], [1, 0])


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


def test_a_share_without_clusters_has_nearly_wilsons_interval() -> None:
    events = np.zeros(200)
    events[:30] = 1
    got = cluster_bootstrap_mean(events, np.arange(200), samples=20000, bounds=(0, 1))
    expected = stats.binomtest(30, 200).proportion_ci(method="wilson")
    assert got[1:] == pytest.approx((expected.low, expected.high), abs=0.003)


def test_holm_is_statsmodels_and_leaves_out_what_is_undefined() -> None:
    values = [0.01, 0.04, 0.03, 0.005, 0.9]
    expected = multipletests(values, method="holm")[1]
    assert holm(values) == pytest.approx(expected.tolist())
    assert holm([0.02, None, 0.01]) == [pytest.approx(0.02), None, pytest.approx(0.02)]
    assert holm([]) == []

"""Statistics against closed forms, published toy figures and their own coverage."""

import math

import numpy as np
import pytest
from scipy import stats as oracle

from itune_ray.data.intervals import wilson
from itune_ray.evaluate import stats


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def shares(flags):
    return np.stack([np.asarray(flags, float), np.ones(len(flags))], axis=1)


def test_wilson_is_scipys():
    for right, asked in ((0, 10), (3, 10), (10, 10), (411, 500)):
        expected = oracle.binomtest(right, asked).proportion_ci(0.95, method="wilson")
        assert wilson(right, asked) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_nan():
    assert all(math.isnan(bound) for bound in wilson(0, 0))


def test_bootstrap_of_a_mean_is_its_normal_interval_for_many_items():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=2000)
    sums = np.stack([values, np.ones(2000)], axis=1)
    low, high = stats.bootstrap(sums, ratio, samples=2000, level=0.95, seed=0)
    margin = 1.96 * values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.15 * margin)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        low, high = stats.bootstrap(shares(generator.random(120) < 0.7), ratio, samples=400, level=0.9, seed=trial)
        hits += low <= 0.7 <= high
    assert 0.84 <= hits / 300 <= 0.95


def test_bootstrap_depends_on_the_seed_alone_and_not_on_the_chunking(monkeypatch):
    sums = shares(np.random.default_rng(3).random(50) < 0.4)
    whole = stats.bootstrap(sums, ratio, samples=300, level=0.95, seed=5)
    monkeypatch.setattr(stats, "MAX_CELLS", 50 * 7)
    assert stats.bootstrap(sums, ratio, samples=300, level=0.95, seed=5) == whole
    assert stats.bootstrap(sums, ratio, samples=300, level=0.95, seed=6) != whole


def test_a_ratio_is_resampled_by_item_and_never_as_a_mean_of_means():
    # One item of 1,000 tokens at NLL 1 and one of a single token at NLL 9: the ratio is near 1, the mean of means is 5.
    sums = np.array([[1000.0, 1000.0], [9.0, 1.0]])
    low, high = stats.bootstrap(sums, ratio, samples=500, level=0.4, seed=0)
    assert low < 1009 / 1001 + 1e-9
    assert high == pytest.approx(1009 / 1001)


def toy():
    """1,000 items, 54 gained and 66 lost: the toy of the methods notes (E11)."""
    first = np.zeros(1000, bool)
    second = np.zeros(1000, bool)
    first[:500] = second[:500] = True
    first[500:566] = True
    second[566:620] = True
    return first, second


def test_paired_bootstrap_on_the_toy():
    first, second = toy()
    found = stats.paired_bootstrap(shares(first), shares(second), ratio, samples=10_000, level=0.95, seed=0)
    assert found.value == pytest.approx(-0.012)
    assert (found.low, found.high) == pytest.approx((-0.0335, 0.0095), abs=0.0015)


def test_pairing_narrows_the_interval():
    first, second = toy()
    paired = stats.paired_bootstrap(shares(first), shares(second), ratio, samples=4000, level=0.95, seed=0)
    alone = [stats.bootstrap(shares(x), ratio, samples=4000, level=0.95, seed=i) for i, x in enumerate((first, second))]
    unpaired = math.hypot(*(i.high - i.low for i in alone))
    assert (paired.high - paired.low) / unpaired == pytest.approx(0.011 / 0.022, abs=0.03)


def test_paired_bootstrap_refuses_unequal_items():
    with pytest.raises(ValueError, match="equal shapes"):
        stats.paired_bootstrap(shares([1, 0]), shares([1]), ratio, samples=10, level=0.95, seed=0)


def test_mcnemar_is_the_exact_binomial_test():
    first, second = toy()
    assert stats.mcnemar(first, second) == pytest.approx(oracle.binomtest(54, 120, 0.5).pvalue)
    assert stats.mcnemar(first, second) == pytest.approx(0.315, abs=0.001)
    assert stats.mcnemar(first, first) == 1.0


def test_mcnemar_of_very_many_items_stays_a_number():
    first = np.arange(5000) < 2400
    assert stats.mcnemar(first, ~first) == pytest.approx(oracle.binomtest(2400, 5000, 0.5).pvalue, rel=1e-9)

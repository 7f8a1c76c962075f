"""Intervals against scipy and plain loops, rank agreement against a count of pairs, and the words for what an interval decides."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entrodrop_utils.statistics import (
    Interval,
    bootstrap_means,
    comparison,
    curve_table,
    ends,
    half_interval,
    half_means,
    half_sampling,
    interval_table,
    kendall_interval,
    kendall_tau,
    mean_interval,
    paired_difference,
    share_interval,
    verdict,
)


def test_the_interval_of_a_mean_is_that_of_the_t_test():
    values, reference = np.random.default_rng(0).normal(1, 1, (2, 14))
    for got, units in ((mean_interval(values), values), (paired_difference(values, reference), values - reference)):
        test = stats.ttest_1samp(units, 0)
        assert got == pytest.approx((units.mean(), *test.confidence_interval(0.95)))
        assert mean_interval(units, confidence=0.9)[1:] == pytest.approx(tuple(test.confidence_interval(0.9)))
    table = pd.DataFrame({"sequence": range(14), "value": values, "layer": 0})
    assert tuple(interval_table(table, ["layer"]).iloc[0, 1:]) == pytest.approx(mean_interval(values))


@pytest.mark.parametrize("shares", [[0, 0, 0.3], [1, 1, 0.7], [0.4, 0.5, 0.6], [0.5]])
def test_the_interval_of_a_share_can_be_cut_at_its_bounds(shares):
    ends = np.array(mean_interval(np.array(shares)))
    assert np.array(Interval(*ends).within(0.0, 1.0)) == pytest.approx(np.clip(ends, 0, 1), nan_ok=True)


def test_one_unit_has_no_interval_and_gives_no_verdict():
    lonely = [mean_interval(np.array([2.0])), kendall_interval(np.arange(5.0)[None], np.arange(5.0)[None])]
    for estimate, low, high in lonely:
        assert np.isfinite(estimate)
        assert np.isnan([low, high]).all()
        assert verdict(low, high) == "inconclusive"


def test_agreement_counts_pairs_of_layers_in_the_same_order():
    scores, reference = np.random.default_rng(0).normal(size=(2, 30, 7)) + np.arange(7)
    a, b = scores.mean(0), reference.mean(0)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    by_hand = np.mean([np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs])
    tau, low, high = kendall_interval(scores, reference)
    assert tau == pytest.approx(by_hand)
    assert low < tau < high
    assert kendall_interval(scores, scores).estimate == 1
    assert kendall_interval(scores, -scores)[0] == -1
    assert np.isnan(kendall_interval(scores, np.zeros_like(scores))).all()


@pytest.mark.parametrize("values", [100, 3], ids=["few ties", "many ties"])
def test_kendalls_tau_is_that_of_scipy(values):
    rng = np.random.default_rng(values)
    for n in (2, 5, 27):
        x, y = rng.integers(0, values, (2, n)).astype(float)
        np.testing.assert_allclose(kendall_tau(x, y), stats.kendalltau(x, y).statistic, atol=1e-12)
    assert np.isnan(kendall_tau(np.ones(4), np.arange(4.0)))


@pytest.mark.parametrize("n", [7, 14])
def test_halves_of_a_sample_give_the_interval_of_its_mean(n):
    values = np.random.default_rng(0).normal(size=n)
    halves = half_means(values, 4000)
    assert half_interval(values.mean(), halves, n)[1:] == pytest.approx(mean_interval(values)[1:], abs=0.03)
    sizes = np.array([n // 2] * 2000 + [n - n // 2] * 2000)
    assert halves[:2000] * sizes[:2000] + halves[2000:] * sizes[2000:] == pytest.approx(values.sum())  # complements


def test_a_share_has_the_interval_of_wilson():
    n, share, z = 100, 0.3, stats.norm.ppf(0.975)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    got = share_interval(np.arange(n) < share * n)
    assert got.estimate == share
    assert (got.low + got.high) / 2 == pytest.approx(centre)
    assert got.high - centre == pytest.approx(z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))


def test_bootstrap_ends_against_a_plain_loop():
    values = np.random.default_rng(1).normal(3, 2, size=40)
    generator = np.random.default_rng(7)
    means = [generator.choice(values, 40).mean() for _ in range(4000)]
    assert ends(bootstrap_means(values)) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.12)


def test_the_interval_of_a_curve_is_that_of_each_of_its_points():
    values = np.random.default_rng(0).normal(size=(30, 4)) + np.arange(4)
    table = curve_table(values)
    for point, row in enumerate(table.itertuples(index=False)):
        assert tuple(row) == pytest.approx(mean_interval(values[:, point]))


def test_an_interval_is_written_with_its_ends():
    assert f"{Interval(0.5, 0.25, 1):.2f}" == "0.50 [0.25, 1.00]"
    assert f"{Interval(-1500.4, -1521.6, 0.01234):.3g}" == "-1500 [-1520, 0.0123]"


@pytest.mark.parametrize(
    ("low", "high", "goal", "claim", "difference"),
    [
        (0.1, 0.3, 0.0, "holds", "better"),
        (-0.3, -0.1, 0.0, "does not hold", "worse"),
        (-0.1, 0.1, 0.0, "inconclusive", "undecided"),
        (0.1, 0.3, 0.2, "inconclusive", "better"),
        (-0.2, 0.0, 0.0, "does not hold", "undecided"),
    ],
)
def test_what_an_interval_decides(low, high, goal, claim, difference):
    assert verdict(low, high, goal) == claim
    assert comparison(low, high) == difference


def test_without_halves_there_is_no_interval_and_no_warning():
    assert np.isnan(half_interval(1.0, np.array([]), 5)[1:]).all() and np.isnan(half_interval(1.0, np.array([]), 1)[1:]).all()


def test_a_statistic_that_no_half_changes_has_no_interval_and_no_verdict():
    depths = half_sampling(lambda means: float(means.argmin()), np.tile([3.0, 1.0, 2.0], (6, 1)))
    assert depths.estimate == 1 and np.isnan(depths.low) and np.isnan(depths.high)
    assert verdict(depths.low, depths.high) == "inconclusive" and f"{depths:.2f}" == "1.00"

"""Intervals against plain loops and scipy, rank agreement against a count of pairs, and the words for what an interval decides."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entrodrop_utils.statistics import (
    Interval,
    comparison,
    curve_table,
    interval_table,
    kendall_interval,
    mean_interval,
    paired_difference,
    verdict,
)


def test_bootstrap_interval_against_a_plain_loop():
    values = np.random.default_rng(1).normal(3, 2, size=40)
    table = pd.DataFrame({"sequence": range(40), "value": values, "layer": 0})
    found = interval_table(table, ["layer"]).iloc[0]
    generator = np.random.default_rng(7)
    means = [generator.choice(values, 40).mean() for _ in range(4000)]
    assert found["mean"] == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.12)


def test_agreement_counts_pairs_of_layers_in_the_same_order():
    one, other = np.random.default_rng(0).normal(size=(2, 30, 7)) + np.arange(7)
    a, b = one.mean(0), other.mean(0)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    by_hand = np.mean([np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs])
    tau, low, high = kendall_interval(one, other)
    assert tau == pytest.approx(by_hand)
    assert low <= tau <= high
    assert low < high
    assert kendall_interval(one, one) == (1, 1, 1)
    assert kendall_interval(one, -one)[0] == -1
    assert np.isnan(kendall_interval(one, np.zeros_like(one))).all()


def test_the_interval_of_a_mean_is_nearly_that_of_a_normal_distribution():
    values, reference = np.random.default_rng(0).normal(1, 1, (2, 400))
    for found, units in ((mean_interval(values), values), (paired_difference(values, reference), values - reference)):
        want = stats.norm.interval(0.95, units.mean(), units.std() / 20)
        assert found.estimate == pytest.approx(units.mean())
        assert found[1:] == pytest.approx(want, abs=0.03)


def test_the_interval_of_a_curve_is_that_of_each_of_its_points():
    values = np.random.default_rng(0).normal(size=(30, 4)) + np.arange(4)
    table = curve_table(values)
    for point, row in enumerate(table.itertuples(index=False)):
        assert tuple(row) == pytest.approx(mean_interval(values[:, point]))


def test_an_interval_is_written_with_its_ends():
    assert f"{Interval(0.5, 0.25, 1):.2f}" == "0.50 [0.25, 1.00]"


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

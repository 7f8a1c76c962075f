"""How often intervals cover what they are meant to cover, by simulation: 95% is promised, 93 to 97% is asked for."""

import numpy as np
import pytest
from scipy import stats

from entrodrop_utils.statistics import bootstrap_means, ends, half_interval, half_means, mean_ends

UNITS = (7, 14, 30)
SKEWED = {"normal": stats.norm(), "skewness 1/2": stats.gamma(16), "skewness 1": stats.gamma(4)}


def coverage(distribution, n: int, repetitions: int = 20_000) -> float:
    samples = distribution.rvs(size=(n, repetitions), random_state=np.random.default_rng(0))
    low, high = mean_ends(samples)
    return np.mean((low <= distribution.mean()) & (distribution.mean() <= high))


@pytest.mark.parametrize("n", UNITS)
@pytest.mark.parametrize("shape", SKEWED)
def test_the_interval_of_a_mean_covers(shape, n):
    assert 0.93 <= coverage(SKEWED[shape], n) <= 0.97


def test_what_the_interval_of_a_mean_does_not_cover():
    """The limits that its docstring names: strong skewness, and the percentile bootstrap that it replaces."""
    assert [coverage(stats.expon(), n) for n in (7, 30)] == pytest.approx([0.89, 0.93], abs=0.01)
    samples = stats.gamma(4).rvs(size=(7, 2000), random_state=np.random.default_rng(0))
    low, high = ends(bootstrap_means(samples))  # the same draws for all repetitions
    assert np.mean((low <= 4) & (high >= 4)) < 0.88


def tau(x, y):
    """Kendall's tau of each row, as no ties occur."""
    above = np.triu_indices(x.shape[-1], 1)
    signs = [np.sign(values[..., above[0]] - values[..., above[1]]) for values in (x, y)]
    return (signs[0] * signs[1]).mean(-1)


def overlap(x, y, n=11):
    chosen = [values.argsort(-1).argsort(-1) < n for values in (x, y)]
    return (chosen[0] & chosen[1]).sum(-1) / n


def depth(x, y, n=7):
    return x.argsort(-1)[..., :n].mean(-1)


@pytest.mark.parametrize("statistic", [tau, overlap, depth])
@pytest.mark.parametrize(("n", "noise"), [(8, 0.3), (24, 0.3), (24, 1.0)])
def test_the_interval_of_a_statistic_of_rankings_covers(statistic, n, noise):
    """Noise is that of a window, in units of the spread between layers."""
    generator, hits = np.random.default_rng(0), []
    for _ in range(400):
        truth = generator.normal(size=27)
        truths = truth, 0.9 * truth + 0.45 * generator.normal(size=27)
        shared = generator.normal(size=(n, 27))
        samples = [mean + noise * 0.7 * (shared + generator.normal(size=(n, 27))) for mean in truths]
        estimate = statistic(*(values.mean(0) for values in samples))
        _, low, high = half_interval(estimate, statistic(*(half_means(values, 100) for values in samples)), n)
        hits.append(low <= statistic(*truths) <= high if low < high else np.nan)  # no half changes a coarse statistic: no interval
    assert 0.91 <= np.nanmean(hits) <= 1 and np.isnan(hits).mean() < 0.25

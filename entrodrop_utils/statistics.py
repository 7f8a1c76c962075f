"""Uncertainty of what was measured: intervals of means, of statistics of rankings and of shares, and the verdicts that follow.

Every interval is meant to cover at 95%. A simulation in the tests measures how often each one does. A unit is whatever was sampled
independently: a calibration window, a held-out window, a task item.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

CONFIDENCE = 0.95
PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """An estimate and its 95% interval; the ends are nan where there is none."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        estimate, low, high = (f"{value:{spec}}" for value in self)
        if spec.endswith("g"):  # without exponents below a million
            estimate, low, high = (f"{float(text):g}" for text in (estimate, low, high))
        return estimate if np.isnan([self.low, self.high]).any() else f"{estimate} [{low}, {high}]"

    def within(self, least: float, most: float) -> "Interval":
        """Cut at the least and greatest possible value, which leaves its coverage as it is."""
        return Interval(*(float(np.clip(value, least, most)) for value in self))


def mean_ends(values: Float[np.ndarray, " unit *rest"], confidence: float = CONFIDENCE) -> tuple:
    """The ends of Student's t interval of the mean over the first axis; nan for fewer than two units.

    It covers 93 to 97% at 7, 14 and 30 units for normal values and for skewness up to 1, where the percentile bootstrap covers 86%
    at 7. For exponential values (skewness 2) it covers 89% at 7 and 93% at 30.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        missing = np.full(values.shape[1:], np.nan)
        return missing, missing
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def mean_interval(values: Float[np.ndarray, " unit"], confidence: float = CONFIDENCE) -> Interval:
    """The mean of one value per unit, with ``mean_ends``."""
    return Interval(float(np.mean(values)), *map(float, mean_ends(values, confidence)))


def paired_difference(values: Float[np.ndarray, " unit"], reference: Float[np.ndarray, " unit"]) -> Interval:
    """The mean of ``values - reference``, both measured on the same units."""
    return mean_interval(np.asarray(values) - np.asarray(reference))


def interval_table(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean of the column ``value`` over sequences for each group, with its interval: *by, mean, low, high."""
    wide = table.pivot_table(index="sequence", columns=by, values="value", sort=False)
    return curve_table(wide.to_numpy()).set_index(wide.columns).reset_index()


def curve_table(values: Float[np.ndarray, "unit point"]) -> pd.DataFrame:
    """Mean of every column over units, with its interval: mean, low, high."""
    low, high = mean_ends(values)
    return pd.DataFrame({"mean": np.asarray(values).mean(0), "low": low, "high": high})


def share_interval(hits: Bool[np.ndarray, " unit"]) -> Interval:
    """The share of units that are hits, with Wilson's interval: a method's place among random draws."""
    test = stats.binomtest(int(np.sum(hits)), len(hits))
    return Interval(test.statistic, *map(float, test.proportion_ci(CONFIDENCE, method="wilson")))


def half_means(values: Float[np.ndarray, " unit *rest"], draws: int = 200, seed: int = 0) -> Float[np.ndarray, " draw *rest"]:
    """Means over random halves of the units and over their complements; nan for fewer than two units.

    A half's mean differs from the mean of all units as much as that differs from the mean of infinitely many. Samples of equal size
    get the same halves from the same seed, so measurements on the same units stay paired.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return np.full((draws, *values.shape[1:]), np.nan)
    half = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (draws // 2, 1)), axis=1) < n // 2
    chosen = np.concatenate([half, ~half])
    return np.tensordot(chosen / chosen.sum(1, keepdims=True), values, axes=1)


def half_interval(estimate: float, halves: Float[np.ndarray, " draw"], n_units: int) -> Interval:
    """The interval of a statistic from its values on halves of the units: estimate +- t * root mean square deviation of a half.

    The deviation is that from the estimate, so it holds the bias which noise gives to an agreement of rankings. The ends are not
    moved into the range of the statistic. They are nan for fewer than two units, and where every half gives the estimate: the
    statistic is too coarse for its spread to be seen.
    """
    deviation = np.sqrt(np.mean((np.asarray(halves) - estimate) ** 2)) if n_units > 1 and len(halves) else 0.0
    if deviation == 0:
        return Interval(float(estimate), float("nan"), float("nan"))
    width = stats.t.ppf(0.5 + CONFIDENCE / 2, n_units - 1) * deviation
    return Interval(float(estimate), float(estimate - width), float(estimate + width))


def half_sampling(
    statistic: Callable[..., float], *samples: Float[np.ndarray, " unit *rest"], draws: int = 200, seed: int = 0
) -> Interval:
    """The interval of a statistic of means that is not smooth in them: a rank agreement, an overlap, the depth of a choice.

    The percentile bootstrap is biased for these. Where the windows' noise is as large as the spread between layers this interval
    covers about 92 to 96%; where noise is three times as large, rank agreement is biased and as few as 60 to 80%.

    Args:
        statistic: from one mean per sample to a number.
    """
    estimate = statistic(*(np.mean(values, axis=0) for values in samples))
    halves = [statistic(*means) for means in zip(*(half_means(values, draws, seed) for values in samples), strict=True)]
    return half_interval(estimate, np.array(halves), min(map(len, samples)))


def kendall_tau(x: Float[np.ndarray, " item"], y: Float[np.ndarray, " item"]) -> float:
    """Kendall's tau-b of two rankings of the same items; nan where one of them is constant.

    ``scipy.stats.kendalltau`` gives the same number and a p-value, in fifty times the time: intervals need thousands of them.

    >>> round(kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 4)
    0.3333
    """
    above = np.triu_indices(len(x), 1)
    a, b = (np.sign(np.subtract.outer(values, values)[above]) for values in (np.asarray(x), np.asarray(y)))
    pairs = np.sqrt(np.count_nonzero(a) * np.count_nonzero(b))  # that are no tie
    return float(a @ b / pairs) if pairs else math.nan


def kendall_interval(
    scores: Float[np.ndarray, "sequence layer"], reference: Float[np.ndarray, "sequence layer"], draws: int = 200, seed: int = 0
) -> Interval:
    """Kendall's tau between the rankings that two scores give the same layers, with ``half_sampling`` over sequences.

    Where a score is equal for all layers there is no ranking: nan.
    """
    return half_sampling(kendall_tau, scores, reference, draws=draws, seed=seed)


def bootstrap_means(values: Float[np.ndarray, " unit *rest"], draws: int = 1000, seed: int = 0) -> Float[np.ndarray, " draw *rest"]:
    """Means over resampled units, for smooth statistics of the means of many items (ratios of accuracies)."""
    values = np.asarray(values, dtype=float)
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    return np.tensordot(counts / len(values), values, axes=1)


def ends(draws: Float[np.ndarray, " draw *rest"]) -> tuple:
    """The ends of the percentile bootstrap interval, from draws along the first axis; for fewer than 100 units it is too short."""
    low, high = np.percentile(draws, PERCENTILES, axis=0)
    return low, high


def interval_text(table: pd.DataFrame, columns: Sequence[str], spec: str = ".2f") -> list[str]:
    """Three columns of every row, estimate, low and high, as text: ``0.31 [0.26, 0.36]``."""
    return [f"{Interval(*values):{spec}}" for values in table[list(columns)].itertuples(index=False)]


def verdict(low: float, high: float, goal: float = 0.0) -> str:
    """Whether a claim that a quantity exceeds the goal holds, given the quantity's interval; without an interval, inconclusive."""
    return "holds" if low > goal else "does not hold" if high <= goal else "inconclusive"


def comparison(low: float, high: float, more: str = "better", less: str = "worse") -> str:
    """Whether a difference is decided by its interval, and which way."""
    return more if low > 0 else less if high < 0 else "undecided"

"""Uncertainty of what was measured: bootstrap means, intervals, paired differences, rank agreement, and verdicts.

Every interval is a 95% percentile bootstrap interval: the units (calibration sequences, held-out windows, task items) are drawn
with replacement, and the statistic is computed for each draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import kendalltau

PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap_means(values: Float[np.ndarray, "unit *rest"], draws: int = 1000, seed: int = 0) -> Float[np.ndarray, "draw *rest"]:
    """Means over resampled units: the bootstrap distribution of the mean over the first axis."""
    values = np.asarray(values, dtype=float)
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    return np.tensordot(counts / len(values), values, axes=1)


def ends(draws: Float[np.ndarray, "draw *rest"]) -> tuple:
    """The low and the high end of the 95% interval of a statistic, from its draws along the first axis."""
    low, high = np.percentile(draws, PERCENTILES, axis=0)
    return low, high


def mean_interval(values: Float[np.ndarray, "unit"], seed: int = 0) -> Interval:
    """The mean of one value per unit."""
    return Interval(float(np.mean(values)), *map(float, ends(bootstrap_means(values, seed=seed))))


def paired_difference(values: Float[np.ndarray, "unit"], reference: Float[np.ndarray, "unit"], seed: int = 0) -> Interval:
    """The mean of ``values - reference``, both measured on the same units."""
    return mean_interval(np.asarray(values) - np.asarray(reference), seed)


def interval_table(table: pd.DataFrame, by: list[str], seed: int = 0) -> pd.DataFrame:
    """Mean of the column ``value`` over sequences for each group, with its interval: *by, mean, low, high.

    All groups use the same resampled sequences, so differences between groups can be compared.
    """
    wide = table.pivot_table(index="sequence", columns=by, values="value", sort=False)
    low, high = ends(bootstrap_means(wide.to_numpy(), seed=seed))
    return pd.DataFrame({"mean": wide.mean(), "low": low, "high": high}).reset_index()


def curve_table(values: Float[np.ndarray, "unit point"], seed: int = 0) -> pd.DataFrame:
    """Mean of every column over units, with its interval: mean, low, high."""
    low, high = ends(bootstrap_means(values, seed=seed))
    return pd.DataFrame({"mean": np.asarray(values).mean(0), "low": low, "high": high})


def interval_text(table: pd.DataFrame, columns: Sequence[str], spec: str = ".2f") -> list[str]:
    """Three columns of every row, estimate, low and high, as text: ``0.31 [0.26, 0.36]``."""
    return [f"{Interval(*values):{spec}}" for values in table[list(columns)].itertuples(index=False)]


def kendall_interval(
    scores: Float[np.ndarray, "sequence layer"], reference: Float[np.ndarray, "sequence layer"], draws: int = 200, seed: int = 0
) -> Interval:
    """Kendall's tau between the rankings that two scores give the same layers.

    Both scores are resampled together, sequence by sequence. Where a score is equal for all layers there is no ranking: nan.
    """
    resampled = (np.vstack([values.mean(0), bootstrap_means(values, draws, seed)]) for values in (scores, reference))
    tau, *drawn = (kendalltau(x, y).statistic for x, y in zip(*resampled, strict=True))
    return Interval(tau, *ends(np.array(drawn)))


def verdict(low: float, high: float, goal: float = 0.0) -> str:
    """Whether a claim that a quantity exceeds the goal holds, given the quantity's interval."""
    return "holds" if low > goal else "does not hold" if high <= goal else "inconclusive"


def comparison(low: float, high: float, more: str = "better", less: str = "worse") -> str:
    """Whether a difference is decided by its interval, and which way."""
    return more if low > 0 else less if high < 0 else "undecided"

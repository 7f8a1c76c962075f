"""The estimators on samples of known distributions: bias and spread, and the changes of a sample that break an estimator."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from ..entropy import shared
from ..figures import COLOURS, GREY, panels
from ..scoring import Metric
from ..statistics import mean_interval

DISTRIBUTIONS = {"Gaussian": stats.norm(), "Laplace": stats.laplace(), "Student t, 3 d.o.f.": stats.t(3)}
DIFFERENTIAL = ("knn", "gaussian")  # the estimates of differential entropy, which is known for these distributions
UNDETERMINED = {"renyi": ["dimensions correlated"], "matrix_renyi": ["dimensions correlated", "shifted by 100"]}
TOLERANCE = 0.05  # of the entropy before the change
Estimators = Mapping[tuple[str, str], Metric]  # (estimator, setting) -> function
COLUMNS = ["estimator", "setting", "sample", "dim", "tokens", "truth", "mean", "low", "high", "bias", "spread"]


def draw_sample(distribution: str, n_tokens: int, dim: int, rng: np.random.Generator) -> Float[Tensor, "token dim"]:
    """A sample whose dimensions are independent and have the same distribution."""
    return torch.from_numpy(np.ascontiguousarray(DISTRIBUTIONS[distribution].rvs(size=(n_tokens, dim), random_state=rng)))


def _summary(values: Float[np.ndarray, " draw"], truth: float) -> tuple[float, ...]:
    mean, low, high = mean_interval(values)
    return truth, mean, low, high, mean - truth, values.std(ddof=1)


def _estimates(estimators: Estimators, *samples: Float[Tensor, "token dim"]) -> Float[np.ndarray, "estimator sample"]:
    with shared():
        return np.array([[float(estimator(sample)) for sample in samples] for estimator in estimators.values()])


def known_entropies(
    estimators: Estimators, n_tokens: int, dims: Iterable[int], n_draws: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The estimates on samples of every distribution and number of dimensions.

    Args:
    Returns:
        estimator, setting, sample, dim, tokens, truth (nats; nan where the estimator has no true value), mean, low, high, bias,
        spread (standard deviation over draws).
    """
    rows = []
    for dim in dims:
        for name, distribution in DISTRIBUTIONS.items():
            samples = [draw_sample(name, n_tokens, dim, rng) for _ in range(n_draws)]
            by_draw = np.hstack([_estimates(estimators, sample) for sample in samples])
            for (estimator, setting), values in zip(estimators, by_draw, strict=True):
                truth = dim * distribution.entropy() if estimator in DIFFERENTIAL else np.nan
                rows.append((estimator, setting, name, dim, n_tokens, *_summary(values, truth)))
    return pd.DataFrame(rows, columns=COLUMNS)


def demanded_changes(estimator: str, n_tokens: int, dim: int, outlier_factor: float, correlation: float) -> dict[str, float]:
    """Change of a Gaussian sample -> the change of its entropy that the estimator's definition demands; nan where it demands none.

    A differential entropy has a known value after each change. One outlier makes a mixture of two parts: their entropies count by
    their shares, and the entropy of the share is added. The other quantities do not depend on scale.
    """
    outlier = 1 / n_tokens
    differential = {
        "scaled by 10": dim * np.log(10),
        "shifted by 100": 0.0,
        "one outlier token": outlier * dim * np.log(outlier_factor) + stats.bernoulli(outlier).entropy(),
        "every token twice": 0.0,
        "dimensions correlated": 0.5 * ((dim - 1) * np.log(1 - correlation) + np.log(1 + (dim - 1) * correlation)),
    }
    if estimator in DIFFERENTIAL:
        return differential
    return dict.fromkeys(differential, 0.0) | dict.fromkeys(UNDETERMINED.get(estimator, []), np.nan)


def changed_samples(
    sample: Float[Tensor, "token dim"], outlier_factor: float, correlation: float, rng: np.random.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Change -> the sample before and after it."""
    half, outlier, shared = len(sample) // 2, sample.clone(), torch.from_numpy(rng.normal(size=(len(sample), 1)))
    outlier[0] *= outlier_factor
    return {
        "scaled by 10": (sample, 10 * sample),
        "shifted by 100": (sample, sample + 100),
        "one outlier token": (sample, outlier),
        "every token twice": (sample[:half], sample[:half].repeat(2, 1)),
        "dimensions correlated": (sample, (1 - correlation) ** 0.5 * sample + correlation**0.5 * shared),
    }


def reactions_to_changes(
    estimators: Estimators,
    n_tokens: int,
    dim: int,
    n_draws: int,
    outlier_factor: float,
    correlation: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """How the estimate of a Gaussian sample changes with the sample.

    Returns:
        The columns of ``known_entropies``, where sample is the change, truth the change of the entropy that the definition demands
        and mean that of the estimate; before (mean estimate of the unchanged sample), as_demanded ("yes", "no" or "undetermined").
    """
    by_draw = []
    for _ in range(n_draws):
        sample = draw_sample("Gaussian", n_tokens, dim, rng)
        pairs = changed_samples(sample, outlier_factor, correlation, rng).values()
        by_draw.append([_estimates(estimators, *samples) for samples in zip(*pairs, strict=True)])
    before, after = np.moveaxis(by_draw, 1, 0)  # each: draw, estimator, change
    rows = []
    for i, (estimator, setting) in enumerate(estimators):
        demanded = demanded_changes(estimator, n_tokens, dim, outlier_factor, correlation)
        for j, (change, truth) in enumerate(demanded.items()):
            summary = _summary(after[:, i, j] - before[:, i, j], truth)
            rows.append((estimator, setting, change, dim, n_tokens, *summary, before[:, i, j].mean()))
    table = pd.DataFrame(rows, columns=[*COLUMNS, "before"])
    close = np.where(table.bias.abs() <= TOLERANCE * table.before.abs(), "yes", "no")
    return table.assign(as_demanded=np.where(table.bias.isna(), "undetermined", close))


def with_sign(values: pd.Series) -> pd.Series:
    """Whole numbers with a sign; 0 without one."""
    return values.map(lambda value: f"{value:+.0f}" if round(value) else "0")


def reaction_table(reactions: pd.DataFrame) -> pd.DataFrame:
    """The reactions for display: change by estimator, each cell the change of the estimate, the demanded one in brackets, * if
    they differ.
    """
    demanded = ("(" + with_sign(reactions.truth.fillna(0)) + ")").where(reactions.truth.notna(), "")
    cells = with_sign(reactions["mean"]) + np.where(reactions.as_demanded == "no", "* ", " ") + demanded
    table = reactions.assign(cell=cells.str.strip(), change=reactions["sample"])
    return table.pivot_table(index="change", columns="estimator", values="cell", aggfunc="first", sort=False)


def draw_laboratory(known: pd.DataFrame) -> Figure:
    """Bias per dimension of the estimators with a true value, by distribution, in the largest number of dimensions."""
    figure, (axis,) = panels(1, 1, height=2.8)
    rows = known[known.dim == known.dim.max()]
    biases = rows.assign(per_dimension=rows.bias / rows.dim)
    biases = biases.pivot_table("per_dimension", ["estimator", "setting"], "sample", sort=False).iloc[::-1]
    for (name, values), colour, marker in zip(biases.items(), (GREY, COLOURS["knn"], COLOURS["bucket"]), "os^", strict=True):
        axis.plot(values, range(len(biases)), marker, color=colour, label=name, markersize=6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(biases)), [" ".join(filter(None, names)) for names in biases.index])
    axis.set_xlabel("bias (nats per dimension)")
    axis.legend(loc="best")
    return figure

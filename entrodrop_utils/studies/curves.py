"""Entropy curves: the entropy of the residual stream at its endpoints, its stages, and its split into scale and shape."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from ..figures import band
from ..statistics import Interval, bootstrap_means, verdict

VERDICTS = ("does not hold", "inconclusive", "holds")  # from the worst to the best
VARIANTS = (  # label, first_token, weights, dash, colour ("": the estimator's)
    ("all tokens", True, "trained", "-", ""),
    ("without the first token", False, "trained", "--", "#000000"),
    ("untrained copy", True, "random", ":", "#777777"),
)


def log_scale(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """D log of the root mean square distance of the tokens from their mean.

    It changes by D log a when the states are multiplied by a, as a differential entropy does.
    """
    return x.shape[-1] * 0.5 * x.double().var(-2, correction=0).mean(-1).log()


def largest_activation(x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """The largest absolute activation of any token."""
    return x.abs().amax((-2, -1))


def curve_matrix(curves: pd.DataFrame) -> Float[np.ndarray, "sequence endpoint"]:
    """The rows of one estimator in the table of ``entropies``, as one curve per sequence."""
    return curves.pivot_table(index="sequence", columns="endpoint", values="value").to_numpy()


def boundary_layer(curve: Float[np.ndarray, "*rest endpoint"]) -> Int[np.ndarray, "*rest"]:
    """The first layer of the rising stage: the layer whose input has the least entropy."""
    return curve[..., 0:-1:2].argmin(-1)  # the last endpoint is the output, which is no layer's input


class Stages(NamedTuple):
    """The two stages of a curve; each estimate is the median over bootstrap draws.

    Attributes:
        boundary: the first layer of the rising stage.
        fall: nats from the input of the first layer down to the input of the boundary layer.
        rise: nats from there up to the output of the last layer.
        verdict: whether the curve falls and then rises: the worse of the verdicts on the fall and the rise.
    """

    boundary: Interval
    fall: Interval
    rise: Interval
    verdict: str


def stages(curves: Float[np.ndarray, "sequence endpoint"], seed: int = 0) -> Stages:
    """The stages of the mean curve. The boundary is located again in every bootstrap draw."""
    draws = bootstrap_means(curves, seed=seed)
    boundary = boundary_layer(draws)
    least = draws[np.arange(len(draws)), 2 * boundary]
    quantities = np.stack([boundary, draws[:, 0] - least, draws[:, -1] - least])
    intervals = [Interval(*map(float, values)) for values in np.percentile(quantities, [50, 2.5, 97.5], axis=1).T]
    return Stages(*intervals, min((verdict(i.low, i.high) for i in intervals[1:]), key=VERDICTS.index))


def stage_table(curves: pd.DataFrame, by: list[str], seed: int = 0) -> pd.DataFrame:
    """The stages of every curve in the table of ``entropies``: *by, boundary, fall, rise (Intervals), verdict."""
    rows = [(*labels, *stages(curve_matrix(rows), seed)) for labels, rows in curves.groupby(by, sort=False)]
    return pd.DataFrame(rows, columns=[*by, *Stages._fields])


def shape_of(fall: Interval, rise: Interval) -> str:
    """What a curve with these stages does, as the predicate of a sentence."""
    verdicts = [verdict(stage.low, stage.high) for stage in (fall, rise)]
    if "does not hold" in verdicts:
        return f"has no {('falling', 'rising')[verdicts.index('does not hold')]} stage"
    return "does not clearly fall and then rise" if "inconclusive" in verdicts else "falls and then rises"


def scale_and_shape(entropy: Float[np.ndarray, "endpoint"], scale: Float[np.ndarray, "endpoint"]) -> pd.DataFrame:
    """The entropy increase of every block, split into growth of scale and change of shape.

    Args:
        entropy: a mean curve of a differential entropy (KNN, Gaussian).
        scale: the mean curve of ``log_scale`` on the same states.
    Returns:
        layer (index), increase, scale, shape (nats).
    """
    increase, growth = np.diff(entropy[::2]), np.diff(scale[::2])
    table = pd.DataFrame({"increase": increase, "scale": growth, "shape": increase - growth})
    return table.rename_axis(index="layer")


def paired_bars(
    axis: Axes,
    left: Float[np.ndarray, "layer"],
    right: Float[np.ndarray, "layer"],
    labels: tuple[str, str],
    colour: str,
    linear: float,
) -> None:
    """Two bars per layer. The axis is linear up to ``linear`` on both sides of zero and logarithmic beyond."""
    layers = np.arange(len(left))
    axis.bar(layers - 0.2, left, 0.4, color=colour, label=labels[0])
    axis.bar(layers + 0.2, right, 0.4, color="#bbbbbb", edgecolor="#555555", linewidth=0.4, label=labels[1])
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_yscale("symlog", linthresh=linear)


def plot_variants(axis: Axes, means: pd.DataFrame, estimator: str, colour: str) -> None:
    """The mean curves of one estimator with their intervals: those of ``VARIANTS`` that the table holds.

    Args:
        means: estimator, first_token, weights, endpoint, mean, low, high.
    """
    curves = means[means.estimator == estimator].groupby(["first_token", "weights"])
    for label, first_token, weights, dash, other_colour in VARIANTS:
        if (first_token, weights) in curves.groups:
            rows = curves.get_group((first_token, weights))
            band(axis, rows.endpoint / 2, rows, label, other_colour or colour, dash)

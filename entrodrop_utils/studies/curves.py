"""Entropy curves: the entropy of the residual stream at its endpoints, its stages, and its split into scale and shape."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from ..claims import CALIBRATION, claim_row
from ..figures import band
from ..statistics import Interval, half_sampling, mean_interval, verdict

VERDICTS = ("does not hold", "inconclusive", "holds")  # from the worst to the best
SINGLE_STEP = "single step"


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


def boundary_layer(curve: Float[np.ndarray, " endpoint"]) -> int:
    """The layer after the first whose input has the least entropy: the first layer of the rising stage, if the curve falls."""
    return 1 + int(curve[2:-1:2].argmin())  # the last endpoint is the output, which is no layer's input


class Stages(NamedTuple):
    """The two stages of a curve.

    Attributes:
        boundary: the first layer of the rising stage.
        fall: nats from the input of the first layer down to the input of the boundary layer; negative where the curve only rises.
        rise: nats from there up to the output of the last layer.
        share: the part of the fall that the layer with the largest step makes; nan without a fall, above 1 where other layers rise.
        verdict: of ``stage_verdict``.
    """

    boundary: int
    fall: Interval
    rise: Interval
    share: Interval
    verdict: str


def stages(curves: Float[np.ndarray, "sequence endpoint"], seed: int = 0) -> Stages:
    """The stages of the mean curve of a model of two layers or more.

    The boundary and the largest step are located on one half of the windows and measured on the other, and the reverse, so that
    noise alone makes no valley.
    """
    halves = [curves[::2], curves[1::2]] if len(curves) > 1 else [curves]
    measured = [_stages(where.mean(0), values) for where, values in zip(halves, halves[::-1], strict=True)]
    falls, rises, steps = np.concatenate(measured, axis=1)
    fall, rise = mean_interval(falls), mean_interval(rises)
    share = half_sampling(lambda step, whole: step / whole if whole > 0 else np.nan, steps, falls, seed=seed)
    return Stages(boundary_layer(curves.mean(0)), fall, rise, share, stage_verdict(fall, rise, share))


def _stages(
    where: Float[np.ndarray, " endpoint"], values: Float[np.ndarray, "sequence endpoint"]
) -> Float[np.ndarray, "3 sequence"]:
    """Fall, rise and largest step of every window, at the places where they are in the mean curve of other windows."""
    boundary = boundary_layer(where)
    steepest = int(np.diff(where[: 2 * boundary + 1 : 2]).argmin())
    low = values[:, 2 * boundary]
    return np.array([values[:, 0] - low, values[:, -1] - low, values[:, 2 * steepest] - values[:, 2 * steepest + 2]])


def stage_verdict(fall: Interval, rise: Interval, share: Interval) -> str:
    """Whether a curve falls over the early layers and then rises.

    It holds where fall and rise exceed 0 and no layer makes more than half of the fall; it is a single step where one does, and
    where the first layer makes all of it: the share is then 1 on every half of the windows and has no interval.
    """
    worst = min((verdict(stage.low, stage.high) for stage in (fall, rise)), key=VERDICTS.index)
    if worst != "holds":
        return worst
    if share.estimate == 1:
        return SINGLE_STEP
    return {"holds": SINGLE_STEP, "does not hold": "holds"}.get(verdict(share.low, share.high, 0.5), "inconclusive")


def stage_table(curves: pd.DataFrame, by: list[str], seed: int = 0) -> pd.DataFrame:
    """The stages of every curve in the table of ``entropies``.

    Returns:
        *by, boundary, fall, rise and share with _low and _high, verdict.
    """
    names = [f"{name}{end}" for name in ("fall", "rise", "share") for end in ("", "_low", "_high")]
    rows = []
    for labels, part in curves.groupby(by, sort=False):
        stage = stages(curve_matrix(part), seed)
        rows.append((*labels, stage.boundary, *stage.fall, *stage.rise, *stage.share, stage.verdict))
    return pd.DataFrame(rows, columns=[*by, "boundary", *names, "verdict"])


def stage_claim(name: str, fall: Interval, outcome: str, amount: str = "") -> dict[str, object]:
    """The paper's claim about the curve of an entropy, with the fall and the ``stage_verdict``.

    Args:
        amount: of the calibration text, in words.
    """
    text = f"{name} falls, then rises; measured: the fall in nats"
    row = claim_row(text, "abstract", "falls, then rises", fall, evidence=f"{CALIBRATION}: {amount}")
    return row | {"verdict": outcome}


def shape_of(fall: Interval, rise: Interval, outcome: str) -> str:
    """What a curve with these stages does, as the predicate of a sentence."""
    verdicts = [verdict(stage.low, stage.high) for stage in (fall, rise)]
    if outcome == "does not hold":
        return f"has no {('falling', 'rising')[verdicts.index('does not hold')]} stage"
    words = {"holds": "falls over several layers and then rises", SINGLE_STEP: "falls in a single step and then rises"}
    return words.get(outcome, "does not clearly fall over several layers and then rise")


def shape_of_row(row: pd.Series) -> str:
    """``shape_of`` a row of ``stage_table``."""
    return shape_of(*(Interval(*row[[name, f"{name}_low", f"{name}_high"]]) for name in ("fall", "rise")), row.verdict)


def scale_and_shape(entropy: Float[np.ndarray, " endpoint"], scale: Float[np.ndarray, " endpoint"]) -> pd.DataFrame:
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


def steepest(curve: Float[np.ndarray, " endpoint"]) -> tuple[str, float]:
    """The sub-block with the largest step down in a mean curve, and the step in nats (negative)."""
    steps = np.diff(curve)
    layer, is_mlp = divmod(int(steps.argmin()), 2)
    return f"{'MLP' if is_mlp else 'attention'} {layer}", float(steps.min())


def plot_curve(axis: Axes, means: pd.DataFrame, label: str, colour: str, dash: str = "-") -> None:
    """A mean curve with its interval over the layers passed: endpoint, mean, low, high."""
    band(axis, means.endpoint / 2, means, label, colour, dash)

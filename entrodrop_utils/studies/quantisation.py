"""The quantisation error of a model whose file stores rounded weights: its grid, and the loss increase that the rounding caused."""

import copy
from collections.abc import Sequence

import gguf.quants
import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation import Estimate, perplexity
from ..figures import panels
from ..progress import progress
from ..statistics import mean_interval

FORMATS = [GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
ROUNDED_AGAIN = ("Q4", "Q5")  # formats coarse enough to matter
SIXTEEN_LEVELS, NO_GRID = "other, at most 16 levels per block", "none found"
BLOCK = 16  # weights in which one grid step is looked for
CHUNK = 1 << 18  # blocks that are handled at a time
ADDED, ROUNDED, ORIGINAL = "added", "rounded again", "of the file"
Steps = dict[str, Float[Tensor, "block 1"]]


def quantised_matrices(model: PreTrainedModel) -> dict[str, str]:
    """Name of every matrix -> the block format that its weights lie on, judged by its first rows."""
    matrices = [(name, weight) for name, weight in model.named_parameters() if weight.ndim == 2 and weight.shape[1] % BLOCK == 0]
    return {name: _format(weight) for name, weight in progress(matrices, "finding the format")}


def _format(weight: Float[Tensor, "row column"]) -> str:
    """The block format that gives the rows back unchanged when it rounds them."""
    rows = weight.detach()[:64].float().cpu().numpy()
    whole_blocks = rows.shape[1] % 32 == 0
    for kind in FORMATS if whole_blocks else ():
        if np.array_equal(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind), rows):
            return kind.name
    n_levels = max(len(np.unique(block)) for block in rows.reshape(-1, 32 if whole_blocks else BLOCK))
    return SIXTEEN_LEVELS if n_levels <= 16 else NO_GRID


def grid_steps(model: PreTrainedModel, names: Sequence[str]) -> Steps:
    """The grid step of every block of these matrices: the smallest gap between two different weights of the block."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name in names}
    return {
        name: torch.cat([_step(blocks) for blocks in weight.view(-1, BLOCK).split(CHUNK)])
        for name, weight in progress(weights.items(), "reading the grid", len(weights))
    }


def _step(blocks: Float[Tensor, "block weight"]) -> Float[Tensor, "block 1"]:
    gaps = blocks.sort(-1)[0].diff()
    least = gaps.where(gaps > 1e-3 * gaps.amax(-1, keepdim=True), torch.inf).amin(-1, keepdim=True)
    return least.where(least.isfinite(), 0.0)


def grid_table(model: PreTrainedModel, formats: dict[str, str], steps: Steps) -> pd.DataFrame:
    """The formats of the matrices: format (index), matrices, million weights, noise to signal.

    Rounding to a step d adds noise of variance d²/12; ``noise to signal`` divides it by the mean square of the weights.
    """
    rows = []
    for name, weight in model.named_parameters():
        if name in formats:
            noise = BLOCK * float(steps[name].double().square().sum()) / 12
            rows.append((formats[name], weight.numel() / 1e6, noise, float(weight.detach().double().square().sum())))
    groups = pd.DataFrame(rows, columns=["format", "million weights", "noise", "signal"]).groupby("format")
    table = groups.sum().assign(matrices=groups.size())
    table["noise to signal"] = table.noise / table.signal
    return table[["matrices", "million weights", "noise to signal"]]


def obstacle(model: PreTrainedModel, formats: dict[str, str]) -> str:
    """Why the cost of rounding cannot be estimated for this model; empty where it can."""
    if not model.can_generate():
        return "has no language-modelling head, so the cost of rounding is not measured"
    return "" if set(formats.values()) - {NO_GRID} else "has no matrix on a known grid, so the cost of rounding is not measured"


def noise_increases(
    model: PreTrainedModel,
    held_out: Int[Tensor, "window token"],
    loss: Estimate,
    steps: Steps,
    doses: Sequence[float],
    seed: int = 0,
) -> pd.DataFrame:
    """Loss increase with added rounding noise, in nats per token: one row per window, one column per dose.

    A dose of 1 has the variance of the file's own rounding. Each value is the mean over the noise and its negative. ``loss`` is the
    model's own on the same windows.
    """
    columns = {}
    for dose in doses:
        copies = (noisy_copy(model, steps, sign * dose**0.5, seed) for sign in (1, -1))
        columns[dose] = np.mean([perplexity(changed, held_out).per_window for changed in copies], 0) - loss.per_window
    return pd.DataFrame(columns)


def rounding_increases(
    model: PreTrainedModel, held_out: Int[Tensor, "window token"], loss: Estimate, formats: dict[str, str], block_shift: int
) -> Float[np.ndarray, " window"]:
    """Loss increase of every window after a second rounding, in blocks that start ``block_shift`` weights later."""
    return perplexity(rounded_copy(model, formats, block_shift), held_out).per_window - loss.per_window


def parabola(doses: Sequence[float], increases: Float[np.ndarray, "*rest dose"]) -> Float[np.ndarray, "*rest 2"]:
    """The coefficients of dose and dose² of the parabola that is 0 at dose 0 and fits the increases.

    Raises:
        ValueError: fewer than two doses.
    """
    if len(set(doses)) < 2:
        raise ValueError(f"a parabola through the file's own loss needs two different doses, got {list(doses)}")
    powers = np.stack([doses, np.square(doses)], 1)
    return np.asarray(increases) @ np.linalg.pinv(powers).T


def rounding_table(added: pd.DataFrame, rounded: Float[np.ndarray, " window"]) -> pd.DataFrame:
    """The loss increase by every noise, with its interval over windows: noise, dose, increase, low, high.

    ``added`` and ``rounded`` are measured. ``of the file`` is the increase that the file's own rounding caused: the negative of the
    parabola at dose -1, where no noise is left.
    """
    coefficients = parabola(list(added), added.to_numpy())
    values = [(ADDED, dose, added[dose]) for dose in added]
    values += [(ROUNDED, np.nan, rounded), (ORIGINAL, 1.0, coefficients @ np.array([1.0, -1.0]))]
    rows = []
    for noise, dose, increases in values:
        rows.append((noise, dose, *mean_interval(np.asarray(increases))))
    return pd.DataFrame(rows, columns=["noise", "dose", "increase", "low", "high"])


def noise_figure(table: pd.DataFrame) -> Figure:
    """Loss against the variance of the rounding noise in the weights, in units of the file's own, with the fitted parabola."""
    added, (original,) = table[table.noise == ADDED], table[table.noise == ORIGINAL].itertuples()
    linear, quadratic = parabola(added.dose, added.increase.to_numpy())
    figure, (axis,) = panels(1, 1)
    x = np.linspace(-1, added.dose.max(), 100)
    axis.plot(x + 1, linear * x + quadratic * x**2, "-", color="#777777", label="parabola")
    axis.errorbar(added.dose + 1, added.increase, _bars(added), fmt="s", color="#D55E00", label="with added noise")
    axis.plot([1], [0], "o", color="#000000", label="the file")
    interval = [[original.high - original.increase], [original.increase - original.low]]  # the estimate is drawn below zero
    axis.errorbar([0], [-original.increase], interval, fmt="D", color="#0072B2", label="estimate without rounding")
    axis.set(xlabel="variance of the rounding noise / that of the file", ylabel="loss above that of\nthe file (nats)")
    axis.legend()
    return figure


def _bars(rows: pd.DataFrame) -> list[pd.Series]:
    return [(rows.increase - rows.low).clip(0), (rows.high - rows.increase).clip(0)]


@torch.no_grad()
def noisy_copy(model: PreTrainedModel, steps: Steps, scale: float, seed: int = 0) -> PreTrainedModel:
    """A copy of the model with uniform noise of half a grid step on both sides, times ``scale``."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, weight in changed.named_parameters():
        if name in steps:
            for blocks, step in zip(weight.view(-1, BLOCK).split(CHUNK), steps[name].split(CHUNK), strict=True):
                blocks += scale * step * (torch.rand(blocks.shape, generator=generator).to(step) - 0.5)
    return changed


@torch.no_grad()
def rounded_copy(model: PreTrainedModel, formats: dict[str, str], block_shift: int) -> PreTrainedModel:
    """A copy whose matrices of four or five bits are rounded again in their own format, in blocks that start later."""
    changed = copy.deepcopy(model)
    for name, weight in changed.named_parameters():
        if formats.get(name, "").startswith(ROUNDED_AGAIN):
            kind = GGMLQuantizationType[formats[name]]
            moved = gguf.quants.quantize(np.roll(weight.detach().cpu().numpy(), block_shift, -1), kind)
            weight.copy_(torch.from_numpy(np.roll(gguf.quants.dequantize(moved, kind), -block_shift, -1).copy()))
    return changed

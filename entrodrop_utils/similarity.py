"""Scores that compare a sub-block's input with its output: pure functions of two ``Float[Tensor, "*batch token dim"]``.

A small value means that the sub-block changes the residual stream little; the smallest is dropped first.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .entropy import once

VALUES = 1 << 17  # that are held in float64 at a time on a CPU: they stay in the core's cache


@once
def _lengths(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> tuple[Tensor, Tensor, Tensor]:
    """|in|, |out| and |out - in| of every token, in float64: half precision is coarser than what decides a ranking."""
    rows = max(1, VALUES // x.shape[-1]) if x.device.type == "cpu" else max(1, x[..., 0].numel())
    parts = []
    for before, after in zip(x.flatten(0, -2).split(rows), y.flatten(0, -2).split(rows), strict=True):
        before, after = before.double(), after.double()
        parts.append([torch.linalg.vector_norm(state, dim=-1) for state in (before, after, after - before)])
    lengths = tuple(torch.cat(part).view(x.shape[:-1]) for part in zip(*parts, strict=True))
    for name, length in zip(("input", "output"), lengths, strict=False):
        if not torch.isfinite(length).all():
            raise ValueError(f"the {name} states hold NaN or infinite values")
    return lengths


def _cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos of every token by the law of cosines, which keeps its digits where the angle is small; 1 beside a zero vector."""
    before, after, change = _lengths(x, y)
    distance = (change - (before - after).abs()) * (change + (before - after).abs()) / (2 * before * after)
    return torch.where(before * after > 0, distance, 1.0).clamp(0, 2)


def cosine(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """1 - mean over tokens of cos(in, out).

    On a block this is ShortGPT's block influence (arXiv 2403.03853), on an attention layer or an MLP the score of
    LLM-Drop (arXiv 2406.15786), whose input is the raw residual stream before the norm. Between 0 and 2, no unit.
    """
    return _cosine_distance(x, y).mean(-1)


def angular(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """Mean over tokens of arccos(cos(in, out)) / pi (arXiv 2403.17887, there for the last token). Between 0 and 1."""
    return (_cosine_distance(x, y) / 2).sqrt().arcsin().mean(-1) * (2 / math.pi)


def norm_ratio(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """Mean over tokens of |out - in| / |in|: the size of what a sub-block adds, relative to the stream it adds to."""
    before, _, change = _lengths(x, y)
    return (change / before.clamp(min=1e-150)).mean(-1)


SIMILARITIES = {"cosine": cosine, "angular": angular, "norm_ratio": norm_ratio}

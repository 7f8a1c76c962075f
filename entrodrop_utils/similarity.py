"""Scores that compare a sub-block's input with its output: pure functions of two ``Float[Tensor, "*batch token dim"]``.

A small value means that the sub-block changes the residual stream little; the smallest is dropped first.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def _squares(x: Float[Tensor, "*batch token dim"], name: str) -> Float[Tensor, "*batch token"]:
    """The squared norms of tokens."""
    squares = torch.linalg.vecdot(x, x)
    if not torch.isfinite(squares).all() and not torch.isfinite(x).all():
        raise ValueError(f"the {name} states hold NaN or infinite values")
    return squares


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """In float64: 1 - cos in half precision is quantised at the size of the differences that decide a ranking."""
    x, y = x.double(), y.double()
    norms = _squares(x, "input").sqrt() * _squares(y, "output").sqrt()
    return torch.linalg.vecdot(x, y) / norms.clamp(min=1e-300)


def cosine(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """1 - mean over tokens of cos(in, out).

    On a block this is ShortGPT's block influence (arXiv 2403.03853), on an attention layer or an MLP the score of
    LLM-Drop (arXiv 2406.15786), whose input is the raw residual stream before the norm. Between 0 and 2, no unit.
    """
    return 1 - _cosine(x, y).mean(-1)


def angular(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """Mean over tokens of arccos(cos(in, out)) / pi (arXiv 2403.17887, there for the last token). Between 0 and 1."""
    return _cosine(x, y).clamp(-1, 1).arccos().mean(-1) / math.pi


def norm_ratio(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch"]:
    """Mean over tokens of |out - in| / |in|: the size of what a sub-block adds, relative to the stream it adds to."""
    x, y = x.double(), y.double()
    return (_squares(y - x, "output") / _squares(x, "input").clamp(min=1e-300)).sqrt().mean(-1)


SIMILARITIES = {"cosine": cosine, "angular": angular, "norm_ratio": norm_ratio}

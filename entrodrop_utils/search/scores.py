"""Searches by a score of one forward pass: EntroDrop's and LLM-Drop's metrics, angular windows of blocks, mutual information."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..cached_scoring import cached_score
from ..dropping import dropped
from ..families.decoder import decoder_layers
from ..progress import progress
from ..residual import SubBlock, states
from ..scoring import Metric, resolve
from ..selection import scores_by_layer
from .costs import Kinds, SearchResult, candidates, take


def by_score(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "attention",
    metric: str | Mapping[str, Metric] = "cosine",
    rescored: bool = False,
) -> SearchResult:
    """The sub-blocks with the smallest score: cosine as in LLM-Drop (arXiv 2406.15786), an entropy increase as in EntroDrop.

    Args:
        metric: a registered name, or a mapping with one metric.
        rescored: the remaining sub-blocks are scored anew after every drop, as in EntroDrop's iterative process.
    Raises:
        ValueError: as ``candidates``, ``take`` and ``scoring.resolve``.

    >>> by_score(model, windows, 2).order == by_score(model, windows, 2, rescored=True).order
    True
    """
    possible = candidates(model, kinds)
    n = len(take(model, possible, n))
    if len(metrics := resolve([metric] if isinstance(metric, str) else metric)) != 1:
        raise ValueError(f"one metric ranks the sub-blocks, got {', '.join(map(str, metrics)) or 'none'}")
    chosen: list[SubBlock] = []
    rounds = n if rescored else 1
    for _ in progress(range(rounds), f"scores by {next(iter(metrics))}"):
        score = _scores(model, windows, possible, metrics, chosen)
        left = sorted((s for s in possible if s not in chosen), key=score.get)
        chosen += take(model, [*chosen, *left], len(chosen) + (1 if rescored else n))[len(chosen) :]
    passes = float(len(windows) * rounds)
    return SearchResult(chosen, passes, passes * windows.shape[1])


def _scores(model, windows, possible: list[SubBlock], metrics: Mapping[str, Metric], gone: list[SubBlock]) -> dict[SubBlock, float]:
    """The score of every candidate that is left in the model without those that are gone."""
    place = [i for i in range(len(decoder_layers(model))) if SubBlock(i, "block") not in gone]  # blocks are numbered anew
    kinds = sorted({s.kind for s in possible if s not in gone})
    (name,) = metrics
    with dropped(model, gone):
        table = cached_score(model, windows, metrics, kinds)
    means = {kind: scores_by_layer(table, name, kind).mean() for kind in kinds}
    return {SubBlock(place[layer], kind): float(value) for kind, mean in means.items() for layer, value in mean.items()}


def angular_window(model: PreTrainedModel, windows: Int[Tensor, "window token"], n: int, kinds: Kinds = "block") -> SearchResult:
    """The ``n`` contiguous blocks with the smallest angle between input and output at the last token (arXiv 2403.17887).

    Raises:
        ValueError: kinds other than blocks: the method knows no other; or as ``take``.

    >>> [s.layer for s in angular_window(model, windows, 2).order] in ([0, 1], [1, 2], [2, 3], [3, 4], [4, 5])
    True
    """
    possible = candidates(model, kinds)
    if any(sub_block.kind != "block" for sub_block in possible):
        raise ValueError("angular windows are of whole blocks: search kinds='block'")
    take(model, possible, n)
    last = torch.cat([states(model, ids)[::2, :, -1].double() for ids in windows.split(1)], 1)  # layer input, window, dim
    cos = torch.nn.functional.cosine_similarity(last[: len(last) - n], last[n:], dim=-1).clamp(-1, 1)
    first = int((cos.arccos().mean(1) / math.pi).argmin())
    passes = float(len(windows))
    return SearchResult([SubBlock(i, "block") for i in range(first, first + n)], passes, passes * windows.shape[1])


def gaussian_information(
    x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim2"], components: int = 16
) -> Float[Tensor, "*batch"]:
    """Minus the mutual information of jointly Gaussian states, in nats: 1/2 sum log(1 - r_i^2) over canonical correlations r_i.

    Both states are first reduced to their leading principal components: with as many dimensions as tokens every correlation is 1.
    The sign is that of a score: what its input determines most is dropped first.

    >>> x, noise = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(float(gaussian_information(x, x + noise)), 1) == round(-math.log(2) / 2, 1)
    True
    """
    bases = []
    for state in (x, y):
        u, s, _ = torch.linalg.svd(state.double() - state.double().mean(-2, keepdim=True), full_matrices=False)
        bases.append((u * (s > 1e-9 * s[..., :1])[..., None, :])[..., :components])
    r = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1 - 1e-12)
    return 0.5 * torch.log1p(-(r**2)).sum(-1)


def matrix_information(x: Float[Tensor, "*batch token dim"], y: Float[Tensor, "*batch token dim2"]) -> Float[Tensor, "*batch"]:
    """Minus the matrix-based mutual information, in nats: S(A o B) - S(A) - S(B) (arXiv 1211.2459), as a score.

    A and B are the trace-normalised Gram matrices of the tokens, scaled to unit length; o is the entrywise product, S the von
    Neumann entropy. Two orthonormal sets of tokens have S(A) = log N, so that the information is log N.

    >>> round(float(matrix_information(torch.eye(8), torch.eye(8))), 4) == round(-math.log(8), 4)
    True
    """
    first, second = (state @ state.mT for state in (torch.nn.functional.normalize(z.double(), dim=-1) for z in (x, y)))
    return _von_neumann(first * second) - _von_neumann(first) - _von_neumann(second)


def _von_neumann(gram: Float[Tensor, "*batch token token"]) -> Float[Tensor, "*batch"]:
    eigenvalues = torch.linalg.eigvalsh(gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]).clamp(min=0)
    return -torch.xlogy(eigenvalues, eigenvalues).sum(-1)


INFORMATION = {"MI-PRUN, Gaussian": gaussian_information, "MI-PRUN, matrix": matrix_information}

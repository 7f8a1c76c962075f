"""Encoders: how far the passage similarities of a pruned encoder agree with those of the dense one."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import dropped
from ..families.self_check import measuring
from ..progress import progress
from ..residual import SubBlock, check_tokens


def halves(windows: Int[Tensor, "window token"], first: int | None, last: int | None) -> Int[Tensor, "half marked"]:
    """The first halves of all windows, then the second ones, each between the tokenizer's first and last mark where it has them."""
    half = (windows.shape[1] - 1) // 2
    cut = torch.cat([windows[:, 1 : 1 + half], windows[:, 1 + half : 1 + 2 * half]])  # a window begins with the first mark
    before, after = (torch.full((len(cut), int(mark is not None)), mark or 0) for mark in (first, last))
    return torch.cat([before, cut, after], dim=1)


@measuring
def embed(model: PreTrainedModel, ids: Int[Tensor, "sentence token"]) -> Float[Tensor, "sentence dim"]:
    """Mean of the last states of each sentence, of length one."""
    check_tokens(model, ids)
    mean = model.base_model(ids.to(model.device)).last_hidden_state.double().mean(1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def compare_embeddings(dense: Float[Tensor, "half dim"], pruned: Float[Tensor, "half dim"]) -> pd.DataFrame:
    """How a pruned encoder's embeddings of ``halves`` compare with the dense one's, a row a window (the mean of its two halves).

    Returns:
        agreement: Spearman's correlation between a half's similarities to all others in the two models;
        distance: 1 - cosine between its two embeddings;
        found: how often the other half is the most similar of all, in the pruned model.
    """
    n = len(dense)
    others = ~torch.eye(n, dtype=torch.bool)
    ranks = [rankdata((e @ e.T)[others].view(n, n - 1), axis=1) for e in (dense, pruned)]
    nearest = (pruned @ pruned.T).masked_fill(~others, -torch.inf).argmax(1)
    each = {
        "agreement": [np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)],
        "distance": 1 - (dense * pruned).sum(1).numpy(),
        "found": (nearest == torch.arange(n).roll(n // 2)).double().numpy(),
    }
    return pd.DataFrame(each).groupby(np.arange(n) % (n // 2)).mean()


def agreement_by_set(model: PreTrainedModel, ids: Int[Tensor, "half token"], sets: Iterable[Sequence[SubBlock]]) -> pd.DataFrame:
    """The encoder without each of many sets of sub-blocks, judged against itself as it is; a set named twice is tried once.

    Args:
        ids: of ``halves``.
    Returns:
        set (the sorted tuple of its sub-blocks), window, agreement, distance, found.
    Raises:
        ValueError: as ``dropped``.
    """
    whole, tables = embed(model, ids), []
    for one in progress(list(dict.fromkeys(tuple(sorted(one)) for one in sets)), "judging sets"):
        with dropped(model, one):
            judged = compare_embeddings(whole, embed(model, ids))
        tables.append(judged.rename_axis("window").reset_index().assign(set=[one] * len(judged)))
    return pd.concat(tables)[["set", "window", "agreement", "distance", "found"]]

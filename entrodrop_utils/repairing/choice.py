"""Choose what to drop by the cost that is left after repair."""

from collections.abc import Iterable

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair
from ..evaluation import losses_by_set
from ..residual import SubBlock


def single_costs(
    model: PreTrainedModel, sub_blocks: Iterable[SubBlock], windows: Int[Tensor, "window token"], repair: Repair | None = None
) -> pd.DataFrame:
    """The cost of every sub-block dropped alone, with what a repair puts in its place.

    Args:
        repair: of all of them, fitted in open loop, by layer (``constant`` or ``linear``).
    Returns:
        layer, kind, nll (loss increase), kl (divergence from the dense model), in nats per token, least divergence first.
    Raises:
        ValueError: as ``dropped``.
    """
    candidates = list(sub_blocks)
    losses = (
        losses_by_set(model, windows, [(), *((s,) for s in candidates)], repair).groupby("set", sort=False)[["nll", "kl"]].mean()
    )
    rows = [(*s, losses.nll[(s,)] - losses.nll[()], losses.kl[(s,)]) for s in candidates]
    return pd.DataFrame(rows, columns=["layer", "kind", "nll", "kl"]).sort_values("kl", ignore_index=True, kind="stable")


def rank_for_repair(
    model: PreTrainedModel, sub_blocks: Iterable[SubBlock], windows: Int[Tensor, "window token"], repair: Repair | None = None
) -> list[SubBlock]:
    """The sub-blocks with the least divergence left after repair first; without a repair, the ranking by true single-drop cost.

    The windows must be others than those of the fit.
    """
    costs = single_costs(model, sub_blocks, windows, repair)
    return [SubBlock(*row) for row in costs[["layer", "kind"]].itertuples(index=False)]

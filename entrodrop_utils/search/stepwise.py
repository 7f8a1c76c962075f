"""Searches that drop one sub-block after another by what it really costs: single drops, greedy and lazy greedy."""

from collections.abc import Collection

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..progress import progress
from ..residual import SubBlock
from .costs import Kinds, SearchResult, SetCosts, candidates, fits, take


def single_drops(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "attention",
    measure: str = "kl",
    counted: Bool[Tensor, "window token"] | None = None,
) -> SearchResult:
    """The sub-blocks whose drop alone costs least; nothing is measured again after a drop.

    With ``kinds="block"`` and ``measure="nll"`` it is the perplexity criterion of Shortened LLaMA (arXiv 2402.02834).

    Args:
        n: how many to drop; None for all that can be.
        kinds: attention, mlp, block, or attention and mlp together.
        measure: "kl" (to the dense model) or "nll" (increase of the loss).
        counted: the tokens whose prediction counts, such as those of ``text.tokens_with``; None for all.
    Raises:
        ValueError: as ``candidates``, ``take`` and ``SetCosts``.

    >>> single_drops(model, windows, 2).order == single_drops(model, windows, 3).order[:2]
    True
    """
    costs, possible = SetCosts(model, windows, measure, counted), candidates(model, kinds)
    cost = dict(zip(possible, costs.mean([sub_block] for sub_block in possible), strict=True))
    return costs.ranking(take(model, sorted(possible, key=cost.get), n))


def greedy(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "attention",
    measure: str = "kl",
    counted: Bool[Tensor, "window token"] | None = None,
) -> SearchResult:
    """Drop what costs least, measure every remaining sub-block anew, and repeat.

    With ``measure="nll"`` and ``kinds="block"`` it is SLEB (arXiv 2402.09025), with ``kinds=("attention", "mlp")`` BlockPruner
    (arXiv 2406.10594). Arguments and errors are those of ``single_drops``.

    >>> ranking = greedy(model, windows, 3, kinds=("attention", "mlp"), measure="nll")
    >>> len(ranking.order), ranking.passes < 3 * 2 * n_layers * len(windows)
    (3, True)
    """
    return lazy_greedy(model, windows, n, kinds, shortlist=None, measure=measure, counted=counted)


def lazy_greedy(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "attention",
    shortlist: int | None = 5,
    measure: str = "kl",
    among: Collection[SubBlock] | None = None,
    counted: Bool[Tensor, "window token"] | None = None,
) -> SearchResult:
    """Greedy search that measures only the ``shortlist`` cheapest sub-blocks anew after each drop.

    What sub-block j adds to the cost of the set S that is gone already, m_j(S) = C(S + j) - C(S), changes little when one more is
    dropped. So the last measured m_j is kept, and a step

    1. takes the ``shortlist`` sub-blocks with the smallest kept m_j,
    2. measures their m_j for the present S,
    3. drops the smallest.

    Where m_j only grows with S (a supermodular cost), the kept value is a lower bound, and measuring until the smallest is fresh
    gives greedy's choice (Minoux, 1978). The cost is nearly so, so few measurements a step suffice.

    Args:
        shortlist: how many are measured in a step; None for all of them, which is ``greedy``.
        among: the only sub-blocks that are searched, as the first of a score's ranking; None for all of ``kinds``.
    Others are those of ``single_drops``.
    Raises:
        ValueError: as ``single_drops``, and a sub-block in ``among`` that cannot be searched.

    >>> lazy_greedy(model, windows, 3, shortlist=2).passes < greedy(model, windows, 3).passes
    True
    >>> proposed = by_score(model, windows, 4).order
    >>> set(lazy_greedy(model, windows, 3, among=proposed).order) < set(proposed)
    True
    """
    costs, possible = SetCosts(model, windows, measure, counted), candidates(model, kinds)
    if among is not None:
        if strange := sorted(set(among) - set(possible)):
            raise ValueError(f"cannot search {', '.join(map(str, strange))}: not among the {len(possible)} sub-blocks of {kinds!r}")
        possible = [s for s in possible if s in among]
    n = len(take(model, possible, n))
    added = dict(zip(possible, costs.mean([sub_block] for sub_block in possible), strict=True))
    chosen: list[SubBlock] = []
    total = 0.0
    for _ in progress(range(n), "lazy greedy" if shortlist else "greedy"):
        cheapest = sorted((s for s in added if fits(model, [*chosen, s])), key=added.get)[:shortlist]
        added |= zip(cheapest, costs.mean([*chosen, s] for s in cheapest) - total, strict=True)
        chosen.append(min(cheapest, key=added.get))
        total += added.pop(chosen[-1])
    return costs.ranking(chosen)

"""Searches for a set of one size: all sets, random sets, the mutations of EvoPress, and pairs as ground truth."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..progress import progress
from ..residual import SubBlock
from ..selection import random_order
from .costs import Kinds, SearchResult, SetCosts, candidates, fits, take

OFFSPRING, SURVIVORS = 32, (2, 1)  # of a generation of EvoPress, and after each of its selections


def exhaustive(model: PreTrainedModel, windows: Int[Tensor, "window token"], n: int, kinds: Kinds = "attention") -> SearchResult:
    """The set of ``n`` sub-blocks with the smallest KL to the dense model, by measuring all sets: C(M, n) of them.

    >>> ranking = exhaustive(model, windows, 2)
    >>> len(ranking.order)
    2
    """
    costs = SetCosts(model, windows)
    sets = [drop_set for drop_set in combinations(candidates(model, kinds), n) if fits(model, drop_set)]
    return costs.ranking(list(sets[int(costs.mean(sets).argmin())]))


def random_draw(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int | None = None,
    kinds: Kinds = "attention",
    seed: int | list[int] = 0,
) -> SearchResult:
    """A random order, which costs nothing.

    >>> random_draw(model, windows, 2, seed=1).passes
    0.0
    """
    return SearchResult(take(model, random_order(candidates(model, kinds), seed), n), 0.0, 0.0)


def evopress(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    n: int,
    kinds: Kinds = "attention",
    passes: float | None = None,
    seed: int = 0,
) -> SearchResult:
    """The set of ``n`` sub-blocks that evolution finds (EvoPress, arXiv 2410.14649), with KL to the dense model as fitness.

    The start is the best of 32 random sets. A generation has 32 offspring of the survivor. An offspring exchanges min(U{1..3},
    U{1..3}) dropped sub-blocks for kept ones. Two survive a selection on an eighth of the windows; the best of them and of their
    parent on all windows survives. There are n (M - n) / 1.5 generations for M candidates.

    Args:
        passes: stop before the generation that starts with this many passes spent.
        seed: of all draws.

    >>> evopress(model, windows, 2, passes=50.0).order == evopress(model, windows, 2, passes=50.0).order
    True
    """
    possible, rng = candidates(model, kinds), np.random.default_rng(seed)
    take(model, possible, n)  # refuses a number that cannot go
    stages = [SetCosts(model, windows[: max(1, len(windows) // 8)]), SetCosts(model, windows)]

    def spent() -> float:
        return sum(stage.passes for stage in stages)

    def best(sets: list[tuple[SubBlock, ...]], survivors: int, stage: SetCosts) -> list[tuple[SubBlock, ...]]:
        return [sets[i] for i in np.argsort(stage.mean(sets), kind="stable")[:survivors]]

    def random_set() -> tuple[SubBlock, ...]:
        return tuple(sorted(take(model, random_order(possible, int(rng.integers(2**31))), n)))

    def offspring(parent: tuple[SubBlock, ...]) -> tuple[SubBlock, ...]:
        kept = [sub_block for sub_block in possible if sub_block not in parent]
        flips = min(*rng.integers(1, 4, 2), len(parent), len(kept))
        back, gone = (set(rng.choice(len(pool), flips, replace=False)) for pool in (parent, kept))
        stays = [sub_block for i, sub_block in enumerate(parent) if i not in back]
        child = tuple(sorted([*stays, *(sub_block for i, sub_block in enumerate(kept) if i in gone)]))
        return child if fits(model, child) else parent

    (parent,) = best(sorted({random_set() for _ in range(OFFSPRING)}), 1, stages[0])
    for _ in progress(range(int(n * (len(possible) - n) / 1.5)), "EvoPress"):
        if passes is not None and spent() >= passes:
            break
        children = best(sorted({offspring(parent) for _ in range(OFFSPRING)}), SURVIVORS[0], stages[0])
        (parent,) = best(list(dict.fromkeys([parent, *children])), SURVIVORS[1], stages[1])
    return SearchResult(list(parent), spent(), sum(stage.tokens for stage in stages))


def interactions(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    kinds: Kinds = "attention",
    among: Iterable[SubBlock] | None = None,
) -> pd.DataFrame:
    """The true cost of every single drop and every pair: KL(dense || pruned), nats per token.

    Args:
        among: the sub-blocks to pair; None for all candidates of the kinds.
    Returns:
        first, second (sub-blocks; equal for a single drop), cost, interaction (cost of the pair minus that of its two single drops;
        0 for a single drop). Pairs that cannot be dropped together are left out.

    >>> len(interactions(model, windows, "mlp", [SubBlock(1, "mlp"), SubBlock(2, "mlp"), SubBlock(5, "mlp")]))
    6
    """
    costs, possible = SetCosts(model, windows), candidates(model, kinds) if among is None else sorted(among)
    pairs = [pair for pair in combinations(possible, 2) if fits(model, pair)]
    values = costs.mean([*((s,) for s in possible), *pairs])
    single = dict(zip(possible, values, strict=False))
    rows = [(s, s, cost, 0.0) for s, cost in single.items()]
    rows += [(a, b, cost, cost - single[a] - single[b]) for (a, b), cost in zip(pairs, values[len(possible) :], strict=True)]
    return pd.DataFrame(rows, columns=["first", "second", "cost", "interaction"])

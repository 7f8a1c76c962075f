"""Selection: from scores to the sub-blocks to drop, always an explicit list, first dropped first."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from .residual import Kind, SubBlock

PUBLISHED_PROTECTED = (0, 1, -1)  # the layers that the published EntroDrop code never drops


class NoFallingStage(ValueError):
    """The entropy curve does not fall, so the two-stage rule is not applicable."""


def scores_by_layer(scores: pd.DataFrame, metric: str, kind: str) -> pd.DataFrame:
    """The scores of one metric and kind: one row per sequence, one column per layer.

    Raises:
        ValueError: the scores do not hold this metric and kind.
    """
    rows = scores[(scores.metric == metric) & (scores.kind == kind)]
    if rows.empty:
        available = scores[["metric", "kind"]].drop_duplicates().agg(" of ".join, axis=1)
        raise ValueError(f"the scores do not hold {metric} of {kind}: they hold {', '.join(available)}")
    return rows.pivot_table(index="sequence", columns="layer", values="value")


def protected_layers(protected: Iterable[int], n_layers: int) -> set[int]:
    """The protected layers, counted from the start; negative ones count from the end.

    Raises:
        ValueError: a layer that does not exist.
    """
    protected = tuple(protected)
    if wrong := [layer for layer in protected if not -n_layers <= layer < n_layers]:
        there = "is 1 layer" if n_layers == 1 else f"are {n_layers} layers"
        raise ValueError(f"cannot protect layers {wrong}: there {there}")
    return {layer % n_layers for layer in protected}


def one_shot(
    scores: pd.DataFrame, metric: str, kind: Kind | str, n: int | None = None, protected: Iterable[int] = PUBLISHED_PROTECTED
) -> list[SubBlock]:
    """The ``n`` sub-blocks of one kind with the smallest mean score, smallest first.

    Args:
        scores: the table that ``score`` returns.
        n: how many; None for all that are not protected.
        protected: layers that are never dropped; the default is that of the published EntroDrop code.
    Raises:
        ValueError: the scores do not hold this metric and kind, fewer than ``n`` sub-blocks are not protected, all are, or a
            protected layer does not exist.

    >>> scores = score(model, windows, ["cosine"], kinds=["attention"])
    >>> [sub_block.kind for sub_block in one_shot(scores, "cosine", "attention", n=2)]
    ['attention', 'attention']
    """
    mean = scores_by_layer(scores, metric, kind).mean()
    kept = protected_layers(protected, int(scores.layer.max()) + 1)
    order = mean.drop(index=[layer for layer in mean.index if layer in kept]).sort_values(kind="stable")
    if order.empty and n != 0:
        layers = ", ".join(map(str, sorted(kept)))
        raise ValueError(f"all {len(mean)} sub-blocks of kind {kind} are protected, in layers {layers}: protect fewer")
    if n is not None and not 0 <= n <= len(order):
        raise ValueError(f"cannot drop {n} of {len(mean)} sub-blocks of kind {kind}: {len(order)} are not protected")
    return [SubBlock(int(layer), kind) for layer in order.index[:n]]


def stage_boundary(scores: pd.DataFrame, metric: str) -> int:
    """The first layer of the rising stage: the layer whose input has the least mean entropy; 0 where the curve never falls.

    The curve follows from the increases of the blocks, up to a constant (arXiv 2504.03794).
    """
    increases = scores_by_layer(scores, metric, "block").mean().to_numpy()
    return int(np.concatenate([[0], np.cumsum(increases)[:-1]]).argmin())  # the last layer's output is no layer's input


def two_stage(scores: pd.DataFrame, metric: str, kind: Kind | str, n: int | None = None) -> list[SubBlock]:
    """EntroDrop's rule: keep every layer of the falling stage, then drop the smallest entropy increase of the rising stage first.

    Raises:
        NoFallingStage: the curve is lowest at the first layer's input; the rule would protect nothing.
        ValueError: as ``one_shot``; the scores must hold kind "block", which gives the stages.

    >>> scores = score(model, windows, ["matrix_renyi"])
    >>> order = two_stage(scores, "matrix_renyi", "mlp")
    >>> min(sub_block.layer for sub_block in order) >= stage_boundary(scores, "matrix_renyi")
    True
    """
    if not (boundary := stage_boundary(scores, metric)):
        raise NoFallingStage(f"the two-stage rule is not applicable: the {metric} entropy curve has no falling stage")
    return one_shot(scores, metric, kind, n, protected=range(boundary))


def random_order(candidates: Iterable[SubBlock], seed: int | list[int] = 0) -> list[SubBlock]:
    """The candidates in a random order, which does not depend on the order they are given in."""
    ordered = sorted(candidates)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def matched_draws(
    counts: Mapping[str, int], pools: Mapping[str, Iterable[SubBlock]], draws: int, seed: int = 0
) -> list[tuple[SubBlock, ...]]:
    """Random sets with a given number of sub-blocks of each kind; none where that cannot be or blocks and parts could overlap.

    Args:
        counts: kind -> how many of it.
        pools: kind -> those that may be drawn.
    """
    total = sum(counts.values())
    ordered = {kind: list(pool) for kind, pool in pools.items()}
    if not total or 0 < counts.get("block", 0) < total or any(n > len(ordered[kind]) for kind, n in counts.items()):
        return []
    orders = [{kind: random_order(pool, [seed, draw]) for kind, pool in ordered.items()} for draw in range(draws)]
    return [tuple(sorted(s for kind, n in counts.items() for s in order[kind][:n])) for order in orders]


def deepest_first(candidates: Iterable[SubBlock]) -> list[SubBlock]:
    """The candidates from the last layer to the first."""
    return sorted(candidates, reverse=True)


def count_of(fraction: float, total: int) -> int:
    """A fraction of ``total`` sub-blocks as a number: at least one, and at most what the published code leaves unprotected."""
    return min(max(1, round(fraction * total)), max(1, total - len(PUBLISHED_PROTECTED)))

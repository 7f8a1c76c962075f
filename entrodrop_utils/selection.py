"""Scores -> which sub-blocks to drop: always an explicit list of sub-blocks, first dropped first."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .scoring import OFFICIAL_PROTECTED, bootstrap
from .sub_blocks import SubBlock


def one_shot(
    scores: pd.DataFrame, metric: str, kind: str, n: int | None = None, protected: Iterable[int] = OFFICIAL_PROTECTED
) -> list[SubBlock]:
    """The ``n`` sub-blocks of one kind with the smallest mean score, smallest first.

    Args:
        scores: of ``scoring.score``.
        n: how many; None for all that may be dropped.
        protected: layers that are kept; negative ones count from the end. The default is that of the published code.
    Raises:
        ValueError: the scores do not hold this metric and kind; fewer than ``n`` may be dropped; a layer that does not exist.
    """
    mean = _sequences(scores, metric, kind).mean()
    depth = int(scores.layer.max()) + 1
    protected = tuple(protected)
    if wrong := [layer for layer in protected if not -depth <= layer < depth]:
        raise ValueError(f"cannot protect layers {wrong}: the scores are of {depth} layers")
    kept = {layer % depth for layer in protected}
    order = mean.drop(index=[layer for layer in mean.index if layer in kept]).sort_values(kind="stable")
    if n is not None and not 0 <= n <= len(order):
        raise ValueError(f"cannot drop {n} of {len(mean)} sub-blocks of kind {kind}: {len(order)} are not protected")
    return [SubBlock(int(layer), kind) for layer in order.index[:n]]


def stage_boundary(scores: pd.DataFrame, metric: str) -> int:
    """The first layer of the rising stage: where the mean entropy of the layer inputs turns from falling to rising.

    It is the layer whose input has the least entropy (arXiv 2504.03794); 0 where the curve never falls.
    The curve follows from the increases of the blocks, up to a constant that does not matter here.
    """
    return int(_boundaries(_sequences(scores, metric, "block").mean().to_numpy()[None])[0])


def stage_boundary_draws(scores: pd.DataFrame, metric: str, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """The stage boundary of resampled calibration sequences: how sure its place is."""
    return _boundaries(bootstrap(_sequences(scores, metric, "block").to_numpy(), draws, seed))


def two_stage(scores: pd.DataFrame, metric: str, kind: str, n: int | None = None) -> list[SubBlock]:
    """The paper's rule: keep every layer of the falling stage; in the rising stage the smallest entropy increase goes first.

    Raises:
        ValueError: as ``one_shot``; the scores must hold kind "block" as well, from which the stages are read.
    """
    return one_shot(scores, metric, kind, n, protected=range(stage_boundary(scores, metric)))


def _sequences(scores: pd.DataFrame, metric: str, kind: str) -> pd.DataFrame:
    chosen = scores[(scores.metric == metric) & (scores.kind == kind)]
    if chosen.empty:
        have = scores[["metric", "kind"]].drop_duplicates().agg(" of ".join, axis=1)
        raise ValueError(f"the scores do not hold {metric} of {kind}: they hold {', '.join(have)}")
    return chosen.pivot_table(index="sequence", columns="layer", values="value")


def _boundaries(increases: np.ndarray) -> np.ndarray:
    """Per row of block increases, the layer input with the least entropy (what the last layer leaves is no layer's input)."""
    inputs = np.concatenate([np.zeros((len(increases), 1)), np.cumsum(increases, axis=1)[:, :-1]], axis=1)
    return inputs.argmin(axis=1)


class Choice:
    """Which sub-blocks are dropped: the first of the ranking, but for those that a person keeps or drops by hand."""

    def __init__(self, order: list[SubBlock], n: int = 0):
        self.order, self.by_hand = order, {}
        self.n = min(n, self.limits[1])

    @property
    def limits(self) -> tuple[int, int]:
        """How few and how many can be dropped: those dropped by hand, and all but those kept by hand or by the rule."""
        return len(self._forced()), len(self.at(len(self.order) + len(self.by_hand)))

    @property
    def dropped(self) -> list[SubBlock]:
        """The selection, first dropped first."""
        return self.at(self.n)

    def at(self, n: int) -> list[SubBlock]:
        """The selection of ``n``: those dropped by hand, then the ranking."""
        forced = self._forced()
        return forced + [s for s in self.order if s not in self.by_hand][: max(0, n - len(forced))]

    def toggle(self, sub_block: SubBlock) -> None:
        """Keep what is dropped or drop what is kept, and nothing else."""
        gone = sub_block in (before := self.dropped)
        self.by_hand[sub_block] = not gone
        self.n = len(before) + (-1 if gone else 1)

    def _forced(self) -> list[SubBlock]:
        return [sub_block for sub_block, gone in self.by_hand.items() if gone]

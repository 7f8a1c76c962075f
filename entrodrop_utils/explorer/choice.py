"""What is dropped: a ranking of all sub-blocks, and a choice in it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from .. import selection
from ..residual import SubBlock
from .loaded import LoadedModel
from .settings import Settings

FRACTION, PAPER = 0.25, 0.375  # of the sub-blocks, that are dropped at first and by the paper


@dataclass(frozen=True)
class Ranking:
    """The scores of all sub-blocks, with the settings and the model that they were computed from.

    Attributes:
        curve: mean entropy at each of the 2 L + 1 endpoints of the residual stream, nats, by ``settings.entropy``.
        importance: of every sub-block of every kind.
        order: the sub-blocks of ``settings.kind`` that may be dropped, first dropped first.
    """

    settings: Settings
    loaded: LoadedModel
    curve: Float[np.ndarray, " endpoint"]
    importance: dict[SubBlock, float]
    order: list[SubBlock]

    @property
    def candidates(self) -> list[SubBlock]:
        """The sub-blocks of the kind that is dropped, by depth."""
        return self.loaded.sub_blocks[self.settings.kind]


@dataclass(frozen=True)
class Choice:
    """Which sub-blocks are dropped: the first of the ranking, but for those that a person keeps or drops by hand.

    What is dropped by hand wins: a block that holds a part dropped by hand, or a part of such a block, leaves the ranking.

    Args:
        n: how many are dropped, moved into ``limits``; None for a quarter of the kind.
        by_hand: sub-block -> whether it is dropped.
        origin: what made the choice by hand, where no person did ("at random").
    """

    ranking: Ranking
    n: int | None = None
    by_hand: dict[SubBlock, bool] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self):
        low, high = self.limits
        n = selection.count_of(FRACTION, len(self.ranking.candidates)) if self.n is None else self.n
        object.__setattr__(self, "n", min(max(n, low), high))

    @property
    def settings(self) -> Settings:
        """Those that the choice was made under."""
        return self.ranking.settings

    @property
    def limits(self) -> tuple[int, int]:
        """How few and how many can be dropped: those dropped by hand, and all but those kept by hand or by the rule."""
        return len(self._forced), len(self.at(len(self.ranking.order) + len(self.by_hand)))

    @property
    def dropped(self) -> list[SubBlock]:
        """The selection, first dropped first."""
        return self.at(self.n)

    @property
    def _forced(self) -> list[SubBlock]:
        return [sub_block for sub_block, gone in self.by_hand.items() if gone]

    def at(self, n: int) -> list[SubBlock]:
        """The selection of ``n``: those dropped by hand, then the ranking."""
        free = [s for s in self.ranking.order if s not in self.by_hand and not _overlap(s, self._forced)]
        return self._forced + free[: max(0, n - len(self._forced))]

    def marked(self, sub_blocks: Iterable[SubBlock], gone: bool | None = None) -> "Choice":
        """The choice with these of one kind dropped or kept by hand, and nothing else changed; None toggles a single one.

        Raises:
            ValueError: without them no attention layer would be left.
        """
        marked = list(sub_blocks)
        gone = marked[0] not in self.dropped if gone is None else gone
        lost = [s for s in self.dropped if gone and _overlap(s, marked)]
        wanted = [s for s in self.dropped if s not in marked and s not in lost] + marked * gone
        by_hand = {s: was for s, was in self.by_hand.items() if s not in lost} | dict.fromkeys(marked, gone)
        new = Choice(self.ranking, len(wanted), by_hand)
        parts = {s: False for s in new.dropped if s not in wanted}  # of a lost block, which the ranking would drop now that it can
        new = Choice(self.ranking, len(wanted), by_hand | parts)
        attention = {s.layer for s in self.ranking.loaded.sub_blocks["attention"]}
        if attention and attention <= {s.layer for s in new.dropped if s.kind != "mlp"}:
            raise ValueError("one attention layer must stay: without it no token sees another")
        return new

    @property
    def made_by(self) -> str:
        """Who chose: the ranking, a person, or both."""
        if self.origin:
            return self.origin
        dropped, kept = self._forced, [s for s, gone in self.by_hand.items() if not gone]
        if dropped and len(dropped) == self.n:
            return "hand"
        by_hand = [f"{', '.join(map(str, some))} {what} by hand" for some, what in ((dropped, "dropped"), (kept, "kept")) if some]
        return "; ".join([f"{self.settings.measure}, one-shot", *by_hand])

    @property
    def name(self) -> str:
        """A short name, which the choice has once it is pinned."""
        kind = f" {self.settings.kind}" * (self.settings.kind != "attention")
        return f"{self.origin or ('mine' if self.by_hand else self.settings.measure + kind)}, {self.n}"


def _overlap(sub_block: SubBlock, others: Iterable[SubBlock]) -> bool:
    """Whether a sub-block is a part of one of the others, or holds it."""
    return any(s.layer == sub_block.layer and s.kind != sub_block.kind and "block" in (s.kind, sub_block.kind) for s in others)


def preset(name: str, now: Choice, seed: int) -> tuple[dict, Callable[[Ranking], Choice]]:
    """A choice by name: the settings that it needs, and the choice in the ranking by these.

    ``paper`` and ``cosine`` are 37.5% of the attention layers by bucket entropy or cosine, ``random`` is as many as now, and
    ``sink`` the branch that makes the attention sink.

    Raises:
        ValueError: an unknown preset.
    """
    presets = {
        "paper": ({"metric": "bucket", "kind": "attention"}, _published_share),
        "cosine": ({"metric": "cosine", "kind": "attention"}, _published_share),
        "sink": ({}, _sink),
        "random": ({}, partial(_at_random, n=now.n, seed=seed)),
    }
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]


def _published_share(ranking: Ranking) -> Choice:
    return Choice(ranking, selection.count_of(PAPER, ranking.loaded.depth))


def _at_random(ranking: Ranking, n: int, seed: int) -> Choice:
    chosen = selection.random_order(ranking.order, seed)[:n]
    return Choice(ranking, len(chosen), dict.fromkeys(chosen, True), f"at random (seed {seed})")


def _sink(ranking: Ranking) -> Choice:
    """The branch at which bucket entropy falls most when the first token counts: there it becomes the attention sink."""
    curve = ranking.loaded.curve((), replace(ranking.settings, metric="bucket", first=True))
    endpoint = int(np.diff(curve).argmin())
    sink = SubBlock(endpoint // 2, ("attention", "mlp")[endpoint % 2])
    return Choice(ranking, 1, {sink: True}, f"the largest fall of bucket entropy, {sink}")

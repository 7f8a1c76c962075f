"""The selection of the explorer: a ranking, how many of it are dropped, and what was kept or dropped by hand."""

from collections.abc import Collection, Mapping

from ..residual import SubBlock


class Choice:
    """Which sub-blocks are dropped: the first of the ranking, but for those that a person keeps or drops by hand.

    What is dropped by hand wins: a block that holds a part dropped by hand, or a part of such a block, leaves the ranking.

    Args:
        by_hand: sub-block -> whether it is dropped.
        attention: all attention layers of the model, of which one must stay.
        origin: what made the choice by hand, where no person did ("at random").
    """

    def __init__(
        self,
        order: list[SubBlock],
        n: int = 0,
        by_hand: Mapping[SubBlock, bool] | None = None,
        attention: Collection[SubBlock] = (),
        origin: str = "",
    ):
        self.order, self.by_hand, self.attention, self.origin = order, dict(by_hand or {}), attention, origin
        low, high = self.limits
        self.n = min(max(n, low), high)

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
        free = [s for s in self.order if s not in self.by_hand and not any(_overlap(s, other) for other in forced)]
        return forced + free[: max(0, n - len(forced))]

    def set(self, sub_blocks: Collection[SubBlock], gone: bool) -> None:
        """Drop or keep these by hand, and change nothing else.

        Raises:
            ValueError: without them no attention layer would be left; the choice stays as it was.
        """
        before, by_hand = self.dropped, dict(self.by_hand)
        for sub_block in sub_blocks:
            if gone:
                by_hand = {s: was for s, was in by_hand.items() if not (was and _overlap(s, sub_block))}
            by_hand[sub_block] = gone
        after = [s for s in before if s not in sub_blocks and not (gone and any(_overlap(s, new) for new in sub_blocks))]
        wanted = [*after, *(sub_blocks if gone else ())]
        by_hand |= {s: False for s in Choice(self.order, len(wanted), by_hand).dropped if s not in wanted}  # parts of a lost block
        new = Choice(self.order, len(wanted), by_hand, self.attention)
        lost = {s.layer for s in new.dropped if s.kind != "mlp"}
        if self.attention and {s.layer for s in self.attention} <= lost:
            raise ValueError("one attention layer must stay: without it no token sees another")
        self.__dict__.update(new.__dict__)

    def toggle(self, sub_block: SubBlock) -> None:
        """Keep what is dropped or drop what is kept. Raises ValueError as ``set``."""
        self.set([sub_block], sub_block not in self.dropped)

    def described(self, metric: str) -> str:
        """Who chose: the ranking, a person, or both."""
        if self.origin:
            return self.origin
        dropped, kept = self._forced(), [s for s, gone in self.by_hand.items() if not gone]
        if dropped and len(dropped) == len(self.dropped):
            return "hand"
        by_hand = [f"{', '.join(map(str, some))} {what} by hand" for some, what in ((dropped, "dropped"), (kept, "kept")) if some]
        return "; ".join([f"{metric}, one-shot", *by_hand])

    def _forced(self) -> list[SubBlock]:
        return [sub_block for sub_block, gone in self.by_hand.items() if gone]


def _overlap(first: SubBlock, second: SubBlock) -> bool:
    """Whether one of two sub-blocks is a part of the other."""
    return first.layer == second.layer and first.kind != second.kind and "block" in (first.kind, second.kind)

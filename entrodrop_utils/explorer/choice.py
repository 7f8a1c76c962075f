"""The selection of the explorer: a ranking, how many of it are dropped, and what was kept or dropped by hand."""

from ..residual import SubBlock


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

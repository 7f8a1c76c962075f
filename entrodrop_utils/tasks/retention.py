"""Retention: the share of the dense model's accuracy that a pruned model keeps, with paired intervals.

A model near chance on a task keeps most of its accuracy there whatever is dropped. Retention above chance therefore subtracts the
accuracy of guessing from both, and leaves out the tasks on which the dense model is not above chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..layerwise import DropSet
from ..statistics import Interval, bootstrap_means, ends

NORMED = ("acc_norm", "acc")  # the metric of a task: the accuracy normed by length where it has one


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``task_scores``'s tables that count: one accuracy a task."""
    chosen = table[table.metric.isin(NORMED)]
    normed = chosen.task.isin(chosen.task[chosen.metric == NORMED[0]])
    return chosen[(chosen.metric == NORMED[0]) | ~normed]


def above_chance(scores: pd.DataFrame) -> list[str]:
    """The tasks on which the dense model is above chance by two of its standard errors.

    Args:
        scores: of ``task_scores``.
    """
    dense = accuracies(scores)
    dense = dense[dense.set.map(len) == 0]
    return dense.task[dense.value - dense.chance > 2 * dense.stderr].tolist()


@dataclass(frozen=True)
class Retention:
    """Bootstrap draws of every set's mean accuracy over tasks: items are drawn anew within each task, the same for all sets."""

    sets: list[DropSet]
    mean: Float[np.ndarray, " set"]  # of the accuracies
    means: Float[np.ndarray, "draw set"]
    chance: float

    @classmethod
    def of(cls, scores: pd.DataFrame, items: pd.DataFrame, tasks: Sequence[str] | None = None, seed: int = 0) -> "Retention":
        """From ``task_scores``'s two tables, over these tasks (all that could be had).

        Raises:
            ValueError: no task, or no dense model among the sets.
        """
        scores, items = accuracies(scores), accuracies(items)
        tasks = list(dict.fromkeys(items.task)) if tasks is None else list(tasks)
        sets = list(dict.fromkeys(scores.set))
        if not tasks or () not in sets:
            raise ValueError(f"need the dense model (the empty set) and at least one task, got {len(sets)} sets and tasks {tasks}")
        place = {one: n for n, one in enumerate(sets)}
        numbered = items.assign(set=[place[one] for one in items.set])  # pandas would take a tuple for several keys
        by_task = {task: rows for task, rows in numbered.groupby("task")}
        wide = [by_task[task].pivot_table(index=["part", "item"], columns="set", values="value") for task in tasks]
        draws = np.mean([bootstrap_means(one.to_numpy(), seed=seed + n) for n, one in enumerate(wide)], axis=0)
        chance = scores[scores.task.isin(tasks)].drop_duplicates("task").chance.mean()
        return cls(sets, np.mean([one.to_numpy().mean(0) for one in wide], axis=0), draws, float(chance))

    def draws(self, sets: Sequence[DropSet], above: bool = False) -> Float[np.ndarray, " draw"]:
        """Draws of the mean retention of some sets (one, or the random ones together), as the paper counts or above chance."""
        off = self.chance if above else 0.0
        at = [self.sets.index(one) for one in sets]
        return (self.means[:, at].mean(1) - off) / (self.means[:, self.sets.index(())] - off)

    def share(self, sets: Sequence[DropSet], above: bool = False) -> Interval:
        """The retention of some sets and its 95% interval."""
        off = self.chance if above else 0.0
        mean = self.mean[[self.sets.index(one) for one in sets]].mean() - off
        share = float(mean / (self.mean[self.sets.index(())] - off))
        return Interval(share, *map(float, ends(self.draws(sets, above))))

"""TALE: greedy search by accuracy on a task."""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from ..dropping import dropped
from ..progress import progress
from ..residual import SubBlock
from .costs import Kinds, candidates, fits


def tale(
    model: PreTrainedModel, accuracy: Callable[[PreTrainedModel], np.ndarray], n: int, kinds: Kinds = "block"
) -> tuple[list[SubBlock], list[float]]:
    """Drop what leaves the highest accuracy on validation items, one after another (TALE, arXiv 2510.22767).

    The items have chosen the set, so other items must judge it. Of equal accuracies the deepest sub-block goes.

    Args:
        accuracy: of a model, one value per validation item.
    Returns:
        The sub-blocks, first dropped first, and the mean accuracy after each drop.

    >>> order, accuracies = tale(model, lambda smaller: np.zeros(4), 2)
    >>> order, accuracies
    ([SubBlock(layer=5, kind='block'), SubBlock(layer=4, kind='block')], [0.0, 0.0])
    """
    possible, chosen, accuracies = candidates(model, kinds)[::-1], [], []
    for _ in progress(range(n), "TALE"):
        means = {}
        for sub_block in (s for s in possible if s not in chosen and fits(model, [*chosen, s])):
            with dropped(model, [*chosen, sub_block]):
                means[sub_block] = float(np.mean(accuracy(model)))
        chosen.append(max(means, key=means.get))
        accuracies.append(means[chosen[-1]])
    return chosen, accuracies

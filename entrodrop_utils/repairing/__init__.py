"""Repair: what a dropped sub-block added to the stream, predicted from calibration text.

``repair`` is the entry point. ``branches`` puts a map of its own input in place of an attention layer or MLP, ``folds`` adds a map
to the weights of an earlier branch, ``magnitude`` restores the size of the stream, and ``choice`` ranks by the cost that is left.
"""

from .choice import rank_for_repair, single_costs
from .fit import HOW, LOOPS, folds_by_set, maps_by_how, repair

__all__ = ["HOW", "LOOPS", "folds_by_set", "maps_by_how", "rank_for_repair", "repair", "single_costs"]

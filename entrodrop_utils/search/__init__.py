"""Which sub-blocks to drop, by search: a small function for each published method, and the one that the README recommends.

Each returns a ``SearchResult``: the sub-blocks, first dropped first, with the forward passes and tokens spent. ``lazy_greedy`` is
the recommended one; the others are what it is compared with. On windows of ``text.repeated`` it spares attention layers that copy
from the context, which the loss on short windows hardly shows; with ``counted`` only some tokens decide, such as the digits of
worked calculations.

>>> from entrodrop_utils import search
>>> ranking = search.lazy_greedy(model, windows, 2)
>>> len(ranking.order), ranking.passes > 0
(2, True)
"""

from .accuracy import tale
from .costs import SearchResult, SetCosts, candidates
from .gates import cbo, fisher, gate_gradients, taylor
from .scores import INFORMATION, angular_window, by_score
from .sets import evopress, exhaustive, interactions, random_draw
from .stepwise import greedy, lazy_greedy, single_drops

__all__ = [
    "INFORMATION",
    "SearchResult",
    "SetCosts",
    "angular_window",
    "by_score",
    "candidates",
    "cbo",
    "evopress",
    "exhaustive",
    "fisher",
    "gate_gradients",
    "greedy",
    "interactions",
    "lazy_greedy",
    "random_draw",
    "single_drops",
    "tale",
    "taylor",
]

"""The comparison of search methods: what each one's sets cost on held-out text, and what the search spent."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from .. import search
from ..evaluation import losses_by_set
from ..progress import progress
from ..residual import SubBlock
from ..scoring import Metric
from ..search import Ranking
from ..statistics import Interval, mean_interval, paired_difference
from .methods import layers_text, losses_of

Search = Callable[[PreTrainedModel, Int[Tensor, "window token"], int, str], Ranking]
OURS, GREEDY, EVOLUTION, RANDOM_DRAW = "lazy greedy", "greedy", "EvoPress", "random"


def search_methods(metrics: Mapping[str, Metric], draws: int = 0) -> dict[str, Search]:
    """Name -> a function of model, windows, number and kind.

    Args:
        metrics: scores of one forward pass, entropies and similarities.
        draws: of random orders.
    """
    scored = {name: partial(search.by_score, metric={name: metric}) for name, metric in metrics.items()}
    information = {name: partial(search.by_score, metric={name: f}) for name, f in search.INFORMATION.items()}
    return {
        **scored,
        **information,
        "Fisher": search.fisher,
        "CBO": search.cbo,
        "single drops": search.single_drops,
        "single drops, loss": partial(search.single_drops, measure="nll"),
        OURS: search.lazy_greedy,
        GREEDY: search.greedy,
        "greedy, loss": partial(search.greedy, measure="nll"),
        EVOLUTION: search.evopress,
        **{f"{RANDOM_DRAW} {draw}": partial(search.random_draw, seed=draw) for draw in range(draws)},
    }


def rankings(
    model: PreTrainedModel,
    calibrations: Sequence[Int[Tensor, "window token"]],
    methods: Mapping[str, Search],
    kinds: Iterable[str],
    counts: Iterable[int],
) -> pd.DataFrame:
    """The set that every method chooses on every draw of calibration text; EvoPress stops at the passes that ours spent.

    Returns:
        kind, method, draw, n_dropped, set, dropped (layers), forward_passes, tokens.
    """
    rows, spent = [], {}
    cases = list(product(kinds, enumerate(calibrations), counts, methods.items()))
    cases.sort(key=lambda case: case[3][0] == EVOLUTION)  # after ours, whose passes it gets
    for kind, (draw, windows), n, (name, method) in progress(cases, "searches"):
        limit = {"passes": spent[kind, draw, n]} if name == EVOLUTION and (kind, draw, n) in spent else {}
        order, passes, tokens = method(model, windows, n, kind, **limit)
        if name == OURS:
            spent[kind, draw, n] = passes
        chosen = tuple(sorted(order))
        rows.append((kind, name, draw, n, chosen, layers_text(chosen), passes, tokens))
    return pd.DataFrame(rows, columns=["kind", "method", "draw", "n_dropped", "set", "dropped", "forward_passes", "tokens"])


def judged(
    model: PreTrainedModel, choices: pd.DataFrame, held_out: Mapping[str, Int[Tensor, "window token"]]
) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The loss increase of every choice on texts that have chosen nothing.

    Args:
        choices: as ``rankings`` returns it.
        held_out: domain -> windows.
    Returns:
        the choices with domain, increase, low, high (nats per token, interval over windows), kl; and for each domain the losses of
        every set, as ``losses_of`` has them.
    """
    tables, losses = [], {}
    for domain, windows in held_out.items():
        losses[domain] = by_set = losses_of(losses_by_set(model, windows, [(), *choices.set]))
        dense = by_set[()].nll.to_numpy()
        values = [(*paired_difference(by_set[s].nll.to_numpy(), dense), by_set[s].kl.mean()) for s in choices.set]
        costs = pd.DataFrame(values, columns=["increase", "low", "high", "kl"], index=choices.index)
        tables.append(choices.assign(domain=domain).join(costs))
    return pd.concat(tables, ignore_index=True), losses


def against_ours(table: pd.DataFrame, losses: Mapping[str, Mapping], ours: str = OURS) -> pd.DataFrame:
    """Every method's loss minus ours on the same windows, both averaged over draws of calibration text.

    Returns:
        domain, kind, n_dropped, method, increase (mean over draws), share (of greedy's forward passes), difference, low, high
        (nats per token; above zero ours is better; interval over windows).
    """
    rows = []
    for (domain, kind, n), group in table.groupby(["domain", "kind", "n_dropped"], sort=False):
        by_method = {
            name: np.mean([losses[domain][s].nll.to_numpy() for s in of_method.set], axis=0)
            for name, of_method in group.groupby("method", sort=False)
        }
        passes = group.groupby("method").forward_passes.mean()
        for name, values in by_method.items():
            increase = group[group.method == name].increase.mean()
            share = passes[name] / passes.get(GREEDY, np.nan)
            rows.append((domain, kind, n, name, increase, passes[name], share, *paired_difference(values, by_method[ours])))
    columns = ["domain", "kind", "n_dropped", "method", "increase", "forward_passes", "share", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)

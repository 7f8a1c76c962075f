"""The comparison of entropy with cosine similarity: agreement of rankings, costs of pruning, and the paper's claims about them."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..claims import COLUMNS, claim
from ..entropy import ESTIMATORS
from ..figures import COLOURS, MARKERS, log_axis, panels
from ..layerwise import DropSet
from ..residual import KINDS
from ..similarity import SIMILARITIES
from ..statistics import Interval, kendall_interval
from .methods import METHOD_COLUMNS, RANDOM, Choice, Method

COSINE = Method("cosine")
RULES = ("one-shot", "two-stage")
PAPER_METHODS = [Method(metric, rule) for metric, rule in product(("bucket", "knn"), RULES)]
MAIN_METHODS = [*PAPER_METHODS, *(Method(name) for name in SIMILARITIES)]
WITHOUT_FIRST = [Method(metric, first_token=False) for metric in ("bucket", "knn")]
DEEPEST = Method("depth", "deepest first")
DASHES = {"two-stage": ":", "angular": "--", "norm_ratio": "-."}  # of a rule or a metric; the others are solid
PAPER_FRACTION, PAPER_SHARE = 0.375, 0.95  # of the attention layers that the paper drops, and of the accuracy that it keeps


def all_methods(n_random: int) -> list[Method]:
    """Every entropy by both rules, with and without the first token; every similarity; random draws; deepest first."""
    entropies = [Method(*parts) for parts in product(ESTIMATORS, RULES, (True, False))]
    random = [Method(RANDOM, RANDOM, draw=draw) for draw in range(n_random)]
    return [*entropies, *(Method(name) for name in SIMILARITIES), *random, DEEPEST]


def is_method(table: pd.DataFrame, methods: Sequence[Method]) -> pd.Series:
    """Whether each row of a table with the method's columns belongs to one of these methods."""
    return pd.Series(pd.MultiIndex.from_frame(table[METHOD_COLUMNS]).isin(methods), table.index)


def rank_agreement(scores: pd.DataFrame, reference: str = "cosine", seed: int = 0) -> pd.DataFrame:
    """Kendall's tau between the ranking by every metric and by the reference, with its interval over calibration windows.

    Returns:
        kind, metric, first_token, tau, low, high.
    """
    groups = scores.groupby(["kind", "metric", "first_token"], sort=False)
    by_layer = {key: rows.pivot_table(index="sequence", columns="layer", values="value").to_numpy() for key, rows in groups}
    rows = [
        (*key, *kendall_interval(values, by_layer[key[0], reference, True], seed=seed))
        for key, values in by_layer.items()
        if key[1] != reference
    ]
    return pd.DataFrame(rows, columns=["kind", "metric", "first_token", "tau", "low", "high"])


def cost_figure(pruning: pd.DataFrame, shown: Sequence[Method]) -> Figure:
    """Loss increase against the number dropped, a panel per kind, over the band of the random draws' range.

    Args:
        pruning: kind, the method's columns, n_dropped, increase.
    """
    figure, axes = panels(1, len(KINDS), height=2.9)
    for axis, kind in zip(axes, KINDS, strict=True):
        of_kind = pruning[pruning.kind == kind]
        draws = of_kind[of_kind.rule == RANDOM].groupby("n_dropped").increase.agg(["min", "max"])
        look = {"color": COLOURS[RANDOM], "alpha": 0.35, "label": "random, range"}
        if len(draws) > 1:
            axis.fill_between(draws.index, draws["min"], draws["max"], linewidth=0, **look)
        elif len(draws):  # a band needs two counts
            axis.bar(draws.index, draws["max"] - draws["min"], 0.4, draws["min"], **look)
        for method in shown:
            rows = of_kind[is_method(of_kind, [method])]
            dash = DASHES.get(method.rule) or DASHES.get(method.metric, "-")
            colour = COLOURS[method.metric]
            look = {"color": colour, "marker": MARKERS[method.metric], "label": method.label}
            face = "white" if method.rule == "two-stage" else colour
            axis.plot(rows.n_dropped, rows.increase, dash, markerfacecolor=face, **look)
        axis.set(title=kind.replace("mlp", "MLP"), xlabel="number dropped", xticks=sorted(set(of_kind.n_dropped)))
        log_axis(axis)
    axes[0].set_ylabel("loss increase (nats per token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def cost_table(pruning: pd.DataFrame, value: str, shown: Sequence[Method]) -> pd.DataFrame:
    """One value of the shown methods, and its mean over the random draws: a row per method, a column per kind and count."""
    label = {method: method.label for method in shown}
    methods = [Method(*values) for values in pruning[METHOD_COLUMNS].itertuples(index=False)]
    names = ["random (mean)" if method.rule == RANDOM else label.get(method) for method in methods]
    return pruning.assign(method=names).pivot_table(value, "method", ["kind", "n_dropped"], sort=False)


def share_of_draws_above(pruning: pd.DataFrame) -> pd.DataFrame:
    """The table without its random draws, with the column ``share``: of the draws of the same kind and count that cost more."""
    draws = pruning[pruning.rule == RANDOM].groupby(["kind", "n_dropped"]).nll.agg(list).rename("draws")
    table = pruning[pruning.rule != RANDOM].join(draws, on=["kind", "n_dropped"], how="inner")
    shares = [float(np.mean(np.array(row.draws) > row.nll)) for row in table.itertuples()]
    return table.drop(columns="draws").assign(share=shares)


def paper_claims(
    by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, DropSet], compared: Mapping[float, int], seed: int = 0
) -> pd.DataFrame:
    """The paper's claims about pruning: entropy against cosine, the retention that it reports, attention against MLP.

    Args:
        compared: the compared fractions and their numbers of sub-blocks; the last two claims are about the largest.
    Returns:
        the columns of a claim; a claim is left out where one of its choices was not measured.
    """
    losses = {
        (kind, method.metric, n): by_set[drop_set].nll.to_numpy()
        for (kind, method, n), drop_set in choices.items()
        if method.rule == "one-shot" and method.first_token
    }
    dense, largest, rows = by_set[()].nll.to_numpy(), max(compared), []
    share, n = f"{100 * largest:g}%", compared[largest]
    for metric, (fraction, count) in product(("bucket", "knn"), compared.items()):
        pair = [losses.get(("attention", name, count)) for name in ("cosine", metric)]
        if all(loss is not None for loss in pair):
            text = f"{metric} beats cosine at {100 * fraction:g}% of attention layers; measured: nats per token saved"
            rows.append(claim(text, "abstract", pair[0] - pair[1], published="better", seed=seed))
    for metric in ("bucket", "knn", "cosine"):
        attention, mlp = (losses.get((kind, metric, n)) for kind in ("attention", "mlp"))
        if attention is not None:
            what = f"dropping {share} of attention layers by {metric} keeps {PAPER_SHARE:.0%} of performance"
            text = f"{what}; measured: share of the likelihood per token (the paper: of accuracy)"
            published = f"> {PAPER_SHARE}" if metric != "cosine" and largest == PAPER_FRACTION else ""
            rows.append(claim(text, "results", np.exp(dense - attention), PAPER_SHARE, published, seed))
        if attention is not None and mlp is not None:
            what = f"attention is more redundant than MLP ({share} by {metric})"
            text = f"{what}; measured: extra loss of dropping MLPs in nats per token"
            rows.append(claim(text, "results", mlp - attention, published="more redundant", seed=seed))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def outcome(verdicts: pd.Series) -> str:
    """How entropy does against cosine similarity in these comparisons, as the predicate of a sentence."""
    n, wins, losses = len(verdicts), (verdicts == "better").sum(), (verdicts == "worse").sum()
    if max(wins, losses) == n > 0:
        return f"{'beats' if wins else 'loses to'} cosine similarity in all {n} comparisons"
    return f"beats cosine similarity in {wins} of {n} comparisons and loses in {losses}"


def extra_cost(difference: Interval, spec: str = ".2f") -> str:
    """A difference in nats with its interval as "0.47 nats [0.37, 0.57] more", or less where it is negative."""
    word = "more" if difference.estimate >= 0 else "less"
    low, high = difference[1:] if word == "more" else (-difference.high, -difference.low)
    return f"{abs(difference.estimate):{spec}} nats [{low:{spec}}, {high:{spec}}] {word}"

"""The comparison of entropy with cosine similarity and with random choices: rankings, costs of pruning, and the paper's claims."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..claims import COLUMNS, HELD_OUT, claim, claim_row, published_lists
from ..entropy import ESTIMATORS
from ..figures import COLOURS, GREY, barcode, headed_panels
from ..layerwise import DropSet
from ..residual import KINDS
from ..selection import PUBLISHED_PROTECTED, one_shot
from ..similarity import SIMILARITIES
from ..statistics import Interval, half_interval, half_means, kendall_interval
from .methods import KIND_NAMES, METHOD_COLUMNS, RANDOM, Choice, Method, distinct

COSINE = Method("cosine")
RULES = ("one-shot", "two-stage")
PAPER_METHODS = [Method(metric, rule) for metric, rule in product(("bucket", "knn"), RULES)]
MAIN_METHODS = [*PAPER_METHODS, *(Method(name) for name in SIMILARITIES)]
WITHOUT_FIRST = [Method(metric, first_token=False) for metric in ("bucket", "knn")]
DEEPEST = Method("depth", "deepest first")
DRAWN = [COSINE, *(method for name in ("knn", "bucket") for method in PAPER_METHODS if method.metric == name), DEEPEST]


def all_methods(n_random: int, estimators: Iterable[str]) -> list[Method]:
    """Entropies by both rules, with and without the first token; every similarity; random draws; deepest first."""
    entropies = [Method(*parts) for parts in product(estimators, RULES, (True, False))]
    random = [Method(RANDOM, RANDOM, draw=draw) for draw in range(n_random)]
    return [*entropies, *(Method(name) for name in SIMILARITIES), *random, DEEPEST]


def to_measure(choices: Mapping[Choice, DropSet], draws: Mapping[str, int]) -> dict[Choice, DropSet]:
    """The choices without those random ones that are beyond the number of draws of their kind."""
    return {
        (kind, method, n): drop_set
        for (kind, method, n), drop_set in choices.items()
        if method.rule != RANDOM or method.draw < draws[kind]
    }


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


def cost_figure(pruning: pd.DataFrame, n: int, depth: int, title: str) -> Figure:
    """Loss increase of ``DRAWN`` without ``n`` of ``depth`` sub-blocks, a panel per kind, over the range of the random draws.

    Args:
        pruning: kind, the method's columns, n_dropped, increase (nats per token).
    """
    rows = pruning[(pruning.n_dropped == n) & (pruning.increase > 0)]  # a logarithmic axis
    shown = [method for method in DRAWN if is_method(rows, [method]).any()]
    figure, axes = headed_panels(title, len(KINDS), 0.8 + 0.26 * (len(shown) + 2), sharey=True, sharex=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        of_kind = rows[rows.kind == kind]
        draws = of_kind[of_kind.rule == RANDOM].increase
        if len(draws):
            axis.axvspan(draws.min(), draws.max(), color="#ededed", linewidth=0)
            axis.plot(draws, np.full(len(draws), len(shown)), "|", color=GREY, markersize=10, markeredgewidth=0.9)
        for place, method in enumerate(shown):
            for increase in of_kind[is_method(of_kind, [method])].increase:
                colour = GREY if method == DEEPEST else COLOURS[method.metric]
                face = "white" if method.rule == "two-stage" else colour
                axis.plot(increase, place, "o", color=colour, markerfacecolor=face, markersize=7)
                axis.annotate(f"{increase:.2g}", (increase, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(False, axis="y")
        axis.set_title(f"{n} of {depth} {KIND_NAMES[kind]}")
        axis.margins(x=0.18)
    names = [*(method_name(method) for method in shown), "random draws"]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("loss increase (nats per token, log scale; left is better)", fontsize=9)
    return figure


def cost_title(pruning: pd.DataFrame, places: pd.DataFrame, n: int) -> str:
    """What the figure of costs shows at ``n``: for which kinds cosine costs least, and how entropy does against random draws."""
    of_n = pruning[(pruning.n_dropped == n) & (pruning.rule == "one-shot") & pruning.first_token]
    costs = of_n[of_n.metric.isin(["bucket", "knn", "cosine"])].pivot_table("increase", "kind", "metric", sort=False)
    kinds = [KIND_NAMES[kind] for kind in costs.index[costs.idxmin(axis=1) == "cosine"]]
    where = "every kind" if len(kinds) == len(costs) else " and ".join(kinds) or "no kind"
    entropy = distinct(places[(places.n_dropped == n) & is_method(places, PAPER_METHODS)])
    n_better = (entropy.verdict == "better").sum()
    return f"Cosine beats entropy for {where}; {n_better} of {len(entropy)} entropy sets beat most random sets"


def method_name(method: Method) -> str:
    """A method in a figure."""
    if method == DEEPEST:
        return method.label
    label = method.label.replace("knn", "KNN")
    return f"entropy, {label}" if method.metric in ESTIMATORS else label


def difference_figure(differences: pd.DataFrame, counts: Sequence[int], title: str) -> Figure:
    """Loss minus that of cosine similarity with its interval, a panel per kind: filled at the largest count, hollow at the others.

    Args:
        differences: as ``methods.compared_with`` returns it.
    """
    candidates = [*PAPER_METHODS, *WITHOUT_FIRST, *(Method(name) for name in SIMILARITIES)]
    shown = [method for method in candidates if is_method(differences, [method]).any()]
    figure, axes = headed_panels(title, len(KINDS), 0.8 + 0.3 * len(shown), sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        of_kind = differences[differences.kind == kind]
        axis.axvline(0, color="black", linewidth=1)
        for (place, method), n in product(enumerate(shown), sorted(counts)):
            rows = of_kind[is_method(of_kind, [method]) & (of_kind.n_dropped == n)]
            largest = n == max(counts)
            colour = COLOURS[method.metric] if method.metric in ESTIMATORS else GREY
            for row in rows.itertuples():
                y = place + (0.13 if largest else -0.13)
                axis.plot([row.low, row.high], [y, y], color=colour, linewidth=2, alpha=0.6)
                axis.plot(row.difference, y, "o", color=colour, markerfacecolor=colour if largest else "white", markersize=5)
        axis.grid(False, axis="y")
        axis.set_title(KIND_NAMES[kind])
    axes[0].set_yticks(range(len(shown)), [method.label.replace("knn", "KNN") for method in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    figure.supxlabel("loss minus that of cosine (nats per token; left of 0 is better)", fontsize=9)
    return figure


def dropped_layers(pruning: pd.DataFrame, n: int, depth: int) -> pd.DataFrame:
    """The attention layers that ``DRAWN`` drops, and published lists: name, metric, n_layers, layers, depth (mean, 0 to 1)."""
    rows = pruning[(pruning.kind == "attention") & (pruning.n_dropped == n)]
    ours = [
        (method_name(method), method.metric, depth, dropped)
        for method in DRAWN
        for dropped in rows[is_method(rows, [method])].dropped
    ]
    lists = published_lists().query("unit == 'attention'").itertuples()
    published = [(f"{row.method}, {row.model.partition(' (')[0]}", "published", row.n_total, row.value) for row in lists]
    table = pd.DataFrame([*ours, *published], columns=["name", "metric", "n_layers", "layers"])
    means = [np.mean([(int(layer) + 0.5) / row.n_layers for layer in row.layers.split()]) for row in table.itertuples()]
    return table.assign(depth=means)


def depth_title(table: pd.DataFrame) -> str:
    """Where cosine and bucket entropy drop attention layers, and where the published lists do.

    Args:
        table: as ``dropped_layers`` returns it.
    """
    depths = table.drop_duplicates("metric").set_index("metric").depth  # the one-shot rule comes first
    here = ", ".join(f"{name} {depths[name]:.2f}" for name in ("cosine", "bucket") if name in depths)
    published = table[table.metric == "published"].depth
    return f"Mean depth dropped: {here}; published lists {published.min():.2f} to {published.max():.2f}"


def barcode_figure(table: pd.DataFrame, title: str) -> Figure:
    """Every list of dropped layers as a barcode over relative depth.

    Args:
        table: as ``dropped_layers`` returns it.
    """
    figure, (axis,) = headed_panels(title, 1, 0.9 + 0.27 * len(table))
    for place, row in enumerate(table.itertuples()):
        barcode(axis, map(int, row.layers.split()), row.n_layers, place, COLOURS.get(row.metric, GREY))
        axis.plot([row.depth], [place + 0.43], "^", color="black", markersize=4, clip_on=False)
    axis.set_yticks(range(len(table)), table.name)
    axis.set(
        ylim=(len(table) - 0.3, -0.6),
        xlim=(0, 1),
        xlabel="relative depth; triangle: mean",
    )
    axis.grid(False)
    return figure


def chosen_from_halves(
    scores: pd.DataFrame,
    metrics: Sequence[str],
    kind: str,
    n: int,
    protected: Sequence[int] = PUBLISHED_PROTECTED,
    draws: int = 20,
    seed: int = 0,
) -> dict[tuple[str, int], DropSet]:
    """The one-shot choice of every metric, made anew from random halves of the calibration windows and from their complements.

    Args:
        scores: as ``scoring.score`` returns it.
    Returns:
        (metric, draw) -> the set; draw -1 is the choice from all windows.
    """
    sets = {}
    for metric in metrics:
        rows = scores[(scores.kind == kind) & (scores.metric == metric)]
        values = rows.pivot_table(index="sequence", columns="layer", values="value")
        for draw, means in enumerate([values.mean().to_numpy(), *half_means(values.to_numpy(), draws, seed)], -1):
            half = pd.DataFrame({"kind": kind, "metric": metric, "sequence": 0, "layer": values.columns, "value": means})
            sets[metric, draw] = tuple(sorted(one_shot(half, metric, kind, n, protected)))
    return sets


def choice_table(sets: Mapping[tuple[str, int], DropSet], increases: Mapping[DropSet, float], n_windows: int) -> pd.DataFrame:
    """The loss increase of every metric's choice, with the interval that the choice of calibration windows gives it.

    Args:
        sets: as ``chosen_from_halves`` returns it.
        increases: the mean loss increase of every set, on the same held-out windows.
        n_windows: the calibration windows of the choice from all.
    Returns:
        metric, increase (nats per token), low, high, different_sets (of the halves), shared (mean share of the choice from all
        windows that a half chooses too).
    """
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in sets):
        whole, *halves = (drop_set for (name, _), drop_set in sets.items() if name == metric)
        shared = np.mean([len(set(whole) & set(half)) / len(whole) for half in halves])
        interval = half_interval(increases[whole], np.array([increases[half] for half in halves]), n_windows)
        rows.append((metric, *interval, len(set(halves)), shared))
    return pd.DataFrame(rows, columns=["metric", "increase", "low", "high", "different_sets", "shared"])


def cost_table(pruning: pd.DataFrame, value: str, shown: Sequence[Method]) -> pd.DataFrame:
    """One value of the shown methods, and its mean over the random draws: a row per method, a column per kind and count."""
    label = {method: method.label for method in shown}
    methods = [Method(*values) for values in pruning[METHOD_COLUMNS].itertuples(index=False)]
    names = ["random (mean)" if method.rule == RANDOM else label.get(method) for method in methods]
    return pruning.assign(method=names).pivot_table(value, "method", ["kind", "n_dropped"], sort=False)


def paper_claims(
    by_set: Mapping[DropSet, pd.DataFrame],
    choices: Mapping[Choice, DropSet],
    compared: Mapping[float, int],
    places: pd.DataFrame,
    amount: str,
) -> pd.DataFrame:
    """The paper's claims about pruning: entropy against cosine, entropy against random choices, attention against MLP.

    Args:
        compared: the compared fractions and their numbers of sub-blocks; the last claims are about the largest.
        places: as ``methods.place_among_draws`` returns it.
        amount: of the held-out text.
    Returns:
        the columns of a claim; a claim is left out where one of its choices was not measured.
    """
    losses = {
        (kind, method.metric, n): by_set[drop_set].nll.to_numpy()
        for (kind, method, n), drop_set in choices.items()
        if method.rule == "one-shot" and method.first_token
    }
    largest, rows, evidence = max(compared), [], f"{HELD_OUT}: {amount}"
    for metric, (fraction, count) in product(("bucket", "knn"), compared.items()):
        pair = [losses.get(("attention", name, count)) for name in ("cosine", metric)]
        if all(loss is not None for loss in pair):
            text = f"{metric} beats cosine at {100 * fraction:g}% of attention layers; measured: nats per token saved"
            rows.append(claim(text, "abstract", pair[0] - pair[1], published="better", evidence=evidence))
    for metric, (fraction, count) in product(("bucket", "knn"), compared.items()):
        place = places[(places.kind == "attention") & (places.n_dropped == count) & is_method(places, [Method(metric)])]
        for row in place.itertuples():
            text = (
                f"{metric} beats random choices at {100 * fraction:g}% of attention layers; measured: share of draws that cost more"
            )
            share = Interval(row.share, row.low, row.high)
            rows.append(claim_row(text, "implied", "", share, 0.5, f"{evidence}; {row.draws} draws"))
    for metric in ("bucket", "knn", "cosine"):
        attention, mlp = (losses.get((kind, metric, compared[largest])) for kind in ("attention", "mlp"))
        if attention is not None and mlp is not None:
            what = f"attention is more redundant than MLP ({100 * largest:g}% by {metric})"
            text = f"{what}; measured: extra loss of dropping MLPs in nats per token"
            rows.append(claim(text, "results", mlp - attention, published="more redundant", evidence=evidence))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def outcome(verdicts: pd.Series) -> str:
    """How entropy does against cosine similarity in these distinct comparisons, as the predicate of a sentence."""
    n, wins, losses = len(verdicts), (verdicts == "better").sum(), (verdicts == "worse").sum()
    if max(wins, losses) == n > 0:
        return f"{'beats' if wins else 'loses to'} cosine similarity in all {n} distinct comparisons"
    return f"beats cosine similarity in {wins} of {n} distinct comparisons and loses in {losses}"


def extra_cost(difference: Interval, spec: str = ".2f") -> str:
    """A difference in nats with its interval as "0.47 nats [0.37, 0.57] more", or less where it is negative."""
    word = "more" if difference.estimate >= 0 else "less"
    low, high = difference[1:] if word == "more" else (-difference.high, -difference.low)
    return f"{abs(difference.estimate):{spec}} nats [{low:{spec}}, {high:{spec}}] {word}"

"""The trade-off: loss, likelihood kept and repetition against the share of a model that is dropped, by kind and method."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from transformers import PreTrainedModel

from .. import search
from ..dropping import dropped
from ..evaluation import losses_by_set
from ..families.decoder import decoder_layers
from ..figures import COLOURS, GREY, KIND_COLOURS, KIND_MARKERS, headed_panels, label_ends, log_axis
from ..layerwise import DropSet
from ..progress import progress
from ..repairing import repair
from ..residual import SubBlock, layout_of
from ..scoring import Metric
from ..search import SearchResult
from ..similarity import SIMILARITIES
from ..statistics import paired_difference
from .methods import losses_of
from .repair_study import NONE, repaired_losses
from .search_study import OURS
from .writing import repeated_shares

MIXED = "mixed"
KINDS_OF = {"attention": "attention", "mlp": "mlp", "block": "block", MIXED: ("attention", "mlp")}
NAMES = {"attention": "attention layers", "mlp": "MLPs", "block": "blocks", MIXED: "mixed sub-blocks"}
METHOD_COLOURS = {OURS: "#CC79A7", "cosine": COLOURS["cosine"], "bucket": COLOURS["bucket"], "knn": COLOURS["knn"]}
RESOURCES = {"parameters": "layers' parameters", "cache": "KV cache", "time": "decoding time"}  # column -> name
LINEAR = "linear"  # the repair that is shown
LIMIT = 0.5  # nats per token: the increase at which a method is said to fall off


def tradeoff_orders(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    kinds: Iterable[str],
    metrics: Mapping[str, Metric],
    longer: Int[Tensor, "window token"],
    share: float = 1.0,
) -> dict[tuple[str, str], SearchResult]:
    """(kind, method) -> the order, by lazy greedy and by each score of one forward pass; no layer is protected.

    Entropies do not order attention layers and MLPs together, because their increases are not on one scale.

    Args:
        windows: calibration text of lazy greedy.
        longer: calibration text of the scores.
        share: of the candidates of a kind, how many are ordered.
    """
    scored = {name: partial(search.by_score, metric={name: metric}) for name, metric in metrics.items()}
    orders = {}
    for kind in kinds:
        possible = search.candidates(model, KINDS_OF[kind])
        n = None if share >= 1 else round(share * len(possible))
        orders[kind, OURS] = search.lazy_greedy(model, windows, n, KINDS_OF[kind])
        for name, method in scored.items():
            if kind != MIXED or name in SIMILARITIES:
                orders[kind, name] = method(model, longer, n, KINDS_OF[kind])
    return orders


def counts_of(order: Sequence[SubBlock], points: int) -> list[int]:
    """About ``points`` numbers from 0 to all, dense where little is dropped; every number where there are as many points."""
    n = len(order)
    return sorted({round(n * (i / (points - 1)) ** 1.5) for i in range(points)} if points <= n else range(n + 1))


def sizes(model: PreTrainedModel) -> dict[SubBlock, int]:
    """The parameters of every attention layer and MLP, its norms included."""
    layers, layout = decoder_layers(model), layout_of(model)
    return {
        SubBlock(i, kind): sum(w.numel() for path in layout.branch(kind) for w in layer.get_submodule(path).parameters())
        for i, layer in enumerate(layers)
        for kind in ("attention", "mlp")
    }


def halves_of(sub_blocks: Iterable[SubBlock]) -> list[SubBlock]:
    """Attention layers and MLPs, with every block as its two."""
    return [SubBlock(s.layer, kind) for s in sub_blocks for kind in (("attention", "mlp") if s.kind == "block" else (s.kind,))]


def tradeoff_table(
    model: PreTrainedModel, windows: Int[Tensor, "window token"], orders: Mapping[tuple[str, str], SearchResult], points: int
) -> pd.DataFrame:
    """The cost of the beginnings of every order on held-out windows.

    Returns:
        kind, method, n_dropped, dropped (first dropped first), parameters and cache (shares of the decoder layers' parameters and
        of the KV cache that are dropped), nll (nats per token), increase, low, high (of the mean over windows), kl, retention
        (exp of minus the increase: the share of the likelihood per token), forward_passes (of the whole order's search).
    """
    weights, depth = sizes(model), len(decoder_layers(model))
    sets = {(key, n): tuple(sorted(r.order[:n])) for key, r in orders.items() for n in counts_of(r.order, points)}
    by_set = losses_of(losses_by_set(model, windows, [(), *sets.values()]))
    dense, rows = by_set[()].nll.to_numpy(), []
    for ((kind, method), n), drop_set in sets.items():
        ranking, halves = orders[kind, method], halves_of(drop_set)
        losses = by_set[drop_set]
        cost = paired_difference(losses.nll.to_numpy(), dense)
        parameters = sum(weights[s] for s in halves) / sum(weights.values())
        cache = sum(s.kind == "attention" for s in halves) / depth
        shown = " ".join(f"{s.kind[0]}{s.layer}" for s in ranking.order[:n])
        values = (losses.nll.mean(), *cost, losses.kl.mean(), np.exp(-cost.estimate), ranking.passes)
        rows.append((kind, method, n, shown, parameters, cache, *values))
    columns = ["kind", "method", "n_dropped", "dropped", "parameters", "cache", "nll", "increase", "low", "high", "kl"]
    return pd.DataFrame(rows, columns=[*columns, "retention", "forward_passes"])


def repetition_table(
    model: PreTrainedModel,
    prompts: Int[Tensor, "prompt token"],
    table: pd.DataFrame,
    sets: Mapping[tuple[str, int], DropSet],
    n_new: int,
) -> pd.DataFrame:
    """Repetition beside the cost of sets: kind, n_dropped, increase (nats per token), repetition (share of 4-grams)."""
    costs = table[table.method == OURS].set_index(["kind", "n_dropped"]).increase
    shares = {}
    for drop_set in progress(dict.fromkeys(sets.values()), "greedy generation"):
        with dropped(model, drop_set):
            shares[drop_set] = float(repeated_shares(model, prompts, n_new).mean())
    rows = [(kind, n, costs[kind, n], shares[drop_set]) for (kind, n), drop_set in sets.items()]
    return pd.DataFrame(rows, columns=["kind", "n_dropped", "increase", "repetition"])


def repaired_table(
    model: PreTrainedModel,
    held_out: Mapping[str, Int[Tensor, "window token"]],
    orders: Mapping[tuple[str, str], SearchResult],
    text: Int[Tensor, "sequence position"],
    points: int,
) -> pd.DataFrame:
    """The cost of the beginnings of lazy greedy's orders of attention layers and of MLPs, bare and with a linear repair.

    Args:
        held_out: domain -> windows, as many and as long of each.
        text: that the repair is fitted on, in open loop, so that one fit serves all beginnings.
    Returns:
        kind, domain, n_dropped, bare and repaired (loss increase over the dense model), saved (by the repair), low, high (paired
        over windows), nats per token.
    """
    rows = []
    for kind in (kind for kind in ("attention", "mlp") if (kind, OURS) in orders):
        order = orders[kind, OURS].order
        sets = {n: tuple(sorted(order[:n])) for n in counts_of(order, points)[1:]}
        losses = repaired_losses(model, held_out, sets.values(), {NONE: None, LINEAR: repair(model, order, text, LINEAR)})
        for domain, (n, drop_set) in product(held_out, sets.items()):
            bare, repaired = (losses[name, domain][drop_set].nll.to_numpy() for name in (NONE, LINEAR))
            dense = losses[NONE, domain][()].nll.mean()
            costs = (bare.mean() - dense, repaired.mean() - dense)
            rows.append((kind, domain, n, *costs, *paired_difference(bare, repaired)))
    return pd.DataFrame(rows, columns=["kind", "domain", "n_dropped", "bare", "repaired", "saved", "low", "high"])


def repaired_figure(table: pd.DataFrame, title: str) -> Figure:
    """Loss increase by lazy greedy, bare (line) and repaired (dashes), a panel per kind, a colour per domain."""
    kinds = list(dict.fromkeys(table.kind))
    figure, axes = headed_panels(title, len(kinds), 2.9)
    for axis, kind in zip(axes, kinds, strict=True):
        domains = table[table.kind == kind].groupby("domain", sort=False)
        for (domain, rows), colour in zip(domains, KIND_COLOURS.values(), strict=False):
            for column, dash in (("bare", "-"), ("repaired", "--")):
                axis.plot(rows.n_dropped, rows[column], dash, color=colour, label=f"{domain}, {column}")
        axis.set_title(NAMES[kind], loc="left")
        axis.set_xlabel("sub-blocks dropped")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(axis.get_ylim())  # computed only when asked for, and the labels stand by it
        label_ends(axis)
    axes[0].set_ylabel("loss increase (nats per token)")
    return figure


def repaired_title(table: pd.DataFrame) -> str:
    """What the repair saves at the largest number of each kind, by domain, as a sentence."""
    parts = []
    for kind, rows in table.groupby("kind", sort=False):
        last = rows[rows.n_dropped == rows.n_dropped.max()]
        saved = ", ".join(f"{row.saved:.2f} on {row.domain}" for row in last.itertuples())
        parts.append(f"{last.n_dropped.iloc[0]} {NAMES[kind]}: {saved}")
    return f"Nats that a linear repair saves without {'; '.join(parts)}"


def falls_off(table: pd.DataFrame, limit: float = LIMIT) -> pd.DataFrame:
    """For every kind and method: the most that can be dropped below ``limit`` nats of increase, among the measured counts.

    Returns:
        kind, method, n_dropped, parameters, cache, increase, low, high.
    """
    rows = [
        of_method[(of_method.increase > limit).cumsum() == 0].iloc[-1]
        for _, of_method in table.sort_values("n_dropped", kind="stable").groupby(["kind", "method"], sort=False)
    ]
    columns = ["kind", "method", "n_dropped", "parameters", "cache", "increase", "low", "high"]
    return pd.DataFrame(rows)[columns].reset_index(drop=True)


def loss_by_share(table: pd.DataFrame, shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)) -> pd.DataFrame:
    """The loss increase of every kind and method (rows) at the measured count next to each share of the largest one (columns)."""
    lines, columns = table.groupby(["kind", "method"], sort=False), {}
    for share in shares:
        rows = [of.iloc[(of.n_dropped - share * of.n_dropped.max()).abs().argmin()] for _, of in lines]
        columns[f"{share:.1%}"] = pd.DataFrame(rows).set_index(["kind", "method"]).increase
    return pd.DataFrame(columns)


def with_time(table: pd.DataFrame, speeds: pd.DataFrame | None) -> pd.DataFrame:
    """The table with the column ``time``, the share of the dense model's decoding time that each set saves.

    Layers of one shape take the same time, so a sub-block saves what those of its kind save each, by least squares through the
    origin over the measured numbers.

    Args:
        speeds: of one batch size and prompt length, as ``speed_table`` returns them; without any, the table is returned as it is.
    """
    if speeds is None:
        return table
    pruned = speeds[speeds.kind != "dense"].assign(saved=1 - 1 / speeds.decode_speedup)
    each = {kind[0]: (of.n_dropped * of.saved).sum() / (of.n_dropped**2).sum() for kind, of in pruned.groupby("kind")}
    return table.assign(time=[sum(each[name[0]] for name in names.split()) for names in table.dropped])


def resources(table: pd.DataFrame) -> list[str]:
    """The columns of the table that are saved by dropping: of ``RESOURCES``, those that it has."""
    return [resource for resource in RESOURCES if resource in table]


def pareto(table: pd.DataFrame, resource: str) -> pd.DataFrame:
    """The rows that no other row of the table beats: none saves as much of the resource (of ``RESOURCES``) for less."""
    rows = table.sort_values([resource, "increase"], ascending=[False, True])
    return rows[rows.increase < rows.increase.cummin().shift(fill_value=np.inf)].sort_values(resource)


def tradeoff_figure(table: pd.DataFrame, title: str) -> Figure:
    """The increase of the loss against the share of sub-blocks dropped, a panel per kind, a line per method."""
    kinds = list(dict.fromkeys(table.kind))
    figure, axes = headed_panels(title, len(kinds), 2.9, sharey=True)
    shown = table[table.n_dropped > 0]
    for axis, kind in zip(axes, kinds, strict=True):
        of_kind = shown[shown.kind == kind]
        for method, rows in of_kind.groupby("method", sort=False):
            colour, width = METHOD_COLOURS.get(method, GREY), 2.2 if method == OURS else 1.2
            axis.plot(rows.n_dropped, rows.increase.clip(lower=1e-3), color=colour, linewidth=width, label=method)
            if method == OURS:
                axis.fill_between(rows.n_dropped, rows.low.clip(lower=1e-3), rows.high, color=colour, alpha=0.2, linewidth=0)
        axis.axhline(LIMIT, color=GREY, linewidth=0.8, linestyle=":")
        axis.set(title=NAMES[kind], ylim=(0.01, 20))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    log_axis(axes[0])
    axes[0].set_ylabel("loss increase (nats per token)")
    figure.supxlabel("sub-blocks dropped", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles, labels, fontsize=8, loc="lower right", handlelength=1.2)
    return figure


def pareto_figure(table: pd.DataFrame, title: str) -> Figure:
    """The increase of the loss by lazy greedy against the share of each resource that is saved, a panel each, a line per kind."""
    figure, axes = headed_panels(title, len(resources(table)), 2.9, sharey=True)
    ours = table[(table.method == OURS) & (table.n_dropped > 0)]
    for axis, resource in zip(axes, resources(table), strict=True):
        for kind, rows in ours.groupby("kind", sort=False):
            rows = rows[rows[resource] > 0]
            if resource == "cache" and kind == MIXED:
                rows = rows[rows.cache.diff().fillna(1) > 0]
            if len(rows):
                look = {"color": KIND_COLOURS[kind], "marker": KIND_MARKERS[kind], "label": NAMES[kind]}
                axis.plot(100 * rows[resource], rows.increase.clip(lower=1e-3), **look)
        axis.set(xlabel=f"% of {RESOURCES[resource]} saved", ylim=(0.01, 20), xlim=(0, 110 * ours[resource].max()))
    log_axis(axes[0])
    axes[0].set_ylabel("loss increase (nats per token)")
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def growing_sets(
    orders: Mapping[tuple[str, str], SearchResult], kinds: Iterable[str], steps: int
) -> dict[tuple[str, int], DropSet]:
    """(kind, number) -> the dense model and ``steps`` beginnings of lazy greedy's order of each kind, the longest one the whole."""
    sets = {}
    for kind in kinds:
        order = orders[kind, OURS].order
        for n in dict.fromkeys(round(len(order) * i / steps) for i in range(steps + 1)):
            sets[kind, n] = tuple(sorted(order[:n]))
    return sets


def tradeoff_title(limits: pd.DataFrame) -> str:
    """How many sub-blocks of each kind go below the limit, by lazy greedy, as a sentence."""
    rows = limits[limits.method == OURS]
    parts = [f"{row.n_dropped} {NAMES[row.kind]}" for row in rows.itertuples()]
    return f"Below {LIMIT:g} nats lazy greedy drops {', '.join(parts[:-1])}{' or ' if len(parts) > 1 else ''}{parts[-1]}"


def pareto_title(table: pd.DataFrame) -> str:
    """Which kind saves most of each resource up to the limit, by lazy greedy, as a sentence."""
    cheap = table[(table.method == OURS) & (table.increase <= LIMIT)]
    weights, cache = (cheap.loc[cheap[resource].idxmax()] for resource in ("parameters", "cache"))
    what = "" if cache.kind == weights.kind else f"{NAMES[cache.kind]} "
    saved = f"{NAMES[weights.kind]} save {weights.parameters:.0%} of the layers' parameters"
    others = [f"{what}{cache.cache:.0%} of the KV cache"]
    if "time" in table:
        fastest = cheap.loc[cheap.time.idxmax()]
        others.append(
            ("" if fastest.kind == cache.kind else f"{NAMES[fastest.kind]} ") + f"{fastest.time:.0%} of the decoding time"
        )
    return f"At most {LIMIT:g} nats: {saved}, {' and '.join(others)}"


def tradeoff_details(limits: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """What goes below the limit by kind and method, and the repetition at the largest number, as a Markdown list."""
    lines = []
    for kind, rows in limits.groupby("kind", sort=False):
        numbers = ", ".join(f"{row.n_dropped} by {row.method}" for row in rows.itertuples())
        lines.append(f"{NAMES[kind]} below {LIMIT:g} nats: {numbers}.")
    dense = repeated[repeated.n_dropped == 0].repetition.mean()
    last = repeated.loc[repeated.groupby("kind", sort=False).n_dropped.idxmax()]
    after = ", ".join(f"{row.repetition:.0%} without {row.n_dropped} {NAMES[row.kind]}" for row in last.itertuples())
    lines.append(f"Repetition: {dense:.0%} in text of the dense model, {after}.")
    return "\n\n" + "\n".join(f"- {line}" for line in lines)

"""The comparison of search methods: what each one's sets cost on held-out text, and what the search spent."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor
from transformers import PreTrainedModel

from .. import search
from ..claims import HELD_OUT, claim
from ..evaluation import losses_by_set
from ..figures import COLOURS, GREY, headed_panels
from ..progress import progress
from ..residual import SubBlock
from ..scoring import Metric
from ..search import SearchResult
from ..statistics import Interval, half_sampling, interval_text, kendall_tau, mean_interval, paired_difference
from .methods import KIND_NAMES, layers_text, losses_of

Search = Callable[[PreTrainedModel, Int[Tensor, "window token"], int, str], SearchResult]
OURS, GREEDY, EVOLUTION, RANDOM_DRAW = "lazy greedy", "greedy", "EvoPress", "random"
ON_REPEATED, REPEATED_TEXT = f"{OURS}, repeated text", (2, 129)  # windows and tokens, which are read twice
LEAST = 0.01  # nats: the least increase that a logarithmic axis shows
POINT_COLOURS = {OURS: "#CC79A7", "cosine": COLOURS["cosine"], "bucket": COLOURS["bucket"], "knn": COLOURS["knn"]}


def scores_of(metrics: Mapping[str, Metric], information: bool = True) -> dict[str, Search]:
    """Name -> the search by a score of one forward pass; mutual information as in MI-PRUN (arXiv 2601.07212), by our reading."""
    scores = {**metrics, **(search.INFORMATION if information else {})}
    return {name: partial(search.by_score, metric={name: f}) for name, f in scores.items()}


SEARCHES: dict[str, Search] = {
    "Fisher": search.fisher,
    "CBO": search.cbo,
    "single drops": search.single_drops,
    "single drops, loss": partial(search.single_drops, measure="nll"),
    OURS: search.lazy_greedy,
    GREEDY: search.greedy,
    "greedy, loss": partial(search.greedy, measure="nll"),
    EVOLUTION: search.evopress,
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


def random_sets(model: PreTrainedModel, kinds: Iterable[str], counts: Iterable[int], draws: int, seed: int = 0) -> pd.DataFrame:
    """Random sets in the columns of ``rankings``; they cost nothing."""
    rows = []
    for kind, n, draw in product(kinds, counts, range(draws)):
        order = search.random_draw(model, torch.empty(0, 2, dtype=torch.long), n, kind, seed=[seed, draw]).order
        rows.append((kind, RANDOM_DRAW, draw, n, chosen := tuple(sorted(order)), layers_text(chosen), 0.0, 0.0))
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
    """Every method's loss minus ours on the same windows, both averaged over draws.

    Returns:
        domain, kind, n_dropped, method, increase (nats per token, mean over draws), increase_low, increase_high (over draws),
        tokens (spent, mean over draws), share (of greedy's tokens), difference, low, high (nats per token; above zero ours is
        better; interval over windows).
    """
    rows = []
    for (domain, kind, n), group in table.groupby(["domain", "kind", "n_dropped"], sort=False):
        methods = dict(iter(group.groupby("method", sort=False)))
        by_method = {
            name: np.mean([losses[domain][s].nll.to_numpy() for s in of_method.set], axis=0) for name, of_method in methods.items()
        }
        greedy_tokens = methods[GREEDY].tokens.mean() if GREEDY in methods else np.nan
        for name, of_method in methods.items():
            over_draws = mean_interval(of_method.increase.to_numpy())
            tokens = of_method.tokens.mean()
            spent = (tokens, tokens / greedy_tokens)
            rows.append((domain, kind, n, name, *over_draws, *spent, *paired_difference(by_method[name], by_method[ours])))
    columns = ["domain", "kind", "n_dropped", "method", "increase", "increase_low", "increase_high", "tokens", "share"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high"])


def audit(
    model: PreTrainedModel,
    held_out: Int[Tensor, "window token"],
    kind: str,
    orders: Mapping[str, Sequence[SubBlock]],
    table: pd.DataFrame,
) -> pd.DataFrame:
    """How well each method's ranking predicts the true cost of single drops, beside what its sets cost.

    Args:
        orders: method -> sub-blocks of the kind, first dropped first; one that cannot be dropped with the others counts as last.
        table: as ``against_ours`` returns it, of the domain and count to show.
    Returns:
        kind, method, tau, low, high (Kendall's tau with the ranking by the true increase of the loss on held-out windows; the
        interval is over these windows), increase (of the method's set).
    """
    possible = sorted(set().union(*orders.values()))
    by_set = losses_of(losses_by_set(model, held_out, [(), *((s,) for s in possible)]))
    true = np.stack([(by_set[s,].nll - by_set[()].nll).to_numpy() for s in possible], 1)  # window, sub-block
    sets = table.set_index("method").increase
    rows = []
    for name, order in orders.items():
        rank = np.array([order.index(s) if s in order else len(order) for s in possible], dtype=float)
        tau = half_sampling(lambda costs, rank=rank: kendall_tau(rank, costs), true)
        rows.append((kind, name, *tau, sets.get(name, np.nan)))
    return pd.DataFrame(rows, columns=["kind", "method", "tau", "low", "high", "increase"])


def search_figure(table: pd.DataFrame, choices: pd.DataFrame, title: str) -> Figure:
    """The increase of the loss by every method, a panel per domain, with the tokens that its search spent; small marks are draws.

    Args:
        table: as ``against_ours`` returns it, of one kind and count.
        choices: as ``judged`` returns them, of the same.
    """
    domains = list(dict.fromkeys(table.domain))
    order = table[table.domain == domains[0]].sort_values("increase", ascending=False)
    names = [name for name in order.method if name != RANDOM_DRAW]
    tokens = order.set_index("method").tokens
    figure, axes = headed_panels(title, len(domains), 0.9 + 0.24 * len(names), sharey=True, sharex=True)
    for axis, domain in zip(axes, domains, strict=True):
        draws, means = choices[choices.domain == domain], table[table.domain == domain].set_index("method").increase
        random = draws[draws.method == RANDOM_DRAW].increase
        if len(random):
            axis.axvspan(random.min(), random.max(), color="#ededed", linewidth=0, zorder=0)
            axis.text(random.max(), -0.4, "random sets ", color="#666666", fontsize=8, ha="right", va="center")
        for place, name in enumerate(names):
            colour = POINT_COLOURS.get(name, GREY)
            of_method = draws[draws.method == name].increase.clip(lower=LEAST)
            axis.plot(of_method, [place] * len(of_method), "|", color=colour, markersize=9, alpha=0.7)
            axis.plot(max(means[name], LEAST), place, "o", color=colour, markersize=7 if name == OURS else 5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"judged on {domain}")
        axis.grid(False, axis="y")
    axes[0].set_yticks(range(len(names)), [f"{name} · {tokens[name] / 1000:.1f}k" for name in names])
    axes[0].set_ylim(-0.8, len(names) - 0.5)
    figure.supxlabel("loss increase (nats per token, log scale; left is better)", fontsize=9)
    return figure


def search_claims(
    table: pd.DataFrame, losses: Mapping[str, Mapping], choices: pd.DataFrame, kind: str, n: int, amount: str
) -> pd.DataFrame:
    """Ours beside the best published method, and mutual information beside EntroDrop's entropies, on the first domain."""
    domain = next(iter(losses))
    of = choices[(choices.domain == domain) & (choices.kind == kind) & (choices.n_dropped == n)]

    def values(method: str) -> np.ndarray:
        return np.mean([losses[domain][s].nll.to_numpy() for s in of[of.method == method].set], axis=0)

    rows = table[(table.domain == domain) & (table.kind == kind) & (table.n_dropped == n)].set_index("method")
    cheap = rows[(rows.tokens <= 1.05 * rows.tokens[OURS]) & ~rows.index.isin([OURS, RANDOM_DRAW])]
    best, names = cheap.increase.idxmin(), f"{n} {KIND_NAMES[kind]}"
    evidence = f"{HELD_OUT}: {amount}"
    text = f"{OURS} beats the best published method of no more passes ({best}) at {names}; measured: nats per token saved"
    found = [claim(text, "next checks", values(best) - values(OURS), evidence=evidence)]
    for information, entropy in product(search.INFORMATION, ("bucket", "knn")):
        if entropy in rows.index:
            text = f"{information}, beats EntroDrop's {entropy} at {names}; measured: nats per token saved"
            found.append(claim(text, "next checks", values(entropy) - values(information), evidence=evidence))
    return pd.DataFrame(found)


WHOLE_ORDERS = ("Fisher", "single drops", "single drops, loss")  # searches that rank all sub-blocks at the cost of a few


def joined_choices(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The tables of ``rankings`` and ``random_sets`` as one."""
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def with_distance(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table of ``search.interactions`` without single drops, with the distance between the layers of a pair."""
    pairs = pairs[pairs["first"] != pairs["second"]]
    distance = [abs(a.layer - b.layer) for a, b in zip(pairs["first"], pairs["second"], strict=True)]
    return pairs.assign(distance=distance)


def interaction_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean interaction with its interval over pairs, by distance between the layers: pairs, cost, interaction, low, high."""
    rows = {}
    for name, near in {"at most 3 layers apart": pairs.distance <= 3, "further apart": pairs.distance > 3}.items():
        if near.any():
            of_pairs = pairs[near]
            rows[name] = (len(of_pairs), of_pairs.cost.mean(), *mean_interval(of_pairs.interaction.to_numpy()))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["pairs", "cost", "interaction", "low", "high"])


def search_title(table: pd.DataFrame, kind: str, n: int) -> str:
    """What the figure of one kind and count shows, as a sentence."""
    rows = table[table.domain == table.domain.iloc[0]].set_index("method")
    ours = rows.loc[OURS]
    if GREEDY not in rows.index:
        return f"Lazy greedy costs {ours.increase:.2f} nats at {n} {KIND_NAMES[kind]}"
    return (
        f"Without {n} {KIND_NAMES[kind]} lazy greedy costs {ours.increase:.2f} nats, greedy {rows.increase[GREEDY]:.2f} "
        f"with {1 / ours.share:.1f} times the tokens"
    )


def search_finding(rows: pd.DataFrame, kind: str, n: int, depth: int) -> str:
    """The finding, in at most 30 words, from the rows of one domain, kind and count by method."""
    rival = next((name for name in ("cosine", "norm_ratio") if name in rows.index), rows.index[0])
    against = Interval(*rows.loc[rival, ["difference", "low", "high"]])
    cost = f"At {n} of {depth} {KIND_NAMES[kind]} lazy greedy costs {rows.increase[OURS]:.2f} nats"
    if GREEDY in rows.index:
        cost += f", greedy {rows.increase[GREEDY]:.2f} with {1 / rows.share[OURS]:.1f} times its tokens"
    return f"{cost}; {rival} costs {against:.2f} nats more than lazy greedy."


def difference_text(rows: pd.DataFrame) -> np.ndarray:
    """difference, low and high of each row as text, with one decimal where one of them is 10 or more, otherwise with two."""
    columns = ["difference", "low", "high"]
    large = rows[columns].abs().max(axis=1) >= 10
    return np.where(large, interval_text(rows, columns, ".1f"), interval_text(rows, columns))


def difference_table(table: pd.DataFrame, domain: str) -> pd.DataFrame:
    """What every other method costs more than lazy greedy, as text, with a column for each kind and count.

    Args:
        table: of ``against_ours``.
    """
    rows = table[(table.domain == domain) & ~table.method.isin([OURS, RANDOM_DRAW])]
    return rows.assign(value=difference_text(rows)).pivot_table(
        "value", "method", ["kind", "n_dropped"], aggfunc="first", sort=False
    )


def greedy_sentence(table: pd.DataFrame, more: float = 0.05) -> str:
    """In how many cases (domain, kind, count) lazy greedy costs at most 5% more than greedy, and with what share of its tokens."""
    costs = table.pivot_table("increase", ["domain", "kind", "n_dropped"], "method")
    near, shares = costs[OURS] <= (1 + more) * costs[GREEDY], table[table.method == OURS].share
    return (
        f"Lazy greedy costs at most {more:.0%} more than greedy in {near.sum()} of {len(near)} cases, with {shares.min():.0%} to "
        f"{shares.max():.0%} of its tokens."
    )


def search_details(table: pd.DataFrame, claims: pd.DataFrame) -> str:
    """A line for every domain, kind and count, and one for the claims, as a Markdown list."""
    lines = []
    for (domain, kind, n), rows in table.groupby(["domain", "kind", "n_dropped"], sort=False):
        others = rows[~rows.method.isin([OURS, RANDOM_DRAW])]
        better, worse = others[others.high < 0].method, others[others.low > 0].method
        undecided = len(others) - len(better) - len(worse)
        names = f" ({', '.join(better)})" if len(better) else ""
        lines.append(
            f"{domain}, {n} {KIND_NAMES[kind]}: lazy greedy is better than {len(worse)} of {len(others)} other methods, worse than "
            f"{len(better)}{names}, undecided against {undecided}."
        )
    lines.append(f"{(claims.verdict == 'holds').sum()} of {len(claims)} claims hold.")
    return "\n\n" + "\n".join(f"- {line}" for line in lines)

"""The cost of dropping before and after repair, on the text that the repair was fitted on and on other texts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from ..dropping import Repair, dropped
from ..evaluation import losses_by_set
from ..figures import COLOURS, MARKERS, panels
from ..layerwise import DropSet
from ..repairing import repair
from ..statistics import comparison, interval_text, mean_interval, paired_difference
from ..text import mixture
from .methods import METHOD_COLUMNS, RANDOM, Choice, Method, losses_of

NONE, HOWS = "none", ("constant", "linear")
REPAIRS = (NONE, *HOWS)
Losses = dict[tuple[str, str], dict[DropSet, pd.DataFrame]]  # (repair, domain) -> set -> window, nll, kl


def fit_repairs(
    model: PreTrainedModel, sets: Iterable[DropSet], windows: Int[Tensor, "sequence token"], hows: Sequence[str] = HOWS
) -> dict[str, Repair]:
    """Repairs of every sub-block of these sets. In open loop a sub-block's map does not depend on what else is dropped."""
    union = sorted({sub_block for drop_set in sets for sub_block in drop_set})
    return {how: repair(model, union, windows, how) for how in hows}


def repaired_losses(
    model: PreTrainedModel, texts: Mapping[str, Tensor], sets: Iterable[DropSet], repairs: Mapping[str, Repair | None]
) -> Losses:
    """The losses of the dense model and of every set, by repair and domain.

    Args:
        texts: domain -> held-out windows.
        repairs: name -> repair; None for a bare drop.
    """
    sets = [(), *sorted(set(sets))]
    return {
        (name, domain): losses_of(losses_by_set(model, windows, sets, fitted))
        for name, fitted in repairs.items()
        for domain, windows in texts.items()
    }


def repair_table(losses: Losses, choices: Mapping[Choice, DropSet], fitted_on: str, seed: int = 0) -> pd.DataFrame:
    """The cost of every choice with every repair on every domain.

    Returns:
        fitted_on, domain, in_domain, repair, kind, the method's columns, n_dropped, nll, increase (over the dense model), saved (by
        the repair), each of the two with its paired interval over windows: increase_low, ..., in nats per token.
    """
    rows = []
    for (name, domain), by_set in losses.items():
        for (kind, method, n), drop_set in choices.items():
            nll, bare, dense = (
                table[chosen].nll.to_numpy()
                for table, chosen in ((by_set, drop_set), (losses[NONE, domain], drop_set), (by_set, ()))
            )
            costs = (*paired_difference(nll, dense, seed), *paired_difference(bare, nll, seed))
            rows.append((fitted_on, domain, domain in mixture(fitted_on), name, kind, *method, n, nll.mean(), *costs))
    intervals = [f"{value}{end}" for value in ("increase", "saved") for end in ("", "_low", "_high")]
    columns = ["fitted_on", "domain", "in_domain", "repair", "kind", *METHOD_COLUMNS, "n_dropped", "nll", *intervals]
    return pd.DataFrame(rows, columns=columns)


def best_methods(losses: Losses, choices: Mapping[Choice, DropSet], repaired: str, seed: int = 0) -> pd.DataFrame:
    """The method with the least loss before and after repair, for every domain, kind and number dropped.

    Returns:
        domain, kind, n_dropped, before, after, saved (what the method that is best after repair saves then over the one that was
        best before, paired, in nats per token), low, high, verdict (changed, same, undecided).
    """
    rows = []
    for domain in dict.fromkeys(domain for _, domain in losses):
        for kind, n in dict.fromkeys((kind, n) for kind, _, n in choices):
            ranked = {m: chosen for (k, m, count), chosen in choices.items() if (k, count) == (kind, n) and m.rule != RANDOM}
            before, after = (min(ranked, key=lambda m: losses[name, domain][ranked[m]].nll.mean()) for name in (NONE, repaired))
            values = [losses[repaired, domain][ranked[method]].nll.to_numpy() for method in (before, after)]
            saved = paired_difference(*values, seed)
            verdict = "same" if before == after else comparison(saved.low, saved.high, "changed")
            rows.append((domain, kind, n, before.label, after.label, *saved, verdict))
    return pd.DataFrame(rows, columns=["domain", "kind", "n_dropped", "before", "after", "saved", "low", "high", "verdict"])


def saved_elsewhere(losses: Losses, drop_set: DropSet, repaired: str, fitted_on: str) -> np.ndarray:
    """What a repair saves on every window of the domains that it was not fitted on, in nats per token.

    Raises:
        ValueError: it was fitted on all domains.
    """
    away = [domain for name, domain in losses if name == repaired and domain not in mixture(fitted_on)]
    if not away:
        raise ValueError(f"the repair was fitted on every domain ({fitted_on}): add another to the domains")
    values = [losses[NONE, domain][drop_set].nll.to_numpy() - losses[repaired, domain][drop_set].nll.to_numpy() for domain in away]
    return np.concatenate(values)


def parameter_table(model: PreTrainedModel, choices: Mapping[Choice, DropSet], repairs: Mapping[str, Repair]) -> pd.DataFrame:
    """Millions of parameters of the dense model, without each set, and with each repair in its place."""

    def millions() -> float:
        return sum(weight.numel() for weight in model.parameters()) / 1e6

    rows, dense = [], millions()
    for (kind, _, n), drop_set in choices.items():
        sizes = []
        for fitted in (None, *repairs.values()):
            with dropped(model, drop_set, fitted):
                sizes.append(millions())
        rows.append((kind, n, dense, *sizes))
    return pd.DataFrame(rows, columns=["kind", "n_dropped", "dense", NONE, *repairs])


def repair_figure(table: pd.DataFrame, shown: Sequence[Method]) -> Figure:
    """Loss increase by repair, a column of panels per kind and number; above on the fitted domain, below the mean of the others.

    The band is the range of the random draws.
    """
    groups = list(table.groupby(["kind", "n_dropped"], sort=False))
    figure, axes = panels(2, len(groups), height=2.3, sharey="col", sharex=True)
    for place, (row, column) in enumerate((row, column) for row in (True, False) for column in range(len(groups))):
        ((kind, n), rows), axis = groups[column], axes[place]
        means = rows[rows.in_domain == row].pivot_table("increase", METHOD_COLUMNS, "repair")[list(REPAIRS)]
        random = means[means.index.get_level_values("rule") == RANDOM]
        if len(random):
            axis.fill_between(REPAIRS, random.min(), random.max(), color=COLOURS[RANDOM], alpha=0.35, linewidth=0, label="random")
        for method in shown:
            look = {"color": COLOURS[method.metric], "marker": MARKERS[method.metric], "label": method.label}
            axis.plot(REPAIRS, means.loc[tuple(method)], **look)
        axis.axhline(0, color="black", linewidth=0.6)
        if row:
            axis.set_title(f"{n} {'MLPs' if kind == 'mlp' else 'attention layers'}")
        if column == 0:
            axis.set_ylabel(f"{'fitted domain' if row else 'other domains'}\nloss increase (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of several fits as one; the bare drops, which have no fit, are in the first."""
    return pd.concat([tables[0], *(table[table.repair != NONE] for table in tables[1:])], ignore_index=True)


def mixture_table(tables: Sequence[pd.DataFrame], method: Method, repaired: str) -> pd.DataFrame:
    """Loss increase of one method with a repair, by the text that it was fitted on: a row per kind, number and text."""
    rows = joined(tables)
    rows = rows[(rows[METHOD_COLUMNS] == method).all(axis=1) & (rows.repair == repaired)]
    ends = ["increase", "increase_low", "increase_high"]
    rows = rows.assign(increase=interval_text(rows, ends))
    return rows.pivot_table("increase", ["kind", "n_dropped", "fitted_on"], "domain", aggfunc="first", sort=False)


def share_saved(table: pd.DataFrame, in_domain: bool, repaired: str) -> float:
    """The share of the summed loss increase of the ranked choices that a repair saves, in its domain or in the others."""
    rows = table[(table.in_domain == in_domain) & (table.repair == repaired) & (table.rule != RANDOM)]
    return float(rows.saved.sum() / (rows.saved + rows.increase).sum())


def gap_table(losses: Losses, choices: Mapping[Choice, DropSet], reference: Method, seed: int = 0) -> pd.DataFrame:
    """How much more every other ranked method costs than the reference, by repair, as text with its interval.

    Each window of every domain is one unit.
    """
    rows = []
    domains = list(dict.fromkeys(domain for _, domain in losses))
    for name in dict.fromkeys(name for name, _ in losses):
        for (kind, method, n), drop_set in choices.items():
            if method != reference and method.rule != RANDOM:
                rival = choices[kind, reference, n]
                gaps = [losses[name, d][drop_set].nll.to_numpy() - losses[name, d][rival].nll.to_numpy() for d in domains]
                rows.append((kind, n, method.label, name, f"{mean_interval(np.concatenate(gaps), seed):.2f}"))
    table = pd.DataFrame(rows, columns=["kind", "n_dropped", "method", "repair", "gap"])
    return table.pivot_table("gap", ["kind", "n_dropped", "method"], "repair", aggfunc="first", sort=False)

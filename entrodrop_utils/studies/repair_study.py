"""The cost of dropping before and after repair, on the text that the repair was fitted on and on other texts."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..attention import cache_bytes
from ..dropping import Repair, dropped
from ..evaluation import losses_by_set, perplexity
from ..families.decoder import UnsupportedModel
from ..families.self_check import measuring
from ..figures import COLOURS, GREY, KIND_COLOURS, headed_panels, label_ends
from ..layerwise import DropSet
from ..repairing import folds_by_set, maps_by_how, rank_for_repair, repair
from ..residual import SubBlock, find
from ..selection import protected_layers
from ..statistics import Interval, comparison, mean_interval, paired_difference
from ..text import mixture
from .methods import KIND_NAMES, METHOD_COLUMNS, RANDOM, Choice, Method
from .writing import repeated_shares

NONE, HOWS = "none", ("constant", "linear")
REPAIRS = (NONE, *HOWS)
SINGLE, LEFT = "single drop", "left after repair"  # rankings by the true cost of each sub-block alone, bare and repaired
LOOKS = COLOURS | {SINGLE: "#56B4E9", LEFT: "#009E73"}
Losses = dict[tuple[str, str], dict[DropSet, pd.DataFrame]]  # (repair, domain) -> set -> window, nll
AnyRepair = Repair | Mapping[DropSet, Repair] | None  # of all sets, of single sets, or a bare drop


def rankings_by_cost(
    model: PreTrainedModel,
    kind: str,
    fit: Int[Tensor, "sequence token"],
    validation: Int[Tensor, "window position"],
    protected: Sequence[int],
) -> tuple[dict[Method, list[SubBlock]], dict[str, Repair]]:
    """The candidates of a kind ranked by their true cost alone, bare and after linear repair; and the repairs of all of them.

    Args:
        validation: text that ranks; the repairs are fitted on other text.
    """
    every = find(model, kind)
    kept = protected_layers(protected, len(every))
    candidates = [s for s in every if s.layer not in kept]
    repairs = maps_by_how(model, candidates, fit)
    orders = {
        Method(SINGLE): rank_for_repair(model, candidates, validation),
        Method(LEFT): rank_for_repair(model, candidates, validation, repairs["linear"]),
    }
    return orders, repairs


def repaired_losses(
    model: PreTrainedModel, texts: Mapping[str, Tensor], sets: Iterable[DropSet], repairs: Mapping[str, AnyRepair]
) -> Losses:
    """The losses of every set by repair and domain; without a repair, of the dense model too.

    Args:
        texts: domain -> held-out windows, as many and as long of each.
        repairs: name -> repair; None for a bare drop; set -> repair where each set has its own, which is evaluated alone.
    """
    sets, ids = sorted(set(sets)), torch.cat(list(texts.values()))
    losses: Losses = {}
    for name, fitted in repairs.items():
        if isinstance(fitted, Mapping):
            table = pd.concat([_whole_losses(model, ids, of, own) for of, own in fitted.items()])
        else:
            table = losses_by_set(model, ids, sets if fitted else [(), *sets], fitted)
        losses |= by_domain(table, name, list(texts))
    return losses


def by_domain(table: pd.DataFrame, repaired: str, domains: Sequence[str]) -> Losses:
    """Losses of windows that stand one domain after another, as many of each.

    Args:
        table: set, window, nll.
    """
    n = (int(table.window.max()) + 1) // len(domains)
    losses: Losses = {(repaired, domain): {} for domain in domains}
    for drop_set, rows in table.groupby("set"):
        values = rows.sort_values("window").nll.to_numpy()
        for i, domain in enumerate(domains):
            losses[repaired, domain][drop_set] = pd.DataFrame({"nll": values[i * n : (i + 1) * n]})
    return losses


def _whole_losses(model: PreTrainedModel, windows: Tensor, drop_set: DropSet, fitted: Repair) -> pd.DataFrame:
    """The loss of every window from whole passes: set, window, nll."""
    with dropped(model, drop_set, fitted):
        values = perplexity(model, windows).per_window
    return pd.DataFrame({"set": [drop_set] * len(values), "window": range(len(values)), "nll": values})


def repair_table(losses: Losses, choices: Mapping[Choice, DropSet], fitted_on: str) -> pd.DataFrame:
    """The cost of every choice with every repair on every domain.

    Returns:
        fitted_on, domain, in_domain, repair, kind, the method's columns, n_dropped, nll, increase (over the dense model), saved (by
        the repair), each of the two with its paired interval over windows: increase_low, ..., in nats per token.
    """
    rows = []
    for (name, domain), by_set in losses.items():
        for (kind, method, n), drop_set in choices.items():
            if drop_set not in by_set:
                continue
            nll, bare, dense = (
                table[chosen].nll.to_numpy()
                for table, chosen in ((by_set, drop_set), (losses[NONE, domain], drop_set), (losses[NONE, domain], ()))
            )
            costs = (*paired_difference(nll, dense), *paired_difference(bare, nll))
            rows.append((fitted_on, domain, domain in mixture(fitted_on), name, kind, *method, n, nll.mean(), *costs))
    intervals = [f"{value}{end}" for value in ("increase", "saved") for end in ("", "_low", "_high")]
    columns = ["fitted_on", "domain", "in_domain", "repair", "kind", *METHOD_COLUMNS, "n_dropped", "nll", *intervals]
    return pd.DataFrame(rows, columns=columns)


def repairs_in_weights(
    model: PreTrainedModel, drop_set: DropSet, fit_text: Int[Tensor, "window token"]
) -> dict[str, dict[DropSet, Repair]]:
    """The fold and the scale of one set; one that the model's family cannot carry is left out, and the reason is printed."""
    fits = {
        "fold": lambda: folds_by_set(model, [drop_set], fit_text),
        "scale": lambda: {drop_set: repair(model, drop_set, fit_text[:4], "scale")},
    }
    made = {}
    for name, fit in fits.items():
        try:
            made[name] = fit()
        except UnsupportedModel as error:
            print(f"no {name}: {error}")
    return made


def repaired_cases(losses: Losses, choices: Mapping[Choice, DropSet]) -> Iterator[tuple[str, int, str, dict[Method, DropSet]]]:
    """Kind, number dropped, repair, and the set of every ranked method, for every kind and number that was repaired.

    The repair is the linear one, or the fold where a kind has no linear one.
    """
    measured = {name: losses[name, domain].keys() for name, domain in losses}
    for kind, n in dict.fromkeys((kind, n) for kind, _, n in choices):
        sets = {m: s for (k, m, count), s in choices.items() if (k, count) == (kind, n) and m.rule != RANDOM}
        for name in ("linear", "fold"):
            if set(sets.values()) <= measured.get(name, set()):
                yield kind, n, name, sets
                break


def best_methods(losses: Losses, choices: Mapping[Choice, DropSet], fitted_on: str) -> pd.DataFrame:
    """The method with the least loss before and after repair, for every kind and number, in the fitted domain and elsewhere.

    Returns:
        kind, n_dropped, repair (of ``repaired_cases``), domain, before, after, saved (what the method that is best after repair
        saves then over the one that was best before, paired, in nats per token), low, high, verdict (changed, same, undecided).
    """
    rows = []
    for kind, n, name, sets in repaired_cases(losses, choices):
        domains = list(dict.fromkeys(domain for _, domain in losses))
        home = [domain for domain in domains if domain in mixture(fitted_on)]
        for place, of in {fitted_on: home, "elsewhere": [domain for domain in domains if domain not in home]}.items():
            before, after = (_cheapest(losses, sets, how, of) for how in (NONE, name))
            saved = _gap(losses, sets[before], sets[after], name, of)
            verdict = "same" if sets[before] == sets[after] else comparison(saved.low, saved.high, "changed")
            rows.append((kind, n, name, place, before.label, after.label, *saved, verdict))
    columns = ["kind", "n_dropped", "repair", "domain", "before", "after", "saved", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _cheapest(losses: Losses, sets: Mapping[Method, DropSet], name: str, domains: Sequence[str]) -> Method:
    return min(sets, key=lambda m: np.mean([losses[name, domain][sets[m]].nll.mean() for domain in domains]))


def _gap(losses: Losses, drop_set: DropSet, reference: DropSet, name: str, domains: Sequence[str]) -> Interval:
    """How much more a set costs than a reference with the same repair, over the windows of these domains."""
    pairs = [(losses[name, d][drop_set].nll.to_numpy(), losses[name, d][reference].nll.to_numpy()) for d in domains]
    return paired_difference(*map(np.concatenate, zip(*pairs, strict=True)))


def saved_elsewhere(losses: Losses, drop_set: DropSet, repaired: str, fitted_on: str) -> np.ndarray:
    """What a repair saves on every window of the domains that it was not fitted on, in nats per token.

    Raises:
        ValueError: it was fitted on all domains.
    """
    away = _away(losses, repaired, fitted_on)
    values = [losses[NONE, domain][drop_set].nll.to_numpy() - losses[repaired, domain][drop_set].nll.to_numpy() for domain in away]
    return np.concatenate(values)


@measuring
def inference_costs(
    model: PreTrainedModel, variants: Mapping[str, tuple[DropSet, Repair | None]], ids: Int[Tensor, "1 token"], rounds: int = 3
) -> pd.DataFrame:
    """What each variant costs to run, beside the dense model, which is added as the first row.

    Args:
        ids: one text; a token of it costs what is reported.
    Returns:
        repair (the name of the variant), parameters (millions), mflop (of matrix products per token, in millions of floating-point
        operations), kv_bytes (per token), latency (of a forward pass, over that of the dense model in the same round), low, high.
    """
    variants = {"dense": ((), None), **variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rows = []
    for number in range(rounds + 1):  # the first round warms up
        for name, (drop_set, fitted) in variants.items():
            with dropped(model, drop_set, fitted) if drop_set else nullcontext():
                if number == 0:
                    nbytes = cache_bytes(model(ids, use_cache=True).past_key_values)
                    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not counted
                        model(ids, use_cache=False)
                    size = sum(weight.numel() for weight in model.parameters()) / 1e6
                    per_token = (counter.get_total_flops() / 1e6 / ids.shape[1], nbytes / ids.shape[1])
                    rows.append((name, size, *per_token))
                start = time.perf_counter()
                model(ids, use_cache=False)
                seconds[name].append(time.perf_counter() - start)
    ratios = [mean_interval(np.array(seconds[name][1:]) / np.array(seconds["dense"][1:])) for name in variants]
    table = pd.DataFrame(rows, columns=["repair", "parameters", "mflop", "kv_bytes"])
    return table.join(pd.DataFrame(ratios, columns=["latency", "low", "high"]))


def kept_by_count(
    losses: Losses, order: Sequence[SubBlock], counts: Sequence[int], names: Sequence[str], promised: float
) -> pd.DataFrame:
    """The share of the likelihood per token that is kept without the first sub-blocks of an order, bare or with these repairs.

    Returns:
        repair, domain, n_dropped, kept, low, high, holds (whether the interval exceeds the promise).
    """
    rows = []
    for name, domain in (key for key in losses if key[0] in names):
        for n in counts:
            kept = mean_interval(np.exp(-_increase(losses, tuple(sorted(order[:n])), name, domain)))
            rows.append((name, domain, n, *kept, bool(kept.low > promised)))
    return pd.DataFrame(rows, columns=["repair", "domain", "n_dropped", "kept", "low", "high", "holds"])


def most_kept(table: pd.DataFrame) -> pd.DataFrame:
    """The largest number up to which the promise of ``kept_by_count`` holds at every number: a row a repair, a column a domain."""
    rows = table.sort_values("n_dropped")
    unbroken = rows.groupby(["repair", "domain"], sort=False).holds.cummin()
    rows = rows.assign(most=rows.n_dropped * unbroken)
    return rows.pivot_table("most", "repair", "domain", aggfunc="max", sort=False)


@measuring
def repetition(
    model: PreTrainedModel,
    prompts: Int[Tensor, "prompt token"],
    variants: Mapping[str, tuple[DropSet, Repair | None]],
    n_new: int = 40,
    gram: int = 4,
) -> pd.DataFrame:
    """How much a greedy continuation repeats itself: the share of its runs of ``gram`` tokens that it has had before.

    Returns:
        variant, repeated, low, high (mean over prompts with its interval).
    """
    rows = []
    for name, (drop_set, fitted) in {"dense": ((), None), **variants}.items():
        with dropped(model, drop_set, fitted) if drop_set else nullcontext():
            rows.append((name, *mean_interval(repeated_shares(model, prompts, n_new, gram)).within(0.0, 1.0)))
    return pd.DataFrame(rows, columns=["variant", "repeated", "low", "high"])


def repair_figure(table: pd.DataFrame, kind: str, n: int, title: str) -> Figure:
    """Loss increase of every method by repair: on the fitted domain, and averaged over the others. Grey: random choices.

    Args:
        table: of ``repair_table``.
    """
    rows = table[(table.kind == kind) & (table.n_dropped == n) & table.repair.isin(REPAIRS)]
    figure, axes = headed_panels(title, 2, 3.0, sharey=True)
    for axis, (in_domain, name) in zip(axes, ((True, "the fitted domain"), (False, "other domains")), strict=True):
        means = rows[rows.in_domain == in_domain].pivot_table("increase", METHOD_COLUMNS, "repair")[list(REPAIRS)]
        for values, line in zip(means.index, means.to_numpy(), strict=True):
            method = Method(*values)
            if method.rule == RANDOM:
                axis.plot(range(len(REPAIRS)), line, color=GREY, alpha=0.4, linewidth=0.7, label="_random")
            else:
                axis.plot(range(len(REPAIRS)), line, color=LOOKS[method.metric], marker="o", markersize=4, label=method.label)
        axis.set_xticks(range(len(REPAIRS)), REPAIRS)
        axis.set_ylim(0, 1.05 * rows[rows.rule != RANDOM].increase.max())
        axis.set_title(name, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        label_ends(axis)
    axes[0].set_ylabel("loss increase (nats per token)")
    return figure


def budget_figure(table: pd.DataFrame, title: str) -> Figure:
    """Loss increase on the domains that a repair was not fitted on against the operations per token.

    Args:
        table: repair, mflop, elsewhere, elsewhere_low, elsewhere_high (nats per token); the dense model first.
    """
    figure, (axis,) = headed_panels(title, 1, 3.0)
    table = table.sort_values("elsewhere")
    share, sides = table.mflop / table.mflop[table.repair == "dense"].item(), {}
    for x, row in zip(share, table.itertuples(), strict=True):
        errors = [[row.elsewhere - row.elsewhere_low], [row.elsewhere_high - row.elsewhere]]
        axis.errorbar(x, row.elsewhere, errors, fmt="o", color=GREY if row.repair in ("dense", NONE) else "#0072B2", capsize=2)
        sides[round(x, 4)] = side = -sides.get(round(x, 4), -1)  # labels of points above each other alternate
        look = {"ha": "left" if side > 0 else "right", "va": "center", "fontsize": 8}
        axis.annotate(row.repair, (x, row.elsewhere), xytext=(7 * side, 0), textcoords="offset points", **look)
    axis.margins(x=0.15)
    axis.set_xlabel("operations per token, share of the dense model's")
    axis.set_ylabel("loss increase (nats per token)")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def increase_elsewhere(losses: Losses, drop_set: DropSet, name: str, fitted_on: str) -> Interval:
    """The loss increase of a set with a repair over all windows of the domains that the repair was not fitted on."""
    return mean_interval(np.concatenate([_increase(losses, drop_set, name, d) for d in _away(losses, name, fitted_on)]))


def gap_everywhere(losses: Losses, drop_set: DropSet, reference: DropSet, name: str) -> Interval:
    """How much more a set costs than a reference with the same repair, over the windows of all domains."""
    return _gap(losses, drop_set, reference, name, [domain for of, domain in losses if of == name])


def increase_table(losses: Losses, drop_set: DropSet) -> pd.DataFrame:
    """The loss increase of a set by what its repair was fitted on: fitted_on (names of the losses), domain, increase, low, high."""
    rows = [(name, domain, *mean_interval(_increase(losses, drop_set, name, domain))) for name, domain in losses]
    return pd.DataFrame(rows, columns=["fitted_on", "domain", "increase", "low", "high"])


def _increase(losses: Losses, drop_set: DropSet, name: str, domain: str) -> np.ndarray:
    return losses[name, domain][drop_set].nll.to_numpy() - losses[NONE, domain][()].nll.to_numpy()


def _away(losses: Losses, name: str, fitted_on: str) -> list[str]:
    """The domains that a repair was not fitted on. Raises ValueError where there is none."""
    away = [domain for of, domain in losses if of == name and domain not in mixture(fitted_on)]
    if not away:
        raise ValueError(f"the repair was fitted on every domain ({fitted_on}): add another to the domains")
    return away


def gap_table(losses: Losses, choices: Mapping[Choice, DropSet], reference: Method) -> pd.DataFrame:
    """How much more every other ranked method costs than the reference, bare and repaired, over the windows of all domains.

    Returns:
        kind, n_dropped, method, repair (``NONE``, and that of ``repaired_cases``), gap (nats per token), low, high.
    """
    rows = []
    for kind, n, repaired, sets in repaired_cases(losses, choices):
        for method in (m for m in sets if m != reference):
            for name in (NONE, repaired):
                gap = gap_everywhere(losses, sets[method], sets[reference], name)
                rows.append((kind, n, method.label, name, *gap))
    return pd.DataFrame(rows, columns=["kind", "n_dropped", "method", "repair", "gap", "low", "high"])


def gap_sentence(gaps: pd.DataFrame, reference: Method) -> str:
    """In how many cases of ``gap_table`` a method costs more than the reference, bare and repaired, decided by the interval."""
    bare = gaps.repair == NONE
    counts = [f"{(rows.low > 0).sum()} of {len(rows)}" for rows in (gaps[bare], gaps[~bare])]
    return f"Methods that cost more than {reference.label}: {counts[0]} cases bare, {counts[1]} after repair"


def gap_figure(gaps: pd.DataFrame, reference: Method, title: str) -> Figure:
    """The gaps of ``gap_table``, a panel for every kind and number: hollow bare, filled repaired."""
    methods, cases = list(dict.fromkeys(gaps.method)), list(gaps.groupby(["kind", "n_dropped"], sort=False))
    figure, axes = headed_panels(title, len(cases), 0.9 + 0.3 * len(methods), sharey=True)
    for axis, ((kind, n), rows) in zip(axes, cases, strict=True):
        axis.axvline(0, color=GREY, linewidth=0.8)
        for row in rows.itertuples():
            bare, colour = row.repair == NONE, LOOKS.get(row.method, KIND_COLOURS["mixed"])
            errors = [[row.gap - row.low], [row.high - row.gap]]
            look = {"color": GREY, "markerfacecolor": "white"} if bare else {"color": colour}
            place = methods.index(row.method) + (-0.15 if bare else 0.15)
            axis.errorbar(row.gap, place, xerr=errors, fmt="o", markersize=4, linewidth=1, **look)
        (repaired,) = set(rows.repair) - {NONE}
        axis.set_title(f"{n} {KIND_NAMES[kind]}\n{repaired}", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(False, axis="y")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(f"loss over {reference.label}'s (nats per token; left of 0 is better)", fontsize=9)
    return figure

"""What the study of repairs says, in sentences: titles, the finding, and an answer with its interval to each question."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from ..layerwise import DropSet
from ..statistics import Interval, comparison, mean_interval
from ..text import mixture
from .comparison import extra_cost
from .methods import KIND_NAMES, RANDOM, Choice, Method
from .repair_study import LEFT, NONE, SINGLE, Losses, gap_everywhere, increase_elsewhere, most_kept, saved_elsewhere

ZERO_COST = ("constant", "fold", "scale")  # repairs that add no matrix products


def _saved_at_home(losses: Losses, drop_set: DropSet, repaired: str, fitted_on: str) -> Interval:
    """What a repair saves on the domains that it was fitted on."""
    home = [domain for name, domain in losses if name == repaired and domain in mixture(fitted_on)]
    return mean_interval(
        np.concatenate([losses[NONE, d][drop_set].nll.to_numpy() - losses[repaired, d][drop_set].nll.to_numpy() for d in home])
    )


def saved_sentence(losses: Losses, drop_set: DropSet, fitted_on: str, depth: int) -> str:
    """The title of the figure of methods: what a linear repair of one set saves in its domain and elsewhere."""
    home = _saved_at_home(losses, drop_set, "linear", fitted_on)
    away = mean_interval(saved_elsewhere(losses, drop_set, "linear", fitted_on))
    return (
        f"Without {len(drop_set)} of {depth} {KIND_NAMES[drop_set[0].kind]}, a linear repair saves {home.estimate:.2f} nats per "
        f"token on the text that it was fitted on and {away.estimate:.2f} on others."
    )


def budget_sentence(costs: pd.DataFrame) -> str:
    """The title of the figure of budgets: the best repair that costs nothing beside the linear one."""
    rows = costs.set_index("repair")
    free = rows.loc[[name for name in ZERO_COST if name in rows.index]].elsewhere
    share = rows.mflop / rows.mflop.iloc[0]
    return (
        f"Elsewhere the {free.idxmin()}, which costs nothing to run, leaves {free.min():.2f} of {rows.elsewhere[NONE]:.2f} nats; "
        f"the linear map leaves {rows.elsewhere['linear']:.2f} and takes {share['linear'] - share[NONE]:.1%} of the operations."
    )


def repair_finding(losses: Losses, choices: Mapping[Choice, DropSet], reference: Method, fitted_on: str, depth: int) -> str:
    """The finding of the notebook, with one interval."""
    (kind, n), drop_set = next(((kind, n), s) for (kind, m, n), s in choices.items() if m == reference)
    home = _saved_at_home(losses, drop_set, "linear", fitted_on)
    away = mean_interval(saved_elsewhere(losses, drop_set, "linear", fitted_on))
    left = increase_elsewhere(losses, drop_set, "linear", fitted_on)
    return (
        f"Without {n} of {depth} {KIND_NAMES[kind]} by {reference.metric}, a linear repair saves {home.estimate:.2f} nats on "
        f"{fitted_on} and {away:.2f} elsewhere, where {left.estimate:.2f} remain."
    )


def answers(
    losses: Losses,
    choices: Mapping[Choice, DropSet],
    reference: Method,
    fitted_on: str,
    texts: pd.DataFrame,
    kept: pd.DataFrame,
    repeated: pd.DataFrame,
    costs: pd.DataFrame,
) -> list[str]:
    """One sentence for each question of the notebook.

    Args:
        texts: of ``increase_table``, by the text of the fit.
        kept: of ``kept_by_count``.
        repeated: of ``repetition``.
        costs: of ``inference_costs``, with the loss increase elsewhere.
    """
    sets = {m: s for (_, m, _), s in choices.items() if m.rule != RANDOM}
    return [
        _cost_answer(losses, sets[reference], reference, fitted_on, costs),
        _best_answer(losses, sets),
        *_rule_answers(losses, sets, reference),
        *_text_answer(texts, fitted_on),
        *_promise_answer(kept),
        _repetition_answer(repeated),
    ]


def _cost_answer(losses: Losses, drop_set: DropSet, reference: Method, fitted_on: str, costs: pd.DataFrame) -> str:
    rows = costs.set_index("repair")
    share = rows.mflop / rows.mflop.iloc[0]
    left = ", ".join(
        f"{name} {increase_elsewhere(losses, drop_set, name, fitted_on):.2f} at {share[name]:.0%} of the operations"
        for name in rows.index[1:]
    )
    return f"Cost: loss increase by {reference.metric} on domains that no repair was fitted on: {left}."


def _best_answer(losses: Losses, sets: Mapping[Method, DropSet]) -> str:
    before, after = (
        min(sets, key=lambda m: np.mean([by_set[sets[m]].nll.mean() for (of, _), by_set in losses.items() if of == name]))
        for name in (NONE, "linear")
    )
    if sets[before] == sets[after]:
        return f"Best method over all domains: {before.label}, bare and after linear repair."
    gap = gap_everywhere(losses, sets[before], sets[after], "linear")
    verdict = comparison(gap.low, gap.high, "repair changes which is best", "the old one is better")
    return (
        f"Best method over all domains: {before.label} bare, {after.label} after linear repair, where it saves {gap:.2f} nats: "
        f"{verdict}."
    )


def _rule_answers(losses: Losses, sets: Mapping[Method, DropSet], reference: Method) -> Iterator[str]:
    for rival in (Method(SINGLE), reference):
        gap = gap_everywhere(losses, sets[Method(LEFT)], sets[rival], "linear")
        verdict = comparison(-gap.high, -gap.low, "the rule for repair is better", "it is worse")
        yield f"Choosing for repair: by what is left, repaired models cost {extra_cost(gap)} than by {rival.label}: {verdict}."
    for name in sets:
        if name.metric in ("bucket", "knn"):
            bare, repaired = (gap_everywhere(losses, sets[name], sets[reference], how) for how in (NONE, "linear"))
            verdict = comparison(repaired.low, repaired.high, "it does not catch up", "it overtakes")
            yield (
                f"Entropy: the choice by {name.label} costs {extra_cost(bare)} than by {reference.metric} bare, "
                f"{extra_cost(repaired)} after linear repair: {verdict}."
            )


def _text_answer(texts: pd.DataFrame, fitted_on: str) -> Iterator[str]:
    for name in dict.fromkeys(texts.fitted_on):
        if name not in (NONE, fitted_on):
            rows = texts[texts.fitted_on == name]
            by_domain = ", ".join(f"{row.domain} {Interval(row.increase, row.low, row.high):.2f}" for row in rows.itertuples())
            yield f"Text of the fit: loss increase after a fit on {name}: {by_domain}."


def _promise_answer(kept: pd.DataFrame) -> Iterator[str]:
    for name, most in most_kept(kept).iterrows():
        counts = ", ".join(f"{n:.0f} on {domain}" if n else f"none shown on {domain}" for domain, n in most.items())
        yield f"Promise, {'bare' if name == NONE else name}: most sub-blocks up to which it is kept: {counts}."


def _repetition_answer(repeated: pd.DataFrame) -> str:
    shares = (f"{row.variant} {Interval(row.repeated, row.low, row.high):.0%}" for row in repeated.itertuples())
    return f"Repetition of greedy continuations: {', '.join(shares)}."


def costs_elsewhere(costs: pd.DataFrame, losses: Losses, drop_set: DropSet, fitted_on: str) -> pd.DataFrame:
    """The table of ``inference_costs`` with the loss increase on the domains that the repair was not fitted on."""
    left = [Interval(0.0, 0.0, 0.0), *(increase_elsewhere(losses, drop_set, name, fitted_on) for name in costs.repair[1:])]
    return costs.join(pd.DataFrame(left, columns=["elsewhere", "elsewhere_low", "elsewhere_high"]))


def choices_of(orders: Mapping[Method, Sequence], kind: str, n: int) -> dict[Choice, DropSet]:
    """The first ``n`` sub-blocks of every order, as choices."""
    return {(kind, method, n): tuple(sorted(order[:n])) for method, order in orders.items()}

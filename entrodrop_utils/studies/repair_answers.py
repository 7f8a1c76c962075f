"""What the study of repairs says, in sentences: titles, the finding, and an answer with its interval to each question."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from ..layerwise import DropSet
from ..statistics import Interval, comparison, mean_interval
from ..text import mixture
from .comparison import extra_cost
from .methods import KIND_NAMES, Choice, Method
from .repair_study import (
    LEFT,
    NONE,
    SINGLE,
    Losses,
    gap_everywhere,
    increase_elsewhere,
    most_kept,
    repaired_cases,
    saved_elsewhere,
)

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
    known: tuple[Losses, Mapping[Choice, DropSet]] | None = None,
) -> list[str]:
    """One sentence for each question of the notebook.

    Args:
        texts: of ``increase_table``, by the text of the fit.
        kept: of ``kept_by_count``.
        repeated: of ``repetition``.
        costs: of ``inference_costs``, with the loss increase elsewhere.
        known: losses and choices that compare methods, of the full grid; without any, those of the run.
    """
    drop_set = next(drop_set for (_, method, _), drop_set in choices.items() if method == reference)
    compared = known or (losses, choices)
    return [
        _cost_answer(losses, drop_set, reference, fitted_on, costs),
        _best_answer(*compared),
        *_rule_answers(*compared, reference),
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


def _best_answer(losses: Losses, choices: Mapping[Choice, DropSet]) -> str:
    """Whether repair changes which method is best, for every kind and number."""
    parts = []
    for kind, n, name, sets in repaired_cases(losses, choices):
        means = {
            how: {m: np.mean([of[s].nll.mean() for (h, _), of in losses.items() if h == how]) for m, s in sets.items()}
            for how in (NONE, name)
        }
        before, after = (min(of, key=of.get) for of in means.values())
        part = f"without {n} {KIND_NAMES[kind]} {before.label}"
        if sets[before] == sets[after]:
            parts.append(f"{part}, also after {name} repair")
        else:
            gap = gap_everywhere(losses, sets[before], sets[after], name)
            verdict = comparison(gap.low, gap.high, "repair changes it", "the old one is better")
            parts.append(f"{part}, after {name} repair {after.label}, which then saves {gap:.2f} nats ({verdict})")
    return f"Best method over all domains: {'; '.join(parts)}."


def _rule_answers(losses: Losses, choices: Mapping[Choice, DropSet], reference: Method) -> Iterator[str]:
    """Whether a rule that chooses for repair, and an entropy, are better than their rivals, for every kind and number."""
    cases = list(repaired_cases(losses, choices))
    for rival in (Method(SINGLE), reference):
        parts = []
        for kind, n, name, sets in cases:
            if Method(LEFT) in sets:
                gap = gap_everywhere(losses, sets[Method(LEFT)], sets[rival], name)
                verdict = comparison(-gap.high, -gap.low, "better", "worse")
                parts.append(f"without {n} {KIND_NAMES[kind]} {extra_cost(gap)}, {verdict}")
        yield f"Choosing for repair: by what is left, repaired models cost against {rival.label}: {'; '.join(parts)}."
    for entropy in (Method("bucket"), Method("knn")):
        parts = []
        for kind, n, name, sets in cases:
            if entropy in sets:
                bare, after = (gap_everywhere(losses, sets[entropy], sets[reference], how) for how in (NONE, name))
                verdict = comparison(after.low, after.high, "it does not catch up", "it overtakes")
                parts.append(
                    f"without {n} {KIND_NAMES[kind]} {extra_cost(bare)} bare, {extra_cost(after)} after {name} repair ({verdict})"
                )
        if parts:
            yield f"Entropy: the choice by {entropy.label} costs against {reference.label}: {'; '.join(parts)}."


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


def grid_answers(first: pd.DataFrame | None, loops: pd.DataFrame | None, healed: pd.DataFrame | None) -> Iterator[str]:
    """What the tables beside the grid say: of the first token's own constant, of the closed loop, and of training.

    Args:
        first: of ``repair_extras.first_token_table``.
        loops: of ``repair_extras.loop_table``.
        healed: of ``repair_extras.healed_table``.
    """
    if first is not None:
        parts = [
            f"without {rows.n_dropped.iloc[0]} {KIND_NAMES[kind]} by {metric} it saves "
            + ", ".join(f"{row.domain} {Interval(row.saved, row.low, row.high):.3f}" for row in rows.itertuples())
            for (kind, metric), rows in first.groupby(["kind", "metric"], sort=False)
        ]
        yield f"A constant of the first token's own, nats over one constant for all tokens: {'; '.join(parts)}."
    if loops is not None:
        parts = []
        for (n, tokens), rows in loops.groupby(["windows", "tokens"]):
            words = [comparison(row.low, row.high) for row in rows.itertuples()]
            saved = ", ".join(f"{row.domain} {Interval(row.saved, row.low, row.high):.2f}" for row in rows.itertuples())
            counts = f"better in {words.count('better')} of {len(words)} domains, worse in {words.count('worse')}"
            parts.append(f"on {n} windows ({tokens} tokens) {counts} ({saved})")
        yield f"Closed loop against open, nats saved by linear maps fitted in it: {'; '.join(parts)}."
    if healed is not None:
        rows = healed[healed.steps > 0]
        parts = ", ".join(
            f"{row.domain} {Interval(row.saved, row.saved_low, row.saved_high):.2f} of {row.increase + row.saved:.2f}"
            for row in rows.itertuples()
        )
        yield (
            f"Training: {rows.steps.iloc[0]} steps of LoRA after the fold, {rows.seconds.iloc[0] / 60:.0f} minutes of one core, "
            f"save nats of the loss increase that the fold leaves: {parts}."
        )


def costs_elsewhere(costs: pd.DataFrame, losses: Losses, drop_set: DropSet, fitted_on: str) -> pd.DataFrame:
    """The table of ``inference_costs`` with the loss increase on the domains that the repair was not fitted on."""
    left = [Interval(0.0, 0.0, 0.0), *(increase_elsewhere(losses, drop_set, name, fitted_on) for name in costs.repair[1:])]
    return costs.join(pd.DataFrame(left, columns=["elsewhere", "elsewhere_low", "elsewhere_high"]))


def choices_of(orders: Mapping[Method, Sequence], kind: str, n: int) -> dict[Choice, DropSet]:
    """The first ``n`` sub-blocks of every order, as choices."""
    return {(kind, method, n): tuple(sorted(order[:n])) for method, order in orders.items()}

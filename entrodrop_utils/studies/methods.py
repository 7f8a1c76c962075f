"""The metrics and pruning methods that the notebooks compare: which sub-blocks each drops, the cost, and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import pandas as pd

from ..entropy import ESTIMATORS
from ..evaluation import Estimate
from ..layerwise import DropSet
from ..residual import SubBlock
from ..scoring import Metric, configured, without_first
from ..selection import (
    PUBLISHED_PROTECTED,
    NoFallingStage,
    count_of,
    deepest_first,
    one_shot,
    protected_layers,
    random_order,
    two_stage,
)
from ..statistics import comparison, paired_difference


class Method(NamedTuple):
    """A way to choose sub-blocks: a metric and a rule.

    Attributes:
        metric: a registered metric; "random" or "depth" for the rules that need none.
        rule: "one-shot", "two-stage", "random" or "deepest first".
        first_token: whether the first token of each window counts.
        draw: the number of a random draw; 0 for the other rules.
    """

    metric: str
    rule: str = "one-shot"
    first_token: bool = True
    draw: int = 0

    @property
    def label(self) -> str:
        """The method in a table or legend."""
        if self.rule == "random":
            return f"random {self.draw}"
        if self.rule == "deepest first":
            return self.rule
        return self.metric + ", two-stage" * (self.rule == "two-stage") + ", no first token" * (not self.first_token)


RANDOM = "random"
METHOD_COLUMNS = list(Method._fields)
Choice = tuple[str, Method, int]  # kind, method, number dropped


def entropy_metrics(bins: int, k: int, alpha: float, matrix_alpha: float) -> dict[str, Metric]:
    """The entropy estimators with a run's settings; ``alpha`` is the order of renyi, ``matrix_alpha`` that of matrix_renyi."""
    settings = {"bins": bins, "k": k, "alpha": alpha}
    own = {"matrix_renyi": {"alpha": matrix_alpha}}
    return {name: configured(name, **own.get(name, settings)) for name in ESTIMATORS}


def first_token_variants(metrics: Mapping[str, Metric]) -> dict[tuple[str, bool], Metric]:
    """(name, whether the first token of each window counts) -> metric."""
    variants = {(name, True): metric for name, metric in metrics.items()}
    return variants | {(name, False): without_first(metric) for name, metric in metrics.items()}


def numbers_dropped(fractions: Iterable[float], n_layers: int, protected: Iterable[int] = PUBLISHED_PROTECTED) -> dict[float, int]:
    """Fraction -> number of sub-blocks, at most as many as are not protected."""
    n_free = n_layers - len(protected_layers(protected, n_layers))
    return {fraction: min(count_of(fraction, n_layers), n_free) for fraction in fractions}


def drop_order(
    scores: pd.DataFrame, kind: str, method: Method, protected: Sequence[int] = PUBLISHED_PROTECTED, seed: int = 0
) -> list[SubBlock]:
    """The sub-blocks of a kind in the order in which a method drops them.

    Args:
        scores: the table that ``score`` returns, with a column ``first_token`` where both variants were measured.
    """
    rows = scores[scores.first_token == method.first_token] if "first_token" in scores else scores
    if method.rule == "two-stage":
        return two_stage(rows, method.metric, kind)
    if method.rule == "one-shot":
        return one_shot(rows, method.metric, kind, protected=protected)
    candidates = one_shot(rows, rows[rows.kind == kind].metric.iloc[0], kind, protected=protected)
    return deepest_first(candidates) if method.rule == "deepest first" else random_order(candidates, [seed, method.draw])


def drop_orders(
    scores: pd.DataFrame, kinds: Iterable[str], methods: Iterable[Method], protected: Sequence[int] = PUBLISHED_PROTECTED, seed: int = 0
) -> tuple[dict[tuple[str, Method], list[SubBlock]], list[Method]]:
    """(kind, method) -> ``drop_order``, and the two-stage methods that are not applicable: their entropy curve has no falling stage."""
    orders, not_applicable = {}, []
    for kind, method in product(kinds, methods):
        try:
            orders[kind, method] = drop_order(scores, kind, method, protected, seed)
        except NoFallingStage:
            not_applicable.append(method)
    return orders, list(dict.fromkeys(not_applicable))


def drop_sets(orders: Mapping[tuple[str, Method], list[SubBlock]], counts: Iterable[int]) -> dict[Choice, DropSet]:
    """(kind, method, number dropped) -> the set; a count is left out where the order is shorter."""
    return {(*key, n): tuple(sorted(order[:n])) for key, order in orders.items() for n in counts if n <= len(order)}


def losses_of(losses: pd.DataFrame) -> dict[DropSet, pd.DataFrame]:
    """The table of ``losses_by_set`` as set -> window, nll, kl."""
    return {drop_set: rows.set_index("window")[["nll", "kl"]] for drop_set, rows in losses.groupby("set")}


def pruning_table(
    by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, DropSet], orders: Mapping[tuple[str, Method], list[SubBlock]]
) -> pd.DataFrame:
    """The cost of every choice: kind, the method's columns, n_dropped, dropped (first dropped first), nll, nll_stderr, kl,
    perplexity.
    """
    rows = []
    for (kind, method, n), drop_set in choices.items():
        windows = by_set[drop_set]
        loss = Estimate.of(windows.nll.to_numpy())
        dropped = " ".join(str(sub_block.layer) for sub_block in orders[kind, method][:n])
        rows.append((kind, *method, n, dropped, loss.mean, loss.stderr, windows.kl.mean(), loss.perplexity))
    columns = ["kind", *METHOD_COLUMNS, "n_dropped", "dropped", "nll", "nll_stderr", "kl", "perplexity"]
    return pd.DataFrame(rows, columns=columns)


def compared_with(
    reference: Method, by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, DropSet], seed: int = 0
) -> pd.DataFrame:
    """Loss of every choice minus that of the reference at the same kind and count, paired over windows, with its interval.

    Returns:
        kind, the method's columns, n_dropped, difference (nats per token; below zero the method is better), low, high, verdict.
    """
    rows = []
    for (kind, method, n), drop_set in choices.items():
        if method != reference and (kind, reference, n) in choices:
            losses, rival = by_set[drop_set].nll.to_numpy(), by_set[choices[kind, reference, n]].nll.to_numpy()
            difference = paired_difference(losses, rival, seed)
            verdict = comparison(difference.low, difference.high, "worse", "better") if (losses != rival).any() else "same"
            rows.append((kind, *method, n, *difference, verdict))
    return pd.DataFrame(rows, columns=["kind", *METHOD_COLUMNS, "n_dropped", "difference", "low", "high", "verdict"])


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the method's columns, with the column ``method`` for display in front of the others."""
    labels = [Method(*values).label for values in table[METHOD_COLUMNS].itertuples(index=False)]
    return table.assign(method=labels)[["method", *table.columns]]

"""The metrics and pruning methods that the notebooks compare: which sub-blocks each drops, the cost, and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool
from scipy.stats import false_discovery_control, ttest_rel

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
from ..statistics import comparison, paired_difference, share_interval


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
KIND_NAMES = {"attention": "attention layers", "mlp": "MLPs", "block": "blocks"}
FALSE_DISCOVERIES = 0.05  # expected share of false ones among the decided comparisons of a table
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
    scores: pd.DataFrame,
    kinds: Iterable[str],
    methods: Iterable[Method],
    protected: Sequence[int] = PUBLISHED_PROTECTED,
    seed: int = 0,
) -> tuple[dict[tuple[str, Method], list[SubBlock]], list[Method]]:
    """(kind, method) -> ``drop_order``, and the methods that are not applicable: their entropy curve has no falling stage."""
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
    """The cost of every choice: kind, the method's columns, n_dropped, dropped (first dropped first), nll, nll_stderr, kl."""
    rows = []
    for (kind, method, n), drop_set in choices.items():
        windows = by_set[drop_set]
        loss = Estimate.of(windows.nll.to_numpy())
        dropped = " ".join(str(sub_block.layer) for sub_block in orders[kind, method][:n])
        rows.append((kind, *method, n, dropped, loss.mean, loss.stderr, windows.kl.mean()))
    columns = ["kind", *METHOD_COLUMNS, "n_dropped", "dropped", "nll", "nll_stderr", "kl"]
    return pd.DataFrame(rows, columns=columns)


def compared_with(reference: Method, by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, DropSet]) -> pd.DataFrame:
    """Loss of every choice minus that of the reference at the same kind and count, paired over windows; random draws are left out.

    Returns:
        kind, the method's columns, n_dropped, dropped (layers), difference (nats per token; below zero the method is better), low,
        high (its interval), p (of the paired t test), q (p after Benjamini and Hochberg, over the different sets), verdict: better
        or worse where q is at most ``FALSE_DISCOVERIES``, else undecided; same where the set is that of the reference.
    """
    rows, same = [], []
    for (kind, method, n), drop_set in choices.items():
        if method.rule != RANDOM and method != reference and (kind, reference, n) in choices:
            losses, rival = (by_set[s].nll.to_numpy() for s in (drop_set, choices[kind, reference, n]))
            same.append(drop_set == choices[kind, reference, n])
            p = np.nan if same[-1] else ttest_rel(losses, rival).pvalue
            rows.append((kind, *method, n, layers_text(drop_set), *paired_difference(losses, rival), p))
    table = pd.DataFrame(rows, columns=["kind", *METHOD_COLUMNS, "n_dropped", "dropped", "difference", "low", "high", "p"])
    tested = distinct(table.dropna(subset="p"))
    q = pd.Series(
        false_discovery_control(tested.p) if len(tested) else [], pd.MultiIndex.from_frame(tested[["kind", "dropped"]]), name="q"
    )
    table = table.join(q, on=["kind", "dropped"])
    decided = np.where(table.difference > 0, "worse", "better")
    return table.assign(verdict=np.where(same, "same", np.where(table.q <= FALSE_DISCOVERIES, decided, "undecided")))


def distinct(table: pd.DataFrame) -> pd.DataFrame:
    """The first row of every set of sub-blocks (columns ``kind`` and ``dropped``): methods that drop the same set count once."""
    return table.drop_duplicates(["kind", "dropped"])


def place_among_draws(pruning: pd.DataFrame) -> pd.DataFrame:
    """Where every choice lies among the random draws of the same kind and count, by the loss on the same windows.

    Args:
        pruning: as ``pruning_table`` returns it.
    Returns:
        kind, the method's columns, n_dropped, dropped (layers), draws (their number), share (of the draws that cost more), low,
        high (Wilson's interval: it covers the drawing of choices and not that of windows), verdict: better or worse than most
        draws, or undecided.
    """
    draws = {key: rows.nll.to_numpy() for key, rows in pruning[pruning.rule == RANDOM].groupby(["kind", "n_dropped"])}
    rows = []
    for row in pruning[pruning.rule != RANDOM].itertuples():
        if (losses := draws.get((row.kind, row.n_dropped))) is not None:
            layers = " ".join(map(str, sorted(map(int, row.dropped.split()))))
            method = (getattr(row, column) for column in METHOD_COLUMNS)
            rows.append((row.kind, *method, row.n_dropped, layers, *place_of(losses > row.nll)))
    return pd.DataFrame(rows, columns=["kind", *METHOD_COLUMNS, "n_dropped", "dropped", "draws", "share", "low", "high", "verdict"])


def place_of(beaten: Bool[np.ndarray, " draw"]) -> tuple[int, float, float, float, str]:
    """A place among random draws, from whether each of them is beaten: their number, the share with Wilson's interval, verdict."""
    share = share_interval(beaten)
    return len(beaten), *share, comparison(share.low - 0.5, share.high - 0.5)


def layers_text(drop_set: DropSet) -> str:
    """The layers of a set, in order."""
    return " ".join(str(sub_block.layer) for sub_block in drop_set)


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the method's columns, with the column ``method`` for display in front of the others."""
    labels = [Method(*values).label for values in table[METHOD_COLUMNS].itertuples(index=False)]
    return table.assign(method=labels)[["method", *table.columns]]

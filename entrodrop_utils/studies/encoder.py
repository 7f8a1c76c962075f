"""Dropping sub-blocks of a sentence encoder: how far its similarities of passages still agree with those of the dense encoder."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from ..claims import HELD_OUT, claim
from ..figures import COLOURS, MARKERS, panels
from ..layerwise import DropSet
from ..profile import Profile
from ..residual import KINDS, SubBlock
from ..statistics import mean_interval
from .methods import METHOD_COLUMNS, RANDOM, Choice, Method, drop_order, with_labels
from .statements import cost_statements

METHODS = [Method("bucket"), Method("knn"), Method("bucket", first_token=False), Method("knn", first_token=False), Method("cosine")]


def encoder_choices(
    scores: pd.DataFrame, counts: Iterable[int], max_combinations: int = 20, protected: Sequence[int] = (), seed: int = 0
) -> dict[Choice, list[SubBlock]]:
    """(kind, method, number dropped) -> sub-blocks, first dropped first.

    The methods are ``METHODS`` and, as random draws without replacement, the combinations of as many sub-blocks.

    Args:
        scores: kind, layer, metric, first_token, sequence, value.
        max_combinations: all combinations are chosen where there are no more.
    """
    choices: dict[Choice, list[SubBlock]] = {}
    for kind, n in itertools.product(KINDS, counts):
        orders = {method: drop_order(scores, kind, method, protected) for method in METHODS}
        choices |= {(kind, method, n): order[:n] for method, order in orders.items()}
        combinations = list(itertools.combinations(sorted(orders[METHODS[0]]), n))
        for i in sorted(np.random.default_rng(seed).permutation(len(combinations))[:max_combinations]):
            choices[kind, Method(RANDOM, RANDOM, draw=int(i) + 1), n] = list(combinations[i])
    return choices


def encoder_costs(by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, list[SubBlock]]) -> pd.DataFrame:
    """How far the encoder without each choice agrees with the dense one.

    Args:
        by_set: set -> window, agreement, distance, found, as ``tasks.encoders.agreement_by_set`` measures them.
    Returns:
        kind, the method's columns, n_dropped, dropped (first dropped first), agreement, low, high (its interval over passages),
        distance, retrieval (how often the other half of a passage is the most similar one), beats (share of the combinations of
        the same number that agree less).
    """
    rows = []
    for (kind, method, n), sub_blocks in choices.items():
        values = by_set[tuple(sorted(sub_blocks))]
        dropped = " ".join(str(sub_block.layer) for sub_block in sub_blocks)
        agreement = mean_interval(values.agreement)
        rows.append((kind, *method, n, dropped, *agreement, values.distance.mean(), values.found.mean()))
    names = ["kind", *METHOD_COLUMNS, "n_dropped", "dropped", "agreement", "low", "high", "distance", "retrieval"]
    table = pd.DataFrame(rows, columns=names)
    combinations = table[table.rule == RANDOM].groupby(["kind", "n_dropped"]).agreement.apply(np.array)
    beats = [np.mean(row.agreement > combinations[row.kind, row.n_dropped]) for row in table.itertuples()]
    return table.assign(beats=beats)


def encoder_claims(
    by_set: Mapping[DropSet, pd.DataFrame], choices: Mapping[Choice, list[SubBlock]], fraction: float, n: int, amount: str
) -> pd.DataFrame:
    """The paper's claims about costs, in agreement: entropy beats cosine, and attention is more redundant than MLPs.

    Args:
        fraction: share of the layers that the claims name; ``n`` is the number of layers nearest to it.
        amount: of the held-out text.
    Returns:
        the columns of ``claims.claim``.
    """

    def agreement(kind: str, metric: str) -> Float[np.ndarray, " window"]:
        return by_set[tuple(sorted(choices[kind, Method(metric), n]))].agreement.to_numpy()

    gains = [agreement("attention", metric) - agreement("attention", "cosine") for metric in ("bucket", "knn")]
    gains += [agreement("attention", metric) - agreement("mlp", metric) for metric in ("bucket", "knn")]
    texts = [f"{text}; measured: gain in agreement with the dense encoder" for text in cost_statements(fraction)]
    return pd.DataFrame(
        [claim(text, "results", gain, evidence=f"{HELD_OUT}: {amount}") for text, gain in zip(texts, gains, strict=True)]
    )


def committed_results(profile: Profile, encoder: str, fraction: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The committed costs and claims of an encoder.

    Raises:
        ValueError: there are none, or none at this fraction.
    """
    costs, claims = (profile.first_committed(encoder, f"A2_{name}.csv") for name in ("encoder", "claims"))
    if costs is None or claims is None or not claims.claim.str.startswith(tuple(cost_statements(fraction))).any():
        share = f"{100 * fraction:.3g}% of the layers"
        raise ValueError(f"no results of {encoder} at {share}: make reproduce MODEL={encoder} ONLY=A2 measures them")
    return costs, claims


def agreement_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Agreement of every method with its interval, and in parentheses the share of combinations that agree less."""
    rows = with_labels(costs[costs.rule != RANDOM])
    values = [f"{row.agreement:.2f} [{row.low:.2f}, {row.high:.2f}] ({row.beats:.0%})" for row in rows.itertuples()]
    return rows.assign(value=values).pivot_table(
        index=["kind", "n_dropped"], columns="method", values="value", aggfunc="first", sort=False
    )


def encoder_title(claims: pd.DataFrame, fraction: float) -> str:
    """What bucket entropy gains over cosine, as a sentence."""
    return f"Without {100 * fraction:.3g}% of the attention layers bucket gains {claims.iloc[0].measured:.3f} over cosine"


def encoder_figure(costs: pd.DataFrame) -> Figure:
    """Agreement against the number dropped, by method, over the range of all combinations; a panel for each kind."""
    figure, axes = panels(1, len(KINDS), height=2.5, sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        rows = costs[costs.kind == kind]
        combinations = rows[rows.rule == RANDOM].groupby("n_dropped").agreement.agg(["min", "mean", "max"])
        numbers = combinations.index
        axis.fill_between(
            numbers, combinations["min"], combinations["max"], color=COLOURS[RANDOM], alpha=0.35, label="range of all combinations"
        )
        axis.plot(combinations["mean"], "--", color="#777777", label="mean of all combinations")
        for method in METHODS:
            line = rows[(rows.rule == method.rule) & (rows.metric == method.metric) & (rows.first_token == method.first_token)]
            style = {
                "color": COLOURS[method.metric],
                "marker": MARKERS[method.metric],
                "linestyle": "-" if method.first_token else ":",
            }
            axis.plot("n_dropped", "agreement", data=line, label=method.label, **style)
        axis.set(title=kind.replace("mlp", "MLP"), xlabel="number dropped", xticks=numbers)
    axes[0].set_ylabel("agreement")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure

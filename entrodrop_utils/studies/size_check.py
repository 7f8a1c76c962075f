"""Whether two sizes of a run give the same result: rankings, comparisons with cosine and verdicts, from committed tables."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..profile import Profile
from ..statistics import mean_interval
from .methods import Method

SETTING_COLUMNS = ["kind", "n_dropped", "metric", "rule", "first_token", "claim"]
COLUMNS = ["model", "quantity", *SETTING_COLUMNS, "agreement"]
TAU, SIDE, VERDICT = "tau of the rankings", "same side of cosine", "same verdict"
FILES = ("01_claims.csv", "02_scores.csv", "02_pruning.csv", "02_claims.csv", "04_claims.csv")


def size_check(profile: Profile, models: Iterable[str], sizes: tuple[str, str] | list[str]) -> pd.DataFrame:
    """The agreement between two sizes of each model whose tables are committed.

    Returns:
        model, quantity (``TAU``, Kendall's; ``SIDE`` and ``VERDICT``, 1 or 0), kind, n_dropped, metric, rule, first_token, claim
        (what the row is about, as far as it applies), agreement.
    """
    checks = [(TAU, "02_scores.csv", _ranking_taus), (SIDE, "02_pruning.csv", _same_sides)]
    checks += [(VERDICT, name, _same_verdicts) for name in FILES if name.endswith("claims.csv")]
    tables = []
    for model, (quantity, name, measure) in itertools.product(models, checks):
        pair = [_committed(profile, model, size, name) for size in sizes]
        if all(table is not None for table in pair):
            tables.append(measure(*pair).assign(model=model, quantity=quantity))
    return pd.concat(tables, ignore_index=True).reindex(columns=COLUMNS) if tables else pd.DataFrame(columns=COLUMNS)


def missing_tables(profile: Profile, models: Iterable[str], sizes: Iterable[str]) -> list[str]:
    """The tables that the check needs and that are not committed: ``model/size/name``."""
    needed = itertools.product(models, sizes, FILES)
    return ["/".join(key) for key in needed if _committed(profile, *key) is None]


def changed_results(agreement: pd.DataFrame) -> pd.DataFrame:
    """What differs between the sizes: model, changed (side of cosine, verdict), result (the method or the claim)."""
    rows = agreement[(agreement.quantity != TAU) & (agreement.agreement == 0)]
    results = [
        row.claim.split(";")[0] if row.quantity == VERDICT else f"{row.kind}, {row.n_dropped:.0f} dropped by {_label(row)}"
        for row in rows.itertuples()
    ]
    return rows[["model"]].assign(changed=rows.quantity.str.removeprefix("same "), result=results).reset_index(drop=True)


def _label(row: NamedTuple) -> str:
    return Method(row.metric, row.rule, row.first_token).label


def headline(agreement: pd.DataFrame, sizes: Iterable[str]) -> str:
    """The mean of Kendall's tau over all rankings, with its interval."""
    taus = agreement[agreement.quantity == TAU].agreement
    if taus.empty:
        return f"No model has rankings at the sizes {' and '.join(sizes)}."
    tau = mean_interval(taus)
    return (
        f"Kendall's tau between the rankings at the sizes {' and '.join(sizes)} is {tau:.3f} on average over {len(taus)} rankings."
    )


def size_sentences(agreement: pd.DataFrame) -> list[str]:
    """Sentences: the agreement of each model."""
    lines = []
    for model, rows in agreement.groupby("model", sort=False):
        values = {quantity: part.agreement for quantity, part in rows.groupby("quantity")}
        counts = [
            f"{quantity} {values[quantity].sum():.0f} of {len(values[quantity])}"
            for quantity in (SIDE, VERDICT)
            if quantity in values
        ]
        taus = [f"{TAU} {values[TAU].mean():.2f} on average, {values[TAU].min():.2f} at least"] if TAU in values else []
        lines.append(f"{model}: {'; '.join(taus + counts)}.")
    return lines


def _committed(profile: Profile, model: str, size: str, name: str) -> pd.DataFrame | None:
    """A table of a run with the text and seed of this one."""
    return profile.committed(name, replace(profile, size=size).folder.split("/")[1], model)


def _ranking_taus(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau between the rankings of every kind and metric."""
    keys = ["kind", "metric", "first_token"]
    pairs = left.merge(right, on=[*keys, "layer"])
    taus = pairs.groupby(keys)[["importance_x", "importance_y"]].apply(
        lambda rows: rows.importance_x.corr(rows.importance_y, "kendall")
    )
    return taus.rename("agreement").reset_index()


def _same_sides(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Whether a method costs more than cosine at both sizes, or at neither."""
    keys = ["kind", "n_dropped", "metric", "rule", "first_token"]
    pairs = left[left.rule != "random"].merge(right, on=keys)
    cosine = pairs[(pairs.metric == "cosine") & (pairs.rule == "one-shot")]
    rows = pairs.drop(cosine.index).merge(
        cosine[["kind", "n_dropped", "nll_x", "nll_y"]], on=["kind", "n_dropped"], suffixes=("", "_cosine")
    )
    same = np.sign(rows.nll_x - rows.nll_x_cosine) == np.sign(rows.nll_y - rows.nll_y_cosine)
    return rows[keys].assign(agreement=same.astype(float))


def _same_verdicts(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Whether a claim gets the same verdict."""
    pairs = left.merge(right, on="claim")
    return pairs[["claim"]].assign(agreement=(pairs.verdict_x == pairs.verdict_y).astype(float))

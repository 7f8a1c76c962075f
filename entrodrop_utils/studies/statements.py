"""The paper's statements about entropy and redundancy, each as a number that exceeds zero where the statement holds for a model."""

from collections.abc import Iterable, Mapping

import pandas as pd

from ..profile import Profile
from ..statistics import interval_text
from .architectures import ENTROPY_NAMES, not_measured

STATEMENT_COLUMNS = ["claim", "family", "weights", "measured", "low", "high", "verdict"]
COST_WORDS = "beats cosine|more redundant"  # in the statements about costs, at any fraction
ESTIMATORS = {metric: ENTROPY_NAMES[metric, True] for metric in ("bucket", "knn")}


def cost_statements(fraction: float = 0.375) -> dict[str, tuple[str, ...]]:
    """The statements about costs, each with the words by which its claim is recognised in the table of notebook 02 or A2."""
    share = f"{100 * fraction:.3g}%"
    beats = {
        f"{name} beats cosine at {share} of attention layers": (metric, "cosine", share) for metric, name in ESTIMATORS.items()
    }
    redundant = {
        f"attention is more redundant than MLPs at {share} by {name}": (metric, "MLP", share) for metric, name in ESTIMATORS.items()
    }
    return beats | redundant


def cost_claims(profile: Profile, model: str, fraction: float = 0.375) -> list[dict[str, object]]:
    """The claims about costs of a model, from its notebook 02 (a decoder) or A2 (an encoder); empty where neither has run."""
    table, rows = profile.first_committed(model, "02_claims.csv", "A2_claims.csv"), []
    for text, words in cost_statements(fraction).items() if table is not None else ():
        matches = [row for row in table.to_dict("records") if all(word.lower() in row["claim"].lower() for word in words)]
        rows += [{**row, "claim": text} for row in matches[:1]]
    return rows


def statement_rows(claims: Iterable[Mapping[str, object]], family: str, weights: str = "trained") -> pd.DataFrame:
    """Claims, without their quantities, as statements about a family: claim, family, weights, measured, low, high, verdict."""
    table = pd.DataFrame(claims, columns=["claim", "measured", "low", "high", "verdict"])
    return table.assign(claim=table.claim.str.split(";").str[0], family=family, weights=weights)[STATEMENT_COLUMNS]


def committed_statements(profile: Profile, models: Iterable[str], name: str, fraction: float = 0.375) -> pd.DataFrame:
    """The statements about the trained models other than ``name``, from their notebooks 06, and 02 or A2."""
    tables = []
    for model in not_measured(models, [name]):
        table = profile.first_committed(model, "06_statements.csv")
        if table is not None:
            own = table[(table.family == model) & (table.weights == "trained") & ~table.claim.str.contains(COST_WORDS)]
            tables += [own[STATEMENT_COLUMNS], statement_rows(cost_claims(profile, model, fraction), model)]
    return pd.concat(tables, ignore_index=True) if tables else statement_rows([], "")


def missing_costs(statements: pd.DataFrame, models: Iterable[str], fraction: float = 0.375) -> list[str]:
    """The statements about costs at this fraction that no committed table of a model has, as ``model: statement``."""
    measured = set(zip(statements.family, statements.claim, strict=True))
    return [f"{model}: {text}" for model in models for text in cost_statements(fraction) if (model, text) not in measured]


def statement_table(statements: pd.DataFrame) -> pd.DataFrame:
    """Verdict, value and interval of every statement (rows) about every family (columns)."""
    intervals = interval_text(statements, ["measured", "low", "high"], ".3g")
    values = [f"{verdict}: {interval}" for verdict, interval in zip(statements.verdict, intervals, strict=True)]
    table = statements.assign(value=values)
    table = table.pivot_table(index="claim", columns="family", values="value", aggfunc="first", sort=False)
    return table.astype(object).fillna("not measured")


def statement_sentences(statements: pd.DataFrame) -> list[str]:
    """Sentences: how many statements hold for each family, and which hold for every family or for none."""
    verdicts = statements.pivot_table(index="claim", columns="family", values="verdict", aggfunc="first", sort=False)
    counts = [f"{(column == 'holds').sum()} of {column.count()} for {family}" for family, column in verdicts.items()]
    judged = verdicts.dropna()
    everywhere, nowhere = (list(judged.index[(judged == value).all(axis=1)]) for value in ("holds", "does not hold"))
    return [
        f"Statements that hold: {', '.join(counts)}.",
        f"Statements that hold for all of these models: {'; '.join(everywhere) or 'none'}.",
        f"Statements that hold for none of them: {'; '.join(nowhere) or 'none'}.",
    ]

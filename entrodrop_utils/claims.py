"""The claims of the paper with their verdicts: one row per claim, and the ledger, which judges each on its strongest evidence."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from .paths import PUBLISHED
from .statistics import Interval, mean_interval, verdict

COLUMNS = ("claim", "source", "published", "measured", "low", "high", "goal", "verdict", "evidence")
MEASURED = "; measured: "  # between a claim and its quantity
BENCHMARKS, HELD_OUT, HOME_MADE, CALIBRATION = EVIDENCE = (  # strongest first; home-made tasks have a few dozen items
    "public benchmarks",
    "held-out text",
    "home-made tasks",
    "calibration text",
)
SIZES = ("paper", "full", "default", "large", "xlarge")  # of runs, the one with more text, then more draws, first
SUMMARY = {  # claim of the front page -> pattern of the claim in a ledger; the strongest evidence counts
    "bucket entropy falls, then rises": r"^bucket entropy falls.*then rises(?!.*without)",
    "KNN entropy falls, then rises": r"^knn entropy falls.*then rises(?!.*without)",
    "bucket chooses attention layers better than cosine": r"^bucket.* beats cosine at 37\.5%",
    "KNN chooses attention layers better than cosine": r"^knn.* beats cosine at 37\.5%",
    "bucket chooses attention layers better than chance": r"^bucket beats random choices at 37\.5%",
    "95% of accuracy stays without 37.5% of attention (bucket)": r"37\.5%.*by bucket keeps 95% of accuracy$",
    "attention is more redundant than MLPs": r"^attention is more redundant than MLPs? .*by bucket",
}
ROUNDING = 1e-12  # less than this is the rounding of a sum that is 0
ANSWERS = {"holds": "yes", "does not hold": "no", "inconclusive": "undecided", "single step": "no: one step"}


def claim(
    text: str,
    source: str,
    values: Float[np.ndarray, " unit"],
    goal: float = 0.0,
    published: str = "",
    evidence: str = "",
) -> dict[str, object]:
    """A claim that the mean of paired values exceeds a goal. It holds when the whole 95% interval exceeds the goal.

    Args:
        text: the claim, and after "measured:" the quantity.
        source: the part of the paper that makes it.
        values: one value per resampled unit (window, item, draw).
        published: the paper's value.
        evidence: what it was measured on: a kind of ``EVIDENCE``, a colon, and the amount.
    Returns:
        claim, source, published, measured, low, high, goal, verdict (holds, does not hold, inconclusive), evidence.
    """
    return claim_row(text, source, published, mean_interval(values), goal, evidence)


def claim_row(
    text: str, source: str, published: str, measured: Interval, goal: float = 0.0, evidence: str = ""
) -> dict[str, object]:
    """The same row for a quantity whose interval was computed in another way."""
    estimate, low, high = (0.0 if abs(value) < ROUNDING else value for value in measured)
    values = (text, source, published, estimate, low, high, goal, verdict(low, high, goal), evidence)
    return dict(zip(COLUMNS, values, strict=True))


def join_claims(results: Path) -> None:
    """Write ``claims.csv`` of a run from the claims of its notebooks, in their order."""
    parts = sorted(results.glob("[0-9A][0-9]_claims.csv"))
    if parts:
        joined = pd.concat([pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts])
        joined.reindex(columns=COLUMNS).to_csv(results / "claims.csv", index=False, lineterminator="\n")


def ledger(results: Path) -> pd.DataFrame:
    """Every claim about a model once, judged on its strongest evidence: by the kind (``EVIDENCE``), then by the run (``SIZES``).

    Args:
        results: the folder of the model, with a ``claims.csv`` in the folder of each size.
    Returns:
        ``COLUMNS`` with the quantity in a column of its own, size, and disagrees (the weaker evidence whose verdict is another).
    """
    files = {size: results / size / "claims.csv" for size in SIZES}
    tables = [pd.read_csv(file, keep_default_na=False).assign(size=size) for size, file in files.items() if file.is_file()]
    if not tables:
        return pd.DataFrame(columns=[*COLUMNS, "quantity", "size", "disagrees"])
    rows = pd.concat(tables, ignore_index=True).fillna("")
    rows[["claim", "quantity"]] = rows.claim.str.split(MEASURED, n=1, expand=True).reindex(columns=[0, 1]).fillna("")
    rows = _strongest_first(rows).rename_axis("place").reset_index()  # SIZES are in order already
    judged = [_judged(group) for _, group in rows.groupby("claim", sort=False)]
    return pd.DataFrame(judged).sort_values("place", ignore_index=True)[[*COLUMNS, "quantity", "size", "disagrees"]]


def _strongest_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Claims by the kind of their evidence, and in their own order where it is the same."""
    kinds = rows.evidence.str.partition(":")[0]
    rank = kinds.map({kind: place for place, kind in enumerate(EVIDENCE)}).fillna(len(EVIDENCE))
    return rows.loc[rank.sort_values(kind="stable").index]


def _judged(rows: pd.DataFrame) -> dict[str, object]:
    """The first of the rows about one claim, with those whose verdict is another as text; two runs on the same evidence are one."""
    different = rows.drop_duplicates(["quantity", "evidence", "measured"])
    others = different[different.verdict != rows.verdict.iloc[0]].itertuples()
    texts = (f"{row.verdict} by {row.quantity} on {row.evidence or row.size}: {value_text(row)}" for row in others)
    return rows.iloc[0].to_dict() | {"place": rows.place.min(), "disagrees": "; ".join(texts)}


def value_text(row) -> str:
    """Estimate and interval of a row of claims, with three digits; the estimate alone where there is no interval."""
    return f"{Interval(*pd.to_numeric(pd.Series([row.measured, row.low, row.high]))):.3g}"


def summary(ledgers: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The claims of ``SUMMARY`` (rows) for every model (columns): yes, no, undecided, each with its kind of evidence, or a dash."""
    return pd.DataFrame(
        {model: [_answer(rows, pattern) for pattern in SUMMARY.values()] for model, rows in ledgers.items()}, list(SUMMARY)
    )


def _answer(rows: pd.DataFrame, pattern: str) -> str:
    """The answer of the claim that fits, that on the strongest evidence where there are several."""
    fitting = rows[rows.claim.str.contains(pattern, flags=re.IGNORECASE)]
    if fitting.empty:
        return "–"
    first = _strongest_first(fitting).iloc[0]
    kind = first.evidence.partition(":")[0].removesuffix(" text")
    return ANSWERS[first.verdict] + (f" ({kind})" if kind else "")


def published_figures(name: str) -> pd.DataFrame:
    """A table of figures that others published (``data/published/<name>.csv``), each with its source.

    Raises:
        ValueError: no such table, with the list of those that exist.
    """
    path = PUBLISHED / f"{name}.csv"
    if not path.is_file():
        tables = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.csv")))
        raise ValueError(f"no table {name!r} in data/published: there are {tables}")
    return pd.read_csv(path)


def published_lists() -> pd.DataFrame:
    """The published lists of dropped layers of other models: the columns of ``others``, and layers, in the order of the list."""
    table = published_figures("others").astype({"value": str})
    lists = table[table.metric.isin(["first dropped first", "layers"]) & table.value.str.fullmatch(r"[\d ]+")]
    return lists.assign(layers=[[int(layer) for layer in value.split()] for value in lists.value]).astype({"n_total": int})

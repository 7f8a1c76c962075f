"""The claims of the paper with their verdicts: one row per claim, the same columns in every notebook."""

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from .paths import PUBLISHED
from .statistics import Interval, mean_interval, verdict

COLUMNS = ("claim", "source", "published", "measured", "low", "high", "verdict")


def claim(
    text: str, source: str, values: Float[np.ndarray, "unit"], goal: float = 0.0, published: str = "", seed: int = 0
) -> dict[str, object]:
    """A claim that the mean of paired values exceeds a goal. It holds when the whole 95% interval exceeds the goal.

    Args:
        text: the claim, and after "measured:" the quantity.
        source: the part of the paper that makes it.
        values: one value per resampled unit (window, item, draw).
        published: the paper's value.
    Returns:
        claim, source, published, measured, low, high, verdict (holds, does not hold, inconclusive).
    """
    return claim_row(text, source, published, mean_interval(values, seed), goal)


def claim_row(text: str, source: str, published: str, measured: Interval, goal: float = 0.0) -> dict[str, object]:
    """The same row for a quantity whose interval was computed in another way."""
    values = (text, source, published, *measured, verdict(measured.low, measured.high, goal))
    return dict(zip(COLUMNS, values, strict=True))


def join_claims(results: Path) -> None:
    """Write ``claims.csv`` of a run from the claims of its notebooks, in their order."""
    parts = sorted(results.glob("[0-9][0-9]_claims.csv"))
    if parts:
        joined = pd.concat([pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts])
        joined.reindex(columns=COLUMNS).to_csv(results / "claims.csv", index=False, lineterminator="\n")


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

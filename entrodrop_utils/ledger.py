"""The paper's claims with their verdicts: one row a claim, the same columns in every notebook."""

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from .profiles import DATA
from .scoring import bootstrap, verdict

PUBLISHED = DATA / "published"
COLUMNS = ("claim", "source", "published", "measured", "low", "high", "verdict")


def claim(
    text: str, source: str, values: Float[np.ndarray, "unit"], goal: float = 0.0, published: str = "", seed: int = 0
) -> dict[str, object]:
    """A claim that the mean of paired values exceeds a goal: it holds when the whole 95% bootstrap interval does.

    Args:
        text: the claim, and after "measured:" what the number is.
        source: where the paper makes it.
        values: one value per unit that is resampled (window, item, draw).
        published: the paper's own value.
    Returns:
        claim, source, published, measured, low, high, verdict (holds, does not hold, inconclusive).
    """
    low, high = np.percentile(bootstrap(values, seed=seed), [2.5, 97.5])
    return row(text, source, published, float(np.mean(values)), float(low), float(high), verdict(low, high, goal))


def row(text: str, source: str, published: str, measured: float, low: float, high: float, judged: str) -> dict[str, object]:
    """The same columns for a claim whose interval was found in another way."""
    return dict(zip(COLUMNS, (text, source, published, measured, low, high, judged), strict=True))


def join(results: Path) -> None:
    """Write ``claims.csv`` of a run's results from the claims of its notebooks, in their order."""
    parts = sorted(results.glob("[0-9][0-9]_claims.csv"))
    if parts:
        joined = pd.concat([pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts])
        joined.reindex(columns=COLUMNS).to_csv(results / "claims.csv", index=False, lineterminator="\n")


def published(name: str) -> pd.DataFrame:
    """A table of figures that others published (``data/published/<name>.csv``), each with its source.

    Raises:
        ValueError: no such table, with the list of those that there are.
    """
    path = PUBLISHED / f"{name}.csv"
    if not path.is_file():
        raise ValueError(
            f"no table {name!r} in data/published: there are {', '.join(sorted(p.stem for p in PUBLISHED.glob('*.csv')))}"
        )
    return pd.read_csv(path)

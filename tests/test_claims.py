"""Claims: the verdict follows from the interval, and the claims of a run's notebooks make one table."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entrodrop_utils import claims
from entrodrop_utils.statistics import Interval


@pytest.mark.parametrize(("goal", "verdict"), [(0.0, "holds"), (0.9, "inconclusive"), (3.0, "does not hold")])
def test_the_verdict_follows_from_the_interval(goal, verdict):
    values = np.random.default_rng(0).normal(1, 1, 400)
    row = claims.claim("a is b; measured: c", "abstract", values, goal, "> 0.95")
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / 20)
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.02)
    assert row["measured"] == pytest.approx(values.mean())
    assert (row["verdict"], row["published"], row["source"]) == (verdict, "> 0.95", "abstract")


def test_parts_are_joined_in_order_as_they_are_written(tmp_path):
    claims.join_claims(tmp_path)
    assert not list(tmp_path.iterdir())
    for number in ("02", "01"):
        rows = [claims.claim_row(f"claim of {number}", "abstract", "", Interval(0.123456789, 1 / 3, 1.0))]
        pd.DataFrame(rows).to_csv(tmp_path / f"{number}_claims.csv", index=False, float_format="%.6g")
    claims.join_claims(tmp_path)
    lines = (tmp_path / "claims.csv").read_text().splitlines()
    assert lines[0] == "claim,source,published,measured,low,high,verdict"
    assert lines[1:] == [f"claim of {n},abstract,,0.123457,0.333333,1,holds" for n in ("01", "02")]


def test_an_unknown_published_table_is_named_with_those_there_are():
    assert {"source", "model", "value"} <= set(claims.published_figures("others").columns)
    with pytest.raises(ValueError, match="no table 'nobody' in data/published: there are .*others"):
        claims.published_figures("nobody")

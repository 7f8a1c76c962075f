"""Claims: the verdict follows from the interval, and the claims of a run's notebooks make one table."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entrodrop_utils import claims
from entrodrop_utils.paths import RESULTS, ROOT
from entrodrop_utils.runner import index
from entrodrop_utils.statistics import Interval, verdict


@pytest.mark.parametrize(("goal", "verdict"), [(0.0, "holds"), (0.9, "inconclusive"), (3.0, "does not hold")])
def test_the_verdict_follows_from_the_interval(goal, verdict):
    values = np.random.default_rng(0).normal(1, 1, 400)
    row = claims.claim("a is b; measured: c", "abstract", values, goal, "> 0.95")
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / 20)
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.02)
    assert row["measured"] == pytest.approx(values.mean())
    assert (row["verdict"], row["published"], row["source"]) == (verdict, "> 0.95", "abstract")


def test_the_rounding_of_a_sum_that_is_zero_decides_nothing():
    row = claims.claim_row("a", "b", "", Interval(0.2, -4e-17, 0.4))
    assert (row["measured"], row["low"], row["high"], row["verdict"]) == (0.2, 0, 0.4, "inconclusive")
    assert claims.claim_row("a", "b", "", Interval(0.2, 4e-17, 0.4)) == row


def test_parts_are_joined_in_order_as_they_are_written(tmp_path):
    claims.join_claims(tmp_path)
    assert not list(tmp_path.iterdir())
    for number in ("02", "01"):
        rows = [claims.claim_row(f"claim of {number}", "abstract", "", Interval(0.123456789, 1 / 3, 1.0))]
        pd.DataFrame(rows).to_csv(tmp_path / f"{number}_claims.csv", index=False, float_format="%.6g")
    claims.join_claims(tmp_path)
    lines = (tmp_path / "claims.csv").read_text().splitlines()
    assert lines[0] == "claim,source,published,measured,low,high,goal,verdict,evidence"
    assert lines[1:] == [f"claim of {n},abstract,,0.123457,0.333333,1,0,holds," for n in ("01", "02")]


def test_an_unknown_published_table_is_named_with_those_there_are():
    assert {"source", "model", "value"} <= set(claims.published_figures("others").columns)
    with pytest.raises(ValueError, match="no table 'nobody' in data/published: there are .*others"):
        claims.published_figures("nobody")


def test_a_claim_is_judged_on_its_strongest_evidence(tmp_path):
    rows = {
        "default": [
            ("a; measured: x", -1, "held-out text: 3 windows"),
            ("a; measured: y", 2, "public benchmarks: 1 task"),
            ("b", 1, ""),
        ],
        "paper": [
            ("a; measured: x", -2, "held-out text: 9 windows"),
            ("a; measured: z", 3, "home-made tasks: 1 task"),
            ("b", -1, ""),
            ("c; measured: z", 0.1, "home-made tasks: 70 items"),
            ("c; measured: x", -1, "held-out text: 9 windows"),
        ],
        "full": [("a; measured: x", -1, "held-out text: 3 windows")],
    }
    for size, parts in rows.items():
        (tmp_path / size).mkdir()
        made = [claims.claim_row(text, "s", "", Interval(v, v - 0.5, v + 0.5), 0.0, evidence) for text, v, evidence in parts]
        pd.DataFrame(made).to_csv(tmp_path / size / "claims.csv", index=False)
    table = claims.ledger(tmp_path).set_index("claim")
    assert list(table.index) == ["a", "b", "c"]
    assert table.loc["a", ["quantity", "verdict", "evidence"]].tolist() == ["y", "holds", "public benchmarks: 1 task"]
    assert table.disagrees["a"].split("; ") == [
        "does not hold by x on held-out text: 9 windows: -2 [-2.5, -1.5]",
        "does not hold by x on held-out text: 3 windows: -1 [-1.5, -0.5]",
    ]
    assert table.loc["c", ["verdict", "disagrees"]].tolist() == [
        "does not hold",
        "inconclusive by z on home-made tasks: 70 items: 0.1 [-0.4, 0.6]",
    ]
    assert table.loc["b", ["size", "verdict"]].tolist() == ["paper", "does not hold"]


COMMITTED = sorted(RESULTS.glob("*/*/[0-9A][0-9]_claims.csv"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: "-".join(file.relative_to(RESULTS).parts))
def test_every_verdict_follows_from_its_numbers_and_changes_with_them(file):
    table = pd.read_csv(file, dtype=dict.fromkeys(["measured", "low", "high", "goal"], float))
    assert table.evidence.str.startswith(claims.EVIDENCE).all()
    by_stages = table.claim.str.contains("falls, then rises")  # tests/test_curves.py recomputes these from the stages
    for row in table[~by_stages].itertuples():
        assert row.verdict == verdict(row.low, row.high, row.goal), row.claim
        if np.isnan(row.low):  # without an interval, no verdict
            assert row.verdict == "inconclusive"
            continue
        assert row.low <= row.measured <= row.high
        for shift in (row.goal - row.high - 1, row.goal - row.low + 1):
            assert verdict(row.low + shift, row.high + shift, row.goal) == (
                "holds" if row.low + shift > row.goal else "does not hold"
            )


COMPARED = sorted(file.parent for file in RESULTS.glob("*/*/02_differences.csv"))


@pytest.mark.parametrize("folder", COMPARED, ids=lambda folder: "-".join(folder.relative_to(RESULTS).parts))
def test_differences_and_places_in_the_claims_are_those_of_their_tables(folder):
    table, differences = (pd.read_csv(folder / f"02_{name}.csv") for name in ("claims", "differences"))
    one_shot = differences[(differences.kind == "attention") & (differences.rule == "one-shot") & differences.first_token]
    counts = dict(zip(("25%", "37.5%"), sorted(one_shot.n_dropped.unique())[-2:], strict=True))
    places = pd.read_csv(folder / "02_random.csv") if (folder / "02_random.csv").is_file() else None
    for metric, (share, n) in itertools.product(("bucket", "knn"), counts.items()):
        row = table[table.claim.str.startswith(f"{metric} beats cosine at {share}")].iloc[0]
        other = one_shot[(one_shot.metric == metric) & (one_shot.n_dropped == n)].iloc[0]
        assert [row.measured, row.low, row.high] == pytest.approx([-other.difference, -other.high, -other.low])
        if places is not None:
            row = table[table.claim.str.startswith(f"{metric} beats random choices at {share}")].iloc[0]
            rows = places[(places.kind == "attention") & (places.metric == metric) & (places.n_dropped == n) & places.first_token]
            other = rows[rows.rule == "one-shot"].iloc[0]
            assert [row.measured, row.low, row.high] == [other.share, other.low, other.high]


def test_claims_have_the_numbers_of_their_tables():
    folder = RESULTS / "smollm2-135m-instruct"
    for size in ("default", "paper"):
        table, accuracy = (pd.read_csv(folder / size / f"04_{name}.csv") for name in ("claims", "accuracy"))
        row = table[table.claim == "dropping 37.5% of attention layers by bucket keeps 95% of accuracy; measured: retention"].iloc[
            0
        ]
        rows = accuracy[(accuracy.task == "mean") & (accuracy.metric == "bucket") & (accuracy.rule == "one-shot")]
        other = rows[(rows.kind == "attention") & (rows.n_dropped == 11)].iloc[0]
        assert [row.measured, row.low, row.high] == [other.retention, other.retention_low, other.retention_high]


def test_the_front_page_answers_on_the_strongest_evidence():
    texts = {
        "attention is more redundant than MLPs (37.5% by bucket)": -1,
        "attention is more redundant than MLP (25% by bucket)": 2,
    }
    evidence = ("held-out text: 9 windows", "public benchmarks: 1 task")
    rows = [
        claims.claim_row(t, "s", "", Interval(v, v - 0.5, v + 0.5), 0.0, e)
        for (t, v), e in zip(texts.items(), evidence, strict=True)
    ]
    for order in (rows, rows[::-1]):
        assert claims.summary({"m": pd.DataFrame(order)}).m.iloc[-1] == "yes (public benchmarks)"


def test_the_front_page_and_the_ledger_are_those_of_the_committed_claims():
    ledgers = index.committed_ledgers()
    assert index.summary_text(ledgers) in (ROOT / "README.md").read_text()
    for rows in ledgers.values():
        assert index.ledger_text(rows) in (ROOT / "data" / "README.md").read_text()
    assert set(claims.summary(ledgers)["smollm2-135m-instruct"].str.partition(" (")[0]) <= {*claims.ANSWERS.values()}

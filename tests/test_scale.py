"""The claims by size: what is read from committed tables, and the words that follow from the verdicts."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from entrodrop_utils.models import KNOWN
from entrodrop_utils.paths import RESULTS
from entrodrop_utils.profile import Profile
from entrodrop_utils.studies import scale


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["holds", "holds"], "holds for all"),
        (["holds", "inconclusive", "does not hold"], "holds for 1 of 3"),
        (["does not hold", "single step"], "holds for none"),
        (["does not hold", "inconclusive"], "not shown for any"),
    ],
)
def test_the_verdict_over_models_follows_from_those_of_each(verdicts, words):
    assert scale.overall(verdicts) == words


def test_statements_are_those_of_the_committed_claims():
    models = scale.models_by_size()
    assert list(models) == sorted(models, key=lambda model: KNOWN[model]["parameters"]) and len(models) > 1
    statements = scale.statements_by_size(Profile(), models)
    for row in statements.itertuples():
        files = [RESULTS / row.model / size / "claims.csv" for size in scale.RUNS]
        runs = [pd.read_csv(file) for file in files if file.is_file()]
        fitting = [run[run.claim.str.contains(scale.STATEMENTS[row.statement], case=False)] for run in runs]
        strongest = next(claims for claims in fitting if len(claims)).iloc[0]
        assert (strongest.measured, strongest.verdict) == (row.measured, row.verdict)
    table = scale.verdict_table(statements)
    assert set(table.columns) == {*models, "over the models"}
    text = " ".join(scale.scale_sentences(statements, pd.DataFrame()))
    assert all(statement in text for statement in table.index)


def test_statements_on_another_text_stand_beside_those_of_the_same_run(tmp_path, monkeypatch):
    claims = ["bucket entropy falls, then rises; measured: x", "knn beats cosine at 37.5% of attention layers; measured: nats"]
    runs = {"large": ("holds", "holds"), "large-c4": ("holds", "inconclusive"), "smoke-c4": ("holds", "holds")}
    for folder, verdicts in runs.items():
        (tmp_path / "a" / folder).mkdir(parents=True)
        rows = [(claim, i, i - 1, i + 1, 0, word, "") for i, (claim, word) in enumerate(zip(claims, verdicts, strict=True))]
        table = pd.DataFrame(rows, columns=["claim", "measured", "low", "high", "goal", "verdict", "evidence"])
        table.to_csv(tmp_path / "a" / folder / "claims.csv", index=False)
    monkeypatch.setattr(scale, "RESULTS", tmp_path)
    table = scale.statements_by_text().set_index(["text", "statement"])
    assert len(table) == 4 and set(table["size"]) == {"large"}
    name = "KNN entropy beats cosine"
    assert (table.verdict["c4", name], table.verdict["docs", name]) == ("inconclusive", "holds")
    assert scale.verdicts_by_text(table.reset_index()).loc["a", name].to_dict() == {
        "docs": "holds: 1 [0, 2]",
        "c4": "inconclusive: 1 [0, 2]",
    }
    words = "judged on docs and c4, 1 of 2 statements have different verdicts: KNN entropy beats cosine."
    assert words in scale.text_sentence(table.reset_index())


def test_the_finding_counts_the_verdicts_and_quotes_the_largest_model():
    values = [
        ("bucket", "a", "does not hold", -0.2),
        ("KNN", "a", "inconclusive", 0.0),
        ("bucket", "b", "holds", 0.3),
        ("KNN", "b", "holds", 0.5),
    ]
    rows = [(f"{metric} entropy beats cosine", model, verdict, v, v - 0.1, v + 0.1) for metric, model, verdict, v in values]
    statements = pd.DataFrame(rows, columns=["statement", "model", "verdict", "measured", "low", "high"])
    sentence = "At 37.5% of attention, entropy loses to cosine in 1 of 4 cases and wins in 2 (b); in the largest model KNN saves "
    assert scale.cosine_sentence(statements) == sentence + "0.50 [0.40, 0.60] nats."


def test_the_order_of_methods_is_compared_by_counting_pairs():
    costs = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 3.0, 2.0, np.nan], "c": [3.0, 2.0, 1.0, 0.0]})
    taus = scale.order_agreement(costs).set_index("models")
    for left, right in combinations(costs, 2):
        pair = costs[[left, right]].dropna().to_numpy()
        signs = [np.sign((x[0] - y[0]) * (x[1] - y[1])) for x, y in combinations(pair, 2)]
        assert taus.loc[f"{left}, {right}"].tolist() == pytest.approx([len(pair), np.mean(signs)])
    none = pd.DataFrame(columns=["statement", "model", "verdict"])
    (line,) = scale.scale_sentences(none, taus.reset_index())
    assert line == "Kendall's tau of the order of methods over 3 pairs of models: -1.00 (a, c) to 0.33 (a, b)."


def test_the_published_table_keeps_less_than_its_abstract_says():
    table = scale.published_retention().set_index(["method", "n_dropped"])
    assert table.retention["EntroDrop", 12] == pytest.approx(0.5467 / 0.5872)
    assert table.retention["LLM-Drop (cosine)", 12] == table.retention["EntroDrop", 12] < 0.95
    assert table.note.str.contains("unverified").all()


def test_measured_retention_is_that_of_the_committed_claims():
    """Of the metrics that have a claim, and guessing is the mean chance over the dense mean of the same table."""
    models = scale.models_by_size()
    measured = scale.measured_retention(Profile(), models)
    for model, rows in measured.groupby("model"):
        folder = next(
            RESULTS / model / size for size in scale.BENCHMARK_RUNS if (RESULTS / model / size / "04_claims.csv").is_file()
        )
        claims = pd.read_csv(folder / "04_claims.csv").set_index("claim")
        for row in rows[(rows.rule == "one-shot") & rows.metric.isin(["bucket", "knn", "cosine"])].itertuples():
            text = f"dropping 37.5% of attention layers by {row.metric} keeps 95% of accuracy; measured: retention"
            claim = claims.loc[text, ["measured", "low", "high"]]
            assert [row.retention, row.retention_low, row.retention_high] == pytest.approx(claim.tolist(), abs=1e-5)
        dense = pd.read_csv(folder / "04_accuracy.csv").query("metric == 'dense' and task == 'mean'").iloc[0]
        assert rows.guessing.unique().tolist() == [pytest.approx(dense.chance / dense.value)]
    assert all(line.endswith("%.") for line in scale.retention_lines(measured)) and len(measured)

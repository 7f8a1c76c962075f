"""Proposals for lazy greedy: the table against plain losses of plain searches, the sentences against loops over the table."""

import json
import math

import numpy as np
import pytest
from test_confirmation import on_a_tiny_model, plain_losses, text_of
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.studies import proposals as study


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with on_a_tiny_model(study, folder, (2, 30), (3, 30)):
        table = study.proposals("tiny", 2, {"attention": [0.34]}, 4)
        record = json.loads((folder / "tiny" / "confirm" / "07_proposals_run.json").read_text())
        return table, study.committed_proposals(), record


@pytest.mark.parametrize("name", ["cosine", "at random"])
def test_a_proposal_is_searched_by_lazy_greedy_and_judged_by_plain_losses(measured, name):
    table, model, n = measured[0], tiny_llama(), 2
    losses, spent = {"own": [], "all": []}, []
    held = text_of("docs", "evaluation", None, 4, 14)
    for draw in (0, 1):
        short, long = (text_of("docs", "calibration", None, *amount, draw) for amount in ((2, 30), (3, 30)))
        scored = search.by_score(model, long) if name == "cosine" else search.random_draw(model, short, seed=[draw])
        chosen = search.lazy_greedy(model, short, n, shortlist=2, among=set(scored.order[: math.ceil(1.5 * n)]))
        spent.append(scored.tokens + chosen.tokens)
        losses["own"].append(plain_losses(model, held, chosen.order))
        losses["all"].append(plain_losses(model, held, search.lazy_greedy(model, short, n).order))
    row = table[(table.domain == "docs") & (table.method == name)].iloc[0]
    assert row.tokens == pytest.approx(np.mean(spent))
    assert row.difference == pytest.approx(np.mean(losses["own"]) - np.mean(losses["all"]), abs=1e-5)
    random = table[(table.domain == "docs") & (table.method == study.AT_RANDOM)].increase.item()
    assert row.random_difference == pytest.approx(row.increase - random, abs=1e-6)


def test_the_table_is_read_again_with_what_was_run(measured):
    table, read, record = measured
    assert read.model.unique().tolist() == ["tiny"] and len(read) == len(table)
    assert read.difference.to_numpy() == pytest.approx(table.difference.to_numpy(), rel=1e-4, abs=1e-6)
    assert record["shares dropped"] == {"attention": [0.34]} and record["calibration draws"] == 2
    shown = study.proposal_table(read)
    row = table[(table.domain == "docs") & (table.method == "knn")].iloc[0]
    assert shown.loc["knn"].iloc[0] == f"{row.difference:.2f} [{row.low:.2f}, {row.high:.2f}]"
    rows = table[table.method == "knn"]
    better, worse = sum(high < 0 for high in rows.random_high), sum(low > 0 for low in rows.random_low)
    assert shown.loc["knn"].iloc[1:].tolist() == [f"{better} of 2", f"{worse} of 2", f"{rows.share.mean():.0%}"]


def test_cases_are_counted_one_by_one(measured):
    read = measured[1]
    for line, names in zip(
        study.proposal_sentences(read),
        (["bucket", "knn"], ["cosine", "norm_ratio", "cosine, short", "norm_ratio, short"]),
        strict=True,
    ):
        rows = [row for row in read.itertuples() if row.method in names]
        better, worse = sum(row.random_high < 0 for row in rows), sum(row.random_low > 0 for row in rows)
        more = sum(row.low > 0 for row in rows)
        assert f"in {better} of {2 * len(names)} cases, worse in {worse}; costlier than lazy greedy in {more}." in line

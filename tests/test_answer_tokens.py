"""Losses at the tokens of right answers: against plain forward passes, one pruned model and one answer at a time."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from reference import word_tokenizer
from scipy import stats
from test_writing import text_of
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.dropping import dropped
from entrodrop_utils.layerwise import set_name
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.studies import answer_tokens as study
from entrodrop_utils.studies import writing

ANSWERS = [("w5 w7 w9 w3", " w31 w6 w41 w40"), ("w8", " w71 w72"), ("w3 w90", " w83 w34 w61 w7 w8"), ("w3", " w4 w51 w6")]
SETS = [(), (SubBlock(1, "attention"), SubBlock(4, "attention"))]


def numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.no_grad()
def plain(drop_set) -> dict[tuple[int, int], tuple[bool, float, bool]]:
    """(item, token) -> whether it has a 1, its loss, whether it is ranked first."""
    values = {}
    with dropped(tiny_llama(), drop_set) as model:
        for item, (prompt, answer) in enumerate(ANSWERS):
            before, after = numbers(prompt), numbers(answer)
            log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            for token, number in enumerate(after):
                at = log_p[len(before) + token - 1]
                values[item, token] = "1" in f"w{number}", -float(at[number]), int(at.argmax()) == number
    return values


@pytest.fixture
def ones(monkeypatch):
    """Every word of the tokenizer has a digit, so only a 1 is one here."""
    for module in (study, writing):
        monkeypatch.setattr(module, "DIGIT", "1")


def test_every_token_is_that_of_a_plain_pass(ones):
    table = study.answer_tokens(tiny_llama(), word_tokenizer(), ANSWERS, SETS)
    for drop_set in SETS:
        values = plain(drop_set)
        rows = table[table.set == set_name(drop_set)].set_index(["item", "token"])
        assert len(rows) == len(values) == 14
        for place, (digit, nll, first) in values.items():
            row = rows.loc[place]
            assert (row.digit, row["first"]) == (digit, first) and row.nll == pytest.approx(nll, abs=1e-5)


def test_a_loss_is_of_answers_and_its_interval_over_them(ones):
    tokens = study.answer_tokens(tiny_llama(), word_tokenizer(), ANSWERS, SETS)
    dense, pruned = map(plain, SETS)
    for row, digit in zip(study.lost_tokens(tokens, SETS[1]), (True, False), strict=True):
        places = [place for place, (is_digit, *_) in dense.items() if is_digit == digit]
        items = sorted({item for item, _ in places})
        increases = [np.mean([pruned[i, t][1] - dense[i, t][1] for i, t in places if i == item]) for item in items]
        assert (row["items"], row["count"]) == (len(items), len(places))
        assert row["increase"] == pytest.approx(np.mean(increases), abs=1e-5)
        ends = stats.ttest_1samp(increases, 0).confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((ends.low, ends.high), abs=1e-4)


def test_what_is_lost_is_what_the_dense_model_had():
    digit = [(0, 0, True), (0, 1, True), (0, 2, True), (1, 0, True), (1, 1, False), (1, 2, False)]
    first = {"": (True, True, False, True, True, True), set_name(SETS[1]): (True, False, True, False, True, True)}
    rows = [(name, *where, 0.1, hit) for name, hits in first.items() for where, hit in zip(digit, hits, strict=True)]
    tokens = pd.DataFrame(rows, columns=["set", "item", "token", "digit", "nll", "first"])
    digits, others = study.lost_tokens(tokens, SETS[1])
    assert (digits["tokens"], others["tokens"]) == ("digits", "other tokens")
    assert digits["lost"] == pytest.approx((1 / 2 + 1) / 2) and others["lost"] == 0  # one of two, and the only one
    assert 0 <= digits["lost_low"] <= digits["lost_high"] <= 1
    (words,) = study.lost_tokens(tokens[~tokens.digit].assign(first=False), SETS[1])
    assert words["tokens"] == "other tokens" and np.isnan(words["lost"])


def test_the_table_has_the_choice_of_every_method(ones, tmp_path, monkeypatch):
    asked = []
    for name, value in {
        "load_model": lambda name, dtype="float32": asked.append(dtype) or (tiny_llama(), word_tokenizer()),
        "worked_answers": lambda task, items: asked.append((task, items)) or ANSWERS[:items],
        "windows": text_of,
        "RESULTS": tmp_path,
        "SCORED": (2, 40),
    }.items():
        monkeypatch.setattr(study, name, value)
    for name, value in {"windows": text_of, "SEARCHED": (2, 12), "REPEATED_TEXT": (2, 9)}.items():
        monkeypatch.setattr(writing, name, value)
    study.main(["tiny", "--task", "sums", "--items", "3", "--text", "a/sums.txt", "--fractions", "0.34", "--precision", "float32"])
    table = pd.read_csv(tmp_path / "tiny" / study.FILE)
    assert asked == ["float32", ("sums", 3), "float32"]
    searches = ["lazy greedy", "lazy greedy, repeated text", "lazy greedy, sums", "lazy greedy, digits of sums"]
    assert table.metric.tolist() == [name for name in ("cosine", "bucket", *searches) for _ in range(2)]
    order = search.lazy_greedy(tiny_llama(), text_of("", "calibration", None, 2, 12), 2, "attention").order
    tokens = study.answer_tokens(tiny_llama(), word_tokenizer(), ANSWERS[:3], [(), tuple(sorted(order))])
    rows = table[table.metric == "lazy greedy"].to_dict("records")
    for row, expected in zip(rows, study.lost_tokens(tokens, tuple(sorted(order))), strict=True):
        assert row["tokens"] == expected.pop("tokens")
        assert [row[name] for name in expected] == pytest.approx([*expected.values()], rel=1e-4, abs=1e-6, nan_ok=True)
        assert row["dropped"] == " ".join(str(s.layer) for s in sorted(order)) and row["n_layers"] == 6
    record = json.loads((tmp_path / "tiny" / "answer_tokens_run.json").read_text())
    assert (record["task"], record["items"], record["search text"]) == ("sums", 3, "sums.txt") and len(record["texts"]) == 4


def test_every_model_and_method_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "RESULTS", tmp_path)
    for model, shift in {"a": 0.0, "b": 0.5}.items():
        rows = [
            (method, n, 24, kind, 4, 200 if kind == "digits" else 90, value, value - 0.1, value + 0.1, value / 10, 0.0, value / 5)
            for n, base in ((3, 0.2), (6, 0.4))
            for method, more in (("cosine", 0.0), ("bucket", 0.1))
            for kind, value in (("digits", base + more + shift), ("other tokens", base))
        ]
        ends = ["increase", "low", "high", "lost", "lost_low", "lost_high"]
        table = pd.DataFrame(rows, columns=["metric", "n_dropped", "n_layers", "tokens", "items", "count", *ends])
        (tmp_path / model).mkdir()
        table.to_csv(tmp_path / model / study.FILE, index=False)
    read = writing.committed_tables(study.FILE, ["a", "b", "c"])
    shown = study.lost_table(read)
    assert shown.index.tolist() == [(m, n, name) for m in "ab" for n in (3, 6) for name in ("cosine", "bucket")]
    assert shown.loc[("b", 6, "bucket")].tolist() == [
        "1.00 [0.90, 1.10]", "0.40 [0.30, 0.50]", "10.0% [0.0%, 20.0%]", "4.0% [0.0%, 8.0%]",
    ]  # fmt: skip
    lines = study.lost_sentences(read)
    assert len(lines) == 4 and lines[0] == (
        "Without 3 of 24 attention layers a loses, of the digits in right answers (50 in each): "
        "2.0% [0.0%, 4.0%] by cosine, 3.0% [0.0%, 6.0%] by bucket."
    )

"""The table of generated answers: each pruned model's own, against plain counts; it grows on the disk."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from reference import word_tokenizer
from scipy import stats
from tiny_llama import tiny_llama

from entrodrop_utils import search
from entrodrop_utils.cached_scoring import cached_score
from entrodrop_utils.dropping import dropped
from entrodrop_utils.repairing import repair
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.selection import one_shot
from entrodrop_utils.studies import writing as study
from entrodrop_utils.text import text_digest


def text_of(source: str, part: str, tokenizer, n: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 101, (n, tokens), generator=torch.Generator().manual_seed(len(part)))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The study on a tiny model and random tokens."""
    for name, value in {
        "load_model": lambda name, dtype="float32": (tiny_llama(), word_tokenizer()),
        "windows": text_of,
        "RESULTS": tmp_path,
        "SCORED": (2, 40),
        "SEARCHED": (2, 12),
        "REPEATED_TEXT": (2, 9),
        "FITTED": (8, 16),
        "PROMPTS": (3, 8),
        "NEW": 12,
        "FRACTIONS": (0.34, 0.5),
        "DIGIT": "1",  # every word of the tokenizer has a digit
    }.items():
        monkeypatch.setattr(study, name, value)
    return tmp_path / "tiny"


def plain_repetition(drop_set, fitted=None) -> np.ndarray:
    with dropped(tiny_llama(), drop_set, fitted) as smaller:
        ids = text_of("", "evaluation", None, 3, 8)
        for _ in range(12):
            logits = smaller(ids).logits[:, -1:]
            logits[..., smaller.config.eos_token_id] = -math.inf  # a continuation has all its tokens
            ids = torch.cat([ids, logits.argmax(-1)], 1)
    runs = [[tuple(text[i : i + 4]) for i in range(9)] for text in ids[:, 8:].tolist()]
    return np.array([1 - len(set(pieces)) / len(pieces) for pieces in runs])


def test_every_row_is_of_the_pruned_model_that_it_names(tiny, monkeypatch):
    asked = []

    def scored(model, tokenizer, tasks, sets, limit, repaired):
        asked.append(sets[0])
        assert (repaired is None) == (len(asked) <= 13)
        right = [n < 7 - len(sets[0]) for n in range(limit)]
        items = [(sets[0], "sums", "sums", m, i, float(v)) for m in ("strict", "flexible") for i, v in enumerate(right)]
        return pd.DataFrame({"note": [""]}), pd.DataFrame(items, columns=["set", "task", "part", "metric", "item", "value"])

    monkeypatch.setattr(study, "task_scores_by_set", scored)
    rows = study.measure_writing("tiny", "sums", 10, "float32", "a/sums.txt")[study.ANSWERS]
    read = pd.read_csv(tiny / study.ANSWERS).fillna({"dropped": ""})
    pd.testing.assert_frame_equal(read, rows, rtol=1e-4, check_dtype=False)
    scores = cached_score(tiny_llama(), text_of("", "calibration", None, 2, 40), study.METRICS, ["attention"])
    once = text_of("", "calibration", None, 2, 9)
    texts = [text_of("", "calibration", None, *shape) for shape in ((2, 12), (2, 17))]
    texts.insert(1, torch.cat([once, once[:, 1:]], 1))
    orders = [search.lazy_greedy(tiny_llama(), ids, 3, "attention").order for ids in texts]
    digits = torch.tensor([["1" in word_tokenizer().decode([i]) for i in window] for window in texts[-1].tolist()])
    orders.append(search.lazy_greedy(tiny_llama(), texts[-1], 3, "attention", counted=digits).order)
    expected = [()]
    for n in (2, 3):
        expected += [tuple(sorted(one_shot(scores, m, "attention", n))) for m in study.METRICS]
        expected += [tuple(sorted(order[:n])) for order in orders]
    expected.append(expected[1])
    assert asked == expected and rows.task_metric.tolist() == ["strict", "flexible"] * 14
    assert rows.metric.iloc[-1] == "cosine, repaired"
    assert rows.metric.iloc[[10, 12]].tolist() == ["lazy greedy, sums", "lazy greedy, digits of sums"]
    assert json.loads((tiny / "generation_run.json").read_text())["search text"] == "sums.txt"
    fitted = repair(tiny_llama(), expected[1], text_of("", "calibration", None, 8, 16))
    for row, drop_set in zip(rows.iloc[::2].itertuples(), expected, strict=True):
        assert row.n_dropped == len(drop_set) and row.value == (7 - len(drop_set)) / 10
        assert row.dropped == " ".join(str(sub_block.layer) for sub_block in drop_set)
        test = stats.binomtest(7 - len(drop_set), 10).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx((test.low, test.high))
    last = pd.read_csv(tiny / study.REPETITION).iloc[-1]
    assert last.metric == "cosine, repaired"
    assert last.repeated == pytest.approx(plain_repetition(expected[1], fitted).mean(), rel=1e-5)


def test_without_items_only_repetition_is_measured_of_every_method(tiny, monkeypatch):
    monkeypatch.setattr(study, "task_scores_by_set", None)
    ((file, table),) = study.measure_writing("tiny", "sums", 0, "float32").items()
    assert file == study.REPETITION and not (tiny / study.ANSWERS).exists()
    methods = [*study.METRICS, *study.CONTINUING, "lazy greedy"]
    assert [*zip(table.metric, table.n_dropped, strict=True)] == [
        ("dense", 0),
        *((method, n) for n in (2, 3) for method in methods),
        ("cosine, repaired", 2),
    ]
    greedy = search.lazy_greedy(tiny_llama(), text_of("", "calibration", None, 2, 12), 3, "attention").order
    for row in table[table.metric == "lazy greedy"].itertuples():
        assert row.dropped == " ".join(str(sub_block.layer) for sub_block in sorted(greedy[: row.n_dropped]))
        pruned, dense = plain_repetition(greedy[: row.n_dropped]), plain_repetition(())
        assert row.repeated == pytest.approx(pruned.mean()) and row.more == pytest.approx((pruned - dense).mean())
        of_prompts = stats.ttest_rel(pruned, dense).confidence_interval()
        assert (row.more_low, row.more_high) == pytest.approx((of_prompts.low, of_prompts.high), nan_ok=True)
    record = json.loads((tiny / "repetition_run.json").read_text())
    assert "task" not in record and text_digest(text_of("", "evaluation", None, 3, 8)) in record["texts"]
    assert len(record["texts"]) == 4  # nothing is searched that only answers need
    both = pd.concat([table.assign(model=model) for model in ("a", "b")])
    left, right = study.draw_repetition(both, "A title").axes
    for axis in (left, right):
        places = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in axis.containers}
        for method in methods:
            assert places[method.replace("_", " ")] == table[table.metric == method].repeated.tolist()
    pruned = table.iloc[1:-1]
    more, less = sum(low > 0 for low in pruned.more_low), sum(high < 0 for high in pruned.more_high)
    assert study.repetition_sentence(table).startswith(f"Of 10 pruned models {more} repeat themselves more") and (
        f"and {less} less." in study.repetition_sentence(table)
    )


def test_a_task_without_data_is_an_error(monkeypatch):
    nothing = pd.DataFrame(columns=["set", "task", "part", "metric", "item", "value"])
    monkeypatch.setattr(study, "task_scores_by_set", lambda *_: (pd.DataFrame({"note": ["cannot be had here"]}), nothing))
    with pytest.raises(RuntimeError, match="gsm8k was not measured: cannot be had here"):
        study.answer_rows(tiny_llama(), word_tokenizer(), (SubBlock(1, "mlp"),), "gsm8k", 2)


def test_the_committed_tables_are_shown_by_model_metric_and_share(tmp_path, monkeypatch):
    rows = [("dense", 0, 0.5), ("cosine", 3, 0.4), ("cosine", 6, 0.1), ("bucket", 3, 0.3), ("bucket", 6, 0.0)]
    part = [(m, n, 24, "sums", task_metric, 40, v, v - 0.1, v + 0.1) for m, n, v in rows for task_metric in ("strict", "flexible")]
    table = pd.DataFrame(part, columns=["metric", "n_dropped", "n_layers", "task", "task_metric", "items", "value", "low", "high"])
    table.loc[table.task_metric == "flexible", "value"] = 1.0
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert study.committed_tables(study.ANSWERS, ["a", "b"]).empty
    (tmp_path / "b").mkdir()
    table.to_csv(tmp_path / "b" / study.ANSWERS, index=False)
    (tmp_path / "c").mkdir()  # of 28 layers 4 are 14.3%, the number nearest to 12.5%
    few = table[table.n_dropped < 6]
    few.assign(n_layers=28, n_dropped=few.n_dropped.replace(3, 4)).to_csv(tmp_path / "c" / study.ANSWERS, index=False)
    answers = study.committed_tables(study.ANSWERS, ["a", "b"])
    assert answers.metric.tolist() == [m for m, *_ in rows] and set(answers.task_metric) == {"strict"}
    shown = study.answers_by_share(answers, ["value", "low", "high"])
    assert shown.columns.tolist() == ["0%", "12.5%", "25.0%"] and shown.index.tolist() == [("b", "cosine"), ("b", "bucket")]
    assert shown.loc[("b", "cosine")].tolist() == ["50% [40%, 60%]", "40% [30%, 50%]", "10% [0%, 20%]"]
    both = study.answers_by_share(study.committed_tables(study.ANSWERS, ["b", "c"]), ["value", "low", "high"])
    assert both.loc[("c", "cosine"), "12.5%"] == "40% [30%, 50%]" and both.columns.tolist() == shown.columns.tolist()
    (sentence,) = study.answer_sentences(answers)
    assert sentence == (
        "b answers 50% [40%, 60%] of 40 sums items right; without 3 of 24 attention layers chosen by cosine 40% [30%, 50%], "
        "by bucket 30% [20%, 40%]."
    )


def test_published_answers_are_quoted_with_their_source():
    (sentence,) = study.published_answers()
    assert sentence.startswith("Published (Demystifying When Pruning Works (arXiv 2603.24652)): Mistral-7B 48.4% / 36.2% of GSM8K")
    assert sentence.endswith("without 8 of 32 attention layers.")

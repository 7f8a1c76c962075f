"""The table of generated answers: each pruned model's own, against plain counts; it grows on the disk."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import word_tokenizer
from scipy import stats
from tiny_llama import tiny_llama

from entrodrop_utils.cached_scoring import cached_score
from entrodrop_utils.dropping import dropped
from entrodrop_utils.residual import SubBlock
from entrodrop_utils.selection import one_shot
from entrodrop_utils.studies import generation as study


def text_of(source: str, part: str, tokenizer, n: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 101, (n, tokens), generator=torch.Generator().manual_seed(len(part)))


def test_every_row_is_of_the_pruned_model_that_it_names(tmp_path, monkeypatch):
    asked = []

    def scored(model, tokenizer, tasks, sets, limit):
        asked.append(sets[0])
        right = [n < 7 - len(sets[0]) for n in range(limit)]
        items = [(sets[0], "sums", "sums", m, i, float(v)) for m in ("strict", "flexible") for i, v in enumerate(right)]
        return pd.DataFrame({"note": [""]}), pd.DataFrame(items, columns=["set", "task", "part", "metric", "item", "value"])

    for name, value in {
        "load_model": lambda name, dtype="float32": (tiny_llama(), word_tokenizer()),
        "windows": text_of,
        "task_scores_by_set": scored,
        "RESULTS": tmp_path,
        "SCORED": (2, 40),
        "PROMPTS": (3, 8),
        "NEW": 12,
        "FRACTIONS": (0.34, 0.5),
    }.items():
        monkeypatch.setattr(study, name, value)
    table = study.generation("tiny", "sums", 10, "float32")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tiny" / study.FILE), table, rtol=1e-4, check_dtype=False)
    scores = cached_score(tiny_llama(), text_of("", "calibration", None, 2, 40), study.METRICS, ["attention"])
    expected = [(), *(tuple(sorted(one_shot(scores, m, "attention", n))) for m in study.METRICS for n in (2, 3))]
    assert asked == expected and table.task_metric.tolist() == ["strict", "flexible"] * 5
    for row, drop_set in zip(table.iloc[::2].itertuples(), expected, strict=True):
        assert row.n_dropped == len(drop_set) and row.value == (7 - len(drop_set)) / 10
        test = stats.binomtest(7 - len(drop_set), 10).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx((test.low, test.high))
        with dropped(tiny_llama(), drop_set) as smaller:
            ids = text_of("", "evaluation", None, 3, 8)
            for _ in range(12):
                ids = torch.cat([ids, smaller(ids).logits[:, -1:].argmax(-1)], 1)
        runs = [[tuple(text[i : i + 4]) for i in range(9)] for text in ids[:, 8:].tolist()]
        assert row.repeated == pytest.approx(np.mean([1 - len(set(pieces)) / len(pieces) for pieces in runs]))


def test_a_task_without_data_is_an_error(monkeypatch):
    nothing = pd.DataFrame(columns=["set", "task", "part", "metric", "item", "value"])
    monkeypatch.setattr(study, "task_scores_by_set", lambda *_: (pd.DataFrame({"note": ["cannot be had here"]}), nothing))
    with pytest.raises(RuntimeError, match="gsm8k was not measured: cannot be had here"):
        study.generated(tiny_llama(), word_tokenizer(), (SubBlock(1, "mlp"),), "gsm8k", 2, torch.ones(1, 4, dtype=torch.long))

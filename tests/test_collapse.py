"""What collapses first: recall of models for which it is known, and the table against plain values."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from reference import word_tokenizer
from tiny_llama import tiny_llama
from transformers import MistralConfig, MistralForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from entrodrop_utils import search
from entrodrop_utils.dropping import dropped
from entrodrop_utils.studies import collapse as study
from entrodrop_utils.text import repeated, text_digest


def random_tokens(n: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 101, (n, tokens), generator=torch.Generator().manual_seed(seed))


def test_the_copy_stands_at_the_distance_and_nothing_else_is_repeated():
    random = torch.arange(3 * 60).view(3, 60)
    ids = study.recall_windows(random, 20, 8)
    assert ids.shape == (3, 29) and torch.equal(ids[:, 21:], ids[:, 1:9]) and torch.equal(ids[:, :21], random[:, :21])
    assert len(ids[0].unique()) == 21


@pytest.mark.parametrize(("distance", "tokens"), [(4, 60), (20, 28)])
def test_a_copy_that_does_not_fit_is_refused(distance, tokens):
    with pytest.raises(ValueError, match=f"at a distance of {distance}"):
        study.recall_windows(random_tokens(2, tokens), distance, 8)


@pytest.mark.parametrize("distance", [12, 30, 64])
def test_a_planted_copy_is_recalled_at_its_own_distance_only(monkeypatch, distance):
    def planted(self, ids, use_cache=None, logits_to_keep=0):
        ahead = torch.roll(ids, 30 - 1, 1)  # after a token comes what came 30 tokens before the next one
        return CausalLMOutputWithPast(logits=torch.nn.functional.one_hot(ahead, 101).float()[:, -logits_to_keep:])

    model = tiny_llama()
    monkeypatch.setattr(type(model), "forward", planted)
    shares = study.recalled_shares(model, study.recall_windows(random_tokens(6, 90), distance, 12), 12, 4)
    assert (shares == 1).all() if distance == 30 else shares.mean() < 0.1


def test_a_model_that_does_not_see_so_far_is_at_chance():
    torch.manual_seed(0)
    layers, sight = 3, 8
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = MistralConfig(vocab_size=101, num_hidden_layers=layers, sliding_window=sight, **sizes)
    model = MistralForCausalLM(config).eval()
    reach = layers * (sight - 1)
    ids = study.recall_windows(random_tokens(200, 60), reach + 13, 12)
    others = ids.clone()
    others[:, : reach // 2] = random_tokens(200, reach // 2, seed=1)  # another first copy
    shares, blind = (study.recalled_shares(model, windows, 12, 4) for windows in (ids, others))
    assert (shares == blind).all() and shares.mean() < 3 / 101
    near = study.recall_windows(random_tokens(200, 60), 12, 12)
    changed = near.clone()
    changed[:, :12] = others[:, :12]
    logits = [model(windows).logits[:, -8:] for windows in (near, changed)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # within its reach the first copy matters


def test_recall_is_that_of_plain_argmax():
    model, ids = tiny_llama(), study.recall_windows(random_tokens(5, 60), 20, 10)
    with torch.no_grad():
        hits = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert study.recalled_shares(model, ids, 10, 3).tolist() == pytest.approx(hits[:, -7:].double().mean(1).tolist())


def text_of(source: str, part: str, tokenizer, n: int, tokens: int, draw: int = 0) -> torch.Tensor:
    return random_tokens(n, tokens, seed=sum(map(ord, source + part)) + draw)


def scored(model, tokenizer, names, sets, limit):
    """A task on which the model without n sub-blocks has n wrong answers more, of 10 items."""
    rows = [(s, "sums", "acc", 0.8 - len(s) / 10, 0.1, 0.2, 10, "") for s in sets]
    items = [(s, "sums", "sums", "acc", i, float(i < 8 - len(s))) for s in sets for i in range(10)]
    columns = ["set", "task", "metric", "value", "stderr", "chance", "n", "note"]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(items, columns=["set", "task", "part", "metric", "item", "value"])


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "load_model": lambda name: (tiny_llama(), word_tokenizer()),
            "windows": text_of,
            "task_scores_by_set": scored,
            "RESULTS": folder,
            "SEARCH_TEXT": (2, 12),
            "SCORE_TEXT": (2, 30),
            "REPEATED_TEXT": (2, 9),
            "HELD_OUT": (5, 20),
            "PROMPT": 8,
            "NEW": 12,
            "RECALLED": 4,
        }.items():
            patch.setattr(study, name, value)
        return (
            study.collapse("tiny", (0.2, 0.5), (32, 60), 3),
            study.committed_collapse("tiny"),
            study.committed_collapse("another"),
            json.loads((folder / "tiny" / "collapse_run.json").read_text()),
        )


def test_every_ability_is_that_of_the_pruned_model(collapsed):
    table, read, missing, _ = collapsed
    pd.testing.assert_frame_equal(read.fillna(""), table.fillna(""), rtol=1e-4, atol=1e-6, check_dtype=False)
    assert missing is None and set(table.n_dropped) == {0, 1, 3} and len(table) == 4 * 3 * 5
    model, held_out = tiny_llama(), text_of("docs", "evaluation", None, 5, 20)
    first, body = text_of("docs", "calibration", None, 2, 9).split([1, 8], dim=1)
    texts = {
        "repeated text": torch.cat([first, body, body], 1),
        "long text": text_of("docs", "calibration", None, 2, 17),
        "": text_of("docs", "calibration", None, 2, 12),
    }
    for name, ids in texts.items():
        order = search.lazy_greedy(model, ids, 3).order
        own = table[(table.method == ", ".join(["lazy greedy", name][: 1 + bool(name)])) & (table.n_dropped == 3)]
        assert own.dropped.unique().item() == " ".join(str(s.layer) for s in order)
    rows = table[(table.method == "lazy greedy") & (table.n_dropped == 3)].set_index("ability")

    def loss() -> float:
        return float(np.mean([float(model(w[None], labels=w[None]).loss) for w in held_out]))

    with torch.no_grad():
        dense = loss()
        with dropped(model, order):
            pruned = loss()
    assert rows.kept["likelihood"] == pytest.approx(np.exp(dense - pruned), rel=1e-4)
    assert rows.kept["task accuracy"] == pytest.approx((0.5 - 0.2) / (0.8 - 0.2)) and rows.units["task accuracy"] == 10
    ended = rows.drop("varied text").dropna()
    assert (ended.low <= ended.kept).all() and (ended.kept <= ended.high).all()
    whole = table[table.n_dropped == 0]
    assert whole[whole.value > 0].kept.tolist() == pytest.approx([1.0] * (whole.value > 0).sum())


def test_the_record_names_every_text_that_was_read(collapsed):
    *_, record = collapsed
    longest = text_of("random", "evaluation", None, 4, 1 + 60 + study.SEGMENT)
    texts = [text_of("docs", "calibration", None, 2, tokens) for tokens in (12, 17, 30)]
    texts += [repeated(text_of("docs", "calibration", None, 2, 9)), *(study.recall_windows(longest, d) for d in (32, 60))]
    texts += [text_of("docs", "evaluation", None, 3, 8), text_of("docs", "evaluation", None, 5, 20)]
    assert record["texts"] == sorted(text_digest(ids) for ids in texts) and record["shares dropped"] == [0.2, 0.5]


def numbers(kept: dict[str, list[tuple]]) -> pd.DataFrame:
    rows = [
        ("lazy greedy", n, 30, ability, *values) for ability, of in kept.items() for n, values in zip((0, 4, 8), of, strict=True)
    ]
    return pd.DataFrame(rows, columns=["method", "n_dropped", "n_layers", "ability", "kept", "low", "high"])


def test_the_sentence_is_of_the_number_where_the_likelihood_falls_below_half():
    one = (1.0, 1.0, 1.0)
    table = numbers({
        "likelihood": [one, (0.9, 0.8, 1.0), (0.4, 0.3, 0.6)],
        "recall over 128 tokens": [one, (0.2, 0.1, 0.3), (0.1, 0.0, 0.2)],
        "varied text": [one, (0.9, 0.8, 1.0), (0.7, 0.6, 0.8)],
    })  # fmt: skip
    (line,) = study.collapse_sentences(table)
    assert line.index("recall over 128 tokens 0.10 [0.00, 0.20]") < line.index("likelihood 0.40") and ", 8 of 30 " in line


def test_models_are_compared_at_the_number_nearest_to_the_share(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for name, values in {"a": [(1, 1, 1), (0.5, 0.4, 0.6), (0.2, 0.1, 0.3)], "b": [(1, 1, 1), (0.9, 0.8, 1.0)]}.items():
        (tmp_path / name).mkdir()
        numbers({"recall": values + values[-1:] * (3 - len(values))}).to_csv(tmp_path / name / study.FILE, index=False)
    shown = study.recall_table(study.committed_near(["a", "none", "b"], 0.25))
    assert shown.index.tolist() == [("a", 8, "lazy greedy"), ("b", 8, "lazy greedy")]
    assert shown["recall"].tolist() == ["0.20 [0.10, 0.30]", "0.90 [0.80, 1.00]"]
    assert study.committed_near(["none"], 0.25).empty


@pytest.mark.parametrize(("repeated", "counts"), [((0.7, 0.6, 0.8), (1, 0)), ((0.4, 0.3, 0.6), (0, 0)), ((0.1, 0.0, 0.2), (0, 1))])
def test_recall_is_more_or_less_where_the_intervals_do_not_overlap(repeated, counts):
    at_each = {"lazy greedy": (0.4, 0.3, 0.5), "lazy greedy, repeated text": repeated}
    table = pd.concat([numbers({"recall": [values] * 3}).assign(model="a", method=method) for method, values in at_each.items()])
    sentence = study.recall_sentence(table[table.n_dropped == 8], "recall")
    assert f"in {counts[0]} of 1 models, and less in {counts[1]} " in sentence

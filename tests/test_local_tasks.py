"""The tasks made here: well-formed, balanced, of held-out text only, and scored by lm-evaluation-harness as a plain loop would."""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrodrop_utils import text
from entrodrop_utils.tasks import items, local_tasks, scores, task_scores

PROSE = [
    f"Return the {a} of a {b} array along the given axis, and leave the {b} mask where it is. "
    f"The {a} is computed from every {c} value, so that a {c} window of the {b} input has one {a}. "
    f"A {c} axis that does not exist is refused with the {b} names of every existing axis."
    for a, b, c in zip(
        ["mean", "median", "sum", "spread", "range", "mode", "count", "rank", "order", "norm"],
        ["sparse", "dense", "masked", "sorted", "nested", "ragged", "padded", "hashed", "packed", "strided"],
        ["rolling", "weekly", "hourly", "random", "leading", "trailing", "missing", "repeated", "positive", "cyclic"],
        strict=True,
    )
]
FUNCTION = '''
def resample{n}(values{n}, window, axis, order):
    """Resample.

    Parameters
    ----------
    values{n} : array_like
        What to resample.
    window : int
        How much at once.
    axis : int, optional
        Along which axis.

    Returns
    -------
    order : int
    """
'''


@pytest.fixture
def small_docs(tmp_path, monkeypatch):
    """Ten held-out docstrings, of which the last is also in the calibration part, and functions in three files."""
    parts = {"calibration": PROSE[9:], "validation": [], "evaluation": PROSE}
    files = []
    for n in range(12):
        path = tmp_path / f"{n}.py"
        path.write_text(FUNCTION.format(n=n))
        files.append((f"package/{n}.py", path))
    monkeypatch.setattr(text, "documents", lambda source, part: tuple((f"package/{i}.py", d) for i, d in enumerate(parts[part])))
    monkeypatch.setattr(items, "package_files", lambda: files)
    monkeypatch.setattr(items, "PAIRS", 4)
    monkeypatch.setattr(local_tasks, "MOST_ITEMS", 12)
    folder = tmp_path / "tasks"
    folder.mkdir()
    local_tasks.write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def byte_model():
    """A random model whose tokens are bytes, and its tokenizer."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    return LlamaForCausalLM(config).eval(), fast


def read_items(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def evaluate(folder, model, tokenizer, names, limit=None):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    return lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0)


def loglikelihood(model, tokenizer, context, continuation):
    """Every token of the continuation by the plain model, one pass each; and whether each was the likeliest."""
    ids = tokenizer(context + continuation, add_special_tokens=False).input_ids
    given = len(tokenizer(context, add_special_tokens=False).input_ids)
    if not context:
        ids, given = [tokenizer.bos_token_id, *ids], 1
    with torch.inference_mode():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(given, len(ids))
    return sum(log_p[i - 1, ids[i]].item() for i in places), all(log_p[i - 1].argmax() == ids[i] for i in places)


def sentences(one):
    """The good sentence and the bad one."""
    good, bad = one["choices"][one["gold"]], one["choices"][1 - one["gold"]]
    return one["context"] + good, one["context"] + bad


@pytest.mark.parametrize("phenomenon", items.phenomena())
def test_pairs_are_distinct_balanced_and_give_nothing_away(phenomenon):
    made = list(items.pairs(random.Random(phenomenon), phenomenon))
    both = [sentences(one) for one in made]
    bags = [({*good.lower().split()}, {*bad.lower().split()}) for good, bad in both]
    assert len(set(both)) == len(made) == 200
    assert all(good != bad and len(good.split()) == len(bad.split()) for good, bad in both)
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,]+[.?]", sentence) and "  " not in sentence for pair in both for sentence in pair)
    assert 70 <= sum(one["gold"] for one in made) <= 130
    only_good = Counter(word for good, bad in bags for word in good - bad)
    only_bad = Counter(word for good, bad in bags for word in bad - good)
    assert max([*only_good.values(), *only_bad.values()], default=0) <= 120


def test_slots_that_agree_are_one_word_and_numbered_ones_another():
    words = {"noun": [{"one": "cat", "many": "cats"}, {"one": "ox", "many": "oxen"}], "time": [{"word": "at noon"}]}
    found = {
        items.fill("the {noun.one} [sees|see] {noun2.many} and the {noun.one} {time}.", words, random.Random(i)) for i in range(40)
    }
    assert found == {
        (f"The {a} sees {b} and the {a} at noon.", f"The {a} see {b} and the {a} at noon.")
        for a, b in (("cat", "oxen"), ("ox", "cats"))
    }


def test_a_template_that_gives_too_little_is_named(monkeypatch):
    monkeypatch.setattr(items, "phenomena", lambda: {"thin": ["They [is|are] {this.one}."]})
    with pytest.raises(ValueError, match=r"thin: 'They .* gives too few sentences for 200 pairs"):
        list(items.pairs(random.Random(0), "thin"))


def test_what_calibration_had_is_left_out(small_docs):
    found = " ".join(one["context"] for name in ("docs_continuation", "docs_last_word") for one in read_items(small_docs, name))
    assert "mean of a sparse array" in found
    assert "norm" not in found  # of the docstring that calibration shares


def test_parameters_are_recalled_in_the_order_of_the_docstring(small_docs):
    found = read_items(small_docs, "docstring_arguments")
    assert {one["context"].split("(")[0] for one in found} == {
        f"def resample{n}" for n in range(12) if text.belongs_to(f"package/{n}.py", "evaluation")
    }
    for one in found:
        described = re.findall(r"^(\w+) :", one["context"].split("----------\n")[1], re.M)
        names = re.search(r"\((.*)\)", one["context"])[1].split(", ")
        assert one["choices"][one["gold"]] == f"\n{names[len(described)]} :"
        assert {f"\n{name} :" for name in names} == set(one["choices"])


def test_induction_has_its_answer_where_the_cue_was():
    for one in items.repetitions(random.Random(0)):
        *words, cue = one["context"].split()
        assert one["choices"][one["gold"]] == " " + words[words.index(cue) + 1]
        assert len(set(one["choices"])) == 4 and {c.strip() for c in one["choices"]} <= set(words) - {cue}


def test_the_harness_scores_as_a_plain_loop(small_docs, byte_model):
    model, tokenizer = byte_model
    names = ["docs_continuation", "docs_last_word", "docstring_arguments", "induction"]
    results = evaluate(small_docs, model, tokenizer, [*names, "minimal_pairs"])
    kinds = [f"minimal_pairs_{p}" for p in items.phenomena()]
    means = {}
    for name in [*names, *kinds]:
        right, summed = [], []
        for one in read_items(small_docs, name):
            scored = [loglikelihood(model, tokenizer, one["context"], choice) for choice in one["choices"]]
            best = max(range(len(scored)), key=lambda i: scored[i][0])
            right.append(scored[0][1] if len(scored) == 1 else best == one["gold"])
            summed.append([score for score, _ in scored])
        samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
        found = [[response[0][0] for response in sample["resps"]] for sample in samples]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(summed), atol=1e-3, rtol=1e-4)
        means[name] = sum(right) / len(right)
        assert results["results"][name]["acc,none"] == pytest.approx(means[name])
        assert results["configs"][name]["metadata"]["chance"] == {"docs_last_word": 0.0}.get(name, 1 / len(found[0]))
    assert results["results"]["minimal_pairs"]["acc,none"] == pytest.approx(sum(means[k] for k in kinds) / len(kinds))


def test_one_phenomenon_is_found_by_its_name(small_docs, byte_model, monkeypatch):
    monkeypatch.setattr(scores, "build_tasks", lambda: small_docs)
    found = task_scores(*byte_model, ["minimal_pairs_agreement_attractor"], limit=3)
    assert found[["task", "metric", "chance", "n"]].to_numpy().tolist() == [["minimal_pairs_agreement_attractor", "acc", 0.5, 3]]
    with pytest.raises(ValueError, match="unknown task 'minimal_pairs_agreement'"):
        task_scores(*byte_model, ["minimal_pairs_agreement"])


def test_a_random_model_is_at_chance_on_induction(byte_model):
    model, tokenizer = byte_model
    right = []
    for one in islice(items.repetitions(random.Random(0)), 100):
        scores = [loglikelihood(model, tokenizer, one["context"], choice)[0] for choice in one["choices"]]
        right.append(scores.index(max(scores)) == one["gold"])
    assert abs(sum(right) / 100 - 0.25) < 3 * (0.25 * 0.75 / 100) ** 0.5


@pytest.mark.slow
def test_the_real_items(tmp_path):
    """Unique, balanced, built twice the same, and without 13 words in a row of the calibration and validation text."""
    folder = local_tasks.build_tasks()
    local_tasks.write_tasks(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name

    def grams(string, n=13):
        words = re.sub(r"\W+", " ", string.lower()).split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    found = {name: read_items(folder, name) for name in local_tasks.NAMES if name != "minimal_pairs"}
    of_items = {
        gram for made in found.values() for one in made for choice in one["choices"] for gram in grams(one["context"] + choice)
    }
    assert len(of_items) > 1000
    for part in ("calibration", "validation"):
        assert not any(grams(document) & of_items for _, document in text.documents("docs", part))
    for name, made in found.items():
        assert len({one["context"] for one in made}) == len(made) >= 200, name
        if name != "docs_last_word":
            assert all(len(set(one["choices"])) == 4 for one in made)
            shares = Counter(one["gold"] for one in made)
            assert all(0.19 < shares[place] / len(made) < 0.31 for place in range(4)), name
    cards = local_tasks.task_cards().set_index("task")
    assert cards["items"].to_dict() == {n: len(m) for n, m in found.items()} | {"minimal_pairs": 200 * len(items.phenomena())}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_harness_knows_them_beside_its_own():
    from lm_eval.tasks import TaskManager

    ours = {*local_tasks.NAMES, *(f"minimal_pairs_{p}" for p in items.phenomena())}
    assert not ours & {*TaskManager().all_tasks}
    assert ours <= {*TaskManager(include_path=str(local_tasks.build_tasks())).all_tasks}


@pytest.mark.slow
def test_the_default_model_is_above_chance_and_not_perfect(smollm2):
    names = ["docs_continuation", "docstring_arguments", "induction", "minimal_pairs_agreement_attractor"]
    results = evaluate(local_tasks.build_tasks(), *smollm2, names, limit=32)
    for name in names:
        chance = results["configs"][name]["metadata"]["chance"]
        assert chance + 2 * (chance * (1 - chance) / 32) ** 0.5 < results["results"][name]["acc,none"] < 1, name

"""Log-likelihoods and tasks: against a plain loop, other families' own forward passes, and the command line of the harness."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from entrodrop_utils import saving
from entrodrop_utils.dropping import dropped
from entrodrop_utils.repairing import repair
from entrodrop_utils.residual import SubBlock, find
from entrodrop_utils.tasks import harness, local_tasks, loglikelihoods, task_scores
from entrodrop_utils.tasks.loglikelihoods import loglikelihoods_by_set

WORDS = ["the", "a", "cat", "dog", "sees", "hears", "runs", "sleeps", "big", "small", "red", "blue"]
SETS = [(), (SubBlock(1, "attention"), SubBlock(3, "mlp")), (SubBlock(2, "block"),)]


def questions(vocabulary: int, seed: int = 0) -> list[loglikelihoods.Question]:
    """Contexts of several lengths with one to four continuations, one of them the beginning of another."""
    rng = random.Random(seed)
    found = []
    for length in (1, 2, 5, 9, 5):
        context = tuple(rng.randrange(1, vocabulary) for _ in range(length))
        ends = [tuple(rng.randrange(1, vocabulary) for _ in range(rng.choice((1, 2, 4)))) for _ in range(rng.choice((1, 3)))]
        found += [(context, end) for end in [*ends, ends[0] + ends[-1]]]
    return found


@torch.no_grad()
def plainly(model, question: loglikelihoods.Question) -> loglikelihoods.Answer:
    """The answer of one forward pass over one sequence."""
    context, continuation = question
    logits = model(torch.tensor([[*context, *continuation[:-1]]]), use_cache=False).logits[0, len(context) - 1 :].double()
    return float(logits.log_softmax(-1)[range(len(continuation)), list(continuation)].sum()), logits.argmax(-1).tolist() == list(
        continuation
    )


def compare(model, sets, asked, fitted=None) -> None:
    found = loglikelihoods_by_set(model, asked, sets, fitted)
    for one in sets:
        with dropped(model, one, fitted) as smaller:
            for question in asked:
                logprob, greedy = plainly(smaller, question)
                assert found[one][question][0] == pytest.approx(logprob, rel=1e-4, abs=1e-4)
                assert found[one][question][1] == greedy


def test_answers_are_those_of_single_sequences(model):
    asked = questions(101)
    greedy = tuple(int(model(torch.tensor([asked[0][0]])).logits[0, -1].argmax()) for _ in range(1))
    compare(model, SETS, [*asked, (asked[0][0], greedy)])  # one that greedy decoding gives


def test_answers_of_repaired_models_are_their_own(model):
    sets = SETS[:2]
    fitted = repair(model, sets[1], torch.randint(0, 101, (8, 16), generator=torch.Generator().manual_seed(3)))
    asked = questions(101)
    compare(model, sets, asked, fitted)
    bare, repaired = (loglikelihoods_by_set(model, asked, sets, how)[sets[1]] for how in (None, fitted))  # each in its own cache
    assert bare != repaired


def test_contexts_are_run_once(model, monkeypatch):
    asked = questions(101)
    assert loglikelihoods._longest_packed(model) == loglikelihoods.PACKED
    packed = loglikelihoods_by_set(model, asked, SETS)
    tokens = sum(loglikelihoods._length(row) for row in loglikelihoods._rows(asked, loglikelihoods.PACKED))
    assert tokens < sum(len(context) + len(continuation) - 1 for context, continuation in asked)
    monkeypatch.setattr(loglikelihoods, "_longest_packed", lambda _: 0)
    single = loglikelihoods_by_set(model, asked, SETS)
    for one in SETS:
        assert [v for v, _ in packed[one].values()] == pytest.approx([single[one][q][0] for q in packed[one]], rel=1e-4)


def test_a_model_that_cannot_have_packed_rows_gets_single_ones():
    """ALiBi biases follow the place in the row, whatever position a token is said to have."""
    model = tiny("Bloom")
    assert loglikelihoods._longest_packed(model) == 0
    compare(model, [(), (SubBlock(1, "attention"),)], questions(90))


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "Mistral", "GPT-2", "GPT-NeoX (parallel)"])
def test_answers_of_other_families(name):
    """Sliding attention sees other tokens in a packed row that is longer than its window, so such rows stay within it."""
    model = tiny(name)
    sliding = [part for part in [model.config, *model.modules()] if getattr(part, "sliding_window", None)]
    compare(model, [()], questions(90))
    for part in sliding:
        part.sliding_window = 12
    assert loglikelihoods._longest_packed(model) == (12 if sliding else loglikelihoods.PACKED)
    compare(model, [(), (find(model, "attention")[1], find(model, "mlp")[2])], questions(90))


def test_long_rows_are_read_in_parts(model, monkeypatch):
    monkeypatch.setattr(loglikelihoods, "MAX_TOKENS", 7)
    compare(model, SETS, [((1, 2), tuple(range(3, 60))), *questions(101)])


def test_answers_are_kept_batch_by_batch(model, monkeypatch):
    """A run that is stopped goes on where it was, and another set costs no more than itself."""
    monkeypatch.setattr(loglikelihoods, "MAX_TOKENS", 12)
    asked, calls = questions(101), []
    first = loglikelihoods_by_set(model, asked, SETS[:1])
    work = loglikelihoods._answered

    def counted(model, rows, sets, repair, done):
        calls.append(sets)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(model, rows, sets, repair, done)

    monkeypatch.setattr(loglikelihoods, "_answered", counted)
    with pytest.raises(KeyboardInterrupt):
        loglikelihoods_by_set(model, asked, SETS)
    assert all(sets == SETS[1:] for sets in calls)
    before = len(calls)
    again = loglikelihoods_by_set(model, asked, SETS)
    batches = len(list(loglikelihoods._batches(loglikelihoods._rows(asked, loglikelihoods.PACKED))))
    assert len(calls) - before == batches - 2
    assert again[()] == first[()]


# Tasks of the harness


@pytest.fixture(scope="module")
def tokenizer():
    """One that knows twelve words."""
    words = {word: n for n, word in enumerate(["?", *WORDS])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="?")), unk_token="?")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two tasks in a folder and a group of them: four choices, and a last word."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    rows = [{"q": " ".join(rng.choices(WORDS, k=5)), "c": [" " + w for w in rng.sample(WORDS, 4)], "a": n % 4} for n in range(12)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {folder}/rows.json}}\ntest_split: train\ndoc_to_text: q\n"
    choice = (
        "output_type: multiple_choice\ntarget_delimiter: ''\ndoc_to_choice: c\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    )
    word = "output_type: loglikelihood\ndoc_to_target: '{{c[0]}}'\nmetric_list: [{metric: acc}, {metric: perplexity}]\n"
    for name in ("choice_one", "choice_two"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{choice}")
    (folder / "word.yaml").write_text(f"task: word\n{head}{word}")
    filters = "filter_list: [{name: whole, filter: [{function: take_first}]}, {name: first, filter: [{function: regex, "
    filters += "regex_pattern: '(\\\\w+)'}, {function: take_first}]}]\n"
    free = f"output_type: generate_until\ndoc_to_target: '{{{{c[0]}}}}'\nmetric_list: [{{metric: exact_match}}]\n{filters}"
    free += "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
    (folder / "free.yaml").write_text(f"task: free\n{head}{free}")
    metric = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]"
    (folder / "both.yaml").write_text(f"group: both\ntask: [choice_one, choice_two]\n{metric}\n")
    return str(folder)


def test_scores_and_items_of_tasks(smollm2, own):
    model, tokenizer = smollm2
    sets = [(), (SubBlock(10, "mlp"),)]
    lm = harness.PrunedLM(model, tokenizer, sets)
    scores, items = harness.evaluate_task(lm, "both", 8, own)
    assert list(scores.columns) == ["set", "task", "metric", "value", "stderr", "chance", "n"]
    assert scores[["task", "metric", "chance", "n"]].to_numpy().tolist() == [["both", "acc", 0.25, 8]] * 2  # 4 of each task
    assert items.groupby(["set", "task"]).size().tolist() == [4] * 4
    means = items.groupby("set", sort=False).value.mean()
    assert scores.set_index("set").value.to_dict() == pytest.approx(means.to_dict())
    scores, items = harness.evaluate_task(lm, "word", None, own)
    dense = scores[scores.set.map(len) == 0].set_index("metric")
    assert (dense.chance["acc"], dense.n["acc"]) == (0, 12)
    logprobs = items[(items.metric == "perplexity") & (items.set.map(len) == 0)].value
    assert dense.value["perplexity"] == pytest.approx(np.exp(-logprobs.mean()))


def test_each_pruned_model_generates_its_own_answers(model, own, monkeypatch):
    """The text of a plain greedy loop over single prompts, by set; a second run reads the cache."""
    words = {f"w{n}": n for n in range(100)} | {"</s>": 100}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    lm, asked = harness.PrunedLM(model, tokenizer, SETS), []
    generate = harness.HFLM.generate_until
    monkeypatch.setattr(harness.HFLM, "generate_until", lambda *args, **named: asked.append(lm.current) or generate(*args, **named))
    prompts, settings = ["w1 w2", "w5 w7 w9 w3", "w8"], {"until": ["w99 w99"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, settings), 0) for text in prompts]
    texts = {}
    for one in lm.sets:
        lm.current = one
        texts[one] = lm.generate_until(requests)
        with dropped(model, one):
            for prompt, text in zip(prompts, texts[one], strict=True):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                for _ in range(6):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
                assert text.split() == [f"w{n}" for n in ids[0, -6:].tolist()]
    assert len({tuple(found) for found in texts.values()}) == len(SETS)
    assert asked == lm.sets and lm.generate_until(requests) == texts[lm.sets[-1]] and asked == lm.sets
    scores, items = harness.evaluate_task(lm, "free", 3, own)
    assert scores.metric.tolist() == ["exact_match (whole)", "exact_match (first)"] * len(SETS)
    assert set(items.metric) == set(scores.metric) and scores.chance.isna().all()


def test_worked_answers_are_those_of_the_rows(own):
    rows = [json.loads(line) for line in Path(own, "rows.json").read_text().splitlines()]
    answers = harness.worked_answers("free", 5, own)
    assert [(prompt, answer.split()) for prompt, answer in answers] == [(row["q"], [row["c"][0].strip()]) for row in rows[:5]]
    assert all(answer.startswith(" ") for _, answer in answers)
    with pytest.raises(ValueError, match="choice_one has no free answers: the harness asks it as multiple_choice"):
        harness.worked_answers("choice_one", 5, own)
    with pytest.raises(ValueError, match="both is a group of 2 tasks"):
        harness.worked_answers("both", 5, own)


def test_what_does_not_exist_and_what_cannot_be_had(model, monkeypatch, own, tokenizer):
    with pytest.raises(ValueError, match=r"unknown task 'choice_on' .*alike: choice_one"):
        harness.check_tasks(["choice_on"], own)

    class Nothing:
        all_tasks = ("away",)

        def load(self, _):
            raise ConnectionError("cannot reach the hub\nmore")

    monkeypatch.setattr(harness, "_manager", lambda _: Nothing())
    found = task_scores(model, tokenizer, ["away"])
    assert found.note.tolist() == ["the data of away cannot be had here (cannot reach the hub more)"]
    assert found.n.tolist() == [0] and found.value.isna().all()


@pytest.mark.slow
def test_numbers_are_those_of_the_harnesss_command_line(smollm2, tmp_path):
    """On a saved pruned model, with the suite's own tasks and, where their data are at hand, two public ones."""
    from entrodrop_utils import models

    _, tokenizer = smollm2
    pruned = saving.remove(models.load_model()[0], [SubBlock(20, "attention"), SubBlock(12, "mlp")])
    saving.save_pruned(pruned, tmp_path / "pruned", tokenizer)
    names, folder = ["docs_continuation", "docs_last_word", "induction"], local_tasks.build_tasks()
    for name in ("piqa", "arc_easy"):
        try:
            with harness.quiet_harness():
                harness._manager("").load([name])
            names.append(name)
        except Exception:
            print(f"{name} is not at hand")
    ours = task_scores(saving.load_pruned(tmp_path / "pruned"), tokenizer, names, 12)
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'pruned'},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", ",".join(names), "--limit", "12", "--batch_size", "4", "--include_path", str(folder)]
    arguments += ["--output_path", str(tmp_path / "out"), "--trust_remote_code", "--device", "cpu"]
    environment = os.environ | {"DISABLE_MULTIPROC": "1"}
    run = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    assert len(ours) >= len(names)
    for row in ours.itertuples():
        assert row.value == pytest.approx(theirs[row.task][f"{row.metric},none"], rel=1e-4), row
        if row.metric.startswith("acc"):
            assert row.stderr == pytest.approx(theirs[row.task][f"{row.metric}_stderr,none"], rel=1e-4)

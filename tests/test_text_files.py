"""Text as people have it: damaged, in other encodings, compressed, without blank lines, in folders with odd names."""

import codecs
import gzip
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from entrodrop_utils import text
from entrodrop_utils.text import corpus, harvest

PARAGRAPHS = [f"Paragraph {i} tells of {i} rivers, {i + 1} stones and the café by the harbour." for i in range(100)]


class Words:
    """A tokenizer of one token a word; words of more than twenty letters are one unknown token."""

    def __call__(self, string):
        self.input_ids = [1 if len(word) > 20 else 2 + sum(map(ord, word)) % 999 for word in string.split()]
        return self


def row(content, **others) -> str:
    return json.dumps({"text": content, **others}, ensure_ascii=False)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def found(path: str) -> set[str]:
    """All documents of a file."""
    return {document for part in corpus.SHARES for _, document in text.documents(path, part)}


# Rows of .jsonl files


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ('{"text": 7}', "line 2 of .*rows.jsonl has a `text` of type int: it must be a string"),
        ('{"text": ["a"]}', "line 2 of .* has a `text` of type list"),
        ('{"text": {"en": "a"}}', "line 2 of .* has a `text` of type dict"),
        ('{"text": true}', "line 2 of .* has a `text` of type bool"),
        ('{"title": "x", "body": "y"}', "line 2 of .* has no column `text`, only title, body"),
        ("{}", "line 2 of .* has no column `text`, only nothing"),
        ('"a string"', "line 2 of .* has no column `text`, it is of type str"),
        ("[1, 2]", "line 2 of .* has no column `text`, it is of type list"),
        ("null", "line 2 of .* has no column `text`, it is of type NoneType"),
        ('{"text": "cut in the mid', r"line 2 of .* is not JSON \(.*\): correct it, or remove it if it is cut"),
        ('{"text": "one"}{"text": "two"}', "line 2 of .* is not JSON"),
        ('{"text": ' + "[" * 100_000, "line 2 of .* is not JSON"),
    ],
)
@pytest.mark.parametrize("blank", [False, True])
def test_a_wrong_row_is_named_by_its_line(second, says, blank, tmp_path):
    """Blank lines before it count, as they do in an editor."""
    lines = [row("first"), *([" ", ""] if blank else []), second]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    with pytest.raises(ValueError, match=says.replace("line 2", "line 4") if blank else says) as caught:
        text.documents(path, "calibration")
    assert "\n" not in str(caught.value)


def test_empty_rows_are_skipped(tmp_path):
    rows = [row(None), row(""), row(" \n\t"), *map(row, PARAGRAPHS), row(None)]
    assert found(write(tmp_path / "rows.jsonl", "\n".join(rows) + "\n\n")) == set(PARAGRAPHS)


def test_columns_that_nobody_asked_for_may_change(tmp_path):
    others = [{"n": 1}, {"n": "two"}, {"n": [3]}, {"n": None}, {}, {"m": {"deep": 1}}, {"n": 1e400}]
    rows = [row(p, **others[i % len(others)]) for i, p in enumerate(PARAGRAPHS)]
    assert found(write(tmp_path / "rows.jsonl", "\n".join(rows))) == set(PARAGRAPHS)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_rows_may_end_as_on_any_system(ends, tmp_path):
    assert found(write(tmp_path / "rows.jsonl", ends.join(map(row, PARAGRAPHS)))) == set(PARAGRAPHS)


def test_a_sign_that_ends_lines_elsewhere_does_not_end_a_row(tmp_path):
    """str.splitlines would cut at the line separators that JSON may hold."""
    rows = [row(f"{p}\u2028and\x85more") for p in PARAGRAPHS]
    assert len(found(write(tmp_path / "rows.jsonl", "\n".join(rows)))) == 100


def test_half_an_emoji_does_not_end_a_run(tmp_path):
    """A tool that cut a string between the halves of a character left one half, which no encoding has."""
    path = write(tmp_path / "rows.jsonl", "\n".join(f'{{"text": "row {i} \\ud83d"}}' for i in range(60)))
    assert text.windows(path, "calibration", Words(), 2, 4).shape == (2, 4)


def test_rows_of_a_hub_dataset_are_checked_as_well(monkeypatch):
    rows = [{"text": p, "n": 1} for p in PARAGRAPHS]
    rows[3]["text"] = None
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: Dataset.from_list(rows))
    assert sum(len(text.documents("org/with-null", part)) for part in corpus.SHARES) == 99
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: Dataset.from_list([{"text": 1}]))
    with pytest.raises(ValueError, match="row 1 of org/with-numbers has a `text` of type int"):
        text.documents("org/with-numbers", "calibration")


def test_a_hub_dataset_that_breaks_off_is_refused_in_one_sentence(monkeypatch):
    def rows(*_, **__):
        yield {"text": "first"}
        raise ConnectionError("the server\nwent away")

    monkeypatch.setattr(corpus, "load_dataset", rows)
    with pytest.raises(ValueError, match="org/cut could not be loaded .the server went away.; a dataset of the hub needs"):
        text.documents("org/cut", "calibration")


# Encodings


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "before"),
    [("utf-8", b""), ("utf-8-sig", b""), ("utf-16", b""), ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-16-le", codecs.BOM_UTF16_LE)],
)
def test_encodings_that_say_what_they_are_are_read(suffix, encoding, before, tmp_path):
    content = "\n\n".join(PARAGRAPHS) if suffix == "txt" else "\n".join(map(row, PARAGRAPHS))
    path = write(tmp_path / f"mine.{suffix}", before + content.encode(encoding))
    assert found(path) == set(PARAGRAPHS)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251"])
def test_another_encoding_is_named_with_the_place(suffix, encoding, tmp_path):
    words = "a кафе" if encoding == "cp1251" else "a éclair"
    path = write(tmp_path / f"mine.{suffix}", (row(words) if suffix == "jsonl" else words).encode(encoding))
    place = (row(words) if suffix == "jsonl" else words).index(words[2])
    with pytest.raises(ValueError, match=rf"mine.{suffix} is not UTF-8 \(byte {place}\): convert it to UTF-8, as in iconv"):
        text.documents(path, "calibration")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_an_encoding_that_would_give_zero_bytes_is_refused(encoding, tmp_path):
    """Without a mark, UTF-16 of plain English is also UTF-8: every second character is then a zero byte."""
    path = write(tmp_path / "mine.txt", "plain words\n\nand more".encode(encoding))
    with pytest.raises(ValueError, match="mine.txt holds zero bytes"):
        text.documents(path, "calibration")


def test_marks_of_joined_files_are_no_text(tmp_path):
    path = write(tmp_path / "joined.txt", b"".join(f"{p}\n\n".encode("utf-8-sig") for p in PARAGRAPHS))
    assert found(path) == set(PARAGRAPHS)
    path = write(tmp_path / "joined.jsonl", b"".join(f"{row(p)}\n".encode("utf-8-sig") for p in PARAGRAPHS))
    assert found(path) == set(PARAGRAPHS)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, gzip.compress(b"", mtime=0)])
@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_an_empty_file_is_said_to_be_empty(name, content, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"the text .*{name} is empty"):
        text.windows(path, "calibration", Words(), 1, 4)


# Compressed files and names


@pytest.mark.parametrize("name", ["mine.txt.gz", "MINE.TXT", "Mine.Txt.GZ", "mine.txt"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_content_says_whether_it_is_compressed_and_the_name_may_be_in_capitals(name, packed, tmp_path):
    """A browser unpacks what it downloads and keeps the name; a person renames what is packed."""
    content = "\n\n".join(PARAGRAPHS).encode()
    path = write(tmp_path / name, gzip.compress(content) if packed else content)
    assert found(path) == set(PARAGRAPHS)


@pytest.mark.parametrize("name", ["mine.jsonl.gz", "MINE.JSONL", "Mine.JsonL.gz"])
def test_rows_may_be_compressed(name, tmp_path):
    content = "\n".join(map(row, PARAGRAPHS)).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert found(path) == set(PARAGRAPHS)


@pytest.mark.parametrize("kept", [slice(-4), slice(200), slice(2), "two bytes changed"])
def test_a_damaged_gzip_file_is_named(kept, tmp_path):
    packed = gzip.compress("\n\n".join(PARAGRAPHS).encode())
    path = write(tmp_path / "mine.txt.gz", packed[kept] if isinstance(kept, slice) else packed[:30] + b"xx" + packed[32:])
    with pytest.raises(ValueError, match="the text .*mine.txt.gz cannot be read .*: get a whole copy"):
        text.documents(path, "calibration")


@pytest.mark.parametrize("folder", ["[2024]", "a*b", "x?y", "{k}", "**", "a b", "!x", "50%"])
def test_only_the_named_file_is_read(folder, tmp_path):
    """A name is no pattern: it neither finds nothing nor finds more."""
    for other in ("2", "0", "4", "ab", "aXb", "xzy", "k", "more/deep", folder):
        (tmp_path / other).mkdir(parents=True)
        for name in ("mine.txt", "mine.jsonl"):
            body = [f"{p} {other}" for p in PARAGRAPHS]
            write(tmp_path / other / name, "\n\n".join(body) if name == "mine.txt" else "\n".join(map(row, body)))
    for name in ("mine.txt", "mine.jsonl"):
        assert found(str(tmp_path / folder / name)) == {f"{p} {folder}" for p in PARAGRAPHS}


@pytest.mark.parametrize("name", ["m*.txt", "*.jsonl", "[m]ine.txt", "mine.tx?"])
def test_a_pattern_that_is_no_file_is_refused(name, tmp_path):
    write(tmp_path / "mine.txt", "words")
    write(tmp_path / "mine.jsonl", row("words"))
    with pytest.raises(ValueError, match="unknown text"):
        text.check_text(str(tmp_path / name))


def test_a_file_that_was_corrected_is_read_again(tmp_path):
    path = write(tmp_path / "mine.txt", "\n\n".join(PARAGRAPHS))
    before = text.documents(path, "calibration")
    assert text.documents(path, "calibration") is before
    write(tmp_path / "mine.txt", "\n\n".join(f"{p} Corrected." for p in PARAGRAPHS))
    assert all(document.endswith("Corrected.") for _, document in text.documents(path, "calibration"))


# Documents


@pytest.mark.parametrize("blank", ["\n \n", "\n\t\n", "\r\n\r\n", "\r\n \r\n", "\r\r", "\n\u00a0\n", "\n\n \n\n", "\n\n\n"])
def test_a_blank_line_may_hold_spaces(blank, tmp_path):
    path = write(tmp_path / "mine.txt", blank.join(PARAGRAPHS))
    assert found(path) == set(PARAGRAPHS)


LINES = [f"Line {i} of the book tells of {i} rivers and {i * i} stones." for i in range(400)]
BOOKS = {
    "lines": "\n".join(LINES),
    "one line": " ".join(LINES),
    "a title and lines": "A book\n\n" + "\n".join(LINES),
    "no spaces": "".join(chr(0x4E00 + i) for i in range(20_000)),
    "old Mac lines": "\r".join(LINES),
}


@pytest.mark.parametrize("book", BOOKS)
def test_a_book_without_blank_lines_has_text_for_every_part(book, tmp_path):
    path = write(tmp_path / "book.txt", BOOKS[book])
    parts = {part: [document for _, document in text.documents(path, part)] for part in corpus.SHARES}
    assert all(parts.values())
    pieces = [document for documents in parts.values() for document in documents]
    assert sum(len("".join(piece.split())) for piece in pieces) == len("".join(BOOKS[book].split())), "nothing is lost or doubled"
    assert max(map(len, pieces)) <= 2 * harvest.PIECE
    if book == "one line":
        assert {word for piece in pieces for word in piece.split()} == set(BOOKS[book].split()), "no word is cut"
    elif book != "no spaces":
        assert {line for piece in pieces for line in piece.split("\n")} == {*LINES, *["A book"] * ("title" in book)}


def test_paragraphs_stay_whole_where_there_are_many(tmp_path):
    body = [" ".join(f"{p} {j}" for j in range(60)) for p in PARAGRAPHS]
    assert min(map(len, body)) > 2 * harvest.PIECE
    assert found(write(tmp_path / "mine.txt", "\n\n".join(body))) == set(body)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_document_of_few_tokens_does_not_make_the_rest_vanish(kind, tmp_path):
    """A word of 50,000 letters is one token: the window goes on with the next documents."""
    body = [p if i % 4 else "x" * 3000 + f"{i:04}" * 200 for i, p in enumerate(PARAGRAPHS)]
    path = write(tmp_path / f"mine.{kind}", "\n\n".join(body) if kind == "txt" else "\n".join(map(row, body)))
    words = sum(len(document.split()) for _, document in text.documents(path, "evaluation"))
    plain = Words()
    windows = text.windows(path, "evaluation", plain, words // 60, 20)
    assert windows.shape == (words // 60, 20)
    assert (windows == 1).any(), "long words are there, as the token that they are"


def test_few_tokens_in_every_document_are_refused_with_how_much_there_is(tmp_path):
    path = write(tmp_path / "mine.txt", "\n\n".join("x" * 1000 + str(i) for i in range(60)))
    with pytest.raises(ValueError, match=r"\d+ documents\) gives \d windows of 20 tokens, 30 are needed"):
        text.windows(path, "calibration", Words(), 30, 20)


def test_a_setting_of_the_tokenizer_does_not_cut_a_window(tmp_path):
    class Cutting(Words):
        def __call__(self, string, truncation=True, padding=True):
            ids = super().__call__(string).input_ids
            self.input_ids = ids[:5] if truncation else ids
            return self

    path = write(tmp_path / "mine.txt", "\n\n".join(PARAGRAPHS))
    assert text.windows(path, "calibration", Cutting(), 2, 9).equal(text.windows(path, "calibration", Words(), 2, 9))


@pytest.mark.parametrize("paragraph", ["\n\n", "\r\n\r\n", "\n \n"])
def test_parts_share_no_paragraph_however_blank_lines_are_written(paragraph, tmp_path):
    """A licence that every document of a crawl ends with is in one part only."""
    notice = "All rights reserved by the harbour office of the town."
    path = write(tmp_path / "mine.jsonl", "\n".join(row(f"{p}{paragraph}{notice}") for p in PARAGRAPHS))
    parts = [[document for _, document in text.documents(path, part)] for part in corpus.SHARES]
    assert sum(document.count(notice) for documents in parts for document in documents) == 1
    sentences = [set(re.findall(r"Paragraph \d+", " ".join(documents))) for documents in parts]
    assert sum(map(len, sentences)) == len(set.union(*sentences)) == 100

"""Calibration, search and evaluation text, as windows of tokens that share no paragraph."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.utils import logging as datasets_logging
from jaxtyping import Int
from torch import Tensor

from .harvest import harvested
from .profiles import Windows

# Tenths of the documents: which part one belongs to follows from its own hash, so adding text moves nothing.
SHARES = {"calibration": range(0, 4), "search": range(4, 6), "evaluation": range(6, 10)}
OWN = ("docs", "code", "english", "random")
# Name on the hub -> configuration and split, for sources that the literature calibrates on
HUB = {
    "c4": ("allenai/c4", "en", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
MOST_DOCUMENTS = 20_000


def check(source: str) -> None:
    """Refuse a text that cannot exist.

    Raises:
        ValueError: with the list of what can be named.
    """
    path = Path(source).expanduser()
    if source in OWN or source in HUB or (path.is_file() and path.suffix in (".txt", ".jsonl")):
        return
    if path.suffix in (".txt", ".jsonl") or path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown text {source!r}: choose {', '.join((*OWN, *HUB))}, an existing .txt file (documents separated by blank "
            "lines), an existing .jsonl file (one object with a `text` a line), or a hub dataset of the form organisation/name"
        )


def windows(source: str, part: str, tokenizer: Callable, size: Windows, seed: int = 0) -> Int[Tensor, "sequence token"]:
    """``size.sequences`` windows of ``size.tokens`` tokens, no two from one document.

    Each window is the beginning of a document, as the tokenizer encodes it (with its beginning-of-sequence token if it has one);
    a document that is too short goes on with the next. The same arguments give the same windows, and fewer windows are the first
    of more. Sources: ``docs`` and ``code`` are the docstrings and the functions of installed packages, ``english`` are essays,
    ``random`` draws every token evenly from the tokenizer's vocabulary without its special tokens; and files and hub datasets.

    Raises:
        ValueError: an unknown source or part, or one with too little text, with how much there is.
    """
    if part not in SHARES:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(SHARES)}")
    if source == "random":
        return _random(tokenizer, size, f"{part} {seed}")
    texts = [document for _, document in documents(source, part)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[list[int]] = []
    text = ""
    for index in order:
        if len(found) == size.sequences:
            break
        text = f"{text}\n\n{texts[index]}" if text else texts[index]
        # A token is at least one byte: far too short a text is not encoded, and far too long a one only in part
        if len(text.encode()) < size.tokens:
            continue
        ids = tokenizer(text[: 20 * size.tokens]).input_ids
        if len(ids) >= size.tokens:
            found.append(ids[: size.tokens])
            text = ""
    if len(found) < size.sequences:
        raise ValueError(
            f"the {part} part of {source} ({len(texts)} documents) gives {len(found)} windows of {size.tokens} tokens, "
            f"{size.sequences} are needed: use more text or a smaller size"
        )
    return torch.tensor(found)


def _random(tokenizer: Callable, size: Windows, stream: str) -> Int[Tensor, "sequence token"]:
    """Tokens that say nothing; another part or seed is another stream."""
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4]))
    rows = [torch.randint(len(plain), (size.tokens,), generator=generator) for _ in range(size.sequences)]
    return plain[torch.stack(rows)]


def digest(ids: Int[Tensor, "sequence token"]) -> str:
    """A short hash of the windows: two runs on the same text and tokenizer have the same."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()[:12]


def belongs(key: str, part: str) -> bool:
    """Whether the documents of this key (of ``docs``: the file they are from) are in the part."""
    return hashlib.sha256(key.encode()).digest()[0] % 10 in SHARES[part]


@lru_cache(maxsize=8)
def documents(source: str, part: str) -> tuple[tuple[str, str], ...]:
    """(key, text) of the documents of one part, without paragraphs that an earlier document, of any part, already had."""
    check(source)
    seen: set[bytes] = set()
    kept: list[tuple[str, str]] = []
    for key, document in _documents(source):
        fresh = []
        for paragraph in document.split("\n\n"):
            mark = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
            if mark not in seen:
                seen.add(mark)
                fresh.append(paragraph)
        if fresh and belongs(key, part):
            kept.append((key, "\n\n".join(fresh).strip()))
    return tuple((key, document) for key, document in kept if document)


def _documents(source: str) -> Iterator[tuple[str, str]]:
    """(key, text) of every document; documents with one key go into the same part."""
    path = Path(source).expanduser()
    if source in OWN:
        for item in json.loads(harvested(source).read_text(encoding="utf-8")):
            yield item["file"], item["text"]
    elif path.suffix == ".txt":
        for document in path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n"):
            yield document, document
    else:
        rows = _rows(source)
        for count, row in enumerate(rows):
            if count == MOST_DOCUMENTS:
                break
            if "text" not in row:
                raise ValueError(f"{source} has no column `text`, only {', '.join(row)}")
            if row["text"].strip():
                yield row["text"], row["text"]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """The datasets library without its own bars and notices."""
    verbosity, bars = datasets_logging.get_verbosity(), are_progress_bars_disabled()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        if not bars:
            enable_progress_bars()


def _rows(source: str) -> Iterable[dict]:
    """The rows of a .jsonl file or of a dataset of the hub."""
    name, config, split = HUB.get(source, (source, None, "train"))
    with quiet_datasets():
        try:
            if name.endswith(".jsonl"):
                return load_dataset("json", data_files=str(Path(name).expanduser()), split="train")
            return load_dataset(name, config, split=split, streaming=name == "allenai/c4")
        except Exception as error:  # the datasets library raises a dozen kinds
            raise ValueError(
                f"the text {source} could not be loaded ({str(error).strip().splitlines()[0]}); a dataset of the hub needs the "
                "network once, or a local hub cache (HF_HOME), a .jsonl file one JSON object a line"
            ) from error

"""Windows of tokens from the calibration, validation and evaluation parts of a text, which share no paragraph."""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.utils import logging as datasets_logging
from jaxtyping import Bool, Int
from torch import Tensor

from .harvest import PIECE, harvested

# Tenths of the documents: which part one belongs to follows from its own hash, so adding text moves nothing.
SHARES = {"calibration": range(0, 4), "validation": range(4, 6), "evaluation": range(6, 10)}
OWN = ("docs", "code", "english", "spanish", "random")
# Name on the hub -> configuration and split, for sources that the literature calibrates on
HUB = {
    "c4": ("allenai/c4", "en", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
MOST_DOCUMENTS = 20_000
GZIP = b"\x1f\x8b"  # how a gzip file begins
SHARE = re.compile(r"(.+):(\d+(?:\.\d+)?)")  # a source of a mixture and its share
BLANK = re.compile(r"(?m)^[^\S\n]+$")
# Pieces of a long text: they end with a line, else with a word, else anywhere
PIECES = re.compile(rf"(?s).{{{PIECE}}}.{{0,{PIECE}}}?(?:\n|\Z)|.{{{PIECE}}}.{{0,{PIECE}}}?\s|.{{{2 * PIECE}}}|.+")


def mixture(source: str) -> dict[str, float]:
    """The sources of a mixture with their shares: ``docs+english`` has equal ones, ``docs:3+english`` is three quarters docs.

    A name that is a file is that file, whatever signs it has.

    Raises:
        ValueError: a source that is named twice, or a share that is not positive.
    """
    if "+" not in source or Path(source).expanduser().is_file():
        return {source: 1.0}
    weights: dict[str, float] = {}
    for part in source.split("+"):
        share = SHARE.fullmatch(part.strip())
        name, weight = (share[1], float(share[2])) if share and not Path(part).expanduser().is_file() else (part.strip(), 1.0)
        if name in weights or not weight > 0:
            raise ValueError(f"the mixture {source!r} names {name!r} twice, or with a share that is not positive")
        weights[name] = weight
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def check_text(source: str) -> None:
    """Refuse a text that cannot exist.

    Raises:
        ValueError: with the list of what can be named.
    """
    if len(names := mixture(source)) > 1:
        for name in names:
            check_text(name)
        return
    if not source.strip():
        raise ValueError(f"no text is named: choose {', '.join((*OWN, *HUB))}, a file or a hub dataset")
    path = Path(source).expanduser()
    if source in OWN or source in HUB or (path.is_file() and _format(path)):
        return
    if _format(path) or path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown text {source!r}: choose {', '.join((*OWN, *HUB))}, an existing .txt file (documents separated by blank "
            "lines), an existing .jsonl file (one object with a `text` per line), either also as .gz, a hub dataset of the form "
            "organisation/name, or a mixture such as docs+english or docs:3+english"
        )


def windows(
    source: str, part: str, tokenizer: Callable, n_sequences: int, n_tokens: int, seed: int = 0
) -> Int[Tensor, "sequence token"]:
    r"""``n_sequences`` windows of ``n_tokens`` tokens, no two from one document.

    Each window is the beginning of a document, as the tokenizer encodes it (with its beginning-of-sequence token if it has one);
    a document that is too short goes on with the next. The same arguments give the same windows, and fewer windows are the first
    of more. Sources: ``docs`` and ``code`` are the docstrings and the functions of installed packages, ``english`` are essays,
    ``spanish`` are dialogues, ``random`` draws every token evenly from the tokenizer's vocabulary without its special tokens;
    files and hub datasets; and mixtures of them (``docs+english``, ``docs:3+english``), whose windows take turns in proportion to
    the shares.

    Raises:
        ValueError: an unknown source or part, or one with too little text, with how much there is.

    >>> notes = tmp_path / "notes.txt"
    >>> _ = notes.write_text("\n\n".join(f"Note {i}: the ferry leaves at {i} past the hour." for i in range(60)))
    >>> windows(str(notes), "calibration", tokenizer, n_sequences=3, n_tokens=8).shape
    torch.Size([3, 8])
    """
    if part not in SHARES:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(SHARES)}")
    check_text(source)
    shares = mixture(source)
    turns = _turns(list(shares.values()), n_sequences)
    cut = [
        _windows(name, part, tokenizer, turns.count(i), n_tokens, seed, tuple(shares)[:i]) if i in turns else None
        for i, name in enumerate(shares)
    ]
    return torch.stack([cut[i][turns[:number].count(i)] for number, i in enumerate(turns)]) if len(shares) > 1 else cut[0]


def pasted_windows(
    pasted: str, tokenizer: Callable, n_sequences: int, n_tokens: int, least: int = 32
) -> Int[Tensor, "sequence token"]:
    """One text as at most ``n_sequences`` windows of at most ``n_tokens`` tokens; the rest of the last one is left out.

    Raises:
        ValueError: fewer than ``least`` tokens.
    """
    ids = tokenizer(pasted).input_ids
    tokens = min(n_tokens, len(ids))
    if tokens < least:
        raise ValueError(f"the pasted text has {len(ids)} tokens: at least {least} are needed to rank or evaluate on it")
    sequences = min(n_sequences, len(ids) // tokens)
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


def _turns(shares: list[float], n: int) -> list[int]:
    """Whose turn each of ``n`` windows is: that of the source which is furthest behind its share, so fewer turns begin more."""
    turns: list[int] = []
    for number in range(n):
        behind = [share * (number + 1) - turns.count(i) for i, share in enumerate(shares)]
        turns.append(behind.index(max(behind)))
    return turns


def _windows(
    source: str, part: str, tokenizer: Callable, n_sequences: int, n_tokens: int, seed: int, earlier: tuple[str, ...]
) -> Int[Tensor, "sequence token"]:
    """The windows of one source, without paragraphs that the earlier sources of a mixture have."""
    if source == "random":
        return _random(tokenizer, n_sequences, n_tokens, f"{part} {seed}")
    texts = [document for _, document in _documents_of(source, part, earlier, *_versions((*earlier, source)))]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[list[int]] = []
    text = ""
    for index in order:
        if len(found) == n_sequences:
            break
        text = f"{text}\n\n{texts[index]}" if text else texts[index]
        # A token is at least one byte: a text that is too short is not encoded, and of a long one the beginning usually suffices
        if len(text.encode()) < n_tokens:
            continue
        ids = _encode(tokenizer, text[: 20 * n_tokens])
        if len(ids) < n_tokens and len(text) > 20 * n_tokens:
            ids = _encode(tokenizer, text)
        if len(ids) >= n_tokens:
            found.append(ids[:n_tokens])
            text = ""
    if len(found) < n_sequences:
        raise ValueError(
            f"the {part} part of {source} ({len(texts)} documents) gives {len(found)} windows of {n_tokens} tokens, "
            f"{n_sequences} are needed: use more text or a smaller size"
        )
    return torch.tensor(found)


def _encode(tokenizer: Callable, text: str) -> list[int]:
    """The ids of a whole text, whatever truncation and padding the tokenizer was set to before."""
    try:
        return tokenizer(text, truncation=False, padding=False).input_ids
    except TypeError:  # a plain function
        return tokenizer(text).input_ids


def _random(tokenizer: Callable, n_sequences: int, n_tokens: int, stream: str) -> Int[Tensor, "sequence token"]:
    """Tokens that say nothing; another part or seed is another stream."""
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4]))
    rows = [torch.randint(len(plain), (n_tokens,), generator=generator) for _ in range(n_sequences)]
    return plain[torch.stack(rows)]


def repeated(ids: Int[Tensor, "window token"]) -> Int[Tensor, "window token2"]:
    """Windows in which the tokens after the first stand twice, one copy after the other.

    A model predicts the second copy by attention to the first. So a search on these windows measures what an attention layer does
    for recall, which short windows do not show. The first token, where models look that attend to nothing, stands once.

    >>> import torch
    >>> repeated(torch.arange(4)[None]).tolist()
    [[0, 1, 2, 3, 1, 2, 3]]
    """
    return torch.cat([ids, ids[:, 1:]], 1)


def tokens_with(pattern: str, ids: Int[Tensor, "window token"], tokenizer: Callable) -> Bool[Tensor, "window token"]:
    r"""Which tokens, decoded one by one, contain what a regular expression finds.

    A search that counts only the digits of worked calculations (``counted=tokens_with(r"\d", ids, tokenizer)``) spares what
    calculates. Among all tokens they are too few to decide it.

    >>> ids = windows("docs", "calibration", tokenizer, 1, 32)
    >>> tokens_with("[a-z]", ids, tokenizer).shape
    torch.Size([1, 32])
    """
    matches = {i: re.search(pattern, tokenizer.decode([i])) is not None for i in ids.unique().tolist()}
    return torch.tensor([[matches[i] for i in window] for window in ids.tolist()])


def text_digest(ids: Int[Tensor, "sequence token"]) -> str:
    """A short hash of the windows: two runs on the same text and tokenizer have the same."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()[:12]


def belongs_to(key: str, part: str) -> bool:
    """Whether the documents of this key (of ``docs``: the file they are from) are in the part."""
    return hashlib.sha256(key.encode()).digest()[0] % 10 in SHARES[part]


def documents(source: str, part: str) -> tuple[tuple[str, str], ...]:
    """(key, text) of the documents of one part, without paragraphs that an earlier document, of any part, already had."""
    check_text(source)
    names = tuple(mixture(source))
    parts = [_documents_of(name, part, names[:i], *_versions(names[: i + 1])) for i, name in enumerate(names) if name != "random"]
    return parts[0] if len(parts) == 1 else tuple(document for documents in parts for document in documents)


def _versions(names: tuple[str, ...]) -> Iterator[object]:
    """What changes when one of the files among these sources does."""
    for path in (Path(name).expanduser() for name in names if name not in (*OWN, *HUB)):
        if _format(path):
            yield from (path.resolve(), path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=8)
def _documents_of(source: str, part: str, earlier: tuple[str, ...], *version: object) -> tuple[tuple[str, str], ...]:
    """The documents, without the paragraphs of earlier sources; read once for each version of a file."""
    seen: set[bytes] = set()
    for name in earlier:
        for _, document in _documents(name) if name != "random" else ():
            seen.update(_mark(paragraph) for paragraph in document.split("\n\n"))
    kept: list[tuple[str, str]] = []
    for key, document in _documents(source):
        fresh = []
        for paragraph in document.split("\n\n"):
            if (mark := _mark(paragraph)) not in seen:
                seen.add(mark)
                fresh.append(paragraph)
        if fresh and belongs_to(key, part):
            kept.append((key, "\n\n".join(fresh).strip()))
    return tuple((key, document) for key, document in kept if document)


def _mark(paragraph: str) -> bytes:
    """A hash of a paragraph, whatever its white space."""
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()


def _documents(source: str) -> Iterator[tuple[str, str]]:
    """(key, text) of every document; documents with one key go into the same part."""
    path = Path(source).expanduser()
    if source in OWN:
        yield from ((item["file"], item["text"]) for item in json.loads(harvested(source).read_text(encoding="utf-8")))
        return
    if source not in HUB and _format(path) == "txt":
        found = _paragraphs(_read_text(path))
    else:
        rows = _hub_rows(source) if source in HUB or not _format(path) else _json_rows(path)
        found = (_plain(_text_of(row, f"{place} of {source}")) for place, row in islice(rows, MOST_DOCUMENTS))
    yield from ((document, document) for document in found if document.strip())


def _text_of(row: object, place: str) -> str:
    """The text of a row; empty where it is null.

    Raises:
        ValueError: the row has no text, with its place.
    """
    if not isinstance(row, dict) or "text" not in row:
        has = f"only {', '.join(row) or 'nothing'}" if isinstance(row, dict) else f"it is of type {type(row).__name__}"
        raise ValueError(f"{place} has no column `text`, {has}")
    if row["text"] is not None and not isinstance(row["text"], str):
        raise ValueError(f"{place} has a `text` of type {type(row['text']).__name__}: it must be a string")
    return row["text"] or ""


def _plain(text: str) -> str:
    """A text whose lines end in one way, whose blank lines are empty, and whose half characters (of cut emoji) are replaced."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode(errors="replace").decode()
    return BLANK.sub("", text)


def _format(path: Path) -> str | None:
    """The format of a text file by its name, in any case and also compressed: txt, jsonl or None."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower()[1:] if suffix.lower() in (".txt", ".jsonl") else None


def _read_text(path: Path) -> str:
    """A file as text: UTF-8, or UTF-16 with a byte-order mark; decompressed, whatever its name, if it is a gzip file.

    Raises:
        ValueError: another encoding, an empty or damaged file, or no text.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"the text {path} cannot be read ({error}): get a whole copy") from error
    encoding = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    try:
        text = content.decode(encoding).replace("\ufeff", "")  # byte-order marks, of which files that were joined have several
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text {path} is not {encoding} (byte {error.start}): convert it to UTF-8, as in iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"the text {path} holds zero bytes: it is no text, or UTF-16 without a mark, so convert it to UTF-8")
    if not text.strip():
        raise ValueError(f"the text {path} is empty")
    return text


def _paragraphs(text: str) -> Iterator[str]:
    """The documents of a plain text, which blank lines separate.

    One with more than a tenth of the text, such as a book without blank lines, is cut into pieces of ``PIECE`` characters: a whole
    one would leave the parts without text. A piece ends with a line, or with a word where lines are long.
    """
    text = _plain(text)
    for document in text.split("\n\n"):
        yield from PIECES.findall(document) if len(document) > max(len(text) / 10, 2 * PIECE) else [document]


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The place and content of every row of a .jsonl file; blank lines are skipped.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {path} is not JSON ({error}): correct it, or remove it if it is cut") from error


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


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    """The place and content of every row of a dataset of the hub, some of which come only while they are read."""
    name, config, split = HUB.get(source, (source, None, "train"))
    with quiet_datasets():
        try:
            for number, row in enumerate(load_dataset(name, config, split=split, streaming=name == "allenai/c4"), 1):
                yield f"row {number}", row
        except Exception as error:  # the datasets library raises a dozen kinds
            raise ValueError(
                f"the text {source} could not be loaded ({' '.join(str(error).split())[:300]}); a dataset of the hub needs the "
                "network once, or a local hub cache (HF_HOME)"
            ) from error

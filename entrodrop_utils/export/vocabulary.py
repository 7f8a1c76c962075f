"""The vocabulary of a GGUF file: from a byte-level BPE or SentencePiece-like tokenizer, or copied from another file."""

import json
from pathlib import Path

from gguf import GGUFReader, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

# How text is split before BPE, as a tokenizer.json states it, and the name under which llama.cpp's source has that pattern
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


def _parts(step: dict | None, key: str) -> list[dict]:
    return step[key] if step and step["type"] == "Sequence" else [step] if step else []


def _pre_tokenizer(settings: dict) -> str | None:
    """llama.cpp's name of the way in which text is split; None where none of its names is known to be it."""
    steps = _parts(settings["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if any(step["type"] != "NFC" for step in _parts(settings["normalizer"], "normalizers")):
        return None
    if kinds == ["ByteLevel"] and steps[-1]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[-1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[-1]["use_regex"] and steps[0]["behavior"] == "Isolated":
        return PATTERNS.get(steps[0]["pattern"].get("Regex"))
    return None


def _scores(pieces: dict[str, int], merges: list[list[str]]) -> list[float] | None:
    """SentencePiece's score of each piece, the higher the sooner it is joined; None where merges do not follow from such scores.

    SentencePiece joins by the score of the result, BPE by the rank of the pair: they agree where all pairs with one result stand
    side by side.
    """
    scores, last = [0.0] * (max(pieces.values()) + 1), None
    seen: set[str] = set()
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece != last and piece in seen:
            return None
        if piece != last:
            scores[pieces[piece]] = -float(rank) - 1
        seen.add(piece)
        last = piece
    return scores


def check_vocabulary(tokenizer: PreTrainedTokenizerBase | str | Path | None, rows: int) -> None:
    """Refuse a tokenizer that a GGUF file cannot hold, before anything is written.

    Raises:
        ValueError: what it is, and what to do.
    """
    _entries(tokenizer, rows)


def _copied(path: Path, rows: int) -> list[tuple[str, object, object, object]]:
    try:
        fields = [field for key, field in GGUFReader(path).fields.items() if key.startswith("tokenizer.")]
    except Exception as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}): name a file whose vocabulary is to be copied") from error
    size = next((len(field.data) for field in fields if field.name == "tokenizer.ggml.tokens"), 0)
    if size != rows:
        raise ValueError(f"{path} has {size} tokens and the model's embedding {rows} rows: it belongs to another model")
    return [(f.name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None) for f in fields]


def _entries(tokenizer, rows: int) -> list[tuple[str, object, object, object]]:
    """(key, value, type, type of an array's members; None for what Python's types say)."""
    if tokenizer is None:
        return [("tokenizer.ggml.model", "none", None, None)]
    if isinstance(tokenizer, (str, Path)):
        return _copied(Path(tokenizer), rows)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = "name a .gguf file of the base model as tokenizer, and its vocabulary is copied"
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer, so its rules cannot be read: {how}")
    settings = json.loads(backend.to_str())
    model, added = settings["model"], {token["id"]: token for token in settings["added_tokens"]}
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} vocabulary cannot be written: {how}")
    pieces = model["vocab"] | {token["content"]: number for number, token in added.items()}
    if max(pieces.values()) >= rows:
        raise ValueError(
            f"the tokenizer has token {max(pieces.values())} and the model's embedding {rows} rows: it belongs to another model"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for piece, number in pieces.items():
        tokens[number], types[number] = piece, int(TokenType.NORMAL)
        if number in added:
            types[number] = int(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        elif model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x"):
            types[number] = int(TokenType.BYTE)
    entries = [("tokens", tokens), ("token_type", types)]
    if model.get("byte_fallback"):
        steps = _parts(settings["normalizer"], "normalizers")
        scores = _scores(pieces, merges)
        spaces = {"Prepend": None, "Replace": {"String": " "}}
        if scores is None or any(step["type"] not in spaces or step.get("pattern") != spaces[step["type"]] for step in steps):
            raise ValueError(f"its merges or its normaliser are not those of SentencePiece: {how}")
        prefix = any(step["type"] == "Prepend" for step in steps)
        scores += [0.0] * (rows - len(scores))
        entries = [("model", "llama"), ("pre", "default"), *entries, ("scores", scores), ("add_space_prefix", prefix)]
    else:
        split = _pre_tokenizer(settings)
        if split is None or bool(model.get("ignore_merges")) != (split == "llama-bpe"):
            raise ValueError(f"llama.cpp's name for the way in which this tokenizer splits text is not known here: {how}")
        entries = [("model", "gpt2"), ("pre", split), *entries, ("merges", [" ".join(merge) for merge in merges])]
    ids = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    entries += [
        (f"{name}_token_id", number)
        for name, ours in ids.items()
        if (number := getattr(tokenizer, f"{ours}_token_id", None)) is not None
    ]
    first = tokenizer("a").input_ids[:1]
    entries.append(("add_bos_token", bool(first) and first[0] == tokenizer.bos_token_id))
    entries = [(f"tokenizer.ggml.{key}", value, None, None) for key, value in entries]
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        entries.append(("tokenizer.chat_template", template, None, None))
    return entries


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | str | Path | None, rows: int) -> None:
    """Add a vocabulary of as many tokens as the embedding has rows.

    Raises:
        ValueError: as ``check_vocabulary``.
    """
    for key, value, kind, member in _entries(tokenizer, rows):
        if kind is not None:
            writer.add_key_value(key, value, kind, sub_type=member)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)

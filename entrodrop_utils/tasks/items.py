"""The items of the suite's own tasks: from templates, from held-out documentation, and from random words."""

import ast
import random
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import cycle, islice, takewhile
from pathlib import Path

from .. import text
from ..text.harvest import package_files

TEMPLATES = Path(__file__).with_name("minimal_pairs.toml")
PAIRS = 200  # of each phenomenon
MOST_ITEMS = 500  # of each other task
# One item: a context, its possible continuations, and which of them is right. One continuation alone: it is to be predicted.
Item = dict[str, str | int | list[str]]


def item(rng: random.Random, context: str, right: str, wrong: Iterable[str]) -> Item:
    """A multiple-choice item, the right answer at a random place."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "gold": choices.index(right)}


# Minimal pairs


@lru_cache
def phenomena() -> dict[str, list[str]]:
    """The kinds of minimal pairs and their templates; each kind is a task of its own, ``minimal_pairs_<phenomenon>``."""
    return tomllib.loads(TEMPLATES.read_text(encoding="utf-8"))["phenomena"]


@lru_cache
def lexicon() -> dict[str, list[dict[str, str]]]:
    """The entries of each list, by column."""
    lists = tomllib.loads(TEMPLATES.read_text(encoding="utf-8"))["lexicon"]
    split = {n: [words.split("/" if "/" in words else None) for words in columns.values()] for n, columns in lists.items()}
    return {name: [dict(zip(lists[name], row, strict=True)) for row in zip(*split[name], strict=True)] for name in lists}


def fill(template: str, lists: dict[str, list[dict[str, str]]], rng: random.Random) -> tuple[str, str]:
    """The grammatical and the ungrammatical sentence of a template, as ``tasks/minimal_pairs.toml`` explains it."""
    entries: dict[str, dict[str, str]] = {}
    columns: dict[str, str] = {}

    for slot, name, number, column in re.findall(r"(\{([a-z_]+)(2?)\.?(\w*)\})", template):
        key = name + number
        if key not in entries:
            entries[key] = rng.choice([entry for entry in lists[name] if entry not in entries.values()])
            columns[key] = rng.choice(list(entries[key]))
        template = template.replace(slot, entries[key][column or columns[key]], 1)
    variants = (re.sub(r"\[([^|]*)\|([^]]*)\]", rf"\{side}", template) for side in (1, 2))
    good, bad = (variant[0].upper() + variant[1:] for variant in variants)
    return good, bad


def pairs(rng: random.Random, phenomenon: str) -> Iterator[Item]:
    """Distinct pairs, as many of each template. What both sentences begin with is the context: it adds the same to both."""
    seen: set[tuple[str, str]] = set()
    for template in islice(cycle(phenomena()[phenomenon]), PAIRS):
        tries = (fill(template, lexicon(), rng) for _ in range(1000))
        good, bad = pair = next((pair for pair in tries if pair not in seen), ("", ""))
        if not good:
            raise ValueError(f"{phenomenon}: {template!r} gives too few sentences for {PAIRS} pairs: add a slot or words to it")
        seen.add(pair)
        shared = takewhile(lambda both: both[0] == both[1], zip(good.split(" "), bad.split(" "), strict=False))
        context = " ".join(word for word, _ in shared)
        yield item(rng, context, good[len(context) :], [bad[len(context) :]])


# Held-out documentation


def prose(document: str) -> Iterator[str]:
    """The paragraphs of a docstring that are plain sentences, each in one line."""
    for paragraph in document.split("\n\n"):
        line = " ".join(paragraph.split())
        odd = re.search(r"^[\s.*\->]|::|[|=\\<>{}\[\]]|---", paragraph, re.M)
        if not odd and re.match(r"[A-Z][a-z]* ", line) and line.endswith("."):
            yield line


def continuations(rng: random.Random) -> Iterator[Item]:
    """The words 19 to 26 of a docstring's prose, among those of three others of the same package, about as long."""
    begun: dict[str, dict[str, str]] = {}
    for file, document in text.documents("docs", "evaluation"):
        words = " ".join(prose(document)).split()
        if len(words) >= 26:
            begun.setdefault(file.split("/")[0], {})[" ".join(words[:18])] = " " + " ".join(words[18:26])
    for package in begun.values():
        for context, right in package.items():
            others = sorted({end for end in package.values() if end != right and abs(len(end) - len(right)) <= len(right) // 5})
            if len(others) >= 3:
                yield item(rng, context, right, rng.sample(others, 3))


def last_words(rng: random.Random) -> Iterator[Item]:
    """Sentences of one paragraph whose last word, of three letters or more, they have had before; each such word once."""
    for _, document in text.documents("docs", "evaluation"):
        for paragraph in prose(document):
            sentences = re.split(r"(?<=\.) (?=[A-Z])", paragraph)
            spans = [sentences[first:last] for first in range(len(sentences)) for last in range(first + 1, len(sentences) + 1)]
            passages = [" ".join(span)[:-1].split(" ") for span in spans]
            fit = [p for p in passages if 8 <= len(p) <= 32 and re.fullmatch("[a-z]{3,}", p[-1]) and p[-1] in p[:-1]]
            for *context, word in {p[-1]: p for p in rng.sample(fit, len(fit))}.values():
                yield {"context": " ".join(context), "choices": [" " + word], "gold": 0}


def signatures(rng: random.Random) -> Iterator[Item]:
    """Functions with their parameters, the section of the docstring that describes them begun, and which name comes next."""
    seen: set[str] = set()
    for file, path in package_files():
        source = path.read_bytes()
        if not text.belongs_to(file, "evaluation") or not re.search(rb"Parameters\s+-", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            section = re.search(r"^Parameters\n-+\n(.*?)(\n\n\w+\n--|\Z)", ast.get_docstring(node) or "", re.M | re.S)
            described = re.findall(r"^(\w+) ?: ?([\w ]*)", section[1], re.M) if section else []
            if not 4 <= len(names) <= 8 or len(described) < 2 or not {name for name, _ in described} <= set(names):
                continue
            given = rng.randrange(1, min(len(described), 4))
            lines = [f"{name} : {' '.join(kind.split()[:3])}".strip() for name, kind in described[:given]]
            definition = f"def {node.name}({', '.join(names)}):"
            if definition in seen:
                continue
            seen.add(definition)
            context = "\n".join([definition, '"""', "Parameters", "----------", *lines])
            right = described[given][0]
            wrong = rng.sample([name for name in names if name != right], 3)
            yield item(rng, context, f"\n{right} :", [f"\n{name} :" for name in wrong])


# Copying


def repetitions(rng: random.Random) -> Iterator[Item]:
    """Random words, one of them again at the end: what followed it the first time, among three others of the words."""
    words = sorted(
        {next(iter(entry.values())) for name in ("thing", "mass", "person", "man", "woman") for entry in lexicon()[name]}
    )
    for _ in range(MOST_ITEMS):
        drawn = rng.sample(words, 8)
        cue = rng.randrange(1, 6)
        others = [word for place, word in enumerate(drawn) if place not in (cue, cue + 1)]
        yield item(rng, " ".join([*drawn, drawn[cue]]), " " + drawn[cue + 1], [" " + word for word in rng.sample(others, 3)])

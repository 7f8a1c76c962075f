"""Tasks for lm-evaluation-harness that need no download: made here from templates and from held-out documentation.

``build()`` writes them once as a folder that ``lm_eval`` reads (``TaskManager(include_path=...)`` or ``--include_path``).
"""

import ast
import hashlib
import json
import os
import random
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice, takewhile
from pathlib import Path

import pandas as pd
import yaml
from filelock import FileLock

from . import text
from .profiles import DATA
from .progress import progress

TASKS = DATA / "tasks"
TEMPLATES = DATA / "minimal_pairs.toml"
PAIRS = 200  # of each phenomenon
MOST_ITEMS = 500  # of each other task
GRAM = 13  # words: no item shares so many in a row with the text that ranks or chooses sub-blocks

# One item: a context, its possible continuations, and which of them is right. One continuation alone: it is to be predicted.
Item = dict[str, str | int | list[str]]


@dataclass(frozen=True)
class Card:
    """What a task measures, and the accuracy of guessing."""

    measures: str
    chance: float


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
    """The grammatical and the ungrammatical sentence of a template, as ``data/minimal_pairs.toml`` explains it."""
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
    for file, path in text.files():
        source = path.read_bytes()
        if not text.belongs(file, "evaluation") or not re.search(rb"Parameters\s+-", source):
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


# The folder that lm-evaluation-harness reads


CARDS = {
    "minimal_pairs": Card("which of two sentences, alike but for one point of grammar, is the likelier", 0.5),
    "docs_continuation": Card("how a held-out docstring goes on, among four continuations from its package", 0.25),
    "docs_last_word": Card("the last word of a held-out passage that has had it before, as the likeliest word", 0.0),
    "docstring_arguments": Card("the parameter that a docstring describes next, among four of the signature's", 0.25),
    "induction": Card("what followed a word of a random list the first time, among four words of the list", 0.25),
}
NAMES = tuple(CARDS)

# Not dataset_path: json, which would need absolute paths and leave a copy in the user's cache
READER = '''"""The items of a task, for lm-evaluation-harness; copy the folder wherever you need it."""

import json
from pathlib import Path

from datasets import Dataset


def read(file, **_):
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
'''


def build() -> Path:
    """The folder of the tasks, made once for these templates, this code and the installed documentation; the same bytes each time.

    ``lm_eval.tasks.TaskManager(include_path=build())`` knows ``NAMES`` and the phenomena.
    """
    sources = (Path(__file__), Path(text.__file__), TEMPLATES)
    stamp = hashlib.sha256(text.harvested("docs").name.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = TASKS / stamp
    TASKS.mkdir(parents=True, exist_ok=True)
    with FileLock(TASKS / f"{stamp}.lock"):
        if not folder.exists():
            unfinished = TASKS / f"{stamp}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished)
            os.replace(unfinished, folder)
    return folder


def write(folder: Path) -> None:
    """All tasks, their items in an order that makes the first n a fair sample."""
    others = [document for part in ("calibration", "search") for _, document in text.documents("docs", part)]
    leaks = {gram for document in progress(others, "reading the text that tasks must not share") for gram in grams(document)}
    makers = {
        **{f"minimal_pairs_{p}": pairs(random.Random(p), p) for p in phenomena()},
        "docs_continuation": continuations(random.Random(1)),
        "docs_last_word": last_words(random.Random(2)),
        "docstring_arguments": signatures(random.Random(3)),
        "induction": repetitions(random.Random(4)),
    }
    for name, made in progress(makers.items(), "building tasks"):
        items = list({whole(one): one for one in made if not any(grams(t) & leaks for t in whole(one))}.values())
        random.Random(name).shuffle(items)
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in items[:MOST_ITEMS]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        save(folder / f"{name}.yaml", settings(name), "custom_dataset: !function rows.read\n")
    group = {
        "group": "minimal_pairs",
        "task": [f"minimal_pairs_{p}" for p in phenomena()],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0, "chance": CARDS["minimal_pairs"].chance},
    }
    save(folder / "minimal_pairs.yaml", group)
    (folder / "rows.py").write_text(READER, encoding="utf-8")


def settings(name: str) -> dict:
    """How lm-evaluation-harness runs a task; ``metadata`` holds its chance level."""
    free = name == "docs_last_word"
    target = {"doc_to_target": "{{choices[0]}}"} if free else {"doc_to_choice": "choices", "doc_to_target": "gold"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    if free:
        metrics.append({"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False})
    return {
        "task": name,
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "test_split": "test",
        "output_type": "loglikelihood" if free else "multiple_choice",
        "doc_to_text": "context",
        **target,
        "target_delimiter": "",
        "metric_list": metrics,
        "metadata": {"version": 1.0, "chance": CARDS["minimal_pairs" if name.startswith("minimal_pairs_") else name].chance},
    }


def save(path: Path, content: dict, more: str = "") -> None:
    """A YAML file; ``more`` is what plain YAML cannot say."""
    path.write_text(yaml.safe_dump(content, sort_keys=False) + more, encoding="utf-8")


def cards() -> pd.DataFrame:
    """task, what it measures, chance level and number of items of each of ``NAMES``."""
    counts = {name: sum(len(path.read_text().splitlines()) for path in build().glob(f"{name}*.jsonl")) for name in NAMES}
    return pd.DataFrame([{"task": name, **vars(card), "items": counts[name]} for name, card in CARDS.items()])


def whole(one: Item) -> tuple[str, ...]:
    """The texts that a model is given for an item."""
    return tuple(sorted(one["context"] + choice for choice in one["choices"]))


def grams(string: str) -> set[int]:
    """Every ``GRAM`` words in a row, whatever is between them, as numbers."""
    words = re.findall(r"\w+", string.lower())
    return {hash(" ".join(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1)}

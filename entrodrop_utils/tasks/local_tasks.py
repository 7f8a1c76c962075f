"""Local tasks: built from templates and held-out documentation, without a download, for lm-evaluation-harness.

``build_tasks()`` writes them once as a folder that ``lm_eval`` reads (``TaskManager(include_path=...)`` or ``--include_path``).
"""

import hashlib
import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from .. import text
from ..files import build_once
from ..models.downloads import sha256
from ..paths import TASKS
from ..progress import progress
from ..text import corpus, harvest
from . import items as items_module
from .items import MOST_ITEMS, TEMPLATES, Item, continuations, last_words, pairs, phenomena, repetitions, signatures

COMPLETE = "complete"  # a file that is written last, with the hash of every other file
GRAM = 13  # consecutive words that no item shares with calibration or validation text


@dataclass(frozen=True)
class TaskCard:
    """What a task measures, and the accuracy of guessing."""

    measures: str
    chance: float


TASK_CARDS = {
    "minimal_pairs": TaskCard("which of two sentences, alike but for one point of grammar, is the likelier", 0.5),
    "docs_continuation": TaskCard("how a held-out docstring goes on, among four continuations from its package", 0.25),
    "docs_last_word": TaskCard("the last word of a held-out passage that has had it before, as the likeliest word", 0.0),
    "docstring_arguments": TaskCard("the parameter that a docstring describes next, among four of the signature's", 0.25),
    "induction": TaskCard("what followed a word of a random list the first time, among four words of the list", 0.25),
}
NAMES = tuple(TASK_CARDS)

# Not dataset_path: json, which would need absolute paths and leave a copy in the user's cache
READER = '''"""The items of a task, for lm-evaluation-harness; copy the folder wherever you need it."""

import json
from pathlib import Path

from datasets import Dataset


def read(file, **_):
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
'''


def is_local_task(name: str) -> bool:
    """Whether a task is local: one of ``NAMES``, or one phenomenon of the minimal pairs."""
    return name in (*NAMES, *(f"minimal_pairs_{p}" for p in phenomena()))


def build_tasks() -> Path:
    """The folder of the tasks, built once for these templates, this code and the installed documentation.

    ``lm_eval.tasks.TaskManager(include_path=build_tasks())`` knows ``NAMES`` and the phenomena.
    """
    sources = [TEMPLATES, *(Path(module) for module in (harvest.__file__, corpus.__file__, items_module.__file__, __file__))]
    made_of = harvest.harvested("docs").name.encode() + b"".join(path.read_bytes() for path in sources)
    stamp = hashlib.sha256(made_of).hexdigest()[:12]
    return build_once(TASKS / stamp, write_tasks, lambda: _is_whole(TASKS / stamp))


def _is_whole(folder: Path) -> bool:
    """Whether the folder has every file that was written, as it was written."""
    with suppress(OSError, ValueError, AttributeError):
        hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all(sha256(folder / name) == digest for name, digest in hashes.items())
    return False


def write_tasks(folder: Path) -> None:
    """All tasks, their items in an order that makes the first n a fair sample."""
    folder.mkdir(exist_ok=True)
    others = [document for part in ("calibration", "validation") for _, document in text.documents("docs", part)]
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
        write_yaml(folder / f"{name}.yaml", task_settings(name), "custom_dataset: !function rows.read\n")
    group = {
        "group": "minimal_pairs",
        "task": [f"minimal_pairs_{p}" for p in phenomena()],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0, "chance": TASK_CARDS["minimal_pairs"].chance},
    }
    write_yaml(folder / "minimal_pairs.yaml", group)
    (folder / "rows.py").write_text(READER, encoding="utf-8")
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / COMPLETE).write_text(json.dumps(hashes, indent=1), encoding="utf-8")


def task_settings(name: str) -> dict:
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
        "metadata": {"version": 1.0, "chance": TASK_CARDS["minimal_pairs" if name.startswith("minimal_pairs_") else name].chance},
    }


def write_yaml(path: Path, content: dict, more: str = "") -> None:
    """A YAML file; ``more`` is what plain YAML cannot say."""
    path.write_text(yaml.safe_dump(content, sort_keys=False) + more, encoding="utf-8")


def task_cards() -> pd.DataFrame:
    """task, what it measures, chance level and number of items of each of ``NAMES``."""
    counts = {name: sum(len(path.read_text().splitlines()) for path in build_tasks().glob(f"{name}*.jsonl")) for name in NAMES}
    return pd.DataFrame([{"task": name, **vars(card), "items": counts[name]} for name, card in TASK_CARDS.items()])


def whole(one: Item) -> tuple[str, ...]:
    """The texts that a model is given for an item."""
    return tuple(sorted(one["context"] + choice for choice in one["choices"]))


def grams(string: str) -> set[int]:
    """Every ``GRAM`` words in a row, whatever is between them, as numbers."""
    words = re.findall(r"\w+", string.lower())
    return {hash(" ".join(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1)}

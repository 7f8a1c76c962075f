"""Progress bars of long steps: in the notebook page, or in the terminal when notebooks run headless."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm as terminal_bar
from tqdm.auto import tqdm as page_bar

from .processes import is_main_process

T = TypeVar("T")
# The runner sets this to a file and shows its text in the terminal: a bar drawn inside a cell would be committed as a dead widget
HEADLESS = "ENTRODROP_PROGRESS"
# Receives every step (label, done, total) in place of a bar; an exception that it raises ends the work. Each thread has its own.
LISTENER: ContextVar[Callable[[str, int, int | None], None] | None] = ContextVar("listener", default=None)


def report_step(label: str, done: int, total: int | None) -> None:
    """Report progress to the listener, if there is one: for steps too short for a bar of their own."""
    if listener := LISTENER.get():
        listener(label, done, total)


_notices: set[str] = set()


def notice(message: str) -> None:
    """Say something once: in the terminal when notebooks run headless, as a warning otherwise."""
    if message in _notices:
        return
    _notices.add(message)
    if path := os.environ.get(HEADLESS):
        with suppress(OSError), open(path, "a", encoding="utf-8") as log:  # on a full disk, of which the message may tell
            log.write(f"{message}\n")
    else:
        warnings.warn(message, stacklevel=3)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items one by one, with a labelled bar that disappears when they are done; of several processes the main one shows it."""
    if not is_main_process():
        yield from items
    elif LISTENER.get():
        total = len(items) if total is None and hasattr(items, "__len__") else total
        for done, item in enumerate(items):
            report_step(label, done, total)
            yield item
    elif path := os.environ.get(HEADLESS):
        with open(path, "a", encoding="utf-8") as log:
            yield from terminal_bar(items, label, total, file=log, leave=False, ascii=True, ncols=88, mininterval=1.0)
    elif "ipykernel" in sys.modules:
        yield from page_bar(items, desc=label, total=total, leave=False)
    else:
        yield from terminal_bar(items, label, total, leave=False, disable=None)

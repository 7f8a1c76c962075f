"""Progress of long steps: in the page when a person looks at one, in the terminal when notebooks run headless."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm as terminal_bar
from tqdm.auto import tqdm as page_bar

# The runner of notebooks names a file here and shows in the terminal what is appended to it: a bar that is drawn inside a
# cell would be committed as a dead widget.
T = TypeVar("T")
HEADLESS = "ENTRODROP_PROGRESS"
# Who is told of every step (what, done, total) in place of a bar; what it raises ends the work. A thread has its own.
LISTENER: ContextVar[Callable[[str, int, int | None], None] | None] = ContextVar("listener", default=None)


def step(what: str, done: int, total: int | None) -> None:
    """Tell the listener, if there is one, how far ``what`` has come: for steps too short for a bar of their own."""
    if listener := LISTENER.get():
        listener(what, done, total)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one, with a bar that says how far ``what`` has come and is gone when it is done."""
    if LISTENER.get():
        total = len(items) if total is None and hasattr(items, "__len__") else total
        for done, item in enumerate(items):
            step(what, done, total)
            yield item
    elif path := os.environ.get(HEADLESS):
        with open(path, "a", encoding="utf-8") as log:
            yield from terminal_bar(items, what, total, file=log, leave=False, ascii=True, ncols=88, mininterval=1.0)
    elif "ipykernel" in sys.modules:
        yield from page_bar(items, desc=what, total=total, leave=False)
    else:
        yield from terminal_bar(items, what, total, leave=False, disable=None)

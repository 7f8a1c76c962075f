"""Slow work in a thread, so that the page stays responsive: the newest job replaces the others.

A job that was replaced or cancelled stops at its next step of progress.
"""

import math
import threading
import time
from collections.abc import Callable

from IPython import get_ipython

from ..progress import LISTENER, report_step

OFTEN = 0.2  # seconds between two reports of progress: a page that redraws more often does nothing else
QUIET = 0.5  # seconds after a cell in which Run All would have begun the next one


class Cancelled(BaseException):
    """Ends a job that a newer one or a cancel has replaced. No Exception: code that handles errors must let it through."""


class Background:
    """Runs jobs, one at a time, in a thread of its own; ``do`` stops what is running and skips what is waiting.

    Args:
        report: called with (what, fraction or None) as a job goes on, and with ("", None) when the thread has nothing to do.
        failed: called with one sentence when a job raises.
    """

    def __init__(self, report: Callable[[str, float | None], None], failed: Callable[[str], None]):
        self._report, self._failed = report, failed
        self._changed = threading.Condition()
        self._newest = self._mine = self._done = 0
        self._job: Callable[[], object] | None = None
        self._last, self._said = 0.0, ""
        threading.Thread(target=self._run, daemon=True, name="explorer").start()

    def do(self, job: Callable[[], object] | None) -> None:
        """Run this as soon as what is running now has been stopped, which is at its next step; None ends the thread."""
        with self._changed:
            self._newest, self._job = self._newest + 1, job
            self._changed.notify_all()

    def cancel(self) -> None:
        """Stop what is running and forget what is waiting."""
        self.do(lambda: None)

    def wait(self, seconds: float | int) -> bool:
        """Whether all work is done within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done == self._newest, seconds)

    def _listen(self, what: str, done: int, total: int | None) -> None:
        if self._newest != self._mine:
            raise Cancelled
        if what != self._said or time.monotonic() - self._last >= OFTEN:
            self._last, self._said = time.monotonic(), what
            self._report(what, done / total if total else None)

    def _run(self) -> None:
        LISTENER.set(self._listen)  # of this thread only
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest != self._mine)
                self._mine, job = self._newest, self._job
            if job is None:
                return
            try:
                job()
            except Cancelled:
                continue
            except Exception as error:
                self._failed(sentence(error))
            if self._mine == self._newest:
                self._report("", None)
            with self._changed:
                self._done = self._mine
                self._changed.notify_all()


class Cells:
    """The cells of the notebook, which somebody waits for: work that nobody waits for lets them go first."""

    def __init__(self):
        self._events = {"pre_run_cell": self._begin, "post_run_cell": self._end}
        self._busy_until = math.inf if get_ipython() else 0.0  # the cell that this is made in
        self._each("register")

    def _begin(self, *_: object) -> None:
        self._busy_until = math.inf

    def _end(self, *_: object) -> None:
        self._busy_until = time.monotonic() + QUIET

    def _each(self, what: str) -> None:
        for name, heard in self._events.items() if get_ipython() else ():
            getattr(get_ipython().events, what)(name, heard)

    def wait(self) -> None:
        """Until no cell runs, in steps of progress."""
        while time.monotonic() < self._busy_until:
            report_step("a cell runs", 0, None)
            time.sleep(0.05)

    def close(self) -> None:
        """Listen no more."""
        self._each("unregister")


def sentence(error: Exception) -> str:
    """An error as one sentence for a person: its message, and its kind where the message alone says too little."""
    said = " ".join(str(error).split())
    plain = said and isinstance(error, (ValueError, RuntimeError, OSError))
    return said if plain else f"{type(error).__name__}: {said}".rstrip(": ")

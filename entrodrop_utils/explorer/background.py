"""A thread for slow work, so that the page stays responsive: the newest job replaces the others.

A job that was replaced or cancelled stops at its next step of progress.
"""

import threading
import time
from collections.abc import Callable

from ..progress import LISTENER

OFTEN = 0.2  # seconds between two reports of progress: a page that redraws more often does nothing else


class Cancelled(BaseException):
    """Ends a job that a newer one or a cancel has replaced. No Exception: code that handles errors must let it through."""


class Background:
    """Runs jobs, one at a time, in a thread of its own; ``do`` replaces what is waiting and stops what is running.

    Args:
        report: called with (what, fraction or None) as a job goes on, and with ("", None) when the thread has nothing to do.
        failed: called with one sentence when a job raises.
    """

    def __init__(self, report: Callable[[str, float | None], None], failed: Callable[[str], None]):
        self._report, self._failed = report, failed
        self._news = threading.Condition()
        self._waiting: Callable[[], None] | None = None
        self._newest = self._mine = 0
        self._last, self._said, self._closed = 0.0, "", False
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, daemon=True, name="explorer").start()

    def do(self, job: Callable[[], None] | None) -> None:
        """Run this as soon as what is running now has been stopped, which is at its next step."""
        with self._news:
            self._waiting, self._newest = job, self._newest + 1
            self._idle.clear()
            self._news.notify()

    def cancel(self) -> None:
        """Stop what is running and forget what is waiting."""
        self.do(lambda: None)

    def close(self) -> None:
        """Stop for good."""
        self._closed = True
        self.cancel()

    def wait(self, seconds: float | int) -> bool:
        """Whether all work is done within so many seconds."""
        return self._idle.wait(seconds)

    def _listen(self, what: str, done: int, total: int | None) -> None:
        if self._newest != self._mine:
            raise Cancelled
        if what != self._said or time.monotonic() - self._last >= OFTEN:
            self._last, self._said = time.monotonic(), what
            self._report(what, done / total if total else None)

    def _run(self) -> None:
        LISTENER.set(self._listen)  # of this thread only
        while not self._closed:
            with self._news:
                while self._waiting is None:
                    self._idle.set()
                    self._news.wait()
                job, self._waiting, self._mine = self._waiting, None, self._newest
            try:
                job()
            except Cancelled:
                pass
            except Exception as error:
                self._failed(sentence(error))
            if self._newest == self._mine:
                self._report("", None)


def sentence(error: Exception) -> str:
    """An error as one sentence for a person: its message, and its kind where the message alone says too little."""
    said = " ".join(str(error).split())
    return (
        said if isinstance(error, (ValueError, RuntimeError, OSError)) and said else f"{type(error).__name__}: {said}".rstrip(": ")
    )

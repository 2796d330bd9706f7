"""What a person sees while a stage runs. Stages speak to this interface; the command line decides how it looks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

log = logging.getLogger("fiberwalk")


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, amount: float, detail: str = "") -> None:
        """Add finished work, and say in a few words how it goes."""
        ...


class Progress(Protocol):
    """Where stages report."""

    def note(self, text: str) -> None:
        """One line that a person wants to keep."""
        ...

    def bar(self, title: str, total: float, done: float = 0) -> AbstractContextManager[Bar]:
        """A bar for work of a known size, of which some may be done already."""
        ...


class LogBar:
    """Writes a line at most every few seconds."""

    def __init__(self, title: str, total: float, done: float, every: float = 5.0):
        self._title, self._total, self._done, self._every = title, total, done, every
        self._began, self._at_begin, self._last = time.monotonic(), done, time.monotonic()

    def advance(self, amount: float, detail: str = "") -> None:
        """Add finished work; the last line is always written."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < self._every and self._done < self._total:
            return
        self._last = now
        rate = (self._done - self._at_begin) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        said = f", {detail}" if detail else ""
        log.info("%s: %d of %d%s, %.0f s left", self._title, self._done, self._total, said, left)


class LogProgress:
    """Plain lines through `logging`: for files, pipes and tests."""

    def note(self, text: str) -> None:
        """Log one line."""
        log.info("%s", text)

    @contextmanager
    def bar(self, title: str, total: float, done: float = 0) -> Iterator[LogBar]:
        """Log lines now and then."""
        yield LogBar(title, total, done)

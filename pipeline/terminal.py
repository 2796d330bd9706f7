"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from pipeline.progress import LogProgress
from pipeline.progress import Progress as Shown


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task = progress, task

    def advance(self, amount: float, detail: str = "") -> None:
        self._progress.update(self._task, advance=amount, detail=detail)


class LiveProgress:
    """Bars that redraw in place; a context manager."""

    def __init__(self, console: Console):
        self._rich = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )

    def __enter__(self) -> LiveProgress:
        self._rich.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._rich.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._rich.console.print(text)

    @contextmanager
    def bar(self, title: str, total: float, done: float = 0) -> Iterator[_LiveBar]:
        """Show a bar until the block ends."""
        task = self._rich.add_task(title, total=total, completed=int(done), detail="")
        try:
            yield _LiveBar(self._rich, task)
        finally:
            self._rich.stop_task(task)


@contextmanager
def shown_progress(console: Console, quiet: bool) -> Iterator[Shown]:
    """A live bar on a terminal, unless it shall be quiet; plain lines on the standard output elsewhere."""
    if console.is_terminal and not quiet:
        with LiveProgress(console) as progress:
            yield progress
        return
    logger = logging.getLogger("fiberwalk")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.handleError = lambda record: None  # no traceback for each line to a pipe that was closed
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield LogProgress()
    finally:
        logger.removeHandler(handler)

"""Where work runs. Stages are handed an executor; one process is the reference, and Ray must equal it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.run import Run

Item = TypeVar("Item")
Event = TypeVar("Event")


class Executor(Protocol):
    """Runs a generator function once for each item and hands on what it yields."""

    def stream(
        self, function: Callable[[Run, Item], Iterator[Event]], run: Run, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Event]]:
        """Yield (item, event) as events happen.

        The function lies at the top of a module, does only what is missing, and yields small events: an item whose
        worker dies is run again, and what it computes goes to the store, never through here.

        Raises:
            RunError: Items failed again and again; raised after all others are done.
            InputError: As raised by the function.
        """
        ...

    def release(self) -> None:
        """Let workers go that are held for a next stream, so that others can use their place."""
        ...


class SerialExecutor:
    """One item after the other in this process: the reference."""

    def stream(
        self, function: Callable[[Run, Item], Iterator[Event]], run: Run, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Event]]:
        """See `Executor.stream`. An error ends the run at once."""
        for item in items:
            for event in function(run, item):
                yield item, event

    def release(self) -> None:
        """Nothing is held."""

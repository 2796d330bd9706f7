"""Walker actors and the executor over them: bounded in flight, completion order, nothing big through the driver."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import Config
from pipeline.errors import InputError, RunError
from pipeline.run import Run

Item = TypeVar("Item")
Event = TypeVar("Event")
log = logging.getLogger("fiberwalk")
_LOOK = 1.0
"""Seconds between looks at the cluster while nothing happens."""
_GROW = 5.0
"""Seconds between looks for resources that have appeared."""
_PATIENT = 30.0
"""Seconds without any actor after which the driver says what it waits for."""
_SHORT = 0.5
"""Mean seconds of an item below which a second one waits at each actor, so that it never idles."""


class Walker:
    """Runs one item at a time. Holds nothing a restart could lose: state lives in the store."""

    def __init__(self, run: Run, threads: int):
        import torch

        from workers.metrics import WalkMetrics

        torch.set_num_threads(threads)
        self._run, self._metrics = run, WalkMetrics(run.config.run_id)

    @ray.method
    def ready(self) -> None:
        """Return once the actor is up."""

    @ray.method(num_returns="streaming")
    def stream(self, function: Callable[[Run, Any], Iterator[Any]], item: Any) -> Iterator[Any]:
        """Yield what the function yields; safe to call again after a crash."""
        for event in function(self._run, item):
            self._metrics.observe(event)
            yield event


@dataclass
class _Work(Generic[Item]):
    """One item and its history."""

    item: Item
    failures: int = 0
    """Attempts in a row that ended without an event."""
    error: BaseException | None = None


@dataclass(eq=False)
class _Member:
    """One actor of the pool and the calls that it holds, oldest first."""

    handle: Any
    ready: bool = False
    calls: deque[tuple[Any, _Work[Any]]] = field(default_factory=deque)


class RayExecutor:
    """Runs items on a pool of `Walker` actors. See `pipeline.executor.Executor`.

    The actors stay for the next stream of the same run, until `release`.
    """

    def __init__(self, config: Config):
        self._cluster = config.cluster
        self._members: list[_Member] = []
        self._run: Run | None = None
        self._run_ref: Any = None
        self._looked = 0.0
        self._alone_since: float | None = None

    def stream(
        self, function: Callable[[Run, Item], Iterator[Event]], run: Run, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Event]]:
        """Yield (item, event) in completion order; see `Executor.stream`."""
        self._adopt(run)
        queue = deque(_Work(item) for item in items)
        failed: list[_Work[Item]] = []
        began, finished = time.monotonic(), 0
        complete = False
        try:
            # An actor for which there is no room may never be ready: nobody waits for it once the work is done.
            while queue or any(work is not _READY for member in self._members for _, work in member.calls):
                short = finished >= 2 and (time.monotonic() - began) * len(self._members) / finished < _SHORT
                self._fill(function, queue, 2 if short else 1)
                for member in self._wait():
                    for work, event in self._take(member):
                        if event is not _DONE:
                            work.failures = 0
                            yield work.item, event
                        elif work.error is None:
                            finished += 1
                        else:
                            self._again(work, queue, failed)
            complete = True
        finally:
            if not complete:
                self.release()
        if failed:
            raise _failure(failed, len(items))

    def release(self) -> None:
        """Let the actors go. What they have not committed is done again by the next run."""
        for member in self._members:
            _end(member.handle)
        self._members.clear()
        self._run = self._run_ref = None

    def _adopt(self, run: Run) -> None:
        if self._run is not run:
            self.release()
            self._run, self._run_ref = run, ray.put(run)
        self._looked, self._alone_since = 0.0, None

    def _fill(self, function: Any, queue: deque[_Work[Any]], depth: int) -> None:
        """Bring the pool to its size and give each actor work."""
        busy = sum(len(member.calls) > 0 for member in self._members)
        self._grow(len(queue) + busy)
        for level in range(1, depth + 1):  # everybody's first call before anybody's second
            for member in self._members:
                if queue and member.ready and len(member.calls) < level:
                    work = queue.popleft()
                    work.error = None
                    member.calls.append((member.handle.stream.remote(function, work.item), work))

    def _grow(self, useful: int) -> None:
        now = time.monotonic()
        if self._members and now - self._looked < _GROW:
            return
        self._looked = now
        for _ in range(min(self._size(), useful) - len(self._members)):
            self._members.append(self._hire())
        if any(member.ready for member in self._members):
            self._alone_since = None
            return
        self._alone_since = self._alone_since or now
        if now - self._alone_since > _PATIENT:
            log.warning(
                "Waiting for the cluster: no walker has started in %.0f s; each needs %g CPUs and %g GPUs.",
                now - self._alone_since,
                self._cluster.cpus_per_actor,
                self._cluster.gpus_per_actor,
            )

    def _size(self) -> int:
        """Return how many actors the pool should have now."""
        if self._cluster.actors != "auto":
            return int(self._cluster.actors)
        free = ray.available_resources()
        fits = [free.get("CPU", 0) // self._cluster.cpus_per_actor]
        if self._cluster.gpus_per_actor:
            fits.append(free.get("GPU", 0) // self._cluster.gpus_per_actor)
        pending = any(not member.ready for member in self._members)
        return max(1, len(self._members) + (0 if pending else int(min(fits))))

    def _hire(self) -> _Member:
        cpus, gpus = self._cluster.cpus_per_actor, self._cluster.gpus_per_actor
        walker: Any = ray.remote(Walker)
        handle = walker.options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0).remote(
            self._run_ref, max(1, int(cpus))
        )
        member = _Member(handle)
        member.calls.append((handle.ready.remote(), _READY))
        return member

    def _wait(self) -> list[_Member]:
        """Return members whose oldest call has something to say."""
        waiting = {member.calls[0][0]: member for member in self._members if member.calls}
        if not waiting:
            return []
        heard, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK, fetch_local=False)
        return [waiting[call] for call in heard]

    def _take(self, member: _Member) -> Iterator[tuple[_Work[Any], Any]]:
        """Yield the next event of a member, or `_DONE` with the error in the work."""
        call, work = member.calls[0]
        try:
            if work is _READY:
                ray.get(call)
                member.ready = True
                member.calls.popleft()
                return
            event = ray.get(next(call))
        except StopIteration:
            member.calls.popleft()
            yield work, _DONE
            return
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, InputError):
                raise InputError(str(cause)) from error
            if work is _READY:
                raise RunError(f"A walker could not start: {cause}") from error
            member.calls.popleft()
            work.error = cause
            yield work, _DONE
            return
        except RayError as error:
            yield from self._bury(member, error)
            return
        yield work, event

    def _bury(self, member: _Member, error: RayError) -> Iterator[tuple[_Work[Any], Any]]:
        """Replace a dead actor; its running item failed, a waiting one only goes back."""
        self._members.remove(member)
        self._looked = 0.0
        _end(member.handle)
        log.info("A walker was lost (%s); its work goes to another.", type(error).__name__)
        for number, (_, work) in enumerate(call for call in member.calls if call[1] is not _READY):
            work.error = error
            work.failures -= 1 if number else 0
            yield work, _DONE

    def _again(self, work: _Work[Item], queue: deque[_Work[Item]], failed: list[_Work[Item]]) -> None:
        work.failures += 1
        if work.failures > self._cluster.max_restarts:
            failed.append(work)
        else:
            queue.append(work)


_READY: _Work[Any] = _Work(None)
_DONE = object()


def _end(handle: Any) -> None:
    try:
        ray.kill(handle, no_restart=True)
    except (RayError, ValueError):  # it is gone already
        log.debug("An actor had ended before.")


def _failure(failed: list[_Work[Any]], total: int) -> RunError:
    first = failed[0]
    return RunError(
        f"{len(failed)} of {total} pieces of work failed {first.failures} times in a row, the first {first.item}: "
        f"{_reason(first.error)}. The others are done; what is committed stays, and the same command goes on."
    )


def _reason(error: BaseException | None) -> str:
    """One short line; Ray's own messages about dead actors name hosts and go on for a page."""
    if isinstance(error, RayError):
        advice = "its process was killed, ran out of memory or crashed, or its node went away"
        return f"the walker was lost each time ({type(error).__name__}: {advice})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"

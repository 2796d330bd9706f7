"""Processes that bench_walk drives: each holds its implementations ready and runs steps when it is told to."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.walk_cases import CASES, IMPLEMENTATIONS, Case, Problem


class Worker:
    """A process of its own, bound to some cores.

    Args:
        cores: Cores it may run on.
        threads: Threads of torch; JAX takes one for each core.
    """

    def __init__(self, cores: list[int], threads: int):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, cores, threads), daemon=True)
        self._process.start()

    def ask(self, name: str, *args: Any) -> None:
        """Start a call; `answer` waits for it."""
        self._here.send((name, args))

    def answer(self) -> Any:
        """What the call returned. Raises what it raised."""
        result = self._here.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def call(self, name: str, *args: Any) -> Any:
        """Call and wait."""
        self.ask(name, *args)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._here.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, cores: list[int], threads: int) -> None:
    os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of the compared libraries about their own insides
    held: dict[Any, Any] = {}
    while (message := pipe.recv()) is not None:
        name, args = message
        try:
            pipe.send(_CALLS[name](held, *args))
        except Exception as error:  # noqa: BLE001 the bench's own process shows it
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _prepare(held: dict, key: str, case: Case, implementation: str, walks: int) -> float:
    """Build it, take one step, and return the processor's seconds of a second one."""
    held[key] = IMPLEMENTATIONS[implementation][1](Problem(case, walks))
    held[key](1)
    began = time.process_time()
    held[key](1)
    return time.process_time() - began


def _steps(held: dict, key: str, steps: int) -> tuple[float, float, float]:
    """Take steps; when it began, when it ended, and the processor's seconds."""
    began, used = time.perf_counter(), time.process_time()
    held[key](steps)
    return began, time.perf_counter(), time.process_time() - used


def _forget(held: dict, key: str) -> None:
    held.pop(key, None)


def _peak_memory(held: dict, case: str, implementation: str) -> float:
    """MiB that the process gained from before the problem was built to its peak after three steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if implementation == "jax":
        import jax.numpy as jnp

        jnp.zeros(1).block_until_ready()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = Problem(CASES[case], CASES[case].walks)
    IMPLEMENTATIONS[implementation][1](problem)(3)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _rates(held: dict, case: Case, walks: int) -> dict[str, float]:
    """Rates of the machine with this worker's threads, each the best of short repeats; see `walk_roofline`."""
    from tests.bench.walk_roofline import rates

    return rates(case, walks)


def _spin(held: dict, elements: int, seconds: float) -> float:
    """Elements of tanh a second over a buffer of this size, with nothing else: what the machine gives a process."""
    import torch

    values, out = torch.linspace(-1, 1, elements), torch.empty(elements)
    repeats, done, began = max(1, (1 << 20) // elements), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(repeats):
            torch.tanh(values, out=out)
        done += repeats * elements
    return done / (time.perf_counter() - began)


_CALLS = {
    "prepare": _prepare,
    "steps": _steps,
    "forget": _forget,
    "peak_memory": _peak_memory,
    "rates": _rates,
    "spin": _spin,
}

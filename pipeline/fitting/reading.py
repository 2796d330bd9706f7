"""From stored rows to what a fit learns from: the drift of each walk, and its points at marks of the radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.build import Problem, drift_of
from pipeline.fitting.job import HELD_BYTES, Rows, Team, agreed, is_held_out
from pipeline.plan import WalkPlan
from pipeline.run import Run

CACHE_BYTES = 256 << 20
KEEP_BYTES = 256 << 20
Part = TypeVar("Part")


class Kept(Generic[Part]):
    """Parts that are read again and again: kept where they fit `KEEP_BYTES`, else streamed on every pass."""

    def __init__(self, read: Callable[[], Iterator[Part]], size: Callable[[Part], int]):
        self._read, self._size = read, size
        self._parts: list[Part] | None = None
        self._large = False

    def __iter__(self) -> Iterator[Part]:
        if self._parts is not None:
            yield from self._parts
            return
        parts: list[Part] = []
        size = 0
        for part in self._read():
            size += self._size(part)
            self._large = self._large or size > KEEP_BYTES
            if self._large:
                parts.clear()
            else:
                parts.append(part)
            yield part
        self._parts = None if self._large else parts


class KeptPoints:
    """Points at the radius that was last asked for, kept where they fit: reading them takes longer than a draw."""

    def __init__(self, read: Callable[[float], Iterator[Tensor]]):
        self._read = read
        self._kept: dict[float, Kept[Tensor]] = {}

    def __call__(self, radius: float) -> Iterator[Tensor]:
        """The same batches as `read` gives, in the same order."""
        if radius not in self._kept:
            self._kept = {radius: Kept(lambda: self._read(radius), lambda batch: batch.nbytes)}
        return iter(self._kept[radius])


def to_rows(columns: dict[str, np.ndarray], rank: int, size: int, shared: bool) -> Rows:
    """This worker's points of a batch, diverged ones left out."""
    keep = columns["status"] != "diverged"
    if shared:
        keep &= columns["walk"] % size == rank
    index = np.flatnonzero(keep)
    theta = torch.from_numpy(np.ascontiguousarray(columns["theta"][index]))
    radius = columns["radius"][index].astype(np.float64)
    return Rows(columns["walk"][index], radius, columns["potential"][index], columns["nll"][index], theta)


class Directions:
    """The drift of each walk at unit radius, drawn again from its stream; kept where all of them fit."""

    def __init__(self, run: Run, plan: WalkPlan, problem: Problem, dtype: torch.dtype):
        self._run, self._plan, self._precision, self._dtype = run, plan, problem.precision, dtype
        self._room = CACHE_BYTES // (plan.dim * 8)
        self._kept: dict[int, Tensor] = {}

    def of(self, walks: np.ndarray) -> Tensor:
        """(b,) -> (b, D)."""
        return torch.stack([self._one(int(walk)) for walk in walks])

    def _one(self, walk: int) -> Tensor:
        if walk in self._kept:
            return self._kept[walk]
        drift = drift_of(self._run, self._plan, self._precision, walk)
        direction = torch.from_numpy(drift / self._plan.length).to(self._dtype)
        if len(self._kept) < self._room:
            self._kept[walk] = direction
        return direction


@dataclass(frozen=True)
class Points:
    """Points of walks at one mark, b of them."""

    place: Tensor
    """Which of this worker's walks, (b,)."""
    direction: Tensor
    """Drift at unit radius, (b, D)."""
    offset: Tensor
    """theta - theta*, (b, D)."""


class Walks:
    """This worker's walks, each with its record nearest to every mark: what the walk contributes at that radius.

    A walk that its guard has held back counts with the point that it has reached.

    Attributes:
        walk: Their numbers, (w,).
        marks: Radii, rising.
        potential: U of each record, (w, marks), float64.
        nll: Its summed NLL, (w, marks), float64.
    """

    def __init__(self, team: Team, marks: list[float], directions: Directions, theta_star: Tensor, rank: int):
        self._directions, self._star, self.marks = directions, theta_star, marks
        most = HELD_BYTES // (16 * rank * theta_star.element_size())
        self._parts = Kept(team.rows, lambda rows: rows.theta.nbytes)
        best: dict[int, list[tuple[float, int, float, float]]] = {}
        count = 0
        with agreed(team):
            for rows in self._parts:
                gaps = np.abs(rows.radius[:, None] - np.asarray(marks)).tolist()
                found = zip(rows.walk.tolist(), gaps, rows.potential.tolist(), rows.nll.tolist(), strict=True)
                for row, (walk, gap, *energy) in enumerate(found, start=count):
                    if walk not in best and len(best) >= most:
                        continue
                    now = best.setdefault(walk, [(np.inf, -1, np.nan, np.nan)] * len(marks))
                    best[walk] = [min(old, (g, row, *energy)) for old, g in zip(now, gap, strict=True)]
                count += len(rows.walk)
        self.walk = np.array(list(best), dtype=np.int64)
        self._place = {walk: place for place, walk in enumerate(best)}
        self._uses = np.zeros((count, len(marks)), dtype=bool)
        for nearest in best.values():
            for mark, (_, row, *_) in enumerate(nearest):
                self._uses[row, mark] = True
        energies = [[energy for _, _, *energy in nearest] for nearest in best.values()]
        self.potential, self.nll = torch.tensor(energies, dtype=torch.float64).reshape(-1, len(marks), 2).unbind(2)

    @property
    def held(self) -> Tensor:
        """Which walks are kept for judging, (w,) bool."""
        return torch.from_numpy(is_held_out(self.walk))

    def at(self, mark: int) -> Iterator[Points]:
        """One pass over the points at a mark."""
        first = 0
        for rows in self._parts:
            index = np.flatnonzero(self._uses[first : first + len(rows.walk), mark])
            first += len(rows.walk)
            if len(index):
                walks = rows.walk[index]
                yield Points(
                    place=torch.tensor([self._place[walk] for walk in walks.tolist()]),
                    direction=self._directions.of(walks),
                    offset=rows.theta[index].to(self._star) - self._star,
                )

"""From blocks to what a fit learns from: the blocks of a worker, the drift of each walk, and nodes of the radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.build import Problem, drift_of
from pipeline.fitting.job import Rows, Team, batch_rows, is_held_out
from pipeline.plan import BlockKey, WalkPlan
from pipeline.run import Run
from pipeline.store import SampleStore

NODES = 16
"""Most radii with weights of their own."""
MARKS = 4
"""Most radii at which the network is looked at."""
CACHE_BYTES = 256 << 20
KEEP_BYTES = 256 << 20
COLUMNS = ["walk", "radius", "potential", "status", "theta"]


def keys_of(store: SampleStore, start: int, rank: int, size: int) -> list[BlockKey]:
    """Committed blocks that a worker reads, in order: whole shards where there are enough, else all of them."""
    shards = [s.index for s in store.plan.shards() if s.start == start]
    mine = set(shards[rank::size] if len(shards) >= size else shards)
    return [key for key in store.entries() if key.shard in mine]


def by_walk(store: SampleStore, start: int, size: int) -> bool:
    """Whether workers share shards, and each takes only its own walks of them."""
    return sum(s.start == start for s in store.plan.shards()) < size


def stored_rows(store: SampleStore, keys: list[BlockKey]) -> Iterator[dict[str, np.ndarray]]:
    """Columns of blocks in batches of the same sizes as Ray Data gives: the same sums, whoever reads."""
    size = batch_rows(store.plan.dim)
    kept: list[dict[str, np.ndarray]] = []
    for key in keys:
        file, _ = store.open_block(key)
        with file:
            for batch in file.iter_batches(batch_size=size, columns=COLUMNS):
                columns = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in COLUMNS[:-1]}
                kept.append(columns | {"theta": batch.column("theta").to_numpy_ndarray()})
                if sum(len(part["walk"]) for part in kept) >= size:
                    joined = {name: np.concatenate([part[name] for part in kept]) for name in COLUMNS}
                    yield {name: values[:size] for name, values in joined.items()}
                    kept = [{name: values[size:] for name, values in joined.items()}]
    rest = {name: np.concatenate([part[name] for part in kept]) for name in COLUMNS} if kept else {}
    if rest and len(rest["walk"]):
        yield rest


class Kept:
    """Rows that are read again and again: kept where they fit `KEEP_BYTES`, else streamed on every pass."""

    def __init__(self, read: Callable[[], Iterator[Rows]]):
        self._read = read
        self._rows: list[Rows] | None = None
        self._large = False

    def __iter__(self) -> Iterator[Rows]:
        if self._rows is not None:
            yield from self._rows
            return
        rows: list[Rows] = []
        size = 0
        for part in self._read():
            size += part.theta.nbytes
            self._large = self._large or size > KEEP_BYTES
            if self._large:
                rows.clear()
            else:
                rows.append(part)
            yield part
        self._rows = None if self._large else rows


def to_rows(columns: dict[str, np.ndarray], rank: int, size: int, shared: bool) -> Rows:
    """This worker's points of a batch, diverged ones left out."""
    keep = columns["status"] != "diverged"
    if shared:
        keep &= columns["walk"] % size == rank
    index = np.flatnonzero(keep)
    theta = torch.from_numpy(np.ascontiguousarray(columns["theta"][index]))
    return Rows(columns["walk"][index], columns["radius"][index].astype(np.float64), columns["potential"][index], theta)


@dataclass(frozen=True)
class Grid:
    """Radii at which the residual is learned."""

    nodes: list[float]
    marks: list[int]
    selected: int
    tolerance: float
    """A point belongs to the nearest node if it is not farther than this."""

    @classmethod
    def of(cls, plan: WalkPlan, radius: float) -> Grid:
        """At most `NODES` recorded radii with the selected one among them, and marks up to it."""
        radii = plan.radii()
        selected = int(np.abs(radii - radius).argmin())
        spread = np.linspace(0, len(radii) - 1, min(NODES, len(radii))).round().astype(int)
        lookouts = [round((selected + 1) * (j + 1) / MARKS) - 1 for j in range(MARKS)]
        chosen = sorted({selected, *spread.tolist(), *(m for m in lookouts if m >= 0)})
        marks = sorted({chosen.index(m) for m in lookouts if m >= 0} | {chosen.index(selected)})
        gap = float(radii[1] - radii[0]) if len(radii) > 1 else float(radii[0])
        return cls([float(radii[i]) for i in chosen], marks, chosen.index(selected), 0.5001 * gap)

    def node_of(self, radius: np.ndarray) -> np.ndarray:
        """Node of each point, (b,); -1 where none is near."""
        gaps = np.abs(radius[:, None] - np.asarray(self.nodes))
        nearest = gaps.argmin(axis=1)
        return np.where(gaps[np.arange(len(radius)), nearest] <= self.tolerance, nearest, -1)


@dataclass
class Walks:
    """What is held of this worker's walks: never positions."""

    walk: np.ndarray
    """(w,)."""
    targets: Tensor
    """Coefficients of the residual at each node, (w, nodes, k); NaN where a walk has no point there."""
    rise: Tensor
    """Potential of the point, (w, nodes), float64; NaN likewise."""
    squares: Tensor
    """Squares of offset minus free displacement, and of what the stretch leaves of it, (w, nodes, 2), float64."""
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    """(w, p)."""

    @property
    def held(self) -> Tensor:
        """Which walks are kept for judging, (w,) bool."""
        return torch.from_numpy(is_held_out(self.walk))


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
class Offsets:
    """Points near a node as free direction and offset from theta*."""

    walk: np.ndarray
    node: np.ndarray
    radius: Tensor
    """(b, 1)."""
    direction: Tensor
    """At unit radius, (b, D)."""
    offset: Tensor
    """theta - theta*, (b, D)."""
    potential: np.ndarray


def offsets(team: Team, grid: Grid, directions: Directions, theta_star: Tensor) -> Iterator[Offsets]:
    """One pass over this worker's points that lie near a node."""
    for rows in team.rows():
        node = grid.node_of(rows.radius)
        index = np.flatnonzero(node >= 0)
        if len(index):
            yield Offsets(
                walk=rows.walk[index],
                node=node[index],
                radius=torch.from_numpy(rows.radius[index])[:, None].to(theta_star),
                direction=directions.of(rows.walk[index]),
                offset=rows.theta[index].to(theta_star) - theta_star,
                potential=rows.potential[index],
            )

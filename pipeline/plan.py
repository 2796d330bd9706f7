"""What will be computed, before anything is: shards, blocks, random streams, and what they cost.

Everything here is a function of its arguments alone, so that any machine that holds the plan computes the same points.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.streams import stream as stream

FRACTIONS = {"plain": 0.3, "deflated": 0.5, "momentum": 0.15, "deflated-momentum": 0.15}
"""Step over inverse curvature of each correction."""
MOMENTUM = 0.95
"""Share of the last displacement that a momentum walk keeps."""


@dataclass(frozen=True)
class Shard:
    """Walks that advance together in one actor: the unit of work and of retry."""

    index: int
    start: int
    """MAP estimate from which these walks begin."""
    first_walk: int
    walks: int


@dataclass(frozen=True, order=True)
class BlockKey:
    """Names one block of a shard: its path, and with the seed its random stream."""

    shard: int
    block: int

    @property
    def path(self) -> str:
        """Path below the run, in hive partition style."""
        return f"walks/shard={self.shard:05d}/block={self.block:05d}.parquet"


@dataclass(frozen=True)
class WalkPlan:
    """The walk with every automatic choice made; stored as ``plan.json`` and read by every actor."""

    walks: int
    walks_per_shard: int
    starts: int
    length: float
    """Total drift of a walk, in units of the parameters."""
    steps: int
    record_every: int
    records_per_block: int
    corrections: int
    correction: str
    rank: int
    """Curvature directions with a step size of their own; 0 unless the correction is deflated."""
    step_size: float
    """Share c of the inverse curvature, `eta = c / lambda`; eta itself for plain steps when `step_size_given`."""
    step_size_given: bool
    momentum: float
    guard: bool
    guard_limit: float
    """Rise of the summed NLL above which the guard acts, in units of the effective number of parameters."""
    tilt: str
    drift: str
    batch_size: int
    """Rows a gradient; 0 means all training rows."""
    dtype: str
    form: str
    """How gradients of many walks are computed: batched, vmap or loop."""
    compile: bool
    dim: int
    parameters: list[dict[str, Any]]
    """Name and shape of each parameter in the order of the flat vector."""
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How automatic settings were decided, for people."""

    @property
    def records(self) -> int:
        """Recorded points of one walk."""
        return self.steps // self.record_every

    @property
    def blocks_per_shard(self) -> int:
        """Blocks that a complete shard has."""
        return -(-self.records // self.records_per_block)

    @property
    def rows(self) -> int:
        """Rows of the complete store."""
        return self.walks * self.records

    def radii(self) -> np.ndarray:
        """Drift at each record of a walk that never paused, shape (records,)."""
        steps = np.arange(1, self.records + 1) * self.record_every
        return steps * (self.length / self.steps)

    def shards(self) -> list[Shard]:
        """All shards. Walks are dealt to starts in contiguous ranges; a shard never mixes starts."""
        shards: list[Shard] = []
        bounds = [self.walks * k // self.starts for k in range(self.starts + 1)]
        for start, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            for first in range(low, high, self.walks_per_shard):
                shards.append(Shard(len(shards), start, first, min(self.walks_per_shard, high - first)))
        return shards

    def records_in_block(self, block: int) -> range:
        """Record numbers (from 0) that belong to a block."""
        first = block * self.records_per_block
        return range(first, min(first + self.records_per_block, self.records))

    def with_correction(self, correction: str) -> WalkPlan:
        """The same walk with another correction and the step size that goes with it."""
        return dataclasses.replace(
            self,
            correction=correction,
            rank=self.rank if correction.startswith("deflated") else 0,
            step_size=self.step_size if self.step_size_given else FRACTIONS[correction],
            momentum=MOMENTUM if correction.endswith("momentum") else 0.0,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WalkPlan:
        """Inverse of `to_json`."""
        return cls(**data)

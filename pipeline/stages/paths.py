"""What all walks did, without their positions: small columns of every block, as arrays over walks and records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.plan import BlockKey
from pipeline.store import SampleStore

SMALL = ["walk", "start", "step", "radius", "potential", "nll", "grad_norm", "distance", "status"]


@dataclass(frozen=True)
class Paths:
    """Small columns of the sample store; arrays over (walks, records) hold NaN where a record is missing."""

    start: np.ndarray
    """MAP estimate of each walk, (walks,)."""
    diverged: np.ndarray
    """Walks that could not be saved, (walks,)."""
    halved: np.ndarray
    """Records at which the walk was sent back and its step size halved, (walks, records)."""
    radius: np.ndarray
    potential: np.ndarray
    nll: np.ndarray
    grad_norm: np.ndarray
    distance: np.ndarray

    def records_at(self, radius: float) -> np.ndarray:
        """Record of each walk that lies nearest to a radius, (walks,); the earlier one of two equally near."""
        return np.abs(np.where(np.isnan(self.radius), np.inf, self.radius) - radius).argmin(axis=1)

    def at(self, values: np.ndarray, radius: float) -> np.ndarray:
        """Entries of an array (walks, records) at a radius, without diverged walks."""
        picked = values[np.arange(len(values)), self.records_at(radius)]
        return picked[~self.diverged]

    def choose(self, draws: int) -> np.ndarray:
        """Numbers of the walks that make `draws` draws: the first undiverged of each start, starts in equal parts."""
        chosen: list[np.ndarray] = []
        starts = np.unique(self.start)
        for position, start in enumerate(starts):
            share = draws // len(starts) + (position < draws % len(starts))
            chosen.append(np.flatnonzero((self.start == start) & ~self.diverged)[:share])
        return np.concatenate(chosen)


def read_paths(store: SampleStore) -> Paths:
    """Read the small columns of every committed block.

    Raises:
        RunError: The store has no block, or every walk diverged.
    """
    plan = store.plan
    shape = (plan.walks, plan.records)
    columns = {name: np.full(shape, np.nan) for name in ("radius", "potential", "nll", "grad_norm", "distance")}
    start, diverged, halved = (
        np.zeros(plan.walks, dtype=np.int64),
        np.zeros(plan.walks, dtype=bool),
        np.zeros(shape, bool),
    )
    seen = False
    for shard, blocks in sorted(store.committed_all().items()):
        for number in blocks:
            block = store.read_block(BlockKey(shard, number), columns=SMALL)
            walk, record = np.asarray(block.walk), np.asarray(block.step) // plan.record_every - 1
            for name, values in columns.items():
                values[walk, record] = getattr(block, name)
            status = np.asarray(block.status)
            start[walk] = block.start
            diverged[walk] |= status == "diverged"
            halved[walk, record] = status == "halved"
            seen = True
    if not seen:
        raise RunError(f"{store.storage.uri} has no committed block. Run the sample stage first.")
    if diverged.all():
        other = "" if plan.guard else ", or walk.guard: true"
        raise RunError(
            f"All {plan.walks} walks diverged at length {plan.length:.4g} in {plan.steps} steps, so there is nothing "
            f"to choose from. Use a smaller walk.length or more walk.steps{other}."
        )
    return Paths(start, diverged, halved, **columns)


def read_draws(store: SampleStore, paths: Paths, draws: int, radius: float) -> Iterator[tuple[int, Tensor]]:
    """Yield the points that stand for `draws` draws at a radius: starts of batches, and positions (b, D)."""
    records = paths.records_at(radius)
    wanted = {int(walk): {int(records[walk])} for walk in paths.choose(draws)}
    for start, _, _, theta in read_points(store, wanted):
        yield start, theta


def read_points(
    store: SampleStore, wanted: dict[int, set[int]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, Tensor]]:
    """Yield chosen points block by block, reading each block that holds one exactly once.

    Args:
        store: The sample store.
        wanted: Walk number -> record numbers.

    Yields:
        Start of these walks, walk numbers (b,), record numbers (b,), and positions (b, D).
    """
    plan = store.plan
    for shard in plan.shards():
        walks = [w for w in range(shard.first_walk, shard.first_walk + shard.walks) if w in wanted]
        for number in range(plan.blocks_per_shard) if walks else ():
            inside = plan.records_in_block(number)
            pairs = [(record, walk) for record in inside for walk in walks if record in wanted[walk]]
            if not pairs:
                continue
            records, numbers = np.array(pairs).T
            rows = (records - inside.start) * shard.walks + numbers - shard.first_walk
            theta = store.read_columns(BlockKey(shard.index, number), ["theta"], rows)["theta"]
            yield shard.start, numbers, records, torch.as_tensor(theta)

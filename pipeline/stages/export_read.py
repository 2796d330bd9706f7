"""What an export takes from a run: which walks, which records, which parameters; and those points piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.blocks import NUMBERS, reading
from pipeline.errors import InputError
from pipeline.plan import BlockKey, WalkPlan
from pipeline.seal import BrokenBlock
from pipeline.store import SampleStore

BATCH_BYTES = 4 * 2**20
STATS = {name: NUMBERS[name] for name in ("step", "radius", "potential", "nll", "grad_norm", "distance")}
"""Exported beside the parameters, one a point; potential and nll in nats, radius and distance in units of theta."""


State = Callable[[np.ndarray, int], dict[str, np.ndarray]]
"""State dict of the network at a position (D,) of a walk from a start."""


@dataclass(frozen=True)
class Parameter:
    """One named tensor of the network in the flat vector."""

    name: str
    shape: tuple[int, ...]
    columns: slice

    @property
    def size(self) -> int:
        """Numbers in it."""
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Selection:
    """The rectangle of points that is exported: every chosen walk has every chosen draw."""

    walks: np.ndarray
    """Numbers of the walks, ascending, (chains,)."""
    starts: np.ndarray
    """The MAP estimate each began from, (chains,)."""
    records: np.ndarray
    """Record number of each draw (from 0), (chains, draws)."""
    parameters: tuple[Parameter, ...]
    dtype: str
    record_every: int
    walks_per_shard: int
    diverged: int
    """Walks left out because they diverged."""
    unfinished: int
    """Walks left out because blocks of theirs are still missing."""

    @property
    def chains(self) -> int:
        """Walks exported."""
        return len(self.walks)

    @property
    def draws(self) -> int:
        """Points a walk."""
        return self.records.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one exported point."""
        return sum(parameter.size for parameter in self.parameters) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Points:
    """Some exported points, n rows in no promised order."""

    chain: np.ndarray
    """Position of the walk in the export, (n,)."""
    draw: np.ndarray
    """Position of the record in the export, (n,)."""
    stats: dict[str, np.ndarray]
    status: np.ndarray
    theta: np.ndarray
    """(n, D)."""


def variable_names(parameters: tuple[Parameter, ...]) -> list[str]:
    """Names that are safe as names of variables and files: no separator, no leading dot, all different."""
    names: list[str] = []
    for parameter in parameters:
        name = re.sub(r"[^A-Za-z0-9_.\-]", "_", parameter.name).lstrip(".") or "_"
        while name in names or name in (*STATS, "walk", "start", "status", "draw", "chain"):
            name += "_"
        names.append(name)
    return names


def select(store: SampleStore, radius: float | None, thin: int, pattern: str | None) -> Selection:
    """Choose what is exported.

    Args:
        store: The run's points.
        radius: One point a walk, its record nearest to this drift; None: all records.
        thin: Every so manieth record, counted back from the last.
        pattern: Regular expression found anywhere in a parameter's name; None: all.

    Raises:
        InputError: Nothing is left, or the radius lies outside what was walked.
    """
    plan = store.plan
    parameters = _parameters(plan, pattern)
    if thin < 1 or thin > plan.records:
        raise InputError(f"--thin must be a whole number from 1 to {plan.records} (the records of a walk), got {thin}")
    if radius is not None and thin != 1:
        raise InputError(f"--thin {thin} has no meaning with --radius, which takes one point a walk; leave one out")
    committed = store.committed_all()
    complete = [s for s in plan.shards() if len(committed.get(s.index, [])) == plan.blocks_per_shard]
    if not complete:
        raise InputError(f"{store.storage.uri} has no complete shard of walks yet. Let the run finish, then export it.")
    if radius is not None:
        _check_radius(radius, plan)
    walks, starts, records, diverged = [], [], [], 0
    kept = np.arange(plan.records)[::-1][::thin][::-1]
    for shard in complete:
        status, drift = _scalars(store, shard.index, shard.walks)
        whole = ~(status == "diverged").any(axis=0)
        diverged += int((~whole).sum())
        numbers = np.flatnonzero(whole)
        walks.append(shard.first_walk + numbers)
        starts.append(np.full(len(numbers), shard.start))
        nearest = None if radius is None else np.abs(drift[:, numbers] - radius).argmin(axis=0)[:, None]
        records.append(np.tile(kept, (len(numbers), 1)) if nearest is None else nearest)
    chosen = np.concatenate(walks)
    if not len(chosen):
        raise InputError(
            f"{store.storage.uri}: every walk diverged; there is nothing to export. See 'fiberwalk status'."
        )
    return Selection(
        walks=chosen,
        starts=np.concatenate(starts),
        records=np.concatenate(records),
        parameters=parameters,
        dtype=plan.dtype,
        record_every=plan.record_every,
        walks_per_shard=plan.walks_per_shard,
        diverged=diverged,
        unfinished=plan.walks - sum(shard.walks for shard in complete),
    )


def read(store: SampleStore, selection: Selection) -> Iterator[Points]:
    """Yield the chosen points, at most about `BATCH_BYTES` of them at once."""
    plan = store.plan
    chain_of = np.full(plan.walks, -1)
    chain_of[selection.walks] = np.arange(selection.chains)
    for shard in plan.shards():
        chains = chain_of[shard.first_walk : shard.first_walk + shard.walks]
        if (chains < 0).all():
            continue
        draw_of = np.full((plan.records, shard.walks), -1)
        for position in np.flatnonzero(chains >= 0):
            draw_of[selection.records[chains[position]], position] = np.arange(selection.draws)
        for block in range(plan.blocks_per_shard):
            records = plan.records_in_block(block)
            draws = draw_of[records.start : records.stop].reshape(-1)
            if (draws >= 0).any():
                yield from _block(store, BlockKey(shard.index, block), np.tile(chains, len(records)), draws)
                pa.default_memory_pool().release_unused()


def _block(store: SampleStore, key: BlockKey, chains: np.ndarray, draws: np.ndarray) -> Iterator[Points]:
    """Yield the chosen rows of one block; rows are ordered by record, then walk."""
    row_bytes = store.plan.dim * np.dtype(store.plan.dtype).itemsize
    size, columns = max(1, BATCH_BYTES // row_bytes), [*STATS, "status", "theta"]
    file, _ = store.open_block(key)
    first = 0
    with file:
        batches = file.iter_batches(batch_size=size, columns=columns)
        while True:
            with reading(store.storage.uri, key.path):
                batch = next(batches, None)
                if batch is None and first != len(draws):  # batches end with the shortest column
                    raise BrokenBlock(f"{first} of its {len(draws)} rows can be read")
                if batch is None:
                    return
                rows = slice(first, first + len(batch))
                first += len(batch)
                chosen = np.flatnonzero((draws[rows] >= 0) & (chains[rows] >= 0))
                points = _points(batch, chosen, chains[rows][chosen], draws[rows][chosen])
            if len(chosen):
                yield points


def _points(batch: pa.RecordBatch, chosen: np.ndarray, chain: np.ndarray, draw: np.ndarray) -> Points:
    theta: Any = batch.column("theta")
    values = theta.to_numpy_ndarray()
    whole = len(chosen) == len(batch)
    return Points(
        chain=chain,
        draw=draw,
        stats={name: batch.column(name).to_numpy()[chosen].astype(kind) for name, kind in STATS.items()},
        status=batch.column("status").to_numpy(zero_copy_only=False)[chosen],
        theta=values if whole else values[chosen],
    )


def _scalars(store: SampleStore, shard: int, walks: int) -> tuple[np.ndarray, np.ndarray]:
    """Status and drift of all records of a shard, (records, walks)."""
    status, drift = [], []
    for block in range(store.plan.blocks_per_shard):
        found = store.read_columns(BlockKey(shard, block), ["status", "radius"])
        status.append(found["status"])
        drift.append(found["radius"])
    return np.concatenate(status).reshape(-1, walks), np.concatenate(drift).reshape(-1, walks)


def _parameters(plan: WalkPlan, pattern: str | None) -> tuple[Parameter, ...]:
    found, first = [], 0
    try:
        expression = re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"--parameters '{pattern}' is no regular expression: {error}") from None
    for entry in plan.parameters:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        if expression.search(entry["name"]):
            found.append(Parameter(entry["name"], tuple(entry["shape"]), slice(first, first + size)))
        first += size
    if not found:
        names = ", ".join(entry["name"] for entry in plan.parameters[:6])
        more = " ..." if len(plan.parameters) > 6 else ""
        raise InputError(f"--parameters '{pattern}' matches no walked parameter. There are: {names}{more}")
    return tuple(found)


def _check_radius(radius: float, plan: WalkPlan) -> None:
    radii = plan.radii()
    half = (radii[0] if len(radii) == 1 else radii[1] - radii[0]) / 2
    if not radii[0] - half <= radius <= radii[-1] + half:
        raise InputError(
            f"--radius must lie between {radii[0]:.6g} and {radii[-1]:.6g} (what was walked), got {radius:.6g}"
        )

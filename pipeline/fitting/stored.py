"""From blocks to the records that a fit reads. No torch: the processes that read for Ray Data start without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from pipeline.blocks import join_parts
from pipeline.plan import BlockKey, WalkPlan
from pipeline.store import SampleStore

MARKS = 4
"""Looks at the network up to the selected radius, at most."""
BEYOND = 2
"""Further looks, for draws beyond the selected radius."""
COLUMNS = ["walk", "radius", "potential", "nll", "status", "theta"]


def batch_rows(dim: int) -> int:
    """Rows read at once: about 32 MB."""
    return max(1, (32 << 20) // (4 * dim))


def keys_of(store: SampleStore, start: int, rank: int, size: int) -> list[BlockKey]:
    """Committed blocks that a worker reads, in order: whole shards where there are enough, else all of them."""
    shards = [s.index for s in store.plan.shards() if s.start == start]
    mine = set(shards[rank::size] if len(shards) >= size else shards)
    return [key for key in store.entries() if key.shard in mine]


def by_walk(store: SampleStore, start: int, size: int) -> bool:
    """Whether workers share shards, and each takes only its own walks of them."""
    return sum(s.start == start for s in store.plan.shards()) < size


def marks_of(plan: WalkPlan, radius: float) -> tuple[list[float], int]:
    """Recorded radii at which the network is looked at, rising, and the number of the selected one among them."""
    radii = plan.radii()
    selected, last = int(np.abs(radii - radius).argmin()), len(radii) - 1
    before = {round((selected + 1) * (j + 1) / MARKS) - 1 for j in range(MARKS)}
    beyond = {selected + round((last - selected) * (j + 1) / BEYOND) for j in range(BEYOND)}
    chosen = sorted(i for i in {*before, selected, *beyond} if i >= 0)
    return [float(radii[i]) for i in chosen], chosen.index(selected)


def read_marks(kind: str, plan: WalkPlan, radius: float) -> list[float] | None:
    """Radii that a kind of deformation learns from; None: whole paths."""
    return None if kind == "metric" else marks_of(plan, radius)[0]


def stored_rows(
    store: SampleStore, keys: Sequence[BlockKey], marks: Sequence[float] | None
) -> Iterator[dict[str, np.ndarray]]:
    """Columns of blocks, in batches of the same sizes as Ray Data gives: the same sums, whoever reads.

    With marks only the records of each walk that are nearest to one of them: of a path most lie between, and what is
    not needed is not unpacked. All blocks of a shard belong in one call.

    Raises:
        DamagedBlock: One is broken.
    """
    size, kept = batch_rows(store.plan.dim), []
    for part in _pieces(store, keys, marks):
        kept.append(part)
        if sum(len(piece["walk"]) for piece in kept) >= size:
            joined = _join(kept)
            full = len(joined["walk"]) // size * size
            yield from ({name: values[i : i + size] for name, values in joined.items()} for i in range(0, full, size))
            kept = [{name: values[full:] for name, values in joined.items()}]
    rest = _join(kept) if kept else {}
    if rest and len(rest["walk"]):
        yield rest


def _pieces(
    store: SampleStore, keys: Sequence[BlockKey], marks: Sequence[float] | None
) -> Iterator[dict[str, np.ndarray]]:
    for _, of_shard in groupby(keys, key=lambda key: key.shard):
        blocks = list(of_shard)
        chosen = _nearest(store, blocks, marks) if marks is not None else [None] * len(blocks)
        for key, rows in zip(blocks, chosen, strict=True):
            yield from store.read_pieces(key, COLUMNS, rows)


def _nearest(store: SampleStore, blocks: list[BlockKey], marks: Sequence[float]) -> list[np.ndarray]:
    """Rows of each block that are the first nearest of their walk to a mark; diverged ones only where all are."""
    tables = [store.read_columns(key, ["walk", "radius", "status"]) for key in blocks]
    whole = _join(tables)
    used = np.zeros(len(whole["walk"]), dtype=bool)
    for mark in marks:
        gap = np.where(whole["status"] == "diverged", np.inf, np.abs(whole["radius"].astype(np.float64) - mark))
        order = np.lexsort((gap, whole["walk"]))  # stable: the first of equals
        used[order[np.unique(whole["walk"][order], return_index=True)[1]]] = True
    bounds = np.cumsum([len(table["walk"]) for table in tables])[:-1]
    return [np.flatnonzero(part) for part in np.split(used, bounds)]


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: join_parts([part[name] for part in parts]) for name in parts[0]}

"""The sample store: blocks of recorded points. A block exists or it does not, and that is all there is to know."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import (
    SMALL,
    SampleBlock,
    Stamp,
    arrow_schema,
    differences,
    has_columns,
    join_parts,
    misplaced,
    read_stamp,
    reading,
    to_numpy,
    write_block,
)
from pipeline.errors import InputError
from pipeline.plan import BlockKey, WalkPlan
from pipeline.seal import BrokenBlock, check_seal
from pipeline.storage import Entry, Storage

__all__ = ["Points", "SampleBlock", "SampleStore", "parse_path"]
_PATH = re.compile(r"walks/shard=(\d{5,})/block=(\d{5,})\.parquet")
_BATCH_BYTES = 64 * 2**20
_READERS = 8
_WHOLE_BYTES = 2 * 2**20
"""Blocks up to this size are checked as a whole whenever they are opened. Pages have checksums, but their headers and
the footer have none of their own, and some damage there ends the process that reads it."""


@dataclass(frozen=True)
class Points:
    """One point of each of b walks, in walk order."""

    walk: np.ndarray
    """(b,) int32."""
    start: np.ndarray
    """MAP estimate the walk began from, (b,) int16."""
    radius: np.ndarray
    """Drift at the point, (b,) float32."""
    potential: np.ndarray
    """U in nats, (b,) float64."""
    nll: np.ndarray
    """Summed negative log likelihood in nats, (b,) float64."""
    theta: np.ndarray
    """Positions, (b, D)."""

    def __len__(self) -> int:
        return len(self.walk)


def parse_path(path: str) -> BlockKey | None:
    """Return the key of a block's path; None for any other name, and for a name that no key has."""
    found = _PATH.fullmatch(path)
    key = BlockKey(int(found[1]), int(found[2])) if found else None
    return key if key is not None and key.path == path else None


class SampleStore:
    """Blocks below one run. Holds nothing open; picklable; any number may write at once.

    >>> store = SampleStore.open(run_uri)  # what 'fiberwalk run' printed; nothing is read yet
    >>> table = store.dataset().to_table(columns=["walk", "step", "potential"])  # as any pyarrow data set
    >>> table.num_rows == store.plan.walks * store.plan.records
    True
    """

    def __init__(self, storage: Storage, plan: WalkPlan, run_id: str):
        self.storage, self.plan, self.run_id = storage, plan, run_id
        self._shards = len(plan.shards())

    @classmethod
    def open(cls, run_uri: str | os.PathLike[str] | Storage) -> SampleStore:
        """Open the store of a run that has been planned. Raises InputError if there is none."""
        storage = run_uri if isinstance(run_uri, Storage) else Storage.open(os.fspath(run_uri))
        try:
            plan = WalkPlan.from_json(storage.read_json("plan.json"))
            run_id = str(storage.read_json("run.json", strict=False)["run_id"])
        except FileNotFoundError:
            begun = storage.exists("run.json")
            way = "Go on with 'fiberwalk run'" if begun else "Give the address that 'fiberwalk run' printed"
            missing = "plan.json is missing there, since no walk has begun" if begun else "run.json is missing there"
            raise InputError(f"No sample store at {storage.uri}: {missing}. {way}.") from None
        except (TypeError, KeyError) as error:
            raise InputError(
                f"The plan at {storage.uri} was written by another version ({error}). Use the release that wrote it."
            ) from None
        return cls(storage, plan, run_id)

    def dataset(self) -> Any:
        """Return all committed rows as a `pyarrow.dataset.Dataset`, lazy; `shard` comes from the path."""
        import pyarrow.dataset

        files, base = self.storage.arrow_filesystem()
        entries = self.entries()
        paths = [f"{base}/{entry.path}" for entry in entries.values()]
        part = pyarrow.dataset.partitioning(pa.schema([("shard", pa.int32())]), flavor="hive")
        schema = arrow_schema(self.plan, any(self._has_momentum(key) for key in list(entries)[:1]))
        schema = schema.append(pa.field("shard", pa.int32()))
        return pyarrow.dataset.dataset(
            paths, schema=schema, filesystem=files, format="parquet", partitioning=part, partition_base_dir=base
        )

    def _has_momentum(self, key: BlockKey) -> bool:
        file, _ = self.open_block(key)
        with file:
            return "momentum" in file.schema_arrow.names

    def entries(self) -> dict[BlockKey, Entry]:
        """Return all objects that have the name of a planned block, by key in order; one listing."""
        found = {self.planned(entry.path): entry for entry in self.storage.list("walks", ".parquet")}
        return dict(sorted((key, entry) for key, entry in found.items() if key is not None))

    def planned(self, path: str) -> BlockKey | None:
        """Return the key of a planned block's path, None for whatever else may lie beside the blocks."""
        key = parse_path(path)
        inside = key is not None and key.shard < self._shards and key.block < self.plan.blocks_per_shard
        return key if inside else None

    def keys(self) -> list[BlockKey]:
        """Return the keys of all planned blocks, in order."""
        blocks = range(self.plan.blocks_per_shard)
        return [BlockKey(shard, block) for shard in range(self._shards) for block in blocks]

    def committed(self, shard: int) -> list[int]:
        """Return the numbers of the committed blocks of a shard, in order."""
        folder = BlockKey(shard, 0).path.rsplit("/", 1)[0]
        keys = [self.planned(entry.path) for entry in self.storage.list(folder, ".parquet")]
        return sorted(key.block for key in keys if key is not None)

    def committed_all(self) -> dict[int, list[int]]:
        """Return the numbers of the committed blocks of every shard that has any; one listing."""
        blocks: dict[int, list[int]] = {}
        for key in self.entries():
            blocks.setdefault(key.shard, []).append(key.block)
        return blocks

    def commit(self, block: SampleBlock) -> bool:
        """Write a block in one step. False: another worker had committed it; the same key holds the same bytes."""

        def write(file: BinaryIO) -> None:
            write_block(file, block, self.plan, self.run_id)

        return self.storage.create_from(block.key.path, write)

    def open_block(self, key: BlockKey) -> tuple[pq.ParquetFile, Stamp]:
        """Open a block and check that it belongs here. Small ones are checked whole, pages of all as they are read.

        Raises:
            FileNotFoundError: It is not committed.
            RunError: It is broken, or belongs to another run, layout or schema.
        """
        source = self.storage.open_input(key.path)
        with reading(self.storage.uri, key.path):
            if source.seek(0, os.SEEK_END) <= _WHOLE_BYTES:
                check_seal(source)
            source.seek(0)
            file = pq.ParquetFile(source, page_checksum_verification=True)
            stamp = read_stamp(file.metadata)
            wrong = differences(stamp, self.plan, self.run_id)
            elsewhere = None if wrong else misplaced(file.metadata, self.plan, key)
            if wrong or elsewhere:
                raise BrokenBlock(elsewhere or "; ".join(wrong))
            if not has_columns(file.schema_arrow, self.plan):
                raise BrokenBlock("its columns, or their types, are not those of a block")
        return file, stamp

    def read_columns(self, key: BlockKey, columns: Sequence[str], rows: np.ndarray | None = None) -> dict[str, Any]:
        """Return columns of a block by name, of all its rows or of some in ascending order.

        Only the row groups that hold the rows are read. Momentum comes without its nulls, and not at all if the walk
        has none.
        """
        parts = list(self.read_pieces(key, columns, rows))
        names = parts[0] if parts else [name for name in columns if name != "momentum"]
        return {name: join_parts([part[name] for part in parts]) for name in names}

    def read_pieces(
        self, key: BlockKey, columns: Sequence[str], rows: np.ndarray | None = None
    ) -> Iterator[dict[str, Any]]:
        """The same a row group at a time, so that a block need not fit in memory."""
        file, _ = self.open_block(key)
        with reading(self.storage.uri, key.path), file:
            columns = [name for name in columns if name != "momentum" or name in file.schema_arrow.names]
            wanted = np.arange(file.metadata.num_rows) if rows is None else np.asarray(rows)
            first = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                inside = wanted[(wanted >= first) & (wanted < first + count)] - first
                first += count
                if len(inside):
                    table = file.read_row_group(group, columns=columns)
                    if table.num_rows != count:  # a page may say less of itself than the footer does
                        raise BrokenBlock(f"row group {group} gives {table.num_rows} of its {count} rows")
                    yield {name: to_numpy(table.column(name), inside, self.plan.dim) for name in columns}

    def read_block(self, key: BlockKey, columns: Sequence[str] | None = None) -> SampleBlock:
        """Return a block; fields of columns that are not asked for stay empty."""
        return self._block(key, columns, None)

    def read_last(self, key: BlockKey) -> SampleBlock:
        """Return the last record of a block: one row a walk, and the momentum. What a shard goes on from."""
        shard = self.plan.shards()[key.shard]
        total = shard.walks * len(self.plan.records_in_block(key.block))
        return self._block(key, None, np.arange(total - shard.walks, total))

    def _block(self, key: BlockKey, columns: Sequence[str] | None, rows: np.ndarray | None) -> SampleBlock:
        found = self.read_columns(key, [*SMALL, "theta", "momentum"] if columns is None else columns, rows)
        status = [str(text) for text in found.pop("status", [])]
        walk, start = (found.pop(name, np.empty(0)) for name in ("walk", "start"))
        return SampleBlock(key=key, walk=walk, start=start, status=status, **found)

    def digests(self) -> dict[BlockKey, str]:
        """Return the digest of theta of every committed block, as its footer states it."""
        keys = list(self.entries())
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(keys, pool.map(self._digest_of, keys), strict=True))

    def _digest_of(self, key: BlockKey) -> str:
        file, stamp = self.open_block(key)
        file.close()
        return stamp.digest

    def digest(self) -> str:
        """Return one sha256 over the digests of all committed blocks and their names."""
        listed = [[key.shard, key.block, digest] for key, digest in sorted(self.digests().items())]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def points(
        self, radius: float, *, start: int | None = None, limit: int | None = None, batch: int | None = None
    ) -> Iterator[Points]:
        """Yield one point a walk: its record nearest to `radius` (the earlier of two), walks in order.

        A walk that ever diverged is left out. Memory is that of one batch, whatever the store holds.

        Args:
            radius: Drift, in units of the parameters.
            start: Only walks from this MAP estimate.
            limit: At most so many walks, the first ones.
            batch: Most walks of one `Points`; by default as many as fit 64 MB.
        """
        size = batch or max(1, _BATCH_BYTES // (self.plan.dim * np.dtype(self.plan.dtype).itemsize))
        blocks, given = self.committed_all(), 0
        for shard in self.plan.shards():
            if shard.index not in blocks or start not in (None, shard.start):
                continue
            chosen = self._nearest(shard.index, blocks[shard.index], radius)
            if limit is not None:
                chosen = chosen[: limit - given]
            for low in range(0, len(chosen), size):
                yield self._gather(shard.index, chosen[low : low + size])
            given += len(chosen)
            if limit is not None and given >= limit:
                return

    def undiverged(self, start: int) -> int:
        """Count the stored walks of a start that never diverged, without reading positions."""
        blocks = self.committed_all()
        shards = [s.index for s in self.plan.shards() if s.start == start and s.index in blocks]
        return sum(len(self._nearest(shard, blocks[shard], 0.0)) for shard in shards)

    def _nearest(self, shard: int, blocks: list[int], radius: float) -> list[tuple[int, int, int]]:
        """Return (walk, block, row) of the record nearest to `radius` of each walk that never diverged."""
        best: dict[int, tuple[float, int, int]] = {}
        diverged: set[int] = set()
        for block in blocks:
            found = self.read_columns(BlockKey(shard, block), ["walk", "radius", "status"])
            diverged.update(found["walk"][found["status"] == "diverged"].tolist())
            gaps = np.abs(found["radius"].astype(np.float64) - radius)
            for row, (walk, gap) in enumerate(zip(found["walk"].tolist(), gaps.tolist(), strict=True)):
                if walk not in best or gap < best[walk][0]:
                    best[walk] = (gap, block, row)
        return [(walk, *best[walk][1:]) for walk in sorted(best) if walk not in diverged]

    def _gather(self, shard: int, chosen: list[tuple[int, int, int]]) -> Points:
        columns = ["walk", "start", "radius", "potential", "nll", "theta"]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        for block in sorted({block for _, block, _ in chosen}):
            rows = np.array(sorted(row for _, where, row in chosen if where == block))
            found = self.read_columns(BlockKey(shard, block), columns, rows)
            for name in columns:
                parts[name].append(found[name])
        joined = {name: join_parts(values) for name, values in parts.items()}
        order = np.argsort(joined["walk"], kind="stable")
        return Points(**{name: values[order] for name, values in joined.items()})

"""Is one block as it was written, and what the plan says? Reads all of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import SMALL, STATUSES, differences, has_columns, read_stamp
from pipeline.plan import BlockKey, WalkPlan
from pipeline.seal import BrokenBlock, check_seal
from pipeline.storage import Storage
from pipeline.store import SampleStore

_WHOLE = 256 * 2**20
"""Objects up to this size are read in one piece; larger ones twice, in pieces."""
Wrong = tuple[str, str]
"""(kind, detail) of one thing that is wrong."""


def first_wrong(store: SampleStore | None, storage: Storage, path: str, key: BlockKey | None) -> Wrong | None:
    """Read one block completely; None if it is sound. Without a store only its own checksum is looked at."""
    try:
        with _open(storage, path) as file:
            check_seal(file)
            if store is None or key is None:
                return None
            file.seek(0)
            return next(_contents(store, key, file), None)
    except BrokenBlock as error:
        kind, _, detail = str(error).partition(":")
        return (kind, detail.strip()) if kind in ("truncated", "corrupted") else ("corrupted", str(error))
    except (pa.ArrowException, OSError, ValueError) as error:
        return "corrupted", " ".join(str(error).split())[:200]


def _open(storage: Storage, path: str) -> BinaryIO:
    file = storage.open_input(path)
    if file.seek(0, io.SEEK_END) > _WHOLE:
        return file
    file.seek(0)
    with file:
        return io.BytesIO(file.read())


def _contents(store: SampleStore, key: BlockKey, file: Any) -> Iterator[Wrong]:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    stamp = read_stamp(parquet.metadata)
    wrong = differences(stamp, store.plan, store.run_id)
    if wrong:
        yield "wrong", "; ".join(wrong)
        return
    if not has_columns(parquet.schema_arrow, store.plan):
        yield "wrong", "its columns are not those of a block"
        return
    yield from _check_rows(store.plan, key, parquet.read(columns=SMALL))
    yield from _check_theta(parquet, stamp.digest)


def _check_rows(plan: WalkPlan, key: BlockKey, table: pa.Table) -> Iterator[tuple[str, str]]:
    """Compare the small columns with what the plan says of them."""
    shard = plan.shards()[key.shard]
    records = np.asarray(plan.records_in_block(key.block))
    rows = shard.walks * len(records)
    if table.num_rows != rows:
        yield "wrong", f"{table.num_rows} rows, planned are {rows}"
        return
    column = {name: table.column(name).to_numpy() for name in SMALL}
    expected = {
        "walk": np.tile(np.arange(shard.first_walk, shard.first_walk + shard.walks), len(records)),
        "start": np.full(rows, shard.start),
        "step": np.repeat((records + 1) * plan.record_every, shard.walks),
    }
    for name, values in expected.items():
        if not np.array_equal(column[name], values):
            row = int(np.flatnonzero(column[name] != values)[0])
            yield "wrong", f"{name} {column[name][row]} in row {row}, planned is {values[row]}"
    if not set(column["status"]) <= set(STATUSES):
        yield (
            "wrong",
            f"status {sorted(set(column['status']) - set(STATUSES))[0]!r} is not one of {', '.join(STATUSES)}",
        )
    alive = column["status"] != "diverged"
    for name in ("radius", "potential", "nll", "grad_norm", "distance", "step_size"):
        bad = np.flatnonzero(alive & ~np.isfinite(column[name]))
        if len(bad):
            yield "values", f"{name} is not finite in row {bad[0]}, whose walk has not diverged"


def _check_theta(parquet: pq.ParquetFile, digest: str) -> Iterator[tuple[str, str]]:
    """Hash all positions and look for values that are not finite, one row group at a time."""
    total, first = hashlib.sha256(), 0
    for group in range(parquet.metadata.num_row_groups):
        table = parquet.read_row_group(group, columns=["theta", "status"])
        chunk: Any = table.column("theta").combine_chunks()
        theta = np.ascontiguousarray(
            (chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk).to_numpy_ndarray()
        )
        total.update(theta.data)
        alive = table.column("status").to_numpy() != "diverged"
        bad = np.flatnonzero(alive & ~np.isfinite(theta).all(axis=1))
        if len(bad):
            yield "values", f"theta is not finite in row {first + bad[0]}, whose walk has not diverged"
            return
        first += len(theta)
    if total.hexdigest() != digest:
        yield "corrupted", "the digest of theta differs from the one in the footer"

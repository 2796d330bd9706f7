"""What the store costs: block writes against plain pyarrow, status on many blocks, the driver's memory.

python -m tests.bench.bench_store --json store.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.blocks import SMALL, arrow_schema, rows_per_group
from pipeline.plan import BlockKey
from pipeline.stages.status import status
from pipeline.store import SampleBlock, SampleStore
from tests.blocks import make_block, make_plan, make_store
from tests.s3server import KEY, SECRET, S3Server

TURNS = 5


def median_seconds(call: Callable[[int], None]) -> float:
    """Median of a few calls, after one that is not counted."""
    seconds = []
    for turn in range(TURNS + 1):
        began = time.perf_counter()
        call(turn)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def plain_table(block: SampleBlock, plan: Any) -> pa.Table:
    """The columns of a block as one table."""
    schema = arrow_schema(plan, False)
    columns: list[pa.Array] = []
    for field in schema:
        values = getattr(block, field.name)
        if field.name == "theta":
            flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), plan.dim)
            columns.append(pa.ExtensionArray.from_storage(field.type, flat))
        else:
            columns.append(pa.array(list(values) if field.name == "status" else values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def write_rate(uri: str, files: pyarrow.fs.FileSystem, base: str, dim: int, walks: int) -> dict[str, float]:
    """MB/s of commits, and of pyarrow writing the same table to the same place, synced alike on a disk."""
    records = max(1, 64 * 2**20 // (walks * dim * 4))
    blocks = TURNS + 1
    plan = make_plan(
        walks=walks * blocks,
        walks_per_shard=walks,
        starts=1,
        steps=records,
        record_every=1,
        records_per_block=records,
        dim=dim,
    )
    store = make_store(uri, plan, fill=False)
    made = [make_block(plan, BlockKey(shard, 0)) for shard in range(blocks)]
    size = made[0].theta.nbytes / 1e6
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": SMALL, "compression": "none"}
    table = plain_table(made[0], plan)
    files.create_dir(f"{base}/plain", recursive=True)

    def plain(turn: int) -> None:
        path = f"{base}/plain/{turn}.parquet"
        pq.write_table(table, path, filesystem=files, row_group_size=rows_per_group(plan), **options)
        if isinstance(files, pyarrow.fs.LocalFileSystem):
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    ours = median_seconds(lambda turn: None if store.commit(made[turn]) else None)
    theirs = median_seconds(plain)
    return {
        "block_mb": round(size, 1),
        "ours_mb_s": round(size / ours, 1),
        "pyarrow_mb_s": round(size / theirs, 1),
        "ratio": round(theirs / ours, 3),
        "share_of_a_walk_writing_50_mb_s": round(50 * ours / size, 4),
    }


def many_blocks(uri: str, count: int) -> SampleStore:
    """A store of many small blocks, copies of the bytes of a few."""
    plan = make_plan(walks=count // 20 * 2, walks_per_shard=2, starts=1, steps=20, record_every=1, records_per_block=1)
    store = make_store(uri, plan, fill=False)
    store.commit(make_block(plan, BlockKey(0, 0)))
    data = store.storage.read(BlockKey(0, 0).path)
    from concurrent.futures import ThreadPoolExecutor

    keys = [BlockKey(shard, block) for shard in range(count // 20) for block in range(20)][1:]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.storage.create(key.path, data), keys))
    return store


def status_seconds(uri: str, count: int) -> dict[str, float]:
    many_blocks(uri, count)
    began = time.perf_counter()
    found = status(uri)
    assert found["blocks"]["done"] == count
    return {"blocks": count, "seconds": round(time.perf_counter() - began, 2)}


def points_memory(uri: str) -> dict[str, float]:
    """Growth of the resident memory while points are streamed out of a small and a ten times larger store."""
    result = {}
    for name, walks in (("small", 32), ("ten_times", 320)):
        plan = make_plan(
            walks=walks, walks_per_shard=32, starts=1, steps=10, record_every=1, records_per_block=5, dim=50_000
        )
        store = make_store(f"{uri}/{name}", plan)
        before, peak = psutil.Process().memory_info().rss, 0
        for points in store.points(0.5, batch=32):
            peak = max(peak, psutil.Process().memory_info().rss)
            assert np.isfinite(points.theta[0, 0])
        result[f"{name}_mb"] = round((peak - before) / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=20_000)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fwbench-"))
    found: dict[str, Any] = {"memory_of_points": points_memory(str(folder / "points"))}
    local = pyarrow.fs.LocalFileSystem()
    for dim, walks in ((3_000, 64), (1_000_000, 8), (11_000_000, 1)):
        place = str(folder / f"disk-{dim}")
        found[f"disk, D = {dim}"] = write_rate(place, local, place, dim, walks)
        shutil.rmtree(place)
    found["status, disk"] = status_seconds(str(folder / "many"), given.blocks)
    with S3Server(folder / "s3") as server:
        os.environ.update(server.environment)
        endpoint = server.endpoint.removeprefix("http://")
        remote = pyarrow.fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, endpoint_override=endpoint, scheme="http", region="us-east-1"
        )
        for dim, walks in ((3_000, 64), (1_000_000, 8)):
            base = f"{server.bucket}/wide-{dim}"
            found[f"S3, D = {dim}"] = write_rate(f"s3://{base}", remote, base, dim, walks)
        found["status, S3"] = status_seconds(f"s3://{server.bucket}/many", given.blocks)
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

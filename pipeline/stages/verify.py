"""Is everything there, and as it was written? Reads every block; repairs by removing what the next run then redoes."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import SMALL, STATUSES, arrow_schema, read_stamp
from pipeline.errors import InputError
from pipeline.plan import BlockKey, WalkPlan
from pipeline.seal import BrokenBlock, check_seal
from pipeline.storage import Entry, Storage
from pipeline.store import SampleStore, differences, parse_path

_WHOLE = 256 * 2**20
"""Objects up to this size are read in one piece; larger ones twice, in pieces."""
DERIVED = ("radius.json", "evaluation.json", "deformation/deformation.json")
"""Objects that name the blocks they were made from."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    kind: str
    """truncated, corrupted, gap, foreign, duplicate, wrong, values, stale, damaged or note."""
    path: str
    detail: str

    @property
    def harmless(self) -> bool:
        """Whether the run is as good with it as without."""
        return self.kind == "note"

    @property
    def removable(self) -> bool:
        """Whether repair removes the object."""
        return self.kind not in ("note", "gap")

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}: {self.detail}"


@dataclass
class Findings:
    """What `verify` or `repair` found."""

    run_uri: str
    blocks: int = 0
    """Sound blocks."""
    blocks_planned: int = 0
    rows: int = 0
    rows_planned: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every planned block is there and sound."""
        return self.blocks == self.blocks_planned

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong: all that is wrong was removed, or there was nothing."""
        gone = set(self.removed)
        return all(f.harmless or f.path in gone for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"complete": self.complete, "sound": self.sound}

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        lines += [f"removed: {path}" for path in self.removed]
        lines.append(
            f"{self.blocks} of {self.blocks_planned} blocks and {self.rows} of {self.rows_planned} rows are there "
            f"and sound, {self.bytes / 1e6:,.1f} MB read."
        )
        wrong = sum(not finding.harmless for finding in self.findings)
        if self.removed:
            lines.append("What was removed is redone by the next 'fiberwalk run'.")
        elif wrong:
            lines.append(
                f"{wrong} things are wrong. 'fiberwalk verify {self.run_uri} --repair' removes what is broken."
            )
        return "\n".join(lines)


def verify(run_uri: str) -> Findings:
    """Read and check every object of the sample store, and whether what was made from it is of its present state.

    Blocks that are merely not computed yet are counted, not wrong; a block missing before one that exists, or from a
    run whose sampling was finished, is a gap.

    Raises:
        InputError: There is no run at that address, or it was not planned yet.
    """
    store = SampleStore.open(run_uri)
    plan = store.plan
    result = Findings(
        store.storage.uri, rows_planned=plan.rows, blocks_planned=len(plan.shards()) * plan.blocks_per_shard
    )
    entries: dict[BlockKey, Entry] = {}
    for entry in store.storage.list("walks"):
        key = parse_path(entry.path)
        if key is not None and key.shard < len(plan.shards()) and key.block < plan.blocks_per_shard:
            entries[key] = entry
        else:
            result.findings.append(_stranger(entry))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (key, entry), found in zip(
            entries.items(), pool.map(lambda k: _check_entry(store, k), entries), strict=True
        ):
            result.bytes += entry.size
            if found is None:
                result.blocks += 1
                result.rows += _rows_of(plan, key)
            else:
                result.findings.append(found)
    result.findings += _gaps(store, set(entries))
    result.findings += _damaged(store.storage, plan)
    if not any(finding.removable for finding in result.findings):
        result.findings += _stale(store)
    result.findings.sort(key=lambda finding: (finding.path, finding.kind))
    return result


def repair(run_uri: str) -> Findings:
    """Do as `verify`, and remove what is broken or was left half-written by killed writers. Nothing is rewritten."""
    result = verify(run_uri)
    storage = Storage.open(run_uri)
    for finding in result.findings:
        if finding.removable:
            storage.delete(finding.path)
            result.removed.append(finding.path)
    if any(finding.kind == "stale" for finding in result.findings):
        for path in ("report.html", *_below(storage, "deformation"), *_below(storage, "evaluation")):
            if path not in result.removed and storage.exists(path):
                storage.delete(path)
                result.removed.append(path)
    result.removed += storage.sweep()
    return result


def _below(storage: Storage, folder: str) -> list[str]:
    return [entry.path for entry in storage.list(folder)]


def _rows_of(plan: WalkPlan, key: BlockKey) -> int:
    return plan.shards()[key.shard].walks * len(plan.records_in_block(key.block))


def _stranger(entry: Entry) -> Finding:
    if not entry.path.endswith(".parquet"):
        return Finding("note", entry.path, "not a block; no reader of the store looks at it")
    return Finding("foreign", entry.path, "no planned block has this name; other readers would count its rows twice")


def _gaps(store: SampleStore, found: set[BlockKey]) -> Iterator[Finding]:
    """Yield blocks that are missing although later work exists."""
    finished = store.storage.exists("radius.json")
    last: dict[int, int] = {}
    for key in found:
        last[key.shard] = max(last.get(key.shard, -1), key.block)
    for shard in store.plan.shards():
        for block in range(store.plan.blocks_per_shard):
            key = BlockKey(shard.index, block)
            if key not in found and (finished or block < last.get(shard.index, -1)):
                yield Finding("gap", key.path, "this block is missing; the next run computes it")


def _check_entry(store: SampleStore, key: BlockKey) -> Finding | None:
    """Read one block completely; None if it is sound."""
    try:
        for kind, detail in check_block(store, key):
            return Finding(kind, key.path, detail)
    except BrokenBlock as error:
        kind, _, detail = str(error).partition(":")
        known = kind in ("truncated", "corrupted")
        return Finding(kind if known else "corrupted", key.path, detail.strip() if known else str(error))
    except (pa.ArrowException, OSError, ValueError) as error:
        return Finding("corrupted", key.path, " ".join(str(error).split())[:200])
    return None


def check_block(store: SampleStore, key: BlockKey) -> Iterator[tuple[str, str]]:
    """Yield (kind, detail) of everything that is wrong with a block. Raises BrokenBlock if its bytes have changed."""
    file: Any = store.storage.open_input(key.path)
    with file:
        if file.seek(0, io.SEEK_END) <= _WHOLE:
            file.seek(0)
            file = io.BytesIO(file.read())
        check_seal(file)
        file.seek(0)
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        stamp = read_stamp(parquet.metadata)
        wrong = differences(stamp, store.plan, store.run_id)
        if wrong:
            yield "wrong", "; ".join(wrong)
            return
        momentum = "momentum" in parquet.schema_arrow.names
        if not parquet.schema_arrow.remove_metadata().equals(arrow_schema(store.plan, momentum)):
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


def _damaged(storage: Storage, plan: WalkPlan) -> Iterator[Finding]:
    """Yield files whose digest stands beside them, under `files` in a JSON object, and is not theirs."""
    for path in [*(f"map/start={k}/map.json" for k in range(plan.starts)), "deformation/deformation.json"]:
        if not storage.exists(path):
            continue
        folder = path.rsplit("/", 1)[0]
        for name, digest in storage.read_json(path).get("files", {}).items():
            place = f"{folder}/{name}"
            if not storage.exists(place):
                yield Finding("damaged", path, f"{place} is missing")
            elif hashlib.sha256(storage.read(place)).hexdigest() != digest:
                yield Finding("damaged", place, f"its sha256 is not the one in {path}")
                yield Finding("damaged", path, f"describes {place}, which is damaged")


def _stale(store: SampleStore) -> Iterator[Finding]:
    """Yield results that were made from other blocks than those that are there."""
    recorded = {path: store.storage.read_json(path).get("blocks") for path in DERIVED if store.storage.exists(path)}
    if not any(recorded.values()):
        return
    present = store.digest()
    for path, digest in recorded.items():
        if digest not in (None, present):
            yield Finding("stale", path, "made from other blocks than those that are there now")


def refuse_no_run(storage: Storage) -> None:
    """Raise InputError if nothing at that address says that it is a run."""
    if not storage.exists("run.json"):
        raise InputError(
            f"No run at {storage.uri}: run.json is missing there. Give the address that 'fiberwalk run' printed."
        )

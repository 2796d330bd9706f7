"""Is everything there, and as it was written? Reads every object; repairs by removing what the next run then redoes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.plan import BlockKey, WalkPlan
from pipeline.stages.check_block import first_wrong
from pipeline.stages.check_results import Results
from pipeline.storage import Storage
from pipeline.store import SampleStore, parse_path

_RUN_ID = re.compile(r"[^/]-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    kind: str
    """truncated, corrupted, wrong or values (of a block), foreign, duplicate, damaged, stale, gap or note."""
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
    repaired: bool = False
    """Whether what is broken was removed; what is missing then only waits for the next run."""

    @property
    def complete(self) -> bool:
        """Whether every planned block is there and sound."""
        return self.blocks == self.blocks_planned > 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong: all that is wrong was removed, or there was nothing."""
        gone = set(self.removed)
        return all(f.harmless or f.path in gone or (self.repaired and f.kind == "gap") for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"complete": self.complete, "sound": self.sound}

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        lines += [f"removed: {path}" for path in self.removed]
        if self.blocks_planned:
            there = f"{self.blocks} of {self.blocks_planned} blocks and {self.rows} of {self.rows_planned} rows are"
        elif not self.blocks and not self.findings:
            return "No walk has begun: there is no block yet, and nothing is wrong."
        else:
            there = f"Without a plan only checksums can be looked at: {self.blocks} blocks are"
        lines.append(f"{there} there and sound, {self.bytes / 1e6:,.1f} MB read.")
        wrong = sum(not finding.harmless for finding in self.findings)
        if self.repaired and wrong:
            lines.append("What was removed or is missing is redone by the next 'fiberwalk run'.")
        elif wrong:
            lines.append(
                f"{wrong} things are wrong. 'fiberwalk verify {self.run_uri} --repair' removes what is broken."
            )
        return "\n".join(lines)


def verify(run_uri: str) -> Findings:
    """Read and check every object of a run, and whether what was made from the blocks is of their present state.

    Blocks that are merely not computed yet are counted, not wrong; a block missing before one that exists, or from a
    run whose sampling was finished, is a gap.

    Raises:
        InputError: There is no run at that address.
    """
    storage = Storage.open(run_uri)
    results = Results(storage)
    blocks = sorted(path for path in results.paths if path.startswith("walks/"))
    store = _store(storage, results)
    if store is None:
        _refuse_other_folder(storage, results)
        if not blocks and not results.wrong and results.run is None:
            SampleStore.open(storage)  # says what is missing
    result = Findings(storage.uri, findings=[Finding(*found) for found in results.wrong])
    if store is not None:
        result.rows_planned = store.plan.rows
        result.blocks_planned = len(store.plan.shards()) * store.plan.blocks_per_shard
    _check_blocks(result, storage, store, {path: results.paths[path] for path in blocks})
    if store is not None:
        present = {key for path in blocks if (key := store.planned(path))}
        result.findings += _gaps(store, present, results.sampled)
        if result.complete and not any(finding.removable for finding in result.findings):
            result.findings += [Finding(*found) for found in results.stale(store.digest())]
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
    result.repaired = True
    return result


def _below(storage: Storage, folder: str) -> list[str]:
    return [entry.path for entry in storage.list(folder)]


def _store(storage: Storage, results: Results) -> SampleStore | None:
    """The sample store as its plan describes it; None if the plan is missing or damaged."""
    if results.plan is None:
        return None
    try:
        plan = WalkPlan.from_json(results.plan)
    except TypeError as error:
        raise InputError(
            f"The plan at {storage.uri} was written by another version ({error}). Use the release that wrote it."
        ) from None
    run_id = storage.uri.rsplit("/", 1)[-1] if results.run is None else str(results.run["run_id"])
    return SampleStore(storage, plan, run_id)


def _check_blocks(result: Findings, storage: Storage, store: SampleStore | None, paths: dict[str, int]) -> None:
    """Add what is wrong with the objects below ``walks/``, and count sound blocks."""
    keys = {path: store.planned(path) if store else parse_path(path) for path in paths}
    planned = [path for path, key in keys.items() if key is not None]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda path: first_wrong(store, storage, path, keys[path]), planned)
        for path, wrong in zip(planned, found, strict=True):
            result.bytes += paths[path]
            if wrong is not None:
                result.findings.append(Finding(wrong[0], path, wrong[1]))
                continue
            result.blocks += 1
            key = keys[path]
            result.rows += _rows_of(store.plan, key) if store and key else 0
    result.findings += [_stranger(storage, path, store) for path in paths if keys[path] is None]


def _rows_of(plan: WalkPlan, key: BlockKey) -> int:
    return plan.shards()[key.shard].walks * len(plan.records_in_block(key.block))


def _stranger(storage: Storage, path: str, store: SampleStore | None) -> Finding:
    """Say what an object is that lies among the blocks and is none of them."""
    if not path.endswith(".parquet"):
        return Finding("foreign", path, "not a block; other readers of the data set would stop at it")
    key = _copied(storage, path, store.plan) if store else None
    if key is not None:
        return Finding("duplicate", path, f"it holds the rows of {key.path}; other readers would count them twice")
    return Finding("foreign", path, "no planned block has this name; other readers would count its rows as well")


def _copied(storage: Storage, path: str, plan: WalkPlan) -> BlockKey | None:
    """The block whose rows an object holds, judged by its first row; None if it cannot be told."""
    try:
        with storage.open_input(path) as file:
            first = pq.ParquetFile(file).read(columns=["walk", "step"]).slice(0, 1).to_pylist()[0]
    except (pa.ArrowException, OSError, IndexError):
        return None
    record = first["step"] // plan.record_every - 1
    shards = [shard.index for shard in plan.shards() if shard.first_walk == first["walk"]]
    return BlockKey(shards[0], record // plan.records_per_block) if shards and record >= 0 else None


def _gaps(store: SampleStore, found: set[BlockKey], sampled: bool) -> Iterator[Finding]:
    """Yield blocks that are missing although later work exists."""
    last: dict[int, int] = {}
    for key in found:
        last[key.shard] = max(last.get(key.shard, -1), key.block)
    for shard in store.plan.shards():
        for block in range(store.plan.blocks_per_shard):
            key = BlockKey(shard.index, block)
            if key not in found and (sampled or block < last.get(shard.index, -1)):
                yield Finding("gap", key.path, "this block is missing; the next run computes it")


def _refuse_other_folder(storage: Storage, results: Results) -> None:
    """Raise InputError where nothing but a name says that this is a run: repair would remove files of somebody else."""
    told = results.run is not None or results.plan is not None
    known = any(path.startswith("map/start=") or parse_path(path) is not None for path in results.paths)
    named = _RUN_ID.search(storage.uri) is not None and results.paths.keys() & {"run.json", "config.yaml", "plan.json"}
    if not (told or known or named):
        raise InputError(
            f"No run at {storage.uri}: run.json and plan.json are missing there, or were not written by fiberwalk. "
            "Give the address that 'fiberwalk run' printed."
        )


def refuse_no_run(storage: Storage) -> None:
    """Raise InputError if nothing at that address says that it is a run."""
    if not storage.exists("run.json"):
        raise InputError(
            f"No run at {storage.uri}: run.json is missing there. Give the address that 'fiberwalk run' printed."
        )

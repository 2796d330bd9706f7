"""Progress of a run, from the names of its objects alone: no status file, and no process to ask."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pipeline.plan import BlockKey, Shard
from pipeline.stages.verify import refuse_no_run
from pipeline.storage import Storage
from pipeline.store import SampleStore

STAGES = {
    "estimate": "map/start=0/map.json",
    "plan": "plan.json",
    "select": "radius.json",
    "deform": "deformation/deformation.json",
    "evaluate": "evaluation.json",
    "report": "report.html",
}
"""The object whose existence says that a stage is done; sampling is done when every block is there."""


def status(run_uri: str) -> dict[str, Any]:
    """Return progress, from one listing and a few small objects.

    Returns:
        run_uri; stages: name -> done; once the run is planned also walks, rows, blocks and shards ({done, planned}
        each), bytes of the blocks; diverged, once the run is evaluated; finished.

    Raises:
        InputError: There is no run at that address.
    """
    storage = Storage.open(run_uri)
    refuse_no_run(storage)
    stages = {name: storage.exists(path) for name, path in STAGES.items()}
    stored = storage.read_json("run.json", strict=False)
    if "run_id" not in stored:
        stored = storage.read_json("run.json")  # says that it is damaged
    found: dict[str, Any] = {"run_uri": storage.uri, "run_id": stored["run_id"]}
    sampled = False
    if stages["plan"]:
        progress = _progress(SampleStore.open(storage))
        sampled = progress["blocks"]["done"] == progress["blocks"]["planned"]
        found |= progress
    order = ("estimate", "sample", "select", "deform", "evaluate", "report")
    stages["sample"] = sampled
    if stages["evaluate"]:
        evaluation = storage.read_json(STAGES["evaluate"])
        found["diverged"] = evaluation.get("walk", {}).get("diverged")
        stages["deform"] = stages["deform"] or "deformation" not in evaluation.get("methods", {"deformation": 0})
    return found | {"stages": {name: stages[name] for name in order}, "finished": all(stages[name] for name in order)}


def _progress(store: SampleStore) -> dict[str, Any]:
    plan, shards = store.plan, store.plan.shards()
    entries = store.entries()
    per_shard: dict[int, int] = {}
    for key in entries:
        per_shard[key.shard] = per_shard.get(key.shard, 0) + 1
    complete = [shard for shard in shards if per_shard.get(shard.index, 0) == plan.blocks_per_shard]
    records = [len(plan.records_in_block(block)) for block in range(plan.blocks_per_shard)]
    return {
        "walks": _pair(sum(shard.walks for shard in complete), plan.walks),
        "rows": _pair(sum(_rows(shards, records, key) for key in entries), plan.rows),
        "blocks": _pair(len(entries), len(shards) * plan.blocks_per_shard),
        "shards": _pair(len(complete), len(shards)),
        "bytes": sum(entry.size for entry in entries.values()),
    }


def _rows(shards: list[Shard], records: list[int], key: BlockKey) -> int:
    return shards[key.shard].walks * records[key.block]


def _pair(done: int, planned: int) -> dict[str, int]:
    return {"done": done, "planned": planned}


def status_table(found: dict[str, Any]) -> Table:
    """Return a table for people out of what `status` found."""
    table = Table(title=found["run_uri"], show_header=False)
    for name, done in found["stages"].items():
        table.add_row(name, "done" if done else "to do")
    for name in ("walks", "rows", "blocks", "shards"):
        if name in found:
            done, planned = found[name]["done"], found[name]["planned"]
            table.add_row(name, f"{done:,} of {planned:,}")
    if "bytes" in found:
        table.add_row("stored", f"{found['bytes'] / 1e6:,.1f} MB")
    if found.get("diverged") is not None:
        table.add_row("diverged walks", str(found["diverged"]))
    return table

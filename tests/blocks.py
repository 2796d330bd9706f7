"""Small plans and blocks for tests of the store: what a walk would write, without walking."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.documents import sealed_text
from pipeline.plan import BlockKey, WalkPlan
from pipeline.storage import Storage
from pipeline.store import SampleBlock, SampleStore


def make_plan(**changes: Any) -> WalkPlan:
    """Ten walks in shards of four, ten records in blocks of three."""
    settings: dict[str, Any] = {
        "walks": 10,
        "walks_per_shard": 4,
        "starts": 2,
        "length": 1.0,
        "steps": 20,
        "record_every": 2,
        "records_per_block": 3,
        "corrections": 1,
        "correction": "plain",
        "rank": 0,
        "step_size": 0.3,
        "step_size_given": False,
        "momentum": 0.0,
        "guard": True,
        "guard_limit": 1.0,
        "tilt": "none",
        "drift": "isotropic",
        "batch_size": 0,
        "dtype": "float32",
        "form": "batched",
        "compile": False,
        "dim": 7,
    }
    settings |= changes
    settings.setdefault("parameters", [{"name": "weight", "shape": [settings["dim"]]}])
    return WalkPlan(**settings)


def make_block(plan: WalkPlan, key: BlockKey, *, momentum: bool = False, seed: int = 0) -> SampleBlock:
    """A block of random numbers that are a function of seed and key."""
    shard = plan.shards()[key.shard]
    records = np.asarray(plan.records_in_block(key.block))
    rng = np.random.default_rng([seed, key.shard, key.block])
    rows = shard.walks * len(records)
    return SampleBlock(
        key=key,
        walk=np.tile(np.arange(shard.first_walk, shard.first_walk + shard.walks, dtype=np.int32), len(records)),
        start=np.full(rows, shard.start, dtype=np.int16),
        step=np.repeat((records + 1) * plan.record_every, shard.walks).astype(np.int32),
        radius=np.repeat(plan.radii()[records], shard.walks).astype(np.float32),
        potential=rng.random(rows),
        nll=rng.random(rows),
        grad_norm=rng.random(rows, dtype=np.float32),
        distance=rng.random(rows, dtype=np.float32),
        step_size=rng.random(rows),
        status=["ok"] * rows,
        theta=rng.standard_normal((rows, plan.dim)).astype(plan.dtype),
        momentum=rng.standard_normal((shard.walks, plan.dim)).astype(plan.dtype) if momentum else None,
    )


def keys(plan: WalkPlan) -> list[BlockKey]:
    """All keys of a plan."""
    return [BlockKey(shard.index, block) for shard in plan.shards() for block in range(plan.blocks_per_shard)]


def make_store(uri: str, plan: WalkPlan, *, fill: bool = True, momentum: bool = False) -> SampleStore:
    """A store at a new place, with all its blocks or none."""
    storage = Storage.open(uri)
    storage.create_json("plan.json", plan.to_json())
    storage.create_json("run.json", {"run_id": "made-0123abcd"})
    storage.create("config.yaml", sealed_text(b"name: made\ndeformation: {kind: none}\n"))
    for start in range(plan.starts):
        storage.create_json(f"map/start={start}/map.json", {"files": {}, "lambda_max": 1.0})
    store = SampleStore.open(storage)
    for key in keys(plan) if fill else []:
        assert store.commit(make_block(plan, key, momentum=momentum))
    return store

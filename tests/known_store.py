"""A complete store whose theta is a known function of walk and record, for tests of what is exported from it."""

from __future__ import annotations

import numpy as np

from pipeline.plan import BlockKey, Shard, WalkPlan
from pipeline.storage import Storage
from pipeline.store import SampleBlock, SampleStore
from tests.blocks import keys, make_plan

PARAMETERS = [{"name": "0.weight", "shape": [3, 2]}, {"name": "0.bias", "shape": [3]}, {"name": "a/../b", "shape": []}]
DIM = 10
RECORDS = 6
DIVERGED = 6


def make_store(place: str, dim: int = DIM, parameters: list[dict] | None = None, **changes: object) -> SampleStore:
    """Ten walks of six records; walk 6 diverged near its end, and walk 3 paused for one record."""
    settings = {"length": 6.0, "steps": 12, "records_per_block": 4, "form": "vmap"} | changes
    plan = make_plan(dim=dim, parameters=parameters or PARAMETERS, **settings)
    storage = Storage.open(place)
    storage.create_json("plan.json", plan.to_json())
    storage.create_json("run.json", {"run_id": place.rpartition("/")[2]})
    store = SampleStore.open(place)
    for key in keys(plan):
        assert store.commit(make_block(plan, plan.shards()[key.shard], key.block))
    return store


def make_block(plan: WalkPlan, shard: Shard, number: int) -> SampleBlock:
    """Rows of one block; the radius of walk 3 lags behind by one record."""
    records = np.array(plan.records_in_block(number))
    walks = np.arange(shard.first_walk, shard.first_walk + shard.walks, dtype=np.int32)
    walk, record = np.tile(walks, len(records)), np.repeat(records, shard.walks)
    rows = len(walk)
    status = ["diverged" if w == DIVERGED and k >= 4 else "ok" for w, k in zip(walk, record, strict=True)]
    drifts = np.where(walk == 3, record, record + 1) * plan.record_every * plan.length / plan.steps
    return SampleBlock(
        key=BlockKey(shard.index, number), walk=walk, start=np.full(rows, shard.start, np.int16),
        step=((record + 1) * plan.record_every).astype(np.int32), radius=drifts.astype(np.float32),
        potential=100.0 * walk + record, nll=50.0 * walk + record, grad_norm=np.ones(rows, np.float32),
        distance=np.sqrt(drifts).astype(np.float32), step_size=np.full(rows, 0.1), status=status,
        theta=theta_of(walk, record, plan.dim),
    )  # fmt: skip


def theta_of(walk: np.ndarray, record: np.ndarray, dim: int = DIM) -> np.ndarray:
    """theta[i] = 1000 walk + 10 record + i / 100, exact enough in float32."""
    return (1000.0 * walk[:, None] + 10.0 * record[:, None] + np.arange(dim) / 100).astype(np.float32)


WALKS = np.array([w for w in range(10) if w != DIVERGED])
EXPECTED = np.stack([theta_of(np.full(RECORDS, w), np.arange(RECORDS)) for w in WALKS])  # (chains, draws, D)

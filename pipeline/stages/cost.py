"""What a run costs before it runs: shards, gradients, bytes and memory, and whether it fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pipeline.bayes.trees import leaves
from pipeline.build import build_network
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.fitting.job import memory_estimate
from pipeline.fitting.stored import batch_rows
from pipeline.machine import machine_memory, readable
from pipeline.run import Run
from pipeline.stages.pilot import MOST_STEPS, WALKS
from pipeline.stages.sample import AUTO_STEPS, records_per_block

ROW_BYTES = 60
"""Of a stored point, beside theta."""
FOOTER_BYTES = 4096
"""Of a block, beside its rows: schema, statistics, checksums."""
PROCESS_BYTES = 400 << 20
"""A process with torch and Ray loaded, measured on Linux."""
WALK_COPIES = 7
"""Arrays of the size of all positions in a step: position, momentum, anchor, drift, gradient, two temporaries."""
PILOT_TRIALS = 6
"""Lengths that a pilot tries, typically."""


@dataclass(frozen=True)
class Cost:
    """Sizes in bytes, counts as they are."""

    run_id: str
    parameters: int
    walks: int
    shards: int
    starts: int
    steps: int
    """Of one walk; an upper limit where `walk.steps` is auto."""
    records: int
    blocks: int
    gradient_evaluations: int
    """Of one walk's potential each, the pilot included."""
    storage_bytes: int
    block_bytes: int
    actor_bytes: int
    actors: int
    deformation_bytes: int
    """Of one Ray Train worker."""
    deformation_workers: int
    driver_bytes: int
    machine_bytes: int
    """Memory of this machine; 0 if it is not known."""
    disk_bytes: int
    """Free space of a local storage place; 0 for object stores."""
    embedded: bool
    """Whether everything runs on this machine."""
    arithmetic: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @property
    def peak_bytes(self) -> int:
        """Most memory at one time on one machine: walking or training, never both."""
        walking = self.actors * self.actor_bytes
        training = self.deformation_workers * self.deformation_bytes
        return max(walking, training) + self.driver_bytes

    def table(self) -> Table:
        """For a person."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        rows = [
            ("run", self.run_id),
            ("parameters walked", f"{self.parameters:,}"),
            ("walks", f"{self.walks:,} in {self.shards:,} shards, {self.starts} start(s), {self.steps:,} steps each"),
            ("recorded points", f"{self.walks * self.records:,} in {self.blocks:,} blocks"),
            ("gradient evaluations", f"{self.gradient_evaluations:,} of one walk"),
            ("storage", f"{readable(self.storage_bytes)}, blocks of {readable(self.block_bytes)}"),
            ("memory of an actor", f"{readable(self.actor_bytes)} = {self.arithmetic['actor']}"),
            ("memory of a training worker", f"{readable(self.deformation_bytes)} = {self.arithmetic['deformation']}"),
            ("memory of the driver", readable(self.driver_bytes)),
        ]
        if self.embedded:
            have = readable(self.machine_bytes) if self.machine_bytes else "unknown"
            rows.append(("at once on this machine", f"{readable(self.peak_bytes)} of {have}, {self.actors} actors"))
        for row in rows:
            table.add_row(*row)
        return table


def estimate_cost(run: Run) -> Cost:
    """Compute the cost of a configuration on its data; nothing runs and nothing is written."""
    config, walk = run.config, run.config.walk
    network = build_network(config, run.dataset.schema, 0, torch.float32)
    dim, item = network.dim, np.dtype(walk.dtype).itemsize
    steps = MOST_STEPS if walk.steps == "auto" else walk.steps
    records = math.ceil((AUTO_STEPS if walk.steps == "auto" else steps) / walk.record_every)
    walks_here = min(walk.walks_per_shard, walk.walks)
    shards = _shards(config)
    in_block = records_per_block(records, walk.walks_per_shard, dim, walk.dtype)
    blocks = shards * -(-records // in_block)
    pilot = WALKS * steps * PILOT_TRIALS if "auto" in (walk.length, walk.steps) else 0
    data = sum(leaf.nbytes for rows in _splits(run) for leaf in leaves(rows.x))
    positions, block = walks_here * dim * item, in_block * walks_here * dim * item
    momentum = 0 if walk.correction in ("plain", "deflated") else positions
    rank = 0 if walk.correction in ("plain", "momentum") else min(walk.rank, dim)
    fitted, fit = config.deformation.kind != "none", _deformation_bytes(config, dim)
    return Cost(
        run_id=config.run_id,
        parameters=dim,
        walks=walk.walks,
        shards=shards,
        starts=config.map.starts,
        steps=steps,
        records=records,
        blocks=blocks,
        gradient_evaluations=walk.walks * (steps * walk.corrections + records) + pilot,
        storage_bytes=walk.walks * records * (dim * item + ROW_BYTES) + blocks * (momentum + FOOTER_BYTES),
        block_bytes=block,
        actor_bytes=PROCESS_BYTES + 3 * data + WALK_COPIES * positions + 2 * block + (rank + 2) * dim * 8,
        actors=min(_actors(config), shards),
        deformation_bytes=PROCESS_BYTES + data + fit if fitted else 0,
        deformation_workers=config.deformation.workers if fitted else 0,
        driver_bytes=PROCESS_BYTES + 2 * data + 6 * dim * 8,
        machine_bytes=machine_memory(),
        disk_bytes=_free_disk(run),
        embedded=config.cluster.address is None,
        arithmetic={
            "actor": _walking(data, (walks_here, dim, item), block, rank),
            "deformation": _training(config, data, fit),
        },
    )


def refuse_what_does_not_fit(cost: Cost) -> None:
    """Raise InputError with the arithmetic where the disk, or the memory for an embedded run, is too small."""
    if cost.disk_bytes and cost.storage_bytes > cost.disk_bytes:
        raise InputError(
            f"The store does not fit: {cost.walks:,} walks x {cost.records} records x {cost.parameters:,} parameters "
            f"take {readable(cost.storage_bytes)}, and {readable(cost.disk_bytes)} are free there. Raise "
            "walk.record_every, lower walk.walks, or name another storage."
        )
    if not cost.embedded or not cost.machine_bytes or cost.peak_bytes <= cost.machine_bytes:
        return
    walking = cost.actors * cost.actor_bytes
    training = cost.deformation_workers * cost.deformation_bytes
    if walking >= training:
        what = f"{cost.actors} actors x {readable(cost.actor_bytes)} ({cost.arithmetic['actor']})"
        way_out = "Lower walk.walks_per_shard, walk.rank or cluster.actors"
    else:
        each = f"{readable(cost.deformation_bytes)} ({cost.arithmetic['deformation']})"
        what = f"{cost.deformation_workers} training workers x {each}"
        way_out = "Lower deformation.rank or deformation.workers, or set deformation.kind: gaussian or none"
    raise InputError(
        f"The run does not fit: {what} + driver {readable(cost.driver_bytes)} = {readable(cost.peak_bytes)}, and this "
        f"machine has {readable(cost.machine_bytes)}. {way_out}, or name a cluster with cluster.address."
    )


def _walking(data: int, positions: tuple[int, int, int], block: int, rank: int) -> str:
    """Arithmetic of the memory of an actor; `positions`: walks, parameters, bytes of a number."""
    walks, dim, item = positions
    return (
        f"{readable(PROCESS_BYTES)} + 3 x {readable(data)} data + {WALK_COPIES} x {walks} walks x {dim:,} "
        f"x {item} bytes + 2 x {readable(block)} block + ({rank} + 2) x {dim:,} x 8 bytes curvature"
    )


def _training(config: Config, data: int, fit: int) -> str:
    """Arithmetic of the memory of a training worker."""
    parts = f"{readable(PROCESS_BYTES)} + {readable(data)} data + {readable(fit)}"
    return f"{parts} for rank {config.deformation.rank}"


def _shards(config: Config) -> int:
    """Shards of all starts, as `WalkPlan.shards` deals them."""
    walks, starts = config.walk.walks, config.map.starts
    bounds = [walks * k // starts for k in range(starts + 1)]
    return sum(-(-(high - low) // config.walk.walks_per_shard) for low, high in itertools.pairwise(bounds))


def _actors(config: Config) -> int:
    """Actors that run at once on this machine."""
    if config.cluster.actors != "auto":
        return config.cluster.actors
    return max(1, int((os.cpu_count() or 1) / config.cluster.cpus_per_actor))


def _free_disk(run: Run) -> int:
    """Free bytes at a local storage place, which need not exist yet."""
    if run.storage.protocol != "file":
        return 0
    place = Path(run.storage.uri)
    while place != place.parent:
        try:
            return shutil.disk_usage(place).free
        except OSError:  # not there yet, or no place at all, which the test whether it can be written says best
            place = place.parent
    return shutil.disk_usage(place).free


def _deformation_bytes(config: Config, dim: int) -> int:
    if config.deformation.kind == "gaussian":
        return 2 * config.walk.walks * dim * 4
    return memory_estimate(dim, config.deformation.rank, batch_rows(dim))


def _splits(run: Run) -> list[Any]:
    return [run.dataset.train, run.dataset.validation, run.dataset.test]

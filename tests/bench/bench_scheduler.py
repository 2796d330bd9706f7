"""What Ray costs: shards a second through the driver, its memory, and the share of the kernel's rate that a run keeps.

    python tests/bench/bench_scheduler.py [--shards 10000] [--seconds 70] [--actors 2] [--json PATH]

"scheduling" sends shards of a kernel that does nothing through the executor of `fiberwalk run`. "through Ray" walks the
banana network (2-16-16-2, 265 rows, 128 walks a shard, records every 10 steps) to a store on disk, and compares with
the same kernel and steps in as many bare processes, without Ray, records and store, just before and after. Both counts
are gradients of one walk a second: a record needs one as a step does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.bayes.walk import advance, init
from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.executor import SerialExecutor
from pipeline.plan import Shard, WalkPlan
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.shard import BlockReport, build_kernel, run_shard
from pipeline.stages.estimate import estimate
from pipeline.stages.sample import settle_plan
from workers.cluster import connected
from workers.walker import RayExecutor

console = Console(width=140)
WALKS = 128
STEPS = 400
ROWS = 265


def banana() -> tuple[np.ndarray, np.ndarray]:
    """Two classes in the plane, as many rows as the banana data have for training, and as many again."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * ROWS, 2)).astype(np.float32)
    return x, (x[:, 1] + 0.7 * rng.standard_normal(2 * ROWS) > x[:, 0] ** 2 - 1).astype(np.int64)


def settings(place: str, actors: int, walks: int) -> dict[str, Any]:
    """A run on the banana network with nothing left to choose."""
    return {
        "name": "bench",
        "data": {"source": f"npz:{place}/banana.npz", "train_rows": ROWS, "validation": 0.25, "test": 0.25},
        "model": {"hidden": [16, 16]},
        "prior": {"precision": 0.1},
        "walk": {
            "walks": walks, "walks_per_shard": WALKS, "length": 20.0, "steps": STEPS,
            "correction": "deflated-momentum", "compile": False,
        },
        "deformation": {"kind": "none"},
        "storage": place,
        "cluster": {"actors": actors},
    }  # fmt: skip


def nothing(run: Run, shard: Shard) -> Iterator[BlockReport]:
    """A kernel that does nothing and reports one block."""
    yield BlockReport(block=0, walks=shard.walks, steps=0, rows=0, halved=0, diverged=0, seconds=0.0)


def scheduling(run: Run, shards: int) -> dict[str, Any]:
    """Rate of `shards` empty shards, and the driver's memory at each tenth of them, MiB."""
    executor, process = RayExecutor(run.config), psutil.Process()
    items = [Shard(index, 0, index * WALKS, WALKS) for index in range(shards)]
    list(executor.stream(nothing, run, items[:50]))  # the actors start
    memory, began = [process.memory_info().rss / 2**20], time.perf_counter()
    for done, _ in enumerate(executor.stream(nothing, run, items), 1):
        if done % (shards // 10) == 0:
            memory.append(process.memory_info().rss / 2**20)
    taken = time.perf_counter() - began
    executor.release()
    return {"shards": shards, "seconds": taken, "per_second": shards / taken, "driver_mib": memory}


def bare(place: str, actors: int, seconds: float) -> float:
    """Gradients a second of the kernel in single-threaded processes of its own, all at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(actors) as pool:
        spans = pool.starmap(_bare, [(place, actors, number, seconds) for number in range(actors)], chunksize=1)
    return sum(gradients / taken for gradients, taken in spans)


def _bare(place: str, actors: int, number: int, seconds: float) -> tuple[int, float]:
    torch.set_num_threads(1)
    run = prepare(parse_config(settings(place, actors, WALKS * actors)))
    run = Run(run.config, run.storage.open(_made(place)), run.dataset)
    plan = WalkPlan.from_json(run.storage.read_json("plan.json"))
    kernel = build_kernel(run, plan, load_problem(run, 0, plan), Shard(0, 0, 0, WALKS))
    state, steps = init(kernel), 0
    advance(kernel, state)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            advance(kernel, state)
        steps += 10
    return steps * WALKS, time.perf_counter() - began


def _made(place: str) -> str:
    return next(str(path.parent) for path in Path(place).glob("*/plan.json"))


def through_ray(place: str, actors: int, seconds: float) -> dict[str, Any]:
    """Rates of a run of about `seconds` against the bare kernel before and after it."""
    plan_run = prepare(parse_config(settings(place, actors, WALKS)))
    claim(plan_run)
    estimate(plan_run, SerialExecutor(), LogProgress())
    settle_plan(plan_run, SerialExecutor(), LogProgress())
    before = bare(place, actors, 8.0)
    shards = actors * max(1, round(before * seconds / (WALKS * STEPS * 1.1) / actors))
    run = _with_plan(plan_run, place, actors, shards * WALKS)
    plan = WalkPlan.from_json(run.storage.read_json("plan.json"))
    executor, began = RayExecutor(run.config), time.perf_counter()
    first, blocks = 0.0, 0
    for _ in executor.stream(run_shard, run, plan.shards()):
        first, blocks = first or time.perf_counter(), blocks + 1
    taken, walking = time.perf_counter() - began, time.perf_counter() - first
    executor.release()
    after = bare(place, actors, 8.0)
    gradients = plan.walks * (plan.steps + plan.records)
    kernel, rate = (before + after) / 2, gradients / taken
    # The first blocks of all actors lie before `first`, but for one report they came at about the same time.
    steady = gradients * (blocks - actors) / blocks / walking
    return {
        "walks": plan.walks, "steps": plan.steps, "records": plan.records, "seconds": taken, "actors": actors,
        "bare": [before, after], "gradients_per_second": rate, "steps_per_second": plan.walks * plan.steps / taken,
        "share": rate / kernel, "share_after_start": steady / kernel,
    }  # fmt: skip


def _with_plan(made: Run, place: str, actors: int, walks: int) -> Run:
    """A run of more walks with the objects of the one that is made: the estimate is not repeated."""
    run = prepare(parse_config(settings(place, actors, walks)))
    claim(run)
    for entry in made.storage.list():
        if entry.path.startswith("map/"):
            run.storage.create(entry.path, made.storage.read(entry.path))
    settle_plan(run, SerialExecutor(), LogProgress())
    return run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=70.0, help="length of the run through Ray")
    parser.add_argument("--actors", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=str)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"system": platform.platform(), "load": os.getloadavg(), "ray": ray.__version__}
    results: dict[str, Any] = {"settings": {**vars(arguments), **machine, "torch": torch.__version__}}
    with tempfile.TemporaryDirectory(prefix="fwbench-") as place:
        x, y = banana()
        np.savez(f"{place}/banana.npz", x=x, y=y)
        run = prepare(parse_config(settings(place, arguments.actors, WALKS)))
        with connected(run.config):
            results["scheduling"] = scheduling(run, arguments.shards)
            results["through_ray"] = through_ray(place, arguments.actors, arguments.seconds)
    show(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


def show(results: dict[str, Any]) -> None:
    """One table, with what the project set itself."""
    told, walk = results["scheduling"], results["through_ray"]
    table = Table("", "", "asked", title=f"Ray {results['settings']['ray']}, {walk['actors']} actors")
    table.add_row(f"{told['shards']:,} empty shards", f"{told['per_second']:,.0f} a second", "200")
    memory = told["driver_mib"]
    span = f"{memory[1]:.0f} MiB after a tenth, {memory[-1]:.0f} at the end"
    table.add_row("memory of the driver", f"{memory[0]:.0f} MiB at first, {span}", "flat")
    kernel = " and ".join(f"{rate:,.0f}" for rate in walk["bare"])
    table.add_row("bare kernel, gradients a second before and after", kernel, "")
    table.add_row(
        f"through Ray to disk, {walk['seconds']:.0f} s", f"{walk['gradients_per_second']:,.0f} gradients a second", ""
    )
    table.add_row("steps of walks a second", f"{walk['steps_per_second']:,.0f}", "")
    table.add_row("share of the bare kernel, the actors' start included", f"{walk['share']:.2f}", "0.85")
    table.add_row("share after the first block", f"{walk['share_after_start']:.2f}", "")
    console.print(table)


if __name__ == "__main__":
    main()

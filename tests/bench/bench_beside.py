"""What the store costs a walk: the same shard walked with and without committing its blocks to disk, in turns.

python -m tests.bench.bench_beside --json beside.json

One walker leaves a core of a small machine to the writer; as many walkers as cores leave none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.bayes.walk import init
from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.executor import SerialExecutor
from pipeline.plan import BlockKey, Shard
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.shard import build_kernel, run_shard, walk_block
from pipeline.stages.estimate import estimate
from pipeline.stages.sample import settle_plan
from pipeline.store import SampleStore

RECORDS = 144


def prepare_run(folder: str) -> Run:
    """A run whose walk makes 50 to 80 MB/s of points: D = 75,010, 32 walks a shard, a record each two steps."""
    config = {
        "name": "beside",
        "data": {"source": "sklearn:digits", "train_rows": 300, "validation": 0.1, "test": 0.1},
        "model": {"hidden": [1000]},
        "map": {"steps": 200, "tolerance": 1e6},
        "walk": {
            **{"walks": 128, "walks_per_shard": 32, "length": 6.0, "steps": 2 * RECORDS, "record_every": 2},
            **{"correction": "plain"},
        },
        "deformation": {"kind": "none"},
        "storage": folder,
    }
    run = prepare(parse_config(config))
    claim(run)
    estimate(run, SerialExecutor(), LogProgress())
    settle_plan(run, SerialExecutor(), LogProgress())
    return run


def bare(run: Run, shard: Shard) -> None:
    """Compute all blocks of a shard and drop them."""
    plan = SampleStore.open(run.uri).plan
    problem = load_problem(run, shard.start, plan)
    kernel = build_kernel(run, plan, problem, shard)
    state = init(kernel)
    for block in range(plan.blocks_per_shard):
        walk_block(run, plan, problem, kernel, state, BlockKey(shard.index, block), shard)


def stored(run: Run, shard: Shard) -> None:
    """Compute and commit them, as an actor does."""
    for _ in run_shard(run, shard):
        pass


def walker(run: Run, shard: Shard, rounds: int, barrier: Any, queue: Any) -> None:
    """Time both in turns, in step with the other walkers."""
    torch.set_num_threads(1)
    seconds: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        pair = {}
        for call in (bare, stored) if turn % 2 else (stored, bare):
            barrier.wait()
            began = time.perf_counter()
            call(run, shard)
            pair[call] = time.perf_counter() - began
            shutil.rmtree(Path(run.uri, "walks", f"shard={shard.index:05d}"), ignore_errors=True)
        if turn:  # the first is a warm-up
            seconds.append((pair[bare], pair[stored]))
    queue.put(seconds)


def measure(run: Run, walkers: int, rounds: int) -> dict[str, float]:
    """Median seconds of both, and the cost with the error of its mean over rounds."""
    plan = SampleStore.open(run.uri).plan
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(walkers), context.Queue()
    shards = plan.shards()[:walkers]
    processes = [context.Process(target=walker, args=(run, shard, rounds, barrier, queue)) for shard in shards]
    for process in processes:
        process.start()
    pairs = [pair for _ in processes for pair in queue.get()]
    for process in processes:
        process.join()
    costs = [with_store / without - 1 for without, with_store in pairs]
    megabytes = shards[0].walks * plan.records * plan.dim * 4 / 1e6
    without, with_store = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "walkers": walkers,
        "MB_per_s": walkers * megabytes / with_store,
        "bare_s": without,
        "stored_s": with_store,
        "cost_of_medians": with_store / without - 1,
        "cost_mean": statistics.mean(costs),
        "cost_error": statistics.stdev(costs) / len(costs) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--walkers", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = prepare_run(folder)
        for walkers in options.walkers:
            rows.append(measure(run, walkers, options.rounds))
            print(
                "{walkers} walker(s), {MB_per_s:.0f} MB/s: {bare_s:.2f} s without, {stored_s:.2f} s with the store, "
                "{cost_of_medians:+.1%} by medians, {cost_mean:+.1%} +- {cost_error:.1%} by pairs".format(**rows[-1])
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

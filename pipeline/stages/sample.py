"""Walks: settle the plan once, then carry every shard to its end."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import torch

from pipeline.bayes.kernels import plan_form
from pipeline.bayes.params import Network
from pipeline.bayes.target import prior_precision
from pipeline.bayes.trees import slice_rows, to_tensors
from pipeline.build import DTYPES, load_network, start_folder
from pipeline.executor import Executor
from pipeline.plan import Shard, WalkPlan
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.shard import run_shard
from pipeline.stages.pilot import run_pilot, uses_validation
from pipeline.store import SampleStore

AUTO_STEPS = 200
"""Where `steps: auto` begins."""
BLOCK_BYTES = 64 << 20
"""Size that blocks of wide networks aim at."""
LEAST_BLOCKS = 4
"""Blocks of a shard at least, so that a killed actor loses a quarter of a shard at most."""


def sample(run: Run, executor: Executor, progress: Progress) -> None:
    """Write every missing block of the planned walks.

    Raises:
        RunError: A shard failed again and again; the others are done.
    """
    plan = settle_plan(run, executor, progress)
    store = SampleStore.open(run.uri)
    committed = store.committed_all()
    shards = [s for s in plan.shards() if len(committed.get(s.index, ())) < plan.blocks_per_shard]
    if not shards:
        return
    done = sum(_block_steps(plan, s, b) for s in plan.shards() for b in committed.get(s.index, ()))
    halved, began, steps = 0, time.monotonic(), 0
    diverged: dict[int, int] = {}
    with progress.bar("Walks", plan.walks * plan.steps, done) as bar:
        for shard, report in executor.stream(run_shard, run, shards):
            halved, steps = halved + report.halved, steps + report.walks * report.steps
            diverged[shard.index] = max(report.diverged, diverged.get(shard.index, 0))
            rate = steps / max(time.monotonic() - began, 1e-9)
            finished = (done + steps) / plan.steps
            lost = sum(diverged.values())
            detail = f"{finished:.0f} of {plan.walks} walks, {rate:,.0f} steps/s, {halved} halved, {lost} diverged"
            bar.advance(report.walks * report.steps, detail)


def _block_steps(plan: WalkPlan, shard: Shard, block: int) -> int:
    return shard.walks * len(plan.records_in_block(block)) * plan.record_every


def settle_plan(run: Run, executor: Executor, progress: Progress) -> WalkPlan:
    """The stored plan, or a new one with every automatic setting chosen; the first to store it decides."""
    if run.storage.exists("plan.json"):
        return WalkPlan.from_json(run.storage.read_json("plan.json"))
    plan = draft_plan(run)
    if needs_pilot(run):
        progress.note("Pilot walks choose what is set to auto ...")
        ((_, choice),) = list(executor.stream(run_pilot, run, [plan]))
        plan = dataclasses.replace(
            plan.with_correction(choice.correction),
            length=choice.length,
            steps=choice.steps,
            guard_limit=choice.guard_limit,
            record_every=plan.record_every * (choice.steps // plan.steps),
            chosen={**plan.chosen, "correction": choice.correction, "pilot": dataclasses.asdict(choice)},
        )
        progress.note(
            f"Chosen: {plan.correction} walks of length {plan.length:.3g} in {plan.steps} steps, "
            f"guard at {plan.guard_limit:g} gamma (best radius of the pilot {choice.best_radius:.3g})"
        )
    run.storage.create_json("plan.json", plan.to_json())
    return WalkPlan.from_json(run.storage.read_json("plan.json"))


def needs_pilot(run: Run) -> bool:
    """Whether anything is left to be chosen by walking."""
    walk = run.config.walk
    compares = uses_validation(run) or walk.tilt == "posterior"
    return "auto" in (walk.length, walk.steps) or (walk.correction == "auto" and compares)


def draft_plan(run: Run) -> WalkPlan:
    """The plan as far as it follows from configuration and MAP estimates alone."""
    walk = run.config.walk
    info = run.storage.read_json(f"{start_folder(0)}/map.json")
    network, _ = load_network(run, 0, DTYPES[walk.dtype])
    correction = "momentum" if walk.correction == "auto" else walk.correction
    steps = AUTO_STEPS if walk.steps == "auto" else walk.steps
    rows = len(run.dataset.train.y)
    batch = 0 if walk.batch_size == "full" else walk.batch_size
    few = to_tensors(slice_rows(run.dataset.train.x, 0, 2), network.dtype, network.device)
    work = walk.walks * steps * walk.corrections
    form, compiled = plan_form(network, few, batch or rows, work, walk.compile)
    records = math.ceil(steps / walk.record_every)
    plan = WalkPlan(
        walks=walk.walks,
        walks_per_shard=walk.walks_per_shard,
        starts=run.config.map.starts,
        length=_first_length(run, network, info["prior_precision"]),
        steps=steps,
        record_every=walk.record_every,
        records_per_block=records_per_block(records, walk.walks_per_shard, network.dim, walk.dtype),
        corrections=walk.corrections,
        correction=correction,
        rank=len(info["eigenvalues"]),
        step_size=0.0 if walk.step_size == "auto" else walk.step_size,
        step_size_given=walk.step_size != "auto",
        momentum=0.0,
        guard=walk.guard,
        guard_limit=1.0,
        tilt=walk.tilt,
        drift=walk.drift,
        batch_size=batch,
        dtype=walk.dtype,
        form=form,
        compile=compiled,
        dim=network.dim,
        parameters=network.layout.to_json(),
        chosen={"correction": correction, "form": form, "compile": compiled},
    )
    return plan.with_correction(correction)


def records_per_block(records: int, walks: int, dim: int, dtype: str) -> int:
    """Records of a block: about `BLOCK_BYTES`, but at least `LEAST_BLOCKS` blocks a shard."""
    record_bytes = walks * dim * np.dtype(dtype).itemsize
    fitting = max(1, round(BLOCK_BYTES / record_bytes))
    return min(fitting, max(1, math.ceil(records / LEAST_BLOCKS)))


def _first_length(run: Run, network: Network, precision: Any) -> float:
    """Length before a pilot; of a tilted walk the root mean square of its drift, sqrt(sum 1 / alpha)."""
    walk = run.config.walk
    if walk.tilt != "posterior":
        return 1.0 if walk.length == "auto" else walk.length
    return float((1 / prior_precision(network.layout, precision, torch.float64)).sum().sqrt())

"""Carry one shard from its last committed block to its end. The kernel and the state of a walk meet the store here."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.walk import (
    Correction,
    Gradient,
    WalkInfo,
    WalkKernel,
    WalkState,
    advance,
    deflated_correction,
    init,
    minibatch_gradient,
    plain_correction,
    secure,
    set_anchor,
    tilt_vector,
)
from pipeline.build import Problem, drift_of, load_problem
from pipeline.plan import BlockKey, Shard, WalkPlan, stream
from pipeline.run import Run
from pipeline.store import SampleBlock, SampleStore

_WRITER_NICENESS = 19
TILT_MARGIN = 4.0
"""The guard's limit in units of gamma for tilted walks, whose endpoints lie about gamma / 2 above the minimum."""


@dataclass(frozen=True)
class BlockReport:
    """What the driver hears of a committed block: a few bytes."""

    block: int
    walks: int
    steps: int
    rows: int
    halved: int
    diverged: int
    seconds: float


def run_shard(run: Run, shard: Shard) -> Iterator[BlockReport]:
    """Compute and commit the missing blocks of a shard, in order; yields a report for each.

    Writing a block overlaps with computing the next. Blocks that exist are never computed again, also behind a hole.
    """
    store = SampleStore.open(run.uri)
    plan = store.plan
    committed = set(store.committed(shard.index))
    missing = [b for b in range(plan.blocks_per_shard) if b not in committed]
    if not missing:
        return
    problem = load_problem(run, shard.start, plan)
    kernel = build_kernel(run, plan, problem, shard)
    state: WalkState | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit", initializer=_give_way) as writer:
        pending: tuple[Future[bool], BlockReport] | None = None
        for number in missing:
            if state is None or number - 1 in committed:
                state = resume(kernel, plan, store, shard, number)
            began = time.monotonic()
            block, gone_back = walk_block(run, plan, problem, kernel, state, BlockKey(shard.index, number), shard)
            report = _report(block, plan, shard, gone_back, time.monotonic() - began)
            if pending is not None:
                pending[0].result()
                yield pending[1]
            pending = writer.submit(store.commit, block), report
        if pending is not None:
            pending[0].result()
            yield pending[1]


def _give_way() -> None:
    """Lower the priority of this thread and of those it starts: encoding takes the time that walking leaves.

    A walk that waits for its last block leaves all of it, so the writer never starves.
    """
    if sys.platform == "linux":  # elsewhere the call would change the whole process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)


def build_kernel(run: Run, plan: WalkPlan, problem: Problem, shard: Shard) -> WalkKernel:
    """Everything that the steps of one shard share."""
    theta = problem.theta_star
    walks = range(shard.first_walk, shard.first_walk + shard.walks)
    drift = np.stack([drift_of(run, plan, problem.precision, walk) / plan.steps for walk in walks])
    tilt = torch.stack([_tilt(run, problem, walk) for walk in walks]) if plan.tilt == "posterior" else None
    nll_star = float(problem.potential.nll_gradient(theta[None])[1][0])
    margin = TILT_MARGIN if tilt is not None else 1.0
    return WalkKernel(
        theta_star=theta,
        nll_star=nll_star,
        drift=torch.as_tensor(drift).to(theta),
        steps=plan.steps,
        gradient=_gradient(run, plan, problem, shard),
        correction=_correction(plan, problem),
        corrections=plan.corrections,
        momentum=plan.momentum,
        limit=plan.guard_limit * margin * max(problem.info["gamma"], 1.0) if plan.guard else None,
        tilt=tilt,
    )


def resume(kernel: WalkKernel, plan: WalkPlan, store: SampleStore, shard: Shard, number: int) -> WalkState:
    """The state after block `number` - 1, exactly as the uninterrupted walk had it."""
    state = init(kernel)
    if number == 0:
        return state
    block = store.read_last(BlockKey(shard.index, number - 1))
    last = slice(len(block.step) - shard.walks, None)
    theta = torch.as_tensor(np.array(block.theta[last])).to(state.position)
    state.position, state.anchor = theta, theta.clone()
    if state.momentum is not None and block.momentum is not None:
        state.momentum = torch.as_tensor(np.array(block.momentum)).to(theta)
    state.step_size = torch.tensor(np.asarray(block.step_size[last]), device=theta.device)
    per_step = plan.length / plan.steps
    drifts = np.rint(np.asarray(block.radius[last], dtype=np.float64) / per_step).astype(np.int64)
    state.drifts = torch.as_tensor(drifts, device=theta.device)
    state.nll = torch.tensor(np.asarray(block.nll[last]), device=theta.device)
    state.anchor_drifts, state.anchor_nll = state.drifts.clone(), state.nll.clone()
    state.diverged = torch.tensor([s == "diverged" for s in block.status[last]], device=theta.device)
    state.step = int(block.step[-1])
    return state


def walk_block(
    run: Run, plan: WalkPlan, problem: Problem, kernel: WalkKernel, state: WalkState, key: BlockKey, shard: Shard
) -> tuple[SampleBlock, int]:
    """Advance all walks through the records of one block; returns it and how many walks went back to a record."""
    parts: list[dict[str, np.ndarray]] = []
    gone_back = 0
    records = plan.records_in_block(key.block)
    theta = np.empty((len(records), *state.position.shape), dtype=plan.dtype)  # filled in place: a block may be large
    for positions in theta:
        for _ in range(plan.record_every):
            advance(kernel, state)
        info = measure_record(problem, state)
        if secure(state, info.potential):
            info = measure_record(problem, state)
        gone_back += int(state.halved.sum())
        parts.append(_columns(plan, state, info))
        np.copyto(positions, state.position.cpu().numpy())
        set_anchor(state, info.nll)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    walks = np.arange(shard.first_walk, shard.first_walk + shard.walks, dtype=np.int32)
    rows = len(parts) * shard.walks
    block = SampleBlock(
        key=key,
        walk=np.tile(walks, len(parts)),
        start=np.full(rows, shard.start, dtype=np.int16),
        theta=theta.reshape(rows, -1),
        momentum=None if state.momentum is None else state.momentum.cpu().numpy().copy(),
        **joined,  # pyright: ignore[reportArgumentType]
    )
    return block, gone_back


def measure_record(problem: Problem, state: WalkState) -> WalkInfo:
    """Potential, gradient norm and distance at the present points.

    With minibatches the potential is still that of all rows, and the gradient norm is of that of all rows too.
    """
    potential = problem.potential
    gradient, nll = potential.gradient(state.position)
    nll = nll.double()
    return WalkInfo(
        potential=nll + potential.prior(state.position).double(),
        nll=nll,
        grad_norm=gradient.norm(dim=1),
        distance=(state.position - problem.theta_star).norm(dim=1),
    )


def _columns(plan: WalkPlan, state: WalkState, info: WalkInfo) -> dict[str, np.ndarray]:
    walks = len(state.position)
    status = np.where(state.diverged.cpu(), "diverged", np.where(state.halved.cpu(), "halved", "ok"))
    return {
        "step": np.full(walks, state.step, dtype=np.int32),
        "radius": (state.drifts.cpu().numpy() * (plan.length / plan.steps)).astype(np.float32),
        "potential": info.potential.cpu().numpy(),
        "nll": info.nll.cpu().numpy(),
        "grad_norm": info.grad_norm.float().cpu().numpy(),
        "distance": info.distance.float().cpu().numpy(),
        "step_size": state.step_size.cpu().numpy().copy(),
        "status": status.astype(object),
    }


def _report(block: SampleBlock, plan: WalkPlan, shard: Shard, gone_back: int, seconds: float) -> BlockReport:
    records = len(plan.records_in_block(block.key.block))
    last = block.status[-shard.walks :]
    diverged = sum(1 for s in last if s == "diverged")
    return BlockReport(
        block.key.block, shard.walks, records * plan.record_every, len(block.step), gone_back, diverged, seconds
    )


def _gradient(run: Run, plan: WalkPlan, problem: Problem, shard: Shard) -> Gradient:
    potential = problem.potential
    if not 0 < plan.batch_size < potential.rows:
        return lambda position, step: potential.gradient(position)
    return minibatch_gradient(
        potential,
        problem.theta_star,
        plan.batch_size,
        lambda step: stream(run.config.seed, "batch", shard.index, step),
    )


def _correction(plan: WalkPlan, problem: Problem) -> Correction:
    curvature = problem.curvature
    deflated = plan.correction.startswith("deflated") and len(curvature.values) > 0
    if deflated:
        return deflated_correction(curvature, plan.step_size)
    return plain_correction(plan.step_size if plan.step_size_given else plan.step_size / curvature.lambda_max)


def _tilt(run: Run, problem: Problem, walk: int) -> Tensor:
    xi = stream(run.config.seed, "drift", walk).standard_normal(problem.theta_star.numel())
    rows, columns = problem.potential.rows, problem.likelihood.columns
    noise = stream(run.config.seed, "tilt", walk).standard_normal((rows, columns))
    like = problem.theta_star
    return tilt_vector(problem.potential, like, torch.as_tensor(xi).to(like), torch.as_tensor(noise).to(like))

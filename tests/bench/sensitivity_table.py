"""How far apart walks end whose directions hardly differ: what no smooth map from directions to walks can undercut.

    python -m tests.bench.sensitivity_table RUN_URI [--angles 0.003 0.01 0.03 0.1 0.3] [--walks 32]

The first walks of a finished run are walked again, each beside one whose direction is turned by an angle at random. The
table holds the mean squared difference of the two residuals theta - theta* - r d at the chosen radius, over the mean
square of one. A map that cannot tell directions apart within that angle errs by half of it at least: the two residuals
scatter around their mean by so much. Held-out walks of a deformation are judged on the same scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import numpy as np
import torch

from pipeline.build import Problem, load_problem
from pipeline.plan import Shard, WalkPlan, stream
from pipeline.run import Run, load_run
from pipeline.shard import build_kernel, resume, walk_block
from pipeline.store import BlockKey, SampleStore


def turned(run: Run, directions: np.ndarray, angle: float) -> np.ndarray:
    """Directions of the same length, (w, D), each turned by an angle towards a random one at a right angle to it."""
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    along = directions / length
    other = stream(run.config.seed, "bench-turn").standard_normal(along.shape)
    other -= (other * along).sum(1, keepdims=True) * along
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return length * (math.cos(angle) * along + math.sin(angle) * other)


def pairs(run: Run, plan: WalkPlan, problem: Problem, shard: Shard, angle: float, radius: float) -> float:
    """Mean squared difference of residuals of paired walks, over the mean square of one."""
    kernel = build_kernel(run, plan, problem, shard)
    step = kernel.drift.double().cpu().numpy()
    step = np.concatenate([step, turned(run, step, angle)])
    kernel = dataclasses.replace(kernel, drift=torch.as_tensor(step).to(kernel.drift))
    both = dataclasses.replace(shard, walks=2 * shard.walks)
    state = resume(kernel, plan, SampleStore.open(run.storage), both, 0)
    gap, theta = np.full(both.walks, np.inf), np.empty((both.walks, plan.dim))
    for number in range(plan.blocks_per_shard):
        block, _ = walk_block(run, plan, problem, kernel, state, BlockKey(shard.index, number), both)
        records = zip(block.radius.reshape(-1, both.walks), block.theta.reshape(-1, *theta.shape), strict=True)
        for reached, position in records:  # a walk that its guard holds back comes there later
            nearer = np.abs(reached - radius) < gap
            gap[nearer], theta[nearer] = np.abs(reached - radius)[nearer], position[nearer]
    free = step * (plan.steps * radius / plan.length)
    residual = theta - problem.theta_star.double().cpu().numpy() - free
    first, second = np.split(residual, 2)
    return float(np.square(first - second).sum(1).mean() / np.square(first).sum(1).mean())


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_uri")
    parser.add_argument("--angles", nargs="+", type=float, default=[0.003, 0.01, 0.03, 0.1, 0.3], help="radians")
    parser.add_argument("--walks", type=int, default=32)
    options = parser.parse_args()
    run = load_run(options.run_uri)
    plan, radius = SampleStore.open(run.storage).plan, float(run.storage.read_json("radius.json")["radius"])
    problem, shard = load_problem(run, 0, plan), plan.shards()[0]
    shard = dataclasses.replace(shard, walks=min(options.walks, shard.walks))
    print(f"{run.config.name}: D = {plan.dim}, {plan.correction}, radius {radius:.4g}, {shard.walks} pairs\n")
    print("| angle | squared difference of residuals | least error of a map that cannot tell them apart |")
    print("|---|---|---|")
    for angle in options.angles:
        apart = pairs(run, plan, problem, shard, angle, radius)
        print(f"| {angle:g} ({math.degrees(angle):.2f} degrees) | {apart:.3f} | {apart / 2:.3f} |")


if __name__ == "__main__":
    main()

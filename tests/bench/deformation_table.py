"""Deformation kinds on the walks of a finished run: quality beside walk and control, draws a second beside their floor.

    python -m tests.bench.deformation_table RUN_URI [--kinds residual,metric,gaussian] [--radius R] [--draws 128]

Fits in one process on a copy of the run; prints a Markdown table. NLL of the model average on the test rows; the
standard error is that of the paired difference to the gaussian control.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import Deformation, deal
from pipeline.bayes.predictive import AveragedLikelihood, draw_nll
from pipeline.bayes.trees import to_tensors
from pipeline.build import Problem
from pipeline.fitting.fit import facts_path, train_in_process
from pipeline.fitting.job import FitJob, Told
from pipeline.fitting.loading import load_learned
from pipeline.posterior import Posterior
from pipeline.progress import LogProgress
from pipeline.run import Run, load_run
from pipeline.stages.deform import deform
from pipeline.storage import Storage
from pipeline.store import SampleStore


def test_nll(run: Run, posterior: Posterior, theta: Tensor, start: np.ndarray) -> np.ndarray:
    """NLL of the average on each test row."""
    rows = run.dataset.test
    average = AveragedLikelihood(len(rows.y))
    for number in np.unique(start).tolist():
        problem = posterior.problem(number)
        x, y = to_tensors(rows.x, problem.network.dtype), torch.as_tensor(np.array(rows.y))
        average.add(draw_nll(problem.network, problem.likelihood, theta[torch.from_numpy(start == number)], x, y))
    return average.rows()


def walk_points(run: Run, radius: float, shares: Sequence[float], draws: int) -> tuple[Tensor, np.ndarray]:
    """Points of the walks and their starts: `draws` of them, or all where there are fewer walks."""
    counts, store, parts = np.bincount(deal(shares, draws), minlength=len(shares)), SampleStore.open(run.storage), []
    for start, count in enumerate(counts.tolist()):
        points = store.points(radius, start=start, limit=count)
        parts.append(torch.cat([torch.from_numpy(p.theta) for p in points]))
    return torch.cat(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def per_second(function, draws: int, seconds: float = 2.0) -> float:
    function()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        function()
        done += draws
    return done / (time.perf_counter() - began)


def floor(model: Deformation, problem: Problem, draws: int) -> float:
    """Draws a second of what a draw cannot do without: D normal numbers, one D x k product, one forward pass over the
    training rows."""
    chain, network, x = getattr(model, "chain", None), problem.network, problem.potential.x
    rng = np.random.default_rng(0)

    def work() -> None:
        normal = torch.from_numpy(rng.standard_normal((draws, model.dim), dtype=np.float32))
        if chain is not None:
            normal = normal.to(chain.basis.dtype)
            normal @ chain.basis.T
            network.outputs_many(normal.to(network.dtype) * 0.01 + problem.theta_star, x, 64)

    with torch.no_grad():
        return per_second(work, draws)


def line(name: str, nll: np.ndarray, control: np.ndarray, rise: float, extra: str = "| | | | ") -> str:
    gap = nll - control
    error = gap.std(ddof=1) / np.sqrt(len(gap)) if gap.any() else 0.0
    return f"| {name} | {nll.mean():.4f} | {gap.mean():+.4f} ({error:.4f}) | {rise:.4g} {extra}|"


def fitted(run: Run, kind: str) -> tuple[Run, float]:
    """The run with a deformation of this kind, and the seconds that its fits took."""
    settings = run.config.deformation.model_copy(update={"kind": kind, "gaussian_share": 0.0})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"deformation": settings}))
    shutil.rmtree(Path(run.uri, "deformation"), ignore_errors=True)
    seconds: list[float] = []

    def trainer(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        began = time.perf_counter()
        train_in_process(run, jobs, told)
        seconds.append(time.perf_counter() - began)

    deform(run, trainer, LogProgress())
    return run, sum(seconds)


def print_lines(original: Run, kinds: list[str], draws: int) -> None:
    """A line for each kind; the first is the control, and is followed by the walk itself."""
    control = None
    for kind in kinds:
        run, seconds = fitted(original, kind)
        posterior, facts = Posterior(run), run.storage.read_json("deformation/deformation.json")
        batches = list(posterior.draw_batches(draws, seed=1))
        theta, start = torch.cat([b.theta for b in batches]), np.concatenate([b.start for b in batches])
        nll = test_nll(run, posterior, theta, start)
        if control is None:
            control = nll
            walks = test_nll(run, posterior, *walk_points(run, posterior.radius, posterior.shares, draws))
            print(line("walk", walks, control, facts["walk_potential_rise"]))
        model, rng = load_learned(run, 0), np.random.default_rng(0)
        speed = per_second(lambda m=model, r=rng: m.draw(r, 256), 256)
        linear = run.storage.read_json(facts_path(0)).get("heldout_error_linear")
        errors = " | ".join("" if e is None else f"{e:.3f}" for e in (facts["heldout_error"], linear))
        extra = f"| {errors} | {seconds:.1f} | {speed:.0f} ({floor(model, posterior.problem(0), 256):.0f}) "
        print(line(kind, nll, control, facts["potential_rise"], extra), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--kinds", default="gaussian,residual")
    parser.add_argument("--radius", type=float)
    parser.add_argument("--draws", type=int, default=128)
    options = parser.parse_args()
    original = load_run(options.run)
    columns = ("method", "test NLL", "minus gaussian (se)", "mean rise of U", "held-out error", "linear", "fit s")
    print(f"| {' | '.join(columns)} | draws/s (floor) |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, Path(original.uri).name)
        shutil.copytree(original.uri, target, ignore=shutil.ignore_patterns("deformation"))
        run = dataclasses.replace(original, storage=Storage.open(str(target)))
        if options.radius:
            run.storage.replace_json("radius.json", run.storage.read_json("radius.json") | {"radius": options.radius})
        print_lines(run, list(dict.fromkeys(["gaussian", *options.kinds.split(",")])), options.draws)


if __name__ == "__main__":
    main()

"""What a deformation sees of network and data: gradients on samples of training rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.chain import Look
from pipeline.bayes.deformation.landing import Slope
from pipeline.build import Problem
from pipeline.fitting.landing import MOST_STEPS
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run

LOOK_ROWS = 512
"""Training rows of one look, at most."""
LOOK_WORK = 2e11
"""Rows times parameters times gradients of a whole fit, at most; the rows of a look fall to fit it."""
FEWEST_ROWS = 8


def sample_rows(run: Run, problem: Problem, plan: WalkPlan, marks: int) -> list[Tensor]:
    """Training rows of looks: one sample for the learned steps, and others for the steps of a landing.

    They are as large as the work of the fit allows. Draws that go down on few rows fit these, and not the others: hence
    another sample at each step.
    """
    rows = problem.potential.rows
    gradients = max(1, plan.walks // plan.starts) * marks**2
    most = min(LOOK_ROWS, max(FEWEST_ROWS, int(LOOK_WORK / (gradients * plan.dim))))
    order, size = stream(run.config.seed, "deform-look").permutation(rows), min(rows, most)
    windows = (np.arange(j * size, (j + 1) * size) % rows for j in range(1 + MOST_STEPS))
    return [torch.from_numpy(np.sort(order[window])) for window in windows]


def looks_of(problem: Problem, samples: list[Tensor]) -> tuple[Look, Slope]:
    """Gradients of the NLL on samples of training rows, scaled up to all of them; see `sample_rows`."""
    potential, star = problem.potential, problem.theta_star.detach()[None]
    scale = potential.rows / len(samples[0])
    rows = [None if scale == 1 else sample.to(star.device) for sample in samples]
    origin, level = potential.nll_gradient(star, rows[0])
    levels = {0: level}

    def seen(theta: Tensor, sample: int) -> tuple[Tensor, Tensor]:
        sample = 0 if scale == 1 else sample
        if sample not in levels:
            levels[sample] = potential.nll_gradient(star, rows[sample])[1]
        gradient, nll = potential.nll_gradient(theta.to(star), rows[sample])
        return gradient, ((nll - levels[sample]) * scale).to("cpu", theta.dtype)

    def finite(gradient: Tensor, like: Tensor) -> Tensor:
        return (gradient * scale).nan_to_num(0.0, 0.0, 0.0).to("cpu", like.dtype)

    def look(theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient, rise = seen(theta, 0)
        return finite(gradient - origin, theta), rise

    def slope(theta: Tensor, number: int) -> tuple[Tensor, Tensor]:
        gradient, rise = seen(theta, 1 + number)
        return finite(gradient, theta), rise

    return look, slope

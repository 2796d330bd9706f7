"""Noise and prior precision where the configuration leaves them open: by marginal likelihood, or by validation rows.

Regression takes the Laplace marginal likelihood (MacKay 1992): a small validation split inside the training range says
little about the noise, and a network with more parameters than rows interpolates, so that residuals say nothing.
Classification takes the validation NLL of the MAP, since its Laplace evidence favours priors that are too weak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.bayes.curvature import occam
from pipeline.bayes.minimise import Minimum
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import to_tensors
from pipeline.build import build_potential, targets
from pipeline.plan import stream
from pipeline.run import Run

NOISES = tuple(float(x) for x in np.geomspace(1.0, 0.02, 12))
"""Noise standard deviations that are tried, in units of the standardised target, each from the minimum of the last."""
PRECISIONS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Prior precisions that are tried where validation rows decide."""
ROUNDS = 3
"""Updates of the prior precision at each noise."""
FALLEN = 5.0
"""The search ends where the log evidence is this many nats below its best."""

Descend = Callable[..., Minimum]


@dataclass(frozen=True)
class Scale:
    """A point, and the noise and prior that it was found with."""

    theta: Tensor
    noise_std: float | None
    precision: Any
    how: str


def choose_scale(
    run: Run, network: Network, point: Scale, free_noise: bool, free_prior: bool, descend: Descend
) -> Scale:
    """Choose what is open; the point moves along as noise or prior change.

    Args:
        run: The run.
        network: Its network.
        point: Where to begin, with the values of what is not open.
        free_noise: The noise of a Gaussian likelihood is open.
        free_prior: The prior precision is open: one number.
        descend: Minimises a potential from a point.
    """
    if free_prior and run.config.data.task == "classification" and len(run.dataset.validation.y):
        return _by_validation(run, network, point, descend)
    if not (free_noise or free_prior):
        return dataclasses.replace(point, how="as configured")
    best, highest = point, -math.inf
    for noise in NOISES if free_noise else (point.noise_std,):
        point = dataclasses.replace(point, noise_std=noise)
        for _ in range(ROUNDS if free_prior else 1):
            potential = build_potential(run, network, noise, point.precision)
            minimum = descend(run, potential, point.theta, last=False)
            rng = stream(run.config.seed, "evidence")
            gamma, volume = occam(potential, minimum.theta, rng)
            point = dataclasses.replace(point, theta=minimum.theta)
            evidence = -minimum.potential - 0.5 * volume
            if evidence > highest:
                best, highest = point, evidence
            if free_prior:
                point = dataclasses.replace(point, precision=_precision(gamma, minimum.theta))
        if evidence < highest - FALLEN:
            break
    what = " and ".join(n for n, free in (("noise", free_noise), ("prior precision", free_prior)) if free)
    return dataclasses.replace(best, how=f"{what} by Laplace marginal likelihood")


def noise_of(run: Run, network: Network, theta: Tensor) -> float:
    """The configured noise, or the root mean square of the training residuals of weights that are given."""
    if run.config.likelihood.noise_std is not None:
        return run.config.likelihood.noise_std
    unit: Potential = build_potential(run, network, 1.0, 1.0)
    squares = 2 * float(unit.nll(theta[None])[0]) - unit.rows * math.log(2 * math.pi)
    return math.sqrt(max(squares / unit.rows, NOISES[-1] ** 2))


def _precision(gamma: float, theta: Tensor) -> float:
    """MacKay's fixed point alpha = gamma / |theta|^2, within [1e-3, 1e3]."""
    return min(max(gamma / float(theta.square().sum()), 1e-3), 1e3)


def _by_validation(run: Run, network: Network, point: Scale, descend: Descend) -> Scale:
    """The precision whose MAP, refitted from the last one, has the lowest validation NLL."""
    x = to_tensors(run.dataset.validation.x, network.dtype, network.device)
    y = targets(run.dataset.validation, network)
    found: list[tuple[float, Scale]] = []
    for precision in reversed(PRECISIONS):
        potential = build_potential(run, network, point.noise_std, precision)
        theta = descend(run, potential, point.theta, last=False).theta
        point = dataclasses.replace(point, theta=theta, precision=precision, how="prior precision by validation NLL")
        found.append((float(potential.likelihood.nll(network.outputs(theta, x), y).mean()), point))
    return min(found, key=lambda pair: pair[0])[1]

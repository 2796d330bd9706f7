"""Noise and prior precision where the configuration leaves them open: by marginal likelihood, or by validation rows.

The noise of a regression whose prior is given, and the floor of one that the network gives, take validation rows, where
there are enough: training residuals of a network that interpolates say nothing, and the marginal likelihood under a
prior that does not fit the network prefers a noise that is far too large or far too small. Where the prior is open too,
or validation rows are few, it is the Laplace marginal likelihood (MacKay 1992), which then judges both together. The
prior of a classification takes the validation NLL, since its Laplace evidence favours priors that are too weak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.bayes.baselines.laplace import Laplace
from pipeline.bayes.curvature import occam
from pipeline.bayes.minimise import Minimum
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import to_tensors
from pipeline.build import build_potential, targets
from pipeline.config import likelihood_kind
from pipeline.plan import stream
from pipeline.run import Run

NOISES = tuple(float(x) for x in np.geomspace(1.0, 0.005, 16))
"""Noise standard deviations that are tried, in units of the target's, each from the minimum of the last."""
FEW = 20
"""Validation rows below which they do not choose the noise."""
FLOOR = 0.01
"""Smallest noise of a heteroscedastic likelihood where nothing chooses it, in units of the target's."""
LINEARISED_DIM = 1500
"""Parameters above which the predictive of the MAP stands for that of the posterior: the matrices cost too much."""
EQUAL = 0.01
"""Scores that differ by less, in nats a row, are taken as equal."""
WORSE = 0.2
"""The search by validation ends where the NLL is this much above its best, in nats a row."""
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


def choose_scale(run: Run, network: Network, point: Scale, free_prior: bool, descend: Descend) -> Scale:
    """Choose what is open; the point moves along as noise or prior change.

    Args:
        run: The run.
        network: Its network.
        point: Where to begin, with the values of what is not open.
        free_prior: The prior precision is open: one number.
        descend: Minimises a potential from a point.
    """
    if free_prior and run.config.data.task == "classification" and len(run.dataset.validation.y):
        return _by_validation(run, network, point, descend)
    free_noise = _is_searched(run)
    if not (free_noise or free_prior):
        return dataclasses.replace(point, how="as configured")
    if free_noise and (not free_prior or _floor(run)) and len(run.dataset.validation.y) >= FEW:
        point = _noise_by_validation(run, network, point, descend)
        if not free_prior:
            return point
        free_noise = False
    best, highest = point, -math.inf
    unit = target_std(run)
    for noise in [unit * share for share in NOISES] if free_noise else [point.noise_std]:
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


def first_noise(run: Run) -> float | None:
    """The noise where a search begins: all of the target's spread.

    A floor of what the network gives is a hundredth of that where nothing is searched.
    """
    if run.config.data.task != "regression":
        return None
    return target_std(run) * (1.0 if not _floor(run) or _is_searched(run) else FLOOR)


def _floor(run: Run) -> bool:
    """Whether the network gives the noise, so that only its floor is left to choose."""
    return likelihood_kind(run.config) == "heteroscedastic"


def _is_searched(run: Run) -> bool:
    """Whether the noise, or its floor, is chosen together with the MAP estimate.

    The marginal likelihood prefers a network that claims any precision at targets that it meets, so that only
    validation rows choose a floor; and weights that must not move were trained with one.
    """
    config = run.config
    if config.data.task != "regression" or config.likelihood.noise_std is not None:
        return False
    moves = config.model.weights is None or config.map.polish
    return not _floor(run) or (moves and len(run.dataset.validation.y) >= FEW)


def noise_is_open(run: Run) -> bool:
    """Whether validation rows may choose the noise: that of a regression, where it is not given and they suffice."""
    given = run.config.likelihood.noise_std is not None and not _floor(run)
    return run.config.data.task == "regression" and not given and len(run.dataset.validation.y) >= FEW


def noise_of(run: Run, network: Network, theta: Tensor) -> float | None:
    """The configured noise of weights that are given, else the root mean square of their training residuals.

    Of a network that gives its noise it is the smallest one; None for classes.
    """
    if run.config.likelihood.noise_std is not None or likelihood_kind(run.config) != "gaussian":
        return run.config.likelihood.noise_std or first_noise(run)
    unit: Potential = build_potential(run, network, 1.0, 1.0)
    squares = 2 * float(unit.nll(theta[None])[0]) - unit.rows * math.log(2 * math.pi)
    return math.sqrt(max(squares / unit.rows, (NOISES[-1] * target_std(run)) ** 2))


def target_std(run: Run) -> float:
    """Standard deviation of the training targets as the network sees them: one, unless they are not standardised."""
    return float(np.std(np.asarray(run.dataset.train.y, dtype=np.float64))) or 1.0


def _noise_by_validation(run: Run, network: Network, point: Scale, descend: Descend) -> Scale:
    """The largest noise on the grid whose validation NLL is as good as the best."""
    found: list[tuple[float, Scale]] = []
    unit, lowest = target_std(run), math.inf
    how = "smallest noise by validation NLL" if _floor(run) else "noise by validation NLL"
    for share in NOISES:
        noise = unit * share
        potential = build_potential(run, network, noise, point.precision)
        theta = descend(run, potential, point.theta, last=False).theta
        point = dataclasses.replace(point, theta=theta, noise_std=noise, how=how)
        score = _predictive_nll(run, network, potential, theta)
        found.append((score, point))
        lowest = min(lowest, score)
        if not score < lowest + WORSE:
            break
    return next(point for score, point in found if score <= lowest + EQUAL)


def _predictive_nll(run: Run, network: Network, potential: Potential, theta: Tensor) -> float:
    """NLL of the validation rows, in nats a row: mean of the MAP's and of the linearised Laplace predictive's.

    The MAP takes its own error for noise, and the linearised posterior of a network that interpolates is too wide, so
    that it leaves too little noise; walks lie between. Larger networks take the MAP's alone.
    """
    point = _validation_nll(run, network, potential, theta)
    if theta.numel() > LINEARISED_DIM:
        return point
    x = to_tensors(run.dataset.validation.x, network.dtype, network.device)
    said = potential.likelihood.predict(network.outputs(theta, x))
    assert said.mean is not None and said.variance is not None
    variance = Laplace.fit(potential, theta).variance(x)[:, 0] + said.variance.double().cpu()
    error = (said.mean - targets(run.dataset.validation, network)).double().cpu()
    wide = float((error.square() / variance + (2 * math.pi * variance).log()).mean()) / 2
    return (point + wide) / 2 if math.isfinite(wide) else math.inf


def _validation_nll(run: Run, network: Network, potential: Potential, theta: Tensor) -> float:
    """Mean NLL of the validation rows, in nats a row."""
    x = to_tensors(run.dataset.validation.x, network.dtype, network.device)
    score = float(potential.likelihood.nll(network.outputs(theta, x), targets(run.dataset.validation, network)).mean())
    return score if math.isfinite(score) else math.inf


def _precision(gamma: float, theta: Tensor) -> float:
    """MacKay's fixed point alpha = gamma / |theta|^2, within [1e-3, 1e3]."""
    return min(max(gamma / float(theta.square().sum()), 1e-3), 1e3)


def _by_validation(run: Run, network: Network, point: Scale, descend: Descend) -> Scale:
    """The precision whose MAP, refitted from the last one, has the lowest validation NLL."""
    found: list[tuple[float, Scale]] = []
    for precision in reversed(PRECISIONS):
        potential = build_potential(run, network, point.noise_std, precision)
        theta = descend(run, potential, point.theta, last=False).theta
        point = dataclasses.replace(point, theta=theta, precision=precision, how="prior precision by validation NLL")
        found.append((_validation_nll(run, network, potential, theta), point))
    return min(found, key=lambda pair: pair[0])[1]

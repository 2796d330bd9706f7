"""Targets whose walk is known exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.bayes.likelihood import Categorical, Gaussian
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential, prior_precision
from pipeline.bayes.walk import Correction, WalkKernel, WalkState, advance, init, plain_correction


def linear_regression(rows: int, features: int, *, alpha: float = 1.0, sigma: float = 0.5, seed: int = 0) -> Potential:
    """A linear network with Gaussian noise: U is exactly quadratic with H = X'X / sigma^2 + alpha."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features)) * np.logspace(0, -1.5, features)
    y = x @ rng.standard_normal(features) + sigma * rng.standard_normal(rows)
    network = Network(nn.Linear(features, 1, bias=False), dtype=torch.float64)
    precision = prior_precision(network.layout, alpha, torch.float64)
    return Potential(network, Gaussian(sigma), precision, torch.as_tensor(x), torch.as_tensor(y))


def hessian(potential: Potential, theta: Tensor) -> Tensor:
    """The whole Hessian of U, (D, D)."""
    return potential.hvp(theta, torch.eye(len(theta), dtype=theta.dtype))


def quadratic_minimum(potential: Potential) -> Tensor:
    """theta* of an exactly quadratic U: one Newton step from zero."""
    zero = torch.zeros(potential.network.dim, dtype=torch.float64)
    return -torch.linalg.solve(hessian(potential, zero), potential.gradient(zero[None])[0][0])


def softmax_classifier(rows: int = 60, seed: int = 0, alpha: float = 1.0) -> Potential:
    """A small tanh classifier on random data."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 2))
    y = torch.as_tensor((x[:, 0] * x[:, 1] + 0.3 * rng.standard_normal(rows) > 0).astype(np.int64))
    module = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))
    for p in module.parameters():
        p.data = torch.as_tensor(0.5 * rng.standard_normal(tuple(p.shape)), dtype=torch.float32)
    network = Network(module, dtype=torch.float64)
    precision = prior_precision(network.layout, alpha, torch.float64)
    return Potential(network, Categorical(2), precision, torch.as_tensor(x), y)


def directions(walks: int, dim: int, seed: int = 1) -> np.ndarray:
    """Unit vectors, (walks, dim)."""
    d = np.random.default_rng(seed).standard_normal((walks, dim))
    return d / np.linalg.norm(d, axis=1, keepdims=True)


def walk(
    potential: Potential,
    theta_star: Tensor,
    drift: np.ndarray,
    steps: int,
    *,
    step_size: float = 0.0,
    correction: Correction | None = None,
    momentum: float = 0.0,
    tilt: Tensor | None = None,
    limit: float | None = None,
) -> WalkState:
    """Walk all of `drift` (W, D), the displacement of a whole walk without corrections, in `steps` steps."""
    kernel = WalkKernel(
        theta_star=theta_star,
        nll_star=float(potential.nll(theta_star[None])[0]),
        drift=torch.as_tensor(drift / steps).to(theta_star),
        steps=steps,
        gradient=lambda position, _: potential.gradient(position),
        correction=correction or plain_correction(step_size),
        momentum=momentum,
        limit=limit,
        tilt=tilt,
    )
    state = init(kernel)
    for _ in range(steps):
        advance(kernel, state)
    return state

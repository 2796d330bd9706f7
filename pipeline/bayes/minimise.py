"""The MAP estimate: minimise U, and certify how far from its minimum the result may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor
from torch.optim.adam import adam

from pipeline.bayes.target import Potential

QUASI_NEWTON_DIM = 2_000_000
"""Above this many parameters, the memory of L-BFGS is not affordable and only first-order steps are taken."""


@dataclass(frozen=True)
class Minimum:
    """Where the search ended."""

    theta: Tensor
    """(D,)."""
    potential: float
    """U there, nats."""
    nll: float
    """Summed NLL there, nats."""
    grad_norm: float
    """Norm of the gradient of U, nats per unit."""
    decrement: float
    """Estimate of how much lower U could still become, g' G^-1 g / 2 with the Gauss-Newton matrix G, in nats."""
    last_fall: float = math.inf
    """What the last round of descent gained, in nats; infinite if there was only one."""


def first_order(
    potential: Potential, theta: Tensor, steps: int, learning_rate: float, batch: int, rng: np.random.Generator
) -> Tensor:
    """Adam with a cosine schedule on U, full batch or minibatches; returns the last point, (D,).

    Args:
        potential: The target.
        theta: Start, (D,).
        steps: Number of steps.
        learning_rate: First step size of the schedule.
        batch: Rows of a step; 0 means all.
        rng: Order of the minibatches.
    """
    theta = theta.clone()
    mean, square, count = torch.zeros_like(theta), torch.zeros_like(theta), torch.tensor(0.0)
    order, cursor = np.empty(0, dtype=np.int64), 0
    for step in range(steps):
        rows, scale = None, 1.0
        if 0 < batch < potential.rows:
            if cursor + batch > len(order):
                order, cursor = rng.permutation(potential.rows), 0
            rows, scale = torch.as_tensor(order[cursor : cursor + batch], device=theta.device), potential.rows / batch
            cursor += batch
        gradient, _ = potential.nll_gradient(theta[None], rows)
        gradient = gradient[0].to(theta.dtype) * scale + potential.precision * theta
        # The function: the class imports torch's compiler, which takes every process that estimates two seconds.
        adam(
            [theta], [gradient], [mean], [square], [], [count],
            amsgrad=False, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, maximize=False,
            lr=learning_rate * (1 + math.cos(math.pi * step / steps)) / 2,
        )  # fmt: skip
    return theta


CHECK_EVERY = 100
"""Iterations of L-BFGS between looks at what they gained."""


def quasi_newton(
    potential: Potential, theta: Tensor, tolerance: float, iterations: int, *, newton: bool = True, enough: float = 0.0
) -> Tensor:
    """L-BFGS, then trust-region Newton-Krylov steps if the gradient is not yet below the tolerance (scipy).

    Args:
        potential: The target.
        theta: Start, (D,).
        tolerance: Gradient norm at which the search ends.
        iterations: Of L-BFGS at most.
        newton: Whether Newton-Krylov steps may follow.
        enough: L-BFGS ends when `CHECK_EVERY` iterations lower U by less, in nats.
    """
    falls = _Falls(enough)

    def fun(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.as_tensor(flat, dtype=theta.dtype, device=theta.device)
        gradient, nll = potential.gradient(point[None])
        value = float(nll[0]) + float(potential.prior(point[None])[0])
        return value, gradient[0].double().cpu().numpy()

    def hessp(flat: np.ndarray, vector: np.ndarray) -> np.ndarray:
        point = torch.as_tensor(flat, dtype=theta.dtype, device=theta.device)
        direction = torch.as_tensor(vector, dtype=theta.dtype, device=theta.device)
        return potential.hvp(point, direction[None])[0].double().cpu().numpy()

    flat_tolerance = tolerance / theta.numel() ** 0.5
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 30, "gtol": flat_tolerance, "ftol": 0}
    start = theta.double().cpu().numpy()
    best = optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options=options, callback=falls)
    if newton and np.linalg.norm(best.jac) > tolerance and _newton_affordable(potential, theta.numel()):
        steps = {"maxiter": 60, "gtol": tolerance}
        polished = optimize.minimize(fun, best.x, jac=True, hessp=hessp, method="trust-krylov", options=steps)
        best = polished if polished.fun <= best.fun else best
    return torch.as_tensor(best.x, dtype=theta.dtype, device=theta.device)


class _Falls:
    """Ends a search whose last `CHECK_EVERY` iterations gained less than is worth their cost."""

    def __init__(self, enough: float):
        self.enough, self.count, self.last = enough, 0, math.inf

    def __call__(self, intermediate_result: optimize.OptimizeResult) -> None:
        self.count += 1
        if self.count % CHECK_EVERY == 0:
            value = float(intermediate_result.fun)
            if self.last - value < self.enough:
                raise StopIteration
            self.last = value


def certify(potential: Potential, theta: Tensor) -> Minimum:
    """Measure the gradient at theta and estimate by conjugate gradients how much lower U could become."""
    gradient, nll = potential.gradient(theta[None])
    prior = float(potential.prior(theta[None])[0])
    steps = 50 if theta.numel() <= QUASI_NEWTON_DIM else 5
    decrement = newton_decrement(lambda v: potential.gauss_newton(theta, v[None])[0], gradient[0], steps)
    value = float(nll[0])
    return Minimum(theta, value + prior, value, float(gradient[0].norm()), decrement)


def allowed_fall(tolerance: float, gamma: float) -> float:
    """Nats by which U may still fall at a minimum: by default a hundredth of gamma; posterior draws rise gamma / 2."""
    return tolerance * max(1.0, 10 * gamma)


def newton_decrement(product: Callable[[Tensor], Tensor], gradient: Tensor, steps: int) -> float:
    """g' G^-1 g / 2 by conjugate gradients; grows towards its value, so few steps give a lower bound. In nats."""
    solution, residual = torch.zeros_like(gradient), gradient.clone()
    direction, square = residual.clone(), float(residual @ residual)
    first = square
    for _ in range(steps):
        if square <= 1e-12 * first or square == 0:
            break
        image = product(direction)
        length = square / float(direction @ image)
        solution += length * direction
        residual -= length * image
        square, before = float(residual @ residual), square
        direction = residual + (square / before) * direction
    return 0.5 * float(gradient @ solution)


def _newton_affordable(potential: Potential, dim: int) -> bool:
    return dim * potential.rows <= 2e7

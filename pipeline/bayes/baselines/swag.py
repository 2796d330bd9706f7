"""SWAG: a Gaussian fitted to the path of stochastic gradient descent around the MAP estimate (Maddox et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.target import Potential

RATES = (0.03, 0.1, 0.3, 1.0)
"""Learning rates that validation chooses from, in units of rows / lambda_max."""
EPOCHS = 40
RANK = 20


@dataclass(frozen=True)
class Swag:
    """Mean, diagonal variance and the last deviations of the epochs' ends."""

    mean: Tensor
    variance: Tensor
    deviations: Tensor
    """(rank, D)."""

    def draw(self, rng: np.random.Generator, n: int) -> Tensor:
        """Draws, (n, D): half the covariance from the diagonal, half from the deviations."""
        first = torch.as_tensor(rng.standard_normal((n, len(self.mean)))).to(self.mean)
        second = torch.as_tensor(rng.standard_normal((n, len(self.deviations)))).to(self.mean)
        low_rank = second @ self.deviations / np.sqrt(2 * (len(self.deviations) - 1))
        return self.mean + first * (0.5 * self.variance).sqrt() + low_rank


def fit_swag(
    potential: Potential, theta: Tensor, rates: Sequence[float], batch: int, rng: np.random.Generator
) -> list[Swag]:
    """Follow minibatch gradient descent of U / rows from theta, all rates at once on the same batches.

    Args:
        potential: U over the training rows.
        theta: Where it begins, (D,).
        rates: Learning rates of U / rows.
        batch: Rows of one gradient.
        rng: Order of the rows.

    Returns:
        One fit a rate, from the ends of all epochs; the last `RANK` of them give the low-rank part.
    """
    rows = potential.rows
    position = theta.repeat(len(rates), 1)
    step = torch.as_tensor(list(rates)).to(theta)[:, None]
    mean, square, ends = torch.zeros_like(position), torch.zeros_like(position), []
    for epoch in range(EPOCHS):
        order = torch.as_tensor(rng.permutation(rows), device=theta.device)
        for first in range(0, rows, batch):
            index = order[first : first + batch]
            gradient, _ = potential.nll_gradient(position, index)
            position = position - step * (gradient / len(index) + potential.precision * position / rows)
        offset = position - theta
        mean, square = mean + offset / EPOCHS, square + offset.square() / EPOCHS
        if epoch >= EPOCHS - RANK:
            ends.append(offset - mean * EPOCHS / (epoch + 1))
    variance, deviations = (square - mean.square()).clamp_min(0.0), torch.stack(ends, dim=1)
    return [Swag(theta + m, v, d) for m, v, d in zip(mean, variance, deviations, strict=True)]

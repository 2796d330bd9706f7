"""SWAG: a Gaussian fitted to the path of stochastic gradient descent around the MAP estimate (Maddox et al. 2019)."""

from __future__ import annotations

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

    @classmethod
    def fit(cls, potential: Potential, theta: Tensor, rate: float, batch: int, rng: np.random.Generator) -> Swag:
        """Follow minibatch gradient descent of U / rows from theta (D,), collecting every epoch's end.

        Args:
            potential: U over the training rows.
            theta: Where it begins, (D,).
            rate: Learning rate of U / rows.
            batch: Rows of one gradient.
            rng: Order of the rows.
        """
        rows = potential.rows
        position, mean, square = theta[None].clone(), torch.zeros_like(theta), torch.zeros_like(theta)
        ends: list[Tensor] = []
        for epoch in range(EPOCHS):
            order = torch.as_tensor(rng.permutation(rows), device=theta.device)
            for first in range(0, rows, batch):
                index = order[first : first + batch]
                gradient, _ = potential.nll_gradient(position, index)
                slope = gradient / len(index) + potential.precision * position / rows
                position = position - rate * slope
            mean += (position[0] - theta) / EPOCHS
            square += (position[0] - theta).square() / EPOCHS
            if epoch >= EPOCHS - RANK:
                ends.append(position[0] - theta - mean * EPOCHS / (epoch + 1))
        return cls(theta + mean, (square - mean.square()).clamp_min(0.0), torch.stack(ends))

    def draw(self, rng: np.random.Generator, n: int) -> Tensor:
        """Draws, (n, D): half the covariance from the diagonal, half from the deviations."""
        first = torch.as_tensor(rng.standard_normal((n, len(self.mean)))).to(self.mean)
        second = torch.as_tensor(rng.standard_normal((n, len(self.deviations)))).to(self.mean)
        low_rank = second @ self.deviations / np.sqrt(2 * (len(self.deviations) - 1))
        return self.mean + first * (0.5 * self.variance).sqrt() + low_rank

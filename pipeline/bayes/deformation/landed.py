"""Draws of a Gaussian that land as learned ones do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.bayes.deformation.landing import Landing

PIECE = 1 << 23
"""Numbers of draws that land together: the steps hold a few copies of them."""


@dataclass(frozen=True)
class Landed:
    """A Gaussian of the walks' points, whose draws go down to where the data are fitted as well as walks fit them.

    The mean of points of a curved fiber lies off it, and so do their combinations.
    """

    gaussian: Gaussian
    landing: Landing

    @property
    def radius(self) -> float:
        """That of the points."""
        return self.gaussian.radius

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return self.gaussian.dim

    @property
    def walks(self) -> int:
        """Points behind the covariance."""
        return self.gaussian.walks

    @torch.no_grad()
    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D)."""
        theta, star = self.gaussian.draw(rng, n, radius), self.landing.theta_star
        for piece in theta.split(max(1, PIECE // self.dim)):
            offset = piece.to(star) - star
            piece.copy_(self.landing.land(offset, self.radius if radius is None else radius) + star)
        return theta

    def to_tensors(self) -> dict[str, Tensor]:
        """Those of the Gaussian; the landing belongs to what was learned."""
        return self.gaussian.to_tensors()

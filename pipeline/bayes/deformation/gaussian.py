r"""The control: a Gaussian with the mean and covariance of the walks' points at a radius, kept in sample space.

$\theta = \bar\theta + \frac{1}{\sqrt{n-1}} \sum_w z_w (\theta_w - \bar\theta)$, z standard normal: no matrix of D x
D. A learned deformation that does not beat it has learned nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Points = Callable[[float], Iterator[Tensor]]
"""Radius -> batches of the walks' points at it, (b, D), always in the same order."""


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian of one start; draws read the points in a stream."""

    radius: float
    dim: int
    walks: int
    """Points n behind the covariance."""
    points: Points

    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D)."""
        z = torch.from_numpy(rng.standard_normal((n, self.walks)))
        weights = (z - z.mean(dim=1, keepdim=True)) / (self.walks - 1) ** 0.5 + 1 / self.walks
        total, first, origin = torch.zeros(n, self.dim), 0, None
        for batch in self.points(self.radius if radius is None else radius):
            origin = batch[0].clone() if origin is None else origin
            share = weights[:, first : first + len(batch)].to(batch.dtype)
            total = total.to(batch.dtype).addmm_(share, batch - origin)
            first += len(batch)
        if origin is None or first != self.walks:
            raise ValueError(f"The Gaussian was made from {self.walks} walks, but {first} points were read.")
        return total + origin

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; the points stay in the sample store."""
        return {"gaussian": torch.tensor([self.radius, self.dim, self.walks], dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], points: Points) -> Gaussian:
        """Inverse of `to_tensors`."""
        radius, dim, walks = tensors["gaussian"].tolist()
        return cls(radius, int(dim), int(walks), points)

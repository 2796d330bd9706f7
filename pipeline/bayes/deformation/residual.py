r"""The default kind: free displacement plus a learned correction in a few directions.

$$\phi(d, r) = \theta^* + (1 + s(r)) \odot r d + U' h(x(d), r)$$

d is a random direction, s a share of each coordinate, U an orthonormal basis of the walks' residuals, x what
`chain` makes of the direction, and h linear in x plus a nonlinear remainder near the selected radius. D x k memory;
a draw is one normal vector, a few products with U and one forward pass over a fixed sample of training inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import FreeLaw
from pipeline.bayes.deformation.chain import Chain, Probe
from pipeline.bayes.deformation.remainder import Remainder
from pipeline.errors import InputError


@dataclass
class Residual:
    """A fitted deformation of one start; see the module."""

    radius: float
    free: FreeLaw
    chain: Chain
    remainder: Remainder | None = None

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return self.free.dim

    @torch.no_grad()
    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D). Raises InputError where no walk was recorded at such a radius."""
        radius = self.radius if radius is None else radius
        if not 0 < radius <= self.chain.nodes[-1] * (1 + 1e-6):
            raise InputError(
                f"radius must be above 0 and at most {self.chain.nodes[-1]:.4g}, where walks end; got {radius}."
            )
        return self.deform(self.free.directions(rng, n, self.chain.basis.dtype), radius)

    def deform(self, directions: Tensor, radius: float) -> Tensor:
        """Points on the fiber for directions (n, D), (n, D)."""
        inputs = self.chain.inputs(directions, radius)
        return self.chain.position(directions, self.coefficients(inputs, radius), radius)

    def coefficients(self, inputs: Tensor, radius: float) -> Tensor:
        """h: (n, p) -> (n, k)."""
        linear = self.chain.coefficients(inputs, radius)
        if self.remainder is None or inputs.shape[1] < len(self.remainder.center):
            return linear
        weight = self.remainder.weight(radius)
        return linear + weight * self.remainder(inputs) if weight > 1e-3 else linear

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        tensors = self.chain.to_tensors() | self.free.to_tensors()
        if self.remainder is not None:
            tensors |= self.remainder.to_tensors()
        return tensors | {"radius": torch.tensor(self.radius, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], probe: Probe) -> Residual:
        """Inverse of `to_tensors`."""
        return cls(
            radius=float(tensors["radius"]),
            free=FreeLaw.from_tensors(tensors),
            chain=Chain.from_tensors(tensors, probe),
            remainder=Remainder.from_tensors(tensors),
        )

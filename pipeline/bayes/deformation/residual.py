r"""The default kind: a random direction is carried along the fiber in a few learned steps.

$$\phi(d, r) = \theta^* + \mathrm{land}_r(p_r(d) + U' h(x(d), r))$$

p is what `chain` makes of the direction, a few looks at the gradient; U an orthonormal basis, x what the chain saw last
and the gradient at p itself, h a nonlinear remainder near the selected radius; and `landing` takes what lies higher
than the walks down to them. Memory is D x k; a draw is one normal vector, a few products with U and a fixed, small
number of passes over fixed samples of training rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import FreeLaw
from pipeline.bayes.deformation.chain import Chain, Look, State
from pipeline.bayes.deformation.landing import Landing, Slope
from pipeline.bayes.deformation.remainder import Remainder
from pipeline.errors import InputError


@dataclass
class Residual:
    """A fitted deformation of one start; see the module."""

    radius: float
    free: FreeLaw
    chain: Chain
    landing: Landing
    remainder: Remainder | None = None

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return self.free.dim

    @torch.no_grad()
    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D). Raises InputError where no walk was recorded at such a radius."""
        radius = self.radius if radius is None else radius
        if not 0 < radius <= self.chain.marks[-1] * (1 + 1e-6):
            raise InputError(
                f"radius must be above 0 and at most {self.chain.marks[-1]:.4g}, where walks end; got {radius}."
            )
        return self.deform(self.free.directions(rng, n, self.chain.basis.dtype), radius)

    def deform(self, directions: Tensor, radius: float) -> Tensor:
        """Points on the fiber for directions (n, D), (n, D)."""
        return self.landing.land(self.learned(directions, radius), radius) + self.chain.theta_star

    def learned(self, directions: Tensor, radius: float) -> Tensor:
        """Displacements from theta* before the landing, (n, D)."""
        direction = self.chain.vector(directions)
        states = self.chain.states(direction, radius)
        offset = self.chain.offset(states, radius)
        correction = self.correction(states[1], direction.inside, radius)
        return offset if correction is None else torch.addmm(offset, correction, self.chain.basis)

    def correction(self, state: State, inside: Tensor, radius: float) -> Tensor | None:
        """h: what the remainder adds in the basis, (n, k); None where it is silent."""
        if self.remainder is None or self.chain.above(radius) != self.chain.above(self.remainder.radius):
            return None
        weight = self.remainder.weight(radius)
        if weight <= 1e-3:
            return None
        return weight * self.remainder(self.chain.seen(state, inside))

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        tensors = self.chain.to_tensors() | self.free.to_tensors() | self.landing.to_tensors()
        if self.remainder is not None:
            tensors |= self.remainder.to_tensors()
        return tensors | {"radius": torch.tensor(self.radius, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], look: Look, slope: Slope) -> Residual:
        """Inverse of `to_tensors`; what looks at the network and the data comes with them."""
        return cls(
            radius=float(tensors["radius"]),
            free=FreeLaw.from_tensors(tensors),
            chain=Chain.from_tensors(tensors, look),
            landing=Landing.from_tensors(tensors, slope),
            remainder=Remainder.from_tensors(tensors),
        )

r"""Landing: the last steps of a draw, down to where the walks are.

The point that was learned lies near the fiber, but mostly above it: what has not been learned of a walk counts as
misfit. While U is higher than it is for walks at that radius, the draw goes down along the gradient g of U, by Polyak's
step, which meets the level $\ell(r)$, the mean rise of the walks, where U is taken as linear (Polyak 1969). It does not
undo the step before it (Camerini, Fratta and Maffioli 1975):

$$\theta_{i+1} = \theta_i - \frac{(U(\theta_i) - U^* - \ell(r))_+}{|d_i|^2} d_i, \qquad
d_i = g_i + \frac{(-g_i \cdot d_{i-1})_+}{|d_{i-1}|^2} d_{i-1}$$

There is no step size to tune, and what lies at the level or below it stays where it is. The
number of steps is fixed when the model is fitted: nothing is iterated until it converges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Look = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Points (n, D) and the number of a sample of training rows -> gradient of the summed NLL less that at theta*, (n, D),
and the rise of the NLL over that at theta*, (n,). Sample 0 is for learned steps, the others for landing."""
TURNED = 0.25
"""Smallest share of |g|^2 that |d|^2 may have: beyond it g itself is taken, since steps grow as 1 / |d|."""


@dataclass
class Landing:
    """Steps down to the level of the walks."""

    theta_star: Tensor
    """(D,)."""
    precision: Tensor
    """Prior precision, (D,)."""
    radii: list[float]
    """Rising."""
    levels: list[float]
    """Mean rise of U of the walks at each radius, in nats."""
    look: Look
    steps: int = 0

    def level(self, radius: float) -> float:
        """Straight between radii, and from 0 at theta*."""
        return float(np.interp(radius, [0.0, *self.radii], [0.0, *self.levels]))

    def land(self, offset: Tensor, radius: float) -> Tensor:
        """Displacements from theta* (n, D) after the last step."""
        last = None
        for number in range(self.steps):
            offset, last = self.step(offset, last, radius, number)
        return offset

    def step(self, offset: Tensor, last: Tensor | None, radius: float, number: int) -> tuple[Tensor, Tensor]:
        """One step: displacements, and the direction d that led there; `last` is that of the step before."""
        gradient, nll = self.look(offset + self.theta_star, 1 + number)
        slope = torch.addcmul(gradient, self.precision, offset)
        prior = (offset * (0.5 * offset + self.theta_star)).double() @ self.precision.double()
        excess = (nll.double() + prior - self.level(radius)).clamp_min(0)
        direction = slope if last is None else _not_back(slope, last)
        size = (excess / direction.double().square().sum(1)).nan_to_num(0.0, 0.0, 0.0).to(offset)
        return torch.addcmul(offset, direction, size[:, None], value=-1), direction

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; theta* is in that of the chain."""
        return {
            "landing.precision": self.precision,
            "landing.levels": torch.tensor([self.radii, self.levels], dtype=torch.float64),
            "landing.steps": torch.tensor(self.steps),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], look: Look) -> Landing:
        """Inverse of `to_tensors`."""
        radii, levels = tensors["landing.levels"].tolist()
        star, precision = tensors["chain.theta_star"], tensors["landing.precision"]
        return cls(star, precision, radii, levels, look, int(tensors["landing.steps"]))


def _not_back(slope: Tensor, last: Tensor) -> Tensor:
    """d: the gradient without what points against the last direction."""
    back = (-(slope * last).sum(1) / last.square().sum(1)).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
    direction = torch.addcmul(slope, last, back[:, None])
    turned = direction.square().sum(1) < TURNED * slope.square().sum(1)
    return torch.where(turned[:, None], slope, direction)

r"""Landing: the last steps of a draw, down to where the data are fitted as well as walks fit them.

The point that was learned lies near the fiber, but mostly above it: what has not been learned of a walk counts as
misfit. While the summed NLL n is higher than it is for walks at that radius, the draw goes down along its gradient g,
by Polyak's step, which meets the level $\ell(r)$, the mean rise of the walks, where n is taken as linear (Polyak
1969). It does not undo the step before it (Camerini, Fratta and Maffioli 1975):

$$\theta_{i+1} = \theta_i - \frac{(n(\theta_i) - n(\theta^*) - \ell(r))_+}{|d_i|^2} d_i, \qquad
d_i = g_i + \frac{(-g_i \cdot d_{i-1})_+}{|d_{i-1}|^2} d_{i-1}$$

There is no step size to tune, and what lies at the level or below it stays where it is. The number of steps is fixed
when the model is fitted: nothing is iterated until it converges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

Slope = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Points (n, D) and the number of a step -> gradient of the summed NLL (n, D), and its rise over theta* (n,), both
estimated on the training rows of that step."""
TURNED = 0.25
"""Smallest share of |g|^2 that |d|^2 may have: beyond it g itself is taken, since steps grow as 1 / |d|."""


@dataclass
class Landing:
    """Steps down to the level of the walks."""

    theta_star: Tensor
    """(D,)."""
    radii: list[float]
    """Rising."""
    levels: list[float]
    """Mean rise of the summed NLL of the walks at each radius, in nats."""
    slope: Slope
    steps: int = 0

    def level(self, radius: float) -> float:
        """Straight between radii, and from 0 at theta*."""
        return float(np.interp(radius, [0.0, *self.radii], [0.0, *self.levels]))

    def land(self, offset: Tensor, radius: float) -> Tensor:
        """Displacements from theta* (n, D) after the last step."""
        for landed in islice(self.way_down(offset, radius), self.steps):
            offset = landed
        return offset

    def way_down(self, offset: Tensor, radius: float) -> Iterator[Tensor]:
        """Displacements after each step, in the same memory; those at the level are not looked at again."""
        offset, level, last = offset.clone(), self.level(radius), None
        high = torch.arange(len(offset))
        for number in count():
            if len(high):
                gradient, rise = self.slope(offset[high] + self.theta_star, number)
                above = rise > level
                high, gradient, excess = high[above], gradient[above], rise[above] - level
                last = gradient if last is None else _not_back(gradient, last[above])
                size = (excess / last.square().sum(1)).nan_to_num(0.0, 0.0, 0.0).to(offset)
                offset[high] -= last * size[:, None]
            yield offset

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; theta* is in that of the chain."""
        levels = torch.tensor([self.radii, self.levels], dtype=torch.float64)
        return {"landing.levels": levels, "landing.steps": torch.tensor(self.steps)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], slope: Slope) -> Landing:
        """Inverse of `to_tensors`."""
        radii, levels = tensors["landing.levels"].tolist()
        return cls(tensors["chain.theta_star"], radii, levels, slope, int(tensors["landing.steps"]))


def _not_back(gradient: Tensor, last: Tensor) -> Tensor:
    """d: the gradient without what points against the last direction."""
    back = (-(gradient * last).sum(1) / last.square().sum(1)).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
    direction = torch.addcmul(gradient, last, back[:, None])
    turned = direction.square().sum(1) < TURNED * gradient.square().sum(1)
    return torch.where(turned[:, None], gradient, direction)

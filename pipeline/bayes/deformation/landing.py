r"""Landing: the last steps of a draw, down to where the walks are.

The point that was learned lies near the fiber, but mostly above it: what has not been learned of a walk counts as
misfit. While U is higher than it is for walks at that radius, the draw goes down along the gradient, by Polyak's step
with momentum,

$$s_i = \mu s_{i-1} - \frac{(U(\theta_i) - U^* - \ell(r))_+}{|\nabla U(\theta_i)|^2} \nabla U(\theta_i), \qquad
\theta_{i+1} = \theta_i + s_i$$

at which the linearised U meets the level $\ell(r)$, the mean rise of the walks (Polyak 1969; with momentum: Barré,
Taylor and d'Aspremont 2020). It has no step size to tune, and it leaves alone what lies at the level or below it. The
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
MOMENTUM = 0.5


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
        step = torch.zeros_like(offset) if self.steps else None
        for number in range(self.steps):
            offset, step = self.step(offset, step, radius, number)
        return offset

    def step(self, offset: Tensor, last: Tensor | None, radius: float, number: int) -> tuple[Tensor, Tensor]:
        """One step: displacements, and the step that led there."""
        gradient, nll = self.look(offset + self.theta_star, 1 + number)
        slope = torch.addcmul(gradient, self.precision, offset)
        prior = (offset * (0.5 * offset + self.theta_star)).double() @ self.precision.double()
        excess = (nll.double() + prior - self.level(radius)).clamp_min(0)
        size = (excess / slope.double().square().sum(1)).nan_to_num(0.0, 0.0, 0.0).to(offset)
        step = slope.mul_(-size[:, None])
        if last is not None:
            step.add_(last, alpha=MOMENTUM)
        return offset + step, step

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

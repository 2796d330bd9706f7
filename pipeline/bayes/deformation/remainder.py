r"""The nonlinear remainder of the residual kind: a small network on the inputs of the chain, zero before it is trained.

$h(x, r) = \sigma\,w(r)\,[A x + g(x)]$, added to the linear coefficients; w falls off away from the selected radius,
where it was trained. It is trained on the walks' residuals and on the potential of decoded random directions (the
likelihood term), and kept only where held-out walks and the potential say that it helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

WIDTH = 0.2
"""Standard deviation of w in the logarithm of the radius."""
DROPOUT = 0.1


class Remainder(nn.Module):
    """Correction of the coefficients.

    Args:
        center: Mean of each input, (p,).
        scale: Standard deviation of each input, (p,).
        unit: Root mean square of a walk's residual at the selected radius, times a small factor.
        radius: The selected radius.
        targets: Number of coefficients k.
        hidden: Units of each hidden layer; empty leaves the linear part alone.
    """

    def __init__(self, center: Tensor, scale: Tensor, unit: float, radius: float, targets: int, hidden: Sequence[int]):
        super().__init__()
        self.center: Tensor
        self.scale: Tensor
        self.unit: Tensor
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)
        self.register_buffer("unit", torch.tensor([unit, radius], dtype=torch.float64))
        layers: list[nn.Module] = []
        width = len(center)
        for size in hidden:
            layers += [nn.Linear(width, size)]
            width = size
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(width, targets)
        self.linear = nn.Linear(len(center), targets)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights; the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)
        for module in (self.last, self.linear):
            nn.init.zeros_(module.weight)

    @property
    def radius(self) -> float:
        """Radius at which it was trained."""
        return float(self.unit[1])

    def forward(self, inputs: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """(n, p) -> (n, k), at the selected radius; given `noise`, hidden units drop out."""
        z = ((inputs[:, : len(self.center)] - self.center) / self.scale).clamp(-6, 6)
        hidden = z
        for layer in self.layers:
            hidden = nn.functional.gelu(layer(hidden))
            if noise is not None:
                kept = torch.rand(hidden.shape, generator=noise, dtype=hidden.dtype) >= DROPOUT
                hidden = hidden * kept / (1 - DROPOUT)
        return (self.last(hidden) + self.linear(z)) * self.unit[0].to(z.dtype)

    def weight(self, radius: float) -> float:
        """w(r)."""
        return math.exp(-0.5 * (math.log(radius / self.radius) / WIDTH) ** 2)

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        return {f"remainder.{name}": value.contiguous() for name, value in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Remainder | None:
        """Inverse of `to_tensors`; None where there is none."""
        state = {k.removeprefix("remainder."): v for k, v in tensors.items() if k.startswith("remainder.")}
        if not state:
            return None
        names = [k for k in state if k.startswith("layers.") and k.endswith(".weight")]
        hidden = [len(state[name]) for name in sorted(names, key=lambda name: int(name.split(".")[1]))]
        unit, radius = state["unit"].tolist()
        model = cls(state["center"], state["scale"], unit, radius, len(state["last.bias"]), hidden).to(
            state["center"].dtype
        )
        model.load_state_dict(state)
        return model.eval()

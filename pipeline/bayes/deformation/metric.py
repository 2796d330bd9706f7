r"""The paper's family, as far as it is known: an autoencoder whose latent distance counts steps along the fiber.

Encoder z = E(theta), decoder D(z), on offsets from theta* in units of their standard deviation. The loss is the
squared error of the reconstruction + $w (|z_t - z_{t+1}| - 1)^2$ for consecutive points of one walk $- w \log(|z_i -
z_j| + 10^{-6})$ across walks (Reichlin et al. 2025, arXiv 2512.01500, from summaries of it; w = 0.01 is ours). A draw
decodes a Gaussian fitted to the latent points at the chosen radius. Memory grows as D times the width of the layers:
for small networks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError

WEIGHT = 0.01
"""Of the latent distances, against the mean squared error of the reconstruction."""


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Layers with GELU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(nn.Module):
    """Encoder and decoder between offsets (n, D) and latents (n, z)."""

    def __init__(self, dim: int, latent: int, hidden: Sequence[int]):
        super().__init__()
        self.encoder = perceptron([dim, *hidden, latent])
        self.decoder = perceptron([latent, *reversed(list(hidden)), dim])

    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / module.in_features**0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and reconstruction."""
        latent = self.encoder(offsets)
        return latent, self.decoder(latent)


def metric_loss(model: nn.Module, now: Tensor, after: Tensor) -> Tensor:
    """Loss of consecutive points of different walks, both (n, D)."""
    latent, points = model(torch.cat([now, after]))
    first, second = latent.chunk(2)
    rebuilt = (points - torch.cat([now, after])).square().mean()
    steps = ((first - second).norm(dim=1) - 1).square().mean()
    apart = -((first - first.roll(1, 0)).norm(dim=1) + 1e-6).log().mean() if len(first) > 1 else rebuilt * 0
    return rebuilt + WEIGHT * (steps + apart)


class Metric:
    """A trained autoencoder with the Gaussian of its latents at each recorded radius."""

    def __init__(
        self,
        radius: float,
        theta_star: Tensor,
        scale: Tensor,
        model: Autoencoder,
        radii: Tensor,
        means: Tensor,
        roots: Tensor,
    ):
        self.radius, self.theta_star, self.scale, self.model = radius, theta_star, scale, model.eval()
        self.radii, self.means, self.roots = radii, means, roots

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return len(self.theta_star)

    @torch.no_grad()
    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D), from the latents of the recorded radius that is nearest."""
        radius = self.radius if radius is None else radius
        if not 0 < radius <= float(self.radii[-1]) * (1 + 1e-6):
            raise InputError(
                f"radius must be above 0 and at most {float(self.radii[-1]):.4g}, where walks end; got {radius}."
            )
        node = int((self.radii - radius).abs().argmin())
        normal = torch.from_numpy(rng.standard_normal((n, self.means.shape[1]))).to(self.means)
        latent = self.means[node] + normal @ self.roots[node].T
        return self.theta_star + self.scale * self.model.decoder(latent)

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        tensors = {f"metric.model.{name}": value for name, value in self.model.state_dict().items()}
        named = {
            "theta_star": self.theta_star,
            "scale": self.scale,
            "radii": self.radii,
            "means": self.means,
            "roots": self.roots,
        }
        tensors |= {f"metric.{name}": value for name, value in named.items()}
        return tensors | {"metric.radius": torch.tensor(self.radius, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Metric:
        """Inverse of `to_tensors`."""
        prefix = "metric.model."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("encoder.")})
        widths = [len(state[f"encoder.{i}.bias"]) for i in numbers]
        theta_star = tensors["metric.theta_star"]
        model = Autoencoder(len(theta_star), widths[-1], widths[:-1]).to(theta_star.dtype)
        model.load_state_dict(state)
        parts = (tensors[f"metric.{name}"] for name in ("radii", "means", "roots"))
        return cls(float(tensors["metric.radius"]), theta_star, tensors["metric.scale"], model, *parts)

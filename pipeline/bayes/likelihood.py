r"""Likelihoods: $-\log p(y_n \mid f(x_n))$ in nats, its Gauss-Newton factor, and what they predict.

Each is a plain object with the same methods. `outputs` has shape (..., rows, columns), `y` has shape (rows,).
$\Lambda_n = -\nabla_f^2 \log p(y_n \mid f)$, or its expectation, is the factor of the generalised Gauss-Newton matrix
$J' \Lambda J$ (Schraudolph 2002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Prediction:
    """What outputs mean: class probabilities, or a mean and the variance of the noise."""

    probabilities: Tensor | None = None
    """(..., rows, classes)."""
    mean: Tensor | None = None
    """(..., rows)."""
    variance: Tensor | None = None
    """Variance of the observation noise, (..., rows)."""


class Likelihood(Protocol):
    """The interface of all likelihoods."""

    @property
    def columns(self) -> int:
        """Columns of the network's output."""
        ...

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each row, (..., rows), in nats."""
        ...

    def curvature_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """Lambda times a tangent of the outputs, both (..., rows, columns)."""
        ...

    def curvature_root(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """A root of Lambda times standard normal noise: its covariance over the noise is Lambda."""
        ...

    def predict(self, outputs: Tensor) -> Prediction:
        """The predictive distribution of each row."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Softmax over logits; y holds class numbers."""

    classes: int

    @property
    def columns(self) -> int:
        """One logit a class."""
        return self.classes

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of each row."""
        log_p = functional.log_softmax(outputs, dim=-1)
        index = y.expand(outputs.shape[:-1]).unsqueeze(-1)
        return -log_p.gather(-1, index).squeeze(-1)

    def curvature_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """(diag p - p p') v."""
        p = outputs.softmax(dim=-1)
        return p * tangent - p * (p * tangent).sum(-1, keepdim=True)

    def curvature_root(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """sqrt(p) * e - p (sqrt(p) . e)."""
        p = outputs.softmax(dim=-1)
        root = p.sqrt()
        return root * noise - p * (root * noise).sum(-1, keepdim=True)

    def predict(self, outputs: Tensor) -> Prediction:
        """Softmax probabilities."""
        return Prediction(probabilities=outputs.softmax(dim=-1))


@dataclass(frozen=True)
class Bernoulli:
    """One logit for class 1 of two."""

    @property
    def columns(self) -> int:
        """One logit."""
        return 1

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Binary cross entropy of each row."""
        logit = outputs.squeeze(-1)
        return functional.softplus(logit) - y * logit

    def curvature_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """p (1 - p) v."""
        p = outputs.sigmoid()
        return p * (1 - p) * tangent

    def curvature_root(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """sqrt(p (1 - p)) e."""
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt() * noise

    def predict(self, outputs: Tensor) -> Prediction:
        """Probabilities of class 0 and class 1."""
        logit = outputs.squeeze(-1)
        return Prediction(probabilities=torch.stack([(-logit).sigmoid(), logit.sigmoid()], dim=-1))


@dataclass(frozen=True)
class Gaussian:
    """The network gives the mean; the noise has one standard deviation, in the unit of the (standardised) target."""

    noise_std: float

    @property
    def columns(self) -> int:
        """One mean."""
        return 1

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Gaussian negative log density of each row."""
        scaled = (outputs.squeeze(-1) - y) / self.noise_std
        return 0.5 * scaled.square() + (math.log(self.noise_std) + 0.5 * LOG_2PI)

    def curvature_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """v / sigma^2."""
        return tangent / self.noise_std**2

    def curvature_root(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """e / sigma."""
        return noise / self.noise_std

    def predict(self, outputs: Tensor) -> Prediction:
        """Mean and noise variance."""
        mean = outputs.squeeze(-1)
        return Prediction(mean=mean, variance=torch.full_like(mean, self.noise_std**2))


@dataclass(frozen=True)
class Heteroscedastic:
    """The network gives the mean and the logarithm of the noise variance (Nix and Weigend 1994), above a floor.

    Without the floor the likelihood has no bound: a network that meets a target exactly can claim any precision there.
    """

    floor: float = 1e-4
    """Added to the variance that the network gives, in squared units of the (standardised) target."""

    @property
    def columns(self) -> int:
        """Mean and log-variance."""
        return 2

    def log_variance(self, outputs: Tensor) -> Tensor:
        """Logarithm of the variance with its floor."""
        low = math.log(self.floor)
        return low + functional.softplus(outputs[..., 1] - low)

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Gaussian negative log density of each row."""
        mean, log_variance = outputs[..., 0], self.log_variance(outputs)
        return 0.5 * ((mean - y).square() * (-log_variance).exp() + log_variance + LOG_2PI)

    def curvature_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """Fisher information: diag(1 / v, (dv / ds / v)^2 / 2) v."""
        return tangent * self._fisher(outputs)

    def curvature_root(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Square root of the Fisher information times e."""
        return noise * self._fisher(outputs).sqrt()

    def predict(self, outputs: Tensor) -> Prediction:
        """Mean and noise variance."""
        return Prediction(mean=outputs[..., 0], variance=self.log_variance(outputs).exp())

    def _fisher(self, outputs: Tensor) -> Tensor:
        share = (outputs[..., 1] - math.log(self.floor)).sigmoid()
        return torch.stack([(-self.log_variance(outputs)).exp(), 0.5 * share.square()], dim=-1)

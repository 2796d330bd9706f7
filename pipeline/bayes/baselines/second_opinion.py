r"""laplace-torch (Daxberger et al. 2021) as a second opinion on the Laplace approximation of `laplace.py`.

The package declares torchvision, so it cannot be an extra of this one; where it is installed it is used. Generalised
Gauss-Newton matrix over all walked parameters, full up to a few thousand of them and Kronecker-factored above;
predictions of the linearised network.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pipeline.bayes.baselines.laplace import LARGEST_DIM
from pipeline.bayes.likelihood import Categorical, Gaussian
from pipeline.bayes.target import Potential
from pipeline.streams import torch_generator

INSTALL = (
    "pip install --no-deps laplace-torch curvlinops-for-pytorch backpack-for-pytorch asdfghjkl opt-einsum unfoldnd "
    "einops einconv linear-operator jaxtyping wadler-lindig"
)
"""Without dependencies, because laplace-torch brings a torchvision that does not load beside a CPU build of torch."""
_JACOBIAN_BYTES = 128 * 2**20
_FIT_ROWS = 256


class SecondOpinion:
    """A fitted Laplace approximation of laplace-torch; serves every factor on the prior precision.

    Args:
        potential: U over the training rows.
        theta_star: Where it is expanded, (D,).

    Raises:
        ImportError: laplace-torch, or something that it imports, is not installed.
        ValueError: The network or the likelihood is none that it knows; the message says which.
    """

    def __init__(self, potential: Potential, theta_star: Tensor):
        reason = unsuitable(potential)
        if reason:
            raise ValueError(reason)
        package: Any = importlib.import_module("laplace")
        network, self.full = potential.network, potential.network.dim <= LARGEST_DIM
        module = copy.deepcopy(network.module).double()
        module.load_state_dict({k: v.to(torch.float64) for k, v in network.state_dict(theta_star).items()})
        walked = set(network.layout.names)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in walked)
        self._precision = potential.precision.double().cpu()
        self._sizes, self._columns = network.layout.sizes, potential.likelihood.columns
        regression = isinstance(potential.likelihood, Gaussian)
        y = potential.y.double()[:, None] if regression else potential.y
        assert isinstance(potential.x, Tensor)
        self._model: Any = package.Laplace(
            module,
            "regression" if regression else "classification",
            subset_of_weights="all",
            hessian_structure="full" if self.full else "kron",
            **({"sigma_noise": potential.likelihood.noise_std} if isinstance(potential.likelihood, Gaussian) else {}),
        )
        self._model.fit(DataLoader(TensorDataset(potential.x.double(), y), batch_size=_FIT_ROWS))

    def outputs(self, x: Tensor, draws: int, factor: float, rng: np.random.Generator) -> Tensor:
        """Draws of the linearised network's outputs with the prior precision times `factor`, (draws, rows, columns)."""
        if self.full:
            self._model.prior_precision = factor * self._precision
        else:  # one number for each tensor: the prior is constant on it
            self._model.prior_precision = factor * torch.stack([part[0] for part in self._precision.split(self._sizes)])
        generator = torch_generator(rng)
        return torch.cat([self._draw(piece, draws, generator) for piece in self._pieces(x)], dim=1)

    def _draw(self, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        return self._model.functional_samples(x, pred_type="glm", n_samples=draws, generator=generator).detach()

    def _pieces(self, x: Tensor) -> Iterator[Tensor]:
        step = max(1, _JACOBIAN_BYTES // (8 * len(self._precision) * self._columns))
        yield from x.double().split(step)


def unsuitable(potential: Potential) -> str:
    """Why laplace-torch cannot take a problem, or nothing."""
    if not isinstance(potential.likelihood, (Categorical, Gaussian)):
        return f"is for categorical and gaussian likelihoods, not {type(potential.likelihood).__name__.lower()}"
    if not isinstance(potential.x, Tensor):
        return "is for networks of one input array"
    return ""

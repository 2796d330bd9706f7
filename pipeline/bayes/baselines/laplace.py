r"""Laplace approximation with the full Gauss-Newton matrix, for networks of a few thousand parameters.

$H_s = J'\Lambda J + s\,\mathrm{diag}(\alpha)$ at theta*, with one factor s on the prior precision, tuned on
validation rows as is usual (Daxberger et al. 2021). Sampled: draws of N(theta*, H_s^-1) go through the network.
Linearised: they go through its first-order expansion at theta* (Immer et al. 2021).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from pipeline.bayes import plain
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import Tree, map_tree, row_count, slice_rows

LARGEST_DIM = 3000
PRIOR_FACTORS = tuple(float(f) for f in np.logspace(-3, 3, 19))
_JACOBIAN_BYTES = 128 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Laplace:
    """Eigenvectors of the Gauss-Newton matrix in the metric of the prior; serves every factor on the prior."""

    network: Network
    theta_star: Tensor
    """(D,)."""
    values: Tensor
    """Eigenvalues of P^-1/2 J' Lambda J P^-1/2, (D,), double."""
    vectors: Tensor
    """P^-1/2 Q, (D, D), double."""

    @classmethod
    def fit(cls, potential: Potential, theta_star: Tensor) -> Laplace:
        """Gauss-Newton matrix over the rows of a potential and its eigenvectors; D x D memory."""
        matrix = gauss_newton_matrix(potential.network, potential.likelihood, theta_star, potential.x)
        root = potential.precision.double().cpu().rsqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * matrix * root)
        return cls(potential.network, theta_star, values.clamp_min(0.0), root[:, None] * vectors)

    def offsets(self, rng: np.random.Generator, n: int, factor: float) -> Tensor:
        """Draws of theta - theta*, (n, D), with the prior precision multiplied by `factor`."""
        normal = torch.as_tensor(rng.standard_normal((n, len(self.values))))
        return ((normal * (self.values + factor).rsqrt()) @ self.vectors.T).to(self.theta_star)

    def variance(self, x: Tree) -> Tensor:
        """Variance of the outputs of the linearised network, (rows, columns), in double precision."""
        shrink = (self.values + 1).rsqrt()
        pieces = jacobians(self.network, self.theta_star, x)
        return torch.cat([(jacobian @ self.vectors * shrink).square().sum(-1) for _, jacobian in pieces])

    def linearised(self, offsets: Tensor, x: Tree) -> Tensor:
        """Outputs of the linearised network for every offset (n, D), in double precision, (n, rows, columns)."""
        moved = offsets.double().cpu().T
        pieces = jacobians(self.network, self.theta_star, x)
        return torch.cat([values + (jacobian @ moved).permute(2, 0, 1) for values, jacobian in pieces], dim=1)


def jacobians(network: Network, theta: Tensor, x: Tree) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of pieces of the rows (b, columns) and their Jacobians (b, columns, D), as doubles on the CPU."""

    def outputs(t: Tensor, row: Tree) -> Tensor:
        return network.outputs(t, map_tree(lambda leaf: leaf[None], row))[0]

    def by_rows(t: Tensor, piece: Tree) -> Tensor:
        return vmap(jacrev(outputs), in_dims=(None, 0))(t, piece)

    try:
        jacobian_of = by_rows
        with warnings.catch_warnings():  # torch warns where it falls back to a loop, which has a faster way below
            warnings.filterwarnings("error", message="There is a performance drop")
            by_rows(theta, slice_rows(x, 0, 1))
    except Exception as error:  # noqa: BLE001 - recurrent layers have no batching rule, user code may lack any
        log.info("Jacobians one by one: torch.func refuses the network (%s).", type(error).__name__)
        jacobian_of = partial(plain.jacobian, network)
    columns = network.outputs(theta, slice_rows(x, 0, 1)).shape[-1]
    step = max(1, _JACOBIAN_BYTES // (8 * network.dim * columns))
    for first in range(0, row_count(x), step):
        piece = slice_rows(x, first, first + step)
        yield network.outputs(theta, piece).double().cpu(), jacobian_of(theta, piece).double().cpu()


def gauss_newton_matrix(network: Network, likelihood: Likelihood, theta: Tensor, x: Tree) -> Tensor:
    """J' Lambda J summed over rows, (D, D), in double precision, from Jacobians of a few rows at a time."""
    total = torch.zeros(network.dim, network.dim, dtype=torch.float64)
    for values, jacobian in jacobians(network, theta, x):
        tangent = jacobian.permute(2, 0, 1)
        curved = likelihood.curvature_product(values, tangent)
        total += tangent.reshape(network.dim, -1) @ curved.reshape(network.dim, -1).T
    return 0.5 * (total + total.T)

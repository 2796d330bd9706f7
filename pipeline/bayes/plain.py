"""Curvature products by plain autograd, one vector after the other, for networks that torch.func refuses.

Slower than what `pipeline.bayes.target` does for all others, and the same numbers up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.bayes.target import Potential


def hessian_products(potential: Potential, theta: Tensor, vectors: Tensor) -> Tensor:
    """Hessian of U times vectors, (D,), (k, D) -> (k, D): the gradient of the gradient's product."""
    total = vectors * potential.precision
    for x, y in potential.pieces():
        leaf = theta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(potential.piece_nll(leaf, x, y), leaf, create_graph=True)
        if slope.requires_grad:  # otherwise the NLL is linear in theta, and has no curvature
            total += torch.stack([_pull(slope, leaf, vector) for vector in vectors])
    return total


def gauss_newton_products(potential: Potential, theta: Tensor, vectors: Tensor) -> Tensor:
    """Gauss-Newton matrix of U times vectors, (D,), (k, D) -> (k, D).

    J v is the derivative by u of u' J v, since reverse mode gives J' u only.
    """
    total = vectors * potential.precision
    for x, _ in potential.pieces():
        leaf = theta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            outputs = potential.network.outputs(leaf, x)
            u = torch.zeros_like(outputs, requires_grad=True)
            (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
        for row, vector in zip(total, vectors, strict=True):
            tangent = _pull(pulled, u, vector)
            row += _pull(outputs, leaf, potential.likelihood.curvature_product(outputs.detach(), tangent))
    return total


def _pull(values: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    """Gradient of sum(values * weights), zero where they do not depend on the leaf."""
    (found,) = torch.autograd.grad(values, leaf, weights, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found

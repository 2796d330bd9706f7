"""Curvature products and Jacobians by plain autograd, one by one, for networks that torch.func refuses.

Slower than what `pipeline.bayes.target` does for all others, and the same numbers up to rounding. Where autograd has no
second derivative, as for functions whose backward pass is not made of torch's own operations, differences of outputs
and gradients take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vjp, vmap

from pipeline.bayes.trees import Tree, row_count, slice_rows

if TYPE_CHECKING:
    from pipeline.bayes.params import Network
    from pipeline.bayes.target import Potential

STEPS = {torch.float64: 3e-5, torch.float32: 3e-3}
"""Length of a difference's step on either side, in units of the parameters."""
TOGETHER = 16
"""Rows of one forward pass of a Jacobian: every backward pass goes through all of them."""
AGREE = 0.05
"""Relative difference up to which a derivative and a difference count as the same."""


def differentiates_twice(network: Network, theta: Tensor, x: Tree) -> bool:
    """Whether autograd differentiates the gradient J'u by u. Some functions refuse, others drop it without a word."""
    vector = torch.linspace(-1, 1, len(theta), dtype=theta.dtype, device=theta.device)
    try:
        (found,) = _tangents(network, theta, x, vector[None])
    except RuntimeError:
        return False
    expected = _output_difference(network, theta, x, vector)
    return bool((found - expected).norm() <= AGREE * expected.norm())


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
    """Gauss-Newton matrix of U times vectors, (D,), (k, D) -> (k, D)."""
    network, total = potential.network, vectors * potential.precision
    for x, _ in potential.pieces():
        leaf = theta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            outputs = network.outputs(leaf, x)
        if network.twice(x):
            tangents = _tangents(network, theta, x, vectors)
        else:
            tangents = [_output_difference(network, theta, x, vector) for vector in vectors]
        for row, tangent in zip(total, tangents, strict=True):
            row += _pull(outputs, leaf, potential.likelihood.curvature_product(outputs.detach(), tangent))
    return total


def gradients(potential: Potential, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the summed NLL of some rows and the NLL, (W, D) -> (W, D), (W,)."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in theta:
        leaf = start.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            nll = potential.piece_nll(leaf, x, y)
            found.append((torch.autograd.grad(nll, leaf)[0], nll.detach()))
    return torch.stack([gradient for gradient, _ in found]), torch.stack([nll for _, nll in found])


def gradient_differences(potential: Potential, theta: Tensor, vectors: Tensor) -> Tensor:
    """Hessian of U times vectors by central differences of gradients, (D,), (k, D) -> (k, D)."""
    lengths = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    steps = vectors * (STEPS[vectors.dtype] / lengths)
    gradient = potential.nll_gradient(torch.cat([theta + steps, theta - steps]))[0]
    ahead, behind = gradient.split(len(vectors))
    return (ahead - behind) * (lengths / (2 * STEPS[vectors.dtype])) + vectors * potential.precision


def jacobian(network: Network, theta: Tensor, x: Tree) -> Tensor:
    """Jacobian of the outputs of some rows, (rows, columns, D): a backward pass for each output.

    For recurrent layers too, which have no batching rule going forward.
    """
    pieces = [slice_rows(x, first, first + TOGETHER) for first in range(0, row_count(x), TOGETHER)]
    return torch.cat([_jacobian(network, theta, piece, network.batches(x)) for piece in pieces])


def _jacobian(network: Network, theta: Tensor, x: Tree, batches: bool) -> Tensor:
    if batches:
        outputs, pull = vjp(lambda t: network.outputs(t, x), theta)  # pyright: ignore[reportAssignmentType]
        units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        slopes = vmap(pull)(units.view(-1, *outputs.shape))[0]
    else:
        leaf = theta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            outputs = network.outputs(leaf, x)
        slopes = torch.stack([_pull(value, leaf, torch.ones_like(value)) for value in outputs.reshape(-1)])
    return slopes.view(*outputs.shape, -1)


def _tangents(network: Network, theta: Tensor, x: Tree, vectors: Tensor) -> list[Tensor]:
    """J v for each vector: the derivative by u of u' J v, since reverse mode gives J' u only."""
    leaf = theta.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = network.outputs(leaf, x)
        u = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
    return [_pull(pulled, u, vector) for vector in vectors]


def _output_difference(network: Network, theta: Tensor, x: Tree, vector: Tensor) -> Tensor:
    """J v by a central difference of the outputs."""
    length = STEPS[vector.dtype] / float(vector.norm())
    with torch.no_grad():
        ahead, behind = (network.outputs(theta + sign * length * vector, x) for sign in (1, -1))
    return (ahead - behind) / (2 * length)


def _pull(values: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    """Gradient of sum(values * weights), zero where they do not depend on the leaf."""
    (found,) = torch.autograd.grad(values, leaf, weights, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found

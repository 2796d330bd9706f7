r"""The potential: the unnormalised negative log posterior over one flat parameter vector.

$$U(\theta) = -\sum_n \log p(y_n \mid x_n, \theta) + \tfrac12 \sum_i \alpha_i \theta_i^2$$

summed over the rows, in nats; lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from re import search
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from pipeline.bayes import plain
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.params import Network, ParameterLayout
from pipeline.bayes.trees import Tree, row_count, slice_rows, take_rows
from pipeline.errors import InputError

ROW_BATCH = 256
"""Rows of one forward pass of curvature products on a CPU."""
VECTOR_ELEMENTS = 1 << 28
"""Most elements between the layers of all vectors that pass together in curvature products."""
DIFFERENCED = 1_000_000
"""Rows times parameters above which Hessian products are differences of gradients: the fast forms of those are several
times faster than automatic differentiation twice over, and in float64 they agree to nine digits."""

NllGradient = Callable[..., tuple[Tensor, Tensor]]
"""theta (W, D), rows=None -> gradient of the summed NLL (W, D) and the NLL (W,); rows are indices of data rows."""
Nll = Callable[..., Tensor]
"""The same without the gradient: theta (W, D), rows=None -> (W,)."""


def prior_precision(
    layout: ParameterLayout, precision: float | Mapping[str, float] | Sequence[Sequence[Any]], dtype: torch.dtype
) -> Tensor:
    """Prior precision of each parameter, (D,): one number, or that of the first regular expression found in its name.

    Expressions come as a mapping, or as pairs where the order has to survive a format that sorts.

    Raises:
        InputError: A parameter matches no expression.
    """
    if isinstance(precision, (int, float)):
        return torch.full((layout.dim,), float(precision), dtype=dtype)
    pairs = list(precision.items()) if isinstance(precision, Mapping) else [(p, v) for p, v in precision]
    parts: list[Tensor] = []
    for name, size in zip(layout.names, layout.sizes, strict=True):
        value = next((v for pattern, v in pairs if search(pattern, name)), None)
        if value is None:
            raise InputError(f"prior.precision has no expression that matches '{name}'. Add one, or '.*' as the last.")
        parts.append(torch.full((size,), float(value), dtype=dtype))
    return torch.cat(parts)


class Potential:
    """U, its gradient and curvature products for given rows.

    Args:
        network: The network as a function of theta.
        likelihood: Likelihood of a row.
        precision: Prior precision of each parameter, (D,).
        x: Inputs, rows on the first axis.
        y: Targets, (rows,).
        nll_gradient: A fast form from `pipeline.bayes.kernels`; None takes the reference of vmap and grad.
        nll: The same of the NLL alone; None passes one parameter vector forward after the other.
        row_batch: Rows in one forward pass of curvature products; None: what fits the cache, or an accelerator.
    """

    def __init__(
        self,
        network: Network,
        likelihood: Likelihood,
        precision: Tensor,
        x: Tree,
        y: Tensor,
        nll_gradient: NllGradient | None = None,
        row_batch: int | None = None,
        nll: Nll | None = None,
    ):
        self.network, self.likelihood, self.precision = network, likelihood, precision
        self.x, self.y = x, y
        self.row_batch = row_batch or (ROW_BATCH if precision.device.type == "cpu" else 16 * ROW_BATCH)
        self.nll_gradient: NllGradient = nll_gradient or self._reference_gradient
        self.nll: Nll = nll or self._reference_nll
        """Summed negative log likelihood, (W, D), rows=None -> (W,), in nats."""

    @property
    def rows(self) -> int:
        """Number of data rows."""
        return row_count(self.x)

    def on_rows(self, rows: Tensor) -> Potential:
        """The same network and prior with some of the rows, their numbers (n,), and the reference gradient."""
        y = self.y[rows.to(self.y.device)]
        return Potential(self.network, self.likelihood, self.precision, take_rows(self.x, rows), y)

    def prior(self, theta: Tensor) -> Tensor:
        """Prior part of U, (W, D) -> (W,), in nats, without its constant."""
        return 0.5 * (theta.square() @ self.precision)

    def value(self, theta: Tensor) -> Tensor:
        """U, (W, D) -> (W,), in nats."""
        return self.nll(theta) + self.prior(theta)

    def gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of U and the summed NLL: (W, D) -> (W, D), (W,)."""
        gradient, nll = self.nll_gradient(theta)
        return torch.addcmul(gradient, self.precision, theta), nll

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Hessian of U times vectors: (D,), (k, D) -> (k, D). Differences of gradients where there is much work."""
        batches = self.network.batches(self.x)
        large = theta.dtype == torch.float64 and self.rows * theta.numel() > DIFFERENCED
        if large or not (batches or self.network.twice(self.x)):
            chunk = max(1, min(16, (1 << 24) // theta.numel()))
            return torch.cat([plain.gradient_differences(self, theta, part) for part in vectors.split(chunk)])
        if not batches:
            return plain.hessian_products(self, theta, vectors)
        total = vectors * self.precision
        for x, y in self.pieces():
            slope = grad(lambda t, x=x, y=y: self.piece_nll(t, x, y))
            total += vmap(lambda v, slope=slope: jvp(slope, (theta,), (v,))[1], chunk_size=self._together())(vectors)
        return total

    def gauss_newton(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Gauss-Newton matrix of U times vectors: (J' Lambda J + diag alpha) v; (D,), (k, D) -> (k, D)."""
        if not self.network.batches(self.x):
            return plain.gauss_newton_products(self, theta, vectors)
        total = vectors * self.precision
        for x, _ in self.pieces():
            outputs, pull = vjp(lambda t, x=x: self.network.outputs(t, x), theta)  # pyright: ignore[reportAssignmentType]

            def product(v: Tensor, x: Tree = x, outputs: Tensor = outputs, pull: Callable = pull) -> Tensor:
                tangent = jvp(lambda t: self.network.outputs(t, x), (theta,), (v,))[1]
                return pull(self.likelihood.curvature_product(outputs, tangent))[0]

            total += vmap(product, chunk_size=self._together())(vectors)
        return total

    def piece_nll(self, theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        """Summed NLL of some rows at one parameter vector, a scalar in nats."""
        return self.likelihood.nll(self.network.outputs(theta, x), y).sum()

    def pieces(self) -> list[tuple[Tree, Tensor]]:
        """Inputs and targets in pieces of `row_batch` rows."""
        bounds = range(0, self.rows, self.row_batch)
        return [(slice_rows(self.x, b, b + self.row_batch), self.y[b : b + self.row_batch]) for b in bounds]

    def _together(self) -> int:
        """Vectors that pass together."""
        row = max(1, self.network.elements(self.x))
        return max(1, min(32, VECTOR_ELEMENTS // (row * min(self.rows, self.row_batch))))

    def _reference_nll(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        pieces = (self if rows is None else self.on_rows(rows)).pieces()
        return torch.stack([sum((self.piece_nll(t, x, y) for x, y in pieces), torch.zeros(())) for t in theta])

    def _reference_gradient(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, y = (self.x, self.y) if rows is None else (take_rows(self.x, rows), self.y[rows])
        if not self.network.batches(x):
            return plain.gradients(self, theta, x, y)
        return vmap(grad_and_value(lambda t: self.piece_nll(t, x, y)), chunk_size=32)(theta)

r"""Curvature of the potential at the MAP estimate: leading eigenpairs, their certificate, and the effective dimension.

Two ways to the same numbers: the whole matrix where it is small enough, else Lanczos on matrix-free products (ARPACK,
Lehoucq et al. 1998) and stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017). No random number comes from outside
the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from pipeline.bayes.chain import parse_chain
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import take_rows

DENSE_WORK = 5e9
"""The whole matrix is formed when D^2 * rows is below this: a few seconds of one core."""
DENSE_DIM = 3000
"""And when D is below this: its eigenvalues take a few seconds more."""
DENSE_GENERAL = 500
"""And when D is below this for networks that are no plain chain of layers: one product of a recurrent one or of a
transformer takes as long as a hundred of a chain with as many parameters, and Lanczos asks for some hundred."""
LANCZOS_DIM = 1_000_000
"""Above this D, no eigenpairs are sought: their basis would take more memory than the walks."""
TRACE_ERROR = 0.05
"""Relative standard error at which the estimate of a trace ends."""
BASIS_BYTES = 2 << 30
"""Largest Krylov basis that is held; the number of eigenpairs falls to fit it."""

Product = Callable[[Tensor], Tensor]
"""(k, D) -> (k, D), a symmetric matrix times rows."""


@dataclass(frozen=True)
class Curvature:
    """Spectrum of the Hessian of U at theta*, as far as the walk needs it."""

    lambda_max: float
    """Largest eigenvalue, nats per squared unit."""
    values: Tensor
    """Leading eigenvalues, (k,), falling."""
    vectors: Tensor
    """Their orthonormal eigenvectors, (k, D)."""
    deflated_max: float
    """Largest eigenvalue of (I - QQ')H(I - QQ'), found by its own iteration: the certificate of the deflation."""
    residual: float
    """Largest |H q - lambda q| / lambda_max over the pairs."""
    gamma: float
    """Effective number of parameters, tr[H_data (H_data + alpha)^-1], with the Gauss-Newton matrix."""


def measure(
    potential: Potential, theta: Tensor, rank: int, rng: np.random.Generator, max_rows: int = 10_000
) -> Curvature:
    """Measure the curvature of U at theta, in float64 where the network is.

    Args:
        potential: The target; of more than `max_rows` rows a random subset stands for all.
        theta: Where, (D,).
        rank: Eigenpairs wanted; fewer where D or memory does not allow them.
        rng: Start vectors and the subset.
        max_rows: Rows that enter the products.
    """
    potential, scale = _subset(potential, max_rows, rng)
    precision = potential.precision

    def hessian(vectors: Tensor) -> Tensor:
        return (potential.hvp(theta, vectors) - vectors * precision) * scale + vectors * precision

    dim = theta.numel()
    if _dense_pays(potential, dim):
        values, vectors = torch.linalg.eigh(_dense(hessian, theta))
        values, vectors = values.flip(0), vectors.flip(1).T
        k = min(rank, dim - 1, int((values > 0).sum()))  # a step size of its own needs a curvature to divide by
        deflated = float(values[k]) if k else float(values[0])
        gamma = occam(potential, theta, rng, scale)[0]
        return Curvature(float(values[0]), values[:k].clone(), vectors[:k].clone(), deflated, 0.0, gamma)
    pairs = 0 if dim > LANCZOS_DIM else min(rank, dim - 2, int(BASIS_BYTES / (8 * dim) / 2.5))
    values, vectors, residual = _leading(hessian, theta, pairs, rng)
    found = len(values) > 0  # Lanczos may end without any pair
    lambda_max = float(values[0]) if found else power_iteration(hessian, theta, rng)
    deflated = (
        power_iteration(lambda v: _outside(hessian(_outside(v, vectors)), vectors), theta, rng) if found else lambda_max
    )
    gamma = occam(potential, theta, rng, scale)[0]
    return Curvature(lambda_max, values, vectors, deflated, residual, gamma)


def occam(potential: Potential, theta: Tensor, rng: np.random.Generator, scale: float = 1.0) -> tuple[float, float]:
    """Effective number of parameters sum a / (1 + a), and the log volume sum log(1 + a), in nats.

    a are the eigenvalues of alpha^-1/2 H_data alpha^-1/2 with the Gauss-Newton matrix H_data. Half the log volume is
    the Occam factor of the Laplace marginal likelihood (MacKay 1992).

    Args:
        potential: The target.
        theta: Where, (D,).
        rng: Random signs, where the trace is estimated.
        scale: Weight of a row, where rows are a subset.
    """
    dim, root = theta.numel(), potential.precision.rsqrt()

    def whitened(vectors: Tensor) -> Tensor:
        scaled = vectors * root
        return (potential.gauss_newton(theta, scaled) - scaled * potential.precision) * (scale * root)

    if _dense_pays(potential, dim):
        values = torch.linalg.eigvalsh(_dense(whitened, theta)).clamp_min(0)
        return float((values / (1 + values)).sum()), float(values.log1p().sum())
    group, most, steps = (1, 1, 8) if dim > 1_000_000 else (3, 6, 20)
    found: list[tuple[float, float]] = []
    while len(found) < most:
        signs = torch.as_tensor(rng.integers(0, 2, (group, dim)) * 2.0 - 1.0, dtype=theta.dtype, device=theta.device)
        for values, weights in _lanczos_quadrature(whitened, signs / dim**0.5, steps):
            found.append((float((weights * values / (1 + values)).sum()), float((weights * np.log1p(values)).sum())))
        gamma, volume = dim * np.mean(found, axis=0)
        # The variance of the trace of A under random signs is at most 2 tr A^2 <= 2 tr A, for eigenvalues below one.
        if np.sqrt(2 / (max(gamma, 1e-9) * len(found))) < TRACE_ERROR:
            break
    return float(gamma), float(volume)


def power_iteration(
    product: Product, like: Tensor, rng: np.random.Generator, steps: int = 60, tolerance: float = 1e-3
) -> float:
    """Largest eigenvalue in size of a symmetric product, by power iteration from a random start.

    The Rayleigh quotient approaches it from below, so a margin of twice the last change is added.
    """
    steps = steps if like.numel() <= 1_000_000 else 12
    vector = torch.as_tensor(rng.standard_normal(like.numel()), dtype=like.dtype, device=like.device)[None]
    value, change = 0.0, 0.0
    for _ in range(steps):
        vector = vector / vector.norm()
        image = product(vector)
        before, value = value, float((vector * image).sum())
        change = abs(value - before)
        if change <= tolerance * abs(value):
            break
        vector = image
    return abs(value) + 2 * change


def _subset(potential: Potential, max_rows: int, rng: np.random.Generator) -> tuple[Potential, float]:
    if potential.rows <= max_rows:
        return potential, 1.0
    index = torch.as_tensor(np.sort(rng.choice(potential.rows, max_rows, replace=False)), device=potential.y.device)
    x, y = take_rows(potential.x, index), potential.y[index]

    def gradient(theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return potential.nll_gradient(theta, index if rows is None else index[rows])

    parts = potential.network, potential.likelihood, potential.precision
    return Potential(*parts, x, y, gradient, potential.row_batch), potential.rows / max_rows


def _dense_pays(potential: Potential, dim: int) -> bool:
    chain = parse_chain(potential.network.module, dim) is not None
    return dim <= (DENSE_DIM if chain else DENSE_GENERAL) and dim * dim * potential.rows <= DENSE_WORK


def _dense(product: Product, theta: Tensor) -> Tensor:
    """The whole matrix, symmetrised."""
    matrix = product(torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device))
    return (matrix + matrix.T) / 2


def _leading(product: Product, theta: Tensor, pairs: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Leading eigenpairs by Lanczos; what has not converged is left out, since the certificate covers the rest."""
    dim = theta.numel()
    if pairs < 1:
        return theta.new_zeros(0), theta.new_zeros(0, dim), 0.0

    def matvec(vector: np.ndarray) -> np.ndarray:
        rows = torch.as_tensor(vector.reshape(1, -1), dtype=theta.dtype, device=theta.device)
        return product(rows)[0].double().cpu().numpy()

    operator = LinearOperator((dim, dim), matvec=matvec, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = rng.standard_normal(dim)
    try:
        basis = min(dim, 2 * pairs + 20)
        values, vectors = eigsh(operator, k=pairs, which="LA", v0=start, ncv=basis, tol=1e-3, maxiter=12)  # pyright: ignore[reportArgumentType]
    except ArpackNoConvergence as partial:
        values, vectors = partial.eigenvalues, partial.eigenvectors
    keep = np.argsort(values)[::-1]
    keep = keep[values[keep] > 0]
    found = torch.as_tensor(values[keep].copy(), dtype=theta.dtype, device=theta.device)
    rows = torch.as_tensor(np.ascontiguousarray(vectors[:, keep].T), dtype=theta.dtype, device=theta.device)
    if not len(found):
        return found, rows, 0.0
    residual = (product(rows) - found[:, None] * rows).norm(dim=1).max() / found[0]
    return found, rows, float(residual)


def _outside(vectors: Tensor, basis: Tensor) -> Tensor:
    """Project rows onto the complement of an orthonormal basis (k, D)."""
    return vectors - (vectors @ basis.T) @ basis


def _lanczos_quadrature(product: Product, starts: Tensor, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights with v' f(A) v = sum w f(a), for each unit vector v of (k, D); all reorthogonalised."""
    basis, diagonal, off = [starts], [], []
    for _ in range(min(steps, starts.shape[1])):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(dim=1).cpu().numpy())
        for vectors in basis:
            image = image - (image * vectors).sum(dim=1, keepdim=True) * vectors
        norm = image.norm(dim=1)
        off.append(norm.cpu().numpy())
        # A probe whose space is exhausted goes on with zeros: its later nodes get no weight.
        done = norm < 1e-8 * max(1.0, float(np.abs(diagonal[0]).max()))
        basis.append(torch.where(done[:, None], 0.0, image / norm.clamp_min(1e-300)[:, None]))
        off[-1][done.cpu().numpy()] = 0.0
    rules: list[tuple[np.ndarray, np.ndarray]] = []
    for main, beside in zip(np.stack(diagonal, 1), np.stack(off, 1), strict=True):
        values, vectors = np.linalg.eigh(np.diag(main) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        rules.append((values.clip(min=0), vectors[0] ** 2))
    return rules

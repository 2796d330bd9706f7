r"""Ridge regression from sums, so that rows stream by; its penalty is chosen on held-out rows.

$W = \arg\min |Y - XW|^2 + n\lambda|SW|^2$, with S the root mean square of each column and the first column (ones) free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0**e for e in (-12, -9, -7, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))
"""Candidates for the penalty, relative to the mean square of a column."""
BLIND_PENALTY = 1e-2
"""Taken where no row is held out."""


@dataclass
class Moments:
    """Sums of products of inputs x (n, p), whose first column is one, and targets y (n, k)."""

    xx: Tensor
    """(p, p), float64."""
    xy: Tensor
    """(p, k), float64."""
    yy: Tensor
    """Summed squares of each target, (k,), float64."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Sums over rows."""
        x, y = x.double(), y.double()
        return cls(x.T @ x, x.T @ y, y.square().sum(0))

    @property
    def rows(self) -> float:
        """How many rows went in."""
        return float(self.xx[0, 0])

    def tensors(self) -> list[Tensor]:
        """The sums, to be added up over workers in place."""
        return [self.xx, self.xy, self.yy]

    def error(self, weights: Tensor) -> float:
        """Squared error of x @ weights on these rows, relative to the squares of y."""
        fit = (weights * (self.xx @ weights)).sum() - 2 * (weights * self.xy).sum()
        return float((self.yy.sum() + fit) / self.yy.sum().clamp_min(1e-300))


@dataclass(frozen=True)
class Core:
    """A ridge solution."""

    weights: Tensor
    """(p, k), float64."""
    error: float | None
    """Held-out relative squared error; None where no row was held out."""
    penalty: float


def fit_core(train: Moments, held: Moments) -> Core:
    """Solve with the penalty that is best on held-out rows."""
    if not held.rows or not float(held.yy.sum()):
        return Core(solve(train, BLIND_PENALTY), None, BLIND_PENALTY)
    cores = ((solve(train, penalty), penalty) for penalty in PENALTIES)
    return min((Core(w, held.error(w), penalty) for w, penalty in cores), key=lambda core: core.error or 0.0)


def solve(moments: Moments, penalty: float) -> Tensor:
    """Ridge weights for one penalty, (p, k); zeros without rows."""
    if not moments.rows:
        return torch.zeros_like(moments.xy)
    scale = (moments.xx.diagonal() / moments.rows).sqrt().clamp_min(1e-30)
    shrink = torch.full_like(scale, penalty * moments.rows)
    shrink[0] = 1e-12 * moments.rows
    inside = moments.xx / scale / scale[:, None] + torch.diag(shrink)
    factor = torch.linalg.cholesky(inside)
    return torch.cholesky_solve(moments.xy / scale[:, None], factor) / scale[:, None]

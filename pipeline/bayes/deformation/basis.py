r"""An orthonormal basis of the leading directions of many rows that are read one batch at a time.

Randomised range finder with a power iteration (Halko, Martinsson and Tropp 2011): $Y_1 = A'A\,\Omega$, $Q_1 =
orth(Y_1)$, $Y_2 = A'A\,Q_1$. Two passes over the rows of A; memory is 2 D (k + p) numbers, whatever the number of
rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OVERSAMPLING = 8
"""Extra columns p of the sketch."""
CHUNK = 1 << 20
"""Elements of D handled at once where a float64 copy is made."""


def sketch_width(rank: int, dim: int) -> int:
    """Columns of the sketch: rank and some more, never above D."""
    return min(dim, rank + OVERSAMPLING)


def random_probe(dim: int, width: int, rng: np.random.Generator) -> Tensor:
    """Start of the first pass: standard normal, (D, w), float32."""
    return torch.from_numpy(rng.standard_normal((dim, width), dtype=np.float32))


class Sketch:
    """Sum of R'(R probe) over batches of rows R.

    Attributes:
        total: (D, w).
        energy: Summed squared norm of the rows.
    """

    def __init__(self, probe: Tensor):
        self.probe = probe
        self.total = torch.zeros_like(probe)
        self.energy = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in rows, (b, D)."""
        rows = rows.to(self.probe.dtype)
        self.total.addmm_(rows.T, rows @ self.probe)
        self.energy += rows.double().square().sum() if rows.numel() < CHUNK else rows.square().sum().double()


def orthonormalise_(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span, (D, w) -> (D, r), r <= w; overwrites its argument.

    By the eigenvectors of the Gram matrix, twice: no second copy of D x w, and dependent columns fall out.
    """
    for _ in range(2):
        values, vectors = torch.linalg.eigh(_gram(columns))
        keep = values > values[-1].clamp_min(1e-300) * 1e-10
        columns = _times_(columns, vectors[:, keep].flip(1) * values[keep].flip(0).rsqrt())
    return columns


def leading_basis(sketch: Sketch, rank: int) -> Tensor:
    """Basis of the `rank` leading directions after the second pass, (k, D), rows orthonormal.

    `sketch.probe` holds orthonormal columns. Overwrites `sketch.total`.
    """
    inner = torch.zeros(sketch.probe.shape[1], sketch.probe.shape[1], dtype=torch.float64)
    for part, probe in zip(sketch.total.split(CHUNK), sketch.probe.split(CHUNK), strict=True):
        inner += probe.T.double() @ part.double()
    _, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    leading = _times_(sketch.total, vectors.flip(1)[:, :rank])
    return orthonormalise_(leading).T.contiguous()


def join_bases(first: Tensor, second: Tensor) -> Tensor:
    """Orthonormal rows that span both, (k1, D) and (k2, D) -> (k, D); `first` is kept as it is."""
    rest = second - (second @ first.T) @ first
    rest -= (rest @ first.T) @ first
    size = torch.linalg.vector_norm(rest, dim=1)
    rest = rest[size > 1e-4]
    return torch.cat([first, orthonormalise_(rest.T.contiguous()).T]) if len(rest) else first


def _gram(columns: Tensor) -> Tensor:
    gram = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for part in columns.split(CHUNK):
        part = part.double()
        gram += part.T @ part
    return gram


def _times_(columns: Tensor, matrix: Tensor) -> Tensor:
    """Columns @ matrix, written over the first columns of the argument."""
    width = matrix.shape[1]
    for part in columns.split(CHUNK):
        part[:, :width] = (part.double() @ matrix).to(part.dtype)
    return columns[:, :width]

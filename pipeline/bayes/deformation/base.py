"""What every deformation model offers: draws from random numbers, and its weights as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Outputs = Callable[[Tensor], Tensor]
"""Parameters (n, D) -> network outputs on a fixed sample of training inputs, flattened, (n, F)."""


class Deformation(Protocol):
    """A model of the walk points of one start; a draw is one pass without iteration."""

    @property
    def radius(self) -> float:
        """Radius of a draw unless another is asked for, in units of the parameters."""
        ...

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        ...

    def draw(self, rng: np.random.Generator, n: int, radius: float | None = None) -> Tensor:
        """Independent draws, (n, D); the same generator state gives the same draws."""
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that fixes the draws, for a safetensors file."""
        ...


@dataclass(frozen=True)
class FreeLaw:
    """Where a walk would go without gradients: v = r d, with d a random direction.

    Attributes:
        dim: Number of parameters D.
        scale: Stretch of each coordinate before d is normalised, (D,); None for an isotropic drift.
        unit: The norm of d is one. Without it d = scale * normal / reach, so that v = scale * normal at radius `reach`.
        reach: Radius at which a direction that is not normalised has its own length.
    """

    dim: int
    scale: Tensor | None = None
    unit: bool = True
    reach: float = 1.0

    def directions(self, rng: np.random.Generator, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh directions d, (n, D)."""
        kind = np.float64 if dtype == torch.float64 else np.float32
        normal = torch.from_numpy(rng.standard_normal((n, self.dim), dtype=kind))
        if self.scale is not None:
            normal.mul_(self.scale.to(dtype))
        if not self.unit:
            return normal.div_(self.reach)
        return normal.div_(torch.linalg.vector_norm(normal, dim=1, keepdim=True))

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        tensors = {"free.law": torch.tensor([float(self.dim), float(self.unit), self.reach], dtype=torch.float64)}
        return tensors if self.scale is None else tensors | {"free.scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FreeLaw:
        """Inverse of `to_tensors`."""
        dim, unit, reach = tensors["free.law"].tolist()
        return cls(int(dim), tensors.get("free.scale"), bool(unit), reach)


def deal(shares: Sequence[float], n: int) -> np.ndarray:
    """Which of the sources each of n draws belongs to, (n,), in proportion to their shares and in turns.

    A prefix of a longer answer is the shorter answer.
    """
    times = np.concatenate([(np.arange(n) + 0.5) / share if share else np.full(n, np.inf) for share in shares])
    owner = np.repeat(np.arange(len(shares)), n)
    return owner[np.argsort(times, kind="stable")[:n]]

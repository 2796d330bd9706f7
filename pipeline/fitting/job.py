"""What a fit needs from whoever runs it: one process, or several workers that Ray Train has started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from pipeline.errors import DamagedBlock, RunError
from pipeline.run import Run

FOLDER = "deformation"
HELD_OUT = 10
"""Every so many walks one is held out."""


@dataclass(frozen=True)
class FitJob:
    """Which model of which points. With the number of workers it fixes the weights."""

    start: int
    radius: float
    """Up to which it learns: the selected one, or a smaller one that draws can reach."""
    digest: str
    """Of the blocks to learn from."""

    @property
    def weights(self) -> str:
        """Path of the fitted weights below the run."""
        return weights_path(self.start)

    @property
    def scratch(self) -> str:
        """Folder of checkpoints below the run, gone after success; that of all starts."""
        return f"{FOLDER}/train/{self.digest[:12]}-radius{self.radius:.6g}"

    def fitted(self, run: Run) -> bool:
        """Whether its weights are there."""
        if not run.storage.exists(facts_path(self.start)) or not run.storage.exists(self.weights):
            return False
        facts = run.storage.read_json(facts_path(self.start))
        return facts["trained_on"] == self.digest and facts["radius"] == self.radius


def weights_path(start: int) -> str:
    """Path of the weights of one start below the run."""
    return f"{FOLDER}/weights.safetensors" if start == 0 else f"{FOLDER}/start={start}/weights.safetensors"


def facts_path(start: int) -> str:
    """Path of what a fit found out, below the run."""
    return f"{FOLDER}/start={start}/fit.json"


@dataclass(frozen=True)
class Rows:
    """Recorded points, b of them."""

    walk: np.ndarray
    """(b,)."""
    radius: np.ndarray
    """Drift so far, (b,) float64."""
    potential: np.ndarray
    """(b,) float64."""
    nll: np.ndarray
    """(b,) float64."""
    theta: Tensor
    """(b, D)."""


class Team(Protocol):
    """The workers of one fit, seen from one of them."""

    rank: int
    size: int

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up over workers, in place, the same result on each."""
        ...

    def agree(self, error: RunError | None) -> None:
        """Raise `Refused` on every worker where one of them has met an error, so that none waits for the others."""
        ...

    def rows(self) -> Iterator[Rows]:
        """Points of this worker's walks that the fit wants, none diverged, always in the same order.

        Raises:
            DamagedBlock: As its store.
        """
        ...

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over workers."""
        ...

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Make a checkpoint; called by every worker with the same arguments."""
        ...

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint, None at first."""
        ...


class Refused(RunError):
    """What all workers of a fit have met alike: to try it again would change nothing."""


Told = Callable[[FitJob], None]
"""Told of each fit that has ended."""


class Trainer(Protocol):
    """Fits the deformations of some starts, and leaves their weights and facts in the run's storage."""

    def __call__(self, run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        """Goes on from the last checkpoint of the same jobs, of the same blocks and radius. Raises RunError."""
        ...


@contextlib.contextmanager
def agreed(team: Team) -> Iterator[None]:
    """Here each worker reads for itself: a damaged block that one of them meets is raised on all."""
    met: DamagedBlock | None = None
    try:
        yield
    except DamagedBlock as error:
        met = error
    team.agree(met)


def is_held_out(walk: np.ndarray) -> np.ndarray:
    """Whether walks are kept for judging, (b,) bool."""
    return walk % HELD_OUT == HELD_OUT // 2


def memory_estimate(dim: int, rank: int, batch: int, itemsize: int = 4) -> int:
    """Bytes that one worker of a fit holds at most: D (3 k + 40) numbers, 4 batch D for rows, and `KEPT_BYTES`.

    The sketch holds 2 D (k + 8) and the basis made from it D k; a step along the chain 24 D. What is kept of the walks
    is bounded by `KEPT_BYTES`, whatever their number.
    """
    from pipeline.bayes.deformation.basis import OVERSAMPLING

    columns = min(dim, rank + OVERSAMPLING)
    return dim * itemsize * (2 * columns + min(dim, rank) + 24 + 4 * batch) + KEPT_BYTES


HELD_BYTES = 256 << 20
"""Most bytes of coordinates in the basis that one worker holds; further walks are left out of the fit."""
KEPT_BYTES = 4 * HELD_BYTES
"""Coordinates, and as much each for rows, directions and states that are kept instead of being made again."""

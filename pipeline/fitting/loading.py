"""From stored weights to a deformation that draws. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from pipeline.bayes.deformation.base import Deformation, deal
from pipeline.bayes.deformation.gaussian import Gaussian, Points
from pipeline.bayes.deformation.landed import Landed
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import load_problem
from pipeline.errors import InputError
from pipeline.fitting.job import facts_path, weights_path
from pipeline.fitting.reading import KEEP_BYTES, KeptPoints
from pipeline.run import Run
from pipeline.store import SampleStore

AHEAD_BYTES = 2**30
"""Most bytes of draws that are made ahead of their use."""


@dataclass(frozen=True)
class Source:
    """One of the models that draw for a start."""

    start: int
    name: str
    """learned or gaussian."""
    model: Deformation
    share: float
    """Of the draws of the start, above 0."""


class Supply:
    """Draws of one model, some at a time; which they are does not depend on how many.

    A Gaussian whose points do not fit memory reads all of them to draw: it then draws ahead.

    Args:
        model: Who draws.
        rng: Fixes the draws.
        count: How many there will be.
        radius: Of the draws; None takes that of the model.
    """

    def __init__(self, model: Deformation, rng: np.random.Generator, count: int, radius: float | None = None):
        self._model, self._rng, self._left, self._radius = model, rng, count, radius
        reads = isinstance(model, Gaussian | Landed) and 8 * model.walks * model.dim > KEEP_BYTES
        self._ahead = AHEAD_BYTES // (8 * model.dim) if reads else 0
        self._ready: list[Tensor] = []

    def take(self, n: int) -> Tensor:
        """The next n draws, (n, D)."""
        missing = n - sum(map(len, self._ready))
        if missing > 0:
            more = min(self._left, max(missing, self._ahead))
            self._ready.append(self._model.draw(self._rng, more, self._radius))
            self._left -= more
        ready = torch.cat(self._ready) if len(self._ready) > 1 else self._ready[0]
        self._ready = [ready[n:]] if len(ready) > n else []
        return ready[:n]


def in_batches(
    model: Deformation, rng: np.random.Generator, count: int, most: int, radius: float | None = None
) -> Iterator[Tensor]:
    """`count` draws in batches of at most `most`."""
    supply = Supply(model, rng, count, radius)
    for first in range(0, count, most):
        yield supply.take(min(most, count - first))


def load_sources(run: Run, start: int) -> list[Source]:
    """What draws for one start: the fitted model, a Gaussian of the walks' points, or both; see `gaussian_share`.

    Raises:
        InputError: The run has no deformation yet, was configured without one, or has one of an earlier version; or
            walks are missing that the Gaussian was made from.
    """
    model, facts = load_learned(run, start), run.storage.read_json(facts_path(start))
    if isinstance(model, Gaussian):
        return [Source(start, "gaussian", model, 1.0)]
    if "gaussian_share" not in facts:
        raise InputError(
            f"{facts_path(start)} of {run.uri} does not say what draws: it is of an earlier version. Run its "
            "configuration again, which makes a new run; the walks of the old one can still be exported."
        )
    share = float(facts["gaussian_share"])
    learned = [Source(start, "learned", model, 1 - share)] if share < 1 else []
    if not share:
        return learned
    if "gaussian_lands" not in facts:
        raise InputError(
            f"{facts_path(start)} of {run.uri} is of an earlier version, whose Gaussian draws did not land. Remove the "
            "folder deformation/ and evaluation.json of the run, then run it again: the walks stay."
        )
    gaussian = gaussian_beside(model, SampleStore.open(run.storage), start, float(facts["gaussian_radius"]))
    if gaussian.walks != facts["gaussian_walks"]:
        raise InputError(
            f"{run.uri} has points of {gaussian.walks} walks around start {start}, but {facts['gaussian_walks']} when "
            "its deformation was settled. Run 'fiberwalk run' again: what is missing is computed anew."
        )
    return [*learned, Source(start, "gaussian", gaussian, share)]


def dealt(sources: Sequence[Source], draws: int) -> list[tuple[Source, int]]:
    """How many of the draws of a start each of its models gives."""
    counts = np.bincount(deal([source.share for source in sources], draws), minlength=len(sources))
    return list(zip(sources, counts.tolist(), strict=True))


def gaussian_beside(model: Deformation, store: SampleStore, start: int, radius: float) -> Gaussian | Landed:
    """What draws beside a learned model: the Gaussian of the walks' points, which lands where the model does."""
    if not isinstance(model, Residual):
        return gaussian_of(store, start, radius)
    return Landed(gaussian_of(store, start, radius, model.chain.theta_star), model.landing)


def gaussian_of(store: SampleStore, start: int, radius: float, star: Tensor | None = None) -> Gaussian:
    """The Gaussian of the walks' points at a radius; with theta* it draws at others too, see `_points`."""
    return Gaussian(radius, store.plan.dim, store.undiverged(start), _points(store, start, star))


def load_learned(run: Run, start: int) -> Deformation:
    """The fitted model of one start.

    Raises:
        InputError: The run has no deformation yet, was configured without one, or has one of an earlier version.
    """
    path = weights_path(start)
    present = run.storage.exists(path) and run.storage.exists(facts_path(start))
    if run.config.deformation.kind == "none" or not present:
        raise InputError(
            f"{run.uri} has no deformation model ({path} is missing). Run 'fiberwalk run' with a deformation.kind."
        )
    tensors = load(run.storage.read_checked(path, run.storage.read_json(facts_path(start))["weights_sha256"]))
    if "gaussian" in tensors:
        return Gaussian.from_tensors(tensors, _points(SampleStore.open(run.storage), start))
    if "metric.radius" in tensors:
        from pipeline.bayes.deformation.metric import Metric

        model = Metric.from_tensors(tensors)
        model.radius = drawn_at(run, start, model.radius)
        return model
    if "landing.steps" not in tensors:
        raise InputError(
            f"{path} of {run.uri} was fitted by an earlier version, whose draws have no landing. Remove the folder "
            "deformation/ and evaluation.json of the run, then run it again: the walks stay."
        )
    from pipeline.fitting.looks import looks_of, sample_rows

    store = SampleStore.open(run.storage)
    problem = load_problem(run, start, store.plan)
    samples = sample_rows(run, problem, store.plan, len(tensors["chain.marks"]))
    model = Residual.from_tensors(tensors, *looks_of(problem, samples))
    model.radius = drawn_at(run, start, model.radius)
    return model


def _points(store: SampleStore, start: int, star: Tensor | None = None) -> Points:
    """The walks' points at any radius: those of the nearest record, and with theta* at hand stretched to the radius."""

    def read(radius: float) -> Iterator[Tensor]:
        radii = store.plan.radii()
        stretch = radius / float(radii[np.abs(radii - radius).argmin()])
        for points in store.points(radius, start=start):
            theta = torch.from_numpy(points.theta)
            yield theta if star is None or abs(stretch - 1) < 1e-6 else star + (theta - star) * stretch

    return KeptPoints(read)


def drawn_at(run: Run, start: int, otherwise: float) -> float:
    """Radius of draws unless another is asked for: what `stages.draw_radius` has chosen."""
    path = facts_path(start)
    facts = run.storage.read_json(path) if run.storage.exists(path) else {}
    return float(facts.get("draw_radius", otherwise))

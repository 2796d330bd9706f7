"""From stored weights to a deformation that draws. Nothing is unpickled."""

from __future__ import annotations

import torch
from safetensors.torch import load

from pipeline.bayes.deformation.base import Deformation
from pipeline.bayes.deformation.gaussian import Gaussian, Points
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import load_problem
from pipeline.errors import InputError
from pipeline.fitting.job import facts_path, weights_path
from pipeline.fitting.reading import KeptPoints
from pipeline.run import Run
from pipeline.store import SampleStore


def load_deformation(run: Run, start: int) -> Deformation:
    """What draws for one start: the fitted model, or a Gaussian where `stages.fall_back` has preferred it.

    Raises:
        InputError: The run has no deformation yet, was configured without one, or has one of an earlier version.
    """
    model = load_learned(run, start)
    facts = run.storage.read_json(facts_path(start))
    if facts.get("drawn_by") != "gaussian" or isinstance(model, Gaussian):
        return model
    return gaussian_of(SampleStore.open(run.storage), start, float(facts["draw_radius"]))


def gaussian_of(store: SampleStore, start: int, radius: float) -> Gaussian:
    """The Gaussian of the walks' points at a radius."""
    points = _points(store, start)
    return Gaussian(radius, store.plan.dim, sum(len(batch) for batch in points(radius)), points)


def load_learned(run: Run, start: int) -> Deformation:
    """The fitted model of one start.

    Raises:
        InputError: As `load_deformation`.
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


def _points(store: SampleStore, start: int) -> Points:
    """The walks' points at any recorded radius."""
    return KeptPoints(lambda radius: (torch.from_numpy(p.theta) for p in store.points(radius, start=start)))


def drawn_at(run: Run, start: int, otherwise: float) -> float:
    """Radius of draws unless another is asked for: what `stages.draw_radius` has chosen."""
    path = facts_path(start)
    facts = run.storage.read_json(path) if run.storage.exists(path) else {}
    return float(facts.get("draw_radius", otherwise))

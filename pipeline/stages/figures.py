"""What the report draws from, computed once beside the evaluation, so that the report never needs the data again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from pipeline.bayes.metrics import class_nll
from pipeline.bayes.mixture import mixture_quantile
from pipeline.bayes.predictive import Averaged
from pipeline.data.schema import Part
from pipeline.run import Run
from pipeline.stages.comparison import Comparison
from pipeline.stages.methods import random_draws
from pipeline.stages.paths import Paths, read_points
from pipeline.storage import Storage
from pipeline.store import SampleStore

FIGURES = "evaluation/figures.safetensors"
ROWS = 20_000
"""Most rows of a set whose predictions are kept."""
SHOWN = 12
"""Rows shown as most uncertain and as confidently wrong."""
_WALKS = 24
_GRID = 72
_LINE = 300
_PLANE_BYTES = 2**30


def inputs(run: Run) -> dict[str, Any]:
    """All inputs on which methods predict: test, validation, out-of-distribution sets, and a grid for a figure."""
    data = run.dataset
    sets: dict[str, Any] = {"test": data.test.x}
    if len(data.validation.y):
        sets["validation"] = data.validation.x
    sets.update({f"ood/{name}": x for name, x in data.ood.items()})
    grid = grid_of(run)
    return sets if grid is None else {**sets, "grid": grid}


def grid_of(run: Run) -> np.ndarray | None:
    """A line over one input of a regression, or a square over two inputs of a classification; None otherwise."""
    x = run.dataset.train.x
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind != "f":
        return None
    everything = np.concatenate([x, run.dataset.test.x]) if isinstance(run.dataset.test.x, np.ndarray) else x
    low, high = everything.min(axis=0), everything.max(axis=0)
    margin = 0.15 * (high - low)
    sides = [
        np.linspace(a, b, _LINE if x.shape[1] == 1 else _GRID) for a, b in zip(low - margin, high + margin, strict=True)
    ]
    if x.shape[1] == 1 and run.config.data.task == "regression":
        return sides[0][:, None].astype(x.dtype)
    if x.shape[1] == 2 and run.config.data.task == "classification":
        return np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2).astype(x.dtype)
    return None


def raw_inputs(run: Run, x: np.ndarray) -> np.ndarray:
    """Inputs before standardisation, as the source has them."""
    part = run.dataset.schema.parts
    assert isinstance(part, Part)
    return (x.astype(np.float64) * part.std + part.mean) / part.scale


def collect(
    c: Comparison, store: SampleStore, paths: Paths, radius: float, averages: Mapping[str, Mapping[str, Averaged]]
) -> bytes:
    """Everything the report draws, as one safetensors file of float32 arrays."""
    arrays: dict[str, np.ndarray] = {"test/y": c.targets["test"][:ROWS], "test/index": c.run.dataset.test.index[:ROWS]}
    for method, sets in averages.items():
        for name, averaged in sets.items():
            if name != "validation":
                arrays.update({f"{name}/{method}/{key}": value for key, value in _summary(averaged, name).items()})
    arrays.update(_walk_lines(c, paths))
    arrays.update(_rows(c, averages["walk"]["test"]))
    arrays.update(_training_points(c))
    arrays.update(plane(c, store, paths, radius))
    kept = {
        name: np.ascontiguousarray(a, dtype=np.float64 if a.dtype.kind == "f" else a.dtype)
        for name, a in arrays.items()
    }
    return save({n: a.astype(np.float32) if a.dtype == np.float64 and "/y" not in n else a for n, a in kept.items()})


def read_figures(storage: Storage) -> dict[str, np.ndarray]:
    """The stored arrays by name; empty where there are none. Raises RunError where they are damaged."""
    if not storage.exists(FIGURES):
        return {}
    return load(storage.read_checked(FIGURES, storage.read_json("evaluation.json")["files"][FIGURES]))


def _summary(averaged: Averaged, name: str) -> dict[str, np.ndarray]:
    """What figures need of an average: probabilities or mean and interval, and the two uncertainties."""
    last = None if name == "grid" else ROWS
    result = {"aleatoric": averaged.aleatoric[:last], "epistemic": averaged.epistemic[:last]}
    if averaged.probabilities is not None:
        return result | {"probabilities": averaged.probabilities[:last]}
    assert averaged.mean is not None and averaged.variance is not None
    mean, variance = averaged.mean[:, :last], averaged.variance[:, :last]
    bounds = {"low": mixture_quantile(mean, variance, 0.05), "high": mixture_quantile(mean, variance, 0.95)}
    return result | {"mean": mean.mean(axis=0)} | bounds


def _walk_lines(c: Comparison, paths: Paths) -> dict[str, np.ndarray]:
    """Rise of the summed NLL along some walks, and quantiles over all of them at the median radius of each record."""
    rise = paths.nll - np.asarray(c.star_nll)[paths.start][:, None]
    alive = np.flatnonzero(~paths.diverged)
    some = alive[:: max(1, len(alive) // _WALKS)][:_WALKS]
    middle = np.nanquantile(rise[alive], [0.1, 0.5, 0.9], axis=0)
    at = np.nanmedian(paths.radius[alive], axis=0)
    return {"paths/rise": rise[some], "paths/radius": paths.radius[some], "paths/quantiles": middle, "paths/at": at}


def _rows(c: Comparison, walk: Averaged) -> dict[str, np.ndarray]:
    """The most uncertain test rows and the most confidently wrong (or furthest off) ones, by the walk."""
    y, x = c.targets["test"], c.run.dataset.test.x
    if walk.probabilities is not None:
        wrong = walk.probabilities.argmax(axis=1) != y
        surprise = np.where(wrong, class_nll(walk.probabilities, y), -np.inf)
    else:
        assert walk.mean is not None
        wrong = np.ones(len(y), dtype=bool)
        surprise = np.abs(walk.mean.mean(axis=0) - y) / np.sqrt(walk.total)
    groups = {"uncertain": np.argsort(-walk.total, kind="stable")[:SHOWN]}
    groups["wrong"] = np.argsort(-surprise, kind="stable")[: min(SHOWN, int(wrong.sum()))]
    arrays: dict[str, np.ndarray] = {f"rows/{name}/position": index for name, index in groups.items()}
    if isinstance(x, np.ndarray) and x.dtype.kind == "f" and np.prod(x.shape[1:]) <= 50_000:
        arrays.update({f"rows/{name}/x": raw_inputs(c.run, x[index]) for name, index in groups.items() if len(index)})
    return {name: value for name, value in arrays.items() if len(value)}


def _training_points(c: Comparison) -> dict[str, np.ndarray]:
    """Training points and the grid in their own unit, where the grid is drawn."""
    if "grid" not in c.inputs:
        return {}
    train = c.run.dataset.train
    assert isinstance(train.x, np.ndarray)
    every = slice(None, None, max(1, len(train.y) // 1000))
    return {
        "train/x": raw_inputs(c.run, train.x[every]),
        "train/y": c.own_unit(train.y[every]),
        "test/x": raw_inputs(c.run, np.asarray(c.run.dataset.test.x)[:ROWS]),
        "grid/x": raw_inputs(c.run, c.inputs["grid"]),
    }


def plane(c: Comparison, store: SampleStore, paths: Paths, radius: float) -> dict[str, np.ndarray]:
    """Walks of the first start, and random directions, in the plane of the walks' two main residual directions.

    Coordinates: the two leading principal components of the walk points at the radius, about theta*.
    """
    dim = c.problems[0].network.dim
    most = min(64, _PLANE_BYTES // (8 * dim))
    walks = np.flatnonzero((paths.start == 0) & ~paths.diverged)[:most]
    if len(walks) < 4:
        return {}
    records = paths.records_at(radius)
    theta_star = c.problems[0].theta_star.cpu()
    ends = torch.stack([t - theta_star for t in _points(store, {int(w): {int(records[w])} for w in walks}).values()])
    basis = principal_directions(ends.double())
    followed = {int(w): set(range(paths.radius.shape[1])) for w in walks[:_WALKS]}
    lines = np.zeros((len(followed), paths.radius.shape[1] + 1, 2))
    for _, numbers, record, theta in read_points(store, followed):
        placed = ((theta - theta_star).double() @ basis.T).numpy()
        for number, at, point in zip(numbers.tolist(), record.tolist(), placed, strict=True):
            lines[list(followed).index(number), at + 1] = point
    free = [theta.cpu() for start, theta in random_draws(c, radius) if start == 0]
    scattered = ((torch.cat(free) - theta_star).double() @ basis.T).numpy()
    return {"plane/walks": lines, "plane/ends": (ends.double() @ basis.T).numpy(), "plane/random": scattered}


def principal_directions(points: torch.Tensor) -> torch.Tensor:
    """Two leading principal directions of points (n, D), (2, D), by the Gram matrix; signs make each sum positive."""
    centred = points - points.mean(0)
    _, vectors = torch.linalg.eigh(centred @ centred.T)
    basis = vectors[:, -2:].T.flip(0) @ centred
    basis = basis / torch.linalg.vector_norm(basis, dim=1, keepdim=True).clamp_min(1e-300)
    return basis * torch.where(basis.sum(1, keepdim=True) < 0, -1.0, 1.0)


def _points(store: SampleStore, wanted: dict[int, set[int]]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for _, numbers, _, theta in read_points(store, wanted):
        found.update(dict(zip(numbers.tolist(), theta, strict=True)))
    return dict(sorted(found.items()))


def looks_like_images(x: np.ndarray) -> bool:
    """Whether rows (n, ...) can be shown as grey or colour images."""
    if x.ndim == 2:
        side = round(float(x.shape[1]) ** 0.5)
        return side >= 8 and side * side == x.shape[1]
    return x.ndim in (3, 4) and min(x.shape[-2:]) >= 8 and (x.ndim == 3 or x.shape[1] in (1, 3))

"""Hold the walk and the deformation against controls and baselines on the test rows, and write the numbers down.

Every choice (radius, temperature, prior factor, learning rate) is made before a test target is read. The result is a
function of the stored objects alone: no times, no machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.bayes.baselines.laplace import LARGEST_DIM, Laplace
from pipeline.bayes.bootstrap import Score, finite_or_none, resample_counts
from pipeline.bayes.metrics import (
    HIGHER_IS_BETTER,
    NOT_RANKED,
    classification_scores,
    compare,
    detection_scores,
    regression_scores,
    selective_scores,
)
from pipeline.bayes.predictive import Averaged
from pipeline.errors import RunError
from pipeline.fitting.loading import dealt, in_batches, load_sources
from pipeline.plan import stream
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.stages import figures, methods
from pipeline.stages.comparison import Comparison
from pipeline.stages.methods import Method, Unavailable
from pipeline.stages.paths import Paths, read_paths
from pipeline.stages.table import OURS, evaluation_table, title
from pipeline.store import SampleStore

EVALUATION = "evaluation.json"
DEFORMATION = "deformation/deformation.json"
ANSWERED = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of answered rows at which the selective-prediction curve is stored."""
RESAMPLES = 200
"""Bootstrap resamples of that curve, each of which sorts nothing but adds up every row."""
__all__ = ["EVALUATION", "evaluate", "evaluation_table"]


def evaluate(run: Run, report: Progress) -> None:
    """Write ``evaluation.json`` and what the report draws from, ``evaluation/figures.safetensors``.

    Raises:
        RunError: An earlier stage is not done, or the network's outputs for test rows are not finite.
    """
    store = SampleStore.open(run.storage)
    digest = store.digest()
    if _present(run, digest):
        return
    paths, choice = read_paths(store), run.storage.read_json("radius.json")
    comparison = Comparison.open(run, store.plan, figures.inputs(run))
    found: dict[str, Method] = {}
    skipped: dict[str, str] = {}
    wanted = _builders(comparison, store, paths, choice, found)
    with report.bar("evaluation", len(wanted)) as bar:
        for name, build in wanted.items():
            try:
                found[name] = sound(name, build())
            except Unavailable as reason:
                skipped[name] = str(reason)
                report.note(f"{name} left out: {reason}")
            bar.advance(1, name)
    shown = {name: found[name] for name in wanted if name in found}
    counts = resample_counts(stream(run.config.seed, "bootstrap"), len(comparison.targets["test"]))
    scores = {name: score(comparison, method.averages["test"], counts) for name, method in shown.items()}
    detection = {name: _detection(comparison, shown, name) for name in run.dataset.ood}
    result = {
        **_facts(run, store, paths, choice),
        "methods": {name: _json(values) for name, values in scores.items()},
        "difference": _differences(scores),
        "leaders": _leaders(scores),
        "ood": {name: {method: _json(values) for method, values in by.items()} for name, by in detection.items()},
        "ood_difference": {name: _differences(by) for name, by in detection.items()},
        "selective": {name: selective(comparison, m.averages["test"], counts) for name, m in shown.items()},
        "choices": {name: method.choices for name, method in shown.items() if method.choices},
        "skipped": skipped,
    }
    if run.storage.exists(DEFORMATION):
        result["deformation"] = run.storage.read_json(DEFORMATION)
    averages = {name: method.averages for name, method in shown.items()}
    drawn = figures.collect(comparison, store, paths, choice["radius"], averages)
    run.storage.replace(figures.FIGURES, drawn)
    result["files"] = {figures.FIGURES: hashlib.sha256(drawn).hexdigest()}
    run.storage.replace_json(EVALUATION, result)


def _present(run: Run, digest: str) -> bool:
    """Whether there is an evaluation of these blocks and of the present deformation, with what the report draws."""
    if not run.storage.exists(EVALUATION) or not run.storage.exists(figures.FIGURES):
        return False
    found = run.storage.read_json(EVALUATION)
    deformation = run.storage.read_json(DEFORMATION) if run.storage.exists(DEFORMATION) else None
    return (found["blocks"], found.get("deformation")) == (digest, deformation)


def _builders(
    c: Comparison, store: SampleStore, paths: Paths, choice: dict[str, Any], found: dict[str, Method]
) -> dict[str, Callable[[], Method]]:
    """What to compute, in the order of the table; later entries may use `found` ones."""
    radius, noise = choice["radius"], choice["noise_factor"]
    asked = set(c.run.config.evaluation.baselines)
    if len(c.problems) > 1:
        asked |= {"ensemble", "ensemble_temperature"}
    fitted: list[Laplace | None] = []

    def laplace() -> Laplace | None:
        if not fitted:
            problem = c.problems[0]
            small = problem.network.dim <= LARGEST_DIM
            fitted.append(Laplace.fit(problem.potential, problem.theta_star) if small else None)
        return fitted[0]

    def base(name: str) -> Method:
        if name not in found:
            raise Unavailable(f"needs {name}")
        return found[name]

    baselines: dict[str, Callable[[], Method]] = {
        "temperature": lambda: methods.tempered(c, base("map")),
        "random": lambda: methods.random_directions(c, store.plan.radii()),
        "gaussian": lambda: methods.averaged(c, methods.gaussian_draws(c, store, radius)),
        "laplace": lambda: methods.laplace(c, laplace(), linearised=False),
        "laplace_linearised": lambda: methods.laplace(c, laplace(), linearised=True),
        "laplace_torch": lambda: methods.second_opinion(c),
        "swag": lambda: methods.swag(c),
        "ensemble": lambda: methods.ensemble(c),
        "ensemble_temperature": lambda: methods.tempered(c, base("ensemble")),
    }
    wanted: dict[str, Callable[[], Method]] = {"map": lambda: methods.map_estimate(c)}
    wanted["walk"] = lambda: methods.averaged(c, methods.walk_draws(c, store, paths, radius), noise)
    if "validation" in c.inputs:
        wanted["walk_temperature"] = lambda: methods.tempered(c, base("walk"))
    if c.run.config.deformation.kind != "none":
        wanted["deformation"] = lambda: methods.averaged(c, deformation_draws(c), noise)
    return {**wanted, **{name: build for name, build in baselines.items() if name in asked}}


def sound(name: str, method: Method) -> Method:
    """A method whose predictions on the test rows are numbers.

    Raises:
        RunError: Those of the MAP estimate or of the walk are not.
        Unavailable: Those of another method are not.
    """
    if np.isfinite(method.averages["test"].total).all():
        return method
    if name in ("map", "walk"):
        raise RunError(
            f"The network does not give finite outputs for every test row at the points of the {title(name)}. Look for "
            "operations that overflow, or rows far from all others."
        )
    raise Unavailable("gives predictions that are not finite")


def deformation_draws(c: Comparison, radius: float | None = None) -> Iterator[tuple[int, Tensor]]:
    """Draws of the deformation models, starts in equal parts; at their own radius unless another is given."""
    if not c.run.storage.exists(DEFORMATION):
        raise Unavailable("has not been fitted yet")
    for start, share in enumerate(c.share(c.run.config.evaluation.draws)):
        for source, count in dealt(load_sources(c.run, start), share) if share else ():
            rng = stream(c.run.config.seed, f"evaluate-deformation-{source.name}", start)
            for theta in in_batches(source.model, rng, count, c.batch(), radius):
                yield start, theta


def score(c: Comparison, averaged: Averaged, counts: np.ndarray) -> dict[str, Score]:
    """All metrics of a method on the test rows, in the target's own unit; resamples are the same for every method."""
    y = c.targets["test"]
    if averaged.probabilities is not None:
        return classification_scores(averaged.probabilities, y, averaged.nll_draws, counts, averaged.hit_draws)
    assert averaged.mean is not None and averaged.variance is not None
    return regression_scores(averaged.mean, averaged.variance, y, counts)


def selective(c: Comparison, averaged: Averaged, counts: np.ndarray) -> list[dict[str, float | None]]:
    """Error rate, or RMSE in the target's own unit, when only the most certain share of the test rows is answered."""
    y = c.targets["test"]
    if averaged.probabilities is not None:
        loss = (averaged.probabilities.argmax(axis=1) != y).astype(np.float64)
    else:
        assert averaged.mean is not None
        loss = (averaged.mean.mean(axis=0) - y) ** 2
    points = selective_scores(averaged.total, loss, ANSWERED, counts[:RESAMPLES], root=c.regression)
    return [{"answered": share, **point.to_json()} for share, point in zip(ANSWERED, points, strict=True)]


def _detection(c: Comparison, found: dict[str, Method], name: str) -> dict[str, dict[str, Score]]:
    """Separation of one out-of-distribution set from the test rows, by total and by epistemic uncertainty."""
    scores: dict[str, dict[str, Score]] = {}
    for method, result in found.items():
        inside, outside = result.averages["test"], result.averages[f"ood/{name}"]
        total = detection_scores(inside.total, outside.total, stream(c.run.config.seed, "bootstrap-ood"))
        scores[method] = total
        if inside.draws > 1:
            rng = stream(c.run.config.seed, "bootstrap-ood")
            epistemic = detection_scores(inside.epistemic, outside.epistemic, rng)
            scores[method] |= {f"{metric}_epistemic": value for metric, value in epistemic.items()}
    return scores


def _differences(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, Any]]:
    """Paired differences of our methods to every other one, with a verdict only beyond two errors."""
    result: dict[str, dict[str, Any]] = {}
    for ours in OURS:
        for other in scores if ours in scores else ():
            if other != ours:
                common = [metric for metric in scores[ours] if metric in scores[other]]
                pairs = {m: compare(scores[ours][m], scores[other][m], m.removesuffix("_epistemic")) for m in common}
                result[f"{ours}-{other}"] = pairs
    return result


def _facts(run: Run, store: SampleStore, paths: Paths, choice: dict[str, Any]) -> dict[str, Any]:
    """What was evaluated: sizes, the choice of the radius, and what the walks did."""
    data, plan = run.dataset, store.plan
    distance, slope = (paths.at(values, choice["radius"]) for values in (paths.distance, paths.grad_norm))
    return {
        "run_id": run.config.run_id,
        "task": run.config.data.task,
        "radius": choice["radius"],
        "rule": choice["rule"],
        "gamma": choice["gamma"],
        "radius_curve": choice["curve"],
        "draws": run.config.evaluation.draws,
        "rows": {name: len(getattr(data, name).y) for name in ("train", "validation", "test")},
        "walk": {
            "walks": plan.walks,
            "starts": plan.starts,
            "draws": len(paths.choose(run.config.evaluation.draws)),
            "diverged": int(paths.diverged.sum()),
            "halved": int(paths.halved.any(axis=1).sum()),
            "gradient_evaluations": plan.walks * plan.steps * plan.corrections,
            "dim": plan.dim,
            "length": plan.length,
            "mean_distance": finite_or_none(float(distance.mean())),
            "mean_gradient_norm": finite_or_none(float(slope.mean())),
        },
        "blocks": choice["blocks"],
    }


def _json(scores: dict[str, Score]) -> dict[str, dict[str, float | None]]:
    """Scores as JSON."""
    return {name: value.to_json() for name, value in scores.items()}


def _leaders(scores: dict[str, dict[str, Score]]) -> dict[str, list[str]]:
    """For each metric the best method, followed by those that it does not beat beyond two errors of the difference."""
    result: dict[str, list[str]] = {}
    for metric in next(iter(scores.values())):
        if metric in NOT_RANKED:
            continue
        values = {name: s[metric].value for name, s in scores.items() if math.isfinite(s[metric].value)}
        order = sorted(values, key=lambda name: -values[name] if metric in HIGHER_IS_BETTER else values[name])
        if order:
            best = scores[order[0]][metric]
            tied = [n for n in order[1:] if compare(best, scores[n][metric], metric)["verdict"] != "better"]
            result[metric] = [order[0], *tied]
    return result

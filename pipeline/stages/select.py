"""Choose the radius once for walk, deformation and control: from validation rows, or from the rise of the potential.

A regression has its noise fitted to the average there as well.

Test rows are never looked at here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.bayes.baselines.scaling import fit_noise
from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.predictive import AveragedLikelihood, PredictiveAverage, draw_nll
from pipeline.bayes.trees import row_count, to_tensors
from pipeline.build import Problem, load_problem
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.stages.paths import Paths, read_draws, read_paths, read_points
from pipeline.stages.scale import noise_is_open
from pipeline.store import SampleStore

VALIDATION = "shortest radius whose validation NLL is as good as the best"
RISE = "largest radius whose mean rise of the summed NLL stays below gamma / 2"
NEAREST = "first recorded radius, since the mean rise of the summed NLL is above gamma / 2 at every one"
HELD_BACK = RISE + " and whose validation NLL is as good as the best"
TILTED = "end of the tilted walk, whose endpoints are the draws"

MARGIN = 0.005
"""A radius is as good as the best if it is surely not worse by more than this, relative to 0.5 + the best NLL."""


def select(run: Run, report: Progress) -> None:
    """Write ``radius.json``: the chosen radius, the rule, and the curve over all recorded radii.

    Classification with validation rows takes the left end of the plateau around the best model-averaged validation NLL
    (see `left_of_plateau`); regression, or no validation rows, the largest radius at which the mean rise of the summed
    training NLL over that of the MAP estimate stays below half the effective number of parameters, and at which the
    validation NLL is not worse than its best by more than a standard error; the first one where the rise is above that
    at every radius. Tilted walks count at their end. The choice is for `evaluation.draws` draws. See `noise_factor` for
    the noise.

    Raises:
        RunError: No block is committed, or every walk diverged.
    """
    store = SampleStore.open(run.storage)
    digest = store.digest()
    if run.storage.exists("radius.json") and run.storage.read_json("radius.json")["blocks"] == digest:
        return
    paths = read_paths(store)
    problems = [load_problem(run, start) for start in range(store.plan.starts)]
    radii = store.plan.radii()
    curve = rise_curve(paths, problems, radii)
    if row_count(run.dataset.validation.x):
        for point, score in zip(curve, validation_curve(run, store, paths, problems, radii, report), strict=True):
            point.update(score)
    gamma = float(np.mean([problem.curvature.gamma for problem in problems]))
    choice = choose_radius(curve, gamma, run.config.data.task, tilted=store.plan.tilt == "posterior")
    choice["noise_factor"] = noise_factor(run, store, paths, problems, choice["radius"])
    choice.update(curve=curve, gamma=gamma, draws=run.config.evaluation.draws, blocks=digest)
    run.storage.replace_json("radius.json", choice)
    report.note(f"radius {choice['radius']:.4g} of {radii[-1]:.4g}: {choice['rule']}")
    if choice["noise_factor"] != 1:
        report.note(f"noise of the average: {choice['noise_factor']:.3g} times that of the MAP, by validation NLL")


def noise_factor(run: Run, store: SampleStore, paths: Paths, problems: list[Problem], radius: float) -> float:
    """Factor from the noise of the MAP estimate to that of the model average at a radius; 1 where it stays.

    The noise of the MAP estimate holds its misfit, part of which the average removes. Fitted on the validation rows of
    a regression, where there are enough and the noise is not given.
    """
    if not noise_is_open(run):
        return 1.0
    validation, network = run.dataset.validation, problems[0].network
    x = to_tensors(validation.x, network.dtype, network.device)
    average = PredictiveAverage(problems[0].likelihood)
    for start, theta in read_draws(store, paths, run.config.evaluation.draws, radius):
        average.add(problems[start].network, theta, x, problems[start].likelihood)
    return fit_noise(average.result(), np.asarray(validation.y, dtype=np.float64))


def choose_radius(curve: list[dict[str, Any]], gamma: float, task: str, *, tilted: bool = False) -> dict[str, Any]:
    """Apply the rule to a curve: {"radius", "rule", "validation_radius"}."""
    scores = np.array([np.nan if p["validation_nll"] is None else p["validation_nll"] for p in curve])
    errors = np.array([np.inf if p.get("validation_se") is None else p["validation_se"] for p in curve])
    best = None if np.isnan(scores).all() else float(curve[left_of_plateau(scores, errors)]["radius"])
    if tilted:
        return {"radius": float(curve[-1]["radius"]), "rule": TILTED, "validation_radius": best}
    if task == "classification" and best is not None:
        return {"radius": best, "rule": VALIDATION, "validation_radius": best}
    above = [point["nll_rise"] is None or point["nll_rise"] > gamma / 2 for point in curve]
    last = above.index(True) - 1 if True in above else len(above) - 1
    if last < 0:
        return {"radius": float(curve[0]["radius"]), "rule": NEAREST, "validation_radius": best}
    held = last if best is None else not_worse(scores[: last + 1], errors[: last + 1])
    return {
        "radius": float(curve[held]["radius"]),
        "rule": RISE if held == last else HELD_BACK,
        "validation_radius": best,
    }


def not_worse(scores: np.ndarray, errors: np.ndarray) -> int:
    """Index of the last point whose score exceeds the lowest by no more than its error.

    Validation rows inside the training range are blind to gaps, where longer walks help, but see a walk that harms.
    """
    if np.isnan(scores).all():
        return len(scores) - 1
    return int(np.flatnonzero(scores - np.nanmin(scores) <= errors)[-1])


def left_of_plateau(scores: np.ndarray, errors: np.ndarray) -> int:
    """Shortest radius of the stretch around the best score that is surely as good for all that matters.

    Where the curve is flat, its minimum is decided by noise, and a longer walk lies further from what is known: points
    there are harder to learn and no better. A radius counts as good while its excess over the best and one standard
    error of that paired difference together stay within `MARGIN`. An error that is large does not excuse an excess: at
    short radii it comes from few rows on which the network is confidently wrong, and a small validation split holds
    too few of them.

    Args:
        scores: Mean validation NLL at each radius, (radii,); NaN where there is none.
        errors: Standard error of its paired difference to the best, (radii,).
    """
    best = index = int(np.nanargmin(scores))
    margin = MARGIN * (0.5 + abs(scores[best]))
    while index and scores[index - 1] - scores[best] + errors[index - 1] <= margin:
        index -= 1
    return index


def rise_curve(paths: Paths, problems: list[Problem], radii: np.ndarray) -> list[dict[str, Any]]:
    """Mean rise of the potential and of the summed NLL over their value at each walk's own start, in nats."""
    stars = [problem.theta_star[None] for problem in problems]
    nll = np.array([float(p.potential.nll(star)) for p, star in zip(problems, stars, strict=True)])
    potential = np.array([float(p.potential.value(star)) for p, star in zip(problems, stars, strict=True)])
    rises = (paths.potential - potential[paths.start][:, None], paths.nll - nll[paths.start][:, None])
    curve: list[dict[str, Any]] = []
    for radius in radii:
        means = [finite_or_none(float(paths.at(rise, radius).mean())) for rise in rises]
        curve.append(
            {
                "radius": float(radius),
                "validation_nll": None,
                "validation_se": None,
                "potential_rise": means[0],
                "nll_rise": means[1],
            }
        )
    return curve


def validation_curve(
    run: Run, store: SampleStore, paths: Paths, problems: list[Problem], radii: np.ndarray, report: Progress
) -> list[dict[str, float | None]]:
    """Validation NLL of the model average at every radius, in nats a row, reading every block at most once.

    Returns:
        `validation_nll`, and `validation_se`: the standard error of its paired difference to the best one.
    """
    chosen = paths.choose(run.config.evaluation.draws)
    nearest = np.stack([paths.records_at(radius)[chosen] for radius in radii])
    wanted = {int(walk): set(nearest[:, i].tolist()) for i, walk in enumerate(chosen)}
    users: dict[tuple[int, int], list[int]] = {}
    for (grid, column), record in np.ndenumerate(nearest):
        users.setdefault((int(chosen[column]), int(record)), []).append(grid)
    validation = run.dataset.validation
    network = problems[0].network
    x, y = to_tensors(validation.x, network.dtype, network.device), torch.as_tensor(np.asarray(validation.y))
    averages = [AveragedLikelihood(len(validation.y)) for _ in radii]
    with report.bar("choosing the radius", sum(len(records) for records in wanted.values())) as bar:
        for start, walks, records, theta in read_points(store, wanted):
            problem = problems[start]
            nll = draw_nll(problem.network, problem.likelihood, theta, x, y)
            nll = np.where(np.isnan(nll), np.inf, nll)
            for row, pair in enumerate(zip(walks.tolist(), records.tolist(), strict=True)):
                for grid in users[pair]:
                    averages[grid].add(nll[row : row + 1])
            bar.advance(len(walks))
    # The unit of the target, like every metric that is shown.
    unit = np.log(run.dataset.schema.y_std) if run.config.data.task == "regression" else 0.0
    return paired_scores(np.stack([average.rows() for average in averages]), float(unit))


def paired_scores(rows: np.ndarray, unit: float = 0.0) -> list[dict[str, float | None]]:
    """Mean NLL of each line of rows (radii, rows), and the standard error of its paired difference to the best one."""
    means = np.array([np.nan if (mean := finite_or_none(float(row.mean()))) is None else mean for row in rows])
    if np.isnan(means).all():
        return [{"validation_nll": None, "validation_se": None} for _ in rows]
    with np.errstate(invalid="ignore", divide="ignore"):  # rows without any chance; a single row, of no known error
        errors = np.std(rows - rows[int(np.nanargmin(means))], axis=1) / np.sqrt(rows.shape[1] - 1)
    return [
        {"validation_nll": finite_or_none(float(mean + unit)), "validation_se": finite_or_none(float(error))}
        for mean, error in zip(means, errors, strict=True)
    ]

"""Every method of the table as a stream of draws: the walk, and the controls and baselines it is held against.

Whatever a method can tune is tuned on the validation rows, or by the same rule on training rows as the walk's radius.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.baselines.laplace import LARGEST_DIM, PRIOR_FACTORS, Laplace
from pipeline.bayes.baselines.scaling import fit_noise, fit_scale, rescale, with_noise
from pipeline.bayes.baselines.second_opinion import INSTALL, SecondOpinion
from pipeline.bayes.baselines.swag import RATES, fit_swag
from pipeline.bayes.predictive import Averaged, AveragedLikelihood
from pipeline.fitting.loading import gaussian_of
from pipeline.plan import stream
from pipeline.stages.comparison import Comparison, Draws
from pipeline.stages.draw_radius import draws_at
from pipeline.stages.paths import Paths, read_draws
from pipeline.stages.scale import noise_is_open
from pipeline.stages.select import choose_radius, paired_scores
from pipeline.store import SampleStore

_OUTPUT_BYTES = 2**28


@dataclass(frozen=True)
class Method:
    """A method's predictions on every set of inputs, and what was chosen to get them."""

    averages: dict[str, Averaged]
    choices: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """A baseline that this run cannot have; the message says why."""


def map_estimate(c: Comparison) -> Method:
    """The MAP estimate of the first start."""
    return Method(c.average([(0, c.problems[0].theta_star[None])]))


def ensemble(c: Comparison) -> Method:
    """The average of the MAP estimates of all starts: a deep ensemble."""
    if len(c.problems) < 2:
        raise Unavailable("needs map.starts of at least 2")
    return Method(c.average([(start, p.theta_star[None]) for start, p in enumerate(c.problems)]))


def tempered(c: Comparison, base: Method) -> Method:
    """A method with its temperature (or predictive width) fitted on the validation rows."""
    if "validation" not in base.averages:
        raise Unavailable("needs validation rows (data.validation)")
    scale = fit_scale(base.averages["validation"], c.targets["validation"])
    averages = {name: rescale(a, scale, c.targets.get(name)) for name, a in base.averages.items()}
    return Method(averages, {"temperature": scale})


def averaged(c: Comparison, draws: Draws, noise: float | None = None, **choices: Any) -> Method:
    """A method that averages draws; see `fitted`."""
    return fitted(c, c.average(draws), noise, **choices)


def fitted(c: Comparison, averages: dict[str, Averaged], noise: float | None = None, **choices: Any) -> Method:
    """Averages with a regression's noise multiplied: by a factor fitted for this method, unless one is given."""
    if noise is None:
        noise = fit_noise(averages["validation"], c.targets["validation"]) if noise_is_open(c.run) else 1.0
    if noise != 1:
        choices["noise_factor"] = noise
        averages = {name: with_noise(a, noise) for name, a in averages.items()}
    return Method(averages, choices)


def walk_draws(c: Comparison, store: SampleStore, paths: Paths, radius: float) -> Iterator[tuple[int, Tensor]]:
    """One point of each of the first undiverged walks, starts in equal parts."""
    for start, theta in read_draws(store, paths, c.run.config.evaluation.draws, radius):
        for piece in theta.split(c.batch()):
            yield start, piece


def random_draws(c: Comparison, radius: float) -> Iterator[tuple[int, Tensor]]:
    """theta* plus a random direction of the walk's own law and length `radius`, without correction."""
    number = 0
    for start, share in enumerate(c.share(c.run.config.evaluation.draws)):
        theta_star = c.problems[start].theta_star
        for first in range(0, share, c.batch()):
            lines: list[Tensor] = []
            for _ in range(min(c.batch(), share - first)):
                direction = stream(c.run.config.seed, "evaluate-random", number).standard_normal(len(theta_star))
                lines.append(torch.as_tensor(direction * (radius / np.linalg.norm(direction))).to(theta_star))
                number += 1
            yield start, theta_star + torch.stack(lines)


def random_directions(c: Comparison, radii: np.ndarray) -> Method:
    """Random directions without correction, their radius tuned as the walk's is, on a grid that reaches nearer to 0."""
    grid = np.unique(np.concatenate([np.geomspace(radii[0] / 16, radii[-1], 24), radii]))
    radius = tune_radius(c, lambda r: random_draws(c, r), grid)
    return averaged(c, random_draws(c, radius), radius=radius)


def tune_radius(c: Comparison, draws: Callable[[float], Draws], grid: np.ndarray) -> float:
    """The walk's own rule (`choose_radius`) on a curve of these draws."""
    validated = "validation" in c.inputs
    curve: list[dict[str, Any]] = []
    rows: list[np.ndarray] = []
    for radius in grid:
        rise = c.mean_rise(draws(float(radius))) if c.regression or not validated else None
        if validated:
            rows.append(c.validation_rows(draws(float(radius))))
        curve.append({"radius": float(radius), "nll_rise": rise, "validation_nll": None, "validation_se": None})
        if rise is not None and not rise <= c.gamma / 2:
            break  # the rule never goes beyond
    if validated:
        for point, score in zip(curve, paired_scores(np.stack(rows)), strict=True):
            point.update(score)
    return float(choose_radius(curve, c.gamma, c.run.config.data.task)["radius"])


def gaussian_draws(c: Comparison, store: SampleStore, radius: float) -> Iterator[tuple[int, Tensor]]:
    """Draws of the gaussian control of every start: empirical mean and covariance of its walk points at the radius."""
    starts = range(store.plan.starts)
    if any(store.undiverged(start) < 2 for start in starts):
        raise Unavailable("needs at least two undiverged walks a start")
    # One after the other: each keeps points in memory.
    yield from draws_at(c, (gaussian_of(store, start, radius) for start in starts), radius, "evaluate-gaussian")


def laplace(c: Comparison, model: Laplace | None, linearised: bool) -> Method:
    """Laplace around the first start, sampled or linearised, its prior precision tuned on validation rows."""
    if model is None:
        raise Unavailable(
            f"is for networks of at most {LARGEST_DIM} parameters, this one has {c.problems[0].network.dim}"
        )
    n = c.run.config.evaluation.draws

    def offsets(factor: float) -> Tensor:
        return model.offsets(stream(c.run.config.seed, "evaluate-laplace"), n, factor)

    if linearised:
        return _linearised(c, model, offsets)
    factor = 1.0
    if "validation" in c.inputs:
        factor = min(PRIOR_FACTORS, key=lambda f: c.validation_nll([(0, model.theta_star + offsets(f))]))
    return averaged(c, [(0, model.theta_star + offsets(factor))], prior_factor=factor)


def _linearised(c: Comparison, model: Laplace, offsets: Callable[[float], Tensor]) -> Method:
    likelihood, factor = c.problems[0].likelihood, 1.0
    if "validation" in c.inputs:
        y, scores = torch.as_tensor(np.array(c.run.dataset.validation.y)), list[float]()
        # As many factors in one pass as memory allows: the Jacobians are what costs.
        several = max(1, _OUTPUT_BYTES // (8 * c.run.config.evaluation.draws * len(y) * likelihood.columns))
        for first in range(0, len(PRIOR_FACTORS), several):
            group = PRIOR_FACTORS[first : first + several]
            every = model.linearised(torch.cat([offsets(f) for f in group]), c.tensors["validation"])
            for outputs in every.chunk(len(group)):
                average = AveragedLikelihood(len(y))
                average.add(likelihood.nll(outputs, y).numpy())
                scores.append(float(np.nan_to_num(average.rows().mean(), nan=np.inf)))
        factor = PRIOR_FACTORS[int(np.argmin(scores))]
    averages: dict[str, Averaged] = {}
    for name in c.inputs:
        average = c.new_average(name)
        average.add_outputs(model.linearised(offsets(factor), c.tensors[name]), likelihood)
        averages[name] = average.result()
    return fitted(c, averages, prior_factor=factor)


def second_opinion(c: Comparison) -> Method:
    """Linearised Laplace by laplace-torch around the first start, its prior precision tuned on validation rows."""
    problem, draws = c.problems[0], c.run.config.evaluation.draws
    try:
        model = SecondOpinion(problem.potential, problem.theta_star)
    except ImportError as error:
        raise Unavailable(f"needs laplace-torch ({error}); install it with: {INSTALL}") from error
    except ValueError as error:
        raise Unavailable(str(error)) from error

    def outputs(name: str, factor: float) -> Tensor:
        return model.outputs(c.tensors[name], draws, factor, stream(c.run.config.seed, "evaluate-laplace-torch"))

    def score(factor: float) -> float:
        average = AveragedLikelihood(len(c.run.dataset.validation.y))
        y = torch.as_tensor(np.array(c.run.dataset.validation.y))
        average.add(problem.likelihood.nll(outputs("validation", factor), y).numpy())
        return float(np.nan_to_num(average.rows().mean(), nan=np.inf))

    factor = float(min(PRIOR_FACTORS, key=score)) if "validation" in c.inputs else 1.0
    averages: dict[str, Averaged] = {}
    for name in c.inputs:
        average = c.new_average(name)
        average.add_outputs(outputs(name, factor), problem.likelihood)
        averages[name] = average.result()
    return fitted(c, averages, prior_factor=factor, structure="full" if model.full else "kron")


def swag(c: Comparison) -> Method:
    """SWAG around the first start, its learning rate chosen by validation NLL."""
    if c.run.config.model.weights is not None:
        raise Unavailable("is for networks trained here (model.weights is set)")
    if "validation" not in c.inputs:
        raise Unavailable("needs validation rows (data.validation)")
    problem, seed, n = c.problems[0], c.run.config.seed, c.run.config.evaluation.draws
    unit = problem.potential.rows / problem.curvature.lambda_max
    batch = min(128, max(1, problem.potential.rows // 4))

    models = fit_swag(problem.potential, problem.theta_star, [r * unit for r in RATES], batch, stream(seed, "swag"))

    def draws(number: int) -> Draws:
        return [(0, models[number].draw(stream(seed, "swag-draw"), n))]

    best = min(range(len(RATES)), key=lambda number: c.validation_nll(draws(number)))
    return averaged(c, draws(best), learning_rate=RATES[best] * unit)

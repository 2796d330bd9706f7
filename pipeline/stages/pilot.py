"""Choose correction, length and steps by a few walks that nobody keeps: the automatic settings of a new data set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.predictive import AveragedLikelihood, draw_nll
from pipeline.bayes.trees import to_tensors
from pipeline.bayes.walk import WalkKernel, WalkState, advance, init, secure, set_anchor
from pipeline.build import Problem, load_problem, targets
from pipeline.plan import Shard, WalkPlan
from pipeline.run import Run
from pipeline.shard import build_kernel

CANDIDATES = ("momentum", "plain", "deflated-momentum")
"""Corrections that `walk.correction: auto` compares."""
TILTED = ("plain", "deflated", "momentum", "deflated-momentum")
"""Those for tilted walks, in the order of preference among equals."""
WALKS = 16
"""Walks of a pilot."""
RECORDS = 20
"""Points of its curve."""
FIRST_LENGTH = 2.0
LONGEST = 512.0
SHORTEST = 2.0**-5
WORSE = 0.02
"""A validation NLL is clearly past its best when it is this much higher, relative to 0.5 + the best, in nats a row."""
MOST_STEPS = 800
GAIN = 0.7
"""`steps: auto` doubles the steps while that brings the rise at the best radius below this share of what it was."""
WIDER_GUARD = 2.0
"""Limit of the guard, relative to the usual one, that is tried where the guard has held walks back."""
PAUSED = 0.95
"""A walk was held back if its drift ended below this share of what it would have been."""
EQUAL = 0.002
"""Scores that differ by less, on the same scale, are taken as equal."""


@dataclass(frozen=True)
class Choice:
    """What a pilot found; small enough to travel."""

    correction: str
    length: float
    steps: int
    guard_limit: float
    best_radius: float
    rule: str
    curve: list[dict[str, Any]]
    gradient_evaluations: int


def uses_validation(run: Run) -> bool:
    """Whether validation NLL chooses: for classification with validation rows.

    A small validation split of a regression is blind where it matters, and the rise of the fit does better.
    """
    return run.config.data.task == "classification" and len(run.dataset.validation.y) > 0


def run_pilot(run: Run, plan: WalkPlan) -> Iterator[Choice]:
    """Double the length until the curve is clearly past its best; yields one choice.

    The first correction in question doubles from a short length; the others begin at the best length of the first,
    since their curves reach their best earlier or not much later. The length ends at twice the distance at which
    posterior draws lie where the data say nothing, sqrt(sum 1 / alpha): beyond, the prior forbids. Where the rise
    decides, the walk that gets furthest is taken.

    Where the guard held walks back and validation rows decide, a wider guard is tried, and taken if its score is
    clearly better: with few parameters that the data leave free, walks that fit worse may still predict better.

    Tilted walks have no length to choose: see `_choose_tilted`.
    """
    problem = load_problem(run, 0, dataclasses.replace(plan, compile=False))  # a few walks do not repay a compiler
    if plan.tilt == "posterior":
        yield _choose_tilted(run, plan, problem)
        return
    automatic = run.config.walk.length == "auto"
    trials: list[_Trial] = []
    for candidate in _candidates(run, plan, problem):
        begin = min(trials, key=lambda trial: trial.score).plan.length if trials else FIRST_LENGTH
        trials += _double(run, candidate, problem, begin) if automatic else [_try(run, candidate, problem)]
    best = _shortest_of_the_best(trials) if uses_validation(run) else max(trials, key=lambda trial: trial.radius)
    if automatic and uses_validation(run):
        best = _with_wider_guard(run, best, trials, problem)
    spent, steps = sum(trial.steps for trial in trials), plan.steps
    if run.config.walk.steps == "auto":
        steps, cost = _settle_steps(run, best.plan, problem, best.radius)
        spent += cost
    rule = "validation NLL" if uses_validation(run) else "median rise of the summed NLL = gamma / 2"
    spent *= min(WALKS, plan.walks) * plan.corrections
    yield Choice(
        best.plan.correction, best.plan.length, steps, best.plan.guard_limit, best.radius, rule, best.curve, spent
    )


def _candidates(run: Run, plan: WalkPlan, problem: Problem) -> list[WalkPlan]:
    """Corrections to compare: with validation rows the pilot decides among those that won on some data set."""
    if run.config.walk.correction != "auto" or not uses_validation(run):
        return [plan]
    return _with_corrections(plan, problem, CANDIDATES)


def _with_corrections(plan: WalkPlan, problem: Problem, names: tuple[str, ...]) -> list[WalkPlan]:
    """The same walk with each of these corrections that the curvature at hand allows."""
    known = len(problem.curvature.values)
    whole = dataclasses.replace(plan, rank=known)
    return [whole.with_correction(name) for name in names if known or not name.startswith("deflated")]


def _choose_tilted(run: Run, plan: WalkPlan, problem: Problem) -> Choice:
    """The correction whose endpoints rise by about D / 2 in U, as draws of a Gaussian posterior do on average.

    Validation rows do not decide here: they prefer draws that are sharper or wider than the posterior. Momentum, which
    is best on ill-conditioned linear models, moves too far along the directions of a network that are flat at theta*.
    """
    free, law = run.config.walk.correction == "auto", plan.dim / 2
    plans = _with_corrections(plan, problem, TILTED) if free else [plan]
    tried = [(candidate, _endpoint_rise(run, candidate, problem)) for candidate in plans]
    best, _ = min(tried, key=lambda pair: abs(pair[1] - law) if math.isfinite(pair[1]) else math.inf)
    curve = [{"correction": c.correction, "radius": c.length, "potential_rise": finite_or_none(r)} for c, r in tried]
    spent, steps = len(tried) * plan.steps, plan.steps
    if run.config.walk.steps == "auto":
        steps, cost = _settle_steps(run, best, problem, best.length)
        spent += cost
    rule, spent = "mean rise of U nearest to D / 2", spent * min(WALKS, plan.walks) * plan.corrections
    return Choice(best.correction, best.length, steps, best.guard_limit, best.length, rule, curve, spent)


def _endpoint_rise(run: Run, plan: WalkPlan, problem: Problem) -> float:
    """Mean rise of U at the end of a few walks, in nats; infinite where all diverged."""
    kernel = build_kernel(run, plan, problem, Shard(0, 0, 0, min(WALKS, plan.walks)))
    state = init(kernel)
    for _ in _records(kernel, state):
        pass
    sound = state.position[~state.diverged]
    if not len(sound):
        return math.inf
    star = problem.potential.value(problem.theta_star.detach()[None])
    return float((problem.potential.value(sound).double() - star.double()).mean())


@dataclass(frozen=True)
class _Trial:
    plan: WalkPlan
    radius: float
    """Best radius of the curve."""
    score: float
    """Validation NLL there; or minus the radius where the rise decides."""
    past: bool
    """Whether the curve is past its best at its end."""
    curve: list[dict[str, Any]]
    steps: int
    """Steps that were taken."""


def _with_wider_guard(run: Run, best: _Trial, trials: list[_Trial], problem: Problem) -> _Trial:
    """The best trial, or one with a wider guard that is clearly better; adds what it tried to the trials."""
    if not any(_held_back(trial) for trial in trials if trial.plan.correction == best.plan.correction):
        return best
    wider = dataclasses.replace(best.plan, guard_limit=WIDER_GUARD * best.plan.guard_limit)
    more = list(_double(run, wider, problem, wider.length))
    trials += more
    further = _shortest_of_the_best(more)
    return further if further.score < best.score - WORSE * (0.5 + best.score) else best


def _held_back(trial: _Trial) -> bool:
    """Whether the guard paused the drift, so that the walk ended short of its length."""
    return trial.curve[-1]["radius"] < PAUSED * trial.plan.length * trial.steps / trial.plan.steps


def _shortest_of_the_best(trials: list[_Trial]) -> _Trial:
    """The first trial that is as good as the best: where the curve is flat, a longer walk only costs."""
    best = min(trial.score for trial in trials)
    return next(trial for trial in trials if trial.score <= best + EQUAL * (0.5 + best))


def _double(run: Run, plan: WalkPlan, problem: Problem, length: float) -> Iterator[_Trial]:
    furthest = float((1 / problem.precision.double()).sum().sqrt())
    longest = min(max(2 * furthest if uses_validation(run) else furthest, 2 * FIRST_LENGTH), LONGEST)
    best = float("inf")
    while True:
        trial = _try(run, dataclasses.replace(plan, length=length), problem)
        yield trial
        if length >= longest or trial.past or (uses_validation(run) and trial.score > best + WORSE * (0.5 + best)):
            break
        best, length = min(best, trial.score), min(2 * length, longest)
    # A walk that is too fast for the curvature leaves the fiber early: a shorter and slower one gets further.
    while not uses_validation(run) and best == float("inf") and trial.past and length > SHORTEST:
        length = max(length / 4, SHORTEST)
        trial = _try(run, dataclasses.replace(plan, length=length), problem)
        yield trial


def _try(run: Run, plan: WalkPlan, problem: Problem) -> _Trial:
    """Walk until the curve is clearly past its best, or to the end."""
    if uses_validation(run):
        curve = _curve(run, plan, problem, _past)
        scored = [point for point in curve if point["validation_nll"] is not None]
        if not scored:
            return _Trial(plan, plan.length, math.inf, True, curve, _steps(curve, plan))
        at = min(scored, key=lambda point: point["validation_nll"])
        return _Trial(plan, at["radius"], at["validation_nll"], _past(scored), curve, _steps(curve, plan))
    limit = problem.info["gamma"] / 2
    curve = _curve(run, plan, problem, lambda curve: _crossing(curve, limit) is not None)
    radius, walked = _crossing(curve, limit), _Trial(plan, plan.length, -plan.length, False, curve, _steps(curve, plan))
    if radius is None and _held_back(walked):  # the guard may have let nobody move
        radius = curve[-1]["radius"]
    return walked if radius is None else dataclasses.replace(walked, radius=radius, score=-radius, past=True)


def _past(curve: list[dict[str, Any]]) -> bool:
    """Whether the last score is clearly worse than the best."""
    scores = [point["validation_nll"] for point in curve if point["validation_nll"] is not None]
    return bool(scores) and scores[-1] > min(scores) + 5 * WORSE * (0.5 + min(scores))


def _steps(curve: list[dict[str, Any]], plan: WalkPlan) -> int:
    return len(curve) * max(plan.steps // RECORDS, 1)


def _settle_steps(run: Run, plan: WalkPlan, problem: Problem, radius: float) -> tuple[int, int]:
    """Double the steps while the points come clearly nearer to the fiber; returns steps, and those that it took."""
    gamma, spent = problem.info["gamma"], plan.steps
    rise = _rise_at(_curve(run, plan, problem), radius)
    while plan.steps < MOST_STEPS and rise > 0.1 * gamma:
        longer = dataclasses.replace(plan, steps=2 * plan.steps)
        better = _rise_at(_curve(run, longer, problem), radius)
        spent += longer.steps
        if better > GAIN * rise:
            break
        plan, rise = longer, better
    return plan.steps, spent


def _rise_at(curve: list[dict[str, Any]], radius: float) -> float:
    return min(curve, key=lambda point: abs(point["radius"] - radius))["nll_rise"]


def _crossing(curve: list[dict[str, Any]], limit: float) -> float | None:
    """Radius at which the median rise of the NLL passes the limit, None if it never does."""
    before_radius, before_rise = 0.0, 0.0
    for point in curve:
        if point["nll_rise"] > limit:
            share = (limit - before_rise) / max(point["nll_rise"] - before_rise, 1e-12)
            return before_radius + share * (point["radius"] - before_radius)
        before_radius, before_rise = point["radius"], point["nll_rise"]
    return None


def _curve(
    run: Run, plan: WalkPlan, problem: Problem, enough: Callable[[list[dict[str, Any]]], bool] | None = None
) -> list[dict[str, Any]]:
    """Walk without storing anything; a point of the curve at about `RECORDS` radii, until there are `enough`."""
    shard = Shard(0, 0, 0, min(WALKS, plan.walks))
    kernel = build_kernel(run, plan, problem, shard)
    state = init(kernel)
    x = to_tensors(run.dataset.validation.x, problem.network.dtype, problem.network.device)
    y = targets(run.dataset.validation, problem.network)
    curve: list[dict[str, Any]] = []
    for full in _records(kernel, state):
        if not full:
            break
        sound = state.position[~state.diverged]
        curve.append(
            {
                "radius": float(state.drifts.double().mean()) * plan.length / plan.steps,
                "nll_rise": float(state.nll.median()) - kernel.nll_star,
                "validation_nll": _validation_nll(problem, sound, x, y) if len(y) and len(sound) else None,
            }
        )
        if enough is not None and enough(curve):
            break
    return curve


def _records(kernel: WalkKernel, state: WalkState) -> Iterator[bool]:
    """Walk, with about `RECORDS` points to go back to; yields at each, false where a shorter last stretch ends."""
    every = max(kernel.steps // RECORDS, 1)
    for step in range(1, kernel.steps + 1):
        advance(kernel, state)
        if step % every == 0 or step == kernel.steps:
            secure(state, state.nll)
            set_anchor(state, state.nll)
            yield step % every == 0


def _validation_nll(problem: Problem, theta: Tensor, x: Any, y: Tensor) -> float | None:
    """Mean NLL of the model average over walks; None where it breaks down, and the radius is not chosen."""
    average = AveragedLikelihood(len(y))
    average.add(draw_nll(problem.network, problem.likelihood, theta, x, y))
    return finite_or_none(float(average.rows().mean()))

"""Fit the residual kind: the basis, the learned steps from mark to mark, then the nonlinear remainder."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import FreeLaw
from pipeline.bayes.deformation.basis import (
    Sketch,
    join_bases,
    leading_basis,
    orthonormalise_,
    random_probe,
    sketch_width,
)
from pipeline.bayes.deformation.chain import Chain
from pipeline.bayes.deformation.landing import Landing
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import DTYPES, Problem
from pipeline.fitting.chain import fit_chain
from pipeline.fitting.job import FitJob, Refused, Team
from pipeline.fitting.landing import fit_landing
from pipeline.fitting.looks import looks_of, sample_rows
from pipeline.fitting.reading import Directions, Walks
from pipeline.fitting.remainder import fit_remainder
from pipeline.fitting.stored import marks_of
from pipeline.fitting.term import Term
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run

log = logging.getLogger(__name__)

PRODUCT_WORK = 1e11
"""Rows times parameters times directions up to which the basis is turned into curvature directions."""


def fit_residual(
    run: Run, plan: WalkPlan, problem: Problem, job: FitJob, team: Team
) -> tuple[Residual, dict[str, Any]]:
    """Fit on this team's walks; every worker returns the same model.

    Raises:
        Refused: Fewer than two walks can be learned from.
    """
    marks, selected = marks_of(plan, job.radius)
    dtype = DTYPES[plan.dtype]
    theta_star = problem.theta_star.detach().to("cpu", dtype)
    rank = min(run.config.deformation.rank, plan.dim)
    walks = Walks(team, marks, Directions(run, plan, problem, dtype), theta_star, rank)
    samples = sample_rows(run, problem, plan, len(marks))
    (look, slope), found = looks_of(problem, samples), team.restore()
    if found is None:
        slopes = fit_slopes(team, walks, selected)
        rng = stream(run.config.seed, "deform-basis", job.start)
        known = problem.curvature.vectors.detach().to("cpu", dtype).reshape(-1, plan.dim)[: rank // 2]
        basis, captured = fit_basis(team, walks, slopes, theta_star, rank - len(known), rng)
        basis = towards_curvature(team, problem, known, basis, samples[0])
        chain, squares = Chain(theta_star, basis, marks, float(problem.curvature.gamma), look, captured), []
    else:
        chain, squares = Chain.from_tensors(found[0], look), [list(map(float, s)) for s in found[1]["squares"]]
        step, done = found[1]["step"], len(squares)
        log.warning("Deformation: going on from a checkpoint, %d of %d marks, step %d.", done, len(marks), step)
    fitted = fit_chain(team, walks, chain, selected, squares)
    potentials, levels = walk_levels(team, walks, problem)
    landing = Landing(theta_star, marks, levels, slope)
    model = Residual(job.radius, free_law(run, plan, problem), chain, landing)
    facts: dict[str, Any] = {
        "basis_rank": len(chain.basis),
        "basis_captures": chain.captured,
        "heldout_error_by_radius": [{"radius": r, "error": fitted.error(mark)} for mark, r in enumerate(marks)],
        "heldout_error_linear": fitted.error(selected),
        "heldout_error_outside_basis": fitted.error(selected, 0.0),
        "marks": marks[: selected + 1],
        "look_rows": len(samples[0]),
        "walk_potential_rise": potentials[selected],
    }
    assert fitted.seen is not None
    term = Term(run, problem, model, job, team, potentials[selected], len(samples[0]))
    facts |= fit_remainder(run, job, team, model, fitted, term)
    facts |= fit_landing(team, model, term)
    facts["heldout_error"] = fitted.error(selected, facts["heldout_error_in_basis"])
    return model, facts


def free_law(run: Run, plan: WalkPlan, problem: Problem) -> FreeLaw:
    """How fresh directions are drawn: as the walks' drifts were."""
    if plan.tilt == "none" and plan.drift == "isotropic":
        return FreeLaw(plan.dim)
    scale = problem.precision.detach().to("cpu", DTYPES[plan.dtype]).rsqrt()
    return FreeLaw(plan.dim, scale, unit=plan.tilt == "none", reach=plan.length)


def fit_slopes(team: Team, walks: Walks, selected: int) -> list[float]:
    """Share of the free displacement that walks keep at each mark up to the selected one: least squares.

    Raises:
        Refused: Fewer than two walks can be learned from.
    """
    train, slopes = ~walks.held, []
    for mark, radius in enumerate(walks.marks[: selected + 1]):
        sums = torch.zeros(3, dtype=torch.float64)
        for points in walks.at(mark):
            take = train[points.place]
            v, offset = points.direction[take] * radius, points.offset[take]
            sums += torch.stack([(v * offset).sum(), v.square().sum(), take.sum()]).double()
        team.sum([sums])
        if not torch.isfinite(sums).all():
            raise Refused(
                f"Walks at radius {radius:.3g} lie so far out that their squares overflow, so no deformation can be "
                f"fitted. Lower walk.length, or set deformation.kind: none."
            )
        if sums[2] < 2:
            raise Refused(
                f"Only {int(sums[2])} walks that did not diverge are there to learn from, so no deformation can be "
                "fitted. Use more walks, or deformation.kind: none."
            )
        slopes.append(float(sums[0] / sums[1].clamp_min(1e-300)))
    return slopes


def fit_basis(
    team: Team, walks: Walks, slopes: list[float], theta_star: Tensor, rank: int, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Leading directions of what the slopes leave of offsets, (k, D), and the share of squares that they hold."""
    sketch = Sketch(random_probe(len(theta_star), sketch_width(rank, len(theta_star)), rng))
    train = ~walks.held
    for last in (False, True):
        for mark, slope in enumerate(slopes):
            radius = walks.marks[mark]
            for points in walks.at(mark):
                take = train[points.place]
                sketch.add(points.offset[take] / radius - points.direction[take] * slope)
        energy = sketch.energy[None]
        team.sum([sketch.total, energy])
        if not sketch.total.any():  # slopes leave nothing, as with a single parameter: any direction will do
            return orthonormalise_(sketch.probe[:, :1].clone()).T.to(theta_star).contiguous(), 1.0
        if not last:
            probe = orthonormalise_(sketch.total)
            del sketch
            sketch = Sketch(probe)
    inner = (sketch.probe.T @ sketch.total).double()
    held = torch.linalg.eigvalsh((inner + inner.T) / 2).flip(0)[:rank].sum()
    return leading_basis(sketch, rank).to(theta_star), float(held / energy[0].clamp_min(1e-300))


def towards_curvature(team: Team, problem: Problem, known: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    """Curvature directions at theta*, `known`, and those of the walks, turned to the eigenvectors of the curvature.

    Gains of each direction are step sizes, so directions must not mix curvatures. Where Gauss-Newton products would
    take too long the directions stay as they are. Workers share the products.
    """
    if len(known):
        basis = join_bases(orthonormalise_(known.T.contiguous()).T, basis)
    if len(rows) * basis.shape[1] * len(basis) > PRODUCT_WORK:
        return basis.contiguous()
    part, star = problem.potential.on_rows(rows), problem.theta_star.detach()
    few = max(1, (4 << 20) // basis.shape[1])
    mine = torch.arange(len(basis))[team.rank :: team.size]
    inner = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    for some in mine.split(few) if len(mine) else ():
        inner[some] = (part.gauss_newton(star, basis[some].to(star)).detach().to(basis) @ basis.T).double()
    team.sum([inner])
    inner = inner.nan_to_num()
    _, turn = torch.linalg.eigh((inner + inner.T) / 2)
    return (turn.flip(1).T.to(basis) @ basis).contiguous()


def walk_levels(team: Team, walks: Walks, problem: Problem) -> tuple[list[float], list[float]]:
    """Mean rise over theta* at each mark, of U and of the summed NLL of the walks, in nats."""
    star = problem.theta_star.detach()[None]
    _, nll = problem.potential.nll_gradient(star)
    potential = nll + problem.potential.prior(star)
    found = ((walks.potential, potential), (walks.nll, nll))
    count = torch.tensor(float(len(walks.walk)), dtype=torch.float64)
    sums = [(energy - at_star.double().cpu()).sum(0) for energy, at_star in found]
    team.sum([count, *sums])
    of_potential, of_nll = ((rise / count.clamp_min(1)).clamp_min(0).tolist() for rise in sums)
    return of_potential, of_nll

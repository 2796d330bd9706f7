"""Fit the residual kind: three passes over the walks, ridge cores along the radius, then the nonlinear remainder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import FreeLaw
from pipeline.bayes.deformation.basis import Sketch, leading_basis, orthonormalise_, random_probe, sketch_width
from pipeline.bayes.deformation.chain import Chain, Probe, Stretch
from pipeline.bayes.deformation.residual import Residual
from pipeline.bayes.deformation.ridge import Core, Moments, fit_core
from pipeline.bayes.trees import row_count, take_rows
from pipeline.build import DTYPES, Problem
from pipeline.errors import RunError
from pipeline.fitting.job import HELD_BYTES, FitJob, Team, is_held_out
from pipeline.fitting.reading import Directions, Grid, Walks, offsets
from pipeline.fitting.remainder import fit_remainder
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run

PROBE_OUTPUTS = 128
"""Outputs of one part of the sample of training inputs, at most."""
COMPONENTS = 64
"""Principal components of each part's outputs, at most."""
FOCUS = 0.5
"""Standard deviation of a point's weight in the basis, in the logarithm of its radius over the selected one."""


def fit_residual(
    run: Run, plan: WalkPlan, problem: Problem, job: FitJob, team: Team
) -> tuple[Residual, dict[str, Any]]:
    """Fit on this team's walks; every worker returns the same model.

    Raises:
        RunError: No walk has a point near the selected radius.
    """
    grid = Grid.of(plan, job.radius)
    dtype = DTYPES[plan.dtype]
    theta_star = problem.theta_star.detach().to("cpu", dtype)
    directions = Directions(run, plan, problem, dtype)
    stretch = fit_stretch(team, grid, directions, theta_star)
    rank = min(run.config.deformation.rank, plan.dim)
    rng = stream(run.config.seed, "deform-basis", job.start)
    basis, captured = fit_basis(team, grid, directions, theta_star, stretch, rank, rng)
    probe = probe_of(run, problem, len(grid.marks))
    chain = Chain(theta_star, stretch, basis, grid.nodes, grid.marks, probe)
    walks = project(team, grid, directions, chain)
    walks.inputs, errors = fit_chain(team, grid, directions, chain, walks)
    model = Residual(job.radius, free_law(run, plan, problem), chain)
    facts: dict[str, Any] = {
        "basis_rank": len(basis),
        "basis_captures": captured,
        "heldout_error_by_radius": [{"radius": r, "error": e} for r, e in zip(grid.nodes, errors, strict=True)],
        "heldout_error_linear": errors[grid.selected],
        "heldout_error_outside_basis": whole_error(team, walks, grid.selected, 0.0),
        "marks": [grid.nodes[m] for m in grid.marks],
    }
    facts |= fit_remainder(run, problem, job, team, model, walks, grid)
    facts["heldout_error"] = whole_error(team, walks, grid.selected, facts["heldout_error_in_basis"])
    return model, facts


def free_law(run: Run, plan: WalkPlan, problem: Problem) -> FreeLaw:
    """How fresh directions are drawn: as the walks' drifts were."""
    if plan.tilt == "none" and plan.drift == "isotropic":
        return FreeLaw(plan.dim)
    scale = problem.precision.detach().to("cpu", DTYPES[plan.dtype]).rsqrt()
    return FreeLaw(plan.dim, scale, unit=plan.tilt == "none", reach=plan.length)


def fit_stretch(team: Team, grid: Grid, directions: Directions, theta_star: Tensor) -> Stretch:
    """Share of each coordinate at the selected radius: least squares of offset on v, drawn towards its mean.

    The pull is that of an empirical Bayes estimate: variance between coordinates over that plus the noise of one.
    """
    dim = len(theta_star)
    vv, ve, ee = (torch.zeros(dim, dtype=torch.float64) for _ in range(3))
    count = torch.zeros(1, dtype=torch.float64)
    for part in offsets(team, grid, directions, theta_star):
        take = torch.from_numpy((part.node == grid.selected) & ~is_held_out(part.walk))
        v = part.direction[take] * part.radius[take]
        e = part.offset[take] - v
        vv += v.square().sum(0)
        ve += (v * e).sum(0)
        ee += e.square().sum(0)
        count += int(take.sum())
    team.sum([vv, ve, ee, count])
    if count < 2:
        raise RunError(
            f"Only {int(count)} walks have a point near the radius {grid.nodes[grid.selected]:.4g}, so no "
            "deformation can be learned. Use more walks, or deformation.kind: none."
        )
    slope = ve / vv.clamp_min(1e-300)
    mean = ve.sum() / vv.sum()
    noise = ((ee - ve.square() / vv.clamp_min(1e-300)).clamp_min(0) / (count - 1).clamp_min(1) / vv).mean()
    spread = (slope - mean).square().mean()
    trust = float(((spread - noise) / spread.clamp_min(1e-300)).clamp(0, 1))
    return Stretch((mean + trust * (slope - mean)).to(theta_star), grid.nodes[grid.selected])


def fit_basis(
    team: Team,
    grid: Grid,
    directions: Directions,
    theta_star: Tensor,
    stretch: Stretch,
    rank: int,
    rng: np.random.Generator,
) -> tuple[Tensor, float]:
    """Leading directions of the residuals near the selected radius, (k, D), and the share of squares they hold."""
    radius = grid.nodes[grid.selected]
    sketch = Sketch(random_probe(len(theta_star), sketch_width(rank, len(theta_star)), rng))
    for last in (False, True):
        for part in offsets(team, grid, directions, theta_star):
            take = torch.from_numpy(~is_held_out(part.walk))
            r = part.radius[take]
            weight = torch.exp(-0.5 * ((r / radius).log() / FOCUS) ** 2) / r
            sketch.add(residual_of(part.direction[take], r, part.offset[take], stretch) * weight)
        energy = sketch.energy[None]
        team.sum([sketch.total, energy])
        if not last:
            probe = orthonormalise_(sketch.total)
            del sketch
            sketch = Sketch(probe)
    inner = (sketch.probe.T @ sketch.total).double()
    held = torch.linalg.eigvalsh((inner + inner.T) / 2).flip(0)[:rank].sum()
    return leading_basis(sketch, rank).to(theta_star), float(held / energy[0].clamp_min(1e-300))


def residual_of(direction: Tensor, radius: Tensor, offset: Tensor, stretch: Stretch) -> Tensor:
    """What the stretch leaves of offsets, (b, D)."""
    share = (radius / stretch.radius).clamp_max(1.0)
    return offset - direction * (stretch.slope * (share * radius) + radius)


def project(team: Team, grid: Grid, directions: Directions, chain: Chain) -> Walks:
    """Coefficients of every walk at every node; one pass."""
    nodes, k = len(grid.nodes), len(chain.basis)
    most = HELD_BYTES // (chain.basis.element_size() * k * (nodes + len(grid.marks) + 2))
    place: dict[int, int] = {}
    targets: list[Tensor] = []
    rise: list[Tensor] = []
    squares: list[Tensor] = []
    for part in offsets(team, grid, directions, chain.theta_star):
        rest = residual_of(part.direction, part.radius, part.offset, chain.stretch)
        left = rest @ chain.basis.T
        sizes = torch.stack([(part.offset - part.direction * part.radius).square().sum(1), rest.square().sum(1)], dim=1)
        for row, walk in enumerate(part.walk.tolist()):
            if walk not in place:
                if len(place) >= most:
                    continue
                place[walk] = len(targets)
                targets.append(torch.full((nodes, k), math.nan, dtype=left.dtype))
                rise.append(torch.full((nodes,), math.nan, dtype=torch.float64))
                squares.append(torch.zeros(nodes, 2, dtype=torch.float64))
            targets[place[walk]][part.node[row]] = left[row]
            rise[place[walk]][part.node[row]] = float(part.potential[row])
            squares[place[walk]][part.node[row]] = sizes[row].double()
    if not targets:
        empty = torch.empty(0, nodes, 2, dtype=torch.float64)
        return Walks(np.empty(0, np.int64), chain.basis.new_empty(0, nodes, k), empty[..., 0], empty)
    return Walks(np.array(list(place)), torch.stack(targets), torch.stack(rise), torch.stack(squares))


def probe_of(run: Run, problem: Problem, parts: int) -> Probe:
    """Outputs on a fixed sample of training inputs, dealt to the marks."""
    potential, network = problem.potential, problem.network
    rows = row_count(potential.x)
    count = min(max(1, PROBE_OUTPUTS // problem.likelihood.columns), max(1, rows // parts))
    order = stream(run.config.seed, "deform-probe").permutation(rows)
    index = [torch.as_tensor(order[np.arange(j * count, (j + 1) * count) % rows].copy()) for j in range(parts)]
    samples = [take_rows(potential.x, i.to(network.device)) for i in index]
    chunk = max(1, (64 << 20) // (8 * network.dim))

    def outputs(theta: Tensor, part: int) -> Tensor:
        theta = theta.to(network.device, network.dtype)
        return network.outputs_many(theta, samples[part], chunk).flatten(1).to("cpu", theta.dtype)

    return outputs


def fit_chain(
    team: Team, grid: Grid, directions: Directions, chain: Chain, walks: Walks
) -> tuple[Tensor, list[float | None]]:
    """Cores in the order of the radius. Returns the inputs (w, p) of this worker's walks and the error at each node."""
    batch = max(1, (32 << 20) // (8 * len(chain.theta_star)))
    pieces = [slice(i, i + batch) for i in range(0, len(walks.walk), batch)]

    def over_walks(function: Any) -> Tensor:
        return torch.cat([function(directions.of(walks.walk[piece]), piece) for piece in pieces])

    width = 1 + len(chain.basis)
    x = over_walks(lambda d, _: chain.project(d)) if pieces else chain.basis.new_empty(0, width)
    for mark, node in enumerate(grid.marks):
        chain.before.append(_core(team, walks, x, node).weights.to(x))
        count = chain.probe(chain.theta_star[None], mark).shape[1]
        change = (
            over_walks(lambda d, piece, x=x, mark=mark: chain.outputs_at_mark(d, x[piece], mark))
            if pieces
            else x.new_empty(0, count)
        )
        mean, components = _principal(team, change[~walks.held])
        chain.means.append(mean)
        chain.components.append(components)
        x = torch.cat([x, (change - mean) @ components], dim=1)
    errors: list[float | None] = []
    for node in range(len(grid.nodes)):
        seen = sum(mark <= node for mark in grid.marks)
        widths = [chain.components[j].shape[1] for j in range(seen)]
        core = _core(team, walks, x[:, : width + sum(widths)], node)
        chain.cores.append(core.weights.to(x))
        errors.append(whole_error(team, walks, node, core.error))
    return x, errors


def whole_error(team: Team, walks: Walks, node: int, error: float | None) -> float | None:
    """Squared error over held-out walks relative to that of the free displacement, with what lies outside the basis."""
    chosen = ~walks.targets[:, node, 0].isnan() & walks.held
    sums = [walks.squares[chosen, node].sum(0), walks.targets[chosen, node].double().square().sum()[None]]
    team.sum(sums)
    (full, left), inside = sums[0].tolist(), float(sums[1])
    return None if error is None or not full else (left - inside + error * inside) / full


def _core(team: Team, walks: Walks, x: Tensor, node: int) -> Core:
    there = ~walks.targets[:, node, 0].isnan()
    sums = []
    for chosen in (there & ~walks.held, there & walks.held):
        moments = Moments.of(x[chosen], walks.targets[chosen, node])
        team.sum(moments.tensors())
        sums.append(moments)
    return fit_core(*sums)


def _principal(team: Team, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and leading principal components (F, m) over the rows of all workers."""
    wide = rows.double()
    count, total, square = torch.tensor([float(len(rows))]).double(), wide.sum(0), wide.T @ wide
    team.sum([count, total, square])
    mean = total / count.clamp_min(1)
    values, vectors = torch.linalg.eigh(square / count.clamp_min(1) - torch.outer(mean, mean))
    keep = (values > values[-1].clamp_min(0) * 1e-6) & (values > 0)
    keep[: max(0, len(values) - COMPONENTS)] = False
    # Scaled to unit variance: the ridge and the remainder meet inputs of one size.
    components = vectors[:, keep].flip(1) * values[keep].flip(0).rsqrt()
    return mean.to(rows.dtype), components.to(rows.dtype)

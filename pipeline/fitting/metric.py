"""Fit the metric kind on pairs of consecutive points of walks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.metric import Autoencoder, Metric, metric_loss
from pipeline.build import DTYPES, Problem
from pipeline.fitting.job import FitJob, Refused, Team, agreed, is_held_out
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run
from pipeline.streams import torch_generator

LARGEST_DIM = 200_000
"""Its layers hold D times their width: larger networks want the residual kind."""
LEARNING_RATE = 1e-3
BATCH = 256
POINT_BYTES = 1 << 30
"""Most bytes of points that one worker holds; further walks are left out."""


def fit_metric(
    run: Run, plan: WalkPlan, problem: Problem, job: FitJob, team: Team
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the autoencoder on pairs of consecutive points; every worker returns the same tensors.

    Raises:
        RunError: D is too large for it, or there are no pairs.
    """
    if plan.dim > LARGEST_DIM:
        raise Refused(
            f"deformation.kind: metric is for at most {LARGEST_DIM} parameters, "
            f"this network has {plan.dim}. Use residual."
        )
    dtype = DTYPES[plan.dtype]
    star = problem.theta_star.detach().to("cpu", dtype)
    radii = torch.as_tensor(plan.radii())
    walks, points = _collect(plan, team, star, radii)
    held = torch.from_numpy(is_held_out(walks))
    there = ~points[:, :, 0].isnan()
    scale = _scale(team, points[~held], there[~held])
    settings = run.config.deformation
    model = Autoencoder(plan.dim, min(settings.rank, plan.dim), settings.hidden).to(dtype)
    model.reset(torch_generator(stream(run.config.seed, "deform-init", job.start)))
    losses = _train(run, job, team, model, points / scale, there & ~held[:, None])
    means, roots, error = _latents(team, model, points / scale, there, held)
    selected = int((radii - job.radius).abs().argmin())
    fitted = Metric(job.radius, star, scale, model, radii, means, roots)
    return fitted.to_tensors(), {"heldout_error": error[selected], "curve": losses, "latent": means.shape[1]}


def _collect(plan: WalkPlan, team: Team, star: Tensor, radii: Tensor) -> tuple[np.ndarray, Tensor]:
    """Offsets of this worker's walks at each recorded radius, (w, radii, D); NaN where there is none."""
    most = max(1, POINT_BYTES // (len(radii) * plan.dim * star.element_size()))
    place: dict[int, int] = {}
    points: list[Tensor] = []
    with agreed(team):
        for rows in team.rows():
            nodes = (torch.from_numpy(rows.radius)[:, None] - radii).abs().argmin(dim=1).tolist()
            for row, (walk, node) in enumerate(zip(rows.walk.tolist(), nodes, strict=True)):
                if walk not in place:
                    if len(place) >= most:
                        continue
                    place[walk] = len(points)
                    points.append(torch.full((len(radii), plan.dim), torch.nan, dtype=star.dtype))
                points[place[walk]][node] = rows.theta[row].to(star) - star
    return np.array(list(place), dtype=np.int64), torch.stack(points) if points else star.new_empty(
        0, len(radii), plan.dim
    )


def _scale(team: Team, points: Tensor, there: Tensor) -> Tensor:
    """One number for all coordinates, so that distances keep their meaning: root mean square of the offsets."""
    sums = [points[there].double().square().sum()[None], there.double().sum()[None] * points.shape[2]]
    team.sum(sums)
    return (sums[0] / sums[1].clamp_min(1)).sqrt().clamp_min(1e-12).to(points.dtype)


def _pairs(run: Run, team: Team, train: Tensor) -> Tensor:
    """Walk and radius of this worker's points that have a next one, (pairs, 2); raises where no worker has any."""
    pairs = torch.nonzero(train[:, :-1] & train[:, 1:])
    count = torch.tensor([float(len(pairs))], dtype=torch.float64)
    team.sum([count])
    if not count:
        raise Refused(
            "deformation.kind: metric needs points of a walk at two recorded radii that follow each other, and no walk "
            f"has them. Use a smaller walk.record_every (it is {run.config.walk.record_every}), or another kind."
        )
    return pairs


def _train(
    run: Run, job: FitJob, team: Team, model: Autoencoder, points: Tensor, train: Tensor
) -> list[dict[str, Any]]:
    pairs = _pairs(run, team, train)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    first, curve = 0, []
    found = team.restore()
    if found is not None:
        first, curve = int(found[1]["step"]), list(found[1]["curve"])
        model.load_state_dict({k.removeprefix("now."): v for k, v in found[0].items() if k.startswith("now.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in found[0].items():
            if name.startswith("optimiser."):
                _, index, field = name.split(".", 2)
                state.setdefault(int(index), {})[field] = value
        optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    wrapped, steps = team.wrap(model), run.config.deformation.steps
    for step in range(first, steps):
        rng = stream(run.config.seed, "deform-batch", job.start, step, team.rank)
        size = max(2, BATCH // team.size)
        if len(pairs):
            chosen = pairs[torch.as_tensor(rng.integers(len(pairs), size=size))]
            loss = metric_loss(wrapped, points[chosen[:, 0], chosen[:, 1]], points[chosen[:, 0], chosen[:, 1] + 1])
        else:  # a worker without walks still takes its part in every exchange
            loss = sum(part.sum() for part in wrapped(points.new_zeros(1, points.shape[2]))) * 0.0
        optimiser.zero_grad()
        torch.as_tensor(loss).backward()
        optimiser.step()
        if (step + 1) % max(1, steps // 5) == 0:
            curve.append({"step": step + 1, "loss": finite_or_none(float(torch.as_tensor(loss).detach()))})
            tensors = {f"now.{name}": value for name, value in model.state_dict().items()}
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
            team.save(step + 1, {k: v.detach().clone() for k, v in tensors.items()}, {"step": step + 1, "curve": curve})
    return curve


@torch.no_grad()
def _latents(
    team: Team, model: Autoencoder, points: Tensor, there: Tensor, held: Tensor
) -> tuple[Tensor, Tensor, list[float | None]]:
    """Mean and root of the covariance of the latents at each radius, and the reconstruction error of held-out walks."""
    means, roots, errors = [], [], []
    for node in range(points.shape[1]):
        train, judge = points[there[:, node] & ~held, node], points[there[:, node] & held, node]
        z = model.encoder(train).double()
        sums = [torch.tensor([float(len(z))]).double(), z.sum(0), z.T @ z]
        rest = (model(judge)[1] - judge).double().square().sum()[None] if len(judge) else torch.zeros(1).double()
        sums += [rest, judge.double().square().sum()[None]]
        team.sum(sums)
        count = float(sums[0].clamp_min(1))
        mean = sums[1] / count
        covariance = (sums[2] / count - torch.outer(mean, mean)) * (count / max(count - 1, 1))
        values, vectors = torch.linalg.eigh(covariance)
        means.append(mean)
        roots.append(vectors * values.clamp_min(0).sqrt())
        errors.append(float(sums[3] / sums[4]) if float(sums[4]) > 0 else None)
    return torch.stack(means).to(points.dtype), torch.stack(roots).to(points.dtype), errors

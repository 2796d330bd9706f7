"""Train the nonlinear remainder: held-out walks say when to stop, and whether to keep it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.remainder import Remainder
from pipeline.bayes.deformation.residual import Residual
from pipeline.fitting.chain import Fitted, Seen
from pipeline.fitting.job import FitJob, Team
from pipeline.fitting.term import MARGIN, Judge, Term
from pipeline.plan import stream
from pipeline.run import Run
from pipeline.streams import torch_generator

BATCH = 256
"""Walks of a step, over all workers."""
UNIT = 0.1
"""Size of the remainder's unit relative to what the chain leaves."""
WEIGHT = 1.0
"""First weight of the logarithm of the rise of U over that of the walks, against the relative squared error."""
LARGEST_WEIGHT = 4.0
GROWTH, FALL = 1.6, 0.8
"""How `auto` changes the weight at each judgement, while draws lie above or near the walks."""
SAVE_EVERY = 4
"""Judgements between checkpoints."""
PATIENCE = 12
"""Judgements without progress after which it stops."""
LEARNED = 0.005
"""Score of the chain alone at which nothing is left to gain."""
LEARNING_RATE = 3e-3
DECAY = 1e-2


def fit_remainder(run: Run, job: FitJob, team: Team, model: Residual, fitted: Fitted, term: Term) -> dict[str, Any]:
    """Train on top of the chain of `model` and set `model.remainder` if it helps. Returns facts for the report."""
    settings, seen = run.config.deformation, fitted.seen
    assert seen is not None
    sums = _sums(team, seen)
    steps = term.work.steps
    facts: dict[str, Any] = {"steps": steps}
    if not steps or sums["count"] < 2:
        return facts | {"heldout_error_in_basis": sums["error"], "remainder": False, "curve": []}
    remainder = _new(run, job, model, seen, sums, settings.hidden)
    judge = Judge(team, term, seen)
    curve = _train(run, job, team, remainder, term, judge, steps, fitted.squares)
    best = min(curve, key=lambda point: point["score"])
    facts |= {"curve": curve, "remainder": bool(best["step"] > 0), "heldout_error_in_basis": best["heldout_error"]}
    if best["step"] > 0:
        model.remainder = remainder
    return facts


def _train(
    run: Run,
    job: FitJob,
    team: Team,
    remainder: Remainder,
    term: Term,
    judge: Judge,
    steps: int,
    squares: list[list[float]],
) -> list[dict[str, Any]]:
    """Adam with a falling rate; leaves the best weights in `remainder`. Goes on from the last checkpoint."""
    optimiser = torch.optim.AdamW(remainder.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    best = {name: value.clone() for name, value in remainder.state_dict().items()}
    first, curve, found = 0, [judge(remainder, 0)], team.restore()
    if curve[0]["score"] <= LEARNED:
        return curve
    if found is not None and found[1]["step"]:
        first, curve = int(found[1]["step"]), list(found[1]["curve"])
        best = _load(found[0], remainder, optimiser)
    wrapped = team.wrap(remainder)
    remainder.train()
    every = max(1, steps // term.work.checks)
    for step in range(first, steps):
        _set_rate(optimiser, step, steps)
        loss = _loss(run, job, team, wrapped, remainder, term, judge, step, weight_after(run, curve))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(remainder.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % every == 0:
            told = {"weight": weight_after(run, curve), "loss": finite_or_none(float(loss.detach()))}
            curve.append(judge(remainder, step + 1) | told)
            if curve[-1]["score"] <= min(point["score"] for point in curve):
                best = {name: value.clone() for name, value in remainder.state_dict().items()}
            if len(curve) % SAVE_EVERY == 0:
                tensors = _dump(remainder, optimiser, best) | term.model.chain.to_tensors()
                team.save(step + 1, tensors, {"step": step + 1, "curve": curve, "squares": squares})
            if len(curve) - 1 - min(range(len(curve)), key=lambda i: curve[i]["score"]) >= PATIENCE:
                break
    remainder.load_state_dict(best)
    remainder.eval()
    return curve


def _set_rate(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A short rise, then half a cosine down to zero."""
    for group in optimiser.param_groups:
        rise = min(50, 1 + steps // 4)
        group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def weight_after(run: Run, curve: list[dict[str, Any]]) -> float:
    """Weight of the likelihood term, from the judgements so far: it grows while draws rise more than the walks."""
    fixed = run.config.deformation.likelihood_weight
    if fixed != "auto":
        return float(fixed)
    weight = WEIGHT
    for point in curve:
        weight *= GROWTH if point["rise_ratio"] is None or point["rise_ratio"] > MARGIN else FALL
        weight = min(weight, LARGEST_WEIGHT)
    return weight


def _loss(
    run: Run,
    job: FitJob,
    team: Team,
    wrapped: Callable[..., Tensor],
    remainder: Remainder,
    term: Term,
    judge: Judge,
    step: int,
    weight: float,
) -> Tensor:
    """Relative squared error on a batch of walks plus the likelihood term on fresh directions."""
    rng = stream(run.config.seed, "deform-batch", job.start, step, team.rank)
    noise = torch_generator(rng)
    count = len(judge.train)
    size = min(count, max(1, BATCH // team.size))
    chosen = judge.train[torch.as_tensor(rng.choice(count, size, replace=False))] if count else judge.train
    inputs, base = judge.seen.inputs[chosen], None
    if weight:
        base, fresh = term.fresh(step)
        inputs = torch.cat([inputs, fresh])
    outputs = wrapped(inputs, noise)
    unit = (remainder.unit[0] / UNIT).square().to(outputs.dtype)
    loss = (outputs[:size] - judge.seen.left[chosen]).square().sum(1).mean() / unit if size else outputs.sum() * 0
    if base is not None:
        pulled, _ = term.pull(base, outputs[size:], step)
        loss = loss + weight * pulled
    return loss


def _sums(team: Team, seen: Seen) -> dict[str, Any]:
    """Statistics of inputs and of what is left over the training walks of all workers."""
    train, held = ~seen.held, seen.held
    x = seen.inputs[train].double()
    sums = [
        torch.tensor([float(train.sum())]).double(),
        x.sum(0),
        x.square().sum(0),
        seen.left[train].double().square().sum()[None],
    ]
    errors = [part[held].double().square().sum()[None] for part in (seen.left, seen.target)]
    team.sum(sums + errors)
    count = float(sums[0])
    mean = sums[1] / max(count, 1)
    std = (sums[2] / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    error = float(errors[0] / errors[1]) if float(errors[1]) > 0 else None
    return {"count": count, "mean": mean, "std": std, "rms": math.sqrt(float(sums[3]) / max(count, 1)), "error": error}


def _new(run: Run, job: FitJob, model: Residual, seen: Seen, sums: dict[str, Any], hidden: Any) -> Remainder:
    dtype = seen.inputs.dtype
    center, scale = sums["mean"].clone(), sums["std"].clamp_min(1e-12)
    center[0], scale[0] = 0.0, 1.0
    unit = UNIT * max(sums["rms"], 1e-12)
    k = len(model.chain.basis)
    remainder = Remainder(center.to(dtype), scale.to(dtype), unit, model.radius, k, hidden).to(dtype)
    remainder.reset(torch_generator(stream(run.config.seed, "deform-init", job.start)))
    return remainder


def _dump(remainder: Remainder, optimiser: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint as named tensors."""
    tensors = {f"now.{name}": value for name, value in remainder.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _load(tensors: dict[str, Tensor], remainder: Remainder, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Inverse of `_dump`; returns the best weights."""
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimiser": {}}
    for name, value in tensors.items():
        kind, rest = name.split(".", 1)
        if kind in parts:
            parts[kind][rest] = value
    remainder.load_state_dict(parts["now"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimiser"].items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return parts["best"]

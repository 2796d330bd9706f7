"""How far out the deformation draws: tuned by the same rule as the radius of walks and of every control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.base import Deformation
from pipeline.fitting.loading import in_batches
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run
from pipeline.stages.comparison import Comparison
from pipeline.stages.select import not_worse, paired_scores

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)
"""Candidates, relative to the walks' radius."""
FEW_SHARES = (1.0, 0.5, 0.25)
"""Where a draw is long."""
EQUAL = 0.002
"""Scores that differ by less, relative to 0.5 + the best validation NLL in nats a row, are equal in practice."""
LONG = 1_000_000
SPARE = 1.1
"""The NLL of the average may rise by so much more than the limit of the walks."""


def choose_draw_radius(run: Run, plan: WalkPlan, models: list[Deformation], choice: dict[str, Any]) -> dict[str, Any]:
    """Walks reach a radius that a model may not have learned to reach: then it draws nearer to the MAP estimate.

    Classification with validation rows: the largest share of the walks' radius whose validation NLL exceeds the best by
    no more than `EQUAL` or the standard error of the paired difference: what is learned from walks at their radius
    belongs there, unless it surely harms. Otherwise the largest at which the summed training NLL of the average of
    draws rises no more than the mean over walks does at their radius, or than gamma / 2. It is the average that
    predicts: a few draws that lie too high do it little harm, and draws that are too near to each other leave gaps
    unseen.

    Returns:
        {"draw_radius", "draw_radius_curve": [{"radius", "validation_nll" or "nll_rise"}]}
    """
    rows = run.dataset.validation
    by_validation = run.config.data.task == "classification" and len(rows.y) > 0
    c = Comparison.open(run, plan, {"validation": rows.x} if by_validation else {})
    shares = SHARES if plan.dim < LONG else FEW_SHARES
    radii = [share * float(choice["radius"]) for share in shares]
    curve: list[dict[str, Any]] = []
    if by_validation:
        scores = paired_scores(np.stack([c.validation_rows(draws_at(c, models, radius)) for radius in radii]))
        curve = [{"radius": radius} | score for radius, score in zip(radii, scores, strict=True)]
        chosen = _furthest(curve)
    else:
        limit = SPARE * max(c.gamma / 2, (walks_at_radius(choice)["nll_rise"] or 0.0))
        for radius in radii:
            curve.append({"radius": radius, "nll_rise": finite_or_none(c.average_rise(draws_at(c, models, radius)))})
            if curve[-1]["nll_rise"] is not None and curve[-1]["nll_rise"] <= limit:
                break
        chosen = float(curve[-1]["radius"])
    return {"draw_radius": chosen, "draw_radius_curve": curve}


def _furthest(curve: list[dict[str, Any]]) -> float:
    """Radius of the first candidate, the candidates falling, that is not surely worse than the best one."""
    rising = curve[::-1]
    scores = np.array([np.nan if p["validation_nll"] is None else p["validation_nll"] for p in rising])
    if np.isnan(scores).all():
        return float(rising[0]["radius"])
    errors = np.array([p["validation_se"] or 0.0 for p in rising])
    equal = EQUAL * (0.5 + abs(np.nanmin(scores)))
    return float(rising[not_worse(scores, np.maximum(errors, equal))]["radius"])


def draws_at(
    c: Comparison, models: Iterable[Deformation], radius: float, purpose: str = "deform-radius"
) -> Iterator[tuple[int, Tensor]]:
    """Draws of the models of all starts, (start, (n, D)): the same random numbers at every radius."""
    for start, (model, share) in enumerate(zip(models, c.share(c.run.config.evaluation.draws), strict=True)):
        rng = stream(c.run.config.seed, purpose, start)
        for theta in in_batches(model, rng, share, c.batch(), radius):
            yield start, theta


def walks_at_radius(choice: dict[str, Any]) -> dict[str, Any]:
    """What `radius.json` says of the walks at the chosen radius."""
    return min(choice["curve"], key=lambda point: abs(point["radius"] - choice["radius"]))

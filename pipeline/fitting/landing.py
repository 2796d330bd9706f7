"""How many steps a landing takes: as few as bring fresh draws down to the walks."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.bayes.deformation.residual import Residual
from pipeline.fitting.job import Team
from pipeline.fitting.term import MARGIN, Term

MOST_STEPS = 8
"""Each is one more look of a draw."""


@torch.no_grad()
def fit_landing(team: Team, model: Residual, term: Term) -> dict[str, Any]:
    """Set the number of steps of `model.landing`; returns facts for the report.

    It is the first after which the mean rise of U of fresh draws is at most `MARGIN` times that of the walks, or else
    the best.
    """
    landing, star = model.landing, model.chain.theta_star
    offset = model.learned(term.directions("deform-landing", 0, max(2, 4 * term.count)), model.radius)
    last, ratios = None, [_ratio(team, term, offset + star)]
    while ratios[-1] > MARGIN and len(ratios) <= MOST_STEPS:
        offset, last = landing.step(offset, last, model.radius, len(ratios) - 1)
        ratios.append(_ratio(team, term, offset + star))
    landing.steps = min(range(len(ratios)), key=lambda steps: ratios[steps])
    return {"landing_steps": landing.steps, "landing_rise_ratios": [r if math.isfinite(r) else None for r in ratios]}


def _ratio(team: Team, term: Term, position: torch.Tensor) -> float:
    """Mean rise of U over that of the walks; infinite where a draw has none."""
    rise = term.rise(position)
    sums = torch.stack([rise.sum(), torch.tensor(float(len(rise)), dtype=torch.float64)])
    team.sum([sums])
    ratio = float(sums[0] / sums[1]) / term.walk_rise
    return ratio if math.isfinite(ratio) else math.inf

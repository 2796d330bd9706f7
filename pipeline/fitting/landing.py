"""How many steps a landing takes: as few as bring fresh draws down to the walks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.bayes.deformation.residual import Residual
from pipeline.fitting.job import Team
from pipeline.fitting.term import Term
from pipeline.fitting.work import JUDGED

MOST_STEPS = 12
"""Each is one more look of a draw."""
LANDED = 1.2
"""Mean rise of the summed NLL of draws over that of the walks at which they have landed ..."""
SLACK = 0.5
"""... and so many nats more, which are nothing over all rows."""


@torch.no_grad()
def fit_landing(team: Team, model: Residual, term: Term) -> dict[str, Any]:
    """Set the number of steps of `model.landing`; returns facts for the report.

    It is the first after which fresh draws have landed, or else that with the lowest mean rise.
    """
    landing, star = model.landing, model.chain.theta_star
    level = landing.level(model.radius)
    offset = model.learned(term.directions("deform-landing", 0, max(2, JUDGED * term.count)), model.radius)
    rises, way_down = [_mean(team, term.nll_rise(offset + star))], landing.way_down(offset, model.radius)
    while rises[-1] > LANDED * level + SLACK and len(rises) <= MOST_STEPS:
        rises.append(_mean(team, term.nll_rise(next(way_down) + star)))
    landing.steps = min(range(len(rises)), key=lambda steps: rises[steps])
    return {
        "landing_steps": landing.steps,
        "landing_nll_rise": [rise if math.isfinite(rise) else None for rise in rises],
        "walk_nll_rise": level,
    }


def _mean(team: Team, rise: Tensor) -> float:
    """Over the draws of all workers; infinite where a draw has no finite one."""
    sums = torch.stack([rise.sum(), torch.tensor(float(len(rise)), dtype=torch.float64)])
    team.sum([sums])
    mean = float(sums[0] / sums[1])
    return mean if math.isfinite(mean) else math.inf

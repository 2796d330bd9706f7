"""Who draws: what was learned, or a Gaussian of the walks' points where validation rows say that it predicts better.

A learned model wants walks. From a few dozen in thousands of dimensions a combination of their points may be worth more
than what can be learned from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.bayes.deformation.base import Deformation
from pipeline.plan import WalkPlan
from pipeline.run import Run
from pipeline.stages.comparison import Comparison
from pipeline.stages.draw_radius import EQUAL, draws_at
from pipeline.stages.methods import Unavailable, gaussian_draws
from pipeline.stages.select import paired_scores
from pipeline.store import SampleStore


def choose_source(
    run: Run, store: SampleStore, plan: WalkPlan, models: list[Deformation], selected: float, drawn_at: float
) -> dict[str, Any]:
    """Classification with validation rows: the Gaussian at the walks' radius, if learned draws are surely worse.

    Surely: by more than one standard error of the paired difference and than `EQUAL`, as for radii. No test row is
    seen.

    Args:
        run: The run.
        store: Its walks.
        plan: Of them.
        models: What was learned, one a start.
        selected: Radius of the walks.
        drawn_at: That of learned draws.

    Returns:
        {"drawn_by": "learned" or "gaussian", "learned_validation_nll", "gaussian_validation_nll", "draw_radius"}
    """
    learned = {"drawn_by": "learned", "draw_radius": drawn_at}
    rows = run.dataset.validation
    if run.config.data.task != "classification" or not len(rows.y):
        return learned
    c = Comparison.open(run, plan, {"validation": rows.x})
    try:
        gaussian = c.validation_rows(gaussian_draws(c, store, selected))
    except Unavailable:
        return learned
    scores = paired_scores(np.stack([c.validation_rows(draws_at(c, models, drawn_at)), gaussian]))
    ours, theirs = (score["validation_nll"] for score in scores)
    told = {"learned_validation_nll": ours, "gaussian_validation_nll": theirs}
    if theirs is None:
        return learned | told
    worst = max(scores[0]["validation_se"] or 0.0, EQUAL * (0.5 + abs(theirs)))
    if ours is not None and ours <= theirs + worst:
        return learned | told
    return {"drawn_by": "gaussian", "draw_radius": selected} | told

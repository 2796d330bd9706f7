r"""How many draws a Gaussian of the walks' points gives beside what was learned: what validation rows say.

Of n draws of the mixture $m_w = (1 - w)\,p + w\,q$ about w n are of the Gaussian q, the others of the learned model p.
Before the validation rows are seen every w of `SHARES` is as likely as any other. Given them, the density of a new row
is that of the mixture at

$$w = \sum_w w \prod_i m_w(y_i) \Big/ \sum_w \prod_i m_w(y_i) ,$$

so that nothing is tuned: few rows leave about a half, many give the better one all. (Stacking of predictive densities
takes the most likely w: Yao, Vehtari, Simpson and Gelman 2018, Bayesian Analysis 13.) The densities are those of n
draws together, as many as a prediction averages: a mixture of few draws is worse than its two densities say.

A learned model wants walks: from a few dozen in thousands of dimensions a combination of their points may be worth more
than what can be learned from them. Combinations of points on a curved fiber lie off it, so that they land as learned
draws do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.base import Deformation, deal
from pipeline.bayes.predictive import AveragedLikelihood
from pipeline.errors import RunError
from pipeline.fitting.loading import gaussian_beside
from pipeline.plan import WalkPlan
from pipeline.run import Run
from pipeline.stages.comparison import Comparison, Draws
from pipeline.stages.draw_radius import draws_at
from pipeline.store import SampleStore

SHARES = np.linspace(0, 1, 17)
LEAST = 0.05
"""A smaller share of either is none: it would be felt by nobody, and every draw would have to read the walks."""


def choose_share(
    run: Run, store: SampleStore, plan: WalkPlan, models: list[Deformation], selected: float, drawn_at: float
) -> dict[str, Any]:
    """The share of `deformation.gaussian_share`; `auto` decides for classifications with validation rows, else 0.

    Args:
        run: The run.
        store: Its walks.
        plan: Of them.
        models: What was learned, one a start.
        selected: Radius of the walks, and of the Gaussian.
        drawn_at: That of learned draws.

    Returns:
        {"gaussian_share", "draw_radius"}, and where it was decided here "learned_validation_nll",
        "gaussian_validation_nll" and, at the nearest of `SHARES`, "mixed_validation_nll", in nats a row. No test row
        is seen.

    Raises:
        RunError: A share was asked for, and a start has fewer than two walks that did not diverge.
    """
    wanted, rows = run.config.deformation.gaussian_share, run.dataset.validation
    decides = wanted == "auto" and run.config.data.task == "classification" and len(rows.y) > 0
    learned = {"gaussian_share": 0.0, "draw_radius": drawn_at}
    if wanted == 0 or wanted == "auto" and not decides:
        return learned
    few = [start for start in range(plan.starts) if store.undiverged(start) < 2]
    if few and decides:
        return learned
    if few:
        raise RunError(
            f"deformation.gaussian_share: {wanted} asks for draws of a Gaussian of the walks' points, which needs two "
            f"walks that did not diverge; start {few[0]} has fewer. Set it to 0 or auto, or walk more (walk.walks)."
        )
    if wanted != "auto":
        return {"gaussian_share": wanted, "draw_radius": selected if wanted == 1 else drawn_at}
    c = Comparison.open(run, plan, {"validation": rows.x})
    # One after the other: each keeps points in memory.
    gaussians = (gaussian_beside(model, store, start, selected) for start, model in enumerate(models))
    nll = _mixtures(c, draws_at(c, models, drawn_at), draws_at(c, gaussians, selected, "deform-share"))
    share = posterior_mean_share(SHARES, nll)
    share = 0.0 if share < LEAST else 1.0 if share > 1 - LEAST else share
    shown = {"learned": 0, "gaussian": -1, "mixed": int(np.abs(SHARES - share).argmin())}
    told = {f"{name}_validation_nll": finite_or_none(float(nll[place].mean())) for name, place in shown.items()}
    return {"gaussian_share": share, "draw_radius": selected if share == 1 else drawn_at} | told


def _mixtures(c: Comparison, learned: Draws, gaussian: Draws) -> np.ndarray:
    """NLL of validation rows under the mixture of each of `SHARES`, (shares, rows), each of as many draws in all."""
    averages = [AveragedLikelihood(len(c.run.dataset.validation.y)) for _ in SHARES]
    totals = c.share(c.run.config.evaluation.draws)
    counts = [[np.bincount(deal([1 - w, w], total), minlength=2) for w in SHARES] for total in totals]
    for source, draws in enumerate((learned, gaussian)):
        seen = [0] * len(totals)
        for start, nll in c.validation_draws(draws):
            for count, average in zip(counts[start], averages, strict=True):
                if seen[start] < count[source]:
                    average.add(nll[: count[source] - seen[start]])
            seen[start] += len(nll)
    return np.stack([average.rows() for average in averages])


def posterior_mean_share(shares: np.ndarray, nll: np.ndarray) -> float:
    """w of the module.

    Args:
        shares: What w may be, (s,).
        nll: Of each row under the mixture of each of them, (s, rows), in nats; infinite where a row has no chance. Rows
            that have none under any say nothing.

    Returns:
        w; 0 where no share gives every row a chance.
    """
    known = nll[:, np.isfinite(nll).any(axis=0)]
    log = -known.sum(axis=1)
    if not known.shape[1] or np.isneginf(log.max()):
        return 0.0
    mass = np.exp(log - log.max())
    return float((mass * shares).sum() / mass.sum())

r"""How many draws a Gaussian of the walks' points gives beside what was learned: what validation rows say.

Of n draws of the mixture $m_w = (1 - w)\,p + w\,q$ about w n are of the Gaussian q, the others of the learned model p.
Before the validation rows are seen every w of `SHARES` is as likely as any other. Given them, the density of a new row
is that of the mixture at

$$w = \sum_w w \prod_i m_w(y_i) \Big/ \sum_w \prod_i m_w(y_i) ,$$

so that nothing is tuned: few rows leave about a half, many give the better one all. (Stacking of predictive densities
takes the most likely w: Yao, Vehtari, Simpson and Gelman 2018, Bayesian Analysis 13.) The densities are those of n
draws together, as many as a prediction averages: of two models whose single draws are poor half of the draws is less
than half of the model.

A learned model wants walks: from a few dozen in thousands of dimensions a combination of their points may be worth more
than what can be learned from them, and where the network itself is surer than its data allow, the wider Gaussian makes
up for some of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.base import Deformation, deal
from pipeline.bayes.predictive import AveragedLikelihood
from pipeline.errors import RunError
from pipeline.plan import WalkPlan
from pipeline.run import Run
from pipeline.stages.comparison import Comparison, Draws
from pipeline.stages.draw_radius import draws_at
from pipeline.stages.methods import Unavailable, gaussian_draws
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
        "gaussian_validation_nll" and "mixed_validation_nll", in nats a row. No test row is seen.

    Raises:
        RunError: A share was asked for, and a start has fewer than two walks that did not diverge.
    """
    wanted, rows = run.config.deformation.gaussian_share, run.dataset.validation
    decides = wanted == "auto" and run.config.data.task == "classification" and len(rows.y) > 0
    if wanted == 0 or wanted == "auto" and not decides:
        return {"gaussian_share": 0.0, "draw_radius": drawn_at}
    c = Comparison.open(run, plan, {"validation": rows.x} if decides else {})
    try:
        draws = gaussian_draws(c, store, selected)
        if not decides:
            next(draws)
            return {"gaussian_share": wanted, "draw_radius": selected if wanted == 1 else drawn_at}
        rows = _mixtures(c, draws_at(c, models, drawn_at), draws)
    except Unavailable as error:
        if decides:
            return {"gaussian_share": 0.0, "draw_radius": drawn_at}
        raise RunError(
            f"deformation.gaussian_share: {wanted} asks for draws of a Gaussian of the walks' points, which {error}. "
            "Set it to 0 or auto, or walk more (walk.walks)."
        ) from None
    share = posterior_mean_share(SHARES, rows)
    share = 0.0 if share < LEAST else 1.0 if share > 1 - LEAST else share
    names = ("learned_validation_nll", "gaussian_validation_nll", "mixed_validation_nll")
    mixed = rows[int(np.abs(SHARES - share).argmin())]
    told = {
        name: finite_or_none(float(nll.mean())) for name, nll in zip(names, (rows[0], rows[-1], mixed), strict=True)
    }
    return {"gaussian_share": share, "draw_radius": selected if share == 1 else drawn_at} | told


def _mixtures(c: Comparison, learned: Draws, gaussian: Draws) -> np.ndarray:
    """NLL of validation rows under the mixture of each of `SHARES`, (shares, rows), each of as many draws in all."""
    averages = [AveragedLikelihood(len(c.run.dataset.validation.y)) for _ in SHARES]
    totals = c.share(c.run.config.evaluation.draws)
    for source, draws in enumerate((learned, gaussian)):
        seen = [0] * len(totals)
        for start, nll in c.validation_draws(draws):
            for share, average in zip(SHARES, averages, strict=True):
                most = int((deal([1 - share, share], totals[start]) == source).sum())
                if seen[start] < most:
                    average.add(nll[: most - seen[start]])
            seen[start] += len(nll)
    return np.stack([average.rows() for average in averages])


def posterior_mean_share(shares: np.ndarray, nll: np.ndarray) -> float:
    """w of the module.

    Args:
        shares: What w may be, (s,).
        nll: Of each row under the mixture of each of them, (s, rows), in nats; infinite where a row has no chance. Rows
            that have none under any say nothing.
    """
    log = -nll[:, np.isfinite(nll).any(axis=0)].sum(axis=1)
    mass = np.exp(log - log.max())
    return float((mass * shares).sum() / mass.sum())

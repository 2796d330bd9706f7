r"""How many draws a Gaussian of the walks' points gives beside what was learned: what validation rows say.

Draws are those of the mixture $(1 - w)\,p + w\,q$ of the learned model p and the Gaussian q. Before the validation
rows are seen every w is as likely as any other; the density of a new row is then that of the mixture at

$$w = \int_0^1 w \prod_i \big((1 - w) p_i + w q_i\big) dw \Big/ \int_0^1 \prod_i \big((1 - w) p_i + w q_i\big) dw ,$$

so that nothing is tuned: few rows leave about a half, many give the better one all. (Stacking of predictive densities
takes the most likely w: Yao, Vehtari, Simpson and Gelman 2018, Bayesian Analysis 13.) A learned model wants walks: from
a few dozen in thousands of dimensions a combination of their points may be worth more than what can be learned from
them, and where the network itself is surer than its data allow, the wider Gaussian makes up for some of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.base import Deformation
from pipeline.errors import RunError
from pipeline.plan import WalkPlan
from pipeline.run import Run
from pipeline.stages.comparison import Comparison
from pipeline.stages.draw_radius import draws_at
from pipeline.stages.methods import Unavailable, gaussian_draws
from pipeline.store import SampleStore

LEAST = 0.05
"""A smaller share of either is none: it would be felt by nobody, and every draw would have to read the walks."""
NODES = 256
"""Of the quadrature; they lie close at both ends, where many rows put the weight."""


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
        theirs = c.validation_rows(draws)
    except Unavailable as error:
        if decides:
            return {"gaussian_share": 0.0, "draw_radius": drawn_at}
        raise RunError(
            f"deformation.gaussian_share: {wanted} asks for draws of a Gaussian of the walks' points, which {error}. "
            "Set it to 0 or auto, or walk more (walk.walks)."
        ) from None
    ours = c.validation_rows(draws_at(c, models, drawn_at))
    share = posterior_mean_share(ours, theirs)
    share = 0.0 if share < LEAST else 1.0 if share > 1 - LEAST else share
    mixed = _mixed(ours, theirs, np.array([share]))[0]
    names = ("learned_validation_nll", "gaussian_validation_nll", "mixed_validation_nll")
    told = {name: finite_or_none(float(nll.mean())) for name, nll in zip(names, (ours, theirs, mixed), strict=True)}
    return {"gaussian_share": share, "draw_radius": selected if share == 1 else drawn_at} | told


def posterior_mean_share(first: np.ndarray, second: np.ndarray) -> float:
    """w of the module, the share of the second; half where the rows say nothing.

    Args:
        first: NLL of each row, (rows,), in nats; infinite where it has no chance.
        second: The same of the other model.
    """
    known = np.isfinite(first) | np.isfinite(second)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    shares = (nodes + 1) / 2
    log = -_mixed(first[known], second[known], shares).sum(axis=1)
    mass = weights * np.exp(log - log.max())
    return float((mass * shares).sum() / mass.sum())


def _mixed(first: np.ndarray, second: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """NLL of the mixture, (shares, rows)."""
    with np.errstate(divide="ignore"):  # a share of 0 or 1
        return -np.logaddexp(np.log1p(-shares)[:, None] - first, np.log(shares)[:, None] - second)

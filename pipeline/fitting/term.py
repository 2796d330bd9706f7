"""The likelihood term of the residual kind, and the judge of its training: how far fresh draws lie above the walks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.bayes.deformation.remainder import Remainder
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import Problem
from pipeline.fitting.job import FitJob, Team
from pipeline.fitting.reading import Walks
from pipeline.plan import stream
from pipeline.run import Run

FRESH = 32
"""Fresh directions of a step for the likelihood term, over all workers, at most."""
TERM_ROWS = 512
"""Training rows that the likelihood term looks at in one step, at most."""
TERM_WORK = 4e9
"""Fresh directions times D of a whole training, at most; the steps fall to fit it."""
MARGIN = 1.1
"""The likelihood term is silent while draws rise less than this many times the walks: a limit, not a goal."""
SCORE_WEIGHT = 1.0
"""Weight of the same logarithm where trainings are compared: a point off the fiber is worth nothing."""


class Term:
    """The likelihood term: how far fresh draws lie above the walks, and which way down is."""

    def __init__(self, run: Run, problem: Problem, model: Residual, job: FitJob, team: Team, walk_rise: float):
        self._potential, self.model, self._job, self._team = problem.potential, model, job, team
        self._seed, self.walk_rise = run.config.seed, max(walk_rise, 1e-6)
        self.count = max(1, min(FRESH, int(TERM_WORK / 1000 / problem.network.dim)) // team.size)
        self._star = problem.theta_star.detach()[None]

    def draws(self, purpose: str, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Fresh directions (n, D) and their inputs (n, p)."""
        rng = stream(self._seed, purpose, self._job.start, step, self._team.rank)
        directions = self.model.free.directions(rng, count, self.model.chain.basis.dtype)
        with torch.no_grad():
            return directions, self.model.chain.inputs(directions, self.model.radius)

    def directions(self, step: int) -> tuple[Tensor, Tensor]:
        """Those of one training step. Never used again: a pool of 4096 was learned by heart."""
        return self.draws("deform-fresh", step, self.count)

    def pull(self, directions: Tensor, coefficients: Tensor, step: int) -> tuple[Tensor, float]:
        """Surrogate whose gradient is that of log(rise / walks' rise), and the ratio itself."""
        position, gradient, rise = self._evaluate(directions, coefficients.detach(), step)
        ratio = float(rise.mean()) / self.walk_rise
        if not math.isfinite(ratio) or ratio <= MARGIN:
            return coefficients.sum() * 0.0, ratio
        slope = (gradient.to("cpu", coefficients.dtype) @ self.model.chain.basis.T) / (
            ratio * self.walk_rise * len(rise)
        )
        return (slope * coefficients).sum(), ratio

    def rise(self, directions: Tensor, coefficients: Tensor) -> Tensor:
        """Exact rise of U over theta* on all training rows, (n,)."""
        position = self.model.chain.position(directions, coefficients, self.model.radius).to(self._star)
        return (self._potential.value(position) - self._potential.value(self._star)).double().cpu()

    def _evaluate(self, directions: Tensor, coefficients: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        position = self.model.chain.position(directions, coefficients, self.model.radius).to(self._star)
        rows, scale = None, 1.0
        if self._potential.rows > TERM_ROWS:
            rng = stream(self._seed, "deform-rows", self._job.start, step)
            index = rng.choice(self._potential.rows, TERM_ROWS, replace=False)
            rows, scale = torch.as_tensor(index, device=position.device), self._potential.rows / TERM_ROWS
        gradient, nll = self._potential.nll_gradient(position, rows)
        _, star = self._potential.nll_gradient(self._star, rows)
        prior = self._potential.prior(position) - self._potential.prior(self._star)
        rise = (nll - star) * scale + prior
        return position, torch.addcmul(gradient * scale, self._potential.precision, position), rise.double()


class Judge:
    """Scores a remainder on held-out walks and on the potential of the same fresh draws each time."""

    def __init__(self, team: Team, term: Term, walks: Walks, core: Tensor, target: Tensor, there: Tensor):
        self.walks, self.core, self.target = walks, core, target
        self.train, self.held = torch.nonzero(there & ~walks.held)[:, 0], there & walks.held
        self._team, self._term = team, term
        self._directions, self._inputs = term.draws("deform-judge", 0, max(2, 4 * term.count))
        self._linear = term.model.chain.coefficients(self._inputs, term.model.radius)

    @torch.no_grad()
    def __call__(self, remainder: Remainder, step: int) -> dict[str, Any]:
        """One point of the learning curve."""
        remainder.eval()
        left = self.target[self.held] - self.core[self.held]
        after = left - remainder(self.walks.inputs[self.held]) if step and len(left) else left
        draws = self._linear + remainder(self._inputs) if step else self._linear
        rise = self._term.rise(self._directions, draws)
        sums = torch.stack(
            [
                after.square().sum().double(),
                self.target[self.held].square().sum().double(),
                rise.sum(),
                torch.tensor(float(len(rise))).double(),
            ]
        )
        self._team.sum([sums])
        remainder.train()
        error = float(sums[0] / sums[1]) if float(sums[1]) > 0 else 0.0
        ratio = float(sums[2] / sums[3]) / self._term.walk_rise
        score = error + SCORE_WEIGHT * math.log(max(ratio, MARGIN) / MARGIN) if math.isfinite(ratio) else math.inf
        return {"step": step, "heldout_error": error, "rise_ratio": ratio, "score": score}

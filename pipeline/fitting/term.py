"""The likelihood term of the residual kind, and the judge of its training: how far fresh draws lie above the walks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.remainder import Remainder
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import Problem
from pipeline.fitting.chain import Seen
from pipeline.fitting.job import FitJob, Team
from pipeline.fitting.work import JUDGED, Work
from pipeline.plan import stream
from pipeline.run import Run

MARGIN = 1.1
"""The likelihood term is silent while draws rise less than this many times the walks: a limit, not a goal."""
SCORE_WEIGHT = 1.0
"""Weight of the same logarithm where trainings are compared: a point off the fiber is worth nothing."""


WORST = 1e30
"""Score of a training that gives no numbers: checkpoints and facts are JSON, which has no infinity."""


class Term:
    """The likelihood term: how far fresh draws lie above the walks, and which way down is."""

    def __init__(
        self, run: Run, problem: Problem, model: Residual, job: FitJob, team: Team, walk_rise: float, look_rows: int
    ):
        self._potential, self.model, self._job, self._team = problem.potential, model, job, team
        self._seed, self.walk_rise = run.config.seed, max(walk_rise, 1e-6)
        self._star = problem.theta_star.detach()[None]
        looks = model.chain.above(model.radius) + 2  # one at each mark, and one more for the remainder
        self.work = Work.of(problem.potential, look_rows, looks, run.config.deformation.steps)
        self.count = max(1, self.work.fresh // team.size)
        self._judged = self._judged_rows()

    def draws(self, purpose: str, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Where the chain takes fresh directions, (n, D), and the inputs of the remainder there, (n, p)."""
        chain = self.model.chain
        with torch.no_grad():
            direction = chain.vector(self.directions(purpose, step, count))
            _, state = chain.states(direction, self.model.radius)
            inputs = chain.seen(state, direction.inside)
            return state.point.full + chain.theta_star, inputs

    def fresh(self, step: int) -> tuple[Tensor, Tensor]:
        """Those of one training step. Never used again: a pool of 4096 was learned by heart."""
        return self.draws("deform-fresh", step, self.count)

    def pull(self, base: Tensor, correction: Tensor, step: int) -> tuple[Tensor, float]:
        """Surrogate whose gradient is that of log(rise / walks' rise), and the ratio itself."""
        position = torch.addmm(base, correction.detach(), self.model.chain.basis).to(self._star)
        gradient, rise = self._evaluate(position, step)
        ratio = float(rise.mean()) / self.walk_rise
        if not math.isfinite(ratio) or ratio <= MARGIN:
            return correction.sum() * 0.0, ratio
        slope = (gradient.to("cpu", correction.dtype) @ self.model.chain.basis.T) / (ratio * self.walk_rise * len(rise))
        return (slope * correction).sum(), ratio

    def directions(self, purpose: str, step: int, count: int) -> Tensor:
        """Fresh directions of this worker, (n, D)."""
        rng = stream(self._seed, purpose, self._job.start, step, self._team.rank)
        return self.model.free.directions(rng, count, self.model.chain.basis.dtype)

    def rise(self, position: Tensor) -> Tensor:
        """Rise of U over theta* at positions (n, D), (n,): exact, or where that is much work from a sample of rows."""
        prior = self._potential.prior(position.to(self._star)) - self._potential.prior(self._star)
        return self.nll_rise(position) + prior.double().cpu()

    def nll_rise(self, position: Tensor) -> Tensor:
        """The same of the summed NLL."""
        nll, share = self._potential.nll, 1.0 if self._judged is None else len(self._judged) / self._potential.rows
        values = nll(torch.cat([self._star, position.to(self._star)]), self._judged)
        return (values[1:] - values[:1]).double().cpu() / share

    def _judged_rows(self) -> Tensor | None:
        """Training rows of judgements, always the same; None: all."""
        rows, count = self._potential.rows, self.work.judged
        if count == rows:
            return None
        order = stream(self._seed, "deform-judged", self._job.start).choice(rows, count, replace=False)
        return torch.from_numpy(np.sort(order)).to(self._star.device)

    def _evaluate(self, position: Tensor, step: int) -> tuple[Tensor, Tensor]:
        rows, scale = None, 1.0
        if self._potential.rows > self.work.rows:
            rng = stream(self._seed, "deform-rows", self._job.start, step)
            index = rng.choice(self._potential.rows, self.work.rows, replace=False)
            rows, scale = torch.as_tensor(index, device=position.device), self._potential.rows / self.work.rows
        gradient, nll = self._potential.nll_gradient(position, rows)
        _, star = self._potential.nll_gradient(self._star, rows)
        prior = self._potential.prior(position) - self._potential.prior(self._star)
        rise = (nll - star) * scale + prior
        return torch.addcmul(gradient * scale, self._potential.precision, position), rise.double()


class Judge:
    """Scores a remainder on held-out walks and on the potential of the same fresh draws each time."""

    def __init__(self, team: Team, term: Term, seen: Seen):
        self.seen, self.train = seen, torch.nonzero(~seen.held)[:, 0]
        self._team, self._term = team, term
        self._base, self._inputs = term.draws("deform-judge", 0, max(2, JUDGED * term.count))

    @torch.no_grad()
    def __call__(self, remainder: Remainder, step: int) -> dict[str, Any]:
        """One point of the learning curve."""
        remainder.eval()
        held = self.seen.held
        left = self.seen.left[held]
        after = left - remainder(self.seen.inputs[held]) if step and len(left) else left
        base = self._base
        position = torch.addmm(base, remainder(self._inputs), self._term.model.chain.basis) if step else base
        rise = self._term.rise(position)
        squares = torch.stack([after.square().sum(), self.seen.target[held].square().sum()]).double()
        sums = torch.cat([squares, torch.stack([rise.sum(), torch.tensor(float(len(rise))).double()])])
        self._team.sum([sums])
        remainder.train()
        error = float(sums[0] / sums[1]) if float(sums[1]) > 0 else 0.0
        ratio = float(sums[2] / sums[3]) / self._term.walk_rise
        score = error + SCORE_WEIGHT * math.log(max(ratio, MARGIN) / MARGIN) if math.isfinite(ratio) else math.inf
        return {
            "step": step,
            "heldout_error": finite_or_none(error),
            "rise_ratio": finite_or_none(ratio),
            "score": score if math.isfinite(score) else WORST,
        }

"""The common ground of all methods: the same rows, the same unit, and the average of any stream of draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.predictive import Averaged, AveragedLikelihood, PredictiveAverage, draw_nll
from pipeline.bayes.trees import to_tensors
from pipeline.build import Problem, load_problem
from pipeline.plan import WalkPlan
from pipeline.run import Run

Draws = Iterable[tuple[int, Tensor]]
"""Batches of draws: the start whose network they belong to, and positions (b, D)."""

_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Comparison:
    """Where methods are compared."""

    run: Run
    problems: list[Problem]
    """One a start."""
    inputs: Mapping[str, Any]
    """Named rows on which every method predicts: test, validation, ood/NAME, and grids for figures."""

    @classmethod
    def open(cls, run: Run, plan: WalkPlan, inputs: Mapping[str, Any]) -> Comparison:
        """Load every start of a run."""
        eager = dataclasses.replace(plan, compile=False)
        return cls(run, [load_problem(run, start, eager) for start in range(plan.starts)], inputs)

    @property
    def regression(self) -> bool:
        """Whether targets are numbers."""
        return self.run.config.data.task == "regression"

    @property
    def unit(self) -> tuple[float, float]:
        """(shift, scale) from the standardised target to its own unit."""
        schema = self.run.dataset.schema
        return (float(schema.y_mean), float(schema.y_std)) if self.regression else (0.0, 1.0)

    def own_unit(self, y: np.ndarray) -> np.ndarray:
        """Targets in their own unit: class numbers as they are."""
        shift, scale = self.unit
        return np.asarray(y, dtype=np.float64) * scale + shift if self.regression else np.asarray(y)

    @functools.cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Targets of test and validation rows, in their own unit."""
        data = self.run.dataset
        pairs = {"test": data.test, "validation": data.validation}
        return {name: self.own_unit(rows.y) for name, rows in pairs.items() if len(rows.y)}

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        """The inputs as tensors of the networks' type."""
        network = self.problems[0].network
        return {name: to_tensors(x, network.dtype, network.device) for name, x in self.inputs.items()}

    def new_average(self, name: str) -> PredictiveAverage:
        """An empty average for one set of inputs, in the unit of the target."""
        shift, scale = self.unit
        return PredictiveAverage(self.problems[0].likelihood, self.targets.get(name), shift=shift, scale=scale)

    def average(self, draws: Draws) -> dict[str, Averaged]:
        """Model averages on all inputs in one pass over the draws; memory does not grow with their number."""
        averages = {name: self.new_average(name) for name in self.inputs}
        for start, theta in draws:
            problem = self.problems[start]
            for name, average in averages.items():
                average.add(problem.network, theta, self.tensors[name], problem.likelihood)
        return {name: average.result() for name, average in averages.items()}

    def validation_nll(self, draws: Draws) -> float:
        """Mean validation NLL of the model average, in nats a row and standardised units; infinite where it breaks."""
        value = float(self.validation_rows(draws).mean())
        return value if np.isfinite(value) else np.inf

    def validation_rows(self, draws: Draws) -> np.ndarray:
        """The same row by row, (rows,)."""
        return self._average_nll(draws, self.tensors["validation"], self.run.dataset.validation.y)

    def _average_nll(self, draws: Draws, x: Any, y: np.ndarray) -> np.ndarray:
        """NLL of the average of draws, (rows,), in nats and standardised units; infinite where it breaks."""
        average = AveragedLikelihood(len(y))
        for _, nll in self._draw_nll(draws, x, y):
            average.add(nll)
        return average.rows()

    def validation_draws(self, draws: Draws) -> Iterator[tuple[int, np.ndarray]]:
        """Start and NLL of each draw on each validation row, (b, rows), in nats and standardised units."""
        return self._draw_nll(draws, self.tensors["validation"], self.run.dataset.validation.y)

    def _draw_nll(self, draws: Draws, x: Any, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        target = torch.as_tensor(np.array(y))
        for start, theta in draws:
            problem = self.problems[start]
            nll = draw_nll(problem.network, problem.likelihood, theta, x, target)
            yield start, np.where(np.isnan(nll), np.inf, nll)

    def mean_rise(self, draws: Draws) -> float:
        """Mean rise of the summed training NLL of draws over their start's MAP estimate, in nats."""
        rises: list[Tensor] = []
        for start, theta in draws:
            potential = self.problems[start].potential
            rises.append((potential.nll(theta.to(potential.precision)) - self.star_nll[start]).double())
        value = float(torch.cat(rises).mean())
        return value if np.isfinite(value) else np.inf

    def average_rise(self, draws: Draws) -> float:
        """Rise of the summed training NLL of the average of draws over the MAP estimates', in nats."""
        train, network = self.run.dataset.train, self.problems[0].network
        rows = self._average_nll(draws, to_tensors(train.x, network.dtype, network.device), train.y)
        value = float(rows.sum()) - float(np.mean(self.star_nll))
        return value if np.isfinite(value) else np.inf

    @functools.cached_property
    def star_nll(self) -> list[float]:
        """Summed training NLL at each MAP estimate."""
        return [float(p.potential.nll(p.theta_star[None])) for p in self.problems]

    @functools.cached_property
    def gamma(self) -> float:
        """Effective number of parameters, mean over starts."""
        return float(np.mean([problem.curvature.gamma for problem in self.problems]))

    def share(self, draws: int) -> list[int]:
        """How many of `draws` draws belong to each start."""
        starts = len(self.problems)
        return [draws // starts + (start < draws % starts) for start in range(starts)]

    def batch(self) -> int:
        """Draws handled together, so that their positions take at most 256 MiB."""
        return max(1, min(64, _BATCH_BYTES // (8 * self.problems[0].network.dim)))

"""The posterior of a finished run: draws, predictions for new data, and state dicts for your own network.

`run_uri` stands for what 'fiberwalk run' prints first, a folder or an address on an object store. Here the inputs have
two columns and there are two classes; `--trust-code` on the command line is `trust_code=True` here.

>>> from pipeline.posterior import Posterior
>>> posterior = Posterior.load(run_uri, trust_code=True)
>>> theta = posterior.draw(100, seed=1)  # one pass of the deformation model
>>> tuple(theta.shape) == (100, posterior.dim)
True
>>> mean, aleatoric, epistemic = posterior.predict([[0.5, -0.2], [9.0, 9.0]])  # x as it was before standardisation
>>> mean.shape, aleatoric.shape, epistemic.shape
((2, 2), (2,), (2,))
>>> [state_dict["0.weight"].shape for state_dict in posterior.state_dicts(2)]
[torch.Size([8, 2]), torch.Size([8, 2])]

Draws feed torch.func, in the layout of `posterior.layout`:

>>> import torch
>>> network, x = posterior.problem(0).network, torch.zeros(3, 2)
>>> tuple(torch.func.vmap(network.outputs, in_dims=(0, None))(theta, x).shape)
(100, 3, 2)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.deformation.base import deal
from pipeline.bayes.params import ParameterLayout
from pipeline.bayes.predictive import Averaged, PredictiveAverage
from pipeline.bayes.trees import row_count, to_tensors
from pipeline.build import Problem, load_problem
from pipeline.errors import InputError
from pipeline.fitting.job import FOLDER
from pipeline.fitting.loading import Source, Supply, load_sources
from pipeline.plan import stream
from pipeline.run import Run, load_run
from pipeline.store import SampleStore

BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class DrawBatch:
    """Some draws, b of them, in the order of `Posterior.draw`."""

    theta: Tensor
    """(b, D)."""
    start: np.ndarray
    """MAP estimate around which each lies, (b,)."""
    learned: np.ndarray
    """False for draws of the Gaussian of the walks' points, (b,) bool."""
    potential: np.ndarray | None = None
    """U over the training rows in nats, (b,), where it was asked for."""


class Posterior:
    """Draws from the deformation models of a run, in proportion to the walks of the starts.

    A start has a learned model, and beside it, as `deformation.gaussian_share` says, a Gaussian of its walks' points.
    """

    def __init__(self, run: Run):
        self.run = run
        self.store = SampleStore.open(run.storage)
        walks = [0] * self.store.plan.starts
        for shard in self.store.plan.shards():
            walks[shard.start] += shard.walks
        found = [source for start in range(len(walks)) for source in load_sources(run, start)]
        # Learned ones first: the first draws then are of as many starts as there can be.
        self.sources: list[Source] = sorted(found, key=lambda source: source.name != "learned")
        self.shares = [walks[source.start] * source.share for source in self.sources]
        self._problems: dict[int, Problem] = {}

    @classmethod
    def load(cls, run_uri: str | os.PathLike[str], *, trust_code: bool = False) -> Posterior:
        """Open the posterior of a run, from its address alone. Nothing stored is unpickled.

        Args:
            run_uri: The address that 'fiberwalk run' printed, a folder or s3://bucket/prefix/run_id.
            trust_code: Allow a stored configuration to import the Python code that it names.

        Raises:
            InputError: No run there, it has no deformation yet, or it names Python code and `trust_code` is false.
        """
        run_uri = os.fspath(run_uri)
        run = load_run(run_uri, trust_code=trust_code)
        if not run.storage.exists(f"{FOLDER}/deformation.json"):
            kind = run.config.deformation.kind
            way = "Export its sample store, or set another kind" if kind == "none" else "Finish it with 'fiberwalk run'"
            raise InputError(f"{run_uri} has no deformation model (deformation.kind: {kind}). {way}.")
        return cls(run)

    @property
    def dim(self) -> int:
        """Number of parameters D of a draw."""
        return self.store.plan.dim

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters in the order of a draw."""
        return ParameterLayout.from_json(self.store.plan.parameters)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`deformation.json`: held-out error, potential of draws beside walks, and how it was trained."""
        return self.run.storage.read_json(f"{FOLDER}/deformation.json")

    @property
    def radius(self) -> float:
        """Radius of learned draws unless another is asked for, which then counts for those of a Gaussian too."""
        return float(self.facts.get("draw_radius", self.facts["radius"]))

    def draw(self, n: int, seed: int = 0, radius: float | None = None) -> Tensor:
        """Posterior draws, (n, D); the same seed gives the same draws.

        Raises:
            InputError: n is not positive, or no walk was recorded at such a radius.
        """
        return torch.cat([batch.theta for batch in self.draw_batches(n, seed, radius)])

    def draw_batches(
        self, n: int, seed: int = 0, radius: float | None = None, *, batch: int | None = None, potential: bool = False
    ) -> Iterator[DrawBatch]:
        """The draws of `draw` in batches, so that any number streams by.

        Args:
            n: Number of draws.
            seed: Fixes them.
            radius: Units of the parameters; None takes the one that was chosen for each model.
            batch: Draws a batch; by default about 64 MB.
            potential: Evaluate U of each draw as well, a forward pass over the training rows.
        """
        if n < 1:
            raise InputError(f"The number of draws must be at least 1, got {n}.")
        if batch is not None and batch < 1:
            raise InputError(f"batch must be at least 1 draw, got {batch}.")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}.")
        end = float(self.store.plan.radii()[-1])
        if radius is not None and not 0 < radius <= end * (1 + 1e-6):
            raise InputError(f"radius must be above 0 and at most {end:.4g}, where walks end; got {radius}.")
        size = batch or max(1, BATCH_BYTES // (8 * self.dim))
        owners, starts = deal(self.shares, n), np.array([source.start for source in self.sources])
        counts = np.bincount(owners, minlength=len(self.sources)).tolist()
        supplies = [
            Supply(source.model, stream(seed, f"posterior-{source.name}", source.start), count, radius)
            for source, count in zip(self.sources, counts, strict=True)
        ]
        learned = np.array([source.name == "learned" for source in self.sources])
        for first in range(0, n, size):
            owner = owners[first : first + size]
            theta, levels = None, np.empty(len(owner))
            for number in np.unique(owner).tolist():
                source, rows = self.sources[number], np.flatnonzero(owner == number)
                drawn = supplies[number].take(len(rows))
                theta = drawn.new_empty(len(owner), self.dim) if theta is None else theta
                theta[torch.from_numpy(rows)] = drawn
                if potential:
                    problem = self.problem(source.start)
                    levels[rows] = problem.potential.value(drawn.to(problem.theta_star)).double().cpu().numpy()
            assert theta is not None
            yield DrawBatch(theta, starts[owner], learned[owner], levels if potential else None)

    def predict(self, x: Any, draws: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictive mean, aleatoric and epistemic uncertainty of new rows.

        Args:
            x: A pyarrow table, a pandas or polars frame, or arrays, as the data source has them, not standardised.
            draws: Posterior draws to average; None takes `evaluation.draws`.
            seed: Fixes the draws.

        Returns:
            Classification: class probabilities (rows, classes), mean entropy of a draw and mutual information
            (rows,) in nats. Regression, in the unit of the target: mean, standard deviation of the noise, and
            standard deviation of the mean over draws (rows,); the variance of the prediction is the sum of their
            squares.

        Raises:
            InputError: Columns, shapes or values do not fit the data of the run.
        """
        averaged = self.average(x, draws, seed)
        if averaged.probabilities is not None:
            return averaged.probabilities, averaged.aleatoric, averaged.epistemic
        assert averaged.mean is not None
        return averaged.mean.mean(axis=0), np.sqrt(averaged.aleatoric), np.sqrt(averaged.epistemic)

    def average(self, x: Any, draws: int | None = None, seed: int = 0) -> Averaged:
        """The model average of new rows with all that is known of it; arguments as for `predict`."""
        schema = self.run.dataset.schema
        regression = self.run.config.data.task == "regression"
        problem = self.problem(0)
        average = PredictiveAverage(
            problem.likelihood,
            shift=float(schema.y_mean) if regression else 0.0,
            scale=float(schema.y_std) if regression else 1.0,
            noise=float(self.run.storage.read_json("radius.json")["noise_factor"]),
        )
        inputs = to_tensors(schema.encode(x), problem.network.dtype, problem.network.device)
        if not row_count(inputs):
            raise InputError("x has no rows.")
        for batch in self.draw_batches(self.run.config.evaluation.draws if draws is None else draws, seed):
            for start in np.unique(batch.start).tolist():
                mine = self.problem(start)
                average.add(mine.network, batch.theta[torch.from_numpy(batch.start == start)], inputs, mine.likelihood)
        return average.result()

    def state_dicts(self, n: int, seed: int = 0, radius: float | None = None) -> Iterator[dict[str, Tensor]]:
        """Draws as complete state dicts, for ``load_state_dict(strict=True)`` of the network that was configured."""
        for batch in self.draw_batches(n, seed, radius):
            for theta, start in zip(batch.theta, batch.start.tolist(), strict=True):
                network = self.problem(start).network
                yield network.state_dict(theta.to(network.device, network.dtype))

    def problem(self, start: int) -> Problem:
        """Network, likelihood and potential of one start, loaded once."""
        if start not in self._problems:
            self._problems[start] = load_problem(self.run, start)
        return self._problems[start]

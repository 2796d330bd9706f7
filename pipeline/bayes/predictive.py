r"""Model averages: what many draws of the parameters predict together, streamed over the draws.

The average of class probabilities, or the mixture of Gaussians; never the softmax of mean logits. Uncertainty splits
into aleatoric (mean entropy of a draw, or mean noise variance) and epistemic (mutual information between the class and
the parameters, or variance of the means); their sum is the total.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.metrics import TINY, class_nll, entropy
from pipeline.bayes.mixture import component_nll, mixture_nll
from pipeline.bayes.params import Network
from pipeline.bayes.trees import Tree, row_count, slice_rows

_ROWS = 2048
_DRAWS = 16
_ELEMENTS = 1 << 29
"""Most elements of all layers of the rows and draws that pass together."""


@dataclass(frozen=True)
class Averaged:
    """The model average of some rows. Entropies in nats; regression in the unit of the target."""

    draws: int
    aleatoric: np.ndarray
    """(rows,)."""
    epistemic: np.ndarray
    """(rows,)."""
    probabilities: np.ndarray | None = None
    """Classification: (rows, classes)."""
    mean: np.ndarray | None = None
    """Regression: means of the components, (draws, rows)."""
    variance: np.ndarray | None = None
    """Regression: variances of the components, (draws, rows)."""
    nll_draws: np.ndarray | None = None
    """Mean over draws of each row's NLL, (rows,), where targets were given."""
    hit_draws: np.ndarray | None = None
    """Classification: share of draws that are right about each row, (rows,), where targets were given."""

    @property
    def total(self) -> np.ndarray:
        """Total uncertainty: entropy of the mean probabilities, or variance of the mixture, (rows,)."""
        return self.aleatoric + self.epistemic

    def nll(self, y: np.ndarray) -> np.ndarray:
        """Negative log density of the average at y, (rows,), in nats."""
        if self.probabilities is not None:
            return class_nll(self.probabilities, y)
        assert self.mean is not None and self.variance is not None
        return mixture_nll(self.mean, self.variance, y)


def draw_outputs(network: Network, theta: Tensor, x: Tree) -> Iterator[tuple[slice, Tensor]]:
    """Network outputs in double precision for pieces of the rows: (rows of the piece, outputs (b, rows, columns)).

    Convolutions over many parameter vectors become grouped convolutions, slower on a CPU than one after the other.
    """
    one_by_one = any(len(shape) > 2 for shape in network.layout.shapes)
    with torch.no_grad():
        theta = theta.to(device=network.device, dtype=network.dtype)
        together = network.elements(x) * (1 if one_by_one else min(_DRAWS, len(theta)))
        rows = max(1, min(_ROWS, _ELEMENTS // max(1, together)))
        for first in range(0, row_count(x), rows):
            piece = slice_rows(x, first, first + rows)
            if one_by_one:
                outputs = torch.stack([network.outputs(t, piece) for t in theta])
            else:
                outputs = network.outputs_many(theta, piece, chunk=_DRAWS)
            yield slice(first, first + outputs.shape[1]), outputs.double().cpu()


class PredictiveAverage:
    """Accumulates draws; memory does not grow with their number, but for the components of a regression mixture.

    Args:
        likelihood: What the outputs mean.
        y: Targets (rows,) for the NLL of single draws; None without.
        shift: Added to regression means after scaling: the mean of the target.
        scale: Unit of the standardised target.
        noise: Factor on the standard deviation of a regression's noise.
        components: Keep the components of a regression mixture; otherwise only mean, aleatoric and epistemic remain.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        y: np.ndarray | None = None,
        *,
        shift: float = 0.0,
        scale: float = 1.0,
        noise: float = 1.0,
        components: bool = True,
    ):
        self._likelihood, self._y, self._shift, self._scale, self._noise = likelihood, y, shift, scale, noise
        self._keep, self._draws = components, 0
        self._first: np.ndarray | None = None
        self._sums: list[np.ndarray] = []
        self._components: list[tuple[np.ndarray, np.ndarray]] = []
        self._nll, self._hits = (np.zeros(0 if y is None else len(y)) for _ in range(2))

    def add(self, network: Network, theta: Tensor, x: Tree, likelihood: Likelihood | None = None) -> None:
        """Add draws theta (b, D) predicted for the rows x; `likelihood` where starts have estimated their own noise."""
        parts = [self._predict(outputs, likelihood) for _, outputs in draw_outputs(network, theta, x)]
        self.add_predictions(*(np.concatenate([p[i] for p in parts], axis=1) for i in range(len(parts[0]))))

    def add_outputs(self, outputs: Tensor, likelihood: Likelihood | None = None) -> None:
        """Add draws by their network outputs, (b, rows, columns)."""
        self.add_predictions(*self._predict(outputs.double(), likelihood))

    def _predict(self, outputs: Tensor, likelihood: Likelihood | None = None) -> tuple[np.ndarray, ...]:
        prediction = (likelihood or self._likelihood).predict(outputs)
        if prediction.probabilities is not None:
            return (prediction.probabilities.numpy(),)
        assert prediction.mean is not None and prediction.variance is not None
        mean, variance = prediction.mean.numpy(), prediction.variance.numpy()
        return (mean * self._scale + self._shift, variance * (self._scale * self._noise) ** 2)

    def add_predictions(self, first: np.ndarray, variance: np.ndarray | None = None) -> None:
        """Add probabilities (b, rows, classes), or means and variances (b, rows) in the unit of the target."""
        self._draws += len(first)
        if variance is None:
            self._accumulate(first.sum(axis=0), entropy(first).sum(axis=0))
            if self._y is not None:
                self._nll -= np.log(np.maximum(first[:, np.arange(len(self._y)), self._y], TINY)).sum(axis=0)
                self._hits += (first.argmax(axis=-1) == self._y).sum(axis=0)
            return
        if self._first is None:
            self._first = first[0]  # moments about one draw: no cancellation where the spread is small
        centred = first - self._first
        self._accumulate(centred.sum(axis=0), (centred**2).sum(axis=0), variance.sum(axis=0))
        if self._keep:
            self._components.append((first, variance))
        if self._y is not None:
            self._nll += component_nll(first, variance, self._y).sum(axis=0)

    def _accumulate(self, *terms: np.ndarray) -> None:
        self._sums = [s + t for s, t in zip(self._sums, terms, strict=True)] if self._sums else list(terms)

    def result(self) -> Averaged:
        """The average of all draws added so far.

        Raises:
            ValueError: No draw was added.
        """
        if not self._draws:
            raise ValueError("No draw was added to the average.")
        nll, hits = (None, None) if self._y is None else (self._nll / self._draws, self._hits / self._draws)
        sums = [s / self._draws for s in self._sums]
        if self._first is None:
            mean, inner = sums
            epistemic = np.maximum(entropy(mean) - inner, 0.0)
            return Averaged(self._draws, inner, epistemic, probabilities=mean, nll_draws=nll, hit_draws=hits)
        offset, square, aleatoric = sums
        epistemic = np.maximum(square - offset**2, 0.0)
        if self._keep:
            means, variances = (np.concatenate([c[i] for c in self._components]) for i in (0, 1))
        else:
            means, variances = (self._first + offset)[None], (aleatoric + epistemic)[None]
        return Averaged(self._draws, aleatoric, epistemic, mean=means, variance=variances, nll_draws=nll)


class AveragedLikelihood:
    """Streams the mean over draws of p(y | x, theta): all that a choice by validation NLL needs, one number a row."""

    def __init__(self, rows: int):
        self._log_sum, self._draws = np.full(rows, -np.inf), 0

    def add(self, nll: np.ndarray) -> None:
        """Add the NLL of draws, (b, rows)."""
        self._log_sum = np.logaddexp(self._log_sum, np.asarray(logsumexp(-nll, axis=0)))
        self._draws += len(nll)

    @property
    def draws(self) -> int:
        """Draws added."""
        return self._draws

    def rows(self) -> np.ndarray:
        """NLL of the model average, (rows,), in nats."""
        return np.log(self._draws) - self._log_sum


def draw_nll(network: Network, likelihood: Likelihood, theta: Tensor, x: Tree, y: Tensor) -> np.ndarray:
    """NLL of each draw on each row, (b, rows), in nats and the unit of the standardised target."""
    y = y.double().cpu() if y.is_floating_point() else y.cpu()
    pieces = [likelihood.nll(outputs, y[rows]).numpy() for rows, outputs in draw_outputs(network, theta, x)]
    return np.concatenate(pieces, axis=1)

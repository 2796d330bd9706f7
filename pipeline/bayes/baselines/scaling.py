"""One number fitted on validation rows: temperature of probabilities, noise or width of a regression mixture."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar

from pipeline.bayes.metrics import class_nll, entropy
from pipeline.bayes.mixture import component_nll
from pipeline.bayes.predictive import Averaged

LARGEST_NOISE = float(np.log(20))
"""Logarithm of the largest factor on the noise that is tried; the smallest is its inverse."""


def _scaled_nll(log_scale: torch.Tensor, averaged: Averaged, y: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the scaled average, differentiable in the logarithm of the scale."""
    if averaged.probabilities is not None:
        logits = torch.as_tensor(averaged.probabilities).clamp_min(1e-300).log()
        return torch.nn.functional.cross_entropy(logits * torch.exp(-log_scale), y)
    assert averaged.mean is not None and averaged.variance is not None
    mean, variance = torch.as_tensor(averaged.mean), torch.as_tensor(averaged.variance)
    centre = mean.mean(0)
    pulled = centre + (y - centre) * torch.exp(-log_scale)
    log_density = -0.5 * ((pulled - mean) ** 2 / variance + variance.log() + float(np.log(2 * np.pi)))
    return (log_scale - (torch.logsumexp(log_density, 0) - float(np.log(len(mean))))).mean()


def fit_scale(averaged: Averaged, y: np.ndarray) -> float:
    """Scale that minimises the mean NLL on the given (validation) rows, by L-BFGS on its logarithm.

    A temperature for probabilities (Guo et al. 2017); for a mixture of Gaussians the factor by which the whole
    predictive distribution is stretched about its mean. A normal prior of unit width on the logarithm keeps it finite
    where every validation row is right; it counts like half a nat in all and vanishes against many rows.
    """
    target = torch.as_tensor(y)

    def fun(at: np.ndarray) -> tuple[float, np.ndarray]:
        log_scale = torch.tensor(at[0], requires_grad=True)
        loss = _scaled_nll(log_scale, averaged, target) + 0.5 * log_scale**2 / len(target)
        (slope,) = torch.autograd.grad(loss, log_scale)
        return float(loss.detach()), slope.numpy()[None]

    found = float(minimize(fun, np.zeros(1), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0}).x[0])
    return float(np.exp(found)) if np.isfinite(found) else 1.0


def fit_noise(averaged: Averaged, y: np.ndarray) -> float:
    """Factor of the noise of a mixture of Gaussians that minimises the mean NLL on the given (validation) rows.

    Only the noise of the components is scaled, not the spread of their means: a MAP estimate takes its own misfit for
    noise, part of which an average over draws removes and another part of which it counts as ignorance. The same prior
    as in `fit_scale`. The search is a bounded one, on the logarithm: between 1/20 and 20.
    """

    def loss(log_factor: float) -> float:
        nll = with_noise(averaged, float(np.exp(log_factor))).nll(y).mean()
        return float(nll + 0.5 * log_factor**2 / len(y))

    found = minimize_scalar(loss, bounds=(-LARGEST_NOISE, LARGEST_NOISE), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)) if np.isfinite(found.fun) else 1.0


def with_noise(averaged: Averaged, factor: float) -> Averaged:
    """The mixture of Gaussians with the standard deviation of its noise multiplied.

    The NLL of single draws stays that of the likelihood: a draw alone has the misfit that the average removes.
    """
    assert averaged.variance is not None
    scaled = {"variance": averaged.variance * factor**2, "aleatoric": averaged.aleatoric * factor**2}
    return dataclasses.replace(averaged, **scaled)


def rescale(averaged: Averaged, scale: float, y: np.ndarray | None = None) -> Averaged:
    """The average with its probabilities tempered, p^(1/T) normalised, or its mixture stretched about its mean.

    A temperature acts on the average: what is known of single draws, where there are several, stays as it is.
    """
    if averaged.probabilities is not None:
        logits = np.log(np.maximum(averaged.probabilities, 1e-300)) / scale
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        total, before = entropy(p), np.maximum(averaged.total, 1e-300)
        share = averaged.epistemic / before
        split = {"aleatoric": total * (1 - share), "epistemic": total * share}
        nll = averaged.nll_draws if averaged.draws > 1 or y is None else class_nll(p, y)
        return dataclasses.replace(averaged, **split, probabilities=p, nll_draws=nll)
    assert averaged.mean is not None and averaged.variance is not None
    centre = averaged.mean.mean(axis=0)
    mean, variance = centre + (averaged.mean - centre) * scale, averaged.variance * scale**2
    nll = averaged.nll_draws if averaged.draws > 1 or y is None else component_nll(mean, variance, y)[0]
    return dataclasses.replace(
        averaged,
        aleatoric=averaged.aleatoric * scale**2,
        epistemic=averaged.epistemic * scale**2,
        mean=mean,
        variance=variance,
        nll_draws=nll,
    )

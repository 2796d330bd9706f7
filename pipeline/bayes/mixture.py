r"""Mixtures of Gaussians, one a test row: density, distribution, quantiles and the continuous ranked probability score.

Components are equally weighted draws: ``mean`` and ``variance`` have shape (draws, rows).
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri

_PAIRS = 4_000_000
_LOG_TWO_PI = float(np.log(2 * np.pi))


def component_nll(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Negative log density of each component at y (rows,), shape (draws, rows), in nats."""
    return 0.5 * ((y - mean) ** 2 / variance + np.log(variance) + _LOG_TWO_PI)


def mixture_nll(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Negative log density of the mixture at y, shape (rows,), in nats."""
    return -logsumexp(-component_nll(mean, variance, y), axis=0) + np.log(len(mean))


def mixture_cdf(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distribution function of the mixture at y, shape (rows,)."""
    return ndtr((y - mean) / np.sqrt(variance)).mean(axis=0)


def mixture_quantile(mean: np.ndarray, variance: np.ndarray, level: float) -> np.ndarray:
    """Quantile of the mixture by bisection between the extreme component quantiles, shape (rows,)."""
    points = mean + np.sqrt(variance) * ndtri(level)
    low, high = points.min(axis=0), points.max(axis=0)
    # 60 halvings take any bracket of doubles to its last bits.
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = mixture_cdf(mean, variance, middle) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def _expected_distance(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E|Z| for Z ~ N(mean, variance)."""
    sd = np.sqrt(variance)
    z = mean / sd
    return sd * np.sqrt(2 / np.pi) * np.exp(-0.5 * z * z) + mean * (2 * ndtr(z) - 1)


def mixture_crps(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> np.ndarray:
    r"""Continuous ranked probability score of the mixture at y, shape (rows,), in the unit of y; lower is better.

    $E|Y - y| - \frac12 E|Y - Y'|$, both in closed form for Gaussian mixtures (Grimit et al. 2006, Q. J. R. Meteorol.
    Soc. 132, the score in their equation 5).
    """
    draws, rows = mean.shape
    near = _expected_distance(mean - y, variance).mean(axis=0)
    spread = np.empty(rows)
    step = max(1, _PAIRS // draws**2)
    for first in range(0, rows, step):
        m, v = mean[:, first : first + step], variance[:, first : first + step]
        spread[first : first + step] = _expected_distance(m[:, None] - m[None], v[:, None] + v[None]).mean(axis=(0, 1))
    return near - 0.5 * spread

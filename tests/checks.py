"""Statistical assertions: exact target, error model, stated chance of a false alarm.

Limit 1e-6 and not 0.05: dozens of such tests run on every push, and a flaky test is soon ignored.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-6


def assert_covariance(draws: np.ndarray, expected: np.ndarray, *, false_alarm: float = FALSE_ALARM) -> None:
    """Fail if independent normal draws (n, D) with mean 0 do not have the covariance `expected`.

    In whitened coordinates every squared coordinate sum is chi-square with n degrees, and every off-diagonal sum is
    close to normal with variance n; the limit is shared among all entries (Bonferroni).
    """
    count, dim = draws.shape
    white = draws @ np.linalg.inv(np.linalg.cholesky(expected)).T
    squares = (white**2).sum(axis=0)
    share = false_alarm / (dim * (dim + 1) / 2)
    low, high = stats.chi2.ppf([share / 2, 1 - share / 2], count)
    assert (squares > low).all() and (squares < high).all(), f"variances off: {squares / count}, {low / count:.3f}"
    products = (white.T @ white)[np.triu_indices(dim, 1)] / np.sqrt(count)
    # A sum of products of normals has heavier tails than a normal one; 1.5 covers them from 200 draws on.
    limit = 1.5 * stats.norm.ppf(1 - share / 2)
    assert (np.abs(products) < limit).all(), f"correlations off: {np.abs(products).max():.2f}, limit {limit:.2f}"

"""Standard errors over test rows: plain ones for means, bootstrap for everything else, paired for differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights of the rows (b, n) -> value of the metric for each set of weights (b,)."""

_LARGEST = 50_000_000
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Score:
    """A metric with its standard error over test rows, and what a paired comparison needs."""

    value: float
    se: float
    """NaN for a single row, of which nothing is known."""
    rows: np.ndarray | None = None
    """Contribution of each test row when the metric is their mean, shape (n,)."""
    replicates: np.ndarray | None = None
    """Bootstrap values of any other metric, shape (resamples,)."""

    def minus(self, other: Score) -> Score:
        """Return the paired difference self - other with its standard error; both scored on the same rows."""
        if self.rows is not None and other.rows is not None:
            return row_mean(self.rows - other.rows)
        if self.replicates is None or other.replicates is None:
            raise ValueError("A difference needs two scores of the same metric on the same resamples.")
        known = math.isfinite(self.se)
        return resampled(self.value - other.value, self.replicates - other.replicates, 2 if known else 1)

    def to_json(self) -> dict[str, float | None]:
        """Value and standard error."""
        return {"value": finite_or_none(self.value), "se": finite_or_none(self.se)}


def finite_or_none(value: float) -> float | None:
    """JSON has neither infinities nor NaN: None takes their place."""
    return value if math.isfinite(value) else None


def row_mean(rows: np.ndarray) -> Score:
    """Score of a metric that is a mean over rows: the plain standard error is the limit of the bootstrap."""
    rows = np.asarray(rows, dtype=np.float64)
    se = float(rows.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else math.nan
    return Score(float(rows.mean()), se, rows=rows)


def resampled(value: float, replicates: np.ndarray, rows: int) -> Score:
    """Score of any other metric with its bootstrap values, drawn from `rows` rows: their spread is its error."""
    se = float(replicates.std(ddof=1)) if rows > 1 else math.nan
    return Score(value, se, replicates=replicates)


def resample_counts(rng: np.random.Generator, rows: int, resamples: int = 1000) -> np.ndarray:
    """How often each row is drawn in each bootstrap resample, shape (resamples, rows).

    Above 50 million entries fewer resamples are drawn, never fewer than 200.
    """
    resamples = min(resamples, max(200, _LARGEST // max(rows, 1)))
    counts = np.empty((resamples, rows), dtype=np.int16)
    for line in counts:
        line[:] = np.bincount(rng.integers(0, rows, size=rows), minlength=rows)
    return counts


def bootstrap(statistic: Statistic, counts: np.ndarray) -> Score:
    """Score any metric that can be computed from row weights, with the bootstrap standard error.

    Args:
        statistic: Metric for each line of weights, (b, n) -> (b,).
        counts: Resampling counts from `resample_counts`, shape (resamples, n). Share them between methods to compare.
    """
    resamples, rows = counts.shape
    value = float(statistic(np.ones((1, rows)))[0])
    step = max(1, _CHUNK // max(rows, 1))
    parts = [statistic(counts[i : i + step].astype(np.float64)) for i in range(0, resamples, step)]
    return resampled(value, np.concatenate(parts), rows)

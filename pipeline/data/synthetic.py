"""Generated data for examples and tests; used as ``python:pipeline.data.synthetic:NAME``."""

from __future__ import annotations

import numpy as np

from pipeline.streams import stream


def snelson_like() -> tuple[np.ndarray, np.ndarray]:
    """A noisy curve on [0, 6] without any point in (2.2, 4.0): what a network says in the gap is the point.

    Returns:
        x (200, 1) and y (200,): y = sin(2 x) exp(-x / 8) + x / 10 + noise of standard deviation 0.15.
    """
    rng = stream(0, "snelson-like")
    x = np.concatenate([rng.uniform(0.0, 2.2, 100), rng.uniform(4.0, 6.0, 100)])
    rng.shuffle(x)
    y = np.sin(2 * x) * np.exp(-x / 8) + x / 10 + 0.15 * rng.standard_normal(len(x))
    return x[:, None], y


def two_moons() -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved half circles with noise.

    Returns:
        x (400, 2) and y (400,), class 0 or 1.
    """
    rng = stream(0, "two-moons")
    y = rng.integers(0, 2, 400)
    angle = rng.uniform(0.0, np.pi, 400)
    sign = 1 - 2 * y
    x = np.stack([np.cos(angle) * sign + y, np.sin(angle) * sign + 0.5 * y], axis=1)
    return x + 0.15 * rng.standard_normal(x.shape), y

"""Whether a MAP estimate has learned anything beyond the mean of the targets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.config import Config, likelihood_kind

_GAIN = 0.01
"""Least share of the constant predictor's NLL by which a network that has learned something is better."""


def constant_nll(config: Config, y: np.ndarray, noise_std: float | None) -> float | None:
    """Mean NLL of the training targets y under the best constant prediction, in nats a row; None if it is not defined.

    Class frequencies for classes, the mean for numbers with gaussian noise of `noise_std`.
    """
    if config.data.task == "classification":
        share = np.unique(y, return_counts=True)[1] / len(y)
        return float(-(share * np.log(share)).sum())
    if likelihood_kind(config) != "gaussian" or not noise_std:
        return None
    return math.log(noise_std) + 0.5 * math.log(2 * math.pi) + float(np.var(y)) / (2 * noise_std**2)


def collapse_note(config: Config, y: np.ndarray, info: dict[str, Any]) -> str | None:
    """What to tell a person whose MAP estimate predicts as well as a constant; None if it does better.

    Args:
        config: The run's configuration.
        y: Training targets, (rows,).
        info: `map.json`.
    """
    constant, nll = constant_nll(config, y, info["noise_std"]), info["nll"] / len(y)
    if constant is None or nll < constant - _GAIN * abs(constant):
        return None
    what = "the class frequencies" if config.data.task == "classification" else "the mean of the targets"
    precision = config.prior.precision
    now = f"now {precision:g}" if isinstance(precision, (int, float)) else f"now {info['prior_precision']}"
    return (
        f"Warning: the MAP estimate {info['start']} predicts no better than {what} (training NLL {nll:.4g} against "
        f"{constant:.4g} nats a row). With so few rows the prior may hold all weights at zero: lower prior.precision "
        f"({now}), or set it to auto. Otherwise raise map.steps (now {config.map.steps}) or map.learning_rate."
    )

"""SWAG follows its own recipe, and draws from the law that it states."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.bayes.baselines.swag import EPOCHS, RANK, Swag, fit_swag
from pipeline.streams import stream
from tests.checks import assert_covariance
from tests.targets import linear_regression, quadratic_minimum


def test_half_of_the_covariance_is_the_diagonal_and_half_that_of_the_deviations():
    rng = stream(0, "test-swag")
    mean, variance = torch.as_tensor(rng.normal(size=3)), torch.as_tensor(rng.uniform(0.5, 2, size=3))
    deviations = torch.as_tensor(rng.normal(size=(6, 3)))
    draws = Swag(mean, variance, deviations).draw(stream(1, "test-swag"), 4000)
    expected = (torch.diag(variance) + deviations.T @ deviations / 5) / 2
    assert_covariance((draws - mean).numpy(), expected.numpy())


def test_the_fit_is_that_of_a_plain_loop_over_epochs_and_batches():
    potential = linear_regression(40, 4)
    star, rates = quadratic_minimum(potential), (0.01, 0.03)
    found = fit_swag(potential, star, rates, 15, stream(0, "test-swag"))
    x, y = potential.x.numpy(), potential.y.numpy()
    for rate, swag in zip(rates, found, strict=True):
        rng, theta = stream(0, "test-swag"), star.numpy().copy()
        ends: list[np.ndarray] = []
        deviations: list[np.ndarray] = []
        for _ in range(EPOCHS):
            order = rng.permutation(40)
            for rows in (order[:15], order[15:30], order[30:]):
                slope = x[rows].T @ (x[rows] @ theta - y[rows]) / 0.5**2  # of the summed NLL; the prior precision is 1
                theta = theta - rate * (slope / len(rows) + theta / 40)
            ends.append(theta)
            deviations.append(theta - np.mean(ends, axis=0))
        np.testing.assert_allclose(swag.mean, np.mean(ends, axis=0), rtol=1e-9)
        np.testing.assert_allclose(swag.variance, np.var(ends, axis=0), rtol=1e-6)
        np.testing.assert_allclose(swag.deviations, deviations[-RANK:], atol=1e-10)

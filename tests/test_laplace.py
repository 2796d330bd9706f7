"""The Laplace approximations are exact where the posterior is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.bayes.baselines.laplace import Laplace, gauss_newton_matrix
from pipeline.bayes.baselines.second_opinion import INSTALL, SecondOpinion
from pipeline.bayes.likelihood import Categorical, Gaussian
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.models import seeded
from pipeline.streams import stream
from tests import own
from tests.checks import assert_covariance


def linear_gaussian(rows: int = 40) -> tuple[Potential, np.ndarray]:
    """A linear model with Gaussian noise, and its exact posterior covariance."""
    rng = stream(0, "test-laplace")
    x = rng.normal(size=(rows, 3))
    module = torch.nn.Linear(3, 1, dtype=torch.float64)
    network = Network(module, dtype=torch.float64)
    precision = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    y = torch.as_tensor(rng.normal(size=rows))
    design = np.column_stack([x, np.ones(rows)])
    covariance = np.linalg.inv(design.T @ design / 0.25 + np.diag(precision.numpy()))
    return Potential(network, Gaussian(0.5), precision, torch.as_tensor(x), y), covariance


def test_laplace_is_the_exact_posterior_of_a_linear_gaussian_model():
    potential, covariance = linear_gaussian()
    model = Laplace.fit(potential, potential.network.theta())
    offsets = model.offsets(stream(1, "test-laplace"), 4000, 1.0)
    assert_covariance(offsets.numpy(), covariance)


def test_laplace_torch_is_of_the_same_opinion_about_a_linear_gaussian_model():
    pytest.importorskip("laplace", reason="laplace-torch cannot be an extra; " + INSTALL)
    potential, covariance = linear_gaussian()
    model = SecondOpinion(potential, potential.network.theta())
    outputs = model.outputs(potential.x, 4000, 1.0, stream(1, "test-laplace"))[..., 0].numpy()
    design = np.column_stack([potential.x.numpy(), np.ones(potential.rows)])
    expected = np.einsum("ni,ij,nj->n", design, covariance, design)
    # The relative standard error of a variance from 4000 draws is sqrt(2 / 4000) = .022: six of them.
    assert np.allclose(outputs.var(axis=0) / expected, 1, atol=0.134)


@pytest.mark.parametrize("make", [own.conv, own.recurrent, own.stacked, own.opaque])
def test_laplace_takes_every_network_whether_or_not_torch_func_does(make):
    """Recurrent layers have no batching rule, and functions of a user's own may be differentiable only once."""
    with seeded(stream(0, "init")):
        network = Network(make(), dtype=torch.float64)
    x, y = own.images() if make is own.conv else own.sequences()
    x, y = torch.as_tensor(x[:20]).double(), torch.as_tensor(y[:20])
    likelihood = Categorical(4 if make is own.conv else 2)
    flat = torch.zeros(network.dim, dtype=torch.float64)
    exact = Potential(network, likelihood, flat, x, y).gauss_newton(network.theta(), torch.diag(flat + 1))
    found = gauss_newton_matrix(network, likelihood, network.theta(), x)
    # Where torch has no second derivative the reference is a difference, good to eight digits.
    assert (found - exact).norm() < 1e-8 * exact.norm()


def test_linearised_laplace_equals_the_network_where_the_network_is_linear():
    potential, _ = linear_gaussian()
    model = Laplace.fit(potential, potential.network.theta())
    offsets = model.offsets(stream(1, "test-laplace"), 3, 1.0)
    for offset, outputs in zip(offsets, model.linearised(offsets, potential.x), strict=True):
        assert torch.allclose(outputs, potential.network.outputs(model.theta_star + offset, potential.x))

"""The mathematics of the deformation: ridge cores, streamed bases, the control, and the laws that draws begin from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pipeline.bayes.deformation.base import FreeLaw, deal
from pipeline.bayes.deformation.basis import Sketch, leading_basis, orthonormalise_, random_probe
from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.bayes.deformation.metric import Autoencoder, Metric
from pipeline.bayes.deformation.ridge import Moments, fit_core
from tests.checks import FALSE_ALARM, assert_covariance


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_ridge_finds_a_linear_map_and_its_penalty(noise: float) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.c_[np.ones(400), rng.standard_normal((400, 20))])
    weights = torch.from_numpy(rng.standard_normal((21, 3)))
    y = x @ weights + noise * torch.from_numpy(rng.standard_normal((400, 3)))
    core = fit_core(Moments.of(x[:300], y[:300]), Moments.of(x[300:], y[300:]))
    direct = float((x[300:] @ core.weights - y[300:]).square().sum() / y[300:].square().sum())
    assert core.error == pytest.approx(direct, rel=1e-6, abs=1e-12)
    assert direct < max(1e-12, 3 * noise**2)


def test_streamed_basis_is_that_of_all_rows() -> None:
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.standard_normal((60, 5)) @ rng.standard_normal((5, 40))).float()
    sketch = Sketch(random_probe(40, 12, rng))
    for part in rows.split(7):
        sketch.add(part)
    sketch = Sketch(orthonormalise_(sketch.total))
    for part in rows.split(7):
        sketch.add(part)
    basis = leading_basis(sketch, 5)
    assert torch.allclose(basis @ basis.T, torch.eye(5), atol=1e-4)
    assert float((rows - rows @ basis.T @ basis).norm() / rows.norm()) < 1e-4


def gaussian(points: Tensor) -> Gaussian:
    return Gaussian(1.0, points.shape[1], len(points), lambda radius: iter(points.split(16)))


def test_gaussian_control_draws_have_the_mean_and_covariance_of_the_points() -> None:
    rng = np.random.default_rng(2)
    points = torch.from_numpy(rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)) + 3)
    draws = gaussian(points).draw(np.random.default_rng(3), 2000).numpy()
    root = np.linalg.cholesky(np.cov(points.numpy().T))
    z = np.linalg.solve(root, (draws - points.numpy().mean(0)).T)  # standard normal if the law holds
    assert (z.mean(axis=1) ** 2).sum() * 2000 < stats.chi2.ppf(1 - FALSE_ALARM, 4)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 8000)
    assert low < (z**2).sum() < high
    assert abs(np.corrcoef(z) - np.eye(4)).max() < stats.norm.ppf(1 - FALSE_ALARM / 12) / np.sqrt(2000)


def test_gaussian_control_refuses_another_number_of_points() -> None:
    points = torch.zeros(8, 3)
    with pytest.raises(ValueError, match="made from 9"):
        Gaussian(1.0, 3, 9, lambda radius: iter([points])).draw(np.random.default_rng(0), 2)


def test_free_directions_have_unit_length_and_survive_a_file() -> None:
    law = FreeLaw(30, torch.linspace(1, 2, 30))
    again = FreeLaw.from_tensors(law.to_tensors())
    d = again.directions(np.random.default_rng(0), 5)
    assert torch.equal(d, law.directions(np.random.default_rng(0), 5))
    assert torch.allclose(d.norm(dim=1), torch.ones(5))


def test_directions_of_a_tilted_walk_have_the_law_of_its_drift() -> None:
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    law = FreeLaw(2, scale, unit=False, reach=5.0)
    assert FreeLaw.from_tensors(law.to_tensors()).reach == 5.0
    drift = 5.0 * law.directions(np.random.default_rng(0), 2000, torch.float64)
    assert_covariance(drift.numpy(), np.diag([1.0, 4.0]))


def test_the_metric_kind_draws_the_gaussian_of_the_latents_at_the_nearest_radius() -> None:
    rng = np.random.default_rng(4)
    model = Autoencoder(2, 2, []).double()  # a linear decoder, so that the law of the draws is known
    roots, means = torch.from_numpy(rng.normal(size=(2, 2, 2))), torch.from_numpy(rng.normal(size=(2, 2)))
    parts = torch.tensor([1.0, -1.0]).double(), torch.tensor(0.5).double(), model, torch.tensor([1.0, 2.0]).double()
    metric = Metric.from_tensors(Metric(2.0, *parts, means, roots).to_tensors())
    (layer,) = model.decoder
    weight, bias = (p.detach() for p in layer.parameters())
    for node, radius in enumerate((1.2, None)):
        center = parts[0] + 0.5 * (weight @ means[node] + bias)
        root = 0.5 * weight @ roots[node]
        draws = metric.draw(np.random.default_rng(5), 2000, radius) - center
        assert_covariance(draws.numpy(), (root @ root.T).numpy())


def test_draws_are_dealt_to_starts_in_turns_and_in_proportion() -> None:
    owners = deal([30, 10], 400)
    assert np.bincount(owners).tolist() == [300, 100]
    assert (deal([30, 10], 37) == owners[:37]).all()
    assert sorted(deal([5, 5, 5], 3).tolist()) == [0, 1, 2]

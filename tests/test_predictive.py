"""Model averages do not depend on how draws are batched, and uncertainty splits as it should."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from pipeline.bayes import predictive
from pipeline.bayes.baselines.scaling import fit_noise, fit_scale, rescale, with_noise
from pipeline.bayes.likelihood import Categorical, Gaussian, Heteroscedastic
from pipeline.bayes.params import Network
from pipeline.bayes.predictive import Averaged, AveragedLikelihood, PredictiveAverage, draw_nll
from pipeline.plan import stream


def small(outputs: int) -> tuple[Network, torch.Tensor, np.ndarray]:
    network = Network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))
    rng = stream(0, "test-predictive")
    theta = torch.as_tensor(rng.normal(size=(10, network.dim)), dtype=torch.float32)
    return network, theta, rng.normal(size=(6, 3)).astype(np.float32)


@pytest.mark.parametrize("likelihood", [Categorical(3), Gaussian(0.3), Heteroscedastic()])
def test_average_does_not_depend_on_the_batches_of_draws(likelihood):
    network, theta, x = small(likelihood.columns)
    y = np.zeros(6, dtype=np.int64) if isinstance(likelihood, Categorical) else np.zeros(6)
    results = []
    for size in (1, 3, 10):
        average = PredictiveAverage(likelihood, y)
        for first in range(0, 10, size):
            average.add(network, theta[first : first + size], torch.as_tensor(x))
        results.append(average.result())
    for other in results[1:]:
        assert np.allclose(results[0].nll(y), other.nll(y), atol=1e-6)
        assert np.allclose(results[0].total, other.total, atol=1e-6)
        assert np.allclose(results[0].nll_draws, other.nll_draws, atol=1e-6)


@pytest.mark.parametrize("likelihood", [Categorical(3), Gaussian(0.3)])
def test_average_does_not_depend_on_how_many_rows_pass_together(likelihood, monkeypatch):
    network, theta, x = small(likelihood.columns)
    y = np.array([0, 1, 2, 0, 1, 2]) if isinstance(likelihood, Categorical) else np.linspace(-1, 1, 6)
    found = []
    for elements in (predictive._ELEMENTS, 2 * 10 * network.elements(torch.as_tensor(x))):
        monkeypatch.setattr(predictive, "_ELEMENTS", elements)
        pieces = [rows for rows, _ in predictive.draw_outputs(network, theta, torch.as_tensor(x))]
        average = PredictiveAverage(likelihood, y)
        average.add(network, theta, torch.as_tensor(x))
        nll = draw_nll(network, likelihood, theta, torch.as_tensor(x), torch.as_tensor(y))
        found.append((len(pieces), average.result().nll(y), nll))
    (whole, *one), (parts, *other) = found
    assert (whole, parts) == (1, 3)
    for first, second in zip(one, other, strict=True):
        assert np.allclose(first, second, atol=1e-6)


def test_class_uncertainty_splits_into_mean_entropy_and_mutual_information():
    certain = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    undecided = np.full((2, 1, 2), 0.5)
    for draws, aleatoric, epistemic in ((certain, 0.0, np.log(2)), (undecided, np.log(2), 0.0)):
        average = PredictiveAverage(Categorical(2))
        average.add_predictions(draws)
        result = average.result()
        assert result.aleatoric[0] == pytest.approx(aleatoric, abs=1e-12)
        assert result.epistemic[0] == pytest.approx(epistemic, abs=1e-12)


@pytest.mark.parametrize("components", [True, False])
def test_variance_splits_by_the_law_of_total_variance_in_the_unit_of_the_target(components):
    rng = stream(1, "test-variance")
    outputs = rng.normal(size=(50, 4, 1))
    average = PredictiveAverage(Gaussian(0.5), shift=100.0, scale=10.0, components=components)
    average.add_outputs(torch.as_tensor(outputs))
    result = average.result()
    assert np.allclose(result.aleatoric, 25.0)
    assert np.allclose(result.epistemic, 100 * outputs[..., 0].var(axis=0))
    assert result.mean is not None
    assert np.allclose(result.mean.mean(axis=0), 100 + 10 * outputs[..., 0].mean(axis=0))


def test_averaged_likelihood_is_the_nll_of_the_average():
    likelihood = Categorical(3)
    network, theta, x = small(3)
    y = np.array([0, 1, 2, 0, 1, 2])
    average, stream_of_nll = PredictiveAverage(likelihood, y), AveragedLikelihood(6)
    for piece in (theta[:4], theta[4:]):
        average.add(network, piece, torch.as_tensor(x))
        stream_of_nll.add(draw_nll(network, likelihood, piece, torch.as_tensor(x), torch.as_tensor(y)))
    assert np.allclose(stream_of_nll.rows(), average.result().nll(y), atol=1e-9)


def test_temperature_finds_the_temperature_that_made_the_labels():
    rng = stream(2, "test-temperature")
    logits = rng.normal(size=(20_000, 3)) * 2
    true = np.exp(logits / 3) / np.exp(logits / 3).sum(axis=1, keepdims=True)
    y = (true.cumsum(axis=1) > rng.uniform(size=(len(true), 1))).argmax(axis=1)
    sharp = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    averaged = Averaged(1, np.zeros(len(y)), np.zeros(len(y)), probabilities=sharp)
    found = fit_scale(averaged, y)
    # The standard error of log T with 20 000 rows is about 0.012, so this is six of them.
    assert found == pytest.approx(3.0, rel=0.075)
    assert rescale(averaged, found).nll(y).mean() < averaged.nll(y).mean()


@pytest.mark.parametrize("likelihood", [Categorical(3), Gaussian(0.3)])
def test_a_temperature_acts_on_the_average_and_not_on_its_draws(likelihood):
    network, theta, x = small(likelihood.columns)
    y = np.array([0, 1, 2, 0, 1, 2]) if isinstance(likelihood, Categorical) else np.zeros(6)
    for draws in (theta, theta[:1]):
        average = PredictiveAverage(likelihood, y)
        average.add(network, draws, torch.as_tensor(x))
        before = average.result()
        after = rescale(before, 2.0, y)
        assert not np.allclose(after.nll(y), before.nll(y))
        # The only draw of a MAP estimate is the average.
        expected = before.nll_draws if len(draws) > 1 else after.nll(y)
        assert np.allclose(np.asarray(after.nll_draws), np.asarray(expected))
        assert (after.hit_draws is None) == (before.hit_draws is None)
        if after.hit_draws is not None:
            assert np.array_equal(after.hit_draws, np.asarray(before.hit_draws))


def test_a_temperature_stays_finite_where_every_row_is_right():
    p = np.tile([0.9, 0.1], (30, 1))
    averaged = Averaged(1, np.zeros(30), np.zeros(30), probabilities=p)

    def loss(log_scale: float) -> float:  # a normal prior of unit width on the logarithm, as half a nat in all
        return 30 * np.log1p(np.exp(-np.log(9.0) * np.exp(-log_scale))) + log_scale**2 / 2

    best = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-8})
    assert np.log(fit_scale(averaged, np.zeros(30, dtype=np.int64))) == pytest.approx(best.x, abs=1e-3)
    assert best.x > -1.5


def test_scale_of_a_mixture_finds_the_width_that_made_the_targets():
    rng = stream(3, "test-scale")
    mean, variance = rng.normal(size=(4, 20_000)) * 0.1, np.full((4, 20_000), 0.01)
    y = mean.mean(axis=0) + 2.5 * (rng.permuted(mean, axis=0)[0] - mean.mean(axis=0) + 0.1 * rng.normal(size=20_000))
    averaged = Averaged(4, np.zeros(1), np.zeros(1), mean=mean, variance=variance)
    # The squares of 20 000 residuals give a width with a relative error of about sqrt(1 / 40 000) = .005: ten of them.
    assert fit_scale(averaged, y) == pytest.approx(2.5, rel=0.05)


def test_noise_is_fitted_without_touching_what_the_draws_disagree_about():
    rng = stream(4, "test-noise")
    mean, variance = rng.normal(size=(16, 20_000)), np.full((16, 20_000), 1.0)
    y = rng.permuted(mean, axis=0)[0] + 0.4 * rng.normal(size=20_000)
    averaged = Averaged(16, np.ones(20_000), mean.var(axis=0), mean=mean, variance=variance)
    found = fit_noise(averaged, y)
    # The error of the factor is about 0.005 here; a stretch of the whole mixture would have to give 0.76.
    assert found == pytest.approx(0.4, abs=0.03)
    fitted = with_noise(averaged, found)
    assert np.array_equal(fitted.epistemic, averaged.epistemic) and np.allclose(fitted.aleatoric, found**2)
    assert fitted.nll(y).mean() < rescale(averaged, fit_scale(averaged, y)).nll(y).mean() < averaged.nll(y).mean()


def test_noise_stays_finite_where_a_draw_meets_every_target():
    mean = np.array([[0.0], [2.0]]).repeat(30, axis=1)
    averaged = Averaged(2, np.ones(30), np.ones(30), mean=mean, variance=np.ones((2, 30)))
    assert fit_noise(averaged, np.zeros(30)) == pytest.approx(0.05, rel=0.01)

"""Potentials, their products, curvature and the MAP search against autograd and linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import ArpackNoConvergence
from torch import nn

from pipeline.bayes import curvature as curvature_module
from pipeline.bayes import minimise
from pipeline.bayes import target as target_module
from pipeline.bayes.curvature import measure, occam
from pipeline.bayes.likelihood import Bernoulli, Categorical, Gaussian, Heteroscedastic
from pipeline.bayes.minimise import certify, first_order, quasi_newton
from pipeline.bayes.params import Network, ParameterLayout
from pipeline.bayes.target import Potential, prior_precision
from pipeline.errors import InputError
from pipeline.plan import stream
from tests.targets import hessian, linear_regression, quadratic_minimum, softmax_classifier

LIKELIHOODS = [(Categorical(3), 3), (Bernoulli(), 1), (Gaussian(0.7), 1), (Heteroscedastic(), 2)]


def small_problem(likelihood, columns: int) -> Potential:
    generator = torch.Generator().manual_seed(1)
    network = Network(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, columns)), dtype=torch.float64)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        y = torch.randint(0, 3, (30,), generator=generator)
    elif isinstance(likelihood, Bernoulli):
        y = (y > 0).double()
    return Potential(network, likelihood, prior_precision(network.layout, 0.3, torch.float64), x, y, row_batch=7)


@pytest.mark.parametrize(("likelihood", "columns"), LIKELIHOODS)
def test_gradient_and_hessian_products_equal_autograd(likelihood, columns):
    potential = small_problem(likelihood, columns)
    theta = torch.randn(potential.network.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = torch.autograd.functional.hessian(lambda t: potential.value(t[None])[0], theta)
    leaf = theta.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(potential.value(leaf[None])[0], leaf)
    assert torch.allclose(potential.gradient(theta[None])[0][0], slope)
    assert torch.allclose(hessian(potential, theta), whole)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("likelihood", "columns"), LIKELIHOODS)
def test_curvature_products_are_the_same_whatever_number_of_vectors_passes_together(likelihood, columns, monkeypatch):
    potential = small_problem(likelihood, columns)
    theta, eye = potential.network.theta(), torch.eye(potential.network.dim, dtype=torch.float64)
    whole = potential.hvp(theta, eye), potential.gauss_newton(theta, eye)
    # Two layers with five units and one without any of its own: 10 elements and the outputs for each of 7 rows.
    monkeypatch.setattr(target_module, "VECTOR_ELEMENTS", 3 * 7 * (10 + columns))
    assert potential._together() == 3
    for found, expected in zip((potential.hvp(theta, eye), potential.gauss_newton(theta, eye)), whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("likelihood", "columns"), LIKELIHOODS)
def test_differences_of_gradients_equal_exact_hessian_products(likelihood, columns, monkeypatch):
    potential = small_problem(likelihood, columns)
    theta = torch.randn(potential.network.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = hessian(potential, theta)
    monkeypatch.setattr(target_module, "DIFFERENCED", 0)
    assert torch.allclose(hessian(potential, theta), whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize(("likelihood", "columns"), LIKELIHOODS)
def test_the_root_of_the_curvature_squares_to_it(likelihood, columns):
    outputs = torch.randn(4, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = torch.eye(columns, dtype=torch.float64)
    product = torch.stack([likelihood.curvature_product(outputs, e.expand(4, columns)) for e in basis], dim=-1)
    roots = torch.stack([likelihood.curvature_root(outputs, e.expand(4, columns)) for e in basis], dim=-1)
    assert torch.allclose(roots @ roots.mT, product, atol=1e-12)


def test_a_target_that_is_met_exactly_does_not_make_the_likelihood_unbounded():
    outputs = torch.tensor([[0.3, -1000.0], [0.3, 1000.0]], dtype=torch.float64)
    nll = Heteroscedastic().nll(outputs, torch.tensor([0.3, 0.3], dtype=torch.float64))
    bound = 0.5 * float(np.log(2 * np.pi * 1e-4))
    assert nll[0] == pytest.approx(bound) and nll[1] == pytest.approx(500 + 0.5 * float(np.log(2 * np.pi)))


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    potential = linear_regression(20, 6)
    theta = torch.ones(6, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(potential.gauss_newton(theta, eye), hessian(potential, theta))


def test_prior_precision_takes_the_first_expression_that_is_found():
    layout = ParameterLayout(("0.weight", "0.bias"), ((2, 3), (2,)))
    precision = prior_precision(layout, {"bias": 5.0, ".*": 2.0}, torch.float64)
    assert precision.tolist() == [2.0] * 6 + [5.0] * 2
    with pytest.raises(InputError, match=r"0\.weight"):
        prior_precision(layout, {"bias": 5.0}, torch.float64)


def test_lanczos_agrees_with_the_whole_matrix(monkeypatch):
    potential = softmax_classifier()
    theta = quasi_newton(potential, potential.network.theta(), 1e-8, 2000)
    whole = measure(potential, theta, 6, stream(0, "test"))
    monkeypatch.setattr(curvature_module, "DENSE_DIM", 1)
    lanczos = measure(potential, theta, 6, stream(0, "test"))
    assert lanczos.lambda_max == pytest.approx(whole.lambda_max, rel=1e-6)
    assert torch.allclose(lanczos.values, whole.values, rtol=1e-3)
    assert whole.deflated_max <= lanczos.deflated_max <= 1.1 * whole.deflated_max
    # Hutchinson with six random signs: the standard error of the trace is below sqrt(2 tr / 6); false alarm below 1e-6.
    assert abs(lanczos.gamma - whole.gamma) < 5 * np.sqrt(2 * whole.gamma / 6)
    eye = lanczos.vectors @ lanczos.vectors.T
    assert torch.allclose(eye, torch.eye(len(eye), dtype=eye.dtype), atol=1e-6)


def test_no_step_size_is_divided_by_a_curvature_that_is_not_positive(monkeypatch):
    potential = softmax_classifier()
    theta = potential.network.theta()  # not a minimum: some curvatures are negative
    dim = len(theta)
    assert float(torch.linalg.eigvalsh(hessian(potential, theta))[0]) < 0
    for dense in (dim, 1):
        monkeypatch.setattr(curvature_module, "DENSE_DIM", dense)
        found = measure(potential, theta, dim, stream(0, "test"))
        assert len(found.values) and (found.values > 0).all() and found.lambda_max == float(found.values[0])


def test_where_lanczos_finds_no_pair_the_largest_curvature_comes_from_power_iteration(monkeypatch):
    def gives_up(*_args, **_settings):
        raise ArpackNoConvergence("no pair", np.zeros(0), np.zeros((len(theta), 0)))

    potential = softmax_classifier()
    theta = quasi_newton(potential, potential.network.theta(), 1e-8, 2000)
    whole = measure(potential, theta, 6, stream(0, "test"))
    monkeypatch.setattr(curvature_module, "DENSE_DIM", 1)
    monkeypatch.setattr(curvature_module, "eigsh", gives_up)
    found = measure(potential, theta, 6, stream(0, "test"))
    assert len(found.values) == 0
    # Power iteration approaches from below and adds twice its last change, which is at most a thousandth.
    assert whole.lambda_max * 0.99 <= found.lambda_max <= 1.1 * whole.lambda_max
    assert found.deflated_max == found.lambda_max


def test_curvature_on_a_part_of_the_rows_takes_the_fast_form_of_the_gradient(monkeypatch):
    """A reference form in its place holds the layers of 32 points for all of these rows at once."""
    potential = softmax_classifier(rows=60)
    theta = potential.network.theta()
    asked: list[torch.Tensor | None] = []
    plain = potential.nll_gradient

    def fast(points: torch.Tensor, rows: torch.Tensor | None = None):
        asked.append(rows)
        return plain(points, rows)

    potential.nll_gradient = fast
    monkeypatch.setattr(target_module, "DIFFERENCED", 0)
    part = measure(potential, theta, 4, stream(0, "test"), max_rows=20)
    assert asked and all(rows is not None and len(rows) == 20 for rows in asked)
    rows = asked[0]
    assert rows is not None
    x, y = potential.x[rows], potential.y[rows]
    few = Potential(potential.network, potential.likelihood, potential.precision / 3, x, y)
    expected = 3 * float(torch.linalg.eigvalsh(hessian(few, theta))[-1])
    assert part.lambda_max == pytest.approx(expected, rel=1e-6)


def test_gamma_of_a_linear_model_is_its_trace():
    potential = linear_regression(40, 8, alpha=3.0)
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    expected = torch.trace(torch.linalg.solve(h, h - 3 * torch.eye(8, dtype=torch.float64)))
    assert measure(potential, star, 2, stream(0, "test")).gamma == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("dense", [True, False])
def test_the_volume_of_the_evidence_is_a_log_determinant(dense, monkeypatch):
    """Half of it is what a Laplace marginal likelihood subtracts: log det (I + H_data / alpha) / 2."""
    monkeypatch.setattr(curvature_module, "DENSE_DIM", 10 if dense else 1)
    potential = linear_regression(40, 8, alpha=3.0)
    # Columns at right angles: of a diagonal matrix every vector of signs gives the exact trace, so that nothing is left
    # to chance.
    potential.x = torch.linalg.qr(potential.x)[0] * torch.logspace(1, -1, 8, dtype=torch.float64)
    theta = quadratic_minimum(potential)
    values = torch.linalg.eigvalsh(hessian(potential, theta)) / 3  # 1 + a
    gamma, volume = occam(potential, theta, stream(0, "test"))
    assert gamma == pytest.approx(float((1 - 1 / values).sum()), rel=1e-9)
    assert volume == pytest.approx(float(values.log().sum()), rel=1e-9)


def test_the_map_search_finds_the_minimum_and_certifies_what_is_left():
    potential = softmax_classifier(alpha=0.1)
    begun = first_order(potential, potential.network.theta(), 50, 0.01, 16, stream(0, "test"))
    far, near = certify(potential, begun), certify(potential, quasi_newton(potential, begun, 1e-6, 3000))
    assert near.grad_norm < 1e-6 and near.decrement < 1e-9
    assert far.decrement > 0.1 and far.potential > near.potential


def test_a_first_order_step_on_a_minibatch_follows_the_gradient_of_all_rows(monkeypatch):
    """By plain gradient descent in the place of Adam, which does not see by what a gradient is multiplied."""
    monkeypatch.setattr(minimise, "adam", lambda theta, slope, *_, lr, **__: theta[0].sub_(slope[0], alpha=lr))
    potential = linear_regression(40, 6, alpha=3.0)
    theta = torch.ones(6, dtype=torch.float64)
    rows = torch.as_tensor(stream(0, "test").permutation(40)[:16])
    gradient = potential.nll_gradient(theta[None], rows)[0][0] * 40 / 16 + 3.0 * theta
    found = first_order(potential, theta, 1, 0.01, 16, stream(0, "test"))
    assert torch.allclose(found, theta - 0.01 * gradient, rtol=1e-12)


def test_the_decrement_of_a_quadratic_is_exact():
    potential = linear_regression(40, 6)
    star = quadratic_minimum(potential)
    point = certify(potential, star + 0.1)
    fall = potential.value((star + 0.1)[None])[0] - potential.value(star[None])[0]
    assert point.decrement == pytest.approx(float(fall), rel=1e-6)


def test_tied_parameters_appear_once_and_state_dicts_are_complete():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    module[2].weight = module[0].weight
    network = Network(module)
    assert network.layout.names == ("0.weight", "1.weight", "1.bias")
    moved = network.theta() + 1
    state = network.state_dict(moved)
    module.load_state_dict(state)
    assert torch.equal(network.theta(), moved) and torch.equal(state["2.weight"], state["0.weight"])


def test_inputs_by_name_and_by_position():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.layer(a - b)

    network = Network(Two())
    a, b = torch.randn(4, 2), torch.randn(4, 2)
    theta = network.theta()
    assert torch.equal(network.outputs(theta, {"b": b, "a": a}), network.outputs(theta, (a, b)))
    assert network.outputs_many(torch.stack([theta, theta + 1]), (a, b)).shape == (2, 4, 1)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="weight"):
        Network(nn.Linear(2, 1), parameters="head")

"""Walks obey the laws that they claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.bayes.curvature import measure
from pipeline.bayes.kernels import nll_gradient
from pipeline.bayes.walk import (
    WalkKernel,
    advance,
    deflated_correction,
    init,
    minibatch_gradient,
    plain_correction,
    set_anchor,
    tilt_vector,
)
from pipeline.plan import stream
from tests.checks import assert_covariance
from tests.targets import directions, hessian, linear_regression, quadratic_minimum, walk

LENGTH = 3.0


def law(h: Tensor, eta: Tensor, drift: np.ndarray, steps: int) -> Tensor:
    """(1/eta) H^-1 (I - eta H) [I - (I - eta H)^T] times the drift of one step, in the eigenbasis of H."""
    values, vectors = torch.linalg.eigh(h)
    shrink = 1 - eta * values
    factor = shrink * (1 - shrink**steps) / (eta * values) / steps
    return torch.as_tensor(drift) @ vectors * factor @ vectors.T


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_plain_walk_follows_the_quadratic_law(steps):
    potential = linear_regression(40, 12)
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    eta = 0.3 / torch.linalg.eigvalsh(h)[-1]
    drift = LENGTH * directions(5, 12)
    state = walk(potential, star, drift, steps, step_size=float(eta))
    expected = law(h, eta.expand(12), drift, steps)
    assert torch.linalg.norm(state.position - star - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_deflated_walk_follows_the_quadratic_law(steps):
    potential = linear_regression(40, 12)
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    curvature = measure(potential, star, 4, stream(0, "test"))
    drift = LENGTH * directions(5, 12)
    state = walk(potential, star, drift, steps, correction=deflated_correction(curvature, 0.5))
    values = torch.linalg.eigvalsh(h)
    eta = 0.5 / values.clamp_min(values.flip(0)[3])
    expected = law(h, eta, drift, steps)
    assert torch.linalg.norm(state.position - star - expected) < 1e-6 * torch.linalg.norm(expected)


def test_the_law_catches_a_walk_that_corrects_before_it_drifts():
    potential = linear_regression(40, 12)
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    eta = 0.3 / torch.linalg.eigvalsh(h)[-1]
    drift = LENGTH * directions(5, 12)
    state = walk(potential, star, drift, 10, step_size=float(eta))
    wrong = state.position + torch.as_tensor(drift / 10)
    expected = law(h, eta.expand(12), drift, 10)
    assert torch.linalg.norm(wrong - star - expected) > 1e-2 * torch.linalg.norm(expected)


def test_momentum_walk_settles_where_the_drift_balances_the_pull():
    # At rest m = drift * -1 and m = mu m - eta g, so g = (1 - mu) drift / eta: (1 - mu) times the plain displacement.
    potential = linear_regression(40, 4, alpha=5.0)
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    eta, mu, steps = 0.15 / float(torch.linalg.eigvalsh(h)[-1]), 0.95, 3000
    drift = LENGTH * directions(3, 4)
    state = walk(potential, star, drift, steps, step_size=eta, momentum=mu)
    gradient = potential.gradient(state.position + torch.as_tensor(drift / steps))[0]
    expected = (1 - mu) * torch.as_tensor(drift / steps) / eta
    assert torch.linalg.norm(gradient - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_a_walk_is_free_inside_the_fiber_and_held_across_it(momentum):
    # Fewer rows than parameters and almost no prior: the fiber is the null space of X.
    potential = linear_regression(5, 12, alpha=1e-8, seed=3)
    star = quadratic_minimum(potential)
    values, vectors = torch.linalg.eigh(hessian(potential, star))
    drift = LENGTH * directions(6, 12)
    state = walk(potential, star, drift, 1000, step_size=float(0.3 / values[-1]), momentum=momentum)
    moved, free = (state.position - star) @ vectors, torch.as_tensor(drift) @ vectors
    flat = values < 1e-6
    assert torch.allclose(moved[:, flat], free[:, flat], rtol=1e-4)
    # Across: at most the balance (drift of a step) / (eta h).
    balance = free[:, ~flat].abs() / 1000 / (0.3 / values[-1] * values[~flat])
    assert (moved[:, ~flat].abs() <= 1.5 * balance + 1e-6).all()


def test_a_minibatch_is_unbiased_and_exact_at_the_start():
    potential = linear_regression(6, 3)
    star = quadratic_minimum(potential) + 0.1  # the law holds wherever walks begin
    points = star + torch.as_tensor(directions(4, 3))

    class Turn:
        """Gives every row once, one after the other."""

        def __init__(self, row: int):
            self.row = row

        def choice(self, rows: int, size: int, *, replace: bool) -> np.ndarray:
            assert (rows, size, replace) == (6, 1, False)
            return np.array([self.row])

    batch = minibatch_gradient(potential, star, 1, cast(Callable[[int], np.random.Generator], Turn))
    parts = [batch(points, row) for row in range(6)]
    exact, nll = potential.gradient(points)
    assert torch.allclose(torch.stack([gradient for gradient, _ in parts]).mean(0), exact)
    assert torch.allclose(torch.stack([value for _, value in parts]).mean(0), nll)
    for row in range(6):
        at_star, level = batch(star[None], row)
        assert torch.allclose(at_star, potential.gradient(star[None])[0])
        assert torch.allclose(level, potential.nll(star[None]))


def test_outside_of_the_stiff_directions_the_certificate_sets_the_step():
    potential = linear_regression(40, 12)
    curvature = measure(potential, quadratic_minimum(potential), 4, stream(0, "test"))
    last = float(curvature.values[-1])
    for certified, rest in ((3 * last, 3 * last), (last / 3, last)):
        displace = deflated_correction(dataclasses.replace(curvature, deflated_max=certified), 0.5)
        assert torch.allclose(displace(curvature.vectors), curvature.vectors * (0.5 / curvature.values)[:, None])
        other = torch.as_tensor(directions(3, 12))
        other -= other @ curvature.vectors.T @ curvature.vectors
        assert torch.allclose(displace(other), other * (0.5 / rest))


class _Product(torch.nn.Module):
    """f(x) = w1 w2 x, whose fiber is a hyperbola."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w[0] * self.w[1] * x


class _ReluPair(torch.nn.Module):
    """f(x) = v relu(w x): rescaling w up and v down by the same factor changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w[1] * torch.relu(self.w[0] * x)


@pytest.mark.parametrize("module", [_Product(), _ReluPair()])
def test_walks_stay_on_a_curved_fiber(module):
    from pipeline.bayes.likelihood import Gaussian
    from pipeline.bayes.params import Network
    from pipeline.bayes.target import Potential

    network = Network(module, dtype=torch.float64)
    x = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)[:, None]
    potential = Potential(network, Gaussian(0.1), torch.full((2,), 1e-9, dtype=torch.float64), x, x[:, 0])
    star = torch.ones(2, dtype=torch.float64)
    lambda_max = float(torch.linalg.eigvalsh(hessian(potential, star))[-1])
    drift = 2.0 * directions(8, 2)
    # The curvature w1^2 + w2^2 grows along the hyperbola, so the step size is a tenth of the usual one.
    state = walk(potential, star, drift, 1500, step_size=0.03 / lambda_max)
    product = state.position[:, 0] * state.position[:, 1]
    # Across the fiber a walk rests where the pull equals the drift, at most (L / T) / eta h from it; with h growing as
    # w1^2 + w2^2 from 2, the product is then off by at most sqrt(2) (L / T) / 0.03.
    assert (product - 1).abs().max() < 2**0.5 * (2.0 / 1500) / 0.03
    assert (state.position - star).norm(dim=1).max() > 0.5, "no walk has moved"


def test_the_guard_keeps_a_walk_below_its_limit_and_pauses_the_drift():
    potential = linear_regression(40, 12)
    star = quadratic_minimum(potential)
    eta = 0.3 / float(torch.linalg.eigvalsh(hessian(potential, star))[-1])
    drift = 50 * directions(6, 12)
    free = walk(potential, star, drift, 50, step_size=eta)
    guarded = walk(potential, star, drift, 50, step_size=eta, limit=12.0)
    nll_star = potential.nll(star[None])[0]
    assert (potential.nll(free.position) - nll_star).median() > 24
    assert (potential.nll(guarded.position) - nll_star).median() < 24
    assert (guarded.drifts < 50).any() and (free.drifts == 50).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_guard_leaves_a_stable_walk_as_it_is_and_shortens_the_kicks_of_an_unstable_one(momentum):
    potential = linear_regression(40, 4)
    star = quadratic_minimum(potential)
    eta = 0.3 / float(torch.linalg.eigvalsh(hessian(potential, star))[-1])
    drift = LENGTH * directions(16, 4)
    free, guarded = (
        walk(potential, star, drift, 100, step_size=eta, momentum=momentum, limit=limit) for limit in (None, 1e9)
    )
    assert torch.equal(free.position, guarded.position) and (guarded.step_size == 1).all()

    kicked, held = (
        walk(potential, star, drift, 100, step_size=30 * eta, momentum=momentum, limit=limit) for limit in (None, 1e9)
    )
    assert not ((kicked.position - star).norm(dim=1) < 100 * LENGTH).any()
    assert ((held.position - star).norm(dim=1) < LENGTH).all()


def test_a_walk_that_jumps_goes_back_to_its_record_and_one_that_cannot_be_saved_is_marked():
    potential = linear_regression(40, 4)
    star = quadratic_minimum(potential)
    lambda_max = float(torch.linalg.eigvalsh(hessian(potential, star))[-1])

    def kernel(gradient) -> WalkKernel:
        return WalkKernel(
            theta_star=star,
            nll_star=float(potential.nll(star[None])[0]),
            drift=torch.as_tensor(LENGTH * directions(3, 4) / 200),
            steps=200,
            gradient=gradient,
            correction=plain_correction(100 / lambda_max),  # far above the stable 2 / lambda_max
            limit=4.0,
        )

    state = init(kernel(lambda p, _: potential.gradient(p)))
    for step in range(200):
        advance(kernel(lambda p, _: potential.gradient(p)), state)
        if step % 10 == 9:
            set_anchor(state, potential.nll(state.position))
    assert torch.isfinite(state.position).all() and not state.diverged.any()
    assert (state.step_size < 0.05).all()

    broken = kernel(lambda p, _: (torch.full_like(p, torch.nan), torch.full((3,), torch.nan, dtype=p.dtype)))
    state = init(broken)
    for _ in range(30):
        advance(broken, state)
    assert state.diverged.all() and torch.equal(state.position, star.expand(3, 4))


def tilted_endpoints(walks: int, tilt_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Endpoints of tilted walks on a linear-Gaussian model, and the exact posterior covariance."""
    potential = linear_regression(30, 5, alpha=2.0)
    parts = potential.network, potential.likelihood, potential.x, potential.y
    potential.nll_gradient = nll_gradient(*parts, form="batched")  # all walks in one pass
    star = quadratic_minimum(potential)
    h = hessian(potential, star)
    rng = stream(0, "tilt-test")
    xi = rng.standard_normal((walks, 5))
    noise = rng.standard_normal((walks, 30, 1))
    tilt = torch.stack(
        [tilt_vector(potential, star, torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(xi, noise, strict=True)]
    )
    eta = 0.3 / float(torch.linalg.eigvalsh(h)[-1])
    state = walk(potential, star, xi / np.sqrt(2.0), 500, step_size=eta, tilt=tilt * tilt_scale)
    return (state.position - star).numpy(), torch.linalg.inv(h).numpy()


def test_tilted_walks_end_as_exact_posterior_draws_of_a_linear_gaussian_model():
    draws, covariance = tilted_endpoints(800)
    assert_covariance(draws, covariance)


def test_the_covariance_check_catches_a_tilt_that_is_a_third_too_strong():
    # Variances in stiff directions are 1.77 times too large: with 800 walks the relative error of a variance is 0.05,
    # so the power is above 0.999.
    draws, covariance = tilted_endpoints(800, tilt_scale=1.33)
    with pytest.raises(AssertionError):
        assert_covariance(draws, covariance)


def test_random_streams_depend_on_names_alone():
    first = stream(7, "drift", 3).standard_normal(4)
    stream(7, "drift", 2).standard_normal(100)
    assert np.array_equal(first, stream(7, "drift", 3).standard_normal(4))
    others = [stream(8, "drift", 3), stream(7, "tilt", 3), stream(7, "drift", 4), stream(7, "drift", 3, 0)]
    assert all(not np.allclose(first, other.standard_normal(4)) for other in others)

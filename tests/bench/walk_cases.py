"""What bench_walk times: networks, data, and every implementation of "drift, then one gradient correction"."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bayes.curvature import Curvature
from pipeline.bayes.kernels import choose_form, nll_gradient
from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.walk import WalkKernel, advance, deflated_correction, init

Advance = Callable[[int], object]
"""Takes a number of steps with all walks."""

ALPHA, ETA, DRIFT = 0.1, 1e-5, 1e-4
RANK = 40


@dataclass(frozen=True)
class Case:
    """A network with synthetic data of the named shape."""

    name: str
    rows: int
    walks: int
    widths: tuple[int, ...] = ()
    """Of a tanh multilayer perceptron; empty for LeNet-5 on 28 x 28."""

    def module(self) -> nn.Sequential:
        """The network; torch's default initialisation."""
        if not self.widths:
            return nn.Sequential(
                *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh()),
                *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
                nn.Linear(84, 10),
            )
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths[:-1], self.widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    @property
    def classes(self) -> int:
        """Columns of the output."""
        return self.widths[-1] if self.widths else 10

    def data(self) -> tuple[Tensor, Tensor]:
        """Standard normal inputs and random classes."""
        rng = np.random.default_rng(0)
        shape = (self.widths[0],) if self.widths else (1, 28, 28)
        x = rng.standard_normal((self.rows, *shape), dtype=np.float32)
        return torch.from_numpy(x), torch.from_numpy(rng.integers(0, self.classes, self.rows))

    def products(self) -> list[tuple[str, int, int, int, int]]:
        """Matrix products of one gradient of one walk: kind, times, and the sizes m, k, n of (m, k) x (k, n)."""
        n, products = self.rows, []
        layers = [(i, o, 1) for i, o in zip(self.widths[:-1], self.widths[1:], strict=True)]
        layers = layers or [(25, 6, 784), (150, 16, 100), (400, 120, 1), (120, 84, 1), (84, 10, 1)]
        for number, (inputs, outputs, positions) in enumerate(layers):
            columns = n * positions
            products += [("forward", 1, outputs, inputs, columns), ("weights", 1, outputs, columns, inputs)]
            products += [("inputs", 1, inputs, outputs, columns)] if number else []
        return products

    def activations(self) -> int:
        """Values of tanh in one gradient of one walk."""
        return self.rows * (sum(self.widths[1:-1]) if self.widths else 6 * 784 + 16 * 100 + 120 + 84)


CASES = {
    "banana": Case("banana MLP 2-16-16-2", 265, 128, (2, 16, 16, 2)),
    "wide": Case("wide MLP 784-256-256-10", 512, 16, (784, 256, 256, 10)),
    "lenet": Case("LeNet-5 28x28", 256, 8),
}


class Problem:
    """Network, walks and drift of one case."""

    def __init__(self, case: Case, walks: int):
        self.case, self.network, self.likelihood = case, Network(case.module()), Categorical(case.classes)
        self.x, self.y = case.data()
        rng = np.random.default_rng(1)
        noise = rng.standard_normal((walks, self.network.dim), dtype=np.float32)
        self.theta = self.network.theta() + 0.05 * torch.from_numpy(noise)
        self.drift = torch.from_numpy(rng.standard_normal((walks, self.network.dim), dtype=np.float32)) * DRIFT

    def kernel(self, form: str):
        """The product's gradient of the summed NLL."""
        return nll_gradient(self.network, self.likelihood, self.x, self.y, form=form)

    def own_form(self) -> str:
        """The form that the product chooses."""
        return choose_form(self.network.module, self.case.rows, self.network.dim, "cpu")

    def potential(self, theta: Tensor) -> Tensor:
        """U of one parameter vector, as a user would write it."""
        outputs = self.network.outputs(theta, self.x)
        return functional.cross_entropy(outputs, self.y, reduction="sum") + 0.5 * ALPHA * theta.square().sum()


def fiberwalk_step(problem: Problem) -> Advance:
    """The product's gradient and the plain step."""
    kernel, theta = problem.kernel(problem.own_form()), problem.theta.clone()

    def run(steps: int) -> None:
        for _ in range(steps):
            theta.add_(problem.drift)
            gradient, _ = kernel(theta)
            theta.sub_(gradient.add_(theta, alpha=ALPHA), alpha=ETA)

    return run


def fiberwalk_walk(problem: Problem) -> Advance:
    """The product's whole step: deflation, momentum and guard."""
    dim, rank = problem.network.dim, min(RANK, problem.network.dim // 4)
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((dim, rank)).astype(np.float32))[0]
    values, vectors = torch.linspace(1e5, 1e4, rank), torch.from_numpy(np.ascontiguousarray(basis.T))
    curvature = Curvature(1e5, values, vectors, 1e4, 0.0, 100.0)
    target = Potential(
        problem.network, problem.likelihood, torch.full((dim,), ALPHA), problem.x, problem.y,
        problem.kernel(problem.own_form()),
    )  # fmt: skip
    kernel = WalkKernel(
        theta_star=problem.network.theta(),
        nll_star=float(target.nll_gradient(problem.network.theta()[None])[1][0]),
        drift=problem.drift,
        steps=1 << 40,
        gradient=lambda position, step: target.gradient(position),
        correction=deflated_correction(curvature, 0.15),
        momentum=0.95,
        limit=1e6,
    )
    state = init(kernel)

    def run(steps: int) -> None:
        for _ in range(steps):
            advance(kernel, state)

    return run


def loop_of_walks(problem: Problem) -> Advance:
    """A loop over walks with the module itself and `backward`: what one writes first."""
    walks, module = problem.theta.clone(), problem.network.module
    parameters = [p.requires_grad_(True) for p in module.parameters()]

    def run(steps: int) -> None:
        for _ in range(steps):
            for row, drift in zip(walks, problem.drift, strict=True):
                row.add_(drift)
                nn.utils.vector_to_parameters(row, parameters)
                for parameter in parameters:
                    parameter.grad = None
                functional.cross_entropy(module(problem.x), problem.y, reduction="sum").backward()
                slope = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
                row.sub_(slope.add_(row, alpha=ALPHA), alpha=ETA)

    return run


def eager_vmap(problem: Problem) -> Advance:
    """vmap of grad over all walks at once."""
    gradient, theta = torch.func.vmap(torch.func.grad(problem.potential)), problem.theta.clone()

    def run(steps: int) -> None:
        for _ in range(steps):
            theta.add_(problem.drift)
            theta.sub_(gradient(theta), alpha=ETA)

    return run


def posteriors_sgld(problem: Problem) -> Advance:
    """SGLD of the library posteriors, all walks stacked, on the same potential."""
    from posteriors.sgmcmc import sgld

    potential = torch.func.vmap(problem.potential)

    def log_posterior(theta: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return -potential(theta).sum(), batch

    transform = sgld.build(log_posterior, lr=ETA)
    state, batch = transform.init(problem.theta.clone()), torch.zeros(())

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = transform.update(state, batch, inplace=False)

    return run


def jax_potential(problem: Problem) -> Callable:
    """The same potential in JAX, of one parameter vector."""
    from jax import lax
    from jax import nn as jnn
    from jax import numpy as jnp

    x, y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())
    shapes, widths = problem.network.layout.shapes, problem.case.widths
    cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1]

    def forward(parts: list):
        value = x
        if not widths:
            for weight, bias, pad in ((parts[0], parts[1], 2), (parts[2], parts[3], 0)):
                value = lax.conv_general_dilated(value, weight, (1, 1), [(pad, pad)] * 2) + bias[:, None, None]
                value = lax.reduce_window(jnp.tanh(value), 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
            value, parts = value.reshape(len(x), -1), parts[4:]
        for number in range(0, len(parts), 2):
            value = value @ parts[number].T + parts[number + 1]
            value = jnp.tanh(value) if number + 2 < len(parts) else value
        return value

    def potential(theta):
        parts = [part.reshape(shape) for part, shape in zip(jnp.split(theta, cuts), shapes, strict=True)]
        log_p = jnn.log_softmax(forward(parts))
        return -jnp.take_along_axis(log_p, y[:, None], 1).sum() + 0.5 * ALPHA * (theta**2).sum()

    return potential


def jax_loop(problem: Problem) -> Advance:
    """The whole loop under jit: vmap of grad inside lax.fori_loop."""
    import jax
    from jax import numpy as jnp

    gradient, drift = jax.vmap(jax.grad(jax_potential(problem))), jnp.asarray(problem.drift.numpy())

    @jax.jit
    def loop(theta, steps):
        def step(_, value):
            value = value + drift
            return value - ETA * gradient(value)

        return jax.lax.fori_loop(0, steps, step, theta)

    theta = jnp.asarray(problem.theta.numpy())

    def run(steps: int) -> None:
        nonlocal theta
        theta = loop(theta, steps).block_until_ready()

    return run


IMPLEMENTATIONS: dict[str, tuple[str, Callable[[Problem], Advance]]] = {
    "ours": ("fiberwalk, plain step", fiberwalk_step),
    "walk": ("fiberwalk, deflation, momentum, guard", fiberwalk_walk),
    "loop": ("loop over walks", loop_of_walks),
    "vmap": ("torch vmap, eager", eager_vmap),
    "jax": ("JAX, jit of the whole loop", jax_loop),
    "sgld": ("SGLD of posteriors, stacked", posteriors_sgld),
}

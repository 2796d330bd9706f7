"""Networks, data and walks whose gradient is known by autograd in float64, and the comparison with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.bayes.likelihood import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood
from pipeline.bayes.params import Network

ROWS = 37
# Relative error of the gradient of one walk against float64; the sum over rows cancels, so not the machine's 1e-7.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

LIKELIHOODS: dict[str, tuple[Likelihood, int]] = {
    "categorical": (Categorical(3), 3),
    "two_classes": (Categorical(2), 2),
    "bernoulli": (Bernoulli(), 1),
    "gaussian": (Gaussian(0.3), 1),
    "heteroscedastic": (Heteroscedastic(), 2),
}


def mlp(activation: nn.Module, outputs: int, inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 7),
        activation,
        nn.Sequential(nn.Linear(7, 6), activation, nn.Identity()),
        nn.Dropout(0.5),
        nn.Linear(6, outputs),
    )


def conv_net(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, outputs),
    )


def problem(
    module: nn.Module,
    likelihood: Likelihood,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (4,),
    walks: int = 5,
    rows: int = ROWS,
):
    """The network, data, and walks around one point: (network, x, y, theta)."""
    rng = np.random.default_rng(0)
    network = Network(module, dtype=dtype)
    x = torch.from_numpy(rng.standard_normal((rows, *shape))).to(dtype)
    if isinstance(likelihood, Categorical):
        y = torch.from_numpy(rng.integers(0, likelihood.classes, rows))
    elif isinstance(likelihood, Bernoulli):
        y = torch.from_numpy(rng.integers(0, 2, rows))
    else:
        y = torch.from_numpy(rng.standard_normal(rows)).to(dtype)
    theta = torch.from_numpy(rng.standard_normal((walks, network.dim))).to(dtype) * 0.6
    return network, x, y, theta


def truth(network: Network, likelihood: Likelihood, x: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and NLL of each walk by autograd in float64."""
    exact = Network(network.module, dtype=torch.float64)
    y = y.double() if y.is_floating_point() else y
    gradients, values = [], []
    for row in theta.double():
        leaf = row.clone().requires_grad_(True)
        value = likelihood.nll(exact.outputs(leaf, x.double()), y).sum()
        gradients.append(torch.autograd.grad(value, leaf)[0])
        values.append(value.detach())
    network.module.to(network.dtype)
    return torch.stack(gradients), torch.stack(values)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Gradient and NLL agree for every walk within the tolerance of the type."""
    assert found[0].dtype == dtype and found[1].dtype == dtype
    error = (found[0].double() - expected[0]).norm(dim=1) / expected[0].norm(dim=1)
    assert error.max() < TOLERANCE[dtype], f"gradient: relative error {error.max():.2e}"
    gap = ((found[1].double() - expected[1]) / expected[1].abs().clamp_min(1)).abs()
    assert gap.max() < TOLERANCE[dtype], f"NLL: relative error {gap.max():.2e}"

"""Every form of the gradient is the gradient: all equal autograd in float64, one walk at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.bayes.batched import BatchedMLP, even_chunks, mlp_chunk, parse_mlp
from pipeline.bayes.kernels import choose_form, compile_pays, nll_gradient
from pipeline.bayes.likelihood import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood
from pipeline.bayes.params import Network
from pipeline.errors import InputError

ROWS = 37
# Relative error of the gradient of one walk against float64; the sum over rows cancels, so not the machine's 1e-7.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

ACTIVATIONS = {
    "tanh": nn.Tanh(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(beta=1.5),
    "elu": nn.ELU(0.7),
    "sigmoid": nn.Sigmoid(),
    "leaky": nn.LeakyReLU(0.1),
}
LIKELIHOODS: dict[str, tuple[Likelihood, int]] = {
    "categorical": (Categorical(3), 3),
    "two_classes": (Categorical(2), 2),
    "bernoulli": (Bernoulli(), 1),
    "gaussian": (Gaussian(0.3), 1),
    "heteroscedastic": (Heteroscedastic(), 2),
}


class Unlisted(Gaussian):
    """A likelihood of the user's own, for which no slope is written out."""

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - y).abs().pow(1.5)


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
    module: nn.Module, likelihood: Likelihood, dtype: torch.dtype, shape: tuple[int, ...] = (4,), walks: int = 5
):
    """The network, data, and walks around one point: (network, x, y, theta)."""
    rng = np.random.default_rng(0)
    network = Network(module, dtype=dtype)
    x = torch.from_numpy(rng.standard_normal((ROWS, *shape))).to(dtype)
    if isinstance(likelihood, Categorical):
        y = torch.from_numpy(rng.integers(0, likelihood.classes, ROWS))
    elif isinstance(likelihood, Bernoulli):
        y = torch.from_numpy(rng.integers(0, 2, ROWS))
    else:
        y = torch.from_numpy(rng.standard_normal(ROWS)).to(dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_batched_equals_autograd_for_each_activation(name, dtype):
    network, x, y, theta = problem(mlp(ACTIVATIONS[name], 3), Categorical(3), dtype)
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), dtype)


@pytest.mark.parametrize("form", ["batched", "vmap", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_each_form_equals_autograd_for_each_likelihood(name, dtype, form):
    likelihood, outputs = LIKELIHOODS[name]
    network, x, y, theta = problem(mlp(nn.Tanh(), outputs), likelihood, dtype)
    found = nll_gradient(network, likelihood, x, y, form=form)(theta)
    assert_same(found, truth(network, likelihood, x, y, theta), dtype)


def test_likelihood_of_the_users_own_takes_its_slope_from_autograd():
    likelihood = Unlisted(1.0)
    network, x, y, theta = problem(mlp(nn.Tanh(), 1), likelihood, torch.float64)
    found = nll_gradient(network, likelihood, x, y, form="batched")(theta)
    assert_same(found, truth(network, likelihood, x, y, theta), torch.float64)


@pytest.mark.parametrize("form", ["batched", "vmap", "loop"])
def test_row_subset_is_the_gradient_of_these_rows(form):
    network, x, y, theta = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float64)
    kernel = nll_gradient(network, Categorical(3), x, y, form=form)
    kernel(theta)
    rows = torch.tensor([3, 30, 7, 7, 0])
    expected = truth(network, Categorical(3), x[rows], y[rows], theta)
    assert_same(kernel(theta, rows), expected, torch.float64)
    assert_same(kernel(theta, rows=rows.flip(0)), expected, torch.float64)
    assert_same(kernel(theta), truth(network, Categorical(3), x, y, theta), torch.float64)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_chunks_of_walks_change_nothing_but_rounding(chunk):
    network, x, y, theta = problem(mlp(nn.GELU(), 3), Categorical(3), torch.float64, walks=7)
    layers = parse_mlp(network.module, network.dim)
    assert layers is not None
    found = BatchedMLP(layers, Categorical(3), x, y, chunk)(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float64)


def test_calls_with_one_shape_give_the_same_bits_and_share_no_memory():
    network, x, y, theta = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    kernel = nll_gradient(network, Categorical(3), x, y, form="batched")
    first = kernel(theta)
    kept = first[0].clone(), first[1].clone()
    kernel(theta + 1)
    again = kernel(theta)
    assert torch.equal(first[0], kept[0]) and torch.equal(first[1], kept[1])
    assert torch.equal(again[0], kept[0]) and torch.equal(again[1], kept[1])


def test_layers_without_bias_and_walks_that_are_views():
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    network, x, y, theta = problem(module, Categorical(3), torch.float64, walks=6)
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta[::2])
    assert_same(found, truth(network, Categorical(3), x, y, theta[::2]), torch.float64)


@pytest.mark.parametrize("form", ["vmap", "loop"])
def test_general_forms_take_conv_nets(form):
    network, x, y, theta = problem(conv_net(3), Categorical(3), torch.float64, (1, 8, 8))
    found = nll_gradient(network, Categorical(3), x, y, form=form)(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float64)


def test_large_weights_do_not_overflow():
    network, x, y, theta = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    gradient, nll = nll_gradient(network, Categorical(3), x, y, form="batched")(theta * 1e4)
    assert gradient.isfinite().all() and nll.isfinite().all()


def drop_bias(kernel: BatchedMLP) -> None:
    """Break the kernel: the second layer's bias gets no gradient."""
    layer = kernel.layers[1]
    assert layer.bias is not None
    inner = kernel._pass

    def broken(walks: int, rows: int):
        work = inner(walks, rows)
        run = work.run

        def without_bias(theta, x, loss, gradient, nll):
            run(theta, x, loss, gradient, nll)
            biases = layer.biases(gradient)
            assert biases is not None
            biases.zero_()

        work.run = without_bias
        return work

    kernel._pass = broken


def test_the_check_catches_a_dropped_bias_gradient():
    network, x, y, theta = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    kernel = nll_gradient(network, Categorical(3), x, y, form="batched")
    assert isinstance(kernel, BatchedMLP)
    drop_bias(kernel)
    with pytest.raises(AssertionError, match="gradient"):
        assert_same(kernel(theta), truth(network, Categorical(3), x, y, theta), torch.float32)


def tied() -> nn.Sequential:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize(
    "module",
    [tied(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), nn.Tanh()],
    ids=["tied", "ends in tanh", "norm", "no layer"],
)
def test_other_networks_are_left_to_the_general_forms(module):
    dim = sum(p.numel() for p in module.parameters())
    assert choose_form(module, ROWS, dim, "cpu") in ("vmap", "loop")


def test_part_of_the_parameters_is_left_to_the_general_forms():
    network = Network(mlp(nn.Tanh(), 3), parameters="5.*")
    assert choose_form(network.module, ROWS, network.dim, "cpu") != "batched"
    with pytest.raises(InputError, match="walk.form 'batched'"):
        nll_gradient(network, Categorical(3), torch.zeros(2, 4), torch.zeros(2).long(), form="batched")


def test_plain_chains_run_batched_and_unknown_forms_are_refused():
    network, x, y, _ = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    assert choose_form(network.module, ROWS, network.dim, "cpu") == "batched"
    with pytest.raises(InputError, match="walk.form must be one of"):
        nll_gradient(network, Categorical(3), x, y, form="fast")


@pytest.mark.parametrize(("walks", "most"), [(1, 1), (7, 3), (128, 64), (100, 64), (5, 100)])
def test_chunks_cover_all_walks_evenly(walks, most):
    chunks = even_chunks(walks, most)
    sizes = [b - a for a, b in chunks]
    assert sum(sizes) == walks and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert [a for a, _ in chunks[1:]] == [b for _, b in chunks[:-1]]


def test_chunk_and_compiling_follow_from_shapes_alone():
    layers = parse_mlp(mlp(nn.Tanh(), 3), 7 * 5 + 6 * 8 + 3 * 7)
    assert layers is not None
    assert mlp_chunk(layers, 10, 1 << 20) > mlp_chunk(layers, 10_000, 1 << 20) >= 1
    assert not compile_pays(1000, 265, 354)
    assert compile_pays(10_000_000, 265, 354)

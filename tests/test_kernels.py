"""Every form of the gradient is the gradient: all equal autograd in float64, one walk at a time."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from pipeline.bayes import params
from pipeline.bayes.batched import BatchedChain
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.kernels import choose_form, nll_gradient
from pipeline.bayes.likelihood import Categorical, Gaussian
from pipeline.bayes.params import Network
from pipeline.bayes.passes import Weights
from tests.gradients import LIKELIHOODS, ROWS, assert_same, conv_net, mlp, problem, truth
from tests.networks import build

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
CONV_NETS = {
    "mean then max": conv_net(3),
    "strided": nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 1)),
        nn.GELU(), nn.Flatten(), nn.Linear(4 * 3 * 2, 6), nn.Tanh(), nn.Linear(6, 3),
    ),
    "padded after tanh": nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3, padding=2, bias=False), nn.SiLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3 * 4 * 4, 3),
    ),
    "pool first, cropped": nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.AvgPool2d((2, 1)), nn.Softplus(),
        nn.Flatten(), nn.Linear(3 * 1 * 2, 3),
    ),
    "max cropped, no activation": nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(3), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)
    ),
    "large stride": nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 2, stride=3, padding=1), nn.Flatten(), nn.Linear(27, 3)
    ),
}  # fmt: skip


class Unlisted(Gaussian):
    """A likelihood of the user's own, for which no slope is written out."""

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - y).abs().pow(1.5)


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


@pytest.mark.parametrize("form", ["batched", "vmap", "loop"])
@pytest.mark.parametrize("name", CONV_NETS)
def test_each_form_takes_conv_nets(name, form):
    network, x, y, theta = problem(CONV_NETS[name], Categorical(3), torch.float64, (1, 8, 8))
    found = nll_gradient(network, Categorical(3), x, y, form=form)(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float64)


def test_equal_maxima_give_their_slope_to_the_first_as_in_torch():
    network, x, y, theta = problem(conv_net(3), Categorical(3), torch.float64, (1, 8, 8))
    x[:, :, 2:] = 0.0
    theta[:, 40:] = theta[:, 40:].round()
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float64)


@pytest.mark.parametrize("name", [*LIKELIHOODS, "image"])
def test_rows_that_fill_up_a_block_count_for_nothing(name):
    likelihood, outputs = LIKELIHOODS.get(name, (Categorical(3), 3))
    module, shape = (conv_net(3), (1, 8, 8)) if name == "image" else (mlp(nn.Softplus(), outputs), (4,))
    network, x, y, theta = problem(module, likelihood, torch.float64, shape, rows=62)
    kernel = nll_gradient(network, likelihood, x, y, form="batched")
    assert isinstance(kernel, BatchedChain)
    assert kernel.blocks[0][0].shape[-1] == 64
    for _ in range(2):
        assert_same(kernel(theta), truth(network, likelihood, x, y, theta), torch.float64)


@pytest.mark.parametrize("walks", [2, 50])
@pytest.mark.parametrize("rows", [5, 16, 37])
@pytest.mark.parametrize("image", [False, True])
def test_blocks_of_rows_change_nothing_but_rounding(image, rows, walks):
    module, shape = (conv_net(3), (1, 8, 8)) if image else (mlp(nn.GELU(), 3), (4,))
    network, x, y, theta = problem(module, Categorical(3), torch.float64, shape, walks=7)
    chain = parse_chain(network.module, network.dim)
    assert chain is not None
    kernel = BatchedChain(chain, Categorical(3), x, y, walks, rows)
    expected = truth(network, Categorical(3), x, y, theta)
    assert_same(kernel(theta), expected, torch.float64)
    assert_same(kernel(theta), expected, torch.float64)
    assert torch.equal(kernel.nll(theta), kernel(theta)[1]), "the passes forward are the same"
    some = torch.tensor([36, 1, 1, 8])
    assert_same(kernel(theta, some), truth(network, Categorical(3), x[some], y[some], theta), torch.float64)
    assert torch.equal(kernel.nll(theta, some), kernel(theta, some)[1])


def test_images_without_a_channel_axis_are_unflattened():
    module = nn.Sequential(nn.Unflatten(1, (1, 8)), *conv_net(3))
    network, x, y, theta = problem(module, Categorical(3), torch.float32, (8, 8))
    assert choose_form(module, ROWS, network.dim, "cpu") == "batched"
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float32)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("mlp", (5,)), ("mlp", (8, 8)), ("conv", (1, 12, 12)), ("conv", (8, 8)), ("lenet", (28, 28))],
)
def test_the_built_in_networks_run_batched(architecture, shape):
    module = build(shape, architecture=architecture, hidden=(6, 4))
    network, x, y, theta = problem(module, Categorical(3), torch.float64, shape, walks=3)
    assert choose_form(network.module, ROWS, network.dim, "cpu") == "batched"
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta * 0.3)
    assert_same(found, truth(network, Categorical(3), x, y, theta * 0.3), torch.float64)


def test_large_weights_do_not_overflow():
    network, x, y, theta = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    gradient, nll = nll_gradient(network, Categorical(3), x, y, form="batched")(theta * 1e4)
    assert gradient.isfinite().all() and nll.isfinite().all()


@pytest.mark.parametrize("broken", [(False, "bias"), (True, "bias"), (False, "weight"), (True, "weight")])
def test_the_check_catches_a_dropped_gradient(broken, monkeypatch):
    image, part = broken
    module, shape = (conv_net(3), (1, 8, 8)) if image else (mlp(nn.Tanh(), 3), (4,))
    network, x, y, theta = problem(module, Categorical(3), torch.float32, shape)
    kernel = nll_gradient(network, Categorical(3), x, y, form="batched")
    assert isinstance(kernel, BatchedChain)
    layer, whole = kernel.layers[1], Weights.write

    def write(self: Weights, gradient: Tensor) -> None:
        whole(self, gradient)
        if self.layer == layer and part == "bias":
            cast(Tensor, layer.biases(gradient)).zero_()
        elif self.layer == layer:
            layer.weights(gradient)[:, 0, 0] *= 1.01

    assert_same(kernel(theta), truth(network, Categorical(3), x, y, theta), torch.float32)
    monkeypatch.setattr(Weights, "write", write)
    with pytest.raises(AssertionError, match="gradient"):
        assert_same(kernel(theta), truth(network, Categorical(3), x, y, theta), torch.float32)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *CONV_NETS])
def test_plain_chains_batch_without_a_trial_and_one_would_say_the_same(name, monkeypatch: pytest.MonkeyPatch):
    module, shape = (CONV_NETS[name], (1, 8, 8)) if name in CONV_NETS else (mlp(ACTIVATIONS[name], 3), (4,))
    x = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tried: list[bool] = []
    monkeypatch.setattr(params, "grad", lambda f: (tried.append(True), grad(f))[1])
    assert Network(module, dtype=torch.float64).batches(x) and not tried
    monkeypatch.setattr(params, "parse_chain", lambda *_: None)
    assert Network(module, dtype=torch.float64).batches(x) and tried

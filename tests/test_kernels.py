"""Every form of the gradient is the gradient: all equal autograd in float64, one walk at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.bayes import compiled
from pipeline.bayes.batched import BatchedChain, block_rows, chunk_walks, even_parts
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.halving import Halving
from pipeline.bayes.kernels import choose_form, layer_elements, nll_gradient, plan_form
from pipeline.bayes.likelihood import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood
from pipeline.bayes.params import Network
from pipeline.bayes.passes import Weights
from pipeline.errors import InputError
from tests.test_models import build

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
    some = torch.tensor([36, 1, 1, 8])
    assert_same(kernel(theta, some), truth(network, Categorical(3), x[some], y[some], theta), torch.float64)


def test_images_without_a_channel_axis_are_unflattened():
    module = nn.Sequential(nn.Unflatten(1, (1, 8)), *conv_net(3))
    network, x, y, theta = problem(module, Categorical(3), torch.float32, (8, 8))
    assert choose_form(module, ROWS, network.dim, "cpu") == "batched"
    found = nll_gradient(network, Categorical(3), x, y, form="batched")(theta)
    assert_same(found, truth(network, Categorical(3), x, y, theta), torch.float32)


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
    chunks = even_parts(walks, most)
    sizes = [b - a for a, b in chunks]
    assert sum(sizes) == walks and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert [a for a, _ in chunks[1:]] == [b for _, b in chunks[:-1]]


def test_chunks_follow_from_shapes_alone():
    chain = parse_chain(mlp(nn.Tanh(), 3), 7 * 5 + 6 * 8 + 3 * 7)
    assert chain is not None
    assert chunk_walks(chain.layers, (4,), 10) > chunk_walks(chain.layers, (4,), 10_000) >= 1
    assert block_rows(chain.layers, (4,)) >= 1000


class Normed(nn.Module):
    """A user's own module, with layers that no chain has; inputs by name."""

    def __init__(self, wide: int = 8):
        super().__init__()
        self.first, self.norm = nn.Linear(4, wide), nn.LayerNorm(wide)
        self.register_buffer("scale", torch.full((wide,), 0.5))
        self.last = nn.Linear(wide, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(a + b))) * cast(Tensor, self.scale))


def test_one_loop_or_many_at_once_follows_from_the_work_of_one_gradient():
    small, images = Normed(), nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten())
    for module, x, rows, form in (
        (small, {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, 1000, "vmap"),
        (small, {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, 100_000, "loop"),
        (images, torch.zeros(2, 1, 28, 28), 20, "vmap"),
        (images, torch.zeros(2, 1, 28, 28), 500, "loop"),  # few parameters, many elements between the layers
    ):
        network = Network(module)
        assert plan_form(network, x, rows, 1000, False) == (form, False)
        assert plan_form(network, x, rows, 1000, "auto") == (form, False)
        assert plan_form(network, x, rows, 1000, True) == ("vmap", True)
        assert plan_form(network, x, rows, 10**9, "auto") == (form, form == "vmap")
    assert layer_elements(Network(images), torch.zeros(2, 1, 28, 28)) == 3 * 8 * 28 * 28


def test_plain_chains_have_nothing_to_compile():
    network, x, _, _ = problem(mlp(nn.Tanh(), 3), Categorical(3), torch.float32)
    assert plan_form(network, x, ROWS, 10**9, True) == ("batched", False)


def normed_problem(walks: int):
    """Inputs by name, targets, walks and the truth for `Normed`: (network, x, y, theta, exact)."""
    network, both, y, theta = problem(Normed(), Categorical(3), torch.float64, (8,), walks=walks)
    x = {"a": both[:, :4].contiguous(), "b": both[:, 4:].contiguous()}
    exact = nll_gradient(network, Categorical(3), x, y, form="loop")(theta)
    return network, x, y, theta, exact


def test_compiled_form_is_one_graph_of_the_gradient(monkeypatch):
    """The graph runs by torch's own operations: what is tested is what was recorded, for any size and rows."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr("pipeline.bayes.kernels.VMAP_ELEMENTS", {"cpu": 1})
    network, x, y, theta, exact = normed_problem(walks=10)
    kernel = nll_gradient(network, Categorical(3), x, y, form="vmap", compile=True)
    assert_same(kernel(theta), exact, torch.float64)
    assert_same(kernel(2 * theta - theta), exact, torch.float64)
    assert_same(kernel(theta[:1]), (exact[0][:1], exact[1][:1]), torch.float64)
    rows = torch.tensor([3, 30, 7, 7, 0])
    expected = nll_gradient(network, Categorical(3), x, y, form="loop")(theta, rows)
    assert_same(kernel(theta, rows), expected, torch.float64)


@pytest.mark.slow
def test_compiled_form_equals_autograd():
    network, x, y, theta, exact = normed_problem(walks=10)
    kernel = nll_gradient(network, Categorical(3), x, y, form="vmap", compile=True)
    assert_same(kernel(theta), exact, torch.float64)


def test_what_fails_to_compile_is_said_and_evaluated_as_it_is(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    network, x, y, theta, exact = normed_problem(walks=5)
    kernel = nll_gradient(network, Categorical(3), x, y, form="vmap", compile=True)
    for _ in range(2):
        assert_same(kernel(theta), exact, torch.float64)
    assert caplog.text.count("walk.compile: torch.compile failed") == 1


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_walks_at_once_and_changes_no_value(error):
    def kernel(theta, rows=None):
        if len(theta) > 3:
            raise error
        return 2 * theta, theta.sum(dim=1)

    halving = Halving(kernel)
    theta = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    gradient, nll = halving(theta)
    assert torch.equal(gradient, 2 * theta) and torch.equal(nll, theta.sum(dim=1))
    assert halving.limit == 3


def test_errors_that_are_not_about_memory_are_raised():
    def broken(theta, rows=None):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving(broken)(torch.zeros(4, 2))


BOUNDED = """
import json, resource, sys
import torch
from torch import nn
from pipeline.bayes.halving import Halving
from pipeline.bayes.kernels import nll_gradient
from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = torch.randn(30_000, 4, generator=generator)
network = Network(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 3)))
theta = network.theta() + 0.1 * torch.randn(8, network.dim, generator=generator)
kernel = nll_gradient(network, Categorical(3), x, torch.arange(30_000) % 3, form="vmap")
kernel(theta[:2])  # what torch sets up once is not to be counted
free = [kernel(one[None]) for one in theta]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (90 << 20),) * 2)
halving = Halving(kernel)
gradient, nll = halving(theta)
worst = [float((a - torch.cat([f[i] for f in free])).norm() / a.norm()) for i, a in enumerate((gradient, nll))]
print(json.dumps({"limit": halving.limit, "worst": worst}))
"""


def test_a_real_bound_on_memory_halves_the_walks_at_once_and_keeps_the_values():
    """The allocator of the CPU fails for four walks at once; values agree to 1e-5, as batch shape changes rounding."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["limit"] in (1, 2) and max(found["worst"]) < 1e-5
    assert "Out of memory with 8 walks at once: going on with 4." in done.stderr

"""The form of the gradient follows from the network and the amount of work; compiling it changes no value."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from pipeline.bayes import compiled, kernels
from pipeline.bayes.batched import block_rows, chunk_walks, even_parts
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.kernels import choose_form, nll_gradient, plan_form
from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network
from pipeline.bayes.trees import Tree
from pipeline.errors import InputError
from tests.gradients import ROWS, assert_same, mlp, problem


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
    assert chunks[0][0] == 0 and sum(sizes) == walks and max(sizes) <= most and max(sizes) - min(sizes) <= 1
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
    assert Network(images).elements(torch.zeros(2, 1, 28, 28)) == 3 * 8 * 28 * 28


@pytest.mark.parametrize("form", ["vmap", "loop"])
def test_rows_pass_in_parts_where_all_at_once_would_take_much_memory(form, monkeypatch):
    network, x, y, theta, exact = normed_problem(walks=3)
    sizes: list[int] = []
    inside = kernels._Loop._nll

    def counted(self, theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        sizes.append(len(y))
        return inside(self, theta, x, y)

    monkeypatch.setattr(kernels._Loop, "_nll", counted)
    monkeypatch.setattr(kernels, "ROW_ELEMENTS", {"cpu": 8 * network.elements(x)})
    kernel = nll_gradient(network, Categorical(3), x, y, form=form)
    assert_same(kernel(theta), exact, torch.float64)
    assert max(sizes) == 8 and len(sizes) > 1
    rows = torch.tensor([3, 30, 7, 7, 0, 1, 2, 4, 5, 6, 8])
    expected = [kernel(theta, part) for part in rows.split(8)]
    summed = sum(g for g, _ in expected), sum(v for _, v in expected)
    assert_same(kernel(theta, rows), cast(tuple[Tensor, Tensor], summed), torch.float64)


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

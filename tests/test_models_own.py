"""Networks that a user brings along: what is taken, what is refused in one line, and what stays as it was."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, jvp

from pipeline.bayes.kernels import choose_form, nll_gradient
from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.config import ModelConfig
from pipeline.errors import InputError
from pipeline.models import build_module, call_module
from pipeline.streams import stream
from tests.networks import build, part, schema
from tests.own import Single, Twice


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module of the user's and name a function in it."""

    def write(body: str) -> str:
        name = f"own_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + body)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"python:{name}:make"

    return write


CALLS = (
    "class make(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.l = nn.Linear(5, 3)\n        self.register_buffer('calls', torch.zeros(1))\n"
    "    def forward(self, x):\n"
)
"""A network of one layer and a buffer, without the body of its forward."""


class TestOwnNetworks:
    def test_a_factory_is_told_what_it_asks_for(self, own: Any) -> None:
        spec = own("def make(outputs, inputs):\n    return nn.Linear(inputs[0], outputs)\n")
        assert build((5,), outputs=4, architecture=spec)(torch.zeros(2, 5)).shape == (2, 4)

    def test_a_factory_without_arguments(self, own: Any) -> None:
        module = build((5,), architecture=own("def make():\n    return nn.Linear(5, 3)\n"))
        assert module(torch.zeros(2, 5)).shape == (2, 3)

    def test_one_number_a_row_is_one_output(self, own: Any) -> None:
        spec = own(
            "class make(nn.Linear):\n"
            "    def __init__(self):\n        super().__init__(5, 1)\n"
            "    def forward(self, x):\n        return super().forward(x)[:, 0]\n"
        )
        assert build((5,), outputs=1, architecture=spec)(torch.zeros(2, 5)).shape == (2, 1)

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("def other():\n    pass\n", ["has no make"]),
            ("make = 3\n", ["not a function"]),
            ("def make():\n    return 3\n", ["must return a torch.nn.Module", "int"]),
            ("def make():\n    raise KeyError('lost')\n", ["failed: KeyError: 'lost'"]),
            ("def make(depth):\n    return nn.Linear(5, 3)\n", ["failed: TypeError", "depth"]),
            ("def make():\n    return nn.Linear(5, 7)\n", ["must return 3 outputs", "(2, 7)"]),
            ("def make():\n    return nn.Linear(4, 3)\n", ["does not take rows of shape (5,)"]),
            ("def make():\n    return nn.Tanh()\n", ["no parameters"]),
            ("import sys\n\ndef make():\n    sys.exit(3)\n", ["failed: SystemExit: 3"]),
            (CALLS + "        return self.l(x + torch.randn_like(x))\n", ["other outputs when it is called again"]),
            (CALLS + "        return self.l(x - x.mean(0))\n", ["depend on the rows beside it"]),
            (CALLS + "        return self.l(x).detach()\n", ["cannot be differentiated"]),
            (CALLS + "        return x[:, :3] + 0 * self.l(x).relu_().mul_(2)\n", ["cannot be differentiated"]),
            ("def make():\n    return nn.Linear(5, 3).requires_grad_(False)\n", ["no parameter has requires_grad"]),
            (
                "def make():\n    net = nn.Linear(5, 3)\n    net.bias.data.fill_(float('nan'))\n    return net\n",
                ["bias begins with values that are not finite"],
            ),
            (
                "def make():\n    net = nn.Linear(5, 3)\n    net.c = nn.Parameter(torch.zeros(2, dtype=torch.cfloat))\n"
                "    return net\n",
                ["c is complex"],
            ),
            (
                "def make():\n    net = nn.Linear(5, 3)\n    net.register_buffer('b', torch.zeros(2).cfloat())\n"
                "    return net\n",
                ["b is complex; parameters and buffers"],
            ),
            (
                "def make():\n    return nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3))\n",
                ["is spectral_norm", "remove_parametrizations"],
            ),
            (
                "def make():\n    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 3)))\n",
                ["0 is spectral_norm", "remove_spectral_norm"],
            ),
            ("import absent_package\n", ["does not import", "ModuleNotFoundError"]),
            ("def make(:\n", ["does not import", "SyntaxError"]),
            (
                "def make():\n    norm = nn.BatchNorm1d(3, track_running_stats=False)\n"
                "    return nn.Sequential(nn.Linear(5, 3), norm)\n",
                ["1 normalises by the batch", "track_running_stats"],
            ),
        ],
    )
    def test_what_cannot_be_used_is_named_in_one_line(self, body: str, words: list[str], own: Any) -> None:
        with pytest.raises(InputError) as error:
            build((5,), architecture=own(body))
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    def test_control_flow_that_depends_on_values_gives_the_same_derivatives(self, own: Any) -> None:
        """torch.func cannot evaluate it for many networks at once; plain autograd can, one by one."""
        branch = CALLS + "        h = torch.tanh(self.l(x))\n        return h if h.sum().item() > 1e9 else 2 * h\n"
        module = build(architecture=own(branch))
        plain = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))
        plain.load_state_dict({"0.weight": module.l.weight, "0.bias": module.l.bias, "2.weight": 2 * torch.eye(3)})  # pyright: ignore
        x, y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 3
        potentials = []
        for network in (Network(module, dtype=torch.float64), Network(plain, "0", torch.float64)):
            form = choose_form(network.module, 20, network.dim, "cpu", batches=network.batches(x))
            kernel = nll_gradient(network, Categorical(3), x, y, form=form)
            potentials.append(Potential(network, Categorical(3), torch.ones(18).double(), x, y, kernel, row_batch=7))
            assert (form == "loop") == (network.module is module)
        theta = torch.stack([potentials[0].network.theta(), 0.5 * potentials[0].network.theta()])
        vectors = torch.randn(4, 18, generator=torch.Generator().manual_seed(1)).double()
        for one, other in (
            [p.gradient(theta)[0] for p in potentials],
            [p.value(theta) for p in potentials],
            [p.hvp(theta[0], vectors) for p in potentials],
            [p.gauss_newton(theta[0], vectors) for p in potentials],
            [p.network.outputs_many(theta, x) for p in potentials],
        ):
            torch.testing.assert_close(one, other)

    def test_a_module_that_counts_its_calls_is_the_same_function_at_every_call(self, own: Any) -> None:
        body = "        self.calls += 1\n        return self.l(x) * self.calls\n"
        network = Network(build(architecture=own(CALLS + body)))
        x = torch.ones(2, 5)
        first = network.outputs(network.theta(), x)
        assert torch.equal(network.outputs(network.theta(), x), first) and network.batches(x)
        assert float(network.module.calls) == 0  # pyright: ignore
        torch.func.grad(lambda t: network.outputs(t, x).sum())(network.theta())

    def test_what_the_user_froze_stays_frozen(self, own: Any) -> None:
        net = "    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))\n    net[0].requires_grad_(False)\n"
        network = Network(build(architecture=own(f"def make():\n{net}    return net\n")))
        assert network.layout.names == ("2.weight", "2.bias")
        assert network.in_dtype(torch.float64).layout.names == ("2.weight", "2.bias")

    def test_what_it_prints_does_not_mix_with_results(self, own: Any, capsys: Any) -> None:
        body = "def make():\n    print('building')\n    return nn.Linear(5, 3)\n"
        build(architecture=own("print('importing')\n" + body))
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("dtype", ["half", "bfloat16", "double"])
    def test_any_floating_type_becomes_single_precision(self, dtype: str, own: Any) -> None:
        net = f"nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).{dtype}())"
        module = build(architecture=own(f"def make():\n    return {net}\n"))
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}

    def test_a_module_that_does_not_exist(self) -> None:
        with pytest.raises(InputError, match="python:nowhere.at_all:make does not import"):
            build(architecture="python:nowhere.at_all:make")

    def test_mappings_go_by_name_and_tuples_by_position(self, own: Any) -> None:
        spec = own(
            "class make(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)\n"
            "    def forward(self, ids, weight):\n"
            "        return self.head((self.table(ids) * weight[..., None]).mean(1)), 'rest'\n"
        )
        parts = {"ids": part(6, dtype="int64"), "weight": part(6)}
        for structure in (parts, tuple(parts.values())):
            module = build_module(ModelConfig(architecture=spec), schema(parts=structure), 3, stream(0, "init"))
            ids, weight = torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6)
            x = {"weight": weight, "ids": ids} if isinstance(structure, dict) else (ids, weight)
            assert call_module(module, x).shape == (2, 3)

    def test_dropout_is_off(self, own: Any) -> None:
        module = build(architecture=own("def make():\n    return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))\n"))
        x = torch.randn(4, 5)
        assert torch.equal(module(x), module(x))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_a_hugging_face_classifier(self, attention: str, own: Any) -> None:
        """Names of parameters stay as they are, outputs are the logits, and many networks evaluate at once."""
        spec = own(
            "from transformers import BertConfig, BertForSequenceClassification\n"
            "def make(outputs):\n"
            "    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,\n"
            "        intermediate_size=16, max_position_embeddings=8, num_labels=outputs)\n"
            f"    config._attn_implementation = {attention!r}\n"
            "    return BertForSequenceClassification(config)\n"
        )
        parts = {"input_ids": part(6, dtype="int64"), "attention_mask": part(6, dtype="int64")}
        module = build_module(ModelConfig(architecture=spec), schema(parts=parts), 3, stream(0, "init"))
        assert "classifier.weight" in module.state_dict()
        mask = torch.ones(4, 6, dtype=torch.int64)
        mask[:, 4:] = 0
        x = {"input_ids": torch.arange(24).reshape(4, 6) % 20, "attention_mask": mask}
        network = Network(module, "classifier|attention")
        theta = torch.stack([network.theta(), 1.1 * network.theta()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fallback without a batching rule would warn
            many = network.outputs_many(theta, x)
        assert many.shape == (2, 4, 3)
        torch.testing.assert_close(many[1], network.outputs(theta[1], x), rtol=1e-5, atol=1e-6)
        pickle.loads(pickle.dumps(module))

    @pytest.mark.parametrize("attention", ["sdpa", "torch"])
    def test_transformers_have_curvature(self, attention: str, own: Any) -> None:
        """Fused attention has no second and no forward derivatives; the networks that we evaluate must have both."""
        if attention == "sdpa":
            attend = "torch.nn.functional.scaled_dot_product_attention(h, h, h)"
        else:
            attend = "self.layer(h)"
        spec = own(
            "class make(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)\n"
            "        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)\n"
            f"    def forward(self, ids):\n        h = self.table(ids)\n        return self.head({attend}.mean(1))\n"
        )
        tokens = schema(parts=part(6, dtype="int64"))
        network = Network(
            build_module(ModelConfig(architecture=spec), tokens, 3, stream(0, "init")), dtype=torch.float64
        )
        x, theta = torch.arange(24).reshape(4, 6) % 9, network.theta()

        def loss(t: torch.Tensor) -> torch.Tensor:
            return network.outputs(t, x).square().sum()

        direction = torch.ones_like(theta)
        forward_over_reverse = jvp(grad(loss), (theta,), (direction,))[1]
        reverse_over_reverse = grad(lambda t: grad(loss)(t) @ direction)(theta)
        torch.testing.assert_close(forward_over_reverse, reverse_over_reverse)
        slope = jvp(lambda t: network.outputs(t, x), (theta,), (direction,))[1]
        h = 1e-6
        difference = (network.outputs(theta + h * direction, x) - network.outputs(theta - h * direction, x)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_layer_under_two_names_and_a_tied_weight_are_each_one(self, dtype: torch.dtype) -> None:
        """As autograd has it on the module itself; and the module is as before, for one vector and for many."""
        module = Twice().to(dtype).eval()
        expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(4, 6)
        slopes = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        network = Network(module, dtype=dtype)
        theta = network.theta()
        found = grad(lambda t: network.outputs(t, x).square().sum())(theta)
        torch.testing.assert_close(found, torch.cat([slope.reshape(-1) for slope in slopes]))
        network.outputs_many(torch.stack([theta + 1, theta + 2]), x)
        assert {name: value.tolist() for name, value in network.module.named_parameters()} == {
            name: value.tolist() for name, value in expected.items()
        }
        assert torch.equal(network.theta(), theta)
        assert torch.equal(network.state_dict(theta + 1)["again.weight"], expected["middle.weight"] + 1)

    def test_a_network_that_casts_to_single_precision_runs_in_double(self) -> None:
        """With derivatives that single precision could not give."""
        network = Network(Single(), dtype=torch.float64)
        x, theta = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6), network.theta()
        slope = grad(lambda t: network.outputs(t, x).sum())(theta)
        ahead, behind = (network.outputs(theta + h, x).sum() for h in (1e-6, -1e-6))
        assert float(slope.sum()) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-7)
        assert network.outputs_many(torch.stack([theta, theta]), x).dtype == torch.float64

    @pytest.mark.parametrize(
        "body",
        [
            "def make():\n    return torch.compile(nn.Linear(5, 3))\n",
            "def make():\n    net = nn.Linear(5, 3)\n    net.compile()\n    return net\n",
            "def make():\n    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(3))\n",
        ],
        ids=["compiled", "compiled in place", "lazy"],
    )
    def test_compiled_and_lazy_modules_are_differentiated_as_others(self, body: str, own: Any) -> None:
        network = Network(build((5,), architecture=own(body)))
        assert torch.isfinite(grad(lambda t: network.outputs(t, torch.ones(2, 5)).sum())(network.theta())).all()

    def test_sparse_gradients_of_an_embedding_are_joined_with_the_others(self, own: Any) -> None:
        body = "def make():\n    return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))\n"
        tokens = schema(parts=part(2, dtype="int64"))
        network = Network(build_module(ModelConfig(architecture=own(body)), tokens, 3, stream(0, "init")))
        leaf = network.theta().requires_grad_(True)
        slope = torch.autograd.grad(network.outputs(leaf, torch.ones((2, 2), dtype=torch.int64)).sum(), leaf)[0]
        assert int((slope != 0).sum()) == 3 + 18 + 3
        assert network.dim == 27 + 18 + 3

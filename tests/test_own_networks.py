"""Networks of a user's own, each run from a configuration on the command line, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network
from pipeline.bayes.plain import gradient_differences
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import to_tensors
from pipeline.cli import main
from pipeline.data.schema import DataSchema, Part
from pipeline.models import seeded
from pipeline.own_network import check_gradient, check_own
from pipeline.run import Run, load_run
from pipeline.scale_free import scale_free, scale_note, shrinkage
from pipeline.stages.export import export
from pipeline.stages.predict import predict
from pipeline.stages.select import MARGIN
from pipeline.streams import stream
from tests import own

SETTINGS: dict[str, Any] = {
    "prior": {"precision": 1.0},
    "map": {"steps": 300},
    "walk": {"walks": 24, "walks_per_shard": 12, "length": 4.0, "steps": 40, "record_every": 4, "rank": 8},
    "deformation": {"kind": "none"},
    "evaluation": {"draws": 24, "baselines": ["map"]},
}
CASES = {
    "mlp": ("table", {}),
    "conv": ("images", {}),
    "transformer": ("tokens", {"parameters": "head|linear2|norm2"}),
    "whole_transformer": ("tokens", {}),
    "recurrent": ("sequences", {}),
    "last_layer": ("table", {"parameters": "head"}),
    "frozen": ("table", {}),
}


def probabilities(network: nn.Module, inputs: Any) -> np.ndarray:
    """What the user's own module says in plain torch."""
    with torch.no_grad():
        out = network(**inputs) if isinstance(inputs, dict) else network(inputs)
    out = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    return out.double().softmax(1).numpy()


def validation_nll(run: Run, network: nn.Module) -> float:
    """Mean NLL of the validation rows at the stored MAP estimate."""
    network.load_state_dict(load_file(f"{run.uri}/map/start=0/theta.safetensors"))
    rows = run.dataset.validation
    return float(-np.log(probabilities(network, tensors(rows.x))[np.arange(len(rows.y)), rows.y]).mean())


def tensors(x: Any) -> Any:
    """Arrays as tensors, floating point in single precision."""
    if isinstance(x, dict):
        return {name: tensors(value) for name, value in x.items()}
    found: Tensor = torch.as_tensor(np.array(x))
    return found.float() if found.is_floating_point() else found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # plain torch's own fast path
@pytest.mark.parametrize("name", CASES)
def test_an_own_network_runs_keeps_its_fit_and_is_taken_back_into_plain_torch(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chosen radius predicts validation rows as well as the MAP or better, and plain torch agrees with us."""
    data, model = CASES[name]
    make = {"last_layer": own.mlp, "whole_transformer": own.transformer}.get(name) or getattr(own, name)
    model = {"architecture": f"python:tests.own:{make.__name__}", **model}
    config = {"name": name.replace("_", "-"), "data": {"source": f"python:tests.own:{data}"}, "model": model}
    config |= {**SETTINGS, "storage": str(tmp_path / "runs")}
    if name == "whole_transformer":
        config |= {"prior": {"precision": {"head": 1.0, ".*": 1e-4}}}
    if name == "last_layer":
        x, y = own.table()
        x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
        with seeded(stream(0, "init")):
            save_file(own.trained(make(), torch.as_tensor(x), torch.as_tensor(y), 0.005).state_dict(), tmp_path / "w")
        config |= {"map": {"polish": True}, "model": {**model, "weights": str(tmp_path / "w")}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    threads = torch.get_num_threads()
    assert main(["run", str(tmp_path / "own.yaml"), "--serial", "-q"]) == 0
    torch.set_num_threads(threads)
    uri = capsys.readouterr().out.splitlines()[0]
    (tmp_path / "w").unlink(missing_ok=True)  # from the estimate on, the store has all values
    run = load_run(uri, trust_code=True)
    chosen = run.storage.read_json("radius.json")
    scores = {point["radius"]: point["validation_nll"] for point in chosen["curve"]}
    network = make().eval()
    star = validation_nll(run, network)
    assert scores[chosen["radius"]] <= star + MARGIN * (0.5 + star)  # what the rule of the radius counts as equal
    export(uri, "safetensors", str(tmp_path / "states"), radius=chosen["radius"], trust_code=True)
    predict(uri, f"python:tests.own:{data}", str(tmp_path / "said.parquet"), trust_code=True)
    inputs = tensors(run.dataset.schema.encode(getattr(own, data)()[0]))
    every = []
    for path in sorted((tmp_path / "states").rglob("*.safetensors")):
        network.load_state_dict(load_file(path))
        every.append(probabilities(network, inputs))
    said = pq.read_table(tmp_path / "said.parquet").to_pandas().filter(like="probability_").to_numpy()
    assert len(every) == 24
    np.testing.assert_allclose(np.mean(every, axis=0), said, atol=1e-6)
    assert main(["verify", uri]) == 0


def potential(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[Potential, Tensor]:
    """U of an own network on noisy waves, and where it is."""
    with seeded(stream(0, "init")):
        network = Network(make(), dtype=dtype)
    x, y = own.sequences()
    parts = network, Categorical(2), torch.ones(network.dim, dtype=dtype)
    return Potential(*parts, torch.as_tensor(x[:30]).to(dtype), torch.as_tensor(y[:30])), network.theta()


@pytest.mark.parametrize("make", [own.recurrent, own.stacked, own.plain_recurrent, own.opaque])
def test_curvature_products_are_exact_where_torch_lacks_derivatives(make: Callable[[], nn.Module]) -> None:
    """Recurrent layers in single precision, and functions that are differentiable once: equal to differences."""
    exact, theta = potential(make, torch.float64)
    vectors = torch.as_tensor(stream(0, "vectors").standard_normal((3, len(theta))))
    hessian = gradient_differences(exact, theta, vectors)
    torch.testing.assert_close(exact.hvp(theta, vectors), hessian, rtol=1e-6, atol=1e-6)
    step, root = 1e-5, exact.network.outputs(theta, exact.x)
    for vector, product in zip(vectors, exact.gauss_newton(theta, vectors), strict=True):
        ahead, behind = (exact.network.outputs(theta + sign * step * vector, exact.x) for sign in (1, -1))
        tangent = (ahead - behind) / (2 * step)
        curved = (exact.likelihood.curvature_product(root, tangent) * tangent).sum() + vector @ vector
        torch.testing.assert_close(vector @ product, curved, rtol=1e-6, atol=0.0)
    single, start = potential(make, torch.float32)
    for name in ("hvp", "gauss_newton"):
        found = getattr(single, name)(start, vectors.float())
        expected = getattr(exact, name)(theta, vectors)
        assert (found.double() - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("make", [own.recurrent, own.stacked, own.opaque])
def test_many_outputs_at_once_are_those_of_one_after_the_other(make: Callable[[], nn.Module]) -> None:
    """By batching where torch.func takes the network, and else in a loop."""
    exact, theta = potential(make, torch.float64)
    many = torch.stack([theta, 1.1 * theta, -theta])
    each = torch.stack([exact.network.outputs(t, exact.x) for t in many])
    torch.testing.assert_close(exact.network.outputs_many(many, exact.x), each)
    assert exact.network.batches(exact.x) == (make is not own.opaque)


def test_what_a_gradient_does_not_see_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A backbone that runs without gradients would drift uncorrected; walking the head alone is fine."""
    config = {"name": "no-grad", "data": {"source": "python:tests.own:table"}, **SETTINGS}
    config |= {"model": {"architecture": "python:tests.own:detached"}, "storage": str(tmp_path / "runs")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "own.yaml"), "--serial", "-q"]) == 2
    said = capsys.readouterr().err
    assert "backbone.0.weight, backbone.0.bias in another way" in said and "model.parameters" in said
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()
    network = Network(own.detached(), "head", torch.float64)
    check_gradient(network, "python:tests.own:detached", own.table()[0])


def test_a_padding_row_that_outputs_depend_on_has_a_gradient(tmp_path: Path) -> None:
    """Torch hides the gradient of padding_idx, so that the walk could not correct that row."""
    schema = DataSchema("classification", Part((6,), "int64", 1.0, np.zeros(()), np.ones(())))
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Flatten(), nn.Linear(18, 2)).eval()
    check_own(model, "model.architecture", schema, 2)
    network = Network(model, dtype=torch.float64)
    check_gradient(network, "python:tests.own:any", np.zeros((4, 6), dtype=np.int64))
    leaf = network.theta().requires_grad_(True)
    assert torch.autograd.grad(network.outputs(leaf, torch.zeros(1, 6).long()).sum(), leaf)[0][:3].abs().min() > 0


class Normalised(nn.Module):
    """A layer before a normalisation written by hand, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 8), Unit(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.norm(self.inner(x)).tanh())


class Unit(nn.Module):
    """Rows to length one."""

    def forward(self, x: Tensor) -> Tensor:
        """The row by its length."""
        return 3 * x / x.norm(dim=-1, keepdim=True)


def test_weights_without_a_scale_are_found_by_behaviour_and_the_note_names_the_way_out() -> None:
    """Torch's LayerNorm and anybody's own; a plain network has none."""
    x = torch.as_tensor(own.table()[0])
    network = Network(Normalised(), dtype=torch.float64)
    found = scale_free(network, x)
    assert found == {"layers": ["norm"], "parameters": ["inner.weight", "inner.bias"]}
    assert scale_free(Network(nn.Linear(6, 2), dtype=torch.float64), x) == {"layers": [], "parameters": []}
    inputs, _ = own.tokens()
    whole = scale_free(Network(own.Attention(), dtype=torch.float64), to_tensors(inputs))
    assert whole["layers"] == ["encoder.layers.0.norm1", "encoder.layers.0.norm2"]
    assert "table.weight" in whole["parameters"] and "head.weight" not in whole["parameters"]
    start = network.theta()
    shrunk = network.layout.split(start.clone())
    shrunk = network.layout.join({name: part * (0.1 if "inner" in name else 1.0) for name, part in shrunk.items()})
    factor = shrinkage(network, found["parameters"], start, shrunk)
    assert factor == pytest.approx(0.1)
    info = {"lambda_max": 1e6, "scale_free": {**found, "shrinkage": factor}}
    note = scale_note(info, network.layout.to_json())
    assert note is not None and "10 times (inner.weight, inner.bias)" in note
    assert "{'head.weight': 1.0, 'head.bias': 1.0, '.*': 1.0e-04}" in note
    assert scale_note({**info, "scale_free": {**found, "shrinkage": 0.8}}, network.layout.to_json()) is None

"""Networks of a user's own, each run from a configuration on the command line, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.models import seeded
from pipeline.run import Run, load_run
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
    make = {"last_layer": own.mlp}.get(name) or getattr(own, name)
    model = {"architecture": f"python:tests.own:{make.__name__}", **model}
    config = {"name": name.replace("_", "-"), "data": {"source": f"python:tests.own:{data}"}, "model": model}
    config |= {**SETTINGS, "storage": str(tmp_path / "runs")}
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

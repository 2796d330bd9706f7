"""Own networks whose gradient or layers are not what they seem, and weights that a wrapper saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.bayes.chain import parse_chain
from pipeline.bayes.params import Network
from pipeline.config import parse_config
from pipeline.errors import InputError
from pipeline.models import load_weights
from pipeline.own_network import check_gradient
from pipeline.progress import LogProgress
from pipeline.run import prepare
from pipeline.stages.check_weights import say_duration


def test_gradient_checkpointing_is_refused_by_its_name() -> None:
    from torch.utils.checkpoint import checkpoint

    class Saved(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(super().forward, x.tanh(), use_reentrant=False)

    network = Network(nn.Sequential(Saved(5, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.float64)
    with pytest.raises(InputError, match="gradient checkpointing"):
        check_gradient(network, "python:a:b", torch.ones(4, 5).numpy())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_saved_from_a_wrapper_are_those_of_the_network(prefix: str, tmp_path: Path) -> None:
    network, other = nn.Linear(5, 3), nn.Linear(5, 3)
    save_file({prefix + name: value for name, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(other, str(tmp_path / "w.safetensors"))
    assert torch.equal(other.weight, network.weight)


def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_the_usual_one() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert parse_chain(network, 39) is not None
    network[1].forward = torch.sin
    assert parse_chain(network, 39) is None


def test_a_small_parameter_without_its_gradient_is_named() -> None:
    module = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))

    def scaled(net: Any, args: Any, output: Any) -> Any:
        return output * (1 + net.scale.item() / 1e4)

    module.register_forward_hook(scaled)
    with pytest.raises(InputError, match="change with scale in another way"):
        check_gradient(Network(module, dtype=torch.float64), "python:a:b", torch.ones(4, 5).numpy())


class _Slow(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().forward(x)


def slow() -> nn.Module:
    """6 columns, two classes, a tenth of a second each time."""
    return _Slow(6, 2)


@pytest.mark.parametrize(("factory", "says"), [("tests.test_own_gradient:slow", True), ("tests.own:mlp", False)])
def test_a_slow_estimate_is_announced(
    factory: str, says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"architecture": f"python:{factory}"}
    values = {"name": "slow", "storage": str(tmp_path), "data": {"source": "python:tests.own:table"}, "model": model}
    said: list[str] = []
    progress = LogProgress()
    monkeypatch.setattr(progress, "note", said.append)
    say_duration(prepare(parse_config(values)), progress)
    assert [("minutes for each start" in line) for line in said] == [True] * says

"""Built-in networks: initialised by a stream, filled with weights that fit, checked before anything is computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from pipeline.bayes.params import Network
from pipeline.config import ModelConfig, parse_config
from pipeline.errors import InputError
from pipeline.executor import SerialExecutor
from pipeline.models import build_module, calibrate_batchnorm, load_weights
from pipeline.progress import LogProgress
from pipeline.resnet import resnet18
from pipeline.run import prepare
from pipeline.stages.constant import collapse_note, constant_nll
from pipeline.stages.estimate import estimate
from pipeline.streams import stream
from tests.networks import build, part, schema


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (8, 8), (2, 5, 7)])
@pytest.mark.parametrize("architecture", ["mlp", "conv", "lenet", "resnet"])
def test_built_in_networks_take_images_of_any_size(architecture: str, shape: tuple[int, ...]) -> None:
    module = build(shape, outputs=4, architecture=architecture, hidden=(4, 6))
    with torch.no_grad():
        assert module(torch.randn(3, *shape)).shape == (3, 4)
    assert not module.training


def test_mlp_is_the_plain_sequence() -> None:
    module = build((5,), outputs=3, hidden=(7, 4), activation="relu")
    assert [type(layer) for layer in module] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]  # pyright: ignore
    assert isinstance(build((1, 4, 4), hidden=(7,))[0], nn.Flatten)  # pyright: ignore


def test_sizes_are_the_published_ones() -> None:
    assert sum(p.numel() for p in resnet18(3, 10).parameters()) == 11_173_962
    assert sum(p.numel() for p in build((1, 28, 28), outputs=10, architecture="lenet").parameters()) == 61_706


def test_initial_weights_are_a_function_of_the_stream_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = build(seed=0), build(seed=0), build(seed=1)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first[0].weight, other[0].weight)  # pyright: ignore
    assert torch.equal(before, torch.get_rng_state())


def test_many_networks_evaluate_as_one_by_one() -> None:
    """No layer works in place or draws random numbers, so `vmap` may be used."""
    for architecture in ("mlp", "conv", "lenet", "resnet"):
        network = Network(build((1, 8, 8), architecture=architecture, hidden=(4,)), dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        theta = network.theta() + 0.01 * torch.randn(2, network.dim, generator=generator, dtype=torch.float64)
        x = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(network.outputs_many(theta, x)[1], network.outputs(theta[1], x))


@pytest.mark.parametrize("architecture", ["conv", "lenet", "resnet"])
def test_image_networks_refuse_tables(architecture: str) -> None:
    with pytest.raises(InputError, match=r"images .*\(5,\); use mlp"):
        build((5,), architecture=architecture)


def test_channels_come_first() -> None:
    with pytest.raises(InputError, match="channels, height, width"):
        build((32, 32, 3), architecture="lenet")


def test_token_numbers_need_a_network_of_ones_own() -> None:
    with pytest.raises(InputError, match="name your own network"):
        build_module(ModelConfig(), schema(parts=part(4, dtype="int64")), 3, stream(0, "init"))


class TestBatchNorm:
    def test_calibration_sets_the_statistics_of_the_rows(self) -> None:
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        x = 5 + 3 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
        weights = {name: value.clone() for name, value in module.named_parameters()}
        calibrate_batchnorm(module, x)
        hidden = module[0](x)
        torch.testing.assert_close(module[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module[1].running_var, hidden.var(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(dict(module.named_parameters()), weights, rtol=0, atol=0)
        assert not module.training and module[1].momentum == 0.1

    def test_a_deep_network_keeps_its_scale(self) -> None:
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        module = build((3, 8, 8), outputs=10, architecture="resnet")
        calibrate_batchnorm(module, x)
        with torch.no_grad():
            assert 0.05 < module(x).std() < 5

    def test_without_such_layers_nothing_happens(self) -> None:
        module = build()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        calibrate_batchnorm(module, torch.randn(4, 5))
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


class TestWeights:
    def test_the_saved_network_comes_back(self, tmp_path: Path) -> None:
        first = build(seed=1)
        save_file(first.state_dict(), tmp_path / "w.safetensors")
        for address in (f"{tmp_path}/w.safetensors", f"file://{tmp_path}/w.safetensors"):
            second = build(seed=2)
            load_weights(second, address)
            torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)

    def test_tied_weights_may_be_stored_once(self, tmp_path: Path) -> None:
        def tied() -> nn.Sequential:
            first, second = nn.Linear(4, 4), nn.Linear(4, 4)
            second.weight = first.weight
            return nn.Sequential(first, second)

        source, target = tied(), tied()
        save_model(source, str(tmp_path / "w.safetensors"))
        load_weights(target, str(tmp_path / "w.safetensors"))
        torch.testing.assert_close(source.state_dict(), target.state_dict(), rtol=0, atol=0)
        assert target[0].weight is target[1].weight

    def test_counters_of_batchnorm_may_be_absent(self, tmp_path: Path) -> None:
        module = nn.BatchNorm1d(3)
        state = {name: value + 1 for name, value in module.state_dict().items() if "num_batches" not in name}
        save_file(state, tmp_path / "w.safetensors")
        load_weights(module, str(tmp_path / "w.safetensors"))
        torch.testing.assert_close({name: module.state_dict()[name] for name in state}, state, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s.pop("0.weight"), ["lacks 0.weight"]),
            (lambda s: s.update(extra=torch.zeros(1)), ["has extra"]),
            (lambda s: s.update({"0.bias": torch.zeros(9)}), ["0.bias has shape (9,)", "(50,)"]),
            (lambda s: s.update({"0.bias": torch.full((50,), math.nan)}), ["0.bias", "not finite"]),
        ],
    )
    def test_weights_that_do_not_fit_change_nothing(self, change: Any, words: list[str], tmp_path: Path) -> None:
        module = build()
        state = {name: value + 1 for name, value in module.state_dict().items()}
        before = {name: value.clone() for name, value in module.state_dict().items()}
        change(state)
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(InputError) as error:
            load_weights(module, str(tmp_path / "w.safetensors"))
        for word in words:
            assert word in str(error.value)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)

    def test_pickles_are_refused_unread(self, tmp_path: Path) -> None:
        torch.save(build().state_dict(), tmp_path / "w.pt")
        with pytest.raises(InputError, match="pickle.*safetensors.torch.save_model"):
            load_weights(build(), str(tmp_path / "w.pt"))
        (tmp_path / "w.pt").rename(tmp_path / "w.safetensors")
        with pytest.raises(InputError, match="no safetensors file"):
            load_weights(build(), str(tmp_path / "w.safetensors"))
        with pytest.raises(InputError, match="no such file"):
            load_weights(build(), str(tmp_path / "absent.safetensors"))


class TestCollapse:
    """A prior that holds all weights at zero leaves a network that knows the class frequencies and nothing else."""

    def test_a_network_held_at_zero_is_named_with_the_setting_that_holds_it(self, caplog: Any, tmp_path: Path) -> None:
        notes = self._notes(tmp_path, caplog, {"precision": 1e6})
        assert "predicts no better than the class frequencies" in notes and "prior.precision (now 1e+06)" in notes

    def test_a_network_that_learned_something_is_not(self, caplog: Any, tmp_path: Path) -> None:
        assert "no better" not in self._notes(tmp_path, caplog, {"precision": 1.0})

    def test_a_regression_that_returns_the_mean(self) -> None:
        config = parse_config({"name": "r", "data": {"source": "sklearn:diabetes", "task": "regression"}})
        y = stream(0, "init").standard_normal(500)
        info = {"start": 0, "noise_std": 0.8, "prior_precision": 1.0}
        constant = constant_nll(config, y, 0.8)
        exact = -np.mean([math.log(1 / 0.8 / math.sqrt(2 * math.pi)) - (v - y.mean()) ** 2 / (2 * 0.64) for v in y])
        assert constant == pytest.approx(exact)
        assert collapse_note(config, y, {**info, "nll": 500 * exact})
        assert collapse_note(config, y, {**info, "nll": 500 * (exact - 0.2)}) is None

    def _notes(self, place: Path, caplog: Any, prior: dict[str, float]) -> str:
        settings = {"name": "c", "data": {"source": "sklearn:iris"}, "model": {"hidden": [4]}, "map": {"steps": 100}}
        run = prepare(parse_config({**settings, "prior": prior, "storage": str(place), "walk": {"rank": 2}}))
        with caplog.at_level("INFO", logger="fiberwalk"):
            estimate(run, SerialExecutor(), LogProgress())
        return caplog.text

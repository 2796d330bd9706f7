"""`fiberwalk sample` writes the draws of the posterior, and nothing else."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import parse_config
from pipeline.errors import InputError
from pipeline.posterior import Posterior
from pipeline.stages.export import export
from pipeline.stages.sample_draws import sample_draws
from pipeline.store import SampleStore
from tests.runs import CONFIGS, copy_of, finished, walked


def theta_of(path: Path) -> np.ndarray:
    column = pq.read_table(path)["theta"].combine_chunks()
    return np.concatenate([chunk.to_numpy_ndarray() for chunk in getattr(column, "chunks", [column])])


def test_the_file_holds_the_posteriors_own_draws_with_their_potential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.sample_draws.ROW_GROUP_BYTES", 20_000)
    run = finished("classes")
    sample_draws(run.uri, 50, str(tmp_path / "draws.parquet"), seed=3, potential=True)
    posterior = Posterior.load(run.uri)
    expected = posterior.draw(50, seed=3)
    np.testing.assert_array_equal(theta_of(tmp_path / "draws.parquet"), expected.numpy())
    metadata = pq.read_metadata(tmp_path / "draws.parquet")
    assert metadata.num_row_groups > 1
    assert json.loads(metadata.metadata[b"fiberwalk.parameters"]) == posterior.store.plan.parameters
    radii = [float(metadata.metadata[f"fiberwalk.{name}".encode()]) for name in ("radius", "gaussian_radius")]
    assert radii == [posterior.facts["draw_radius"], posterior.facts["radius"]]
    query = f"select draw, start, potential from '{tmp_path / 'draws.parquet'}' order by draw"
    rows = duckdb.connect().execute(query).fetchall()
    assert [row[0] for row in rows] == list(range(50)) and {row[1] for row in rows} == {0, 1}
    for draw, start, potential in rows[::10]:
        level = posterior.problem(start).potential.value(expected[draw][None])
        assert potential == pytest.approx(float(level[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draws": 0}, "--draws must be at least 1"),
        ({"out": "x.csv"}, "--out must end with .parquet"),
        ({"out": "../x.parquet"}, "'..'"),
        ({"radius": 1e6}, "radius"),
    ],
)
def test_wrong_wishes_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_draws(
            finished("classes").uri, given.get("draws", 5), given.get("out", "x.parquet"), radius=given.get("radius")
        )
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_deformation_says_so(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path, "deformation/deformation.json")
    with pytest.raises(InputError, match="no deformation"):
        sample_draws(run.uri, 5, str(tmp_path / "x.parquet"))


def test_code_of_a_stored_configuration_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    run = finished("plane")
    with pytest.raises(InputError, match="--trust-code"):
        sample_draws(run.uri, 5, str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="--trust-code"):
        export(run.uri, "safetensors", str(tmp_path / "x"))
    sample_draws(run.uri, 5, str(tmp_path / "x.parquet"), trust_code=True)
    assert theta_of(tmp_path / "x.parquet").shape[0] == 5


def test_a_state_dict_has_the_frozen_parameters_of_its_own_start(tmp_path: Path) -> None:
    model = {"hidden": [6], "parameters": "^3"}
    run = walked(parse_config({**CONFIGS["classes"], "model": model, "storage": str(tmp_path), "name": "last"}))
    export(run.uri, "safetensors", str(tmp_path / "points"), thin=8)
    plan = SampleStore.open(run.uri).plan
    for shard in plan.shards():
        stored = load_file(Path(run.uri) / f"map/start={shard.start}" / "theta.safetensors")
        (file,) = (tmp_path / "points").glob(f"walk={shard.first_walk:06d}-*")
        state = load_file(file)
        torch.testing.assert_close(state["1.weight"], stored["1.weight"].float(), rtol=0, atol=0)
        assert not torch.equal(state["3.weight"], stored["3.weight"].float())
    with pytest.raises(InputError, match="differs between starts"):
        export(run.uri, "safetensors", str(tmp_path / "points.safetensors"))


def test_counts_that_are_none_are_refused_and_paths_are_addresses() -> None:
    posterior = Posterior.load(Path(finished("classes").uri))
    assert torch.equal(posterior.draw(3), Posterior.load(finished("classes").uri).draw(3))
    for batch in (0, -2):
        with pytest.raises(InputError, match=f"batch must be at least 1 draw, got {batch}"):
            next(posterior.draw_batches(5, batch=batch))
    for draws in (0, -1):
        with pytest.raises(InputError, match=f"number of draws must be at least 1, got {draws}"):
            posterior.predict(np.zeros((1, 1, 8, 8)), draws=draws)

"""Exports hold what the store holds, and other programs open them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.build import load_problem
from pipeline.config import load_config
from pipeline.errors import DamagedBlock, InputError
from pipeline.plan import BlockKey
from pipeline.run import load_run
from pipeline.stages.export import export
from pipeline.stages.export_read import read, select
from pipeline.storage import Storage
from pipeline.store import SampleStore
from tests.known_store import DIM, EXPECTED, WALKS, make_store
from tests.runs import walked

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

import duckdb
import matplotlib
import matplotlib.pyplot as pyplot
import pandas
import polars
import xarray

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("export") / "synthetic")
    make_store(place)
    return place


def open_arviz(path: Path):
    if path.suffix == ".nc":
        return arviz.from_netcdf(str(path))
    return arviz.InferenceData.from_datatree(xarray.open_datatree(str(path), engine="zarr"))


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_arviz_opens_summarises_and_plots_what_the_store_holds(run: str, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"posterior{ending}"
    written = export(run, "arviz", str(out))
    assert (written.walks, written.draws, written.parameters, written.diverged) == (9, 6, DIM, 1)
    data = open_arviz(out)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["0.weight"].shape == (9, 6, 3, 2) and posterior["0.weight"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(posterior["0.weight"], EXPECTED[..., :6].reshape(9, 6, 3, 2))
    np.testing.assert_array_equal(posterior["0.bias"], EXPECTED[..., 6:9])
    np.testing.assert_array_equal(posterior["a_.._b"], EXPECTED[..., 9])
    np.testing.assert_array_equal(posterior["chain"], WALKS)
    np.testing.assert_array_equal(posterior["draw"], 2 * np.arange(1, 7))
    np.testing.assert_array_equal(stats["potential"], 100.0 * WALKS[:, None] + np.arange(6))
    assert {"radius", "distance", "grad_norm", "nll", "step", "start"} <= set(stats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary: Any = arviz.summary(data)
        assert len(summary) == DIM and summary.loc["0.bias[0]", "mean"] == pytest.approx(EXPECTED[..., 6].mean(), abs=1)
        assert arviz.plot_trace(data, var_names=["0.bias"]).shape == (1, 2)
    pyplot.close("all")


def test_npz_holds_one_array_a_parameter(run: str, tmp_path: Path) -> None:
    export(run, "npz", str(tmp_path / "x.npz"), parameters="weight|bias")
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["0.weight"], EXPECTED[..., :6].reshape(9, 6, 3, 2))
        np.testing.assert_array_equal(found["walk"], WALKS)
        assert found["radius"].shape == (9, 6) and "a_.._b" not in found


def test_parquet_opens_in_duckdb_pandas_and_polars(run: str, tmp_path: Path) -> None:
    path = str(tmp_path / "points.parquet")
    export(run, "parquet", path)
    query = f"select walk, step, potential, \"0.bias\" from '{path}' order by walk, step"
    rows = duckdb.connect().execute(query).fetchall()
    assert [row[0] for row in rows] == [w for w in WALKS for _ in range(6)]
    np.testing.assert_array_equal(np.array([row[3] for row in rows]), EXPECTED.reshape(-1, DIM)[:, 6:9])
    frame = pandas.read_parquet(path).sort_values(["walk", "step"])
    np.testing.assert_array_equal(np.stack(frame["0.weight"].tolist()), EXPECTED.reshape(-1, DIM)[:, :6])
    table = polars.read_parquet(path).sort("walk", "step")
    np.testing.assert_array_equal(table["0.bias"].to_numpy(), EXPECTED.reshape(-1, DIM)[:, 6:9])
    assert set(table["status"].unique()) == {"ok"}


@pytest.mark.parametrize("ending", [".nc", ".npz"])
def test_one_point_a_walk_at_a_radius_is_its_nearest_record(run: str, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"x{ending}"
    export(run, "arviz" if ending == ".nc" else "npz", str(out), radius=3.0)
    found = open_arviz(out)["posterior"]["0.bias"] if ending == ".nc" else np.load(out)["0.bias"]
    records = np.where(WALKS == 3, 3, 2)  # the walk that paused needs one record more to get there
    np.testing.assert_array_equal(np.asarray(found)[:, 0], EXPECTED[np.arange(9), records, 6:9])


@pytest.mark.parametrize(("thin", "kept"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5]), (6, [5])])
def test_thinning_counts_back_from_the_last_record(run: str, tmp_path: Path, thin: int, kept: list[int]) -> None:
    export(run, "npz", str(tmp_path / "x.npz"), thin=thin)
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["0.bias"], EXPECTED[:, kept, 6:9])


def test_walks_of_unfinished_shards_are_left_out_and_counted(run: str, tmp_path: Path) -> None:
    place = str(tmp_path / "half")
    store = make_store(place)
    store.storage.delete(BlockKey(0, 1).path)
    written = export(place, "npz", str(tmp_path / "x.npz"))
    assert (written.walks, written.unfinished) == (5, 4)
    assert written.left_out == "Walks left out: 1 diverged, 4 not finished ('fiberwalk run' goes on).\n"
    assert export(run, "npz", str(tmp_path / "whole.npz")).left_out == "Walks left out: 1 diverged.\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "csv", "out": "x.csv"}, "--format must be one of arviz, safetensors, parquet, npz"),
        ({"format": "arviz", "out": "x.h5"}, "--out must end with .nc or .zarr"),
        ({"parameters": "conv"}, "--parameters 'conv' matches no walked parameter. There are: 0.weight, 0.bias"),
        ({"parameters": "("}, "is no regular expression"),
        ({"radius": 9.0}, "--radius must lie between 1 and 6"),
        ({"thin": 7}, "--thin must be a whole number from 1 to 6"),
        ({"thin": 2, "radius": 3.0}, "leave one out"),
        ({"out": "a/../../x.npz"}, "'..'"),
        ({"out": "RUN/x.npz"}, "lies inside the run"),
        ({"out": "RUN/walks/x.npz"}, "lies inside the run"),
    ],
)
def test_wrong_wishes_are_refused_in_one_line_and_nothing_is_written(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = given.pop("out", "x.npz").replace("RUN", run)
    with pytest.raises(InputError) as caught:
        export(run, given.pop("format", "npz"), out, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_target_is_never_overwritten(run: str, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "x.npz"
    if kind == "file":
        out.write_bytes(b"mine")
    else:
        out.mkdir()
        (out / "mine").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        export(run, "npz", str(out))
    assert (out if kind == "file" else out / "mine").read_bytes() == b"mine"


def test_a_file_where_a_folder_is_needed_is_named(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(InputError, match="mine cannot be made: File exists. Name another place"):
        export(run, "npz", str(tmp_path / "mine" / "x.npz"))
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_failed_export_leaves_nothing(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.stages.export_arrays.NpzWriter.write", broken)
    with pytest.raises(OSError, match="disk full"):
        export(run, "npz", str(tmp_path / "x.npz"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
@pytest.mark.parametrize("name", ["x.nc", "x.zarr", "x.parquet"])
def test_exports_from_s3_to_s3_equal_those_on_disk(run: str, tmp_path: Path, s3, name: str) -> None:
    format = {"nc": "arviz", "zarr": "arviz", "parquet": "parquet"}[name.split(".")[1]]
    place = f"s3://{s3.bucket}/export-{name.replace('.', '-')}/synthetic"
    make_store(place)
    out = f"{place.rpartition('/')[0]}/out/{name}"
    export(place, format, out)
    export(run, format, str(tmp_path / name))
    remote = Storage.open(out.rpartition("/")[0])
    here = Storage.open(str(tmp_path))
    names = [entry.path for entry in here.list() if entry.path.startswith(name)]
    assert names and names == [entry.path for entry in remote.list()]
    assert [path for path in names if remote.read(path) != here.read(path)] == []
    with pytest.raises(InputError, match="exists"):
        export(place, format, out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = f"storage={json.dumps(str(tmp_path_factory.mktemp('runs')))}"
    return walked(load_config("configs/smoke.yaml", [storage])).uri


def test_every_file_is_a_state_dict_that_plain_torch_loads(trained: str, tmp_path: Path) -> None:
    export(trained, "safetensors", str(tmp_path / "draws"), radius=2.0)
    files = sorted((tmp_path / "draws").iterdir())
    store = SampleStore.open(trained)
    positions = np.concatenate([points.theta for points in store.points(2.0)])
    assert len(files) == len(positions)
    problem = load_problem(load_run(trained), 0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    for file, theta in zip(files, positions, strict=True):
        plain.load_state_dict(load_file(file))
        ours = problem.network.outputs(torch.tensor(theta), x)
        torch.testing.assert_close(plain(x), ours, rtol=1e-6, atol=1e-6)


def test_stacked_parameters_feed_torch_func(trained: str, tmp_path: Path) -> None:
    export(trained, "safetensors", str(tmp_path / "all.safetensors"))
    found = load_file(tmp_path / "all.safetensors")
    store = SampleStore.open(trained)
    rows = store.plan.walks * store.plan.records
    block = store.read_block(BlockKey(0, 0))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    stacked = {name: found[name] for name in dict(plain.named_parameters())}
    assert stacked["0.weight"].shape == (rows, 8, 4)
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(plain, p, (torch.ones(2, 4),)))(stacked)
    assert outputs.shape == (rows, 2, 3)
    # Row 0 is the first record of walk 0.
    np.testing.assert_array_equal(stacked["0.weight"][0].numpy().reshape(-1), block.theta[0, :32])
    assert found["walk"].tolist() == np.repeat(np.arange(store.plan.walks), store.plan.records).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.nc", "x.zarr", "x.parquet", "x.npz"])
def test_two_gigabytes_are_exported_within_500_megabytes(tmp_path: Path, name: str) -> None:
    wide = [{"name": "0.weight", "shape": [300, 300]}, {"name": "1.weight", "shape": [10_000]}]
    place = str(tmp_path / "wide")
    make_store(place, 100_000, wide, walks=512, walks_per_shard=64, starts=1, steps=20, records_per_block=2)
    kind = {"nc": "arviz", "zarr": "arviz"}.get(name[2:], name[2:])
    # VmHWM begins anew with the program; the maximum that getrusage gives is at least that of the parent.
    code = (
        "import sys; from pipeline.stages.export import export; export(*sys.argv[1:]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, place, kind, str(tmp_path / name)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak * 1024 < 500e6


def test_a_changed_byte_anywhere_is_told_of_or_changes_nothing(tmp_path: Path) -> None:
    """Headers of pages and the footer have no checksums of their own; readers meet them with errors of many kinds."""
    store, key = make_store(str(tmp_path / "run")), BlockKey(0, 1)
    path = Path(store.storage.uri, key.path)
    whole, damaged = path.read_bytes(), 0

    def exported() -> list[Any]:
        found = SampleStore.open(store.storage.uri)
        return [(p.chain, p.draw, p.theta, *p.stats.values()) for p in read(found, select(found, None, 1, None))]

    def block() -> list[Any]:
        found = SampleStore.open(store.storage.uri).read_block(key)
        return [(found.walk, found.step, found.nll, found.theta, np.array(found.status))]

    expected = {reader: reader() for reader in (exported, block)}
    for place in range(0, len(whole), 9):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        for reader, right in expected.items():
            try:
                found = reader()
            except DamagedBlock as error:
                assert "fiberwalk verify" in str(error)
                damaged += 1
                continue
            for mine, theirs in zip(found, right, strict=True):
                for array, other in zip(mine, theirs, strict=True):
                    assert array.dtype == other.dtype, place
                    np.testing.assert_array_equal(array, other, err_msg=f"byte {place}")
    assert damaged > len(whole) / 9

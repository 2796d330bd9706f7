"""Input that is unusual: what is legal runs, what is not is refused in one line, and nothing of a user's is removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipeline.bayes.params import Network
from pipeline.cli import main
from pipeline.config import parse_config
from pipeline.data import Dataset, load_dataset
from pipeline.errors import InputError
from tests.small_run import SETTINGS


def load(**data: object) -> Dataset:
    """A data set of which a third of the rows each validates and judges."""
    shares = {"validation": 0.3, "test": 0.3}
    return load_dataset(parse_config({"name": "unusual", "data": {**shares, **data}}).data, seed=0)


def table(path: Path, header: str, target: str = "ab", rows: int = 30) -> str:
    """A file of two columns of numbers and a target, after a given header."""
    numbers = np.random.default_rng(0).normal(size=(rows, 2))
    lines = [f"{a:.3f},{b:.3f},{target[k % len(target)]}" for k, (a, b) in enumerate(numbers)]
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8", newline="")
    return f"csv:{path}"


class TestTables:
    @pytest.mark.parametrize(
        "header",
        ['a,"b\nc",y\n', 'a,"b\r\nc",y\r\n', "a,b\x0bc,y\n", "a,b\u2028c,y\n", "\n\na,b,y\n", '"a ""1""",b,y\n'],
    )
    def test_a_header_may_hold_line_ends_and_quotes(self, header: str, tmp_path: Path) -> None:
        assert load(source=table(tmp_path / "t.csv", header), target="y").schema.input_shape == (2,)

    def test_line_ends_in_cells_do_not_count_as_rows(self, tmp_path: Path) -> None:
        lines = [f'{k}.5,"red\nor {k % 2}",{"ab"[k % 2]}' for k in range(30)]
        (tmp_path / "t.csv").write_text("a,t,y\n" + "\n".join(lines) + "\n")
        data = load(source=f"csv:{tmp_path}/t.csv", target="y")
        assert data.schema.input_shape == (3,) and len(data.train) == 12

    def test_whole_numbers_beyond_doubles_are_rounded(self, tmp_path: Path) -> None:
        """As account numbers are; text and Parquet hold them as integers."""
        (tmp_path / "t.csv").write_text("id,y\n" + "".join(f"{2**59 + 50 * k},{k % 2}\n" for k in range(60)))
        data = load(source=f"csv:{tmp_path / 't.csv'}", target="y")
        assert isinstance(data.train.x, np.ndarray) and np.isfinite(data.train.x).all()

    def test_single_quotes_in_cells_do_not_join_lines(self, tmp_path: Path) -> None:
        lines = [f'{k}.5,{k % 3} 5",{"ab"[k % 2]}' for k in range(60)]
        (tmp_path / "t.csv").write_text("a,t,y\n" + "\n".join(lines) + "\n")
        data = load(source=f"csv:{tmp_path}/t.csv", target="y")
        assert data.schema.input_shape == (4,) and len(data.train) == 24

    @pytest.mark.parametrize(
        ("target", "task", "says"),
        [
            (["1e30", "0"], "classification", "holds 1e+30, no class"),
            (["1e300", "0"], "regression", "holds 1e+300; numbers must be at most 1e+18"),
            (["0.1"], "regression", "is 0.1 in every training row"),
            (["1e-200", "2e-200"], "regression", "too little to be squared"),
        ],
    )
    def test_targets_beyond_the_numbers(self, target: list[str], task: str, says: str, tmp_path: Path) -> None:
        lines = [f"{k},{target[k % len(target)]}" for k in range(30)]
        (tmp_path / "t.csv").write_text("a,y\n" + "\n".join(lines) + "\n")
        with pytest.raises(InputError, match="data.source") as refusal:
            load(source=f"csv:{tmp_path}/t.csv", target="y", task=task)
        assert says in str(refusal.value)

    def test_one_row_is_not_advised_to_take_a_fraction_of_one(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="of 1 rows is none; give more data"):
            load(source=table(tmp_path / "t.csv", "a,b,y\n", rows=1), target="y")


class TestArrays:
    def refusal(self, path: Path, **data: object) -> str:
        with pytest.raises(InputError) as refused:
            load(source=f"npz:{path}", **data)
        return str(refused.value)

    def test_one_array_under_the_name_of_an_archive(self, tmp_path: Path) -> None:
        with open(tmp_path / "t.npz", "wb") as file:
            np.save(file, np.zeros((30, 2)))
        assert "it is one array (.npy); write x and y with numpy.savez" in self.refusal(tmp_path / "t.npz")

    def test_rows_without_numbers(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.zeros((30, 0)), y=np.arange(30) % 2)
        assert "has no numbers in a row" in self.refusal(tmp_path / "t.npz")

    def test_whole_numbers_are_limited_as_others_are(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.full((30, 2), 2**64 - 1, dtype=np.uint64), y=np.arange(30) % 2)
        assert "x holds 1.84e+19; numbers must be at most 1e+18" in self.refusal(tmp_path / "t.npz")

    def test_one_number_a_row_needs_no_second_axis(self, tmp_path: Path) -> None:
        """Neither in training nor later."""
        np.savez(tmp_path / "t.npz", x=np.arange(30.0), y=np.arange(30) % 2)
        schema = load(source=f"npz:{tmp_path / 't.npz'}").schema
        encoded = schema.encode(np.arange(4.0))
        assert isinstance(encoded, np.ndarray) and encoded.shape == (4, 1)

    def test_dates_are_not_called_text(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.zeros((30, 2)), y=np.arange(30).astype("M8[D]"))
        assert "the target is datetime64[D]" in self.refusal(tmp_path / "t.npz", task="regression")

    @pytest.mark.parametrize(
        ("rows", "says"), [("1\n1e30\n", "holds 1e+30"), ("inf\n3\ninf", "holds inf"), ("nan", "'nan'")]
    )
    def test_row_numbers_that_are_none(self, rows: str, says: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.zeros((30, 2)), y=np.arange(30) % 2)
        (tmp_path / "rows.txt").write_text(rows)
        assert says in self.refusal(tmp_path / "t.npz", validation=str(tmp_path / "rows.txt"))


class TestSettings:
    @pytest.mark.parametrize(("walks", "starts", "kind"), [(1, 1, "residual"), (3, 2, "gaussian")])
    def test_a_deformation_needs_two_walks_a_start(self, walks: int, starts: int, kind: str) -> None:
        settings = {"name": "few", "data": {"source": "sklearn:iris"}, "walk": {"walks": walks}}
        settings |= {"map": {"starts": starts}}
        with pytest.raises(InputError, match=f"walk.walks must be at least {2 * starts}, .*got {walks}"):
            parse_config({**settings, "deformation": {"kind": kind}})
        assert parse_config({**settings, "deformation": {"kind": "none"}}).walk.walks == walks

    def test_a_precision_beyond_single_precision(self) -> None:
        settings = {"name": "sure", "data": {"source": "sklearn:iris"}}
        with pytest.raises(InputError, match=r"prior.precision must be .*at most 1e\+18.*got 1e\+200"):
            parse_config({**settings, "prior": {"precision": 1e200}})

    def test_parameters_without_numbers_cannot_be_walked(self) -> None:
        network = nn.Linear(2, 2)
        network.empty = nn.Parameter(torch.zeros(0))
        assert Network(network).dim == 6
        with pytest.raises(InputError, match="model.parameters 'empty' chooses only parameters without any number"):
            Network(network, "empty")


OWN = """
import torch
from torch import nn


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.none = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return torch.stack([self.w * x[:, 0], -self.w * x[:, 0]], dim=1) + self.none.sum()
"""


def test_a_network_of_one_number_runs_and_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One parameter leaves nothing beside the drift; one of size 0 has no column. Also: where predictions may go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_scalar.py").write_text(OWN)
    rng = np.random.default_rng(0)
    np.savez("two classes.npz", x=rng.normal(size=(60, 3)), y=np.arange(60) % 2)
    settings = SETTINGS | {"data": {"source": "npz:two classes.npz"}, "storage": "a place"}
    settings |= {
        "model": {"architecture": "python:own_scalar:Scalar"},
        "walk": {"walks": 4, "length": 1.0, "steps": 20},
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["run", "run.yaml", "--serial", "--quiet"]) == 0
    run = capsys.readouterr().out.splitlines()[0]
    for out in ("points.parquet", "points.nc", "points.npz"):
        kind = {"nc": "arviz"}.get(out.rpartition(".")[2], out.rpartition(".")[2])
        assert main(["export", run, "--format", kind, "--out", out]) == 0, capsys.readouterr().err
    block = next(Path(run, "walks").rglob("*.parquet"))
    before = block.read_bytes()
    Path("link").symlink_to(Path(run, "walks"))
    for out in (block, Path("link", block.relative_to(Path(run, "walks")))):
        arguments = ["predict", run, "--data", settings["data"]["source"], "--out", str(out), "--trust-code"]
        assert main(arguments) == 2 and "lies inside the run" in capsys.readouterr().err
    assert block.read_bytes() == before


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "report.html", "plan.json", "walks/a.parquet"])
def test_repair_removes_nothing_of_a_folder_that_is_no_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walks").mkdir()
    (tmp_path / name).write_text("{}")
    assert main(["verify", str(tmp_path), "--repair"]) == 2
    assert "No run at" in capsys.readouterr().err and (tmp_path / name).read_text() == "{}"
    assert main(["status", str(tmp_path)]) == (1 if name == "run.json" else 2)
    assert "Failed on the way" not in capsys.readouterr().err


def test_without_a_command_the_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert "predict" in said.out + said.err and (said.out + said.err).count("\n") > 10


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://[::1"])
def test_addresses_that_are_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "job", "--address", address]) == 2
    assert f"--address must be http://HOST:8265 (the head's job server), got {address}" in capsys.readouterr().err


def test_a_file_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for command in (["status"], ["verify"], ["export", "--format", "npz", "--out", str(tmp_path / "o.npz")]):
        assert main([command[0], str(tmp_path / "file"), *command[1:]]) == 2, capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_kind_of_place_that_nobody_knows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "nowhere://a/b"]) == 2
    assert "nowhere://a/b cannot be opened: Protocol not known" in capsys.readouterr().err


def test_an_endpoint_without_its_protocol(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:8333")
    assert main(["status", "s3://bucket/run"]) == 2
    assert "AWS_ENDPOINT_URL must begin with http://" in capsys.readouterr().err

"""Wrong input through the command line: one line on stderr, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.run import claim, prepare

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good table, a good configuration and some code."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [f"{a:.3f},{b:.3f},{k % 2}" for k, (a, b) in enumerate(rng.normal(size=(40, 2)))]
    (tmp_path / "good.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")
    config = {"name": "bad", "data": {"source": "csv:good.csv", "target": "y"}, "walk": {"walks": 4}}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "own_bad_input.py").write_text(
        "import torch\n"
        "def nothing():\n    return None\n"
        "def wide():\n    return torch.nn.Linear(2, 9)\n"
        "def tokens():\n    return {'ids': torch.arange(80).numpy().reshape(40, 2)}, torch.arange(40).numpy() % 2\n"
        "class table(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.e = torch.nn.Embedding(79, 2)\n    def forward(self, ids):\n        return self.e(ids).sum(1)\n"
        "def breaks():\n    raise RuntimeError('first line\\nsecond line')\n"
        "def empty():\n    return {}, torch.arange(40).numpy() % 2\n"
        "def numbers():\n    return torch.zeros(40, 2).numpy(), torch.zeros(40).numpy()\n"
    )
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of `fiberwalk run` with these arguments, after all that must hold of every refusal was checked."""
    before = files(folder)
    status = main(["run", *arguments])
    stdout, stderr = capsys.readouterr()
    assert status == 2, stderr
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr and stdout == ""
    assert files(folder) == before
    return stderr


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["walk.stps=100"], ["walk.stps", "did you mean 'walk.steps'"]),
        (["walk.walks=-3"], ["walk.walks", "at least 1", "-3"]),
        (["walk.steps=many"], ["walk.steps", "whole number", "'many'"]),
        (["data.target=z"], ["data.target", "no column 'z'", "a, b, y"]),
        (["data.target=null"], ["data.target is missing"]),
        (["data.source=csv:absent.csv"], ["absent.csv", "no such file"]),
        (["data.test=[30, 90]"], ["data.test", "90 rows", "has 40"]),
        (["data.train_rows=39"], ["data.train_rows", "at most 28"]),
        (["data.task=regression", "likelihood.kind=categorical"], ["likelihood.kind", "gaussian or heteroscedastic"]),
        (["model.architecture=python:nowhere:net"], ["python:nowhere:net", "does not import"]),
        (["model.architecture=python:own_bad_input:absent"], ["has no absent"]),
        (["model.architecture=python:own_bad_input:nothing"], ["must return a torch.nn.Module", "NoneType"]),
        (["model.architecture=python:own_bad_input:wide"], ["must return 2 outputs", "(2, 9)"]),
        (["model.architecture=python:own_bad_input:breaks"], ["RuntimeError: first line second line"]),
        (["model.architecture=lenet"], ["images", "use mlp"]),
        (["model.weights=absent.safetensors"], ["model.weights", "no such file"]),
        (["model.weights=weights.pt"], ["pickle", "safetensors"]),
        (["model.parameters=nothing_like_it"], ["model.parameters", "nothing_like_it"]),
        (["prior.precision={nothing_like_it: 1}"], ["prior.precision"]),
        (["data.source=python:own_bad_input:numbers", "data.target=null"], ["one class only"]),
        (
            [
                "data.source=python:own_bad_input:tokens",
                "data.target=null",
                "model.architecture=python:own_bad_input:table",
            ],
            ["model.architecture", "does not take", "index out of range"],
        ),
        (["data.source=good.csv"], ["did you mean csv:good.csv?"]),
        (["model.architecture=own_bad_input:wide"], ["did you mean python:own_bad_input:wide?"]),
        (["model.weights=."], ["model.weights", "is a folder"]),
        (["data.source=python:own_bad_input:empty", "data.target=null"], ["holds no inputs", "an empty mapping"]),
        (["model.hidden=[3000000,3000000]"], ["model: this machine's memory does not hold the network"]),
        (["data.source=csv:http://127.0.0.1:9/x.csv"], ["127.0.0.1:9/x.csv", "or its server does not answer"]),
        (["prior.precision={.*: auto}"], ["of '.*' must be a number above 0"]),
        (
            ["deformation.kind=metric", "deformation.gaussian_share=0.5", "walk.walks=1"],
            ["walk.walks must be at least 2", "metric and a deformation.gaussian_share"],
        ),
        (["cluster.address=127.0.0.1:9"], ["cluster.address: no Ray cluster answers at 127.0.0.1:9"]),
        (["cluster.address=http://127.0.0.1:9"], ["is a job server", "fiberwalk submit"]),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else "",
)
def test_wrong_settings(sets: list[str], words: list[str], here: Path, capsys: Any) -> None:
    message = refused(here, capsys, "good.yaml", *(part for item in sets for part in ("--set", item)))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows[:5], "0.1,,1", *rows[6:]], ["1 missing values", "row 4", "column 'b'"]),
        (lambda rows: [*rows[:5], "0.1,?,1", *rows[6:]], ["1 missing values", "row 4", "column 'b'"]),
        (lambda rows: [*rows[:5], "0.1,oops,1", *rows[6:]], ["column 'b'", "'oops'", "row 4"]),
        (lambda rows: [*rows[:5], "0.1,1", *rows[6:]], ["no table", "Expected 3 columns, got 2"]),
        (lambda rows: [rows[0], *(row[:-1] + "1" for row in rows[1:])], ["one class only", "'1'"]),
        (lambda rows: [rows[0], *(row + ".5" for row in rows[1:])], ["no class", "data.task: regression"]),
        (lambda rows: rows[:3], ["data.test", "2 rows"]),
        (lambda rows: rows[:1], ["no rows"]),
        (lambda rows: [], ["no rows"]),
    ],
)
def test_wrong_data(change: Any, words: list[str], here: Path, capsys: Any) -> None:
    rows = (here / "good.csv").read_text().splitlines()
    (here / "wrong.csv").write_text("\n".join(change(rows)) + "\n")
    message = refused(here, capsys, "good.yaml", "--set", "data.source=csv:wrong.csv")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: [", "not YAML"),
        ("- 1", "must be a mapping"),
        ("name: a", "data is missing"),
        ("a: 1\na: 2", "given twice"),
    ],
)
def test_wrong_files(text: str, word: str, here: Path, capsys: Any) -> None:
    (here / "wrong.yaml").write_text(text)
    assert word in refused(here, capsys, "wrong.yaml")


def test_no_such_file(here: Path, capsys: Any) -> None:
    assert "no such file" in refused(here, capsys, "absent.yaml")


@pytest.mark.parametrize("arguments", [[], ["good.yaml", "--no-such-option"], ["good.yaml", "--set", "walk.steps"]])
def test_wrong_arguments(arguments: list[str], here: Path, capsys: Any) -> None:
    refused(here, capsys, *arguments)


def test_a_place_that_cannot_be_written(here: Path, capsys: Any) -> None:
    (here / "occupied").write_text("a file where a folder is needed")
    assert "occupied" in refused(here, capsys, "good.yaml", "--storage", str(here / "occupied"))


@pytest.mark.parametrize("place", ["s3://AKIAHERE:hunter2@bucket/runs", "file://AKIAHERE:hunter2@host/runs"])
def test_a_place_with_credentials_in_it_is_refused_without_repeating_them(place: str, here: Path, capsys: Any) -> None:
    message = refused(here, capsys, "good.yaml", "--storage", place)
    assert "credentials" in message and "hunter2" not in message and "AKIAHERE" not in message


def test_a_run_of_other_data_is_left_alone(here: Path, capsys: Any) -> None:
    claim(prepare(load_config("good.yaml")))
    text = (here / "good.csv").read_text()
    (here / "good.csv").write_text(text.replace("a,b,y\n", "a,b,y\n0.5,0.5,1\n"))
    assert "data" in refused(here, capsys, "good.yaml")


def test_a_run_of_another_configuration_is_left_alone(here: Path, capsys: Any) -> None:
    run = prepare(load_config("good.yaml"))
    claim(run)
    stored = Path(run.uri.removeprefix("file://")) / "config.yaml"
    stored.write_text(stored.read_text().replace("walks: 4", "walks: 5"))
    message = refused(here, capsys, "good.yaml")
    assert "walk.walks: 5 -> 4" in message


def test_the_installed_command_does_the_same(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli", "run", "good.yaml", "--set", "walk.walks=0"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "walk.walks" in done.stderr
    assert done.stdout == "" and not (here / "runs").exists()

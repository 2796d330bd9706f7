"""The configuration: what it accepts, what it refuses and how, and what enters the run id."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, config_difference, likelihood_kind, load_config, parse_config
from pipeline.errors import InputError

MINIMAL: dict[str, Any] = {"name": "t", "data": {"source": "sklearn:iris"}}
EXAMPLES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def refused(*overrides: str, base: dict | None = None, tmp_path: Path) -> str:
    """The one-line message with which a configuration is refused."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(base or MINIMAL))
    with pytest.raises(InputError) as error:
        load_config(str(path), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("walk.stps=3", ["walk.stps", "did you mean 'walk.steps'"]),
        ("wlak.steps=3", ["wlak", "did you mean 'walk'"]),
        ("precision=1", ["did you mean 'prior.precision'"]),
        ("walk.steps=many", ["walk.steps", "whole number of at least 1", "'many'"]),
        ("walk.steps=1.5", ["walk.steps", "1.5"]),
        ("walk.walks=0", ["walk.walks", "at least 1", "got 0"]),
        ("walk.walks=true", ["walk.walks", "got True"]),
        ("walk.record_every=7", ["walk.record_every", "divide walk.steps = 200", "got 7", "8 is the nearest"]),
        ("walk.record_every=400", ["walk.record_every", "200 is the nearest"]),
        ("walk.length=.inf", ["walk.length", "above 0"]),
        ("map.tolerance=.nan", ["map.tolerance", "above 0"]),
        ("map.learning_rate=0", ["map.learning_rate", "above 0", "got 0"]),
        ("seed=-1", ["seed", "at least 0", "got -1"]),
        ("seed=null", ["seed", "must not be null"]),
        ("prior.precision=0", ["prior.precision", "above 0", "got 0"]),
        ("prior.precision={'(': 1}", ["prior.precision", "no regular expression"]),
        ("prior.precision={a: -1}", ["prior.precision", "of 'a'", "above 0"]),
        ("model.parameters='['", ["model.parameters", "no regular expression"]),
        ("model.hidden=[8, x]", ["model.hidden.1", "'x'"]),
        ("model.hidden=8", ["model.hidden", "list"]),
        ("model.architecture=mpl", ["model.architecture", "did you mean mlp"]),
        ("model.architecture=python:a", ["python:MODULE:FUNCTION"]),
        ("model.activation=tan", ["model.activation", "did you mean tanh"]),
        ("likelihood.kind=gaussian", ["likelihood.kind", "data.task: classification", "gaussian"]),
        ("likelihood.noise_std=1", ["likelihood.noise_std", "categorical"]),
        ("data.source=iris", ["data.source", "sklearn:NAME", "'iris'"]),
        ("data.source=csv:a.csv", ["data.target is missing"]),
        ("data.target=y", ["data.target", "sklearn"]),
        ("data.validation=1.5", ["data.validation", "below 1", "1.5"]),
        ("data.validation=[5, 2]", ["data.validation", "first < last"]),
        ("data.validation=0.9", ["data.validation and data.test", ">= 1"]),
        ("data.test=0", ["data.test must not be empty"]),
        ("data.task=classify", ["data.task", "did you mean classification"]),
        ("data.standardize=7", ["data.standardize", "true or false"]),
        ("walk=3", ["walk must be a section"]),
        ("walk.compile=maybe", ["walk.compile", "true, false or 'auto'"]),
        ("walk.correction=deflatd", ["walk.correction", "did you mean deflated"]),
        ("evaluation.baselines=[mpa]", ["evaluation.baselines", "did you mean map"]),
        ("evaluation.baselines=[ensemble]", ["ensemble", "map.starts of at least 2"]),
        ("map.starts=600", ["walk.walks must be at least map.starts = 600"]),
        ("name=../x", ["name", "'../x'"]),
        ("name=-x", ["name", "begin with"]),
        ("cluster.max_restarts=-1", ["cluster.max_restarts", "at least 0"]),
        ("walk.steps", ["--set walk.steps", "section.field=value"]),
        ("walk.steps=[1", ["--set walk.steps", "not YAML"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_limit(override: str, words: list[str], tmp_path: Path) -> None:
    message = refused(override, tmp_path=tmp_path)
    for word in words:
        assert word in message


def test_deflation_needs_a_rank(tmp_path: Path) -> None:
    message = refused("walk.correction=deflated-momentum", "walk.rank=0", tmp_path=tmp_path)
    assert "walk.rank must be at least 1" in message and "got 0" in message


def test_overlapping_row_ranges_are_refused(tmp_path: Path) -> None:
    assert "overlap" in refused("data.validation=[0, 50]", "data.test=[49, 60]", tmp_path=tmp_path)


def test_given_weights_and_several_starts_exclude_each_other(tmp_path: Path) -> None:
    assert "map.starts must be 1" in refused("model.weights=a.safetensors", "map.starts=2", tmp_path=tmp_path)


@pytest.mark.parametrize(
    "override",
    ["storage=s3://me:hunter2@b/c", "data.source=npz:https://me:hunter2@h/c", "model.weights=s3://me:hunter2@b"],
)
def test_credentials_in_a_place_are_refused_and_not_repeated(override: str, tmp_path: Path) -> None:
    message = refused(override, tmp_path=tmp_path)
    assert "credentials" in message and "hunter2" not in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [1", "not YAML"),
        ("a: b: c", "not YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "holds nothing"),
        ("just text", "must be a mapping"),
        ("name: a\nname: b\ndata: {source: 'sklearn:iris'}", "'name' is given twice"),
        ("name: a\ndata: {source: 'sklearn:iris', source: 'sklearn:wine'}", "'source' is given twice"),
        ("name: !!python/object/apply:os.system ['true']", "not YAML"),
        ("? [1, 2]\n: 3", "key must be text"),
        ("name: a", "data is missing"),
        ("data: {source: 'sklearn:iris'}", "name is missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        load_config(str(path))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for path, word in [("absent.yaml", "no such file"), ("", "folder"), ("binary.yaml", "cannot be read")]:
        with pytest.raises(InputError, match=word):
            load_config(str(tmp_path / path))


def test_numbers_without_a_point_are_numbers() -> None:
    """`1e-3` is text in YAML 1.1."""
    config = parse_config({**MINIMAL, "map": {"tolerance": "1e-3", "steps": "2e3"}})
    assert config.map.tolerance == 1e-3
    assert config.map.steps == 2000


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(
        str(path),
        [
            "map.tolerance=1e-4",
            "model.hidden=[3, 4]",
            "prior.precision={w: 2}",
            "walk.guard=no",
            "data.ood=[sklearn:wine]",
        ],
    )
    assert config.map.tolerance == 1e-4
    assert config.model.hidden == (3, 4)
    assert config.prior.precision == {"w": 2.0}
    assert config.walk.guard is False
    assert config.data.ood == ("sklearn:wine",)


def test_run_id_ignores_where_it_runs_and_nothing_else() -> None:
    base = parse_config(MINIMAL)
    elsewhere = parse_config({**MINIMAL, "storage": "s3://b/p", "cluster": {"actors": 7, "max_restarts": 0}})
    assert elsewhere.run_id == base.run_id
    assert base.run_id.startswith("t-") and len(base.run_id) == 10
    for section, setting in [
        ("walk", {"walks_per_shard": 8}),
        ("map", {"polish": True}),
        ("deformation", {"workers": 1}),
    ]:
        assert parse_config({**MINIMAL, section: setting}).run_id != base.run_id
    assert parse_config({**MINIMAL, "seed": 1}).run_id != base.run_id


def test_run_id_does_not_depend_on_how_a_number_is_written() -> None:
    ids = {parse_config({**MINIMAL, "prior": {"precision": value}}).run_id for value in (1, 1.0, "1e0")}
    assert len(ids) == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path))
    assert config.name == path.stem
    assert path.read_text().startswith("#")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(str(copy)) == config
    assert load_config(str(copy)).run_id == config.run_id


def test_a_configuration_does_not_change() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_says_what_it_means() -> None:
    for section in Config.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {})
        assert all(field.description for field in fields.values())


def test_difference_is_told_field_by_field() -> None:
    changed = parse_config({**MINIMAL, "walk": {"steps": 100}, "prior": {"precision": {"w": 2}}})
    difference = config_difference(parse_config(MINIMAL), changed)
    assert "walk.steps: 200 -> 100" in difference
    assert any(line.startswith("prior.precision") for line in difference)
    assert config_difference(changed, changed) == []


def test_likelihood_follows_the_task() -> None:
    assert likelihood_kind(parse_config(MINIMAL)) == "categorical"
    regression = {"name": "t", "data": {"source": "sklearn:diabetes", "task": "regression"}}
    assert likelihood_kind(parse_config(regression)) == "gaussian"


def test_own_code_is_named() -> None:
    own = {"name": "t", "data": {"source": "python:mine:load"}, "model": {"architecture": "python:mine:net"}}
    assert parse_config(own).own_code == ("data.source: python:mine:load", "model.architecture: python:mine:net")
    shipped = {"name": "t", "data": {"source": "python:pipeline.data.synthetic:two_moons"}}
    assert parse_config(shipped).own_code == ()


WEIRD = [
    *(None, [], {}, "", " ", "x" * 500, "\x00", "é", "1e999", "-", "0x10", "1_000"),
    *(math.nan, math.inf, -1, 0, 10**400, 1e300, True, 0.5),
    *([[1]], {"a": {"b": 1}}, {1: 2}, [None], ["map", "map"], datetime.date(2020, 1, 1), b"bytes"),
]
FIELDS = [
    (name, inner)
    for name, field in Config.model_fields.items()
    for inner in getattr(field.annotation, "model_fields", {None: None})
]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_any_value_is_taken_or_refused_in_one_line(section: str, field: str | None) -> None:
    for value in WEIRD:
        mapping: dict[str, Any] = {**MINIMAL, "data": dict(MINIMAL["data"])}
        if field is None:
            mapping[section] = value
        else:
            mapping[section] = {**mapping.get(section, {}), field: value}
        try:
            config = parse_config(mapping)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            assert section in str(error)
        else:
            assert parse_config(config.model_dump(mode="json")).run_id == config.run_id

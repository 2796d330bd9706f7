"""What the documents say is what the program does: settings, examples in docstrings, and commands in the README."""

import doctest
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import pipeline.posterior
import pipeline.store
from pipeline.cli import app, main
from pipeline.config import Config, parse_config
from pipeline.config_reference import markdown, plain
from tests.runs import CONFIGS, finished

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def fields() -> set[str]:
    """Every setting, by going through a complete configuration."""
    config = Config.model_validate(CONFIGS["curve"]).model_dump()
    return {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in config.items()
        for key in (value if isinstance(value, dict) else [""])
    }


def test_the_reference_of_the_settings_is_that_of_the_code() -> None:
    page = (ROOT / "configs" / "README.md").read_text()
    assert page == markdown(), "stale: run 'fiberwalk settings > configs/README.md'"


def test_the_reference_names_every_setting_and_says_what_it_takes_and_does() -> None:
    assert {field["name"] for field in plain()} == fields()
    for field in plain():
        assert len(field["meaning"]) > 5 and len(field["takes"]) > 5, field


def test_the_reference_of_the_settings_is_there_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    found = {field["name"]: field for field in json.loads(capsys.readouterr().out)}
    assert found["walk.walks"]["default"] == 512 and found["data.source"]["required"]


@pytest.mark.parametrize("module", [pipeline.posterior, pipeline.store])
def test_examples_in_docstrings_work(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("plane")
    names = {"run_uri": run.uri}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


def test_the_python_of_the_readme_works() -> None:
    run = finished("curve")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scaled: Any = run.dataset.test.x
    names: dict[str, Any] = {"x": run.dataset.schema.x_mean + 0.0 * scaled}
    exec(code.replace("runs/mine-1a2b3c4d", run.uri), names)
    assert names["theta"].shape[0] == 1000 and names["mean"].shape == (len(run.dataset.test),)


def test_the_configurations_of_the_readme_are_valid() -> None:
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    assert len(blocks) >= 2
    for block in blocks:
        parse_config({"name": "mine", "data": {"source": "csv:my.csv", "target": "label"}, **block})


def shown_commands() -> list[str]:
    """Every line of the documents that calls the program."""
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", ROOT / "infra" / "README.md"))
    return [
        line
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("fiberwalk ")
    ]


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_in_the_documents_exists_with_its_options(line: str) -> None:
    line = re.split(r"\s{2,}(?=[^-])", re.sub(r"\[(--\S+)\]", r"\1", line.partition("#")[0]).strip())[0]
    _, name, *arguments = shlex.split(line)
    context = COMMANDS[name].make_context(name, arguments)
    assert context is not None


def test_every_command_and_option_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert command.help and command.help.split(".")[0][:30] in " ".join(text.split())
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_FIBERWALK_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as ended:
        app(args=[], prog_name="fiberwalk")
    assert not ended.value.code and "fiberwalk" in capfd.readouterr().out


def test_the_readme_names_every_command() -> None:
    for name in COMMANDS:
        assert f"fiberwalk {name}" in README, name

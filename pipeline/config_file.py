"""Reading configuration files: safe YAML, `--set` overrides, and errors that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config_values import nearest
from pipeline.errors import InputError

_SHOWN = 3


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys, where ``1e-3`` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that is given twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be text")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse safe YAML. Raises InputError naming `where` and the line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not YAML: {_yaml_reason(error)}") from error


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())


def read_mapping(path: str) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"configuration {path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"configuration {path} is a folder; name a YAML file in it") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"configuration {path} cannot be read as text: {error}") from error
    mapping = parse_yaml(text, f"configuration {path}")
    if not isinstance(mapping, dict):
        kind = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise InputError(f"configuration {path} must be a mapping of settings (name: ..., data: ...), it holds {kind}")
    return mapping


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with every ``a.b=value`` set; the value is YAML. Raises InputError."""
    result = _copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {override}: write it as section.field=value, such as walk.steps=100")
        place = result
        for key in keys[:-1]:
            inner = place.get(key)
            if inner is None:
                inner = place[key] = {}
            if not isinstance(inner, dict):
                raise InputError(f"--set {override}: {key} is no section with fields")
            place = inner
        place[keys[-1]] = parse_yaml(text, f"--set {path}: the value") if text.strip() else None
    return result


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All that is wrong with a configuration in one line: field path, value, limit, and the nearest known name."""
    messages = list(dict.fromkeys(_explain_one(detail, model) for detail in error.errors()))
    more = f" (and {len(messages) - _SHOWN} more)" if len(messages) > _SHOWN else ""
    return "; ".join(messages[:_SHOWN]) + more


def _explain_one(detail: ErrorDetails, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown(path, detail["loc"], model)
    if kind == "missing":
        return f"{path} is missing; it has no default"
    if kind == "value_error":
        reason = str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
        whole_section = not path or (path in model.model_fields and _fields(model, path))
        return reason if whole_section else _wrong(path, reason, value)
    if value is None:
        return f"{path} must not be null; leave it out for the default"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path} must be a section with fields, got {_show(value)}"
    wanted = {"string_type": "text (put it in quotes)", "bool_type": "true or false", "bool_parsing": "true or false"}
    return (
        f"{path} must be {wanted[kind]}, got {_show(value)}" if kind in wanted else _wrong(path, detail["msg"], value)
    )


def _wrong(path: str, reason: str, value: Any) -> str:
    # A place that was refused for its credentials must not be repeated.
    return f"{path} {reason}" if "credentials" in reason else f"{path} {reason}, got {_show(value)}"


def _show(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(path: str, location: Sequence[int | str], model: type[BaseModel]) -> str:
    section: Any = model
    for part in location[:-1]:
        section = _section(section, str(part))
    known = list(section.model_fields)
    prefix = ".".join(map(str, location[:-1])) + ("." if len(location) > 1 else "")
    elsewhere = [f"{name}.{location[-1]}" for name in model.model_fields if location[-1] in _fields(model, name)]
    near = nearest(str(location[-1]), known)
    meant = elsewhere[0] if elsewhere else f"{prefix}{near}" if near else None
    if meant:
        return f"unknown setting '{path}'; did you mean '{meant}'?"
    return f"unknown setting '{path}'; known here: {', '.join(known)}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    options = [annotation, *get_args(annotation)]
    return next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))


def _fields(model: type[BaseModel], name: str) -> list[str]:
    annotation = model.model_fields[name].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.field`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return flat

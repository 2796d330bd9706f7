"""The reference of all settings, made from the code: what `fiberwalk settings` prints and configs/README.md holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config

_HEAD = """\
# Settings

Written by `fiberwalk settings` from the code; a test compares it. The files beside this one are complete runs. A
setting that is left out takes its default; `--set walk.steps=100` overrides one on the command line. Everything but
`storage` and `cluster` fixes the numbers and enters the run id.
"""


@dataclass(frozen=True)
class Setting:
    """One field of the configuration."""

    name: str
    """As in ``--set``, such as ``walk.steps``."""
    default: Any
    """Plain JSON; None also where there is no default."""
    required: bool
    """Whether it has no default."""
    takes: str
    """Which values are accepted."""
    meaning: str
    """What it does."""


def settings() -> Iterator[tuple[str, str, list[Setting]]]:
    """Yield sections: name ('' for the top level), what it is about, and its fields."""
    top = [_setting("", name, field) for name, field in Config.model_fields.items() if _section(field) is None]
    yield "", "", top
    for name, field in Config.model_fields.items():
        section = _section(field)
        if section is not None:
            fields = [_setting(f"{name}.", key, inner) for key, inner in section.model_fields.items()]
            yield name, (section.__doc__ or "").strip(), fields


def markdown() -> str:
    """The reference as a page: a table a section."""
    lines = [_HEAD]
    for name, about, fields in settings():
        lines += [
            f"## {name}\n\n{about}\n" if name else "",
            "| setting | default | takes | meaning |",
            "|---|---|---|---|",
        ]
        for field in fields:
            default = "(none)" if field.required else f"`{_yaml(field.default)}`"
            lines.append(f"| `{field.name}` | {default} | {_cell(field.takes)} | {_cell(field.meaning)} |")
        lines.append("")
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def plain() -> list[dict[str, Any]]:
    """The reference for programs: a list of fields, each a mapping of plain JSON."""
    return [dataclasses.asdict(field) for _, _, fields in settings() for field in fields]


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _setting(prefix: str, name: str, field: FieldInfo) -> Setting:
    required = field.default is PydanticUndefined
    default = None if required else list(field.default) if isinstance(field.default, tuple) else field.default
    return Setting(prefix + name, default, required, _takes(field), " ".join((field.description or "").split()))


def _takes(field: FieldInfo) -> str:
    checks = [check.func.__doc__ for check in field.metadata if hasattr(check, "func") and check.func.__doc__]
    text = checks[0] if checks else "true or false"
    text = text.split("\n\n")[0].strip().rstrip(".")
    text = text[0].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
    return text.replace("``", "`")


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else f"{value}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

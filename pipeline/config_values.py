"""Checked values for configuration fields, each with a message that names the limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BeforeValidator

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_CREDENTIALS = re.compile(r"^[A-Za-z][A-Za-z0-9+.:-]*//[^/]*@")
_LARGEST_PRECISION = 1e18
"""The curvature is as large, and its square overflows in single precision beyond."""

ARCHITECTURES = ("mlp", "conv", "lenet", "resnet")
SOURCES = ("sklearn", "csv", "parquet", "npz", "idx", "python")
BASELINES = (
    "map",
    "temperature",
    "random",
    "gaussian",
    "ensemble",
    "ensemble_temperature",
    "laplace",
    "laplace_linearised",
    "laplace_torch",
    "swag",
)


def as_number(value: Any) -> float | int | None:
    """Return a finite number, also from text such as ``1e-3`` (text in YAML 1.1); otherwise None."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e308:
        return None
    return value


def _limits(kind: str, low: float | None, above: float | None, high: float | None) -> str:
    parts = []
    if low is not None:
        parts.append(f"of at least {low}")
    if above is not None:
        parts.append(f"above {above}")
    if high is not None:
        parts.append(f"at most {high}")
    return f"{kind} {' and '.join(parts)}".strip()


def _described(check: Callable[[Any], Any], wanted: str) -> BeforeValidator:
    """Let the reference of the settings say what a field takes, in the words of its message."""
    check.__doc__ = wanted
    return BeforeValidator(check)


def number(
    *, low: float | None = None, above: float | None = None, high: float | None = None, words: Sequence[str] = ()
) -> BeforeValidator:
    """A finite number within limits, or one of `words`."""

    def check(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value in words):
            return value
        found = as_number(value)
        inside = found is not None and (low is None or found >= low) and (above is None or found > above)
        if found is None or not inside or (high is not None and found > high):
            raise ValueError("must be " + wanted)
        return float(found)

    wanted = " or ".join([*map(repr, words), _limits("a number", low, above, high)])
    return _described(check, wanted)


def integer(*, low: int, high: int | None = None, words: Sequence[str] = ()) -> BeforeValidator:
    """A whole number within limits, or one of `words`. ``20.0`` and ``2e3`` are whole."""

    def check(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value in words):
            return value
        found = as_number(value)
        if found is None or found != int(found) or found < low or (high is not None and found > high):
            raise ValueError("must be " + wanted)
        return int(found)

    wanted = " or ".join([*map(repr, words), _limits("a whole number", low, None, high)])
    return _described(check, wanted)


def choice(*names: str) -> BeforeValidator:
    """One of `names`; the message suggests the nearest."""

    def check(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value in names):
            return value
        near = nearest(str(value), names)
        raise ValueError(f"must be one of {', '.join(names)}" + (f" (did you mean {near}?)" if near else ""))

    return _described(check, f"one of {', '.join(names)}")


def sequence(of: Callable[[Any], Any]) -> BeforeValidator:
    """A list, each entry checked by `of`."""

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list, such as [a, b]")
        return tuple(of(item) for item in value)

    return _described(check, "a list, such as [a, b]")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    lowered = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def regular_expression(value: Any) -> Any:
    """A pattern that compiles."""
    if not isinstance(value, str):
        raise ValueError("must be a regular expression, as text")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error})") from error
    return value


def place(value: Any) -> Any:
    """A path or URI without credentials in it."""
    if value is None:
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a path or URI, as text")
    if _CREDENTIALS.match(value):
        raise ValueError("must not hold credentials; give them in the environment (AWS_ACCESS_KEY_ID and so on)")
    return value


def safe_name(value: Any) -> Any:
    """A name that is safe as a folder on any file system and object store."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", value):
        raise ValueError("must be 1 to 100 of the characters A-Z a-z 0-9 . _ - and begin with none of . and -")
    return value


def split(value: Any) -> Any:
    """A fraction of the rows, ``[first, last)``, or the place of a file of row numbers."""
    if value is None:
        return None
    found = as_number(value)
    if found is not None:
        if not 0 <= found < 1:
            raise ValueError(
                "must be a fraction of at least 0 and below 1, rows [first, last), or a file of row numbers"
            )
        return float(found)
    if isinstance(value, (list, tuple)):
        rows = [as_number(item) for item in value]
        if len(rows) == 2 and all(row is not None and row == int(row) for row in rows):
            first, last = (int(row) for row in rows if row is not None)
            if 0 <= first < last:
                return (first, last)
        raise ValueError("must be [first, last) with whole numbers 0 <= first < last")
    return place(value)


def precision(value: Any) -> Any:
    """``auto``, one number above 0 and at most 1e18, or regular expression -> such a number."""
    if value == "auto":
        return value
    if isinstance(value, dict):
        if not value:
            raise ValueError("must name at least one regular expression, such as {'.*': 1.0}")
        return {regular_expression(key): _positive(item, f"of '{key}' ") for key, item in value.items()}
    return _positive(value, "")


def _positive(value: Any, where: str) -> float:
    found = as_number(value)
    if found is None or not 0 < found <= _LARGEST_PRECISION:
        limits = f"above 0 and at most {_LARGEST_PRECISION:g}"
        others = "" if where else f"'auto', regular expression -> number {limits}, or "
        raise ValueError(f"{where}must be {others}a number {limits}")
    return float(found)


def source(value: Any) -> Any:
    """kind:place, of a known kind and without credentials."""
    kind, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in SOURCES or not colon or not rest:
        ending = value.rpartition(".")[2].lower() if isinstance(value, str) else ""
        hint = f" (did you mean {ending}:{value}?)" if ending in ("csv", "parquet", "npz") and not colon else ""
        raise ValueError(
            f"must be sklearn:NAME, csv:URI, parquet:URI, npz:URI, idx:URI_PREFIX or python:MODULE:FUNCTION{hint}"
        )
    if kind == "python" and rest.count(":") != 1:
        raise ValueError("must be python:MODULE:FUNCTION")
    place(rest)
    return value


def architecture(value: Any) -> Any:
    """A built-in network, or python:MODULE:FUNCTION."""
    if isinstance(value, str) and value.startswith("python:"):
        if value.count(":") != 2:
            raise ValueError("must be python:MODULE:FUNCTION")
        return value
    near = f"python:{value}" if str(value).count(":") == 1 else nearest(str(value), ARCHITECTURES)
    if value not in ARCHITECTURES:
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(f"must be one of {', '.join(ARCHITECTURES)} or python:MODULE:FUNCTION{hint}")
    return value


def baseline(value: Any) -> Any:
    """A method to compare with."""
    if value not in BASELINES:
        near = nearest(str(value), BASELINES)
        raise ValueError(f"must hold some of {', '.join(BASELINES)}" + (f" (did you mean {near}?)" if near else ""))
    return value


def switch(value: Any) -> Any:
    """true, false or 'auto'."""
    if value not in (True, False, "auto") or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("must be true, false or 'auto'")
    return value


def column(value: Any) -> Any:
    """Name or position of a column."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str)) or value == ""):
        raise ValueError("must be the name of a column, or its position (-1 is the last)")
    return value

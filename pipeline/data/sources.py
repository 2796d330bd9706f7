"""Where data come from: ``sklearn:``, ``csv:``, ``parquet:``, ``npz:``, ``idx:`` and ``python:``."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.columns import plain_values
from pipeline.data.idx import read_idx_pair
from pipeline.data.tables import read_bytes, read_csv, read_parquet
from pipeline.errors import InputError
from pipeline.own_code import cause, load_function, off_stdout

_SKLEARN = ("digits", "breast_cancer", "diabetes", "iris", "wine")


@dataclass(frozen=True, eq=False)
class Raw:
    """A source as it was read."""

    x: Any
    """An Arrow table, or `Inputs`."""
    y: np.ndarray | None
    """Targets as they stand there: numbers, bools or text; None if the source has none."""
    names: tuple[str, ...] = ()
    """Names of the columns of a two-dimensional array, if known."""
    classes: tuple[str, ...] = ()
    """Names of classes 0, 1, ..., if known."""
    tokens: bool = False
    """Whether whole numbers in `x` are token numbers, which are never scaled."""


def read_source(
    source: str, target: int | str | None, setting: str, *, held_out: bool = False, keep: np.ndarray | None = None
) -> Raw:
    """Read a source. Raises InputError.

    Args:
        source: As in `DataConfig.source`.
        target: Column of csv and parquet that holds the target; without it, all columns are inputs.
        setting: Configuration field that named the source, for messages.
        held_out: Of idx files with a training and a test part, read the test part only.
        keep: Sorted numbers of the rows to keep, of a parquet source; None keeps all.
    """
    kind, _, rest = source.partition(":")
    if kind in ("csv", "parquet"):
        table = read_csv(rest, setting, target) if kind == "csv" else read_parquet(rest, setting, keep)
        return _cut_target(table, target, f"{setting}: {rest}")
    if kind == "sklearn":
        return _sklearn(rest, setting)
    if kind == "npz":
        return _npz(rest, setting)
    if kind == "idx":
        images, labels = read_idx_pair(rest, setting, held_out=held_out)
        return Raw(images, labels)
    return _python(source, setting)


def _cut_target(table: pa.Table, target: int | str | None, where: str) -> Raw:
    name = _target_name(table, target, where)
    if name is None:
        return Raw(table, None)
    y = plain_values(table[name], name, where)
    features = table.drop_columns([name])
    if not features.num_columns:
        raise InputError(
            f"{where}: no column is left beside the target '{name}'; is the delimiter one of , ; tab | blank?"
        )
    return Raw(features, y)


def _target_name(table: pa.Table, target: int | str | None, where: str) -> str | None:
    names = table.column_names
    if target is None or str(target) in names:
        return None if target is None else str(target)
    if isinstance(target, int) and -len(names) <= target < len(names):
        return names[target]
    lowered = {name.lower(): name for name in names}
    near = lowered.get(str(target).lower())
    hint = (
        f"; did you mean '{near}'?"
        if near
        else f"; there are {', '.join(names[:12])}" + (", ..." if len(names) > 12 else "")
    )
    first = (
        "; its first line was taken for data, not for names" if b"headerless" in (table.schema.metadata or {}) else ""
    )
    raise InputError(f"data.target: {where} has no column '{target}'{hint}{first}")


def _sklearn(name: str, setting: str) -> Raw:
    if name not in _SKLEARN:
        raise InputError(
            f"{setting}: sklearn:{name} is not known; there are {', '.join(_SKLEARN)}. Others: save to a file, use csv:"
        )
    from sklearn import datasets  # slow to import, and seldom needed

    bunch: Any = getattr(datasets, f"load_{name}")()
    classes = tuple(str(item) for item in bunch.target_names) if "target_names" in bunch else ()
    if name == "digits":
        return Raw(bunch.images[:, None].astype(np.float32), bunch.target, classes=classes)
    return Raw(np.asarray(bunch.data), np.asarray(bunch.target), tuple(bunch.feature_names), classes)


def _npz(uri: str, setting: str) -> Raw:
    data = read_bytes(uri, setting)
    try:
        if data.startswith(b"\x93NUMPY"):
            raise ValueError("it is one array (.npy); write x and y with numpy.savez")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            wanted = [name for name in archive.files if name in ("x", "y") or name.startswith("x.")]
            arrays = {name: archive[name] for name in wanted}
            found = ", ".join(archive.files)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        pickled = "allow_pickle" in str(error)  # numpy's own words advise what must not be done here
        why = "it is no zip archive, or holds pickled objects; write it with numpy.savez" if pickled else cause(error)
        raise InputError(f"{setting}: {uri} is no npz file of plain arrays: {why}") from error
    named = {name[2:]: array for name, array in arrays.items() if name.startswith("x.")}
    if ("x" in arrays) == bool(named):
        raise InputError(
            f"{setting}: {uri} must hold one array x (rows, ...), or named inputs x.NAME; it holds {found or 'nothing'}"
        )
    return Raw(named or arrays["x"], arrays.get("y"), tokens=bool(named))


def _python(source: str, setting: str) -> Raw:
    function = load_function(source, setting)
    try:
        with off_stdout(show=True):
            result = function()
    except (Exception, SystemExit) as error:
        raise InputError(f"{setting}: {source} failed: {cause(error)}") from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(f"{setting}: {source} must return (x, y), it returned {_kind(result)}")
    try:
        x, y = _arrays(result[0]), None if result[1] is None else np.asarray(result[1])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{setting}: {source} returned what is no array: {cause(error)}") from error
    return Raw(x, y, tokens=True)


def _arrays(x: Any) -> Any:
    """A mapping or tuple of arrays, or one array."""
    if isinstance(x, dict):
        return {str(name): np.asarray(array) for name, array in x.items()}
    return tuple(np.asarray(array) for array in x) if isinstance(x, tuple) else np.asarray(x)


def _kind(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"

"""Columns of a table as numbers: one-hot text, checked for missing values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.data.tables import is_number
from pipeline.errors import InputError, few

pc: Any = pyarrow.compute

MAX_LEVELS = 64
"""Most levels of a text column that is one-hot encoded."""
_NAMED = 8
"""Names that a message lists."""


@dataclass(frozen=True)
class Column:
    """How one column of a table becomes features."""

    name: str
    levels: tuple[str, ...] = ()
    """Sorted levels of a text column, one feature each; empty for a column of numbers."""

    @property
    def width(self) -> int:
        """Features that it gives."""
        return max(len(self.levels), 1)


def learn_columns(table: pa.Table, where: str) -> tuple[Column, ...]:
    """Decide for every column whether it is numbers or text. Raises InputError where it is neither, or has gaps."""
    _refuse_gaps(table, where)
    return tuple(Column(name, _levels(table[name], name, where)) for name in table.column_names)


def encode_columns(table: pa.Table, columns: tuple[Column, ...], where: str) -> np.ndarray:
    """Features of a table, float64 (rows, sum of widths).

    Raises InputError for missing columns, missing values, and levels that are not known.
    """
    lost = [column.name for column in columns if column.name not in table.column_names]
    if lost:
        raise InputError(f"{where}: the column '{lost[0]}' is missing; there are {few(table.column_names, _NAMED)}")
    features = np.empty((len(table), sum(column.width for column in columns)))
    place = 0
    for column in columns:
        part = features[:, place : place + column.width]
        if column.levels:
            part[:] = _one_hot(table[column.name], column, where)
        else:
            part[:, 0] = numbers(table[column.name], column.name, where)
        place += column.width
    return features


def numbers(values: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A column of numbers as float64. Raises InputError for text and missing values."""
    values = _plain(values, name, where)
    if pa.types.is_string(values.type):
        texts = [text.as_py() for text in values]
        strange = (
            row for row, text in enumerate(texts) if text not in (None, "?") and not is_number(text, comma=False)
        )
        if (row := next(strange, None)) is not None:
            way = "; write numbers with a decimal point and nothing between thousands" if is_number(texts[row]) else ""
            raise InputError(f"{where}: column '{name}' must be numbers, row {row} holds '{texts[row]}'{way}")
        values = pa.chunked_array([[None if text in (None, "?") else float(text) for text in texts]], pa.float64())
    _refuse_missing(values, name, where)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    array = values.cast(pa.float64(), safe=False).to_numpy()  # whole numbers beyond 2^53 are rounded
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        count = int((~np.isfinite(array)).sum())
        kind = "missing" if np.isnan(array[row]) else "infinite"
        raise InputError(
            f"{where}: {count} {kind} values in column '{name}', the first in row {row}; remove or fill them"
        )
    return array


def plain_values(values: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A target column as numpy: numbers, bools, or text as objects. Raises InputError for missing values and dates."""
    values = _plain(values, name, where)
    if pa.types.is_string(values.type):
        _refuse_missing(values, name, where)
        texts = np.array([text.as_py() for text in values], dtype=object)
        missing = np.flatnonzero(texts == "?")
        if len(missing) and all(is_number(text) for text in texts if text != "?"):
            raise InputError(_missing_text(len(missing), name, int(missing[0]), where))
        return texts
    _refuse_missing(values, name, where)
    return values.to_numpy()


def _plain(values: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    kind: Any = values.type
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
        kind = values.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return pc.utf8_trim_whitespace(values.cast(pa.string()))
    if pa.types.is_temporal(kind):
        raise InputError(f"{where}: column '{name}' holds dates or times ({kind}); turn it into numbers or remove it")
    if pa.types.is_null(kind):
        raise InputError(f"{where}: column '{name}' is empty: all {len(values)} values are missing; remove or fill it")
    if pa.types.is_decimal(kind):
        return values.cast(pa.float64())
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where}: column '{name}' has the type {kind}; numbers or text are needed")
    return values


def _levels(values: pa.ChunkedArray, name: str, where: str) -> tuple[str, ...]:
    values = _plain(values, name, where)
    if not pa.types.is_string(values.type):
        return ()
    levels = sorted(pc.unique(values).to_pylist())
    numeric = [level for level in levels if is_number(level)]
    others = [level for level in levels if not is_number(level)]
    if not others:
        return ()
    if len(numeric) > max(10, len(levels) / 2):
        row = pc.index(values, others[0]).as_py()
        raise InputError(f"{where}: column '{name}' holds the text '{others[0]}' among numbers, in row {row}")
    if len(levels) > MAX_LEVELS or (len(values) >= 20 and len(levels) > len(values) / 2):
        raise InputError(
            f"{where}: column '{name}' is text with {len(levels)} different values in {len(values)} rows (such as "
            f"'{levels[0]}'); at most {MAX_LEVELS} and half the rows can be one-hot encoded. Remove or group it"
        )
    return tuple(levels)


def _refuse_gaps(table: Any, where: str) -> None:
    """Count missing values over all columns: empty, NaN, and ? among numbers."""
    total, columns, first = 0, 0, (len(table), "")
    for name in table.column_names:
        gaps = _gaps(table[name])
        if gaps.any():
            total, columns = total + int(gaps.sum()), columns + 1
            first = min(first, (int(np.argmax(gaps)), name))
    if total:
        raise InputError(
            f"{where}: {total} missing values in {columns} of {table.num_columns} columns, the first in row "
            f"{first[0]}, column '{first[1]}'; remove or fill them"
        )


def _gaps(values: Any) -> np.ndarray:
    gaps = pc.is_null(values, nan_is_null=True)
    if pa.types.is_string(values.type):
        question = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), "?"), False)
        if pc.any(question).as_py():
            others = pc.unique(values.filter(pc.invert(pc.or_(question, gaps)))).to_pylist()
            if all(is_number(text.strip()) for text in others):
                gaps = pc.or_(gaps, question)
    return gaps.to_numpy()


def _one_hot(values: pa.ChunkedArray, column: Column, where: str) -> np.ndarray:
    if not pa.types.is_string(_plain(values, column.name, where).type):
        values = values.cast(pa.string())
    values = _plain(values, column.name, where)
    _refuse_missing(values, column.name, where)
    found = pc.index_in(values, value_set=pa.array(column.levels)).to_numpy()
    if values.null_count or np.isnan(found.astype(float)).any():
        row = int(np.flatnonzero(np.isnan(found.astype(float)))[0])
        raise InputError(
            f"{where}: column '{column.name}' holds '{values[row]}' in row {row}, which is not among the values that "
            f"the network was trained on: {few(list(column.levels), _NAMED)}"
        )
    return np.eye(len(column.levels))[found.astype(np.int64)]


def _refuse_missing(values: pa.ChunkedArray, name: str, where: str) -> None:
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise InputError(_missing_text(values.null_count, name, row, where))


def _missing_text(count: int, name: str, row: int, where: str) -> str:
    return f"{where}: {count} missing values in column '{name}', the first in row {row}; remove or fill them"

"""CSV and Parquet files as Arrow tables. Rows are counted from 0, after the header."""

from __future__ import annotations

import re
from collections import Counter
from typing import cast

import fsspec
import pyarrow as pa
from fsspec.core import OpenFile
from pyarrow import csv, parquet

from pipeline.errors import InputError
from pipeline.own_code import cause

_MISSING = {"", "na", "nan", "n/a", "null", "none", "?", "#n/a", "-nan"}
_NULLS = ["", "NA", "NaN", "nan", "N/A", "n/a", "NULL", "null", "#N/A", "-nan"]
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?")
_SAMPLE_LINES = 50


def read_bytes(uri: str, setting: str) -> bytes:
    """Read a file from a path or URI, unpacked if its name ends in .gz, .bz2 or .xz. Raises InputError."""
    try:
        with cast(OpenFile, fsspec.open(uri, "rb", compression="infer")) as file:
            return file.read()
    except FileNotFoundError as error:
        raise InputError(f"{setting}: {uri}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{setting}: {uri} is a folder; name a file in it") from error
    except Exception as error:
        raise InputError(f"{setting}: {uri} cannot be read: {cause(error)}") from error


def read_parquet(uri: str, setting: str = "data.source") -> pa.Table:
    """Read one Parquet file. Raises InputError."""
    data = read_bytes(uri, setting)
    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{setting}: {uri} is no Parquet file: {cause(error)}") from error
    return table.drop_columns([name for name in table.column_names if re.fullmatch(r"__index_level_\d+__", name)])


def read_csv(uri: str, setting: str = "data.source", target: int | str | None = None) -> pa.Table:
    """Read delimited text; finds delimiter, header and decimal comma by itself.

    Without a header the columns are called 0, 1, ... and the table's metadata say ``headerless``. A first line that
    holds the name of the target is a header. Raises InputError.
    """
    data = read_bytes(uri, setting)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{setting}: {uri} is not UTF-8 text (byte {error.start}); save it as UTF-8 CSV") from error
    lines = [line for line in text[: 1 << 20].splitlines()[: _SAMPLE_LINES + 1] if line.strip()]
    if not lines:
        raise InputError(f"{setting}: {uri} holds no rows")
    delimiter = find_delimiter(lines)
    if delimiter == " ":
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    cells = [split_line(line, delimiter) for line in lines]
    named = isinstance(target, str) and not is_number(target) and target in cells[0]
    header = named or has_header(cells)
    names = cells[0] if header else [str(column) for column in range(len(cells[0]))]
    _check_names(names, f"{setting}: {uri}")
    comma = delimiter != "," and any(_DECIMAL_COMMA.fullmatch(cell) for row in cells[1:] for cell in row)
    table = _parse(text, names, header, delimiter, "," if comma else ".", f"{setting}: {uri}")
    if not len(table):
        raise InputError(f"{setting}: {uri} holds a header and no rows")
    return table if header else table.replace_schema_metadata({"headerless": "yes"})


def _parse(text: str, names: list[str], header: bool, delimiter: str, decimal: str, where: str) -> pa.Table:
    try:
        return csv.read_csv(
            pa.BufferReader(text.encode()),
            read_options=csv.ReadOptions(column_names=names, skip_rows=_header_line(text) if header else 0),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(null_values=_NULLS, strings_can_be_null=True, decimal_point=decimal),
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} is no table: {cause(error)}") from error


def _header_line(text: str) -> int:
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            return number + 1
    return 1


def _check_names(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{where}: the column '{twice[0]}' is there {names.count(twice[0])} times; rename one")
    if "" in names:
        raise InputError(
            f"{where}: column {names.index('')} has no name; if it is a row number, leave it out (pandas: index=False)"
        )


def split_line(line: str, delimiter: str) -> list[str]:
    """Cells of one line, without quotes and surrounding blanks."""
    if delimiter == " ":
        return line.split()
    cells = re.findall(
        rf'(?:^|{re.escape(delimiter)})\s*("(?:[^"]|"")*"|[^{re.escape(delimiter)}]*)', line.rstrip("\r\n")
    )
    return [cell.strip().strip('"').strip() for cell in cells]


def find_delimiter(lines: list[str]) -> str:
    """The delimiter that cuts most lines into the same number of cells (at least two); a blank stands for any blanks.

    Semicolon before comma: where both would do, commas are decimal.
    """
    best, best_share = " ", 0.0
    for delimiter in (";", "\t", ",", "|", " "):
        counts = Counter(len(split_line(line, delimiter)) for line in lines)
        cells, often = counts.most_common(1)[0]
        if cells > 1 and often / len(lines) > best_share:
            best, best_share = delimiter, often / len(lines)
    return best if best_share else ","


def has_header(cells: list[list[str]]) -> bool:
    """Whether the first line names columns: text above a number, no number at all, or 0, 1, 2, ..."""
    first, rest = cells[0], cells[1:]
    if first == [str(column) for column in range(len(first))] and len(first) > 1:
        return True
    if not any(is_number(cell) for cell in first):
        return not all(cell.lower() in _MISSING for cell in first)
    for column, cell in enumerate(first):
        if not is_number(cell) and cell.lower() not in _MISSING:
            below = [row[column] for row in rest if len(row) > column and row[column].lower() not in _MISSING]
            if below and all(is_number(value) for value in below):
                return True
    return _numbers_then_name(first, rest)


def _numbers_then_name(first: list[str], rest: list[list[str]]) -> bool:
    # 1,2,3,...,class: consecutive whole numbers as names of the feature columns.
    numbers = [cell for cell in first if is_number(cell)]
    consecutive = numbers == [str(k) for k in range(int(float(numbers[0])), int(float(numbers[0])) + len(numbers))]
    return len(numbers) > 2 and consecutive and len(numbers) < len(first) and bool(rest)


def is_number(text: str) -> bool:
    """Whether a cell reads as a number, with decimal point or comma."""
    try:
        float(text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text)
    except ValueError:
        return False
    return text.lower() not in _MISSING

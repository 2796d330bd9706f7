"""CSV and Parquet files as Arrow tables. Rows are counted from 0, after the header."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import cast

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.core import OpenFile
from pyarrow import csv, parquet

from pipeline.errors import InputError, few
from pipeline.machine import machine_memory, readable
from pipeline.own_code import cause

_MISSING = {"", "na", "nan", "n/a", "null", "none", "?", "#n/a", "-nan"}
_NULLS = ["", "NA", "NaN", "nan", "N/A", "n/a", "NULL", "null", "#N/A", "-nan"]
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_QUOTED = re.compile(r'(^|[;,\t| ]) *"(?:[^"]|"")*"')
_OPENED = re.compile(r'(?:^|[;,\t| ]) *"')
_SAMPLE = 1 << 20
"""Characters from the beginning in which delimiter, header and decimal comma are looked for."""
_SAMPLE_LINES = 50
_BATCH_ROWS = 16384
COPIES = 4
"""Times that the values of a source are held at the peak: as they were read, as features, selected, and scaled."""


def refuse_what_does_not_fit(size: int, what: str, uri: str, setting: str) -> None:
    """Raise InputError with the arithmetic where reading `size` bytes of values needs more memory than there is."""
    need, have = COPIES * size, machine_memory()
    if have and need > have:
        raise InputError(
            f"{setting}: {uri} does not fit: {what} = {readable(size)}, x {COPIES} copies while they are read, split "
            f"and scaled = {readable(need)}, and this machine has {readable(have)}. Of a Parquet file only the rows of "
            "the run are kept: set data.train_rows, and data.validation and data.test as [first, last) rows. Otherwise "
            "use fewer columns or more memory."
        )


def read_bytes(uri: str, setting: str) -> bytes:
    """Read a file from a path or URI, unpacked if its name ends in .gz, .bz2 or .xz. Raises InputError."""
    try:
        system, path = fsspec.core.url_to_fs(uri)
        refuse_what_does_not_fit(int(system.size(path) or 0), "bytes in the file", uri, setting)
        with cast(OpenFile, fsspec.open(uri, "rb", compression="infer")) as file:
            return file.read()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise _absent(uri, setting) from error
    except IsADirectoryError as error:
        raise InputError(f"{setting}: {uri} is a folder; name a file in it") from error
    except Exception as error:
        raise InputError(f"{setting}: {uri} cannot be read: {cause(error)}") from error


def _absent(uri: str, setting: str) -> InputError:
    far = ", or its server does not answer" if "://" in uri and not uri.startswith("file:") else ""
    return InputError(f"{setting}: {uri}: no such file{far}")


@contextlib.contextmanager
def _parquet(uri: str, setting: str) -> Iterator[parquet.ParquetFile]:
    """A Parquet file that is read piece by piece. Failures inside the block become one line."""
    try:
        with cast(OpenFile, fsspec.open(uri, "rb")) as file:
            opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            _check_names(opened.schema_arrow.names, f"{setting}: {uri}")
            yield opened
    except FileNotFoundError as error:
        raise _absent(uri, setting) from error
    except IsADirectoryError as error:
        raise InputError(f"{setting}: {uri} is a folder; name a file in it") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{setting}: {uri} is no Parquet file that can be read: {cause(error)}") from error


def _parts(uri: str, setting: str) -> list[str]:
    """The file, or the Parquet files that lie in a folder, by name. Raises InputError for a folder without any."""
    try:
        system, path = fsspec.core.url_to_fs(uri)
        if not system.isdir(path):
            return [uri]
        found = sorted(system.ls(path, detail=False))
    except Exception:  # noqa: BLE001 - opening it as a file says what is wrong with the place
        return [uri]
    parts = [part for part in found if part.endswith(".parquet") and part.rpartition("/")[2][0] not in "._"]
    if not parts:
        raise InputError(f"{setting}: {uri} is a folder without .parquet files in it; name a file")
    return [system.unstrip_protocol(part) for part in parts]


def parquet_shape(uri: str, setting: str = "data.source") -> tuple[int, int]:
    """Rows of a file, or of the files in a folder, and columns, from the ends of the files alone. Raises InputError."""
    rows, columns = 0, 0
    for part in _parts(uri, setting):
        with _parquet(part, setting) as file:
            rows, columns = rows + file.metadata.num_rows, file.metadata.num_columns
    if not rows:
        raise InputError(f"{setting}: {uri} holds no rows")
    return rows, columns


def read_parquet(uri: str, setting: str = "data.source", keep: np.ndarray | None = None) -> pa.Table:
    """Read a Parquet file, or those in a folder one after the other, so that memory holds the kept rows and one batch.

    Args:
        uri: Path or URI.
        setting: Configuration field that named it, for messages.
        keep: Sorted numbers of the rows to keep; None keeps all.

    Raises:
        InputError: It cannot be read, or holds no rows, or the files have other columns.
    """
    tables: list[pa.Table] = []
    first = 0
    for part in _parts(uri, setting):
        with _parquet(part, setting) as file:
            names = [name for name in file.schema_arrow.names if not re.fullmatch(r"__index_level_\d+__", name)]
            schema = _plain_schema(pa.schema([file.schema_arrow.field(name) for name in names]))
            rows = file.metadata.num_rows
            inside = None if keep is None else keep[(keep >= first) & (keep < first + rows)] - first
            tables.append(pa.Table.from_batches(_kept(file, names, inside), schema))
            first += rows
        if tables[0].column_names != names:
            raise InputError(f"{setting}: {part} has the columns {few(names)}, not {few(tables[0].column_names)}")
    if not first:
        raise InputError(f"{setting}: {uri} holds no rows")
    try:
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{setting}: the files in {uri} do not fit together: {cause(error)}") from error


def _kept(file: parquet.ParquetFile, names: list[str], keep: np.ndarray | None) -> Iterator[pa.RecordBatch]:
    """The kept rows, batch by batch; row groups without any are not read."""
    first = 0
    for group in range(file.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        if keep is None or np.searchsorted(keep, last) > np.searchsorted(keep, first):
            row = first
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names):
                end = row + len(batch)
                batch = batch.cast(_plain_schema(batch.schema))
                if keep is None:
                    yield batch
                else:
                    inside = keep[np.searchsorted(keep, row) : np.searchsorted(keep, end)]
                    yield batch.take(pa.array(inside - row))
                row = end
        first = last


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """Views of text as text: rows cannot be taken from them."""
    return pa.schema([f.with_type(pa.string()) if pa.types.is_string_view(f.type) else f for f in schema])


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
    lines = _first_records(text[:_SAMPLE])
    if not lines:
        raise InputError(f"{setting}: {uri} holds no rows")
    delimiter = find_delimiter(lines)
    if delimiter == " ":
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
        lines = _first_records(text[:_SAMPLE])
    cells = [split_line(line, delimiter) for line in lines]
    named = isinstance(target, str) and not is_number(target) and target in cells[0]
    header = named or has_header(cells)
    names = cells[0] if header else [str(column) for column in range(len(cells[0]))]
    _check_names(names, f"{setting}: {uri}")
    comma = delimiter != "," and any(_DECIMAL_COMMA.fullmatch(cell) for row in cells[1:] for cell in row)
    if header:
        text = text[text.index(lines[0]) + len(lines[0]) :]
        if not text.strip():
            raise InputError(f"{setting}: {uri} holds a header and no rows")
    table = _parse(text, names, delimiter, "," if comma else ".", f"{setting}: {uri}")
    return table if header else table.replace_schema_metadata({"headerless": "yes"})


def _parse(text: str, names: list[str], delimiter: str, decimal: str, where: str) -> pa.Table:
    try:
        return csv.read_csv(
            pa.BufferReader(text.encode()),
            read_options=csv.ReadOptions(column_names=names),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(null_values=_NULLS, strings_can_be_null=True, decimal_point=decimal),
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} is no table: {cause(error)}") from error


def _first_records(text: str) -> list[str]:
    """The first records that are not blank, with their line ends; a line end between quotes belongs to its cell.

    Where a cell is opened and never closed, a record is a line.
    """
    lines = _LINE.findall(text)
    records: list[str] = []
    pieces: list[str] = []
    for line in lines:
        pieces.append(line)
        if not _OPENED.search(_QUOTED.sub(r"\1", "".join(pieces))):
            records.append("".join(pieces))
            pieces.clear()
        if len(records) > _SAMPLE_LINES or len(pieces) > _SAMPLE_LINES:
            break
    whole = records if len(pieces) <= _SAMPLE_LINES and records else lines[: _SAMPLE_LINES + 1]
    return [record for record in whole if record.strip()]


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


def is_number(text: str, *, comma: bool = True) -> bool:
    """Whether a cell reads as a number, with a decimal point or, if wanted, a comma."""
    try:
        float(text.replace(",", ".") if comma and _DECIMAL_COMMA.fullmatch(text) else text)
    except ValueError:
        return False
    return text.lower() not in _MISSING and "_" not in text  # Python reads 10_20 as 1020

"""Which rows train, which choose, which judge."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.tables import is_number, read_bytes
from pipeline.errors import InputError
from pipeline.own_code import cause
from pipeline.streams import stream

Split = float | tuple[int, int] | str | None
_LARGEST = 2.0**53
"""Largest row number that a float holds exactly."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Row numbers of the source, int64."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def within(self, kept: np.ndarray) -> Splits:
        """Where the rows stand among the kept ones, whose numbers are sorted."""
        return Splits(*(np.searchsorted(kept, rows) for rows in (self.train, self.validation, self.test)))


def split_rows(config: DataConfig, rows: int, seed: int) -> Splits:
    """Cut `rows` rows into training, validation and test. Raises InputError.

    Named rows are taken as they are named. A fraction takes round(fraction * rows) of the rows that are not named,
    chosen by the seed, in the source's order. What is left trains, in the source's order, the first `train_rows` of it.
    """
    taken = np.zeros(rows, dtype=bool)
    chosen: dict[str, np.ndarray] = {}
    both: tuple[tuple[str, Split], ...] = (("test", config.test), ("validation", config.validation))
    for name, split in both:
        if not isinstance(split, (float, int)):
            chosen[name] = _named_rows(split, rows, f"data.{name}")
            if taken[chosen[name]].any():
                row = int(chosen[name][taken[chosen[name]]][0])
                count = int(taken[chosen[name]].sum())
                raise InputError(f"data.validation and data.test share {count} rows, the first is row {row}")
            taken[chosen[name]] = True
    order = stream(seed, "split").permutation(rows)
    for name, split in both:
        if isinstance(split, (float, int)):
            chosen[name] = _fraction(split, rows, order, taken, f"data.{name}")
            taken[chosen[name]] = True
    train = np.flatnonzero(~taken)
    if len(train) < 2:
        raise InputError(
            f"data.validation and data.test leave {len(train)} of {rows} rows for training; at least 2 are needed"
        )
    if config.train_rows is not None and config.train_rows > len(train):
        raise InputError(
            f"data.train_rows must be at most {len(train)} (rows left for training), got {config.train_rows}"
        )
    return Splits(train[: config.train_rows], chosen["validation"], chosen["test"])


def _fraction(fraction: float, rows: int, order: np.ndarray, taken: np.ndarray, setting: str) -> np.ndarray:
    count = round(fraction * rows)
    free = order[~taken[order]]
    if fraction > 0 and count < 1:
        least = f"at least {1 / rows:.3g}, or " if rows > 1 else ""
        raise InputError(f"{setting} = {fraction} of {rows} rows is none; give {least}more data")
    if count > len(free):
        raise InputError(f"{setting} = {fraction} needs {count} rows, {len(free)} of {rows} are left")
    return np.sort(free[:count])


def _named_rows(split: tuple[int, int] | str | None, rows: int, setting: str) -> np.ndarray:
    if split is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(split, tuple):
        first, last = split
        if last > rows:
            raise InputError(f"{setting} = [{first}, {last}) needs {last} rows, the source has {rows}")
        return np.arange(first, last)
    index = _read_index(split, setting)
    if not len(index):
        raise InputError(f"{setting}: {split} names no rows")
    wrong = index[(index < 0) | (index >= rows)]
    if len(wrong):
        raise InputError(f"{setting}: {split} names row {wrong[0]}, the source has rows 0 to {rows - 1}")
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{setting}: {split} names row {values[counts > 1][0]} more than once")
    return index


def _read_index(uri: str, setting: str) -> np.ndarray:
    data = read_bytes(uri, setting)
    if data[:6] == b"\x93NUMPY":
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False).reshape(-1)
        except (ValueError, OSError) as error:
            raise InputError(f"{setting}: {uri} is no array of row numbers: {cause(error)}") from error
    else:
        cells = data.decode("utf-8-sig", errors="replace").replace(",", " ").split()
        if len(cells) > 1 and not is_number(cells[0]):
            cells = cells[1:]  # a header
        wrong = [cell for cell in cells if not is_number(cell)]
        if wrong:
            raise InputError(f"{setting}: {uri} must hold row numbers, one a line; it holds '{wrong[0][:40]}'")
        values = np.array([float(cell) for cell in cells])
    if values.dtype.kind not in "iuf":
        raise InputError(f"{setting}: {uri} must hold whole row numbers, not {values.dtype}")
    wrong = values[(values != np.floor(values)) | (np.abs(values.astype(float)) > _LARGEST)]
    if len(wrong):
        raise InputError(f"{setting}: {uri} must hold whole row numbers, it holds {wrong[0]:g}")
    return values.astype(np.int64)

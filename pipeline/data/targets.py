"""Targets as class numbers or as numbers."""

from __future__ import annotations

import numpy as np

from pipeline.data.arrays import LARGEST
from pipeline.errors import InputError

_MAX_CLASSES = 1000
_EXACT = 2.0**53
"""Largest whole number that a float holds exactly."""


def class_targets(y: np.ndarray, names: tuple[str, ...], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers int64 (rows,) and class names, sorted (whole numbers by size). Raises InputError.

    Args:
        y: Whole numbers, bools or text, (rows,).
        names: Names of classes 0, 1, ... if the source knows them.
        where: Source, for messages.
    """
    y = _flat(y, where, "class numbers, not one column a class (use numpy.argmax(y, axis=1))")
    if y.dtype.kind not in "fiubOU":
        raise InputError(f"{where}: the target must be numbers or text, got {y.dtype}")
    if y.dtype.kind == "f":
        _refuse_missing(y, where)
        other = y[(y != np.floor(y)) | (np.abs(y) > _EXACT)]
        if len(other):
            example = other[0]
            raise InputError(f"{where}: the target holds {example:g}, no class; for numbers set data.task: regression")
        y = y.astype(np.int64)
    values, numbers = np.unique(y.astype(str) if y.dtype.kind == "O" else y, return_inverse=True)
    if len(values) < 2:
        raise InputError(f"{where}: the target has one class only ('{values[0]}'); at least two are needed")
    if len(values) > _MAX_CLASSES or (len(y) >= 20 and len(values) > len(y) / 3):
        raise InputError(
            f"{where}: the target has {len(values)} different values in {len(y)} rows; for numbers set data.task: "
            f"regression, and classes can be at most {_MAX_CLASSES} and a third of the rows"
        )
    known = len(names) == len(values) and y.dtype.kind in "iu" and values[0] == 0 and values[-1] == len(values) - 1
    classes = names if known else tuple(str(value) for value in values)
    return numbers.astype(np.int64), classes


def number_targets(y: np.ndarray, where: str) -> np.ndarray:
    """Targets float64 (rows,). Raises InputError for text and missing values."""
    y = _flat(y, where, "one number a row")
    if y.dtype.kind not in "fiub":
        what = "text" if y.dtype.kind in "OUS" else str(y.dtype)
        raise InputError(
            f"{where}: the target is {what} (such as '{y[0]}'), and data.task: regression needs numbers; for classes "
            "set data.task: classification"
        )
    y = y.astype(np.float64)
    _refuse_missing(y, where)
    if len(y) and np.abs(y).max() > LARGEST:
        raise InputError(
            f"{where}: the target holds {y[np.abs(y).argmax()]:.3g}; numbers must be at most {LARGEST:g}. Rescale them"
        )
    return y


def _flat(y: np.ndarray, where: str, wanted: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise InputError(f"{where}: the target has shape {y.shape}; it must be {wanted}")
    return y


def _refuse_missing(y: np.ndarray, where: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(y))
    if len(wrong):
        kind = "missing" if np.isnan(y[wrong[0]]) else "infinite"
        raise InputError(f"{where}: {len(wrong)} {kind} values in the target, the first in row {wrong[0]}")

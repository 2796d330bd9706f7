"""All that brings new data to the network in the way the training rows came to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.data.arrays import LARGEST, Inputs, map_arrays, named_arrays
from pipeline.data.columns import Column, encode_columns
from pipeline.errors import InputError


@dataclass(frozen=True, eq=False)
class Part:
    """Shape and scale of one input array."""

    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: str
    """float32 or float64; int64 for token numbers and bool for masks, which are never scaled."""
    scale: float
    """Factor before standardisation: 1/255 for images of bytes."""
    mean: np.ndarray
    """Subtracted; broadcasts against one row."""
    std: np.ndarray
    """Divided by; broadcasts against one row."""

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Rows as the network takes them."""
        if self.dtype in ("int64", "bool"):
            return array.astype(self.dtype)
        result = array.astype(self.dtype)
        if self.scale != 1.0:
            result *= np.asarray(self.scale, dtype=self.dtype)
        result -= self.mean.astype(self.dtype)
        result /= self.std.astype(self.dtype)
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "scale": self.scale,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Part:
        """Inverse of `to_json`."""
        mean, std = np.asarray(data["mean"], dtype=np.float64), np.asarray(data["std"], dtype=np.float64)
        return cls(tuple(data["shape"]), data["dtype"], float(data["scale"]), mean, std)


Parts = Part | dict[str, Part] | tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class DataSchema:
    """Inputs and targets as the network knows them; stored with the run."""

    task: Literal["classification", "regression"]
    parts: Parts
    """Shape and scale of every input array, in the structure of the inputs."""
    features: tuple[Column, ...] = ()
    """Columns of a table, in order; empty for arrays."""
    headerless: bool = False
    """Whether the columns are known by position only."""
    classes: tuple[str, ...] = ()
    """Class names in the order of class numbers; empty for regression."""
    y_mean: float = 0.0
    """Mean of the training targets in their own unit, 0 if not standardised."""
    y_std: float = 1.0
    """Standard deviation of the training targets in their own unit, 1 if not standardised."""
    example: Any = None
    """Two training rows as the network takes them, on which a user's own network is tried; None where the data are not
    at hand, since they are not stored."""

    @property
    def input_shape(self) -> Any:
        """Shape of one row: a tuple, or a mapping or tuple of tuples where the input has several arrays."""
        return map_arrays(lambda part: part.shape, self.parts)

    @property
    def x_mean(self) -> Any:
        """What is subtracted from inputs, in their structure."""
        return map_arrays(lambda part: part.mean, self.parts)

    @property
    def x_std(self) -> Any:
        """What inputs are divided by, in their structure."""
        return map_arrays(lambda part: part.std, self.parts)

    def encode(self, raw: Any, where: str = "x") -> Inputs:
        """Bring a table or raw arrays to the network: select, one-hot, scale, standardise.

        Raises InputError if columns, shapes or values do not fit.
        """
        return self.scale(self.select(raw, where))

    def select(self, raw: Any, where: str = "x") -> Inputs:
        """The features of a table, a data frame or raw arrays, checked, before any scaling. Raises InputError."""
        if hasattr(raw, "__arrow_c_stream__"):  # tables of pyarrow, pandas, polars and others
            raw = self._from_table(raw if isinstance(raw, pa.Table) else pa.table(raw), where)
        elif not isinstance(raw, (dict, tuple)):
            raw = np.asarray(raw)
            if raw.ndim == 1 and isinstance(self.parts, Part) and self.parts.shape == (1,):
                raw = raw[:, None]  # as the source of the run may have been
        self._check(raw, where)
        return raw

    def scale(self, x: Inputs) -> Inputs:
        """Scale and standardise selected features."""
        return map_arrays(lambda part, array: part.apply(array), self.parts, x)

    def _from_table(self, table: pa.Table, where: str) -> np.ndarray:
        columns = self.features
        if not columns:
            if not isinstance(self.parts, Part) or len(self.parts.shape) != 1:
                raise InputError(
                    f"{where} is a table, but the network was trained on arrays of shape {self.input_shape}"
                )
            columns = tuple(Column(str(number)) for number in range(self.parts.shape[0]))
        positional = (self.headerless or not self.features) and b"headerless" in (table.schema.metadata or {})
        if positional and table.num_columns == len(columns):
            # The target column may stand between features: without it, order is all there is.
            table = table.rename_columns([column.name for column in columns])
        return encode_columns(table, columns, where)

    def _check(self, raw: Inputs, where: str) -> None:
        if type(raw) is not type(self.parts) and not (isinstance(raw, np.ndarray) and isinstance(self.parts, Part)):
            raise InputError(f"{where} must be {_structure(self.parts)}, got {_structure(raw)}")
        if isinstance(self.parts, dict) and isinstance(raw, dict) and set(raw) != set(self.parts):
            raise InputError(f"{where} must hold {sorted(self.parts)}, got {sorted(raw)}")
        if isinstance(self.parts, tuple) and len(raw) != len(self.parts):
            raise InputError(f"{where} must hold {len(self.parts)} arrays, got {len(raw)}")
        map_arrays(lambda part, array: _check_part(part, array, where), self.parts, raw)
        check_arrays(raw, where)
        refuse_huge(raw, where)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "task": self.task,
            "parts": _parts_json(self.parts),
            "features": [{"name": column.name, "levels": list(column.levels)} for column in self.features],
            "headerless": self.headerless,
            "classes": list(self.classes),
            "y_mean": self.y_mean,
            "y_std": self.y_std,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataSchema:
        """Inverse of `to_json`."""
        columns = tuple(Column(item["name"], tuple(item["levels"])) for item in data["features"])
        given = {name: data[name] for name in ("task", "headerless", "y_mean", "y_std")}
        return cls(parts=_parts_from_json(data["parts"]), features=columns, classes=tuple(data["classes"]), **given)


def check_arrays(x: Inputs, where: str) -> None:
    """Refuse inputs that are no numbers, differ in rows, or are not finite. Raises InputError."""
    rows: int | None = None
    if next(named_arrays(x), None) is None:
        raise InputError(f"{where} holds no inputs: it is an empty {'mapping' if isinstance(x, dict) else 'tuple'}")
    for name, array in named_arrays(x):
        place = where if name == "x" else f"{where} {name}"
        if array.dtype.kind not in "fiub" or array.ndim < 1:
            raise InputError(f"{place} must be an array of numbers with rows first, got {array.dtype} {array.shape}")
        if 0 in array.shape[1:]:
            raise InputError(f"{place} has no numbers in a row: its shape is {array.shape}")
        if rows is not None and len(array) != rows:
            raise InputError(f"{place} has {len(array)} rows, another array has {rows}")
        rows = len(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            wrong = np.argwhere(~np.isfinite(array))
            kind = "missing" if np.isnan(array[tuple(wrong[0])]) else "infinite"
            column = f", column {wrong[0][1]}" if array.ndim == 2 else ""
            raise InputError(
                f"{place}: {len(wrong)} {kind} values, the first in row {wrong[0][0]}{column}; remove or fill them"
            )


def refuse_huge(x: Inputs, where: str) -> None:
    """Squares of such numbers overflow in single precision, so that not even their spread can be computed."""
    for name, array in named_arrays(x):
        most = max(float(array.max()), -float(array.min())) if array.size else 0.0
        if most > LARGEST:
            raise InputError(f"{where}: {name} holds {most:.3g}; numbers must be at most {LARGEST:g}. Rescale them")


def _check_part(part: Part, array: np.ndarray, where: str) -> None:
    if array.shape[1:] != part.shape:
        raise InputError(f"{where} must have rows of shape {part.shape}, got {array.shape[1:]}")
    if part.dtype == "int64" and array.dtype.kind not in "iub":
        raise InputError(f"{where} must hold token numbers (whole numbers), got {array.dtype}")
    if part.dtype == "bool" and array.dtype.kind != "b":
        raise InputError(f"{where} must hold a mask (bool) of shape {part.shape} a row, got {array.dtype}")


def _structure(value: Any) -> str:
    if isinstance(value, dict):
        return f"a mapping of {sorted(value)}"
    return f"a tuple of {len(value)} arrays" if isinstance(value, tuple) else "one array"


def _parts_json(parts: Parts) -> Any:
    if isinstance(parts, dict):
        return {"mapping": {name: part.to_json() for name, part in parts.items()}}
    if isinstance(parts, tuple):
        return {"tuple": [part.to_json() for part in parts]}
    return parts.to_json()


def _parts_from_json(data: dict[str, Any]) -> Parts:
    if "mapping" in data:
        return {name: Part.from_json(item) for name, item in data["mapping"].items()}
    if "tuple" in data:
        return tuple(Part.from_json(item) for item in data["tuple"])
    return Part.from_json(data)

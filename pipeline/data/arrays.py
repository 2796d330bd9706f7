"""What enters a network: one array, or a mapping or tuple of arrays, always with rows along the first axis."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST = 1e18
"""Largest size of a feature and of a target: squares of larger numbers overflow in single precision."""
Inputs = np.ndarray | dict[str, np.ndarray] | tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a data set, ready for the network."""

    x: Inputs
    """Inputs; float32 or float64 features, or int64 token numbers."""
    y: np.ndarray
    """Class numbers int64, or float64 targets (standardised if the configuration says so), shape (rows,)."""
    index: np.ndarray
    """Row numbers in the source, int64, shape (rows,)."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.index)


def map_arrays(function: Callable[..., Any], x: Any, *others: Any) -> Any:
    """Apply `function` to every array of `x` (and the matching parts of `others`) and keep the structure."""
    if isinstance(x, dict):
        return {name: map_arrays(function, x[name], *(other[name] for other in others)) for name in x}
    if isinstance(x, tuple):
        return tuple(map_arrays(function, *parts) for parts in zip(x, *others, strict=True))
    return function(x, *others)


def named_arrays(x: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    """Every array with a name for messages: ``x``, ``x['key']`` or ``x[0]``."""
    if isinstance(x, dict):
        yield from ((f"x[{name!r}]", array) for name, array in x.items())
    elif isinstance(x, tuple):
        yield from ((f"x[{number}]", array) for number, array in enumerate(x))
    else:
        yield "x", x


def count_rows(x: Inputs) -> int:
    """Length of the first axis."""
    return len(next(named_arrays(x))[1])


def select_rows(x: Inputs, index: np.ndarray) -> Inputs:
    """Copy the rows at `index`."""
    return map_arrays(lambda array: array[index], x)


class Digest:
    """sha256 over named arrays: names, shapes, number formats and bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, x: Inputs) -> None:
        """Add all arrays of `x` under `name`."""
        for part, array in named_arrays(x):
            array = np.ascontiguousarray(array)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            self._hash.update(f"{name}|{part}|{array.shape}|{array.dtype.str}|".encode())
            self._hash.update(array.reshape(-1).view(np.uint8).data)

    def add_text(self, text: str) -> None:
        """Add a text."""
        self._hash.update(f"{len(text)}|{text}|".encode())

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._hash.hexdigest()

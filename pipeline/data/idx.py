"""The file format of MNIST and its relatives: a big-endian header, then the bytes of one array."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence

import fsspec
import numpy as np

from pipeline.data.tables import read_bytes
from pipeline.errors import InputError
from pipeline.own_code import cause

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = (("train",), ("t10k", "test"))


def read_idx_pair(prefix: str, setting: str, *, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images (rows, 1, height, width) and labels (rows,) of ``PREFIXtrain-images-idx3-ubyte[.gz]`` and so on.

    The training part (train-*) comes first, then the test part (t10k-* or test-*); either may be absent. With
    `held_out` only the test part is read where both are there. Raises InputError.
    """
    for candidate in (prefix, prefix if prefix.endswith("/") else prefix + "/"):
        parts = [found for names in _PARTS if (found := _find(candidate, names, setting))]
        if parts:
            arrays = [_read_part(*part, setting) for part in (parts[-1:] if held_out else parts)]
            images, labels = [part[0] for part in arrays], [part[1] for part in arrays]
            return _join(images), _join(labels)
    raise InputError(f"{setting}: no {prefix}train-images-idx3-ubyte(.gz) and no {prefix}t10k-images-idx3-ubyte(.gz)")


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _find(prefix: str, names: Sequence[str], setting: str) -> tuple[str, str] | None:
    for name in names:
        for suffix in (".gz", ""):
            images, labels = (f"{prefix}{name}-{kind}-ubyte{suffix}" for kind in ("images-idx3", "labels-idx1"))
            if _exists(images, setting):
                return images, labels
    return None


def _exists(uri: str, setting: str) -> bool:
    try:
        system, path = fsspec.core.url_to_fs(uri)
        return system.isfile(path)
    except Exception as error:
        raise InputError(f"{setting}: {uri} cannot be reached: {cause(error)}") from error


def _read_part(images_uri: str, labels_uri: str, setting: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_uri, setting), read_idx(labels_uri, setting)
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{setting}: {images_uri} has shape {images.shape}, its labels {labels.shape}; they do not fit"
        )
    return (images[:, None] if images.ndim == 3 else images), labels


def read_idx(uri: str, setting: str) -> np.ndarray:
    """The array of one idx file. Raises InputError."""
    try:
        data = read_bytes(uri, setting)
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{setting}: {uri} cannot be unpacked: {cause(error)}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES:
        raise InputError(f"{setting}: {uri} is no idx file")
    axes = data[3]
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4)) if len(data) >= 4 + 4 * axes else ()
    dtype = np.dtype(_TYPES[data[2]])
    if not shape or len(data) - 4 - 4 * axes != int(np.prod(shape)) * dtype.itemsize:
        raise InputError(f"{setting}: {uri} is cut short: its header says shape {shape}, it has {len(data)} bytes")
    array = np.frombuffer(data, dtype, offset=4 + 4 * axes).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)

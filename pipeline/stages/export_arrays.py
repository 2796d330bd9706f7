"""Export formats with one array a parameter: netCDF, Zarr, npz. Points come piece by piece, and none is kept."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5netcdf
import numpy as np
import zarr

from pipeline.stages.export_read import STATS, Points, Selection, variable_names

ZARR_CHUNK_BYTES = 8 * 2**20


def regions(points: Points) -> Iterator[tuple[slice, int, slice]]:
    """Yield (chains, draw, rows): runs of rows that are one draw of neighbouring walks."""
    cuts = np.flatnonzero((np.diff(points.chain) != 1) | (np.diff(points.draw) != 0)) + 1
    for low, high in zip([0, *cuts], [*cuts, len(points.chain)], strict=True):
        first = int(points.chain[low])
        yield slice(first, first + int(high - low)), int(points.draw[low]), slice(int(low), int(high))


class _Arrays:
    """Base of the formats with one array (chain, draw, *shape) a parameter."""

    def __init__(self, selection: Selection):
        self._names = variable_names(selection.parameters)
        self._selection = selection

    def _put(self, group: str, name: str, chains: slice, draw: int, values: np.ndarray) -> None:
        raise NotImplementedError

    def write(self, points: Points) -> None:
        """Store some points."""
        for chains, draw, rows in regions(points):
            for name, parameter in zip(self._names, self._selection.parameters, strict=True):
                values = points.theta[rows, parameter.columns]
                self._put("posterior", name, chains, draw, values.reshape(len(values), *parameter.shape))
            for name, values in points.stats.items():
                self._put("sample_stats", name, chains, draw, values[rows])

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Chain is the number of the walk; draw is the step of the record, or 0 if each walk has its own."""
        records = self._selection.records
        same = bool((records == records[0]).all())
        steps = (records[0] + 1) * self._selection.record_every
        return self._selection.walks.astype(np.int64), steps if same else np.arange(self._selection.draws)

    def _variables(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        for name, parameter in zip(self._names, self._selection.parameters, strict=True):
            yield "posterior", name, parameter.shape, self._selection.dtype
        for name, kind in STATS.items():
            yield "sample_stats", name, (), kind


def _dimensions(name: str, shape: tuple[int, ...]) -> list[str]:
    return ["chain", "draw", *(f"{name}_dim_{axis}" for axis in range(len(shape)))]


class NetcdfWriter(_Arrays):
    """ArviZ InferenceData as netCDF-4: groups posterior and sample_stats. `arviz.from_netcdf` opens it."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any]):
        super().__init__(selection)
        self._file = h5netcdf.File(path, "w")
        self._file.attrs.update(attributes)
        chains, draws = self._coordinates()
        groups = {}
        for group in ("posterior", "sample_stats"):
            groups[group] = self._file.create_group(group)
            groups[group].attrs.update(attributes)
            groups[group].dimensions = {"chain": selection.chains, "draw": selection.draws}
            groups[group].create_variable("chain", ("chain",), data=chains)
            groups[group].create_variable("draw", ("draw",), data=draws)
        groups["sample_stats"].create_variable("start", ("chain",), data=selection.starts.astype(np.int16))
        self._open: dict[tuple[str, str], Any] = {}
        for group, name, shape, kind in self._variables():
            names = _dimensions(name, shape)
            for axis, dimension in enumerate(names[2:]):
                groups[group].dimensions[dimension] = shape[axis]
                groups[group].create_variable(dimension, (dimension,), data=np.arange(shape[axis]))
            self._open[group, name] = groups[group].create_variable(name, tuple(names), kind)

    def _put(self, group: str, name: str, chains: slice, draw: int, values: np.ndarray) -> None:
        self._open[group, name][chains, draw] = values

    def close(self) -> None:
        """Finish what was written."""
        self._file.close()


class ZarrWriter(_Arrays):
    """ArviZ InferenceData as a Zarr folder (format 2, which old and new readers open)."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any]):
        super().__init__(selection)
        self._path = path
        root = zarr.open_group(str(path), mode="w", zarr_format=2, attributes=attributes)
        chains, draws = self._coordinates()
        self._open: dict[tuple[str, str], Any] = {}
        groups = {name: root.create_group(name, attributes=attributes) for name in ("posterior", "sample_stats")}
        for group in groups.values():
            self._small(group, "chain", chains)
            self._small(group, "draw", draws)
        self._small(groups["sample_stats"], "start", selection.starts.astype(np.int16), "chain")
        for group, name, shape, kind in self._variables():
            names = _dimensions(name, shape)
            for axis, dimension in enumerate(names[2:]):
                self._small(groups[group], dimension, np.arange(shape[axis]))
            array = groups[group].create_array(
                name,
                shape=(selection.chains, selection.draws, *shape),
                chunks=self._chunks(shape, np.dtype(kind).itemsize),
                dtype=kind,
                compressors=None,
                fill_value=None,  # xarray would read the fill value as missing
                attributes={"_ARRAY_DIMENSIONS": names},
            )
            self._open[group, name] = array

    def _chunks(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
        """One draw of a shard's walks a chunk where that is large; small variables get more, so that files are few."""
        one = int(np.prod(shape, dtype=np.int64)) * itemsize
        walks = max(1, min(self._selection.walks_per_shard, self._selection.chains, ZARR_CHUNK_BYTES // max(one, 1)))
        return (walks, 1 if one * walks > 2**16 else self._selection.draws, *(max(1, n) for n in shape))

    @staticmethod
    def _small(group: Any, name: str, values: np.ndarray, dimension: str | None = None) -> None:
        attributes = {"_ARRAY_DIMENSIONS": [dimension or name]}
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, fill_value=None, attributes=attributes)
        array[...] = values

    def _put(self, group: str, name: str, chains: slice, draw: int, values: np.ndarray) -> None:
        self._open[group, name][chains, draw] = values

    def close(self) -> None:
        """Finish what was written."""
        zarr.consolidate_metadata(str(self._path))


class NpzWriter(_Arrays):
    """One uncompressed .npz: walk, start, draw, a (chain, draw, *shape) array a parameter, and the statistics."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any]):
        super().__init__(selection)
        self._path, self._attributes = path, attributes
        self._files: dict[tuple[str, str], tuple[BinaryIO, int]] = {}
        for group, name, shape, kind in self._variables():
            file = open(path.with_name(f"{path.name}.{len(self._files)}"), "w+b")
            header = {"descr": np.dtype(kind).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (selection.chains, selection.draws, *shape)})
            self._files[group, name] = file, file.tell()

    def _put(self, group: str, name: str, chains: slice, draw: int, values: np.ndarray) -> None:
        file, start = self._files[group, name]
        values = np.ascontiguousarray(values)
        step = values[0].nbytes
        if self._selection.draws == 1:
            file.seek(start + chains.start * step)
            file.write(values.data)
            return
        for offset, value in enumerate(values):
            file.seek(start + ((chains.start + offset) * self._selection.draws + draw) * step)
            file.write(value.tobytes())

    def close(self) -> None:
        """Put the arrays into one file."""
        chains, draws = self._coordinates()
        small = {"walk": chains, "start": self._selection.starts, "draw": draws}
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, values in small.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values)
            for (_, name), (file, _) in self._files.items():
                file.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    while piece := file.read(2**22):
                        member.write(piece)
                file.close()
                Path(file.name).unlink()
